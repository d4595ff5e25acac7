"""Finished parts come back bit by bit; a run that is killed anywhere goes on and gives the same file."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import onnx_lrs
from onnx_lrs import Budget, Config, errors, pipeline
from onnx_lrs.calibration.capture import Capture, Setting
from onnx_lrs.calibration.subject import Inputs, Material, open_material
from onnx_lrs.data import TensorSpec, fingerprint, open_samples
from onnx_lrs.graph import model as models
from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View
from onnx_lrs.planning import cascade, fitting, plan, refits
from onnx_lrs.planning.candidates import Fitted
from onnx_lrs.progress import Silent
from onnx_lrs.solvers.problem import ElementFactors, Status
from onnx_lrs.work import Identity, Work
from tests import small_nets as nets

ROOT = Path(__file__).resolve().parents[1]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Record:
    first: Any
    second: Any = None


RECORDS = (Colour, Record)
RUN = Identity({"model": "m", "settings": {"seed": 0}})


def opened(place: Path, identity: Identity = RUN, notes: list[str] | None = None) -> Work:
    return Work.open(place, identity, RECORDS, [].append if notes is None else notes.append)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal bit by bit, types included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray | np.generic):
        return (one.dtype.str, one.shape, one.tobytes()) == (other.dtype.str, other.shape, other.tobytes())
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (one != one and other != other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, Record):
        return same(vars(one), vars(other))
    if isinstance(one, scipy.sparse.csr_array):
        return one.shape == other.shape and all(
            same(getattr(one, part), getattr(other, part)) for part in ("data", "indices", "indptr")
        )
    return bool(one == other)


# ------------------------------------------------------------------------------------------------ values


DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
    hnp.unicode_string_dtypes(endianness="?"),
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([-0.0, float("inf"), float("nan"), 5e-324, "\ud800", Colour.RED, np.float32(0.1), np.int64(-1)]),
    st.text(),
    ARRAYS,
)
KEYS = st.one_of(st.text(max_size=3), st.integers(), st.tuples(st.integers()))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.builds(Record, inner, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(value=TREES.filter(lambda value: value is not None), mapped=st.booleans())
def test_values_come_back_as_they_were(tmp_path_factory, value, mapped):
    with opened(tmp_path_factory.mktemp("work")) as work:
        went_on = work.put("kind", "name", value)
        assert same(went_on, value)
        assert same(work.get("kind", "name", mapped), value)
        assert work.has("kind", "name")


def test_sparse_factors_and_results_of_a_layer_come_back(tmp_path):
    rng = np.random.default_rng(0)
    entries = scipy.sparse.csr_array(np.where(rng.random((6, 8)) < 0.2, rng.standard_normal((6, 8)), 0.0))
    entries.indices, entries.indptr = entries.indices.astype(np.int64), entries.indptr.astype(np.int64)
    factors = ElementFactors(rng.random((6, 0)), rng.random((0, 8)), entries, rng.random(6))
    with Work.open(tmp_path, RUN, pipeline.KEPT, [].append) as work:
        work.put("fitted", "fc", Fitted(factors, 0.1, None, Status.NOT_CONVERGED, np.float64(0.3)))
        found = work.get("fitted", "fc")
    assert same(found.factors.sparse, entries)
    assert (found.status, found.error, found.activation_error) == (Status.NOT_CONVERGED, 0.1, None)
    assert type(found.allowed) is np.float64


@pytest.mark.parametrize("folder", [False, True])
def test_arrays_go_on_in_one_layout_with_and_without_a_folder(folder, tmp_path):
    """BLAS rounds a transposed operand elsewhere; a resumed run must not differ from one that was not interrupted."""
    value = np.arange(12.0).reshape(3, 4).T[:, ::2]
    with opened(tmp_path) if folder else Work() as work:
        kept = work.put("kind", "name", Record(value))
        assert kept.first.flags.c_contiguous
        assert np.array_equal(kept.first, value)


def test_what_the_folder_has_no_name_for_is_refused_and_leaves_nothing(tmp_path):
    with Work.open(tmp_path, RUN, [Colour], [].append) as work:
        for value in (Record(1), {1, 2}, np.array([object()]), np.zeros(2, "i4,i4"), b"bytes", Record):
            with pytest.raises(TypeError, match="kept"):
                work.put("kind", "name", value)
        assert [path.name for path in work.folder.iterdir() if path.name not in ("lock", "run.json")] == []


def test_without_a_folder_nothing_is_kept():
    with Work() as work:
        assert work.put("kind", "name", 3) == 3
        assert work.get("kind", "name") is None
        assert not work.has("kind", "name")


NAMES = ["conv/1:0", "../../etc/passwd", "層1", "layer 1", "layer_1", "Layer 1", "", ".", "x" * 400, "a\0b", "\ud800"]


def test_every_name_has_its_own_file(tmp_path):
    with opened(tmp_path) as work:
        for number, name in enumerate(NAMES):
            work.put("kind", name, number + 1)
        assert work.found("kind", NAMES) == {name: number + 1 for number, name in enumerate(NAMES)}
        assert len([*work.folder.glob("*.part")]) == len(NAMES)
    assert [path.name for path in tmp_path.iterdir()] == [RUN.key[:16]]


def test_mapped_arrays_stay_in_the_file_and_cannot_be_changed(tmp_path):
    with opened(tmp_path) as work:
        work.put("kind", "name", (np.ones((3, 3)), np.zeros((0, 3))))
        full, empty = work.get("kind", "name", mapped=True)
        assert empty.shape == (0, 3)
        with pytest.raises(ValueError, match="read-only"):
            full[0, 0] = 2.0
        changeable = work.get("kind", "name")[0]
        changeable[0, 0] = 2.0
        assert work.get("kind", "name")[0][0, 0] == 1.0


# ------------------------------------------------------------------------------------------------ damage


VALUE = Record(np.arange(100.0), {"a": (1, "b")})


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), mapped=st.booleans())
def test_a_part_that_is_cut_off_is_missing_and_the_note_says_so(tmp_path_factory, share, mapped):
    notes: list[str] = []
    with opened(tmp_path_factory.mktemp("work"), notes=notes) as work:
        work.put("kind", "conv1", VALUE)
        (part,) = work.folder.glob("*.part")
        end = len(part.read_bytes().rstrip(b"\0"))
        os.truncate(part, int(share * end))
        assert work.get("kind", "conv1", mapped) is None
        assert "'conv1'" in notes[0]
        assert "damaged" in notes[0]
        work.put("kind", "conv1", VALUE)
        assert same(work.get("kind", "conv1"), VALUE)


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_a_changed_byte_is_noticed(tmp_path_factory, share, change):
    with opened(tmp_path_factory.mktemp("work")) as work:
        work.put("kind", "conv1", VALUE)
        (part,) = work.folder.glob("*.part")
        content = bytearray(part.read_bytes())
        content[int(share * len(content))] ^= change
        part.write_bytes(content)
        found = work.get("kind", "conv1")
        assert found is None or same(found, VALUE)  # a byte between the arrays says nothing
        assert found is None or content.count(0) < len(content)


def test_a_part_under_another_parts_name_is_missing(tmp_path):
    with opened(tmp_path) as work:
        work.put("kind", "one", 1)
        (part,) = work.folder.glob("*.part")
        work.put("kind", "two", 2)
        (other,) = {*work.folder.glob("*.part")} - {part}
        part.replace(other)
        assert work.get("kind", "two") is None


def test_what_a_killed_writer_left_half_written_goes(tmp_path):
    with opened(tmp_path) as work:
        work.put("kind", "one", 1)
        draft = work.folder / "kind-one-0.part.abc.tmp"
        draft.write_bytes(b"half")
    notes: list[str] = []
    with opened(tmp_path, notes=notes) as work:
        assert not draft.exists()
        assert work.get("kind", "one") == 1
    assert notes == [f"Going on from {work.folder}: 1 finished part is not computed again."]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    with opened(tmp_path) as work:
        work.put("kind", "one", 1)
        before = {path: path.read_bytes() for path in work.folder.iterdir()}

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(errors.OutputError, match=r"kind of 'one' .*No space left") as caught:
            work.put("kind", "one", 2)
        assert "--work" in caught.value.remedy
        assert {path: path.read_bytes() for path in work.folder.iterdir()} == before
        assert work.get("kind", "one") == 1


# ------------------------------------------------------------------------------------------------ the folder


HOLDER = """
import sys, pathlib
from onnx_lrs.work import Identity, Work
with Work.open(pathlib.Path(sys.argv[1]), Identity({"model": "m", "settings": {"seed": 0}}), (), print):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_folder_serves_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(errors.ConfigError, match=f"in use by process {holder.pid}") as caught:
            opened(tmp_path)
        assert str(tmp_path) in caught.value.message
        opened(tmp_path, Identity({"model": "other"})).close()
        holder.kill()
    opened(tmp_path).close()


