"""Latencies of layers: measured once a device, interpolated between, measured again where a plan picks them."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lrs import Config, errors
from onnx_lrs.calibration.subject import Subject, examine
from onnx_lrs.graph.small import Shape
from onnx_lrs.planning import timing as module
from onnx_lrs.planning.prices import Plan, alive_after, saved
from onnx_lrs.planning.timing import DENSE, POINTS, Stopwatch, Timing, _agree, _grid, _interpolated
from onnx_lrs.progress import Silent
from onnx_lrs.runtime.table import Device, Entry, Table
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.projected import tucker_params
from tests.builders import make, node, normal

HERE = Device.here("cpu", 1)
ELSEWHERE = Device("cpu", "a board", "1.0", 4)
RANKS, KEPT = (8, 16, 24, 32, 40, 48, 56), (4, 12, 20, 28, 36)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch, tmp_path) -> None:
    """Ten rounds are enough here, and no test sees what another one measured."""
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "MODEL_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------ between the points


def low(rank: int) -> Shape:
    return Shape("low-rank", rank)


@given(st.dictionaries(st.integers(1, 99), st.floats(0.01, 9), min_size=1, max_size=8), st.integers(1, 99))
def test_between_two_measured_points_lies_the_line_through_them(measured, rank):
    known = {low(r).key: ratio for r, ratio in measured.items()}
    found = _interpolated([low(r) for r in {*measured, rank}], known)
    assert set(found) == {low(rank)} - {low(r) for r in measured}  # what is measured is not estimated
    if not found:
        return
    below = max((r for r in measured if r < rank), default=min(measured))
    above = min((r for r in measured if r > rank), default=max(measured))
    share = (rank - below) / (above - below) if below < rank < above else 0.0
    nearest = below if rank > below else above
    line = (1 - share) * measured[below] + share * measured[above] if share else measured[nearest]
    assert found[low(rank)] == pytest.approx(line)


def test_forms_are_not_mixed():
    known = {low(8).key: 0.5, Shape("spatial", 8).key: 2.0, Shape("channels", 0, 8, None, False).key: 3.0}
    wanted = [low(9), Shape("spatial", 9), Shape("channels", 0, 9, None, False), low(8), Shape("spatial", 8)]
    found = _interpolated([*wanted, Shape("channels", 0, 8, None, False)], known)
    assert [found[shape] for shape in wanted[:3]] == [0.5, 2.0, 3.0]


def test_tucker_lies_on_a_line_of_its_weights():
    def tucker(inner: int, rank: int) -> Shape:
        return Shape("tucker", rank, inner=inner, weights=tucker_params(32, 64, 9, (inner, rank)))

    assert len({tucker(8, 16).key, tucker(16, 8).key, Shape("tucker", 16).key}) == 3
    known = {tucker(8, 16).key: 0.2, tucker(24, 32).key: 0.6}
    ends = tucker(8, 16), tucker(24, 32)
    found = _interpolated([*ends, tucker(16, 24), tucker(24, 16)], known)
    assert found.keys() == {tucker(16, 24), tucker(24, 16)}
    for shape, ratio in found.items():
        share = (shape.weights - ends[0].weights) / (ends[1].weights - ends[0].weights)
        assert 0 < share < 1
        assert ratio == pytest.approx(0.2 + 0.4 * share)


def test_of_shapes_that_are_equally_large_the_mean_counts():
    one, other = (Shape("tucker", r, inner=i, weights=100) for r, i in ((8, 16), (16, 8)))
    found = _interpolated([one, other, Shape("tucker", 9, inner=9, weights=100)], {one.key: 0.2, other.key: 0.4})
    assert [*found.values()] == [pytest.approx(0.3)]


def test_a_pair_takes_what_both_parts_take_and_what_the_measured_pairs_took_beyond():
    known = {low(r).key: 0.01 * r for r in RANKS} | {Shape("channels", 0, k).key: 0.02 * k for k in KEPT}
    every = [Shape("low-rank + channels", r, k) for r in RANKS for k in KEPT]
    for shape, more in zip(every[:3], (0.1, 0.3, 0.2), strict=True):
        known[shape.key] = 0.01 * shape.rank + 0.02 * shape.kept + more
    found = _interpolated(every, known)
    assert set(found) == set(every[3:])
    for shape, ratio in found.items():
        assert ratio == pytest.approx(0.01 * shape.rank + 0.02 * shape.kept + 0.2)
    none = _interpolated(every[3:], {k: v for k, v in known.items() if "+" not in k})
    assert none[every[3]] == pytest.approx(0.01 * every[3].rank + 0.02 * every[3].kept)


@given(st.sets(st.integers(1, 500), min_size=1, max_size=60))
def test_the_grid_holds_both_ends_and_few_points(ranks):
    found = [shape.rank for shape in _grid([low(r) for r in ranks])]
    assert len(set(found)) == len(found) <= max(POINTS, 1)
    assert {min(ranks), max(ranks)} <= set(found) <= ranks


def test_the_grid_of_pairs_measures_each_part_alone():
    every = [Shape("low-rank + channels", r, k) for r in RANKS for k in KEPT]
    found = _grid(every)
    assert {s.rank for s in found if s.form == "low-rank"} >= {min(RANKS), max(RANKS)}
    assert {s.kept for s in found if s.form == "channels"} >= {min(KEPT), max(KEPT)}
    assert sum(s.form == "low-rank + channels" for s in found) == module.PAIRS
    assert len(found) <= 2 * POINTS + module.PAIRS


# ------------------------------------------------------------------------------------------------ measured


def net(layers: int = 3, width: int = 64, activation: str = "Relu") -> onnx.ModelProto:
    nodes, constants, name = [], {}, "x"
    for i in range(layers):
        nodes += [node("Gemm", [name, f"w{i}", f"b{i}"], [f"g{i}"], f"fc{i}"), node(activation, [f"g{i}"], [f"r{i}"])]
        constants |= {f"w{i}": normal(width, width, seed=i), f"b{i}": normal(width)}
        name = f"r{i}"
    return make(nodes, {"x": ("N", width)}, [name], constants)


def subject_of(model: onnx.ModelProto) -> Subject:
    return examine(model, model, Config(threads=1), None)


def candidates(width: int = 64) -> list[Candidate]:
    none = np.zeros(0, np.int64)
    found = [Candidate("low-rank", r, 2 * width * r, 1 / r, none, 0.0) for r in RANKS[:3]]
    found += [Candidate("channels", 0, width * k, 1 / k, np.arange(k), 0.0) for k in KEPT]
    pairs = ((r, k) for r in RANKS[:3] for k in KEPT[:3])
    return found + [Candidate("low-rank + channels", r, width * (2 * r + k), 0.1, np.arange(k), 0.0) for r, k in pairs]


def prepared(model: onnx.ModelProto, table: Table, here: bool = True) -> tuple[Subject, Timing]:
    subject = subject_of(model)
    timing = Timing(subject, Stopwatch("cpu", 1, subject.feed) if here else None, table, "a model", subject.feed)
    timing.prepare({layer.node: candidates() for layer in subject.layers}, Silent())
    return subject, timing


def content(table: Table) -> dict[str, Any]:
    return {key: dataclasses.asdict(entry) for key, entry in table.layers.items()}


def test_equal_layers_are_timed_once_and_measured_shapes_never_again():
    table = Table(HERE)
    subject, timing = prepared(net(), table)
    assert len(subject.layers) == 3
    assert len(table.layers) == 1
    assert timing.count == 2  # the model and one layer
    first = {key: dict(entry.ratios) for key, entry in table.layers.items()}
    (ratios,) = first.values()
    gathered, others = ([s for s in ratios if s.endswith(end) or "low" in s] for end in ("1", "0"))
    assert len(gathered) == len(_grid([Shape(c.form, c.rank, len(c.support)) for c in candidates()]))
    assert len(others) == len(gathered)  # behind another layer the channels that are not kept do not exist
    prepared(net(4), table)
    assert {key: entry.ratios for key, entry in table.layers.items()} == first
    prepared(net(3, activation="Sigmoid"), table)
    assert len(table.layers) == 2  # a Relu is fused into a Gemm, this one is no part of it


def test_what_was_measured_is_the_price():
    table = Table(HERE)
    subject, timing = prepared(net(2), table)
    (entry,) = table.layers.values()
    found = 0
    for layer in subject.layers:
        assert timing.dense(layer) == round(1e6 * entry.dense_ms)
        for c in candidates():
            there = c.form == "channels" and layer.name != "fc0"  # the layer in front loses the channels not kept
            shape = Shape(c.form, c.rank, len(c.support), None, not there)
            if shape.key in entry.ratios:
                assert timing.of(layer, c) == round(1e6 * entry.dense_ms * entry.ratios[shape.key])
                found += 1
    assert found >= 2 * POINTS
    assert timing.before == timing.now == round(1e6 * timing.original_ms)
    assert timing.original_ms == next(iter(table.models.values())) > 0


def test_nothing_of_a_refined_plan_is_estimated():
    table = Table(HERE)
    subject, timing = prepared(net(), table)
    (entry,) = table.layers.values()
    every = [c for c in candidates() if Shape(c.form, c.rank, len(c.support)).key not in entry.ratios]
    assert len(every) >= 3, "the grid measured everything; nothing is tested"
    plan = Plan({layer.node: c for layer, c in zip(subject.layers, every, strict=False)})
    known = dict(entry.ratios)
    assert timing.refine(plan)
    alive = alive_after(subject, plan)
    picked = {timing._in_plan(layer, plan, alive).key for layer in subject.layers}
    assert entry.ratios.keys() == known.keys() | picked
    assert not timing.refine(plan)
    gains = [timing.of(la, plan.chosen[la.node]) - timing.dense(la) for la in subject.layers]
    assert timing.predict_ms(plan) == pytest.approx(timing.original_ms + sum(gains) / 1e6)


@pytest.mark.parametrize("wrong", [1e-4, 1e4])
def test_a_reading_that_is_far_off_does_not_stay_in_a_plan(wrong):
    table = Table(HERE)
    subject, timing = prepared(net(), table)
    (entry,) = table.layers.values()
    first = subject.layers[0]
    plan = Plan({first.node: candidates()[0]})
    key = Shape("low-rank", RANKS[0]).key
    entry.ratios[key] = wrong
    assert timing.of(first, candidates()[0]) == round(1e6 * entry.dense_ms * wrong)
    assert timing.refine(plan)
    assert 0.05 < entry.ratios[key] < 20
    assert not timing.refine(plan)


@pytest.mark.parametrize(
    ("readings", "enough"),
    [([], False), ([1.0], False), ([1.0, 1.09], True), ([1.2, 1.0], False), ([1.0, 2.0, 5.0], True)],
)
def test_readings_are_taken_until_two_agree_or_there_are_three(readings, enough):
    assert _agree(readings) == enough


def test_dead_filters_make_the_layer_in_front_cheaper():
    table = Table(HERE)
    subject, timing = prepared(net(2), table)
    last = subject.layers[1].node
    plan = Plan({last: Candidate("channels", 0, 64 * 4, 0.1, np.arange(4), 0.0)})
    alive = alive_after(subject, plan)
    assert len(alive[subject.layers[0].node]) == 4
    assert saved(timing, subject, plan, alive) == timing.dense(subject.layers[0]) - round(
        timing.dense(subject.layers[0]) / 16
    )
    assert timing.refine(plan)
    assert Shape(outputs=4).key in next(iter(table.layers.values())).ratios
    assert saved(timing, subject, Plan({}), {}) == 0
    assert timing.predict_ms(Plan({})) == timing.original_ms


def test_fewer_outputs_shorten_only_the_part_that_makes_them():
    subject, timing = prepared(net(2), Table(HERE))
    layer = subject.layers[0]
    low = Candidate("low-rank", 8, 8 * (layer.out + layer.d), 0.1, np.zeros(0, np.int64), 0.0)
    timing.table.layers[timing._smalls[layer.node].key].ratios[timing._shape(layer, low).key] = 0.5
    left = layer.out / (layer.out + layer.d)  # of its weights
    whole, half = timing.of(layer, low), layer.out // 2
    assert timing.less(layer, low, half) == pytest.approx(whole * left / 2, abs=2)
    assert timing.less(layer, None, half) == pytest.approx(timing.dense(layer) / 2, abs=2)


# ------------------------------------------------------------------------------------------------ tables


def filled(device: Device = ELSEWHERE) -> Table:
    """A table of another device that knows the layers of net(), in numbers that nothing here would measure."""
    table = Table(HERE)
    prepared(net(), table)
    other = Table(device)
    other.models = dict.fromkeys(table.models, 1000.0)
    for key, entry in table.layers.items():
        other.layers[key] = Entry(100.0, {shape: i / 100 for i, shape in enumerate(sorted(entry.ratios), 1)})
    return other


def test_a_table_comes_back_as_it_went(tmp_path):
    table = filled()
    table.write(tmp_path / "table.json")
    again = Table.read(tmp_path / "table.json")
    assert (again.device, again.models, content(again)) == (table.device, table.models, content(table))
    with pytest.raises(errors.OutputError, match="cannot be written"):
        table.write(tmp_path / "missing" / "table.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', "\x00"])
def test_what_is_no_table_is_refused_with_the_remedy(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(errors.ConfigError, match="is no table of latencies") as caught:
        Table.read(tmp_path / "table.json")
    assert "--dry-run --latency-table FILE" in caught.value.remedy


def test_another_format_of_a_table_is_refused(tmp_path):
    filled().write(tmp_path / "table.json")
    changed = json.loads((tmp_path / "table.json").read_text()) | {"format": 2}
    (tmp_path / "table.json").write_text(json.dumps(changed))
    with pytest.raises(errors.ConfigError, match="format 2 instead of 1"):
        Table.read(tmp_path / "table.json")


def test_the_cache_keeps_a_table_a_device(tmp_path):
    table = Table.cached(HERE)
    assert content(table) == {}
    prepared(net(), table)
    files = [*(tmp_path / "cache").rglob("*.json")]
    assert [file.stem for file in files] == [HERE.key]
    assert content(Table.cached(HERE)) == content(table) != {}
    assert content(Table.cached(ELSEWHERE)) == {}
    assert len({HERE.key, *(dataclasses.replace(HERE, **change).key for change in CHANGES)}) == 1 + len(CHANGES)


CHANGES: list[dict[str, Any]] = [{"provider": "cuda"}, {"name": "x"}, {"onnxruntime": "0"}, {"threads": 2}]


@pytest.mark.parametrize("damage", [b"", b"\xff", b'{"format": 1, "layers": {"a": {}}, "models": {}}', b"half"])
def test_a_damaged_cache_begins_anew(damage, tmp_path):
    prepared(net(), Table.cached(HERE))
    (file,) = (tmp_path / "cache").rglob("*.json")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    table = Table.cached(HERE)
    assert (content(table), table.models) == ({}, {})
    prepared(net(), table)
    assert content(Table.cached(HERE)) == content(table) != {}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    table = Table.cached(HERE)
    prepared(net(), table)
    assert len(table.layers) == 1


def test_another_devices_table_is_all_there_is():
    table = filled()
    before = json.dumps(content(table))
    subject, timing = prepared(net(), table, here=False)
    assert (timing.is_here, timing.original_ms) == (False, 1000.0)
    (entry,) = table.layers.values()
    low_rank, *_ = candidates()
    assert timing.dense(subject.layers[0]) == 100 * 10**6
    assert timing.of(subject.layers[0], low_rank) == round(1e8 * entry.ratios[Shape("low-rank", 8).key])
    plan = Plan({subject.layers[2].node: candidates()[-1]})
    assert not timing.refine(plan)
    assert json.dumps(content(table)) == before


@pytest.mark.parametrize(
    ("model", "words"),
    [(net(3, 80), "lacks this model"), (net(3, activation="Sigmoid"), "a layer of its kind")],
    ids=["other width", "other activation"],
)
def test_a_layer_that_another_devices_table_lacks_is_an_error_with_the_remedy(model, words):
    with pytest.raises(errors.ConfigError, match=words) as caught:
        prepared(model, filled(), here=False)
    assert str(ELSEWHERE) in caught.value.message
    assert "--dry-run --latency-table FILE" in caught.value.remedy


def test_a_model_that_another_devices_table_lacks_is_an_error():
    table = filled()
    table.models.clear()
    with pytest.raises(errors.ConfigError, match="lacks this model at this batch"):
        prepared(net(), table, here=False)


def test_ranks_that_another_devices_table_has_instead_are_points_too():
    """Other data had other candidates there; the latency of a rank lies on the line through those it knows."""
    table = filled()
    (entry,) = table.layers.values()
    entry.ratios = {Shape("low-rank", rank).key: rank / 100 for rank in (4, 60)} | {
        Shape("channels", 0, kept, None, gathered).key: kept / 100 for kept in (2, 60) for gathered in (True, False)
    }
    subject, timing = prepared(net(), table, here=False)
    for c in candidates():
        expected = 1e6 * (c.rank + len(c.support))
        assert timing.of(subject.layers[0], c) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        DENSE,
        low(8),
        Shape("channels", 0, 8, 30, False),
        Shape("low-rank + channels", 8, 12),
        Shape("tucker", 8, inner=4),
    ],
)
def test_a_shape_comes_back_from_its_key(shape):
    assert Shape.of_key(shape.key) == shape


def test_two_runs_at_once_keep_what_both_measured(tmp_path):
    place = tmp_path / "table.json"
    one, other = Table(HERE, place), Table(HERE, place)
    one.layers["layer"], one.models["m"] = Entry(1.0, {"x": 0.5}), 3.0
    other.layers |= {"layer": Entry(2.0, {"y": 0.7}), "another": Entry(1.0, {})}
    one.keep()
    other.keep()
    kept = json.loads(place.read_text())
    assert kept["layers"]["layer"] == {"dense_ms": 2.0, "ratios": {"x": 0.5, "y": 0.7}}
    assert (set(kept["layers"]), kept["models"]) == ({"layer", "another"}, {"m": 3.0})
    if os.name != "nt":
        assert place.stat().st_mode & 0o777 == 0o666 & ~umask()  # as the model beside it


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_what_is_exported_is_of_this_model_alone():
    table = filled()
    table.layers["a secret"], table.models["another's"] = Entry(1.0, {"x": 0.5}), 2.0
    _, timing = prepared(net(), table, here=False)
    assert timing.exported.layers.keys() == table.layers.keys() - {"a secret"}
    assert timing.exported.models.keys() == table.models.keys() - {"another's"}


@pytest.mark.parametrize("form", ["low-rank,", "channels", "low-rank + channels"])
def test_a_form_that_another_devices_table_lacks_is_an_error_too(form):
    """The table was made with another method, which offers other forms."""
    table = filled()
    (entry,) = table.layers.values()
    for shape in [shape for shape in entry.ratios if shape.startswith(form)]:
        del entry.ratios[shape]
    if form == "low-rank + channels":  # the sum of both parts stands in for pairs
        prepared(net(), table, here=False)
        return
    with pytest.raises(errors.ConfigError, match="lacks"):
        prepared(net(), table, here=False)
