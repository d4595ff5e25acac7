"""Comparisons: statistics against planted truths, runs against ONNX Runtime alone, tables against the record."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import itertools
import json
import time
import types
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnx_lrs
from onnx_lrs import Budget, CompareConfig, Config, CudaOptions, cli, comparison, errors
from onnx_lrs.data import open_samples
from onnx_lrs.graph import model as models
from onnx_lrs.runtime import compare as runs
from onnx_lrs.runtime import latency, nodes
from onnx_lrs.runtime import session as sessions
from onnx_lrs.runtime.compare import Entrant, feed_of, nodes_of, shared_inputs, window_plan
from onnx_lrs.runtime.probe import Order, probe
from onnx_lrs.runtime.ratios import FEWEST_WINDOWS, LEVEL, ratios
from onnx_lrs.runtime.session import CPU, CUDA, TENSORRT, Gpu, Session, provider_options
from tests import small_nets as nets
from tests.devices import starts

QUICK = CompareConfig(rounds=20, threads=1)
PIXELS = nets.as_floats(nets.pictures(12))


def windows(truth: float, seed: int, count: int = 10, rounds: int = 40, wobble: float = 0.02) -> list[np.ndarray]:
    """Return times of two models: noise that only adds, and sessions that are off by a few percent each."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        base = np.array([1.0, truth]) * np.exp(wobble * rng.standard_normal(2))
        found.append(base * (1 + rng.gamma(1.0, 0.05, size=(rounds, 2))))
    return found


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("truth", [1.0, 0.4])
@pytest.mark.parametrize(
    ("count", "rounds", "wobble", "trials"),
    [
        *((10, 40, 0.02, 150), (20, 5, 0.02, 150), (4, 20, 0.2, 1000)),
        *((FEWEST_WINDOWS, 3, 0.02, 150), (FEWEST_WINDOWS, 20, 0.2, 150)),
    ],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(truth, count, rounds, wobble, trials):
    found = (ratios(windows(truth, seed, count, rounds, wobble), 0)[1] for seed in range(trials))
    assert np.mean([one.low <= truth <= one.high for one in found]) >= LEVEL - 0.02


def test_the_interval_is_narrow_enough_to_tell_five_percent():
    assert np.mean([ratios(windows(0.95, seed), 0)[1].tells for seed in range(50)]) > 0.9


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10.0), st.floats(0.001, 1000.0), st.integers(0, 100))
def test_ratios_know_no_unit_and_turn_over(truth, unit, seed):
    times = windows(truth, seed, count=4, rounds=10)
    first, found = ratios(times, 0)
    _, scaled = ratios([unit * one for one in times], 0)
    assert (first.value, first.low, first.high) == (1.0, 1.0, 1.0)
    assert (scaled.value, scaled.low, scaled.high) == pytest.approx((found.value, found.low, found.high))
    _, turned = ratios([one[:, ::-1] for one in times], 0)
    assert (1 / turned.value, 1 / turned.high, 1 / turned.low) == pytest.approx(
        (found.value, found.low, found.high), rel=1e-2
    )
    assert found.low <= found.value <= found.high


def test_without_noise_nothing_is_left_open():
    _, found = ratios([np.tile([2.0, 1.0], (5, 1))] * 4, 0)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


# ------------------------------------------------------------------------------------------------ what is fed


def entrant(model: onnx.ModelProto, name: str = "net") -> Entrant:
    inputs, outputs = models.signature(model)
    return Entrant(name, Path("net.onnx"), inputs, tuple(o.name for o in outputs), nodes_of(model), 0, 0)


def baked(name: str = "logits") -> onnx.ModelProto:
    """conv_net as exporters leave it that bake a batch of 1 into a Reshape: its input says that any batch goes."""
    model = nets.conv_net()
    (flatten,) = [node for node in model.graph.node if node.op_type == "Flatten"]
    flatten.op_type = "Reshape"
    flatten.input.append("rows")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 768]), "rows"))
    model.graph.node[-1].output[0] = model.graph.output[0].name = name
    return model


def test_the_first_samples_are_fed_again_where_there_are_too_few():
    net = entrant(nets.conv_net())
    with open_samples(PIXELS[:3], net.inputs, None) as samples:
        assert feed_of([net], samples, 2, QUICK)["image"] == pytest.approx(PIXELS[:2])
        assert feed_of([net], samples, 7, QUICK)["image"] == pytest.approx(PIXELS[[0, 1, 2, 0, 1, 2, 0]])
        assert feed_of([net], samples, None, QUICK)["image"] == pytest.approx(PIXELS[:1])