def test_a_folder_serves_one_run_of_a_process_at_a_time(tmp_path):
    with opened(tmp_path), pytest.raises(errors.ConfigError, match=f"in use by process {os.getpid()}"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "work").write_text("")
    with pytest.raises(errors.ConfigError, match="not a folder"):
        opened(tmp_path / "work")
    with pytest.raises(errors.ConfigError, match="not a folder"):
        onnx_lrs.compress(nets.conv_net(), config=Config(work=tmp_path / "work"))


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputError, match="cannot be used"):
        opened(tmp_path / "file" / "work")


def test_the_folder_says_what_it_is_and_what_another_run_changed(tmp_path):
    opened(tmp_path, Identity(RUN.deciding, {"model file": "net.onnx"})).close()
    told = json.loads((tmp_path / RUN.key[:16] / "run.json").read_text())
    assert told == {"model file": "net.onnx", "key": RUN.key, "model": "m", "settings": {"seed": 0}}
    notes: list[str] = []
    opened(tmp_path, Identity({"model": "m", "settings": {"seed": 1}}), notes).close()
    assert len(notes) == 1
    assert "starts from the beginning" in notes[0]
    assert notes[0].endswith("differs in: settings.seed.")


def test_a_run_killed_before_its_first_part_is_not_another_one(tmp_path):
    notes: list[str] = []
    opened(tmp_path, notes=notes).close()
    opened(tmp_path, notes=notes).close()
    assert not notes


