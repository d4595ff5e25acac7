"""Arrays that wait: equal when they come back, never more in memory than allowed, and nothing left behind on disk."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lrs.calibration.capture import Statistic
from onnx_lrs.calibration.shelf import Shelf
from onnx_lrs.calibration.store import Store
from onnx_lrs.errors import OutputError
from onnx_lrs.solvers import Moments
from onnx_lrs.solvers.problem import Columns
from onnx_lrs.work import Work

DTYPES = (np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc or sets limits of the process")


def drawn(shape, dtype, seed=0):
    values = 100 * np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(values).astype(dtype)


def in_memory(store, names):
    """Return the bytes of what is really held in memory: a spilled array comes back as a map of its file."""
    found = [store.get(*name) for name in names]
    return sum(values.nbytes for values in found if not isinstance(values, np.memmap))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A temporary folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    limit=st.integers(0, 3000),
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=12),
    data=st.data(),
)
def test_values_come_back_equal_and_the_limit_holds_at_every_moment(limit, shapes, data):
    given = {}
    with Store(limit) as store:
        for number, shape in enumerate(shapes):
            name = data.draw(st.sampled_from("abc")), number
            given[name] = drawn(shape, data.draw(st.sampled_from(DTYPES)), number)
            store.put(*name, given[name])
            assert in_memory(store, given) <= limit
            gone = data.draw(st.sampled_from([None, "a", "b", "c"]))
            if gone is not None:
                store.drop(gone)
                given = {key: values for key, values in given.items() if key[0] != gone}
            assert store.names() == {key[0] for key in given}
            for key, values in given.items():
                found = store.get(*key)
                assert (found.dtype, found.shape) == (values.dtype, values.shape)
                np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("limit", [0, 10**6])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 4)])
def test_empty_arrays_and_single_numbers(shape, limit):
    values = drawn(shape, np.float32)
    with Store(limit) as store:
        store.put("a", 0, values)
        store.put("a", 1, values + 1)
        np.testing.assert_array_equal(store.get("a", 0), values)
        np.testing.assert_array_equal(store.get("a", 1), values + 1)
        assert store.get("a", 0).shape == shape


def test_views_that_are_not_contiguous_come_back_as_they_look():
    values = drawn((6, 8), np.float32)
    with Store(0) as store:
        for number, view in enumerate((values.T, values[::2, ::-1], np.broadcast_to(values[0], (3, 8)))):
            store.put("a", number, view)
            np.testing.assert_array_equal(store.get("a", number), view)


def test_what_is_spilled_is_counted_and_what_is_dropped_gives_its_room_back():
    values = np.zeros(100, np.float32)
    with Store(800) as store:
        for number in range(3):
            store.put("a", number, values)
        assert store.spilled_bytes == 400
        store.drop("a")
        for number in range(2):
            store.put("b", number, values)
        assert store.spilled_bytes == 400
        store.put("c", 0, values)
        assert store.spilled_bytes == 800
        store.drop("never put")


def test_an_array_mapped_from_a_file_of_the_users_gives_its_room_back_too(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(100, dtype=np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with Store(400) as store:
        for round_ in range(3):
            store.put(round_, 0, mapped)
            store.drop(round_)
        assert store.spilled_bytes == 0


def test_an_array_in_use_outlives_its_name():
    values = drawn((50,), np.float64)
    with Store(0) as store:
        store.put("a", 0, values)
        found = store.get("a", 0)
        store.drop("a")
        assert "a" not in store
        np.testing.assert_array_equal(found, values)


@linux
def test_the_files_have_no_name_while_they_are_in_use(folder):
    with Store(0) as store:
        store.put("a", 0, drawn((1000,), np.float32))
        assert not [*folder.iterdir()]
        links = [pathlib.Path("/proc/self/fd", str(number)) for number in range(3, 200)]
        assert any(str(link.readlink()).startswith(str(folder)) for link in links if link.is_symlink())


def test_nothing_is_left_after_close_or_an_exception(folder):
    with Store(0) as store:
        store.put("a", 0, drawn((1000,), np.float32))
    assert not store.names()
    assert not [*folder.iterdir()]
    store = Store(0)
    with contextlib.suppress(KeyError), store:
        store.put("a", 0, drawn((1000,), np.float32))
        store.get("b", 0)
    assert not store.names()
    assert not [*folder.iterdir()]


def child(code, folder, **how):
    """Start Python with a few names imported and ``folder`` as its temporary folder."""
    start = "import resource, sys, numpy as np\nfrom onnx_lrs.calibration.store import Store\n"
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", start + code], env=environment, stdout=subprocess.PIPE, text=True, cwd=root, **how
    )


@linux
def test_a_killed_process_leaves_nothing(tmp_path):
    code = "s = Store(0); s.put('a', 0, np.ones(10**6)); print(s.spilled_bytes, flush=True); sys.stdin.read()"
    with child(code, tmp_path, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == str(8 * 10**6)
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
    assert not [*tmp_path.iterdir()]


@linux
@pytest.mark.parametrize("entries", [100, 300, 20_000], ids=["few bytes", "some bytes", "many bytes"])
def test_a_full_disk_is_an_error_that_names_the_remedy(entries, tmp_path):
    """A limit on the size of files stands for the full disk: the kernel refuses the same call."""
    code = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from onnx_lrs.errors import OutputError
try:
    with Store(0) as store:
        for number in range(20):
            store.put("a", number, np.full({entries}, number, np.float32))
            assert store.get("a", number)[-1] == number
except OutputError as error:
    print(error)
"""
    with child(code, tmp_path) as process:
        told = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert str(tmp_path) in told
    assert "TMPDIR" in told
    assert "File too large" in told