def test_samples_of_different_shapes_are_no_batch():
    net = entrant(nets.block())
    with open_samples(nets.sentences(4), net.inputs, None) as samples:
        assert feed_of([net], samples, 1, QUICK)["tokens"].shape == samples.item(0)["tokens"].shape
        with pytest.raises(errors.DataError, match=r"--batch: samples of input 'tokens' have the shapes") as caught:
            feed_of([net], samples, 4, QUICK)
    assert "Leave --batch out" in caught.value.remedy


def test_random_inputs_have_the_batch_and_shape_that_were_asked_for():
    net = entrant(nets.conv_net())
    assert feed_of([net], None, 5, QUICK)["image"].shape == (5, 3, 16, 16)
    config = CompareConfig(shapes={"image": (4, 3, 16, 16)})
    assert feed_of([net], None, None, config)["image"].shape == (4, 3, 16, 16)
    assert feed_of([net], None, 2, config)["image"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("turned", [False, True])
def test_a_batch_that_one_model_fixes_is_fixed_for_all(turned):
    both = [entrant(nets.conv_net(), "open"), entrant(nets.conv_net(batch=4), "fixed")][:: -1 if turned else 1]
    assert [spec.shape for spec in shared_inputs(both)] == [(4, 3, 16, 16)]
    assert feed_of(both, None, None, QUICK)["image"].shape == (4, 3, 16, 16)
    assert feed_of(both, None, 4, QUICK)["image"].shape == (4, 3, 16, 16)
    with pytest.raises(errors.ConfigError, match="--batch 8: fixed does not take it, its batch is fixed to 4"):
        feed_of(both, None, 8, QUICK)


def test_models_with_other_fixed_dimensions_do_not_go_together():
    other = nets.conv_net()
    other.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 32
    with pytest.raises(errors.ModelError, match=r"b takes .*32.* but a takes .*16"):
        shared_inputs([entrant(nets.conv_net(), "a"), entrant(other, "b")])


# ------------------------------------------------------------------------------------------------ rounds and windows


def test_no_model_is_favoured_by_its_place_among_the_others(monkeypatch):
    """A call is cheaper right behind itself: with a b c, c b a in turn the middle one would look slower by 40 %."""
    clock, ran = types.SimpleNamespace(now=0.0), [-1]
    monkeypatch.setattr(latency, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def fake(which):
        def call():
            clock.now += 0.2 if ran[-1] == which else 1.0
            ran.append(which)

        return call

    orders = latency.drawn(3, np.random.default_rng(0))
    times = latency.calls_in_turn([fake(i) for i in range(3)], 0.0, (3000, 3000), orders)
    assert times.shape == (3000, 3)
    assert times.mean(axis=0) == pytest.approx(times.mean(), rel=0.03)
    assert all(sorted(order) == [0, 1, 2] for order in itertools.islice(orders, 20))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        *(({"seconds": 0.5}, 8), ({"seconds": 10.0}, 10), ({"seconds": 25.5}, 25), ({"seconds": 600.0}, 40)),
        *(({"rounds": 20}, 8), ({"rounds": 41}, 8), ({"rounds": 100}, 20), ({"rounds": 1001}, 40)),
    ],
)
def test_there_are_windows_enough_and_more_with_time(settings, count):
    config = CompareConfig(**settings)
    windows, seconds, (least, most) = window_plan(config)
    assert windows == count
    if config.rounds is None:
        assert windows * seconds == pytest.approx(config.seconds)
        assert windows * least >= 20
    else:
        assert least == most
        assert config.rounds <= windows * least < config.rounds + windows


def test_sessions_are_gone_before_new_ones_open(monkeypatch):
    """Two models' memory has to do, bound inputs and outputs on the device included."""
    opened, most = [], []

    class Watched(Session):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            opened.append(weakref.ref(self._session))
            most.append(sum(one() is not None for one in opened))

    monkeypatch.setattr(runs, "Session", Watched)
    config = CompareConfig(rounds=20, threads=1, io_binding=True)
    onnx_lrs.compare([nets.conv_net()] * 2, config=config)
    assert len(opened) == 2 + 2 * FEWEST_WINDOWS
    assert max(most) == 2


# ------------------------------------------------------------------------------------------------ pieces of a run


@pytest.mark.parametrize("model", [nets.conv_net(), nets.two_inputs()], ids=["one input", "two inputs"])
def test_a_bound_call_gives_what_a_plain_one_gives(model):
    feed = feed_of([entrant(model)], None, 3, QUICK)
    with Session(model, 1) as session:
        plain, bound = session.run(feed), session.bound(feed)
        for _ in range(2):
            bound.run()
        assert {name: value.tolist() for name, value in bound.values().items()} == {
            name: value.tolist() for name, value in plain.items()
        }


