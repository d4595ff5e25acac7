"""Models whose weights lie in files: nothing is loaded before it is asked for, and the outcome is the same."""

import errno
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_lrs
from onnx_lrs.errors import ModelError, OutputError
from onnx_lrs.graph import model as models
from onnx_lrs.graph import weights
from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.runtime.session import Session
from onnx_lrs.runtime.verify import check_structure
from tests.builders import planted

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HIDDEN = 128, 256
SIZE = 4 * WIDTH * HIDDEN  # bytes of a weight, 128 KiB; biases take 1 KiB and less
MB = 10**6


def tool():
    spec = importlib.util.spec_from_file_location("make_large_model", ROOT / "tools" / "make_large_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def path(tmp_path):
    """Return a model of 8 blocks (2 MB) with external data; its samples lie beside it."""
    made = tool().make_model(tmp_path / "in", 2 * MB, WIDTH, HIDDEN, seed=0)
    tool().make_samples(made.with_name("samples.npz"), 64, WIDTH, seed=0)
    return made


def values(model):
    return {t.name: (t.data_type, tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer}


def with_constant_node(path):
    """Make a Constant node of the first weight, as some exporters write all weights."""
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[0]
    path.write_bytes(model.SerializeToString())
    return path


def output_of(model, **options):
    with Session(model, 1, **options) as session:
        return session.run({"x": np.linspace(-1, 1, 3 * WIDTH, dtype=np.float32).reshape(3, WIDTH)})["y"]


def test_nothing_is_read_to_look_at_a_model(path, monkeypatch):
    whole = onnx.load(path)
    monkeypatch.setattr(weights, "_bytes", lambda _: pytest.fail("a weight was read"))
    model = models.load(path)
    view = View(model)
    assert model.ByteSize() < 64 * 1024
    assert models.weight_count(model) == models.weight_count(whole)
    assert models.stored_bytes(model) == pytest.approx(whole.ByteSize(), rel=0.01)
    assert view.stored_shape("up0") == (WIDTH, HIDDEN)
    assert models.signature(model) == models.signature(whole)
    check_structure(model, model)


@pytest.mark.parametrize("prepare", [lambda path: path, with_constant_node])
def test_read_when_asked_for_equals_read_at_once(path, prepare, tmp_path):
    whole = onnx.load(path)
    model = models.load(prepare(path))
    view = View(model)
    for tensor in whole.graph.initializer:
        got = view.constant(tensor.name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, numpy_helper.to_array(tensor))
    models.save(model, tmp_path / "again.onnx", external=True)
    again, outside = models.load(tmp_path / "again.onnx"), models.external_places(tmp_path / "again.onnx")
    assert outside == {"again.onnx.data"}
    np.testing.assert_array_equal(output_of(again), output_of(whole))
    assert values(weights.loaded(again)) == values(weights.loaded(model))


def test_compressed_from_a_file_and_from_memory_are_the_same(path, tmp_path):
    settings = onnx_lrs.Config(budget=onnx_lrs.Budget(params=0.5), threads=1, method="hsvd")
    data = path.with_name("samples.npz")
    tool().make_model(path.parent, 4 * SIZE, WIDTH, HIDDEN, seed=0)
    result = onnx_lrs.compress(path, tmp_path / "lazy.onnx", data=data, config=settings)
    eager = onnx_lrs.compress(onnx.load(path), data=data, config=settings)
    assert values(onnx.load(tmp_path / "lazy.onnx")) == values(eager.model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "in",
        "lazy.onnx",
        "lazy.onnx.data",
    ]  # no scratch file is left
    assert result.after.file_bytes == models.file_bytes(tmp_path / "lazy.onnx")
    assert values(onnx_lrs.compress(path, data=data, config=settings).model) == values(eager.model)
    first = (tmp_path / "lazy.onnx.data").read_bytes()
    onnx_lrs.compress(path, tmp_path / "lazy.onnx", data=data, config=settings)
    assert (tmp_path / "lazy.onnx.data").read_bytes() == first


def open_files():
    """Return how many files this process has open; 0 where nobody tells."""
    return len([*Path("/proc/self/fd").iterdir()]) if sys.platform == "linux" else 0


@pytest.mark.parametrize("extent", [1 << 17, 1 << 22])
def test_what_a_scratch_file_keeps_comes_back_from_a_few_mappings(path, tmp_path, monkeypatch, extent):
    """Arrays and tensors in turns, some longer than what is mapped at a time."""
    monkeypatch.setattr(weights, "EXTENT", extent)
    rng, kept = np.random.default_rng(0), []
    before = open_files()
    with weights.scratch_for(models.load(path), tmp_path / "out.onnx") as scratch:
        for number in range(60):
            shape = (int(rng.integers(128, 512)), 130)
            given = rng.standard_normal(shape).astype([np.float32, np.float64][number % 2])
            tensor = scratch.tensor(f"t{number}", given) if number % 3 == 0 else None
            kept.append((given, scratch.keep(given), tensor))
        assert extent < 1 << 22 or open_files() - before < len(kept) // 4
        for given, mapped, tensor in kept:
            np.testing.assert_array_equal(mapped, given)
            assert not mapped.flags.writeable
            if tensor is not None:
                np.testing.assert_array_equal(weights.read(tensor), given)
    small = np.ones(3)
    assert scratch.keep(small) is small


@pytest.mark.parametrize("mapped", [False, True])
def test_a_session_finds_weights_in_two_folders(path, tmp_path, mapped):
    model = models.load(path)
    view = View(model)
    layers = find(view)[0]
    factors = {layer.node: planted("all_channels", layer.out, layer.d) for layer in layers[:3]}
    ranks = {layer.input: 2 for layer in layers}
    in_memory = rewrite(view, layers, factors, ranks).model
    with weights.scratch_for(model, tmp_path / "out.onnx") as scratch:
        new = rewrite(view, layers, factors, ranks, scratch).model
        places = {weights.place_of(tensor).path.parent for tensor in weights.references(new)}
        assert len(places) == 2
        assert values(weights.loaded(new)) == values(weights.loaded(in_memory))
        np.testing.assert_array_equal(output_of(new, mapped=mapped), output_of(in_memory, mapped=mapped))


def test_a_data_file_that_changes_is_noticed(path):
    model = models.load(path)
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ModelError, match="changed while it was in use"):
        View(model).constant("down7")
    data.unlink()
    with pytest.raises(ModelError, match="changed while it was in use"):
        View(model).constant("up0")


@pytest.mark.parametrize("with_length", [True, False])
def test_a_large_tensor_cut_short_is_refused_at_once(path, with_length):
    model = onnx.load(path, load_external_data=False)
    if not with_length:
        for tensor in model.graph.initializer:
            kept = [entry for entry in tensor.external_data if entry.key != "length"]
            del tensor.external_data[:]
            tensor.external_data.extend(kept)
        path.write_bytes(model.SerializeToString())
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-SIZE])
    with pytest.raises(ModelError, match="truncated"):
        models.load(path)


