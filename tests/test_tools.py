"""The measuring tools as a newcomer calls them: tiny settings, their own processes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from onnx_lrs.planning.sensitivity import BOUND
from tests import small_nets as nets

ROOT = Path(__file__).resolve().parents[1]
COMPARE = ("compare_methods.py", "--layers", "conv2", "--methods", "hsvd", "magnitude", "--budgets", "1/4")
SMALL = ("--limit-images", "60", "--multiple", "1", "--threads", "1")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool, *rest = map(str, arguments)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "tools" / tool), *rest]
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture
def tool(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Call a tool in this process, for what needs no fresh one."""
    monkeypatch.syspath_prepend(ROOT / "tools")

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = 0
        try:
            code = importlib.import_module(name).main() or 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.jsonl"
    done = call(*COMPARE, *SMALL, "--out", path)
    assert done.returncode == 0, done.stderr
    return path


def test_the_benchmark_gives_a_ratio_for_every_method():
    # there are 4 channels, of which the multiple keeps at least 8
    chosen = ("--methods", "hsvd", "lrs", "channels", "--rounds", 1)
    done = call("bench_solvers.py", "--d", 36, "--n", 200, *chosen, "--markdown", "--threads", 1)
    assert done.returncode == 0, done.stderr
    header, _, row = ([c.strip() for c in x.strip("|").split("|")] for x in done.stdout.splitlines() if x[:1] == "|")
    assert header == ["d", "X^T X (s)", "rounds", "hsvd", "lrs", "channels"]
    d, gram, rounds, *ratios = map(float, row[:-1])
    assert (d, rounds) == (36, 1)
    assert gram > 0
    assert all(ratio > 0 for ratio in ratios)
    assert row[-1] == "failed"
    assert "channels failed at d = 36: RuntimeError: INFEASIBLE." in done.stdout
    assert "greedy at d = 4608: promised at most 3, not measured in this run." in done.stdout
    assert "AVX-512" in done.stdout


def test_a_cell_says_what_was_reached_and_how(cells):
    low_rank, kept = records(cells)
    assert [low_rank["method"], kept["method"]] == ["hsvd", "magnitude"]
    for record in (low_rank, kept):
        assert (record["model"], record["layer"], record["budget"]) == ("lenet5", "conv2", "1/4")
        assert record["status"] == "SOLVED"
        assert record["params"] <= record["dense_params"] // 4
        assert 0 < record["activation_error"] < 2
        assert record["seconds"] > 0
        assert record["columns"]["judge"]["sampled"] > 0
    assert (low_rank["rank"] > 0, low_rank["channels"]) == (True, 0)
    assert (kept["rank"], kept["channels"] > 0) == (0, True)


def test_cells_that_are_there_are_not_computed_again(cells, tmp_path):
    copy = tmp_path / "cells.jsonl"
    first, second = cells.read_text().splitlines(keepends=True)
    copy.write_text(first + second[:40])  # stopped while it wrote the second cell
    done = call(*COMPARE, *SMALL, "--out", copy)
    assert done.returncode == 0, done.stderr
    assert "1 cells to fill" in done.stderr
    assert copy.read_text().splitlines(keepends=True)[0] == first
    again, before = records(copy)[1], json.loads(second)
    assert again["method"] == before["method"]
    assert again["activation_error"] == pytest.approx(before["activation_error"], rel=1e-6)


def test_cells_of_other_settings_do_not_join_a_file(cells):
    before = cells.read_text()
    done = call(*COMPARE, "--limit-images", "50", "--multiple", "1", "--threads", "1", "--out", cells)
    assert done.returncode == 2
    assert "holds cells of lenet5 with images 60, not 50" in done.stderr
    assert cells.read_text() == before