def test_a_process_of_its_own_reads_the_memory_of_the_model_alone(tmp_path):
    onnx.save(nets.one_gemm(4096, 4096, np.ones((4096, 4096), np.float32)), tmp_path / "large.onnx")
    onnx.save(nets.one_gemm(8, 8, np.ones((8, 8), np.float32)), tmp_path / "small.onnx")
    ballast = np.ones(2**26)  # 512 MiB of ours, which must not count
    readings = {}
    for name, size in (("large", 4096), ("small", 8)):
        order, begun = alone(tmp_path / f"{name}.onnx", size), time.perf_counter()
        readings[name] = probe(order)
        assert 0 < readings[name].load_ms < 1e3 * (time.perf_counter() - begun)
    large, small = readings["large"], readings["small"]
    assert ballast.nbytes > small.peak_bytes >= small.idle_bytes > 0
    assert large.peak_bytes - small.peak_bytes > 0.9 * 4096 * 4096 * 4


def alone(path: Path, size: int) -> Order:
    """Return the order to run a model of one Gemm alone; its feed lies beside it."""
    np.savez(path.with_name("feed.npz"), x=np.ones((1, size), np.float32))
    return Order(str(path), str(path.with_name("feed.npz")), 1, "cpu", Gpu())


def test_a_process_of_its_own_is_not_led_astray(tmp_path, monkeypatch):
    """Neither by modules in the folder of the user's, nor by what libraries print on stdout until the very end."""
    onnx.save(nets.one_gemm(8, 8), tmp_path / "net.onnx")
    place = tmp_path / "on the path"
    place.mkdir()
    (tmp_path / "onnx.py").write_text("raise SystemExit('the wrong onnx')")
    (place / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.write, 1, b'from a library')\n")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(tmp_path)
    assert probe(alone(tmp_path / "net.onnx", 8)).load_ms > 0


def test_what_goes_wrong_in_a_process_of_its_own_is_told(tmp_path):
    onnx.save(nets.one_gemm(8, 8), tmp_path / "net.onnx")
    order = alone(tmp_path / "net.onnx", 9)
    with pytest.raises(errors.ModelError, match="cannot run the model on x float32") as caught:
        probe(order)
    assert "--shape" in caught.value.remedy
    Path(order.feed).unlink()
    with pytest.raises(errors.ModelError, match=r"ended with code 1: .*FileNotFoundError"):
        probe(order)


def test_a_kernel_counts_for_the_layer_that_it_was_made_of():
    steps = [
        ("Conv", ["x", "w"], "c", "conv1"),
        ("Relu", ["c"], "r", "act"),
        ("Conv", ["r", "w"], "d", "conv1/b"),
        ("Conv", ["r", "w"], "e", "conv10.left_product"),
        ("Add", ["d", "e"], "s", "sum"),
        ("Relu", ["s"], "t", "act2"),
        ("MaxPool", ["t"], "p", "conv1_pool"),
        ("Gemm", ["p", "w"], "y", "fc.right_product"),
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node(op, i, [o], name) for op, i, o, name in steps], "g", [], [])
    )
    kernels = [
        *(("r_nchwc", "Conv", 1.0), ("conv10.left_product", "Conv", 2.0), ("t_nchwc", "Conv", 4.0)),
        *(("ReorderOutput_token_3", "ReorderOutput", 8.0), ("fused fc.right_product", "FusedGemm", 16.0)),
        ("conv1_pool", "MaxPool", 32.0),
    ]
    first = {"conv1": "Conv", "act": "Relu", "conv1/b": "Conv", "conv10": "Conv", "conv1_pool": "MaxPool", "fc": "Gemm"}
    found = nodes.by_layer([nodes.NodeTime(*k[:2], "", k[2]) for k in kernels], model, first)
    assert found == {"": 40.0, "conv1": 1.0, "conv1/b": 4.0, "conv10": 2.0, "fc": 16.0}


def kernel_event(name: str, op: str, ts: int, dur: int, provider: str = CPU, index: int = 0) -> dict:
    args = {"op_name": op, "provider": provider, "node_index": str(index)}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": args}


