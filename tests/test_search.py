"""Plans by latency and by what may be lost, dry runs, and plans in files: from the settings to the written model.

Most runs take their latencies from the table of a device that is none, so that they say the same everywhere; the few
that are timed for real are of layers that low rank makes faster beyond doubt, or cannot.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import onnx_lrs
from onnx_lrs import Budget, Config, Result, cli, errors
from onnx_lrs.config import DEFAULT_DROP
from onnx_lrs.data import split
from onnx_lrs.planning import plan_file, timing
from onnx_lrs.planning import search as module
from onnx_lrs.planning.gate import halves
from onnx_lrs.runtime import latency
from tests import small_nets as nets
from tests.builders import make, node, normal

COMMAND = ("model.onnx", "-o", "small.onnx", "--data", "x.npy", "--threads", "1")

NET, DATA = nets.conv_net(), nets.as_floats(nets.pictures(60))
TEST = nets.as_floats(nets.pictures(80, seed=7))
DENSE_MS, REST_MS = 10.0, 5.0
LAYERS = 2  # of NET, that can be compressed
WHOLE_MS = LAYERS * DENSE_MS + REST_MS


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch, tmp_path_factory) -> None:
    """Ten rounds of everything are enough where the answer is clear."""
    for place, name in ((timing, "SECONDS"), (timing, "MODEL_SECONDS"), (latency, "SECONDS")):
        monkeypatch.setattr(place, name, 0.0)
    monkeypatch.setattr(module, "SECONDS", 0.3)
    monkeypatch.setattr(module, "LAYER_SECONDS", 0.1)


def settings(**changes: Any) -> Config:
    return Config(**({"threads": 1, "method": "hsvd", "multiple": 4, "fit": "independent"} | changes))


def squeeze(model: onnx.ModelProto = NET, data: Any = DATA, output: Path | None = None, **changes: Any) -> Result:
    more = {name: changes.pop(name) for name in ("test", "labels", "metric") if name in changes}
    return onnx_lrs.compress(model, output, data=data, config=settings(**changes), **more)


def forms(result: Result) -> list[tuple[str, str, int, int]]:
    return [(layer.name, layer.form, layer.rank, layer.kept_channels) for layer in result.layers]


def ratio_of(layer: dict[str, Any], shape: str) -> float:
    """Return what a shape takes on the device that is none: its share of the weights, and a little."""
    form, rank, kept, outputs, _ = shape.split(",")
    channels, taps = layer["input_shape"][1], math.prod(layer["geometry"]["kernel"])
    out, d = layer["out"], channels * taps
    if form == "spatial":
        weights = int(rank) * (channels * layer["geometry"]["kernel"][0] + out * layer["geometry"]["kernel"][1])
    else:
        weights = int(rank) * (out + d) + int(kept) * taps * out
    if form == "dense":
        weights = out * d
    return 0.05 + weights / (out * d) * (1.0 if outputs == "None" else int(outputs) / out)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """The latencies of a device that is none: every dense layer of NET takes as long as the other."""
    place = tmp_path_factory.mktemp("tables") / "table.json"
    patched = pytest.MonkeyPatch()
    patched.setattr(timing, "SECONDS", 0.0)
    squeeze(budget=Budget(latency=1.0), latency_table=place, dry_run=True)
    patched.undo()
    content = json.loads(place.read_text())
    content["device"]["name"] = "a board on another desk"
    for key, entry in content["layers"].items():
        entry["dense_ms"] = DENSE_MS
        entry["ratios"] = {shape: ratio_of(json.loads(key), shape) for shape in entry["ratios"]}
    content["models"] = dict.fromkeys(content["models"], WHOLE_MS)
    place.write_text(json.dumps(content))
    return place


# ------------------------------------------------------------------------------------------------ within a latency


@pytest.mark.parametrize("limit", [0.9, 0.6, 0.35])
def test_a_plan_for_another_device_keeps_to_its_latency(table, limit, tmp_path):
    result = squeeze(budget=Budget(latency=limit), latency_table=table, plan=tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    costs = [entry["latency_ms"] for entry in plan["layers"]]
    assert [before for before, _ in costs] == [DENSE_MS] * LAYERS
    assert result.predicted_latency_ms == pytest.approx(
        WHOLE_MS + sum(after - before for before, after in costs), abs=1e-3
    )
    assert (limit - 0.1) * WHOLE_MS <= result.predicted_latency_ms <= limit * WHOLE_MS
    assert "a board on another desk" in plan["latencies"]
    assert (result.unchanged, result.search) == ("", ())


def test_what_was_written_beside_the_model_and_whose_latencies_counted_is_said(table, tmp_path):
    plan, own = tmp_path / "plan.json", tmp_path / "own.json"
    foreign = squeeze(budget=Budget(latency=0.6), latency_table=table, plan=plan)
    assert any(f"latencies in {table} are those of a board on another desk" in note for note in foreign.notes)
    assert any("nothing was timed for it" in note for note in foreign.notes)
    assert f"The plan is in {plan}." in foreign.notes
    again = squeeze(plan=plan)
    assert not any("The plan is in" in note for note in again.notes)
    ours = squeeze(budget=Budget(latency=1.0), latency_table=own, dry_run=True)
    assert own.exists()
    assert not any("nothing was timed" in note for note in ours.notes)
    with pytest.raises(errors.ConfigError, match="--latency-table: no latency decides --params"):
        squeeze(budget=Budget(params=0.5), latency_table=own)


def test_with_another_devices_table_nothing_is_timed_and_runs_repeat(table):
    before = table.read_bytes()
    both = [squeeze(budget=Budget(latency=0.5), latency_table=table) for _ in range(2)]
    assert forms(both[0]) == forms(both[1])
    assert both[0].predicted_latency_ms == both[1].predicted_latency_ms
    models = [result.model.SerializeToString(deterministic=True) for result in both]
    assert models[0] == models[1]
    assert table.read_bytes() == before


def test_a_latency_that_no_plan_reaches_is_refused_with_one_that_is(table):
    with pytest.raises(errors.BudgetError, match=r"--latency 0\.01 cannot be reached") as caught:
        squeeze(budget=Budget(latency=0.01), latency_table=table)
    reachable = float(caught.value.remedy.partition("--latency ")[2].split(",")[0])
    assert 0.2 < reachable < 0.6  # what is no layer takes a fifth
    result = squeeze(budget=Budget(latency=reachable), latency_table=table)
    assert result.predicted_latency_ms <= reachable * WHOLE_MS


def wide_net() -> onnx.ModelProto:
    """Three Conv of 64 channels on maps of 20 x 20, of rank 8 but for some noise: 15 M multiply-accumulates each."""
    rng, nodes, constants, name = np.random.default_rng(0), [], {}, "x"
    for i in range(3):
        low = rng.standard_normal((64, 8)) @ rng.standard_normal((8, 576)) / np.sqrt(8 * 288)
        constants[f"w{i}"] = (low + 1e-3 * rng.standard_normal((64, 576))).astype(np.float32).reshape(64, 64, 3, 3)
        nodes += [
            node("Conv", [name, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1] * 4),
            node("Relu", [f"c{i}"], [f"r{i}"]),
        ]
        name = f"r{i}"
    nodes += [node("GlobalAveragePool", [name], ["p"]), node("Flatten", ["p"], ["f"]), node("Gemm", ["f", "v"], ["y"])]
    return make(nodes, {"x": ("N", 64, 20, 20)}, ["y"], constants | {"v": normal(64, 10)})


WIDE, WIDE_DATA = wide_net(), np.maximum(normal(40, 64, 20, 20), 0)


def test_a_limit_of_the_latency_holds_in_a_race_of_both_models():
    result = squeeze(WIDE, WIDE_DATA, budget=Budget(latency=0.6), multiple=None, columns=4096)
    assert result.unchanged == ""
    assert result.settings["multiple"] == 16
    assert all(layer.rank % 16 == 0 for layer in result.layers)
    assert result.after.latency_ms <= 0.75 * result.before.latency_ms  # other work on the machine is allowed for
    assert result.predicted_latency_ms <= 0.8 * result.before.latency_ms
    assert result.quality[0].relative_l2 < 0.1


def test_by_default_it_gets_faster_within_a_point_that_may_be_lost():
    model = onnx_lrs.compress(WIDE, data=WIDE_DATA, config=Config(threads=1, method="hsvd", columns=4096, holdout=0.5))
    assert model.settings["budget"]["max_drop"] == DEFAULT_DROP
    assert model.settings["multiple"] == 16
    assert model.unchanged == ""
    assert model.after.latency_ms < 0.8 * model.before.latency_ms
    assert {step.measure for step in model.search} == {"agreement"}
    assert 1.0 - model.quality[0].top1_agreement <= DEFAULT_DROP
    assert model.quality[0].samples == 10  # the half that confirms


# ------------------------------------------------------------------------------------------------ nothing to gain


def thin_net() -> onnx.ModelProto:
    """Depthwise Conv with 1x1 Conv of few channels between: two thinner ones take no less time than one."""
    rng = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {"stem": normal(33, 3, 3, 3)}
    nodes, name = [helper.make_node("Conv", ["x", "stem"], ["c"], "stem", pads=[1] * 4)], "c"
    for i in range(3):
        constants[f"d{i}"] = normal(33, 1, 3, 3, seed=i)
        constants[f"w{i}"] = rng.standard_normal((33, 33, 1, 1)).astype(np.float32) / 6
        nodes += [helper.make_node("Conv", [name, f"d{i}"], [f"a{i}"], f"deep{i}", group=33, pads=[1] * 4)]
        nodes += [
            helper.make_node("Conv", [f"a{i}", f"w{i}"], [f"b{i}"], f"thin{i}"),
            node("Relu", [f"b{i}"], [f"r{i}"]),
        ]
        name = f"r{i}"
    nodes += [node("GlobalAveragePool", [name], ["p"]), node("Flatten", ["p"], ["y"])]
    return make(nodes, {"x": ("N", 3, 6, 6)}, ["y"], constants)


@pytest.mark.parametrize("model", [thin_net(), nets.depthwise_net()], ids=["thin", "depthwise"])
def test_where_nothing_gets_faster_the_original_comes_out_with_code_9_and_the_reason(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "model.onnx")
    shape = [d.dim_value or 24 for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = normal(*shape)
    np.save("x.npy", x)
    argv = [*COMMAND, "--max-drop", "0", "--method", "hsvd"]
    code = cli.main([*argv, "--json", "report.json"])
    report = json.loads(Path("report.json").read_text())
    assert (code, code) == (cli.UNCHANGED, 9), capsys.readouterr().err
    assert "no layer becomes faster" in report["unchanged"] or "no plan keeps to" in report["unchanged"]
    assert report["after"] | {"file_bytes": 0} == report["before"] | {"file_bytes": 0}
    assert {layer["form"] for layer in report["layers"]} <= {"dense"}
    assert report["quality"] is None
    name = model.graph.input[0].name
    for a, b in zip(nets.run(model, {name: x}), nets.run("small.onnx", {name: x}), strict=True):
        np.testing.assert_array_equal(a, b)
    assert onnx.load("small.onnx") == model


# ------------------------------------------------------------------------------------------------ what may be lost


def labels_of(images: np.ndarray) -> np.ndarray:
    return nets.run(NET, {"image": images})[0].argmax(axis=1)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_halves_are_disjoint_whole_and_the_same_every_time(seed):
    items = np.arange(5, 46)
    search, confirm = halves(items, seed)
    assert sorted([*search, *confirm]) == items.tolist()
    assert (len(search), len(confirm)) == (21, 20)
    assert list(search) == sorted(search)
    np.testing.assert_array_equal(halves(items, seed)[0], search)
    assert halves(items, seed + 1)[0].tolist() != search.tolist()
    assert [len(half) for half in halves(np.array([4, 9]), seed)] == [1, 1]
    with pytest.raises(errors.ConfigError, match="two samples that judge"):
        halves(items[:1], seed)


@pytest.mark.parametrize(("fit", "limit"), [("independent", 0.05), ("cascade", 0.025), ("independent", 0.1)])
def test_no_more_than_the_limit_is_lost_on_either_half(table, fit, limit):
    labels = labels_of(TEST)
    budget = Budget(max_drop=limit)
    result = squeeze(budget=budget, latency_table=table, test=TEST, labels=labels, fit=fit)
    parts = halves(np.arange(len(TEST)), 0)
    right = nets.run(result.model, {"image": TEST})[0].argmax(axis=1) == labels
    for part in parts:
        assert 1.0 - right[part].mean() <= limit + 1e-9
    assert result.quality[0].samples == len(parts[1])
    assert result.quality[0].accuracy_after == pytest.approx(right[parts[1]].mean())
    assert {step.measure for step in result.search} == {"accuracy"}
    assert all(step.held == (step.drop <= limit + 1e-9) for step in result.search if step.fit != "confirm")

    asked, last = [step for step in result.search if step.fit == "alone"], result.search[-1]
    assert module.STEPS - 3 <= len(asked) <= module.STEPS
    for before, after in itertools.pairwise(asked):
        assert after.latency < before.latency if before.held else after.latency > before.latency
    assert all(step.predicted <= step.latency + 1e-9 for step in result.search)
    assert (last.fit, last.held) == ("confirm", True)
    assert last.drop == pytest.approx(1.0 - right[parts[1]].mean())
    assert result.predicted_latency_ms == pytest.approx(last.predicted * WHOLE_MS)
    assert {step.fit for step in result.search} <= {"alone", fit, "confirm"}
    assert any(note.startswith("--max-drop") and "that the search did not ask" in note for note in result.notes)


def test_a_larger_loss_buys_a_faster_model(table):
    found = [
        squeeze(budget=Budget(max_drop=x), latency_table=table, test=TEST).predicted_latency_ms for x in (0.0, 0.4)
    ]
    assert found[1] < found[0]


def test_without_classes_the_relative_error_is_the_loss(table):
    cut = onnx.ModelProto()
    cut.CopyFrom(nets.two_inputs())
    result = onnx_lrs.compress(
        nets.block(), data=nets.sentences(), config=settings(budget=Budget(max_drop=0.3), holdout=0.5)
    )
    assert {step.measure for step in result.search} == {"relative error"}
    assert result.unchanged or max(q.relative_l2 for q in result.quality) <= 0.3


class Counted:
    """A caller's metric; notes which samples it was asked about."""

    def __init__(self, value: float | None = None) -> None:
        self.value, self.asked = value, []

    def __call__(self, predict: Any, samples: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]) -> float:
        right, items = 0, []
        for numbers, feed in samples:
            items += numbers.tolist()
            expected = nets.run(NET, feed)[0]
            right += int(np.abs(predict(feed)["logits"] - expected).max(axis=1) @ np.ones(len(numbers)) < 1e-6)
        self.asked.append(tuple(items))
        return float(right > 0) if self.value is None else self.value