def test_the_tables_hold_the_figures_of_the_file(cells, tool):
    code, out, _ = tool("compare_methods", "--render", cells, "--details")
    assert code == 0
    low_rank, kept = records(cells)
    best = min(low_rank, kept, key=lambda record: record["activation_error"])
    (row,) = [line for line in out.splitlines() if "conv2 (50 x 500)" in line and "+" not in line]
    errors = [float(cell.strip(" *")) for cell in row.strip("|").split("|")[1:]]
    assert errors == pytest.approx([100 * r["activation_error"] for r in (low_rank, kept)], rel=0.01)
    assert row.count("**") == 2
    assert f"**{100 * best['activation_error']:.1f}**" in row
    assert f"| {low_rank['rank']} + 0 ({low_rank['share']:.1%}) |" in out


def made_up(layer: str, method: str, error: float | None, **more: object) -> dict:
    known = {"activation_error": error, "linear_error": error, "objective": error, "params": 10, "share": 0.25}
    known |= {"form": "low-rank + channels", "rank": 1, "channels": 8, "elements": 0}
    common = {"model": "net", "layer": layer, "method": method, "budget": "1/4", "op": "Gemm", "out": 4, "d": 10}
    settings = {"data": "made up", "images": 10, "seed": 0, "multiple": 1, "memory": 1, "machine": "paper"}
    return common | settings | {"status": "SOLVED", "seconds": 2.0} | (known if error is not None else {}) | more