# ------------------------------------------------------------------------------------------------ the key


DATA = nets.as_floats(nets.pictures(12))


def key_of(model: Any = None, data: Any = DATA, test: Any = None, **changes: Any) -> str:
    model = nets.conv_net() if model is None else model
    inputs = Inputs(data, None, test)
    config = Config(**({"threads": 1} | changes))
    job = pipeline.Job(model, None, inputs, config, Silent())
    with contextlib.ExitStack() as stack:
        material: Material = open_material(inputs, models.signature(models.load(model))[0], config, stack)
        return pipeline._identity(job, material, pipeline.Clock(Silent())).key


def test_the_key_stays_when_nothing_that_decides_changes(tmp_path):
    key = key_of()
    assert key_of(nets.conv_net(), DATA.copy()) == key
    assert key_of(test=DATA[:5]) == key
    assert key_of(work=str(tmp_path)) == key
    assert key_of(jobs=3) == key
    assert key_of(seed=np.int64(0), exclude=()) == key
    assert key_of(data=list(DATA[:, None])) == key_of(data=[{"image": row[None]} for row in DATA])
    onnx.save(nets.conv_net(), tmp_path / "a.onnx")
    onnx.save(nets.conv_net(), tmp_path / "b.onnx")
    assert key_of(tmp_path / "a.onnx") == key_of(str(tmp_path / "b.onnx"))


OTHER = {
    "budget": Budget(macs=0.5),
    "method": "hsvd",
    "fit": "independent",
    "structure": "elements",
    "steps": 3,
    "multiple": 4,
    "holdout": 0.3,
    "columns": 1024,
    "memory_bytes": 1 << 30,
    "batch": 7,
    "calibration_batch": 7,
    "threads": 2,
    "provider": "cuda",
    "seed": 1,
    "exclude": ("fc*",),
    "shapes": {"image": (1, 3, 16, 16)},
    "random_data": True,
    "preprocess": onnx_lrs.Preprocess(scale=0.5),
    "latency_table": "there.json",
    "plan": "plan.json",
    "refine": onnx_lrs.Training(),
    "report": "report.html",
    "precision": "int8",
    "quantize_options": {"per_channel": "False"},
}


PLANNING = {  # choose among the same curves
    *("budget", "batch", "provider", "latency_table", "plan", "refine", "report", "precision", "quantize_options")
}
BESIDE = {"quantize_options": {"precision": "int8"}}  # what a setting does not go without


