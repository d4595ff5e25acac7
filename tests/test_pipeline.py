"""The whole way: budgets hold in the file that was written, figures agree with counts made here, runs repeat."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

import onnx_lrs
from onnx_lrs import Budget, Config, Dataset, Result, errors
from onnx_lrs.data import TensorSpec, open_samples
from onnx_lrs.solvers import METHODS
from tests import small_nets as nets

GIB = 1 << 30
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "result.md").read_text(encoding="utf-8")
FITTED = ("lrs", "hsvd", "channels")  # the other two are baselines that see no data
STAGES = ["load", "plan", "sensitivity", "fit", "rewrite", "verify", "write"]
BLIND = [stage for stage in STAGES if stage != "sensitivity"]  # needs samples


@dataclasses.dataclass(frozen=True)
class Case:
    model: onnx.ModelProto
    data: Any
    sizes: dict[str, int]


CASES = {
    "conv": Case(nets.conv_net(), nets.as_floats(nets.pictures()), {"N": 1}),
    "block": Case(nets.block(), nets.sentences(), {"N": 1, "S": nets.sentences(1)[0]["tokens"].shape[1]}),
    "two inputs": Case(nets.two_inputs(), nets.pairs(), {"N": 1}),
}


def settings(**changes: Any) -> Config:
    return Config(**({"threads": 1, "budget": Budget(params=0.5)} | changes))


def squeeze(name: str = "conv", output: Path | None = None, *, more: dict[str, Any] | None = None, **changes) -> Result:
    case = CASES[name]
    return onnx_lrs.compress(case.model, output, data=case.data, config=settings(**changes), **(more or {}))


@pytest.fixture(scope="module")
def half() -> Result:
    return squeeze(budget=Budget(params=0.5))


# ------------------------------------------------------------------------------------------------ budget and figures


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"ddlr", "nettrim"}))  # see test_methods.py
@pytest.mark.parametrize("name", CASES)
def test_the_written_file_keeps_to_the_budget_and_the_figures_are_true(name, method, kind, tmp_path):
    case = CASES[name]
    before = case.model.SerializeToString(deterministic=True)
    result = squeeze(name, tmp_path / "small.onnx", method=method, budget=Budget(**{kind: 0.5}))

    assert case.model.SerializeToString(deterministic=True) == before, "the caller's model was changed"
    written = onnx.load(tmp_path / "small.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert written.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)
    assert result.after.file_bytes == (tmp_path / "small.onnx").stat().st_size

    params = nets.count_params(case.model), nets.count_params(written)
    macs = nets.count_macs(case.model, case.sizes), nets.count_macs(written, case.sizes)
    assert (result.before.params, result.after.params) == params
    assert (result.before.macs, result.after.macs) == macs
    real = {"params": params[1] / params[0], "macs": macs[1] / macs[0]}
    assert real[kind] <= 0.5
    assert result.ratio.params == pytest.approx(params[0] / params[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx"]


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("name", CASES)
def test_layers_add_up_to_the_totals(name, kind):
    result = squeeze(name, budget=Budget(**{kind: 0.45}))
    assert result.before.macs == sum(x.macs_before for x in result.layers) + sum(x.macs for x in result.skipped)
    assert result.after.macs == sum(x.macs_after for x in result.layers) + sum(x.macs for x in result.skipped)
    saved = sum(x.params_before - x.params_after for x in result.layers)
    biases = _bias_elements(CASES[name].model) - _bias_elements(result.model)
    assert result.before.params - result.after.params == saved + biases
    for layer in result.layers:
        assert layer.params_after <= layer.params_before
        assert 0 < layer.kept_outputs <= layer.outputs
        assert (layer.form == "dense") == (layer.rank == layer.kept_channels == 0)
        assert (layer.form in ("dense", "channels", "elements")) == (layer.rank == 0)
        assert ("channels" in layer.form) == (layer.kept_channels > 0)


def _bias_elements(model: onnx.ModelProto) -> int:
    return sum(t.dims[0] for t in model.graph.initializer if len(t.dims) == 1 and t.data_type in nets.FLOATS)


@pytest.mark.parametrize("name", CASES)
def test_the_file_runs_wherever_the_original_ran(name, tmp_path):
    case = CASES[name]
    result = squeeze(name, tmp_path / "small.onnx", budget=Budget(params=0.6))
    sessions = [
        onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        for source in (case.model.SerializeToString(), str(tmp_path / "small.onnx"))
    ]
    ends = [[(v.name, v.type, v.shape) for v in (*s.get_inputs(), *s.get_outputs())] for s in sessions]
    assert ends[0] == ends[1]
    feeds = {
        "conv": [{"image": case.data[:n]} if name == "conv" else {} for n in (1, 7)],
        "block": [{"tokens": np.ones((n, s, 48), np.float32)} for n, s in ((1, 3), (4, 20))],
        "two inputs": [{k: v[:n] for k, v in nets.pairs().items()} for n in (1, 7)],
    }
    for feed in feeds[name]:
        a, b = (session.run(None, feed) for session in sessions)
        assert [x.shape for x in a] == [x.shape for x in b]
        assert [x.dtype for x in a] == [x.dtype for x in b]
    assert result.quality is not None
    assert {q.name for q in result.quality} == {n for n, kind, _ in ends[0] if "float" in kind} - _inputs(case.model)


def _inputs(model: onnx.ModelProto) -> set[str]:
    return {v.name for v in model.graph.input}


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fit", ["cascade", "independent"])
def test_layer_errors_are_zero_for_dense_layers_and_small_for_the_rest(name, method, fit):
    result = squeeze(name, method=method, budget=Budget(macs=0.6), fit=fit)
    for layer in result.layers:
        assert layer.error == 0.0 if layer.form == "dense" else 0.0 <= layer.error <= 1.5


def test_errors_fall_when_the_budget_rises():
    results = [squeeze(budget=Budget(params=fraction)) for fraction in (0.1, 0.3, 0.6, 0.9)]
    output = [r.quality[0].relative_l2 for r in results]
    assert output == sorted(output, reverse=True)
    totals = [sum(layer.error for layer in r.layers) for r in results]
    assert totals == sorted(totals, reverse=True)


def test_a_whole_budget_leaves_every_layer_dense_and_the_outputs_as_they_were():
    result = squeeze(budget=Budget(params=1.0))
    assert {layer.form for layer in result.layers} == {"dense"}
    assert {layer.error for layer in result.layers} == {0.0}
    assert result.quality[0].relative_l2 < 1e-6
    assert any(note.startswith("The output is not smaller") for note in result.notes)


def test_quality_is_measured_on_held_out_samples_only(half):
    (quality,) = half.quality
    assert quality.samples == round(0.2 * len(CASES["conv"].data))
    assert quality.relative_l2 < 0.2
    assert quality.cosine > 0.98


def test_data_beats_no_data(half):
    blind = onnx_lrs.compress(CASES["conv"].model, config=settings())
    everything = CASES["conv"].data
    reference, seen, unseen = (
        nets.run(m, {"image": everything})[0] for m in (CASES["conv"].model, half.model, blind.model)
    )
    assert np.linalg.norm(reference - seen) < np.linalg.norm(reference - unseen)


def test_the_report_says_what_follows_each_layer():
    behind = {name: {layer.name: layer.activation for layer in squeeze(name).layers} for name in ("conv", "two inputs")}
    assert behind["conv"] == {"conv2": "relu", "fc1": "relu"}
    assert behind["two inputs"] == {"left": "add + relu", "right": "add + relu", "join": "relu"}


def test_excluded_layers_stay_as_they_are():
    result = squeeze(exclude=("fc*",), budget=Budget(macs=0.8))
    reasons = {layer.name: layer.reason for layer in result.skipped}
    assert reasons["fc1"] == "excluded by the user"
    assert [layer.name for layer in result.layers] == ["conv2"]
    weights = {t.name: t for t in result.model.graph.initializer}
    assert weights["fc1.w"] == next(t for t in CASES["conv"].model.graph.initializer if t.name == "fc1.w")


# ------------------------------------------------------------------------------------------------ the same file again


def test_two_runs_give_the_same_bytes_and_a_path_the_same_as_a_model(tmp_path):
    onnx.save(CASES["conv"].model, tmp_path / "model.onnx")
    outputs = [tmp_path / f"{n}.onnx" for n in range(3)]
    for source, output in zip(
        (CASES["conv"].model, CASES["conv"].model, tmp_path / "model.onnx"), outputs, strict=True
    ):
        onnx_lrs.compress(source, output, data=CASES["conv"].data, config=settings())
    assert len({output.read_bytes() for output in outputs}) == 1


def test_the_seed_decides_split_and_positions():
    files = [squeeze(seed=seed).model.SerializeToString(deterministic=True) for seed in (1, 1, 2)]
    assert files[0] == files[1] != files[2]


def test_the_size_of_a_call_does_not_change_the_plan():
    results = [squeeze("two inputs", calibration_batch=batch) for batch in (1, 64)]
    forms = [[(x.form, x.rank, x.kept_channels) for x in r.layers] for r in results]
    assert forms[0] == forms[1]


class Reader:
    """Behaves like onnxruntime's CalibrationDataReader."""

    def __init__(self, feeds) -> None:
        self._feeds = iter(feeds)

    def get_next(self):
        return next(self._feeds, None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of 3 classes with 8 pictures each."""
    root = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(nets.pictures(24)):
        folder = root / "train" / f"class{number // 8}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return root / "train"


def test_every_kind_of_source_gives_the_same_file(photos, tmp_path):
    pixels = nets.pictures(24)
    classes = np.repeat(np.arange(3), 8)
    np.savez(tmp_path / "data.npz", image=pixels, labels=classes)
    np.save(tmp_path / "classes.npy", classes)
    samples = open_samples(photos, [TensorSpec("image", np.dtype(np.float32), ("N", 3, 16, 16))], None)
    feeds = [samples.item(i) for i in range(len(samples))]
    sources = {
        "folder": (photos, "folders"),
        "str": (str(photos), tmp_path / "classes.npy"),
        "npz": (tmp_path / "data.npz", tmp_path / "data.npz"),
        "uint8": (pixels, classes),
        "array": (np.concatenate([f["image"] for f in feeds]), classes.tolist()),
        "mapping": ({"image": np.concatenate([f["image"] for f in feeds])}, classes),
        "list": (feeds, classes),
        "generator": ((f for f in feeds), classes),
        "dataset": (Dataset([(f["image"], 0) for f in feeds], lambda pair: {"image": pair[0]}), classes),
        "reader": (Reader(feeds), classes),
    }
    files, qualities = {}, {}
    for name, (data, labels) in sources.items():
        result = onnx_lrs.compress(CASES["conv"].model, data=data, labels=labels, config=settings())
        files[name] = result.model.SerializeToString(deterministic=True)
        qualities[name] = result.quality
    assert len(set(files.values())) == 1, {name: hash(file) for name, file in files.items()}
    assert len(set(qualities.values())) == 1
    assert qualities["folder"][0].accuracy_before is not None


# ------------------------------------------------------------------------------------------------ labels, other samples


def perfect_labels(images: np.ndarray) -> np.ndarray:
    return nets.run(CASES["conv"].model, {"image": images})[0].argmax(axis=1)


def test_accuracy_is_counted_on_the_held_out_samples():
    labels = perfect_labels(CASES["conv"].data)
    (quality,) = squeeze(more={"labels": labels}).quality
    assert quality.accuracy_before == 1.0
    assert quality.accuracy_after == quality.top1_agreement
    (wrong,) = squeeze(more={"labels": (labels + 1) % 10}).quality
    assert wrong.accuracy_before == 0.0


def test_other_samples_judge_when_they_are_given(half):
    test = nets.as_floats(nets.pictures(17, seed=9))
    labels = perfect_labels(test)
    labels[:3] = (labels[:3] + 1) % 10
    result = squeeze(more={"test": test, "labels": labels})
    (quality,) = result.quality
    assert quality.samples == 17
    assert quality.accuracy_before == pytest.approx(14 / 17)
    reference, ours = (nets.run(m, {"image": test})[0] for m in (CASES["conv"].model, result.model))
    assert quality.relative_l2 == pytest.approx(np.linalg.norm(reference - ours) / np.linalg.norm(reference), rel=1e-4)
    assert quality.accuracy_after == pytest.approx(np.mean(ours.argmax(axis=1) == labels))
    assert half.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)
    assert [note for note in result.notes if note.startswith("Judged on array: 17 samples")]


def test_labels_that_fit_no_output_are_reported():
    result = squeeze("block", more={"labels": np.zeros(40, int)})
    assert [note for note in result.notes if note.startswith("The labels were not used")]


@pytest.mark.parametrize("more", [{"labels": [0]}, {"test": np.zeros((4, 3, 16, 16), np.float32)}])
def test_judging_without_calibration_data_is_refused(more):
    with pytest.raises(errors.ConfigError, match="without calibration data"):
        onnx_lrs.compress(CASES["conv"].model, **more)


# ------------------------------------------------------------------------------------------------ without data


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_columns])
def test_a_method_that_sees_the_activation_needs_data(method):
    with pytest.raises(errors.ConfigError, match="no calibration data"):
        onnx_lrs.compress(CASES["conv"].model, config=settings(method=method))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.needs_columns])
def test_without_data_the_weights_decide_and_the_notes_say_so(method):
    result = onnx_lrs.compress(CASES["conv"].model, config=settings(method=method))
    assert result.after.params <= 0.5 * result.before.params
    assert result.quality is None
    assert {layer.error for layer in result.layers} == {None}
    assert result.notes[0].startswith("No calibration data")


def test_random_data_is_used_on_request_only_and_said():
    result = onnx_lrs.compress(CASES["two inputs"].model, config=settings(random_data=True))
    assert result.quality is not None
    assert result.notes[0].startswith("Fitted and judged on random inputs")
    assert result.settings["random_data"] is True


def test_open_dimensions_without_data_need_a_shape():
    with pytest.raises(errors.DataError, match=r"open dimensions: S") as caught:
        onnx_lrs.compress(CASES["block"].model)
    assert "--shape tokens:1,128,48" in caught.value.remedy
    result = onnx_lrs.compress(CASES["block"].model, config=settings(shapes={"tokens": (1, 9, 48)}))
    assert result.after.params <= 0.5 * result.before.params


def test_a_model_that_overflows_on_random_numbers_anyway_is_not_blamed_on_us():
    model = nets.one_gemm(64, 32)
    model.graph.node[0].output[0] = "g"
    model.graph.node.append(onnx.helper.make_node("Log", ["g"], ["y"]))  # of negative numbers
    assert onnx_lrs.compress(model, config=settings()).after.params <= 0.5 * nets.count_params(model)


# ------------------------------------------------------------------------------------------------ odd models


def test_a_static_batch_is_kept_and_left_over_samples_are_reported():
    model = nets.conv_net(batch=4)
    data = nets.as_floats(nets.pictures(26))
    result = onnx_lrs.compress(model, data=data, labels=perfect_labels(data), config=settings())
    assert result.after.params <= 0.5 * result.before.params
    assert result.quality[0].samples % 4 == 0
    assert result.quality[0].accuracy_before == 1.0
    assert "2 of 26 samples dropped: the model's batch is 4" in result.notes[0]
    assert nets.run(result.model, {"image": data[:4]})[0].shape == (4, 10)


@pytest.mark.parametrize("budget", [Budget(params=0.5), Budget(macs=0.99)])
def test_a_model_with_nothing_to_compress_is_refused_with_the_reasons(budget):
    with pytest.raises(errors.BudgetError) as caught:
        onnx_lrs.compress(nets.depthwise_net(), config=settings(budget=budget))
    assert "no layer of this model can be compressed (2 x depthwise convolution)" in caught.value.message
    assert "inspect" in caught.value.remedy


def test_a_model_with_nothing_to_compress_passes_a_whole_budget():
    data = np.random.default_rng(0).standard_normal((5, 64, 8, 8)).astype(np.float32)
    result = onnx_lrs.compress(nets.depthwise_net(), data=data, config=settings(budget=Budget(macs=1.0)))
    assert result.layers == ()
    assert result.quality[0].relative_l2 == 0.0


def test_an_output_that_is_not_smaller_is_reported(tmp_path):

    result = onnx_lrs.compress(
        nets.one_gemm(40, 40), data=np.eye(40, dtype=np.float32), config=settings(budget=Budget(params=1.0))
    )
    assert result.after.file_bytes >= result.before.file_bytes
    assert [note for note in result.notes if note.startswith("The output is not smaller")]


def test_outputs_that_are_no_floats_are_not_compared():
    model = CASES["two inputs"].model
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    del cut.graph.output[0]
    assert onnx_lrs.compress(cut, data=CASES["two inputs"].data, config=settings()).quality == ()


def save_outside(path: Path, place: str) -> Path:
    model = onnx.ModelProto()
    model.CopyFrom(CASES["conv"].model)  # onnx.save empties the tensors of what it is given
    onnx.save(model, path, save_as_external_data=True, location=place, size_threshold=0)
    return path


def test_external_data_stays_outside_and_is_never_overwritten(tmp_path):
    source = save_outside(tmp_path / "model.onnx", "weights.bin")
    bytes_before = (tmp_path / "weights.bin").read_bytes()
    result = onnx_lrs.compress(source, tmp_path / "small.onnx", data=CASES["conv"].data, config=settings())
    assert (tmp_path / "weights.bin").read_bytes() == bytes_before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.onnx", "weights.bin", "small.onnx", "small.onnx.data"}
    assert result.before.file_bytes == source.stat().st_size + len(bytes_before)
    assert result.after.file_bytes == sum((tmp_path / f"small.onnx{end}").stat().st_size for end in ("", ".data"))
    assert [note for note in result.notes if "small.onnx.data" in note]
    reference = onnx_lrs.compress(CASES["conv"].model, data=CASES["conv"].data, config=settings())
    feed = {"image": CASES["conv"].data[:3]}
    np.testing.assert_array_equal(nets.run(tmp_path / "small.onnx", feed)[0], nets.run(reference.model, feed)[0])


@pytest.mark.parametrize("output", ["b.onnx", "b.onnx.data"])
def test_an_output_that_would_replace_the_inputs_weights_is_refused(output, tmp_path):
    source = save_outside(tmp_path / "a.onnx", "b.onnx.data")
    before = (tmp_path / "b.onnx.data").read_bytes()
    with pytest.raises(errors.ConfigError, match="holds the input's weights"):
        onnx_lrs.compress(source, tmp_path / output)
    assert (tmp_path / "b.onnx.data").read_bytes() == before


# ------------------------------------------------------------------------------------------------ memory


def test_a_layer_too_wide_for_the_memory_is_low_rank_only_and_said():
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((40, 6000)).astype(np.float32)
    data = rng.standard_normal((64, 40)).astype(np.float32) @ topics
    model = nets.one_gemm(6000, 1000)
    result = onnx_lrs.compress(model, data=data, config=settings(memory_bytes=GIB // 4, budget=Budget(params=0.1)))
    (layer,) = result.layers
    assert (layer.form, layer.kept_channels) == ("low-rank", 0)
    assert layer.rank > 0
    assert layer.error < 0.1
    assert [note for note in result.notes if "Too wide for --method lrs" in note and "gemm" in note]
    roomy = {"memory_bytes": 8 * GIB}
    assert not [note for note in squeeze(**roomy).notes if "Too wide" in note]


# ------------------------------------------------------------------------------------------------ report, progress


SECTIONS = {part.splitlines()[0]: part for part in PAGE.replace("\n### ", "\n## ").split("\n## ")}
KINDS = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "object": dict, "list": list}


def documented(section: str) -> dict[str, str]:
    rows = [line.split("|") for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    return {cells[1].strip(" `"): cells[2].strip() for cells in rows}


def check_record(record: dict[str, Any], section: str) -> None:
    """Compare a record with the page: keys, order and types."""
    assert list(record) == list(documented(section)), section
    for name, kind in documented(section).items():
        check_value(record[name], kind, f"{section}.{name}")


def check_value(value: Any, kind: str, where: str) -> None:
    kind, _, nothing = kind.partition(" or ")
    if value is None:
        assert nothing == "null", where
    elif kind.startswith("list of "):
        assert isinstance(value, list), where
        for item in value:
            check_value(item, kind.removeprefix("list of "), where)
    elif kind.startswith("["):
        check_record(value, kind[1:].partition("]")[0])
    else:
        assert isinstance(value, KINDS[kind.split()[0]]), (where, value)


@pytest.mark.parametrize("data", [True, False])
def test_the_json_is_what_the_page_says(data, tmp_path):
    labels = perfect_labels(CASES["conv"].data) if data else None
    source = CASES["conv"].data if data else None
    result = onnx_lrs.compress(CASES["conv"].model, tmp_path / "o.onnx", data=source, labels=labels, config=settings())
    record = json.loads(result.to_json(), parse_constant=pytest.fail)
    check_record(record, "Result")
    check_record(record["settings"], "Settings")
    assert record["environment"]["provider"] == "CPUExecutionProvider"
    assert set(record["seconds"]) == {*(STAGES if data else BLIND), "total"}
    assert record["input"] is None
    assert record["output"] == str(tmp_path / "o.onnx")


def test_inspection_is_what_the_page_says():
    inspection = onnx_lrs.inspect(CASES["conv"].model)
    check_record(json.loads(inspection.to_json(), parse_constant=pytest.fail), "Inspection")
    assert inspection.totals.params == nets.count_params(CASES["conv"].model)
    assert inspection.totals.macs == nets.count_macs(CASES["conv"].model, {"N": 1})
    assert {layer.name: layer.eligible for layer in inspection.layers} == {
        "conv1": False,
        "conv2": True,
        "fc1": True,
        "fc2": False,
    }


def test_the_report_holds_the_preprocessing_that_was_assumed(photos):
    result = onnx_lrs.compress(CASES["conv"].model, data=photos, config=settings())
    assert result.settings["preprocess"]["scale"] == pytest.approx(1 / 255)
    assert [note for note in result.notes if "assumed" in note and "--preset" in note]


class Listener:
    def __init__(self) -> None:
        self.stages: list[list[Any]] = []
        self.notes: list[str] = []

    def stage(self, name: str, steps: int) -> None:
        self.stages.append([name, steps, 0])

    def step(self, label: str) -> None:
        assert label
        self.stages[-1][2] += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


def static() -> Case:
    return Case(nets.conv_net(batch=4), nets.as_floats(nets.pictures(80)), {})


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize("case", [*CASES.values(), static()], ids=[*CASES, "static batch"])
def test_progress_announces_exactly_what_comes(case, batch, tmp_path):
    listener = Listener()
    config = settings(calibration_batch=batch)
    result = onnx_lrs.compress(case.model, tmp_path / "o.onnx", data=case.data, config=config, progress=listener)
    assert [name for name, *_ in listener.stages] == STAGES
    assert [announced for _, announced, _ in listener.stages] == [done for *_, done in listener.stages]
    assert set(listener.notes) <= set(result.notes)


def test_progress_announces_exactly_what_comes_without_data():
    listener = Listener()
    onnx_lrs.compress(nets.one_gemm(64, 64), config=settings(), progress=listener)
    assert [name for name, *_ in listener.stages] == BLIND[:-1]
    assert [announced for _, announced, _ in listener.stages] == [done for *_, done in listener.stages]


def test_a_source_that_breaks_half_way_raises_its_own_error():
    def broken() -> Iterator[dict[str, np.ndarray]]:
        yield {"image": CASES["conv"].data[:1]}
        raise RuntimeError("the camera is off")

    with pytest.raises(RuntimeError, match="the camera is off"):
        onnx_lrs.compress(CASES["conv"].model, data=broken())