def test_the_reading_counts_layers_and_what_the_admm_changed(tmp_path, tool):
    path = tmp_path / "cells.jsonl"
    lines = [
        *[made_up("a", "lrs", 0.1), made_up("a", "lrs without ADMM", 0.2), made_up("a", "hsvd", 0.4)],
        *[made_up("b", "lrs", 0.3), made_up("b", "lrs without ADMM", 0.3), made_up("b", "hsvd", 0.3)],
        *[made_up("c", "lrs", 0.3), made_up("c", "svd", 0.2), made_up("c", "hsvd", 0.6)],
        made_up("c", "admm", None, status="FAILED", failed="ValueError: broken"),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = tool("compare_methods", "--render", path)
    assert code == 0
    assert (
        "- net: lrs is lower on 1 (1 low-rank + channels), equal (within 0.1%) on 1, higher on 1 of 3 layers; "
        "median ratio 1.000." in out
    )
    assert "- net: changed 1 of 2 results, on 1 of 3 layers; where it did: J -50.00%" in out
    assert "| failed |" in out
    assert "- admm failed on c at 1/4: ValueError: broken" in out


def test_the_accuracy_of_the_fully_connected_layers(tmp_path, tool):
    path = tmp_path / "fc.jsonl"
    wanted = ("--methods", "svd", "--splits", "--limit-images", 100, "--threads", 1, "--out", path)
    done = call("lenet_fully_connected.py", *wanted)
    assert done.returncode == 0, done.stderr
    (record,) = records(path)
    assert record["kept"] <= 0.068
    assert record["stored"] == record["kept"]  # factors need no indices
    assert record["dense_accuracy"] == 0.992  # models/README.md
    assert 0.1 < record["accuracy"] <= 1
    code, _, told = tool("lenet_fully_connected", *wanted)
    assert (code, told) == (0, "0 lines to measure\n")
    assert len(records(path)) == 1
    code, out, _ = tool("lenet_fully_connected", "--render", path)
    assert code == 0
    assert f"| {record['kept']:.2%} |" in out
    assert f"| {record['accuracy']:.2%} |" in out


BUDGETS = ("params=0.5", "params=0.001")  # the second is too small for any plan


@pytest.fixture(scope="module")
def fits(tmp_path_factory) -> tuple[Path, tuple[object, ...]]:
    """The file of a run of compare_fits, half of whose budgets cannot be reached, and the arguments of that run."""
    folder = tmp_path_factory.mktemp("fits")
    net, judging = nets.conv_net(), nets.as_floats(nets.pictures(32, seed=5))
    onnx.save(net, folder / "net.onnx")
    np.savez(folder / "calibration.npz", image=nets.as_floats(nets.pictures(48)))
    np.savez(folder / "test.npz", image=judging, labels=nets.run(net, {"image": judging})[0].argmax(axis=1))
    test = folder / "test.npz"
    arguments = (folder / "net.onnx", "--data", folder / "calibration.npz", "--test", test, "--labels", test)
    arguments += ("--threads", 1, "--budgets", *BUDGETS, "--fits", "independent", "--samples", 24)
    done = call("compare_fits.py", *arguments, "--name", "tiny", "--out", folder / "cells.jsonl")
    assert done.returncode == 1, done.stderr
    assert "1 of 2 runs failed" in done.stderr
    return folder / "cells.jsonl", arguments


def test_a_run_of_a_fit_says_what_it_reached_and_took(fits):
    reached, failed = records(fits[0])
    for record, budget in zip((reached, failed), BUDGETS, strict=True):
        assert (record["model"], record["budget"], record["fit"]) == ("tiny", budget, "independent")
        assert (record["samples"], record["threads"], record["test"]) == (24, 1, "test.npz")
    assert reached["accuracy_before"] == 1.0  # the labels are the model's own
    assert reached["accuracy_after"] == reached["top1_agreement"] > 0.5
    assert reached["judged"] == 32
    assert reached["params_ratio"] >= 2
    assert reached["seconds"]["total"] >= reached["seconds"]["fit"] > 0
    assert reached["profile"]["plain_forward"] > 0
    assert 50e6 < reached["peak_memory_bytes"] < 1e9
    assert failed["failed"].startswith("BudgetError: --params 0.001 cannot be reached")


def test_runs_that_are_there_are_not_done_again(fits, tool):
    path, arguments = fits
    before = path.read_text()
    code, _, told = tool("compare_fits", *arguments, "--name", "tiny", "--out", path)
    assert "tiny: 0 runs to do, 2 in the file" in told
    assert code == 1  # one of them failed
    code, _, told = tool("compare_fits", *arguments, "--name", "tiny", "--seed", 1, "--out", path)
    assert code == 2
    assert "holds cells of tiny with seed 0, not 1" in told
    assert path.read_text() == before


def test_a_smaller_subset_is_part_of_a_larger_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    prepare = importlib.import_module("compare_fits").prepare
    onnx.save(nets.conv_net(), tmp_path / "net.onnx")
    pictures = nets.pictures(20)
    np.savez(tmp_path / "a.npz", image=pictures, labels=np.arange(20), remark=np.zeros(3))
    np.save(tmp_path / "a.npy", pictures)
    for number, pixels in enumerate(pictures):
        home = tmp_path / "photos" / f"class{number % 2}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / f"{number:02}.png")
    (tmp_path / "photos" / "class2").mkdir()  # empty, and still a class
    drawn = {}
    for name in ("a.npz", "a.npy", "photos"):
        folder = tmp_path / f"cut {name}"
        folder.mkdir()
        found = prepare([str(tmp_path / "net.onnx"), "--data", str(tmp_path / name)], [5, 10, 20], folder)
        assert found[20] == tmp_path / name
        drawn[name] = [found[5], found[10]]
    small, large = (np.load(path)["image"] for path in drawn["a.npz"])
    assert (len(small), len(large)) == (5, 10)
    assert {image.tobytes() for image in small} < {image.tobytes() for image in large}
    for path, values in zip(drawn["a.npy"], (small, large), strict=True):
        np.testing.assert_array_equal(np.load(path), values)
    few, many = ({path.relative_to(home) for path in home.rglob("*.png")} for home in drawn["photos"])
    assert (len(few), len(many)) == (5, 10)
    assert few < many
    assert sorted(path.name for path in drawn["photos"][0].iterdir()) == ["class0", "class1", "class2"]


def made_up_run(fit: str, accuracy: float | None, samples: int = 100, **more: object) -> dict:
    common = {"model": "net", "budget": "macs=0.33", "fit": fit, "samples": samples, "threads": 2, "machine": "paper"}
    figures = {"accuracy_before": 0.9, "accuracy_after": accuracy, "relative_l2": 0.1, "top1_agreement": 0.75}
    figures |= {"params_ratio": 2.0, "macs_ratio": 3.0, "file_ratio": 2.5, "latency_before_ms": 3.0}
    figures |= {"latency_after_ms": 2.0, "peak_memory_bytes": 3 << 29, "provider": "CPUExecutionProvider"}
    figures |= {"profile": {"forward": 6.0, "plain_forward": 2.0}, "seconds": {"total": samples / 10}}
    return common | ({} if "failed" in more else figures) | more


def test_the_tables_of_the_fits_hold_the_figures(tmp_path, tool):
    path = tmp_path / "cells.jsonl"
    lines = [
        *[made_up_run("independent", 0.5), made_up_run("cascade", 0.49), made_up_run("cascade-linear", 0.5)],
        *[made_up_run("cascade", 0.6, 200, seconds={"total": 15.0}), made_up_run("independent", None, 50, model="b")],
        made_up_run("independent", None, 200, failed="BudgetError: too small", seconds={"total": 1.0}),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = tool("compare_fits", "--render", path)
    assert code == 0
    for row in (
        "| net | macs=0.33 | 100 | 90.00 | 50.00 | 50.00 | 49.00 | yes | no |",
        "| net | macs=0.33 | 200 | 90.00 | BudgetError |  | 60.00 |  |  |",
        "| b | macs=0.33 | 50 | 90.00 | 75.00 |  |  |  |  |",
        "- b: no labels; how often the largest class is that of the dense model.",
        "- net: independent failed at macs=0.33, 200 samples: BudgetError: too small",
        "| net | macs=0.33 | 100 | cascade | 10.0 | 1.50 "
        "| 2.00x | 3.00x | 2.50x | 3.00 -> 2.00 | 1.50x | 10.00 | 75.00 |",
        "| net | macs=0.33 | cascade + activation | 100 | 10.0 |  |  |",
        "| net | macs=0.33 | cascade + activation | 200 | 15.0 | 2.00x | 1.50x |",
        "| net | macs=0.33 | 100 | independent | 2.00 | 6.00 (3.00x) |",
        "Measured on paper; ONNX Runtime with 2 threads, CPUExecutionProvider.",
    ):
        assert row in out.splitlines()


def one_that_matters(width: int = 32) -> onnx.ModelProto:
    """x (N, width) -> h = W0 x, then five times h + relu(W h) with a small W: an error of W0 alone reaches the end."""
    rng = np.random.default_rng(0)
    constants = {"w0": nets.weight(rng, width, width)}
    nodes = [helper.make_node("Gemm", ["x", "w0"], ["h0"], "first")]
    for i in range(1, 6):
        constants[f"w{i}"] = nets.weight(rng, width, width) * np.float32(0.05)
        nodes.append(helper.make_node("Gemm", [f"h{i - 1}", f"w{i}"], [f"g{i}"], f"small{i}"))
        nodes.append(helper.make_node("Relu", [f"g{i}"], [f"r{i}"]))
        nodes.append(helper.make_node("Add", [f"h{i - 1}", f"r{i}"], [f"h{i}"]))
    ends = [("x", onnx.TensorProto.FLOAT, ["N", width])], [("h5", onnx.TensorProto.FLOAT, ["N", width])]
    return nets.build(nodes, constants, *ends)


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> tuple[Path, tuple[object, ...], str]:
    """The file of a run of check_losses, the arguments of that run and what it printed."""
    folder = tmp_path_factory.mktemp("plans")
    onnx.save(one_that_matters(), folder / "net.onnx")
    np.save(folder / "x.npy", np.random.default_rng(1).standard_normal((400, 32)).astype(np.float32))
    arguments = (folder / "net.onnx", "--data", folder / "x.npy", "--threads", 1, "--multiple", 2)
    arguments += ("--plans", 12, "--rungs", 5, "--out", folder / "plans.jsonl")
    done = call("check_losses.py", *arguments)
    assert done.returncode == 0, done.stderr
    return folder / "plans.jsonl", arguments, done.stdout


def test_a_measured_sensitivity_ranks_plans_better_than_losses_alone(plans):
    path, _, out = plans
    printed = dict(line.split(": Spearman ") for line in out.splitlines())
    assert float(printed["losses"]) < float(printed["one probe, bound 2"]) < float(printed[f"probes, bound {BOUND:g}"])
    assert float(printed["probes"]) > 0.9
    found = records(path)
    assert [record["plan"] for record in found] == list(range(12))
    assert all(record["judged"] == 80 for record in found)
    assert min(len(record["layers"]) for record in found) >= 1
    assert max(record["real"] for record in found) > 10 * min(record["real"] for record in found) > 0


def test_random_plans_have_the_ranks_of_plans_by_latency_unless_told_otherwise(tool, tmp_path):
    onnx.save(one_that_matters(96), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(1).standard_normal((300, 96)).astype(np.float32))
    arguments = (tmp_path / "net.onnx", "--data", tmp_path / "x.npy", "--threads", 1, "--plans", 3, "--rungs", 2)
    code, out, _ = tool("check_losses", *arguments, "--out", tmp_path / "plans.jsonl")
    assert code == 0
    assert "Spearman" in out


def test_plans_that_are_there_are_not_measured_again(plans, tool):
    path, arguments, out = plans
    before = path.read_text()
    code, again, told = tool("check_losses", *arguments)
    assert (code, again) == (0, out)
    assert "net: 0 plans to measure, 12 in the file" in told
    code, _, told = tool("check_losses", *arguments, "--seed", 1)
    assert code == 2
    assert "holds cells of net with seed 0, not 1" in told
    assert path.read_text() == before


def test_the_table_of_the_losses_holds_the_figures(plans, tool):
    path, _, out = plans
    figures = [float(line.rpartition(" ")[2]) for line in out.splitlines()]
    code, table, _ = tool("check_losses", "--render", path, "--details")
    assert code == 0
    (row,) = [line for line in table.splitlines() if line.startswith("| net |")]
    assert [float(cell.strip(" *")) for cell in row.strip("|").split("|")[3:]] == pytest.approx(figures, abs=0.006)
    assert "## net" in table
    assert len(table.splitlines()) > 12 + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench_solvers", "--d", 37), "--d 37"),
        (("bench_solvers", "--methods", "best"), "unknown 'best'; there are 'lrs'"),
        (("compare_methods", "--out", "x", "--budgets", "2"), "'2' is no fraction between 0 and 1"),
        (("compare_methods", "--out", "x", "--layers", "conv9"), "matches no layer; there are conv2, fc1, fc2"),
        (("compare_methods", "--render", "missing.jsonl"), "missing.jsonl holds no cells"),
        (("compare_fits", "a.onnx", "--out", "x"), "--data is missing"),
        (("compare_fits", "a.onnx", "--data", "d", "--out", "x", "--params", "0.5"), "--params has no use here"),
        (("compare_fits", "a.onnx", "--data", "d", "--out", "x", "--samples", "9"), "--samples needs --test"),
        (("compare_fits", "a.onnx", "--data", "d", "--out", "x", "--budgets", "half"), "'half' is no budget"),
        (("compare_fits", "a.onnx", "--data", "d", "--out", "x", "--budgets", "params=2"), "--params is 2.0"),
        (("compare_fits", "a.onnx", "--data", "d", "--out", "x"), "a.onnx"),
        (("lenet_fully_connected", "--out", "x", "--methods", "best"), "unknown 'best'"),
        (("check_losses", "a.onnx", "--out", "x"), "--data is missing"),
        (("check_losses", "a.onnx", "--data", "d", "--out", "x", "--params", "0.5"), "--params has no use here"),
        (("check_losses", "a.onnx", "--data", "d", "--out", "x", "--plans", "2"), "--plans: at least 3"),
        (("check_losses", "--render", "missing.jsonl"), "missing.jsonl holds no plans"),
    ],
)
def test_a_mistake_in_the_command_line_is_named(arguments, message, tmp_path, monkeypatch, tool):
    monkeypatch.chdir(tmp_path)
    code, _, told = tool(*arguments)
    assert code == 2
    assert message in told
    assert not list(tmp_path.iterdir())