def test_a_profile_is_read_per_call_of_the_model(tmp_path):
    """Two calls count: `in` runs thrice in one (a loop), `branch` in one of them only, `cut` behind the last one."""
    calls = [{"cat": "Session", "name": "model_run", "ts": ts, "dur": 100} for ts in (0, 200, 400)]
    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 5},
        *(kernel_event("a", "Conv", 200 * i, 900 if i == 0 else 10) for i in range(3)),
        *(kernel_event("in", "Add", 200 + 20 * i, 4) for i in range(3)),
        kernel_event("loop", "Loop", 200, 60),
        kernel_event("branch", "Relu", 420, 8),
        kernel_event("cut", "Relu", 600, 8),
        {"cat": "Node", "name": "a_fence_before", "ts": 200, "dur": 3, "args": {"op_name": "Conv"}},
        {"cat": "Kernel", "name": "gemm_kernel_time", "ts": 200, "dur": 3, "args": {}},
    ]
    place = tmp_path / "profile.json"
    place.write_text(json.dumps([*events, *calls]))
    found = {one.name: (one.op, one.ms) for one in nodes.read(place, 1)}
    assert found == {"a": ("Conv", 0.010), "in": ("Add", 0.006), "branch": ("Relu", 0.004)}


def test_nodes_of_one_name_are_counted_apart(tmp_path):
    events = [{"name": "model_run", "ts": 0, "dur": 10}, *(kernel_event("x", "Relu", 1, 1, index=i) for i in range(2))]
    (tmp_path / "profile.json").write_text(json.dumps(events))
    assert len(nodes.read(tmp_path / "profile.json", 0)) == 2


def test_times_of_nodes_are_those_of_the_calls():
    """ONNX Runtime's own profile, with a loop: what runs in it is counted once, and all together is a call."""
    loop, feed = looped(10, 256), {"x": np.ones((256, 256), np.float32)}

    def share() -> float:
        kernels = nodes.profiled(loop, feed, (1, "cpu", Gpu()), 5)
        with Session(loop, 1) as session:
            call_ms = float(np.median(latency.times_in_turn([session], [feed], 0.2)))
        return sum(kernel.ms for kernel in kernels) / call_ms

    assert any(0.5 < share() < 1.5 for _ in range(5))  # other work may slow one of the two


