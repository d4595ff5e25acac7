"""What README.md tells people to type works, and what it says of flags and codes is so."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from onnx_lrs import cli, errors
from tests import small_nets as nets

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINS = all(importlib.util.find_spec(name) for name in ("torch", "onnx2torch"))
NOT_RUN_HERE = ("pip", "pytest")  # need a network, or are running already


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line.strip()]
RUNNABLE = [command for command in COMMANDS if command[0] not in NOT_RUN_HERE and command[1:] != ["demo"]]


@pytest.fixture
def prepared(tmp_path, monkeypatch) -> Path:
    """A folder with the files that README names."""
    onnx.save(nets.conv_net(), tmp_path / "model.onnx")
    onnx.save(nets.conv_net(seed=1), tmp_path / "small.onnx")
    np.save(tmp_path / "images.npy", nets.as_floats(nets.pictures(20)))
    for name, count in (("calibration", 20), ("training", 40), ("test", 8)):
        for number, pixels in enumerate(nets.pictures(count, seed=len(name))):
            folder = tmp_path / name / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_set_up_and_main_job_are_two_commands_and_so_are_the_tests():
    first, tests = blocks("bash")[0].splitlines(), blocks("bash")[2].splitlines()
    assert [line.split()[0] for line in first] == ["pip", "onnx-lrs"]
    assert [line.split()[0] for line in tests] == ["pip", "pytest"]


@pytest.mark.parametrize("command", RUNNABLE, ids=" ".join)
def test_the_commands_run(command, prepared, capsys):
    program, *argv = command
    assert program == "onnx-lrs"
    if {"refine", "--refine"} & set(argv) and not TRAINS:
        pytest.skip('needs pip install "onnx-lrs[refine]"')
    argv += ["--rounds", "20"] * (argv[0] == "compare")
    timed = "--data" in argv and not {"--params", "--macs", "--size"} & set(argv)
    may_be = {0, cli.UNCHANGED, errors.BudgetError.exit_code} if timed else {0}  # so small a net may not get faster
    code = cli.main(argv)
    assert code in may_be, capsys.readouterr().err
    if "-o" in argv and "--dry-run" not in argv and code != errors.BudgetError.exit_code:
        small = onnx.load(argv[argv.index("-o") + 1])
        assert nets.count_macs(small, {"N": 1}) <= nets.count_macs(nets.conv_net(), {"N": 1})
    assert ("--json" in argv) == (prepared / "report.json").exists()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_runs(number, prepared):
    exec(compile(blocks("python")[number], "README.md", "exec"), {})  # our own README
    if "small.onnx" not in blocks("python")[number]:
        return
    small = onnx.load(prepared / "small.onnx")
    assert nets.count_params(small) < nets.count_params(nets.conv_net())


@pytest.mark.parametrize("page", ["compare.md", "recipes.md"])
def test_the_python_of_the_pages_runs(page, prepared):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    quick = source.replace("batches=(1, 8)", "batches=(1, 8), rounds=20")
    assert quick != source
    names: dict = {}
    exec(compile(quick, page, "exec"), names)  # our own page


def test_the_recipe_publishes_what_is_worth_it_and_nothing_else(prepared):
    """A product of rank 8 surely gets faster; what is as small as it gets stays unpublished. Versions count up.

    On a busy machine its interval may be too wide to be sure, and nothing is published: then it is asked again.
    """
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text("utf-8"), flags=re.DOTALL)
    names: dict = {}
    exec(compile(source.replace("batches=(1, 8)", "batches=(1, 8), rounds=20"), "recipes.md", "exec"), names)
    rng, repository = np.random.default_rng(0), prepared / "models"
    repository.mkdir()
    values = rng.standard_normal((768, 8)) @ rng.standard_normal((8, 768)) / 8
    np.save(prepared / "rows.npy", rng.standard_normal((60, 768), np.float32))
    np.save(prepared / "pictures.npy", rng.standard_normal((60, 64, 8, 8), np.float32))
    onnx.save(nets.one_gemm(768, 768, values.astype(np.float32)), prepared / "slow.onnx")
    onnx.save(nets.depthwise_net(), prepared / "thin.onnx")
    for version in ("1", "2"):
        for _ in range(5):
            if not (repository / version).exists():
                names["publish"](prepared / "slow.onnx", prepared / "rows.npy", repository)
        published = onnx.load(repository / version / "model.onnx")
        assert nets.count_params(published) < nets.count_params(onnx.load(prepared / "slow.onnx")) / 10
    names["publish"](prepared / "thin.onnx", prepared / "pictures.npy", repository)
    assert sorted(path.name for path in repository.iterdir()) == ["1", "2"]


def test_the_shown_output_is_the_demos(capsys):
    """Times differ everywhere and the last digits may on another machine; a changed method shows."""
    assert cli.main(["demo"]) == 0
    shown, real = (figures(text) for text in (blocks("text")[0], capsys.readouterr().err))
    assert shown[::2] == real[::2] == ["431 k", "2.29 M", "1.73 MB"]
    for ours, theirs in zip(shown[1::2], real[1::2], strict=True):
        assert float(ours.split()[0]) == pytest.approx(float(theirs.split()[0]), rel=0.03)


def figures(text: str) -> list[str]:
    """Return before and after of the first three rows of the table of sizes."""
    rows = [line for line in text.splitlines() if line.startswith(("Parameters  ", "MACs  ", "File size  "))]
    return [cell for row in rows for cell in re.findall(r"[\d.]+ (?:k|M|G)?B?(?=\s)", row)[:2]]


def test_every_flag_named_exists():
    parsers = [make() for make in cli.PARSERS.values()]
    known = {option for parser in parsers for option in options(parser)}
    named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", re.sub(r"```.*?```", "", README, flags=re.DOTALL)))
    assert named - {"-v"} <= known, named - known


def options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def test_the_exit_codes_are_the_real_ones():
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    own = {kind.exit_code for kind in errors.OnnxLrsError.__subclasses__()}
    assert listed == {0, 1, cli.UNCHANGED, cli.SLOW, 130} | own
    assert listed == {int(code) for code in re.findall(r"^(\d+) +\S", errors.__doc__, flags=re.MULTILINE)}
    assert listed == {int(code) for code in re.findall(r"^  (\d+) +\S", cli.EPILOG, flags=re.MULTILINE)}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


def test_the_architecture_page_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "onnx_lrs"
    modules = {path.name for path in package.rglob("*.py") if not path.name.startswith("__")}
    assert {name for name in modules if f"{name} " not in page} == set()