def test_the_key_changes_with_every_setting_that_curves_and_fits_depend_on():
    assert {field.name for field in dataclasses.fields(Config)} - {"work", "jobs", "dry_run"} == set(OTHER)
    fitting = set(OTHER) - PLANNING
    keys = {key_of(), *(key_of(**{name: OTHER[name]}) for name in fitting)}
    assert len(keys) == 1 + len(fitting)
    assert {key_of(**{name: OTHER[name]}, **BESIDE.get(name, {})) for name in PLANNING} == {key_of()}


def test_the_key_changes_with_a_weight(tmp_path):
    model = nets.conv_net()
    bits = bytearray(model.graph.initializer[2].raw_data)
    bits[0] ^= 1
    model.graph.initializer[2].raw_data = bytes(bits)
    assert key_of(model) != key_of()
    attribute = nets.conv_net()
    attribute.graph.node[0].attribute[0].ints[0] = 2
    assert key_of(attribute) != key_of()
    keys = []
    for place in (nets.conv_net(), model):
        onnx.save(place, tmp_path / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        keys.append(key_of(tmp_path / "net.onnx"))
    assert keys[0] != keys[1]


def test_the_key_changes_with_a_sample():
    changed = DATA.copy()
    changed[-1, -1, -1, -1] = np.nextafter(changed[-1, -1, -1, -1], np.float32(2))
    assert len({key_of(), key_of(data=changed), key_of(data=DATA[::-1]), key_of(data=DATA[:-1])}) == 4


def test_a_fingerprint_is_of_what_is_fed_not_of_where_it_lies(tmp_path):
    spec = [TensorSpec("image", np.dtype(np.float32), ("N", 3, 16, 16))]
    pixels = nets.pictures(5)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    with open_samples(tmp_path, spec, None) as folder, open_samples(pixels, spec, None) as array:
        steps: list[int] = []
        assert fingerprint(folder, lambda: steps.append(1)) == fingerprint(array)
        assert len(steps) == 5
    with (
        open_samples(pixels, spec, onnx_lrs.Preprocess(scale=0.5)) as scaled,
        open_samples(pixels, spec, None) as array,
    ):
        assert fingerprint(scaled) != fingerprint(array)


# ------------------------------------------------------------------------------------------------ stopped anywhere


@dataclasses.dataclass(frozen=True)
class Case:
    model: onnx.ModelProto
    data: Any
    config: dict[str, Any]


PICTURES = nets.as_floats(nets.pictures(24))
CASES = {
    "cascade": Case(nets.conv_net(), PICTURES, {}),
    "cascade of sentences": Case(nets.block(), nets.sentences(20), {"fit": "cascade-linear"}),
    "independent": Case(nets.two_inputs(), nets.pairs(), {"fit": "independent"}),
    "columns": Case(nets.two_inputs(), nets.pairs(), {"method": "admm", "steps": 5}),
    "elements": Case(nets.two_inputs(), nets.pairs(), {"method": "greedy", "structure": "elements", "steps": 5}),
    "gain": Case(nets.two_inputs(), nets.pairs(), {"method": "nettrim", "budget": Budget(gain=0.3), "steps": 300}),
    "weights only": Case(nets.conv_net(), None, {}),
}


def compressed(case: Case, work: Path | None) -> bytes:
    config = Config(**({"threads": 1, "work": work, "budget": Budget(params=0.5)} | case.config))
    result = onnx_lrs.compress(case.model, data=case.data, config=config)
    return result.model.SerializeToString(deterministic=True)


@pytest.fixture
def counted(monkeypatch) -> collections.Counter[tuple[str, bytes]]:
    """Counts the solves of each layer, which is told by its weight."""
    counts: collections.Counter[tuple[str, bytes]] = collections.Counter()

    def wrap(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def counting(first, *args):
            counts[name, getattr(first, "problem", first).weight.tobytes()] += 1
            return real(first, *args)

        monkeypatch.setattr(module, name, counting)

    wrap(plan, "candidates_and_probes")
    wrap(fitting, "solution_of")
    wrap(fitting, "solution_within")
    wrap(refits, "finish")
    return counts


@pytest.mark.parametrize("alone", [False, True], ids=["together", "layer by layer"])
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_stops_after_every_part_solves_nothing_twice_and_gives_the_same_file(
    name, alone, tmp_path, counted, monkeypatch
):
    """Layer by layer: every layer in a pass of its own, as if memory held no two."""
    case = CASES[name]
    if alone:
        for module in (plan, fitting):
            monkeypatch.setattr(module, "groups", lambda layers, *_: [[layer] for layer in layers])
        monkeypatch.setattr(cascade.Cascade, "_groups", lambda self, layers: [[layer] for layer in layers])
    whole = compressed(case, None)
    expected = counted.copy()
    counted.clear()

    real, runs = Work.put, 0

    def put_and_stop(self, kind, *given):
        real(self, kind, *given)
        if kind != "statistics":  # alone they are of no use: their layer's curve comes next
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "put", put_and_stop)
        while True:
            runs += 1
            assert runs < 50
            try:
                resumed = compressed(case, tmp_path)
            except KeyboardInterrupt:
                continue
            break
    assert resumed == whole
    assert counted == expected
    (folder,) = tmp_path.iterdir()
    assert runs == 1 + len([part for part in folder.glob("*.part") if not part.name.startswith("statistics")])
    counted.clear()
    assert compressed(case, tmp_path) == whole
    assert not counted


def test_parts_that_were_damaged_are_made_again(tmp_path):
    case = CASES["cascade"]
    whole = compressed(case, tmp_path)
    (folder,) = tmp_path.iterdir()
    for kind in ("curve", "statistics", "sensitivity", "plan", "start", "fitted"):
        part = sorted(folder.glob(f"{kind}-*.part"))[0]
        os.truncate(part, part.stat().st_size // 2)
        assert compressed(case, tmp_path) == whole
    for part in [*folder.glob("st*-*.part"), *folder.glob("fitted-*.part")]:  # statistics as well as starts
        os.truncate(part, part.stat().st_size // 2)
    assert compressed(case, tmp_path) == whole


@pytest.mark.parametrize("known", [0, 1, 2, 3])
def test_statistics_do_not_depend_on_which_layers_are_known(known):
    """Their network is cut in the same places, or ONNX Runtime would fuse, and round, elsewhere."""
    model, rng = nets.conv_net(), np.random.default_rng(0)
    samples = open_samples(PICTURES, models.signature(model)[0], None)
    layers, _ = find(View(model), ())
    roles = {"fit": np.arange(8), "select": np.arange(8, 12)}
    setting = Setting(1 << 30, 1024, 4, 1, 0, True)

    def captured(names: set[str]) -> dict[str, Any]:
        capture, found = Capture(model, layers, samples, setting), {}
        for layer in layers:
            found |= capture.statistics([layer], roles, Silent(), True, names)
        return found

    names = {layer.node for layer in layers}
    skipped = {str(node) for node in rng.permutation(sorted(names))[:known]}
    whole, part = captured(set()), captured(skipped)
    assert set(part) == names - skipped
    for node, found in part.items():
        for role, statistic in found.items():
            expected = whole[node][role]
            assert same(statistic.moments.cov, expected.moments.cov)
            assert same(statistic.moments.mean, expected.moments.mean)
            assert same(statistic.columns.inputs, expected.columns.inputs)


# ------------------------------------------------------------------------------------------------ killed, for real


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, samples and what a run without --work makes of them."""
    folder = tmp_path_factory.mktemp("home")
    onnx.save(nets.conv_net(), folder / "model.onnx")
    np.save(folder / "x.npy", nets.as_floats(nets.pictures(40)))
    (folder / "tmp").mkdir()
    assert run(folder, "-o", "whole.onnx").wait() == 0
    assert [*(folder / "tmp").iterdir()] == []
    return folder


FLAGS = ("--threads", "1", "--params", "0.5")


def run(folder: Path, *flags: str, **more: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "onnx_lrs", "model.onnx", "--data", "x.npy", *FLAGS, *flags]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, **more)


def wait_for(process: subprocess.Popen[str], place: Path, pattern: str, count: int) -> None:
    end = time.monotonic() + 60
    while len([*place.glob(f"*/{pattern}")]) < count:
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.0005)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("statistics-*.tmp", 1),
        ("statistics-*.part", 1),
        ("curve-*.part", 1),
        ("curve-*.part", 2),
        ("sensitivity-*.part", 1),
        ("start-*.part", 1),
        ("fitted-*.part", 1),
        ("fitted-*.part", 2),
    ],
)
def test_a_killed_run_continues_and_writes_the_same_bytes(home, tmp_path, pattern, count):
    work = tmp_path / "work"
    flags = ("-o", str(tmp_path / "small.onnx"), "--work", str(work))
    with run(home, *flags) as process:
        wait_for(process, work, pattern, count)
        process.send_signal(signal.SIGKILL)
        _, _ = process.communicate()
    finish(home, work, flags, killed=process.returncode == -signal.SIGKILL)


def finish(home: Path, work: Path, flags: tuple[str, ...], killed: bool) -> None:
    """Run a killed command again."""
    output = Path(flags[1])
    assert killed or output.exists()  # the kill may come when all is written
    before = len([*work.glob("*/*.part")])
    with run(home, *flags) as process:
        _, told = process.communicate()
    assert process.returncode == 0, told
    assert (f": {before} finished part" in told) == (before > 0)
    assert output.read_bytes() == (home / "whole.onnx").read_bytes()
    assert [path for path in work.rglob("*") if path.suffix == ".tmp"] == []
    assert [*(home / "tmp").iterdir()] == []


def test_a_run_that_is_killed_at_any_time_again_and_again_continues(home, tmp_path):
    rng = np.random.default_rng()
    work = tmp_path / "work"
    flags = ("-o", str(tmp_path / "small.onnx"), "--work", str(work))
    for _ in range(4):
        with run(home, *flags) as process:
            try:
                process.communicate(timeout=rng.uniform(0.5, 3.0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
        if process.returncode == 0:
            break
    finish(home, work, flags, killed=process.returncode == -signal.SIGKILL)


def test_without_a_folder_an_error_and_an_interruption_leave_nothing(home, tmp_path):
    output = tmp_path / "small.onnx"
    with run(home, "-o", str(output), "--params", "0.0001") as process:
        assert process.wait() == errors.BudgetError.exit_code
    with run(home, "-o", str(output)) as process:
        assert process.stderr.readline()  # the samples are open, the work begins
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert process.returncode == 130
    assert told.endswith("interrupted; nothing was written\nWith --work DIR finished layers would have been kept.\n")
    assert [*tmp_path.iterdir()] == []
    assert [*(home / "tmp").iterdir()] == []


def test_an_interrupted_run_says_how_to_go_on(home, tmp_path):
    work = tmp_path / "work"
    flags = ("-o", str(tmp_path / "small.onnx"), "--work", str(work))
    with run(home, *flags) as process:
        wait_for(process, work, "curve-*.part", 1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert process.returncode == 130
    assert told.endswith(f"The same command continues from what {work} holds.\n")
    finish(home, work, flags, killed=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_full_disk_is_named_and_loses_no_finished_layer(home, tmp_path):
    """A limit on the size of files stands for the disk: a write stops in the middle of the larger statistics."""
    import resource

    work = tmp_path / "work"
    flags = ("-o", str(tmp_path / "small.onnx"), "--work", str(work))
    limit = 1 << 20
    with run(home, *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) as process:
        _, told = process.communicate()
    assert process.returncode == errors.OutputError.exit_code, told
    assert "error: The statistics of 'g1' could not be kept in" in told
    assert "File too large" in told
    assert [path for path in work.rglob("*") if path.suffix == ".tmp"] == []
    assert len([*work.glob("*/curve-c2-*.part")]) == 1
    finish(home, work, flags, killed=True)


@pytest.mark.parametrize(
    ("budgets", "more"),
    [
        ([Budget(params=0.6), Budget(params=0.3)], {}),
        ([Budget(params=0.6), Budget(params=0.3)], {"fit": "independent"}),
        ([Budget(gain=0.3), Budget(gain=0.6)], {"method": "nettrim", "steps": 300}),
    ],
    ids=["cascade", "independent", "gain"],
)
def test_one_folder_serves_several_budgets(budgets, more, tmp_path):
    """What is kept belongs to layers; the plan that was made for one budget must not be taken for another's."""
    for budget in budgets:
        case = Case(nets.two_inputs(), nets.pairs(), more | {"budget": budget})
        assert compressed(case, tmp_path) == compressed(case, None)