def looped(trips: int, size: int) -> onnx.ModelProto:
    """x (size, size) -> x W W ... W with ``trips`` products in a Loop."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    kind, square = onnx.TensorProto.FLOAT, [size, size]
    scalars = [info("i", onnx.TensorProto.INT64, []), info("go", onnx.TensorProto.BOOL, [])]
    body = onnx.helper.make_graph(
        [make("MatMul", ["h", "w"], ["g"], "product"), make("Identity", ["go"], ["still"], "on")],
        "body",
        [*scalars, info("h", kind, square)],
        [info("still", onnx.TensorProto.BOOL, []), info("g", kind, square)],
    )
    constants = {"w": np.eye(size, dtype=np.float32), "trips": np.array(trips)}
    ends = [("x", kind, square)], [("y", kind, square)]
    return nets.build([make("Loop", ["trips", "", "x"], ["y"], "loop", body=body)], constants, *ends)


def placed(**counts: int) -> list[nodes.NodeTime]:
    names = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
    copies = [nodes.NodeTime("m", "MemcpyToHost", CUDA, 1.0)] * counts.pop("copies", 0)
    return copies + [nodes.NodeTime("n", "Conv", names[key], 1.0) for key, n in counts.items() for _ in range(n)]


def test_nodes_are_counted_by_provider():
    assert nodes.placement(placed(cuda=5, cpu=2, copies=3), "cuda") == nodes.Placement(None, 2, 3)
    assert nodes.placement(placed(tensorrt=1, cuda=4, cpu=2), "tensorrt") == nodes.Placement(4, 2, 0)
    with pytest.raises(errors.ModelError, match=rf"--provider cuda: 0 of 2 nodes run on {CUDA}, 2 on {CPU}\."):
        nodes.placement(placed(cpu=2, copies=1), "cuda")
    with pytest.raises(errors.ModelError, match=rf"0 of 5 nodes run on {TENSORRT}, 2 on {CPU}, 3 on {CUDA}\."):
        nodes.placement(placed(cpu=2, cuda=3), "tensorrt")


def test_the_options_of_gpus_reach_their_provider(tmp_path):
    cuda = CudaOptions(True, False, True, "heuristic")
    names = {"use_tf32": "0", "prefer_nhwc": "1", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": "1"}
    assert provider_options("cpu", Gpu(cuda)) == [CPU]
    assert provider_options("cuda", Gpu(cuda, "kept")) == [(CUDA, names), CPU]
    first, second, _ = provider_options("tensorrt", Gpu(cuda, "kept"))
    kept = {"trt_engine_cache_enable": "True", "trt_engine_cache_path": "kept"}
    assert first == (TENSORRT, {"trt_cuda_graph_enable": "True", **kept})
    assert second == (CUDA, names | {"enable_cuda_graph": "0"})


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("compare")
    onnx.save(nets.conv_net(), place / "model.onnx")
    config = Config(budget=Budget(params=0.3), threads=1)
    onnx_lrs.compress(place / "model.onnx", place / "small.onnx", data=nets.as_floats(nets.pictures()), config=config)
    np.save(place / "data.npy", PIXELS)
    return place


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/model.onnx", "a/small.onnx"], ["model.onnx", "small.onnx"]),
        (["a/m.onnx", "b/m.onnx", "c/small.onnx"], ["a/m.onnx", "b/m.onnx", "small.onnx"]),
        (["m.onnx", "b/m.onnx"], ["m.onnx", "b/m.onnx"]),
        (["/x/a/m.onnx", "/y/a/m.onnx"], ["x/a/m.onnx", "y/a/m.onnx"]),
        (["a/m.onnx", "a/m.onnx", "./a/m.onnx"], ["m.onnx", "m.onnx (2)", "m.onnx (3)"]),
    ],
)
def test_files_are_called_by_what_tells_them_apart(paths, names):
    entrants = [Entrant(path, Path(path), (), (), (), 0, 0, shown=path) for path in paths]
    assert [entrant.name for entrant in comparison._with_names_apart(entrants)] == names


def test_a_comparison_holds_times_sizes_and_quality(folder):
    paths = [folder / "model.onnx", folder / "small.onnx", folder / "small.onnx"]
    config = CompareConfig(batches=(1, 3), rounds=40, threads=1, profile=True)
    labels = np.arange(12) % 10
    found = onnx_lrs.compare(paths, data=folder / "data.npy", labels=labels, config=config)
    first, second, third = found.models
    assert [m.name for m in found.models] == [paths[0].name, paths[1].name, f"{paths[1].name} (2)"]
    assert first.file_bytes == paths[0].stat().st_size > second.file_bytes == third.file_bytes
    assert first.params == nets.count_params(onnx.load(paths[0])) > second.params
    assert all(m.load_ms > 0 and m.peak_memory_bytes > m.idle_memory_bytes for m in found.models)
    assert [(t.model, t.batch) for t in found.timings] == [(m.name, b) for b in (1, 3) for m in found.models]
    for t in found.timings:
        assert t.rounds >= 40
        assert 0 < t.median_ms <= t.p90_ms <= t.p99_ms
        assert t.throughput == pytest.approx(1e3 * t.batch / t.mean_ms)
        assert t.ratio_low <= t.ratio <= t.ratio_high
    assert {t.verdict for t in found.timings if t.model == first.name} == {"first"}
    before, after = (nets.run(path, {"image": PIXELS})[0] for path in paths[:2])
    assert first.quality is None
    assert second.quality == third.quality
    (quality,) = second.quality
    assert quality.samples == 12
    assert quality.relative_l2 == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-5)
    assert quality.accuracy_after == np.mean(after.argmax(axis=1) == labels)
    assert [t.layer for t in found.layers] == ["conv1", "conv2", "fc1", "fc2", "(others)"] * 2
    assert all(ms > 0 for t in found.layers for ms in t.ms)
    assert all((t.on_cuda, t.on_cpu, t.copies) == (None, None, None) for t in found.timings)
    json.loads(found.to_json())


def test_layers_without_names_are_told_apart(folder, tmp_path):
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        node.name = ""
    small = onnx_lrs.compress(model, data=PIXELS, config=Config(budget=Budget(params=0.3), threads=1)).model
    config = CompareConfig(rounds=20, threads=1, profile=True)
    found = onnx_lrs.compare([model, small], config=config)
    outputs = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert [t.layer for t in found.layers] == [*outputs, "(others)"]
    assert all(ms > 0 for t in found.layers for ms in t.ms)
    assert found.models[0].path is None
    assert found.models[0].quality is None


class Recorder:
    """Progress as it was told: (stage, steps, labels of the steps)."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, list[str]]] = []

    def stage(self, name: str, steps: int) -> None:
        self.stages.append((name, steps, []))

    def step(self, label: str) -> None:
        self.stages[-1][2].append(label)

    def note(self, text: str) -> None:
        raise AssertionError(text)


