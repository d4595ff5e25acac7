"""What is wrong is said in words, with its exit code, and no file is written or touched."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from onnx_lrs import cli
from tests import small_nets as nets

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--params", "0.5", "--threads", "1", "-q")


class Bench:
    """A folder with model.onnx, data.npz and an old small.onnx; runs the command line in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self.model = nets.two_inputs()
        onnx.save(self.model, folder / "model.onnx")
        np.savez(folder / "data.npz", **nets.pairs())
        self.output.write_bytes(b"the old one")

    @property
    def output(self) -> Path:
        return self.folder / "small.onnx"

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def change(self, *flags: str, model: str = "model.onnx") -> tuple[int, str]:
        """Run with small.onnx as the output; return exit code and message."""
        return self.start(self.path(model), "-o", str(self.output), *FLAGS, *flags)

    def start(self, *argv: str) -> tuple[int, str]:
        code = cli.main(argv)
        out, err = self._capsys.readouterr()
        assert out == ""
        return code, err

    def refused(self, code: int, *words: str, flags: tuple[str, ...] = (), model: str = "model.onnx") -> None:
        """Check exit code, message and remedy, and that nothing in the folder changed."""
        before = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        got, message = self.change(*flags, model=model)
        assert got == code, message
        assert message.startswith("error: ")
        assert "Traceback" not in message
        for word in words:
            assert word in message, message
        assert {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()} == before


@pytest.fixture
def bench(tmp_path, capsys) -> Bench:
    return Bench(tmp_path, capsys)


def test_the_bench_itself_works(bench):
    assert bench.change("--data", bench.path("data.npz")) == (0, "")
    assert nets.count_params(onnx.load(bench.output)) <= 0.5 * nets.count_params(bench.model)


# ------------------------------------------------------------------------------------------------ the model: code 3


def test_a_missing_model(bench):
    bench.refused(3, "nowhere.onnx does not exist", model="nowhere.onnx")


def test_a_folder_as_model(bench):
    (bench.folder / "folder.onnx").mkdir()
    bench.refused(3, "folder.onnx cannot be read", model="folder.onnx")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"<html>404</html>", b"\x00" * 100])
def test_not_an_onnx_model(bench, content):
    (bench.folder / "page.onnx").write_bytes(content)
    got, message = bench.change(model="page.onnx")
    assert (got, message.startswith("error: ")) == (3, True)
    assert bench.output.read_bytes() == b"the old one"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_model(bench, share):
    whole = (bench.folder / "model.onnx").read_bytes()
    (bench.folder / "cut.onnx").write_bytes(whole[: int(share * len(whole))])
    bench.refused(3, "not an ONNX model, or it is truncated", model="cut.onnx")