def test_the_callers_metric_decides(table):
    strict, blind = Counted(), Counted(0.7)
    by_strict, by_blind = (
        squeeze(budget=Budget(max_drop=0.1), latency_table=table, test=TEST, metric=metric)
        for metric in (strict, blind)
    )
    parts = [tuple(part.tolist()) for part in halves(np.arange(len(TEST)), 0)]
    assert set(strict.asked) <= set(parts)
    assert set(blind.asked) == set(parts)
    assert by_strict.unchanged.startswith("no plan keeps to --max-drop 0.1; the least drop found is 100.00%")
    assert [layer.form for layer in by_strict.layers] == ["dense"] * LAYERS
    assert {(step.measure, step.drop) for step in by_blind.search} == {("metric", 0.0)}
    assert by_blind.predicted_latency_ms < 0.5 * WHOLE_MS  # nothing is ever lost: as fast as it gets
    assert by_blind.unchanged == ""


def test_without_data_nothing_can_be_said_about_loss():
    with pytest.raises(errors.ConfigError, match="--max-drop needs typical inputs"):
        onnx_lrs.compress(NET, config=settings(budget=Budget(max_drop=0.01), method="svd"))
    with pytest.raises(errors.ConfigError, match="two samples that judge"):
        squeeze(data=DATA[:4], budget=Budget(max_drop=0.01), holdout=0.2)