def test_every_step_is_told_by_name_and_outputs_are_compared_before_the_timing(folder):
    told = Recorder()
    config = CompareConfig(batches=(1, 2), rounds=100, threads=1)
    onnx_lrs.compare([folder / "model.onnx", folder / "small.onnx"], data=PIXELS, config=config, progress=told)
    assert [name for name, *_ in told.stages] == ["look", "load", "quality", "time"]
    assert [len(labels) for _, _, labels in told.stages] == [steps for _, steps, _ in told.stages] == [2, 2, 1, 40]
    assert all(label for _, _, labels in told.stages for label in labels)


def test_outputs_are_compared_one_by_one_if_one_model_takes_no_batches(folder):
    """The first model does, and so the joined samples would break the second."""
    found = onnx_lrs.compare([nets.conv_net(), baked()], data=PIXELS, config=QUICK)
    (quality,) = found.models[1].quality
    assert (quality.samples, quality.relative_l2) == (12, pytest.approx(0.0, abs=1e-5))


def test_what_the_reader_has_to_know_is_a_note(folder):
    pair = [folder / "model.onnx"] * 2
    assert "Inputs were random numbers" in onnx_lrs.compare(pair, config=QUICK).notes[0]
    guessed = onnx_lrs.compare(pair, data=nets.pictures(4), config=QUICK)
    assert guessed.notes[0].startswith("No preprocessing was named")
    named = onnx_lrs.compare(pair, data=PIXELS, config=QUICK)
    assert not [note for note in named.notes if "preprocessing" in note or "random" in note]


def test_a_model_behind_a_link_keeps_its_weights_beside_the_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    model = nets.one_gemm(64, 64)
    onnx.save(model, elsewhere / "inside.onnx")
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    (tmp_path / "net.onnx").rename(elsewhere / "net.onnx")
    (tmp_path / "net.onnx").symlink_to(elsewhere / "net.onnx")
    found = onnx_lrs.compare([tmp_path / "net.onnx", elsewhere / "inside.onnx"], config=QUICK)
    weights = (tmp_path / "net.data").stat().st_size
    assert found.models[0].file_bytes == (elsewhere / "net.onnx").stat().st_size + weights


def test_tables_hold_the_same_figures(folder):
    found = onnx_lrs.compare([folder / "model.onnx", folder / "small.onnx"], data=folder / "data.npy", config=QUICK)
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [float(line["median_ms"]) for line in lines] == [t.median_ms for t in found.timings]
    assert [line["output_relative_l2"] for line in lines] == ["", str(found.models[1].quality[0].relative_l2)]
    assert [int(line["peak_memory_bytes"]) for line in lines] == [m.peak_memory_bytes for m in found.models]
    text = found.to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 + 4
    assert len({row.count("|") for row in rows[:4]}) == len({row.count("|") for row in rows[4:]}) == 1
    assert f"{found.timings[1].ratio:.3f}" in rows[3]
    assert f"{100 * found.models[1].quality[0].relative_l2:.2f} %" in rows[7]
    today = found.environment["date"]
    assert datetime.date.fromisoformat(today) <= datetime.datetime.now(datetime.UTC).date()
    last = text.splitlines()[-1]
    assert last.startswith(
        f"{found.environment['cpu']}, {found.environment['cpu_count']} cores, 1 threads; cpu; batch 1; ONNX Runtime"
    )
    assert today in last
    assert "CUDA" not in text


def test_what_a_gpu_ran_with_and_left_is_in_the_tables(folder):
    """The record of a comparison on the CPU, as it would be on GPUs."""
    found = onnx_lrs.compare([folder / "model.onnx"] * 2, config=QUICK)
    timings = tuple(dataclasses.replace(t, provider="cuda", on_cpu=3, copies=2) for t in found.timings)
    config = CompareConfig(providers=("cuda",), cuda=CudaOptions(True, False, True, "heuristic"))
    environment = found.environment | {"gpu": "NVIDIA X, 580.1"}
    on_gpu = dataclasses.replace(found, timings=timings, environment=environment, settings=config.to_dict())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in on_gpu.to_markdown().splitlines()]
    assert rows[0][-2:] == ["on CPU", "copies"]
    assert [row[-2:] for row in rows[2:4]] == [["3", "2"]] * 2
    assert "NVIDIA X, 580.1, CUDA graph on; TF32 off, NHWC on, heuristic search" in on_gpu.machine()
    both = dataclasses.replace(on_gpu, timings=tuple(dataclasses.replace(t, on_cuda=1) for t in timings))
    assert "| on CUDA | on CPU | copies |" in both.to_markdown()


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batches": (0,)}, "--batch is"),
        ({"batches": (2, 2)}, "--batch names one twice"),
        ({"providers": ()}, "--provider is empty"),
        ({"providers": ("gpu",)}, "--provider is 'gpu'; use cpu, cuda, tensorrt"),
        ({"threads": 0}, "--threads is 0"),
        ({"seconds": 0.0}, "--seconds is 0.0"),
        ({"seconds": float("nan")}, "--seconds is nan"),
        ({"rounds": 19}, "--rounds is 19; an interval needs at least 20"),
        ({"seed": -1}, "--seed is -1"),
        ({"providers": ("cuda",), "cuda": CudaOptions(cuda_graph=True), "io_binding": False}, "--cuda-graph replays"),
        ({"cuda": CudaOptions(cuda_graph=True)}, "--cuda-graph has no effect with --provider cpu"),
        ({"cuda": CudaOptions(tf32=False)}, "--no-tf32 has no effect with --provider cpu"),
        ({"providers": ("tensorrt",), "cuda": CudaOptions(prefer_nhwc=True)}, "--prefer-nhwc has no effect"),
        (
            {"providers": ("cpu", "tensorrt"), "cuda": CudaOptions(cudnn_conv_algo_search="default")},
            "--cudnn-conv-algo-search has no effect with --provider cpu,tensorrt",
        ),
        ({"providers": ("cpu", "cuda"), "profile": True}, "--profile does not time layers on cuda"),
    ],
)
def test_settings_out_of_range_are_refused(values, words):
    with pytest.raises(errors.ConfigError, match=words):
        CompareConfig(**values)