def test_forms_of_a_layer_are_fitted_timed_and_held_against_each_other(tmp_path):
    with np.load(ROOT / "models" / "digits.npz") as digits:
        np.save(tmp_path / "digits.npy", digits["calibration"][:80, None].astype(np.float32))
    out = tmp_path / "forms.jsonl"
    given = ("--model", ROOT / "models" / "lenet5.onnx", "--data", tmp_path / "digits.npy", "--layers", "conv2")
    quick = ("--batches", 1, "--rounds", 1, "--seconds", 0, "--threads", 1, "--clock", "cpu")
    for _ in range(2):  # the second time there is nothing left to do
        done = call("compare_forms.py", *given, *quick, "--out", out)
        assert done.returncode == 0, done.stderr
    (record,) = records(out)
    nothing, dense, *trials = record["trials"]
    assert (nothing["form"], dense["form"], dense["params"]) == ("nothing", "dense", 25_000)
    assert {"low-rank", "spatial", "projected", "channels", "tucker"} <= {t["form"] for t in trials}
    assert all(0 <= t["error"] < 1.5 and 0 < t["params"] < dense["params"] and len(t["ms"]) == 1 for t in trials)
    table = call("compare_forms.py", "--render", out, "--without", "projected")
    assert table.returncode == 0, table.stderr
    header, _, row, won = (line for line in table.stdout.splitlines() if line.startswith("|"))
    assert "projected" in header
    assert "50x20" not in row
    assert "20->50, 5x5" in row
    assert won.startswith("| layers won")
    refused = call("compare_forms.py", *given, "--threads", 2, "--clock", "cpu", "--out", out)
    assert refused.returncode == 2
    assert "--threads 1" in refused.stderr