@pytest.mark.parametrize("budget", [Budget(latency=0.5), Budget(max_drop=0.1)])
def test_single_entries_make_nothing_faster_and_are_refused(budget):
    with pytest.raises(errors.ConfigError, match=r"faster|single weights"):
        squeeze(budget=budget, method="greedy", structure="elements")
    with pytest.raises(errors.ConfigError, match="single weights"):
        squeeze(budget=budget, method="nettrim")


# ------------------------------------------------------------------------------------------------ several limits


@pytest.mark.parametrize(
    "limits",
    [
        {"params": 0.6, "macs": 0.5},
        {"params": 0.3, "macs": 0.9},
        {"params": 0.9, "size": 0.4},
        {"params": 0.7, "macs": 0.7, "size": 0.7},
    ],
    ids=str,
)
def test_several_limits_hold_at_once(limits, tmp_path):
    result = squeeze(output=tmp_path / "small.onnx", budget=Budget(**limits), method="lrs")
    written = onnx.load(tmp_path / "small.onnx")
    real = {
        "params": nets.count_params(written) / nets.count_params(NET),
        "macs": nets.count_macs(written, {"N": 1}) / nets.count_macs(NET, {"N": 1}),
        "size": (tmp_path / "small.onnx").stat().st_size / NET.ByteSize(),
    }
    assert all(real[name] <= limit for name, limit in limits.items()), real
    assert any(real[name] > 0.8 * limit for name, limit in limits.items()), "more was given up than was asked for"
    assert result.after.file_bytes == (tmp_path / "small.onnx").stat().st_size