def test_a_temporary_folder_that_takes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with Store(0) as store, pytest.raises(OutputError, match="TMPDIR"):
        store.put("a", 0, np.ones(3))


@linux
def test_many_arrays_do_not_use_up_the_file_descriptors(tmp_path):
    """One call, one array: a model of a static batch of 1 and a few thousand samples."""
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
with Store(0) as store:
    for number in range(200):
        store.put("a", number, np.full(9, number, np.float32))
    print(all((store.get("a", number) == number).all() for number in range(200)))
"""
    with child(code, tmp_path) as process:
        assert process.communicate(timeout=60)[0].strip() == "True"


@linux
def test_many_names_do_not_use_them_up_either_in_one_file(tmp_path):
    """Statistics of a model of some hundred layers."""
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
with Store(0, one_file=True) as store:
    for number in range(200):
        store.put(number, 0, np.full(9, number, np.float32))
    for number in range(0, 200, 2):
        store.drop(number)
    print(all((store.get(number, 0) == number).all() for number in range(1, 200, 2)))
"""
    with child(code, tmp_path) as process:
        assert process.communicate(timeout=60)[0].strip() == "True"


@linux
def test_no_more_open_files_is_an_error_that_names_the_remedy(tmp_path):
    code = """
from onnx_lrs.errors import OutputError
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
try:
    with Store(0) as store:
        for number in range(40):
            store.put(number, 0, np.ones(9))
except OutputError as error:
    print(error)
"""
    with child(code, tmp_path) as process:
        told = process.communicate(timeout=60)[0]
    assert "ulimit -n" in told
    assert "Free space" not in told


@pytest.mark.parametrize("limit", [0, 10**6])
def test_a_shelf_gives_back_what_was_put_on_it_once(limit):
    rng = np.random.default_rng(0)
    sampled = Statistic(
        Moments(7, rng.standard_normal(4), rng.standard_normal((4, 4))),
        Columns(rng.standard_normal((3, 4)).astype(np.float32)),
        np.arange(3),
    )
    plain = Statistic(Moments(5, rng.standard_normal(2), rng.standard_normal((2, 2))))
    with Store(limit) as store:
        shelf = Shelf(store, Work())
        shelf.put("one", {"fit": sampled, "select": plain})
        shelf.put("two", {"fit": plain})
        found = shelf.take("one")
        assert [*found] == ["fit", "select"]
        for role, each in (("fit", sampled), ("select", plain)):
            assert found[role].moments.count == each.moments.count
            np.testing.assert_array_equal(found[role].moments.mean, each.moments.mean)
            np.testing.assert_array_equal(found[role].moments.cov, each.moments.cov)
        np.testing.assert_array_equal(found["fit"].columns.inputs, sampled.columns.inputs)
        np.testing.assert_array_equal(found["fit"].items, sampled.items)
        assert found["select"].columns is None
        assert shelf.take("one") == {}
        assert [*shelf.take("two")] == ["fit"]
        assert not store.names()