def test_options_of_gpus_are_taken_where_they_have_an_effect():
    CompareConfig(providers=("tensorrt",), cuda=CudaOptions(cuda_graph=True))
    CompareConfig(providers=("tensorrt", "cuda"), cuda=CudaOptions(True, False, True, "default"))
    CompareConfig(providers=("cuda",), io_binding=False)


def test_models_that_cannot_be_compared_are_refused(folder):
    with pytest.raises(errors.ConfigError, match="needs two models"):
        onnx_lrs.compare([folder / "model.onnx"])
    with pytest.raises(errors.ModelError, match=r"model 2 takes .* but model 1 takes image"):
        onnx_lrs.compare([nets.conv_net(), nets.two_inputs()], config=QUICK)
    with pytest.raises(errors.ConfigError, match="Labels were given without data"):
        onnx_lrs.compare([nets.conv_net()] * 2, labels=[1], config=QUICK)


def refused(kind: type[errors.OnnxLrsError], words: str, *arguments, **more) -> tuple[errors.OnnxLrsError, list[str]]:
    """Return the error of a comparison and the stages that were begun before it."""
    told = Recorder()
    with pytest.raises(kind, match=words) as caught:
        onnx_lrs.compare(*arguments, **more, progress=told)
    return caught.value, [name for name, *_ in told.stages]


def test_nothing_is_timed_before_it_is_known_that_the_models_fit_together(tmp_path):
    pair = [nets.conv_net(), baked("scores")]
    words = "model 2 has no output 'logits', which model 1 has"
    error, stages = refused(errors.ModelError, words, pair, data=PIXELS, config=QUICK)
    assert (stages, "leave the data out" in error.remedy) == (["look"], True)
    config = CompareConfig(batches=(1, 3), rounds=20, threads=1)
    error, stages = refused(
        errors.ModelError, "model 2: ONNX Runtime cannot run the model on image", pair, config=config
    )
    assert (stages, "--batch" in error.remedy) == (["look", "load"], True)
    assert onnx_lrs.compare(pair, config=QUICK).timings[1].verdict != "first"  # without data names do not matter


def test_a_model_that_onnxruntime_does_not_load_is_named(tmp_path):
    broken = nets.conv_net()
    broken.graph.node[1].op_type = "Unheard"
    onnx.save(nets.conv_net(), tmp_path / "sound.onnx")
    onnx.save(broken, tmp_path / "broken.onnx")
    paths = [tmp_path / "sound.onnx", tmp_path / "broken.onnx"]
    words = r"broken\.onnx: ONNX Runtime cannot load the model: .*Unheard"
    _, stages = refused(errors.ModelError, words, paths, config=QUICK)
    assert stages == ["look", "load"]


def test_outputs_of_another_shape_are_an_error_with_a_remedy():
    other = nets.conv_net()
    other.graph.node[-1].output[0] = "ten"
    other.graph.node.append(onnx.helper.make_node("ReduceMax", ["ten"], ["logits"], axes=[1]))
    other.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    error, _ = refused(
        errors.ModelError, "model 2 against model 1", [nets.conv_net(), other], data=PIXELS, config=QUICK
    )
    assert "Leave that model out" in error.remedy


