"""The command line from end to end: real models, real files, in a process of its own where that matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from onnx_lrs import cli
from tests import small_nets as nets

ROOT = Path(__file__).resolve().parents[1]
DATA = ("--data", "photos", "--params", "0.5")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a model, photos in class folders, and test samples with labels."""
    onnx.save(nets.conv_net(), tmp_path / "model.onnx")
    for number, pixels in enumerate(nets.pictures(24)):
        home = tmp_path / "photos" / f"class{number % 3}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / f"{number}.png")
    test = nets.as_floats(nets.pictures(12, seed=5))
    labels = nets.run(nets.conv_net(), {"image": test})[0].argmax(axis=1)
    np.savez(tmp_path / "test.npz", image=test, labels=labels)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-m", "onnx_lrs", *argv, "--threads", "1"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_run_writes_the_file_prints_tables_and_leaves_nothing_else(folder):
    before = {path.name for path in folder.iterdir()}
    done = launch(folder, "model.onnx", "-o", "small.onnx", *DATA, "--labels", "folders", "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["output"] == "small.onnx"
    assert report["after"]["params"] == nets.count_params(onnx.load(folder / "small.onnx"))
    assert report["after"]["params"] <= 0.5 * report["before"]["params"]
    assert report["quality"][0]["accuracy_before"] is not None
    words = ("Parameters", "2.0", "low-rank", "Accuracy", "Note: Calibrated on folder photos", "Wrote small.onnx")
    assert [word for word in words if word not in done.stderr] == []
    assert max(map(len, done.stderr.splitlines()[:40])) < 160
    assert {path.name for path in folder.iterdir()} == before | {"small.onnx"}


def test_test_samples_judge_and_own_the_labels(folder):
    argv = ["model.onnx", "-o", "small.onnx", *DATA, "--test", "test.npz", "--labels", "test.npz"]
    assert cli.main([*argv, "-q", "--json", "report.json"]) == 0
    report = json.loads((folder / "report.json").read_text())
    (quality,) = report["quality"]
    assert (quality["samples"], quality["accuracy_before"]) == (12, 1.0)
    assert [note for note in report["notes"] if note.startswith("Judged on test.npz: 12 samples")]


def test_random_data_may_fit_while_test_samples_judge(folder):
    argv = ["model.onnx", "-o", "small.onnx", "--random-data", "--test", "test.npz", "--labels", "test.npz", "-q"]
    assert cli.main([*argv, "--json", "report.json"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["quality"][0]["samples"] == 12
    assert report["notes"][0].startswith("Fitted on random inputs")


def test_the_command_line_and_the_library_write_the_same_file(folder):
    import onnx_lrs

    assert cli.main(["model.onnx", "-o", "a.onnx", "--data", "photos", "--macs", "0.6", "--seed", "3", "-q"]) == 0
    config = onnx_lrs.Config(budget=onnx_lrs.Budget(macs=0.6), seed=3)
    onnx_lrs.compress("model.onnx", "b.onnx", data="photos", config=config)
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


def test_an_existing_output_is_replaced(folder):
    (folder / "small.onnx").write_bytes(b"old")
    assert cli.main(["model.onnx", "-o", "small.onnx", "-q"]) == 0
    onnx.checker.check_model(onnx.load(folder / "small.onnx"))


def test_inspect_lists_layers_and_reasons(folder):
    done = launch_inspect(folder, "-v", "--json", "-")
    assert done.returncode == 0
    assert "tiny: 648 weights" in done.stderr
    assert "2 of 4 layers can be compressed" in done.stderr
    assert [layer["name"] for layer in json.loads(done.stdout)["layers"]] == ["conv1", "conv2", "fc1", "fc2"]


def launch_inspect(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "onnx_lrs", "inspect", "model.onnx", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_the_demo_runs_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "-o", "demo.onnx", "--json", "demo.json", "--threads", "1"]) == 0
    report = json.loads(Path("demo.json").read_text())
    (quality,) = report["quality"]
    assert report["after"]["params"] <= 0.25 * 431_080
    assert quality["samples"] == 1000
    assert quality["accuracy_before"] == pytest.approx(0.992)
    assert quality["accuracy_after"] >= 0.985
    assert "Wrote demo.onnx" in capsys.readouterr().err


def test_onnxruntime_is_told_not_to_report_home_unless_the_user_wants_it(monkeypatch):
    for given, expected in ((None, "1"), ("0", "0")):
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        if given is not None:
            monkeypatch.setenv("ORT_DISABLE_TELEMETRY", given)
        cli.main(["model.onnx", "-o", "missing/small.onnx"])
        assert os.environ["ORT_DISABLE_TELEMETRY"] == expected