def test_a_latency_beside_another_limit(table):
    result = squeeze(budget=Budget(latency=0.7, params=0.35), latency_table=table)
    assert result.predicted_latency_ms <= 0.7 * WHOLE_MS
    assert result.after.params <= 0.35 * result.before.params


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_other_limits_hold_whatever_may_be_lost(table, drop):
    for limits in ({"latency": 0.5}, {"params": 0.3}):
        budget = Budget(max_drop=drop, **limits)
        if drop == 0.0:
            with pytest.raises(errors.BudgetError, match=r"had together: no plan keeps to --max-drop 0; .* is [1-9]"):
                squeeze(budget=budget, latency_table=table, test=TEST)
            continue
        result = squeeze(budget=budget, latency_table=table, test=TEST)
        assert result.predicted_latency_ms <= limits.get("latency", 1.0) * WHOLE_MS
        assert result.after.params <= limits.get("params", 1.0) * result.before.params
    with pytest.raises(errors.BudgetError, match="cannot be reached"):
        squeeze(budget=Budget(max_drop=drop, params=0.01), latency_table=table, test=TEST)


def test_layers_that_are_no_faster_stay_compressed_where_another_limit_needs_them():
    try:
        result = squeeze(budget=Budget(latency=1.0, params=0.4))
    except errors.BudgetError:
        return  # so small a net may not get faster on a busy machine
    assert result.unchanged or result.after.params <= 0.4 * result.before.params