def test_a_model_that_fails_on_a_gpu_is_no_provider_that_does_not_start():
    said = "[ONNXRuntimeError] : 1 : FAIL : this session cannot use the graph capture feature"
    error = sessions.not_loaded("cuda", CudaOptions(cuda_graph=True), said)
    assert type(error) is errors.ModelError
    assert error.message == f"ONNX Runtime cannot load the model on {CUDA}: {said}"
    assert "Leave --cuda-graph out" in error.remedy
    assert "--cuda-graph" not in sessions.not_loaded("cuda", CudaOptions(), said).remedy


@pytest.mark.skipif(starts("cuda"), reason="needs a machine without a GPU")
def test_a_provider_that_does_not_start_is_an_error_and_no_figure_of_the_cpu():
    config = CompareConfig(providers=("cpu", "cuda"), rounds=20, threads=1, cuda=CudaOptions(True, False, True))
    with pytest.raises(errors.RuntimeEnvironmentError, match=r"--provider cuda: CUDAExecutionProvider did not start"):
        onnx_lrs.compare([nets.conv_net()] * 2, config=config)


@pytest.mark.skipif(not starts("cuda"), reason="needs a GPU")
@pytest.mark.parametrize("graph", [False, True])
def test_models_are_compared_on_a_gpu(graph):
    config = CompareConfig(providers=("cuda",), rounds=20, threads=1, cuda=CudaOptions(cuda_graph=graph))
    found = onnx_lrs.compare([nets.conv_net()] * 2, data=PIXELS, config=config)
    assert [(t.on_cpu, t.copies) for t in found.timings] == [(0, 0)] * 2
    assert found.models[1].quality[0].relative_l2 == pytest.approx(0.0, abs=1e-3)


# ------------------------------------------------------------------------------------------------ the command line


def call(folder: Path, *more: str) -> int:
    names = [str(folder / name) for name in ("model.onnx", "small.onnx")]
    return cli.main(["compare", *names, "--rounds", "20", "--threads", "1", *more])


def test_the_command_line_writes_every_kind_of_table(folder, tmp_path, capsys):
    places = {name: tmp_path / f"table.{name}" for name in ("json", "csv")}
    flags = [part for name, place in places.items() for part in (f"--{name}", str(place))]
    data = ["--data", str(folder / "data.npy"), "--batch", "1,2", "--profile"]
    assert call(folder, *data, *flags, "--markdown", "-") == 0
    out, told = capsys.readouterr()
    record = json.loads(places["json"].read_text())
    assert [t["batch"] for t in record["timings"]] == [1, 1, 2, 2]
    assert record["settings"]["cuda"]["tf32"] is True
    assert out.startswith("| model | provider | batch |")
    assert len(places["csv"].read_text().splitlines()) == 5
    assert [
        word for word in ("Latency ratio", "Peak memory", "Times of the layers", "99 % intervals") if word not in told
    ] == []


def test_a_limit_is_an_exit_code_and_a_line_for_each_that_misses_it(folder, capsys):
    assert call(folder, "-q", "--at-most", "1000") == 0
    assert capsys.readouterr().err == ""
    assert call(folder, "-q", "--at-most", "0.0001", "--batch", "1,2") == cli.SLOW
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"small.onnx, cpu, batch {n}" for n in (1, 2)]
    assert all("not surely at most 0.0001" in line for line in lines)


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "half"])
def test_a_limit_is_a_positive_number(value, folder, capsys):
    with pytest.raises(SystemExit) as end:
        call(folder, f"--at-most={value}")
    assert end.value.code == 2
    assert f"'{value}' is not a ratio" in capsys.readouterr().err


def test_mistakes_on_the_command_line_are_named(folder, capsys):
    model = folder / "model.onnx"
    before = model.read_bytes()
    assert call(folder, "--json", str(model)) == 2
    assert "would overwrite the model file" in capsys.readouterr().err
    assert call(folder, "--json", "-", "--csv", "-") == 2
    assert "Two reports would go to stdout" in capsys.readouterr().err
    (folder / "link.csv").symlink_to(folder / "table")
    assert call(folder, "--markdown", str(folder / "table"), "--csv", str(folder / "link.csv")) == 2
    assert "--csv and --markdown name the same file" in capsys.readouterr().err
    assert cli.main(["compare", str(model)]) == 2
    assert call(folder, "--cuda-graph") == 2
    assert "--cuda-graph has no effect with --provider cpu" in capsys.readouterr().err
    if not starts("cuda"):
        assert call(folder, "--provider", "cuda", "--cuda-graph") == 8
        assert "CUDAExecutionProvider did not start" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(folder, "--batch", "1,x")
    assert model.read_bytes() == before