def test_a_link_to_large_tensors_is_refused(path):
    data = path.with_name("model.onnx.data")
    data.rename(path.with_name("elsewhere.bin"))
    data.symlink_to("elsewhere.bin")
    with pytest.raises(ModelError, match="external data"):
        models.load(path)


@pytest.mark.parametrize("broken", ["_stream", "_aligned"])
def test_a_full_disk_leaves_nothing(path, tmp_path, monkeypatch, broken):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = onnx_lrs.Config(budget=onnx_lrs.Budget(params=0.5), threads=1, method="hsvd")
    tool().make_model(path.parent, 4 * SIZE, WIDTH, HIDDEN, seed=0)
    monkeypatch.setattr(weights, broken, full)
    with pytest.raises(OutputError, match="No space left"):
        onnx_lrs.compress(path, tmp_path / "out.onnx", data=path.with_name("samples.npz"), config=settings)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


GRAPH_ALONE = """
import pathlib, sys
import numpy as np
from onnx_lrs.graph import model as models, weights
from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.runtime import session
from onnx_lrs.runtime.verify import check_structure
from onnx_lrs.solvers.problem import Factors

session.MOST_COPIED = 2**20
source, target = map(pathlib.Path, sys.argv[1:])
model = models.load(source)
view = View(model)
layers = find(view)[0]
factors = {}
with weights.scratch_for(model, target) as scratch:
    for layer in layers[::2]:
        left, right = np.ones((layer.out, 128)) / layer.out, np.ones((128, layer.d)) / layer.d
        nothing = np.zeros(0, np.int64), np.zeros((layer.out, 0)), np.zeros(layer.out)
        factors[layer.node] = Factors(scratch.keep(left), scratch.keep(right), *nothing, 1)
    new = rewrite(view, layers, factors, {layer.input: 2 for layer in layers}, scratch).model
    check_structure(model, new)
    with session.Session(model, 1) as one, session.Session(new, 1) as two:
        for each in (one, two):
            each.run({"x": np.ones((2, 512), np.float32)})
    models.save(new, target, external=True)
"""


def peaks(*command):
    """Run a command and return the largest RssAnon and VmRSS of its process, in bytes; both sampled."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=environment, stdout=subprocess.DEVNULL)
    found = {"RssAnon": 0, "VmRSS": 0}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for name, value in (line.split(":", 1) for line in lines if line.startswith(tuple(found))):
            found[name] = max(found[name], 1024 * int(value.split()[0]))
        time.sleep(0.005)
    assert process.wait() == 0
    return found["RssAnon"], found["VmRSS"]


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/PID/status to read")


@needs_proc
def test_anonymous_memory_does_not_grow_with_the_model(tmp_path):
    found = []
    for size in (100, 300):
        source = tool().make_model(tmp_path / str(size), size * MB, 512, 2048, seed=0)
        found.append(peaks("-c", GRAPH_ALONE, source, source.with_name("out.onnx"))[0])
    assert found[1] - found[0] < 20 * MB, found  # the models differ by 200 MB, the new weights by 50 MB


@needs_proc
@pytest.mark.slow
def test_two_and_a_half_gigabytes(tmp_path):
    source = tool().make_model(tmp_path, 2500 * MB, 512, 16384, seed=0)
    samples = source.with_name("samples.npz")
    tool().make_samples(samples, 64, 512, seed=0)
    output, begun = tmp_path / "out.onnx", time.perf_counter()
    wish = ("--data", samples, "--params", 0.5, "--memory", "1GiB", "--method", "hsvd", "--quiet")
    anonymous, resident = peaks("-m", "onnx_lrs", source, "-o", output, *wish)
    sizes = [models.file_bytes(file) / 1e9 for file in (source, output)]
    seconds = time.perf_counter() - begun
    print(f"\nRssAnon {anonymous / 1e9:.2f} GB, RSS {resident / 1e9:.2f} GB, {seconds:.0f} s, {sizes}")
    assert anonymous < 1.5 * 2**30  # what --memory allows and half as much for Python, ONNX Runtime and activations
    assert sizes[1] < 0.51 * sizes[0]
    data = np.load(samples)["x"][:2]
    with Session(models.load(source), 1) as one, Session(models.load(output), 1) as two:
        first, second = (session.run({"x": data})["y"] for session in (one, two))
    assert np.linalg.norm(first - second) < 0.5 * np.linalg.norm(first)