def save_outside(bench: Bench, location: str) -> None:
    """Write outside.onnx whose weights point to ``location``."""
    onnx.save(
        bench.model, bench.folder / "outside.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    model = onnx.load(bench.folder / "outside.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (bench.folder / "outside.onnx").write_bytes(model.SerializeToString())


def test_external_data_missing(bench):
    save_outside(bench, "gone.bin")
    bench.refused(3, "'gone.bin'", "is missing from", "Put the data file beside the model", model="outside.onnx")


@pytest.mark.parametrize("location", ["../w.bin", "sub/../../w.bin", "/etc/hostname"])
def test_external_data_outside_the_folder(bench, location):
    save_outside(bench, location)
    (bench.folder.parent / "w.bin").write_bytes((bench.folder / "w.bin").read_bytes())
    bench.refused(3, repr(location), "outside the model's folder: refused", model="outside.onnx")


def test_external_data_behind_a_link_out_of_the_folder(bench):
    save_outside(bench, "link.bin")
    (bench.folder.parent / "elsewhere.bin").write_bytes((bench.folder / "w.bin").read_bytes())
    (bench.folder / "link.bin").symlink_to(bench.folder.parent / "elsewhere.bin")
    bench.refused(3, "outside the model's folder: refused", model="outside.onnx")


def test_external_data_cut_short(bench):
    save_outside(bench, "w.bin")
    whole = (bench.folder / "w.bin").read_bytes()
    (bench.folder / "w.bin").write_bytes(whole[:-8])
    bench.refused(3, "'w.bin' has", "truncated", model="outside.onnx")


def test_a_weight_that_is_not_finite(bench):
    values = np.ones((64, 32), np.float32)
    values[3, 4] = np.nan
    onnx.save(nets.one_gemm(64, 32, values), bench.folder / "nan.onnx")
    bench.refused(3, "'w'", "'gemm'", "not finite", model="nan.onnx")


def test_an_operator_that_onnxruntime_does_not_know(bench):
    model = nets.one_gemm(64, 32)
    model.graph.node[0].output[0] = "g"
    model.graph.node.append(helper.make_node("Sparkle", ["g"], ["y"], domain="my.company"))
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    onnx.save(model, bench.folder / "custom.onnx")
    bench.refused(3, "ONNX Runtime cannot load the model", "Sparkle", model="custom.onnx")


def test_a_model_without_a_graph_or_with_an_old_opset(bench):
    onnx.save(onnx.ModelProto(ir_version=8), bench.folder / "empty.onnx")
    bench.refused(3, "no ONNX graph", model="empty.onnx")
    old = onnx.ModelProto()
    old.CopyFrom(bench.model)
    old.opset_import[0].version = 6
    onnx.save(old, bench.folder / "old.onnx")
    bench.refused(3, "opset 6", "convert_version", model="old.onnx")


# ------------------------------------------------------------------------------------------------ the data: code 4


def refuse_data(bench: Bench, *words: str, code: int = 4, **arrays: np.ndarray) -> None:
    np.savez(bench.folder / "bad.npz", **arrays)
    bench.refused(code, *words, flags=("--data", bench.path("bad.npz")))


def test_wrong_names(bench):
    good = nets.pairs()
    refuse_data(bench, "left, right", "missing: left", "unknown: links", links=good["left"], right=good["right"])


def test_wrong_shape(bench):
    good = nets.pairs()
    refuse_data(bench, "'left' takes shape (N, 40)", "(64, 39)", left=good["left"][:, :39], right=good["right"])


def test_different_lengths(bench):
    good = nets.pairs()
    refuse_data(bench, "different length", "left 64, right 10", left=good["left"], right=good["right"][:10])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(bench, value):
    good = nets.pairs()
    good["left"][17, 3] = value
    refuse_data(bench, "Item 17, input 'left'", "NaN or infinite", **good)


def test_too_few_samples(bench):
    refuse_data(bench, "2 calibration items", "at least 3", **{k: v[:2] for k, v in nets.pairs().items()})


def test_pickled_objects_are_not_loaded(bench):
    refuse_data(bench, "object", left=np.array([{}], dtype=object), right=nets.pairs()["right"])


def test_an_original_that_is_not_finite_on_the_data(bench):
    model = nets.one_gemm(64, 32)
    model.graph.node[0].output[0] = "g"
    model.graph.node.append(helper.make_node("Log", ["g"], ["y"]))  # of negative numbers
    onnx.save(model, bench.folder / "log.onnx")
    np.save(bench.folder / "x.npy", np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32))
    words = "The original model's output 'y' is not finite on this data", "preprocessing"
    bench.refused(4, *words, flags=("--data", bench.path("x.npy")), model="log.onnx")


@pytest.fixture
def camera(bench) -> Bench:
    """The bench with a model that reads images, and a folder of them."""
    onnx.save(nets.conv_net(), bench.folder / "model.onnx")
    (bench.folder / "photos").mkdir()
    for number, pixels in enumerate(nets.pictures(6)):
        Image.fromarray(pixels).save(bench.folder / "photos" / f"{number}.png")
    return bench


def test_an_empty_folder(camera):
    (camera.folder / "none").mkdir()
    camera.refused(4, "holds no image", "png", flags=("--data", camera.path("none")))


def test_missing_data(camera):
    camera.refused(4, "does not exist", flags=("--data", camera.path("gone")))


@pytest.mark.parametrize("content", [b"not a picture", None])
def test_an_unreadable_image(camera, content):
    picture = camera.folder / "photos" / "3.png"
    picture.write_bytes(picture.read_bytes()[:120] if content is None else content)
    camera.refused(4, "3.png", flags=("--data", camera.path("photos")))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(63, np.int64), ("shape (63)", "64 rows")),
        (np.zeros((64, 6), np.int64), ("class number",)),
        (np.zeros(64, np.float32), ("integers",)),
        (-np.ones(64, np.int64), ("negative value -1",)),
    ],
)
def test_labels_that_do_not_fit(bench, labels, words):
    np.save(bench.folder / "labels.npy", labels)
    flags = ("--data", bench.path("data.npz"), "--labels", bench.path("labels.npy"))
    bench.refused(4, *words, flags=flags)


def test_labels_belong_to_the_test_samples(bench):
    np.savez(bench.folder / "test.npz", **nets.pairs(9, seed=1))
    np.save(bench.folder / "labels.npy", np.zeros(64, np.int64))
    flags = ("--data", bench.path("data.npz"), "--test", bench.path("test.npz"), "--labels", bench.path("labels.npy"))
    bench.refused(4, "there are 9 rows", flags=flags)


def test_folders_as_labels_without_folders(camera):
    camera.refused(4, "no class sub-folders", flags=("--data", camera.path("photos"), "--labels", "folders"))


# ------------------------------------------------------------------------------------------------ settings: codes 2, 5