def test_a_layer_that_only_gets_slower_does_not_hide_what_others_gain(table, tmp_path):
    """All candidates of the Conv take three times as long; the Gemm's are fast."""
    content = json.loads(table.read_text())
    for key, entry in content["layers"].items():
        if json.loads(key)["op"] == "Conv":
            entry["ratios"] = dict.fromkeys(entry["ratios"], 3.0)
    (tmp_path / "table.json").write_text(json.dumps(content))
    more = {"latency_table": tmp_path / "table.json", "test": TEST, "metric": Counted(0.5)}
    result = squeeze(budget=Budget(max_drop=0.1), **more)
    assert [layer.form == "dense" for layer in result.layers] == [True, False]
    fastest = min(v for k, e in content["layers"].items() for v in e["ratios"].values() if '"Gemm"' in k)
    least = REST_MS + DENSE_MS + fastest * DENSE_MS
    assert least <= result.predicted_latency_ms <= least + 0.15 * WHOLE_MS
    for entry in content["layers"].values():
        entry["ratios"] = dict.fromkeys(entry["ratios"], 3.0)
    (tmp_path / "table.json").write_text(json.dumps(content))
    assert squeeze(budget=Budget(max_drop=0.1), **more).unchanged == "no layer becomes faster"


@pytest.mark.parametrize("limits", [{"params": 0.01, "macs": 0.02}, {"params": 0.01, "macs": 0.9}])
def test_limits_that_cannot_be_reached_say_what_can(limits):
    with pytest.raises(errors.BudgetError, match="cannot be reached") as caught:
        squeeze(budget=Budget(**limits))
    message = caught.value.message
    assert message.startswith(" ".join(f"--{name} {limit:g}" for name, limit in limits.items()))
    assert "each alone" in message
    reachable = {name: float(message.split(f" of the {name}")[0].split()[-1]) for name in limits}
    for name, least in reachable.items():
        result = squeeze(budget=Budget(**{name: least}))
        assert getattr(result.after, name) <= least * getattr(result.before, name)
        with pytest.raises(errors.BudgetError):
            squeeze(budget=Budget(**{name: round(least - 0.002, 3)}))


# ------------------------------------------------------------------------------------------------ dry runs


CASES: dict[str, tuple[onnx.ModelProto, Any]] = {
    "conv": (NET, DATA),
    "two inputs": (nets.two_inputs(), nets.pairs()),
    "block": (nets.block(), nets.sentences()),
    "conv without data": (NET, None),
    "two inputs without data": (nets.two_inputs(), None),
}