# ------------------------------------------------------------------------------------------------------- refining


def test_refined_models_from_warm_and_cold_starts_and_in_rounds(tmp_path, tool):
    for name in ("torch", "onnx2torch"):
        pytest.importorskip(name)
    onnx.save(nets.conv_net(), tmp_path / "net.onnx")
    images = nets.as_floats(nets.pictures(90))
    np.save(tmp_path / "data.npy", images[:60])
    np.save(tmp_path / "test.npy", images[60:])
    np.save(tmp_path / "labels.npy", np.arange(30) % 10)
    given = [tmp_path / "net.onnx", *("--fit", "independent", "--threads", 1, "--autocast", "off")]
    for flag in ("data", "test", "labels"):
        given += [f"--{flag}", tmp_path / f"{flag}.npy"]
    own = ["--folder", tmp_path / "out", "--budgets", "params=0.3", "--starts", "warm", "svd", "random"]
    code, table, told = tool("compare_refined", *given, *own, "--counts", 1, 2, "--passes", 2)
    assert code == 0, told
    kept = records(tmp_path / "out" / "cells.jsonl")
    assert [(c["start"], c["rounds"], c["done"]) for c in kept] == [
        ("warm", 1, 2),
        ("svd", 1, 2),
        ("random", 1, 2),
        ("warm", 2, 2),
    ]
    warm, svd, random, _ = (c["before"][0]["relative_l2"] for c in kept)
    assert warm < svd < random
    assert len({c["smaller"] for c in kept[:3]}) == 1  # the same ranks and channels
    code, again, told = tool("compare_refined", *given, *own, "--counts", 1, 2, "--passes", 2)
    assert again == table
    assert "params=0.3" not in told  # nothing was done again
    code, rendered, _ = tool("compare_refined", "--render", tmp_path / "out" / "cells.jsonl")
    assert code == 0
    assert rendered.strip() in table