def test_an_impossible_budget_names_what_can_be_reached(bench):
    flags = ("--data", bench.path("data.npz"))
    _, message = bench.change(*flags, "--params", "0.001")
    bench.refused(5, "--params 0.001 cannot be reached", "leave 0.", "--multiple", flags=(*flags, "--params", "0.001"))
    reachable = message.partition("Allow at least --params ")[2].split(",")[0]
    assert bench.change(*flags, "--params", reachable) == (0, "")


def test_an_unknown_method(bench):
    bench.refused(
        2,
        "'magic'",
        "lrs, admm, greedy, ddlr, nettrim, hsvd, channels, svd, spatial, magnitude",
        flags=("--method", "magic"),
    )


def test_test_data_without_calibration_data(bench):
    bench.refused(2, "--test was given without --data", flags=("--test", bench.path("data.npz")))


@pytest.mark.parametrize("name", ["model.onnx", "./model.onnx", "link.onnx"])
def test_the_output_is_the_input(bench, name):
    (bench.folder / "link.onnx").symlink_to("model.onnx")
    before = (bench.folder / "model.onnx").read_bytes()
    code, message = bench.start(bench.path("model.onnx"), "-o", f"{bench.folder}/{name}", *FLAGS)
    assert (code, "is the input itself" in message) == (2, True)
    assert (bench.folder / "model.onnx").read_bytes() == before


@pytest.mark.parametrize("name", ["data.npz", "test.npz"])
def test_the_output_is_the_data(bench, name):
    np.savez(bench.folder / "test.npz", **nets.pairs())
    before = (bench.folder / name).read_bytes()
    flags = ("--data", bench.path("data.npz"), "--test", bench.path("test.npz"))
    code, message = bench.start(bench.path("model.onnx"), "-o", bench.path(name), *FLAGS, *flags)
    assert (code, "would overwrite" in message) == (2, True)
    assert (bench.folder / name).read_bytes() == before


# ------------------------------------------------------------------------------------------------ writing: codes 7, 130


@pytest.mark.parametrize(("output", "words"), [("missing/small.onnx", "does not exist"), (".", "is a folder")])
def test_an_output_without_a_place_is_refused_before_the_work(bench, monkeypatch, output, words):
    monkeypatch.setattr("onnx_lrs.graph.model.load", lambda source: pytest.fail("the model was read"))
    code, message = bench.start(bench.path("model.onnx"), "-o", bench.path(output), *FLAGS)
    assert (code, words in message) == (7, True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_before_the_work(bench):
    (bench.folder / "locked").mkdir(mode=0o500)
    code, message = bench.start(bench.path("model.onnx"), "-o", bench.path("locked/small.onnx"), *FLAGS)
    assert (code, "cannot be written to" in message) == (7, True)


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["os.replace", "pathlib.Path.write_bytes", "os.fsync"])
def test_a_full_disk(bench, monkeypatch, place):
    monkeypatch.setattr(place, full)
    code, message = bench.change("--data", bench.path("data.npz"))
    assert (code, "No space left on device" in message) == (7, True)
    assert bench.output.read_bytes() == b"the old one"
    assert sorted(path.name for path in bench.folder.iterdir()) == ["data.npz", "model.onnx", "small.onnx"]


def test_a_compressed_model_that_fails_its_check_is_not_written(bench, monkeypatch):
    from onnx_lrs import pipeline

    real = pipeline.rewrite

    def broken(*args):
        done = real(*args)
        for tensor in done.model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                tensor.raw_data = np.full(tuple(tensor.dims), np.nan, np.float32).tobytes()
        return done

    monkeypatch.setattr(pipeline, "rewrite", broken)
    bench.refused(6, "output 'score' is not finite", "Nothing was written", flags=("--data", bench.path("data.npz")))
    bench.refused(6, "output 'score' is not finite", "Nothing was written")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    """The model keeps the solvers busy for seconds; the signal comes once the first stage is over."""
    onnx.save(nets.one_gemm(2400, 2400), tmp_path / "model.onnx")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((64, 2400)).astype(np.float32))
    before = sorted(path.name for path in tmp_path.iterdir())
    flags = ("-o", "small.onnx", "--data", "data.npy", "--params", "0.5")
    command = [sys.executable, "-m", "onnx_lrs", "model.onnx", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        alarm = threading.Timer(60, process.kill)
        alarm.start()
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("load:"):
                time.sleep(0.3)  # into the work of the next stage
                process.send_signal(signal.SIGINT)
        out = process.stdout.read() if process.stdout else ""
        process.wait()
        alarm.cancel()
    assert process.returncode == 130, "".join(lines)
    assert lines[-2:] == [
        "interrupted; nothing was written\n",
        "With --work DIR finished layers would have been kept.\n",
    ]
    assert [line for line in lines if line.startswith("plan: stopped")]
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before