SEEN = [name for name, (_, data) in CASES.items() if data is not None]
ELEMENTS = {"method": "greedy", "structure": "elements", "steps": 5}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {"method": "lrs", "fit": fit}) for name in SEEN for fit in ("cascade", "independent")),
        *((name, {"method": "svd"}) for name in CASES if "without data" in name),
        ("conv", ELEMENTS),
        ("two inputs", ELEMENTS | {"fit": "cascade"}),
    ],
    ids=str,
)
def test_a_dry_run_writes_no_model_and_tells_the_sizes_of_the_real_one(name, more, tmp_path):
    model, data = CASES[name]
    more = {"budget": Budget(params=0.5)} | more
    dry = squeeze(model, data, tmp_path / "small.onnx", dry_run=True, plan=tmp_path / "plan.json", **more)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (dry.dry_run, dry.output, dry.quality) == (True, None, None)
    real = squeeze(model, data, **more)
    assert forms(dry) == forms(real)
    assert (dry.after.params, dry.after.macs) == (real.after.params, real.after.macs)
    assert [(la.params_after, la.macs_after) for la in dry.layers] == [
        (la.params_after, la.macs_after) for la in real.layers
    ]
    assert {"fit", "write"} & set(dry.seconds) == set()
    assert dry.after.latency_ms > 0


def test_a_dry_run_of_a_search_makes_its_plan(table, tmp_path):
    more = {"budget": Budget(max_drop=0.05), "latency_table": table, "test": TEST}
    dry, real = squeeze(dry_run=True, **more), squeeze(**more)
    assert dry.predicted_latency_ms == real.predicted_latency_ms
    assert dry.search == real.search
    assert forms(dry) == forms(real)


# ------------------------------------------------------------------------------------------------ plans in files


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("conv", {"method": "lrs", "fit": "cascade"}),
        ("conv", {"method": "lrs"}),
        ("two inputs", {"method": "greedy", "fit": "cascade", "steps": 5}),
        ("two inputs", {"method": "greedy", "structure": "elements", "steps": 5}),
        ("block", {"method": "hsvd", "fit": "cascade-linear"}),
        ("conv without data", {"method": "svd"}),
        ("conv without data", {"method": "magnitude"}),
    ],
    ids=str,
)
def test_a_plan_that_is_carried_out_again_gives_the_same_file(name, more, tmp_path):
    model, data = CASES[name]
    place = tmp_path / "plan.json"
    first = squeeze(model, data, tmp_path / "first.onnx", plan=place, budget=Budget(params=0.5), **more)
    plan = json.loads(place.read_text())
    assert [(e["name"], e["form"], e.get("rank", 0), len(e.get("kept_channels", []))) for e in plan["layers"]] == forms(
        first
    )
    text = place.read_bytes()
    again = squeeze(model, data, tmp_path / "again.onnx", plan=place, **more)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()
    assert (place.read_bytes(), again.settings["budget"]) == (text, None)


@pytest.fixture
def plan(tmp_path) -> Path:
    place = tmp_path / "plan.json"
    squeeze(budget=Budget(params=0.5), method="lrs", multiple=8, plan=place, dry_run=True)
    return place


def edited(place: Path, name: str, **changes: Any) -> None:
    content = json.loads(place.read_text())
    (entry,) = [entry for entry in content["layers"] if entry["name"] == name]
    for field, value in changes.items():
        entry[field] = value
        if value is None:
            del entry[field]
    place.write_text(json.dumps(content))