# ----------------------------------------------------------------------------------------------------------- INT8


def test_four_ways_are_timed_against_int8(tmp_path, tool):
    onnx.save(nets.conv_net(), tmp_path / "net.onnx")
    np.save(tmp_path / "data.npy", nets.as_floats(nets.pictures(60)))
    given = [tmp_path / "net.onnx", "--data", tmp_path / "data.npy", "--fit", "independent", "--threads", 1]
    own = ["--folder", tmp_path / "out", "--budgets", "params=0.3", "--batches", 1, 4, "--seconds", 0.5]
    code, table, told = tool("compare_int8", *given, *own)
    assert code == 0, told
    (cell,) = records(tmp_path / "out" / "cells.jsonl")
    names = ["original", "INT8", "low-rank + sparse", "low-rank + sparse, INT8"]
    assert [way["name"] for way in cell["ways"]] == names
    assert set(cell["times"]) == {"1", "4"}
    assert all(times.keys() == set(names) and times["INT8"] == [1, 1, 1] for times in cell["times"].values())
    assert len(list((tmp_path / "out").glob("net-params0.3-*.onnx"))) == 4
    assert table.count("| net | params=0.3 |") == 4
    assert "**low-rank + sparse, INT8**" in table
    code, again, told = tool("compare_int8", *given, *own)
    assert again == table
    assert "params=0.3:" not in told
    code, rendered, _ = tool("compare_int8", "--render", tmp_path / "out" / "cells.jsonl")
    assert code == 0
    assert rendered.strip() in table
    own = ["--folder", tmp_path / "out", "--batches", 2, "--seconds", 0.5]
    code, rendered, _ = tool("compare_int8", *own, "--retime")
    assert code == 0
    assert "batch 2" in rendered
    (again,) = records(tmp_path / "out" / "cells.jsonl")
    assert again["times"].keys() == {"2"}
    assert again["ways"] == cell["ways"]


# ------------------------------------------------------------------------------------------------ GPUs, without one


def test_the_gpu_benchmark_runs_on_the_cpu_and_renders_a_row_for_each_batch(tmp_path, tool):
    onnx.save(nets.conv_net(), tmp_path / "dense.onnx")
    onnx.save(nets.conv_net(seed=1), tmp_path / "small.onnx")
    pair, out = ("--pairs", tmp_path / "dense.onnx", tmp_path / "small.onnx"), tmp_path / "gpu.jsonl"
    code, table, _ = tool("gpu_bench", *pair, "--provider", "cpu", "--batches", 1, 3, "--rounds", 20, "--out", out)
    assert code == 0
    (record,) = records(out)
    environment = record["environment"]
    header, _, *rows = ([c.strip() for c in x.strip("|").split("|")] for x in table.splitlines() if x[:1] == "|")
    found = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["network"], row["batch"]) for row in found] == [("dense", "1"), ("dense", "3")]
    assert [float(row["dense, ms"]) for row in found] == pytest.approx(
        [t["median_ms"] for t in record["timings"][::2]], rel=1e-3
    )
    for row in found:
        assert (row["provider"], row["date"]) == ("cpu", environment["date"])
        assert row["device"].startswith(environment["cpu"])
        assert row["CUDA graph"] == row["TF32"] == row["on CPU"] == row["copies"] == ""
    assert tool("gpu_bench", "--render", out)[1] == table


def test_the_page_for_gpus_has_the_columns_of_the_benchmark(tmp_path, tool):
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    (header,) = [line for line in page.splitlines() if line.startswith("| network")]
    (tmp_path / "empty.jsonl").write_text("")
    code, table, _ = tool("gpu_bench", "--render", tmp_path / "empty.jsonl")
    assert (code, table.splitlines()[0]) == (0, header)


def test_the_gpu_benchmark_ends_with_the_code_of_what_went_wrong(tmp_path, tool):
    missing = ("--pairs", tmp_path / "a.onnx", tmp_path / "b.onnx")
    code, _, told = tool("gpu_bench", *missing, "--provider", "cpu", "--out", tmp_path / "gpu.jsonl")
    assert (code, "does not exist" in told) == (3, True)


def test_the_large_network_of_the_gpu_benchmark_is_made_thin(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    bench = importlib.import_module("gpu_bench")
    dense = bench.vgg(pixels=16, widths=(32, 256, 0, 256, 0), hidden=256)
    small = bench.thinned(dense)
    image = {"image": np.ones((2, 3, 16, 16), np.float32)}
    assert [out.shape for out in nets.run(dense, image)] == [out.shape for out in nets.run(small, image)] == [(2, 1000)]
    assert 0.15 < nets.count_macs(small, {"N": 1}) / nets.count_macs(dense, {"N": 1}) < 0.35