@pytest.mark.parametrize("fit", ["cascade", "independent"])
def test_an_edited_plan_is_obeyed(plan, fit):
    edited(plan, "conv2", form="spatial", rank=5, kept_channels=None, damping=None)
    edited(plan, "fc1", form="low-rank + channels", rank=7, kept_channels=[1, 9, 300], damping=0.1)
    result = squeeze(plan=plan, method="lrs", fit=fit)
    assert forms(result) == [("conv2", "spatial", 5, 0), ("fc1", "low-rank + channels", 7, 3)]
    assert all(0 < layer.error < 1 for layer in result.layers)
    edited(plan, "conv2", form="tucker", rank=6, inner_rank=9)
    result = squeeze(plan=plan, method="lrs", fit=fit)
    assert [(la.form, la.inner_rank, la.rank) for la in result.layers if la.name == "conv2"] == [("tucker", 9, 6)]
    edited(plan, "conv2", form="dense", inner_rank=None)
    edited(plan, "fc1", form="channels", rank=0, kept_channels=[2], damping=None)
    result = squeeze(plan=plan, method="lrs", fit=fit)
    assert forms(result) == [("conv2", "dense", 0, 0), ("fc1", "channels", 0, 1)]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"form": "round"}, "form is 'round'"),
    ({"form": "elements", "rank": 0, "elements": 5}, "form is 'elements'"),
    ({"form": "spatial", "rank": 4, "kept_channels": None}, "form is 'spatial'; only 2-D convolutions"),
    ({"form": "low-rank", "rank": 0, "kept_channels": None}, "rank is 0; it is a whole number from 1 to 96"),
    ({"form": "low-rank", "rank": 97, "kept_channels": None}, "rank is 97"),
    ({"form": "low-rank", "rank": 2.5, "kept_channels": None}, "rank is 2.5"),
    ({"form": "low-rank", "rank": "4", "kept_channels": None}, "rank is '4'"),
    ({"form": "low-rank", "rank": 4, "kept_channels": [1]}, "kept_channels is [1]"),
    ({"form": "channels", "rank": 4, "kept_channels": [1]}, "rank is 4"),
    ({"form": "channels", "rank": 0, "kept_channels": None}, "kept_channels is None"),
    ({"form": "channels", "rank": 0, "kept_channels": [1, 1]}, "kept_channels is [1, 1]"),
    (
        {"form": "channels", "rank": 0, "kept_channels": [768]},
        "kept_channels is [768]; it lists different channels from 0 to",
    ),
    ({"form": "low-rank", "rank": 4, "kept_channels": None, "elements": 3}, "elements is 3"),
    ({"form": "low-rank", "rank": 4, "kept_channels": None, "inner_rank": 3}, "inner_rank is 3"),
    ({"form": "tucker", "rank": 4, "kept_channels": None}, "form is 'tucker'; only 2-D convolutions"),
    ({"form": "low-rank", "rank": 4, "kept_channels": None, "damping": -1}, "damping is -1"),
    ({"form": "low-rank", "rank": 4, "kept_channels": None, "damping": "much"}, "damping is 'much'"),
    ({"form": None}, "it has no form"),
    ({"rank": True}, "true and false"),
    ({"rnak": 4}, "'rnak' is no field of a plan; there are damping, elements, form,"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
def test_an_entry_that_cannot_be_carried_out_names_layer_and_field(plan, changes, words):
    edited(plan, "fc1", **changes)
    with pytest.raises(errors.ConfigError) as caught:
        squeeze(plan=plan, method="lrs")
    assert caught.value.message.startswith(f"--plan {plan}, layer 'fc1': {words}")
    assert "Mend the entry" in caught.value.remedy


@pytest.mark.parametrize("form", ["spatial", "projected", "tucker"])
def test_a_kernel_that_is_too_wide_for_the_memory_is_not_taken_apart(plan, form, monkeypatch):
    edited(plan, "conv2", form=form, rank=4, inner_rank=5 if form == "tucker" else 0, kept_channels=None)
    monkeypatch.setattr(plan_file, "is_wide", lambda layer, memory_bytes: layer.name == "conv2")
    with pytest.raises(errors.ConfigError, match=f"layer 'conv2': form is '{form}'; within --memory 2GiB .* low-rank"):
        squeeze(plan=plan, method="lrs")


@pytest.mark.parametrize("node", ["nobody", "", 7, None, ["g1"]])
def test_a_plan_of_another_model_is_refused(plan, node):
    edited(plan, "fc1", node=node)
    with pytest.raises(errors.ConfigError, match="no compressible layer of this model"):
        squeeze(plan=plan, method="lrs")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value: line 1"),
        ("{", "Expecting property name .*: line 1"),
        *(
            (text, 'it needs "format": 1 and a list')
            for text in ("[]", "3", '{"format": 1}', '{"format": 1, "layers": [3]}')
        ),
        ('{"format": 2, "layers": []}', 'it needs "format": 1'),
    ],
)
def test_what_is_no_plan_is_refused(text, why, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(errors.ConfigError, match=f"plan.json is no plan: {why}"):
        squeeze(plan=tmp_path / "plan.json")


def test_a_plan_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(errors.ConfigError, match="is no plan: Is a directory"):
        squeeze(plan=tmp_path)


def test_an_entry_copied_from_another_layer_is_refused(plan):
    content = json.loads(plan.read_text())
    first, second = content["layers"][:2]
    plan.write_text(json.dumps(content | {"layers": [first, second, second | {"form": "dense"}]}))
    with pytest.raises(errors.ConfigError, match=f"layer '{second['name']}': it is there twice"):
        squeeze(plan=plan, method="lrs")
    plan.write_text(json.dumps(content | {"layers": [first | {"name": second["name"]}]}))
    with pytest.raises(errors.ConfigError, match=f"layer '{first['name']}': its name is '{second['name']}'"):
        squeeze(plan=plan, method="lrs")


def test_a_plan_and_a_budget_contradict_each_other(plan):
    with pytest.raises(errors.ConfigError, match=r"--params 0\.4 would make another one"):
        squeeze(plan=plan, budget=Budget(params=0.4))


def test_a_layer_that_a_plan_does_not_name_stays_dense(plan):
    content = json.loads(plan.read_text())
    content["layers"] = [entry for entry in content["layers"] if entry["name"] != "fc1"]
    plan.write_text(json.dumps(content))
    assert forms(squeeze(plan=plan, method="lrs"))[1] == ("fc1", "dense", 0, 0)


# ------------------------------------------------------------------------------------------------ the batch, the line


def test_the_batch_is_what_is_timed(tmp_path):
    single, many = (
        squeeze(budget=Budget(params=0.5), batch=batch, latency_table=None).before.latency_ms for batch in (1, 32)
    )
    assert many > 3 * single
    with pytest.raises(errors.ConfigError, match="--batch 3: the model does not take it"):
        squeeze(nets.conv_net(batch=4), budget=Budget(params=0.5), batch=3)


def test_the_held_out_samples_are_what_judges_where_no_others_are_given(table):
    held_out = split(len(DATA), 0.5, 0).held_out
    metric = Counted(0.5)
    squeeze(budget=Budget(max_drop=0.1), latency_table=table, holdout=0.5, metric=metric)
    assert {item for asked in metric.asked for item in asked} == set(held_out.tolist())


def test_the_command_line_knows_limits_plans_and_tables(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(NET, "model.onnx")
    np.save("x.npy", DATA)
    argv = [*COMMAND, "--method", "hsvd", "--fit", "independent"]
    argv += ["--multiple", "4"]
    assert cli.main([*argv, "--latency", "1", "--latency-table", "table.json", "--dry-run"]) in (0, cli.UNCHANGED)
    known = json.loads(table.read_text()), json.loads(Path("table.json").read_text())
    known[0]["models"] = dict.fromkeys(known[1]["models"], WHOLE_MS)  # this time it is a file
    Path("table.json").write_text(json.dumps(known[0]))
    flags = ["--latency", "0.5", "--latency-table", "table.json", "--plan", "plan.json"]
    assert cli.main([*argv, *flags, "--dry-run"]) == 0, capsys.readouterr().err
    assert not Path("small.onnx").exists()
    assert cli.main([*argv, *flags]) == 2
    assert "--plan plan.json exists and is carried out" in capsys.readouterr().err
    assert cli.main([*argv, "--plan", "plan.json", "--json", "report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    planned = json.loads(Path("plan.json").read_text())["layers"]
    assert [layer["form"] for layer in report["layers"]] == [entry["form"] for entry in planned]
    assert onnx.load("small.onnx").graph.node


def test_help_names_limits_plans_and_tables(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    flags = (
        "--latency",
        "--params",
        "--macs",
        "--size",
        "--max-drop",
        "--gain",
        "--plan",
        "--dry-run",
        "--latency-table",
    )
    assert [flag for flag in (*flags, "--batch", "--calibration-batch") if flag not in text] == []


# ---------------------------------------------------------------------------------------------- refused before any work


def test_a_model_without_floating_point_outputs_has_nothing_to_lose(tmp_path):
    model = nets.conv_net()
    model.graph.node.append(onnx.helper.make_node("ArgMax", ["logits"], ["best"], axis=1))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("best", onnx.TensorProto.INT64, ["N", 1]))
    with pytest.raises(errors.ConfigError, match="floating-point"):
        onnx_lrs.compress(model, data={"image": nets.as_floats(nets.pictures(20))}, config=Config(threads=1))


def test_one_sample_cannot_judge_twice():
    with pytest.raises(errors.ConfigError, match="two samples that judge"):
        onnx_lrs.compress(nets.conv_net(), data={"image": nets.as_floats(nets.pictures(5))}, config=Config(threads=1))


@pytest.mark.parametrize("name", ["plan", "latency_table"])
def test_files_that_could_not_be_written_are_refused_at_once(name, tmp_path):
    config = Config(budget=Budget(latency=0.5), **{name: tmp_path / "missing" / "file.json"})
    with pytest.raises(errors.OutputError, match="does not exist"):
        onnx_lrs.compress(nets.conv_net(), config=config)
    config = Config(budget=Budget(latency=0.5), **{name: tmp_path / "small.onnx"})
    with pytest.raises(errors.ConfigError, match="is the output itself"):
        onnx_lrs.compress(nets.conv_net(), tmp_path / "small.onnx", config=config)


def test_a_dry_run_needs_no_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(nets.conv_net(), "model.onnx")
    assert cli.main(["model.onnx", "--params", "0.5", "--dry-run", "--plan", "plan.json", "-q"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "plan.json"]
