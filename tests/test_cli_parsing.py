"""The command line: every flag reaches its field, bad values end with code 2, every error with its own code."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lrs import cli, errors
from onnx_lrs.config import GIB, Budget, Config, Preprocess, Training
from onnx_lrs.report.result import Inspection, Result, Totals, ratio_of

BARE = ["model.onnx", "-o", "small.onnx"]


def config(*flags: str) -> Config:
    return cli.config_from(cli.parse([*BARE, *flags]))


def make_result(output: str | None = "small.onnx") -> Result:
    totals = Totals(params=1000, macs=2000, file_bytes=4000)
    half = Totals(params=500, macs=1000, file_bytes=2000)
    ratio = ratio_of(totals, half)
    return Result("model.onnx", output, totals, half, ratio, None, (), (), {}, {}, {"total": 1.0}, 0)


def make_inspection() -> Inspection:
    return Inspection("model.onnx", 17, 8, "pytorch", ("x float32 [N,3]",), ("y float32 [N,2]",), Totals(6, 6, 99), ())


class Spy:
    """A command that notes how it was called and returns or raises what it was given."""

    def __init__(self, outcome: Result | Inspection | BaseException) -> None:
        self.outcome = outcome
        self.calls: list[tuple[argparse.Namespace, Config]] = []

    def __call__(self, args, config, progress):
        self.calls.append((args, config))
        progress.stage("Fit", 2)
        progress.step("conv1")
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def run(argv: list[str], outcome: Result | Inspection | BaseException) -> tuple[int, Spy]:
    spy = Spy(outcome)
    return cli.main(argv, commands=dict.fromkeys(cli.COMMANDS, spy)), spy


# ------------------------------------------------------------------------------------------------ flags -> Config


def test_no_flags_give_the_default_settings():
    assert config() == Config()
    assert config().preprocess is None


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--params", "0.3"], "budget", Budget(params=0.3)),
        (["--params", "0.3", "--macs", "0.6"], "budget", Budget(params=0.3, macs=0.6)),
        (["--macs", "0.6"], "budget", Budget(macs=0.6)),
        (["--method", "svd"], "method", "svd"),
        (["--method", "not-checked-here"], "method", "not-checked-here"),
        (["--multiple", "4"], "multiple", 4),
        (["--holdout", "0.5"], "holdout", 0.5),
        (["--columns", "1024"], "columns", 1024),
        (["--memory", "1500MB"], "memory_bytes", 1_500_000_000),
        (["--batch", "7"], "batch", 7),
        (["--calibration-batch", "7"], "calibration_batch", 7),
        (["--latency", "0.4"], "budget", Budget(latency=0.4)),
        (["--size", "0.7"], "budget", Budget(size=0.7)),
        (["--max-drop", "0"], "budget", Budget(max_drop=0.0)),
        (["--max-drop", "0.02", "--size", "0.5", "--macs", "1"], "budget", Budget(max_drop=0.02, size=0.5, macs=1.0)),
        (["--dry-run"], "dry_run", True),
        (["--plan", "plan.json"], "plan", "plan.json"),
        (["--latency-table", "there.json"], "latency_table", "there.json"),
        (["--threads", "3"], "threads", 3),
        (["--provider", "cuda"], "provider", "cuda"),
        (["--seed", "11"], "seed", 11),
        (["--exclude", "*head*", "conv1"], "exclude", ("*head*", "conv1")),
        (["--exclude", "*head*", "--exclude", "conv1"], "exclude", ("*head*", "conv1")),
        (["--shape", "x:1,3,8,8", "a:0:2"], "shapes", {"x": (1, 3, 8, 8), "a:0": (2,)}),
        (["--shape", "x:1,3", "--shape", "y:4"], "shapes", {"x": (1, 3), "y": (4,)}),
        (["--random-data"], "random_data", True),
        (["--work", "kept/here"], "work", "kept/here"),
        (["--report", "page.html"], "report", "page.html"),
        (["--preset", "caffe"], "preprocess", Preprocess.from_preset("caffe")),
        (["--resize", "256"], "preprocess", Preprocess(resize=256)),
        (["--resize", "256x320"], "preprocess", Preprocess(resize=(256, 320))),
        (["--crop", "224"], "preprocess", Preprocess(crop=(224, 224))),
        (["--crop", "224x96"], "preprocess", Preprocess(crop=(224, 96))),
        (["--mean", "0.1,0.2,0.3"], "preprocess", Preprocess(mean=(0.1, 0.2, 0.3))),
        (["--mean=-1,0,1e-3"], "preprocess", Preprocess(mean=(-1.0, 0.0, 0.001))),
        (["--std", "0.5"], "preprocess", Preprocess(std=(0.5,))),
        (["--scale", "1/255"], "preprocess", Preprocess(scale=1 / 255)),
        (["--scale", "2"], "preprocess", Preprocess(scale=2.0)),
        (["--layout", "nhwc"], "preprocess", Preprocess(layout="NHWC")),
        (["--channels", "bgr"], "preprocess", Preprocess(channels="BGR")),
    ],
)
def test_a_flag_sets_its_field_and_no_other(flags, field, value):
    assert config(*flags) == dataclasses.replace(Config(), **{field: value})


def test_every_field_of_the_settings_has_a_flag():
    names = set(vars(cli.parse(BARE)))
    limits = {f.name for f in dataclasses.fields(Budget)}
    flags_of = {"budget": limits, "preprocess": {f.name for f in dataclasses.fields(Preprocess)}}
    for field in dataclasses.fields(Config):
        assert flags_of.get(field.name, {field.name}) <= names, field.name


def test_single_flags_override_the_preset():
    expected = dataclasses.replace(Preprocess.from_preset("imagenet"), channels="BGR", resize=232)
    assert config("--preset", "imagenet", "--channels", "BGR", "--resize", "232").preprocess == expected


def test_files_and_labels_are_passed_as_they_are():
    args = cli.parse([*BARE, "--data", "photos", "--labels", "folders", "--json", "-", "-v"])
    assert (args.model, args.output, args.data, args.labels) == ("model.onnx", "small.onnx", "photos", "folders")
    assert (args.json, args.verbose, args.quiet) == ("-", True, False)


# ------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (BARE, "compress"),
        (["compress", *BARE], "compress"),
        (["-o", "small.onnx", "model.onnx"], "compress"),
        (["--params", "0.5", "model.onnx", "-o", "small.onnx"], "compress"),
        (["./inspect", "-o", "small.onnx"], "compress"),
        (["inspect", "model.onnx"], "inspect"),
        (["inspect", "inspect"], "inspect"),
        (["demo"], "demo"),
    ],
)
def test_the_first_argument_names_the_command(argv, command):
    assert cli.parse(argv).command == command


def test_compress_says_the_same_as_the_bare_form():
    assert vars(cli.parse(["compress", *BARE])) == vars(cli.parse(BARE))


def test_demo_keeps_a_quarter_unless_told_otherwise():
    assert cli.config_from(cli.parse(["demo"])).budget == Budget(params=0.25)
    assert cli.config_from(cli.parse(["demo", "--macs", "0.5"])).budget == Budget(macs=0.5)
    assert cli.config_from(cli.parse(["demo", "--method", "svd", "--seed", "3"])).method == "svd"
    assert cli.parse(["demo", "-o", "lenet.onnx"]).output == "lenet.onnx"


def test_inspect_takes_shapes():
    assert cli.config_from(cli.parse(["inspect", "m.onnx", "--shape", "x:1,3"])).shapes == {"x": (1, 3)}


def test_each_command_gets_its_own_call():
    for name, argv in {"compress": BARE, "inspect": ["inspect", "m.onnx"], "demo": ["demo"]}.items():
        spy = Spy(make_inspection() if name == "inspect" else make_result())
        assert cli.main([*argv, "-q"], commands={name: spy}) == 0
        (args, _), *rest = spy.calls
        assert args.command == name
        assert not rest


# --------------------------------------------------------------------------------------------------- usage errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-q", "-v"], "not allowed with argument"),
        (["--data", "d", "--random-data"], "not allowed with argument --data"),
        (["--params", "half"], "invalid float value: 'half'"),
        (["--batch", "2.5"], "invalid int value: '2.5'"),
        (["--memory", "2"], "'2' is not a size"),
        (["--memory", "2 parsecs"], "is not a size"),
        (["--memory", "-2GiB"], "expected one argument"),
        (["--shape", "1,3,224,224"], "is not a shape"),
        (["--shape", "x:1,N"], "is not a shape"),
        (["--shape", "x:1,0"], "is not a shape"),
        (["--shape", "x:"], "is not a shape"),
        (["--resize", "wide"], "is not a size in pixels"),
        (["--resize", "1x2x3"], "is not a size in pixels"),
        (["--crop", "224x"], "is not a size in pixels"),
        (["--mean", "a,b"], "is not a list of numbers"),
        (["--mean", "1,,2"], "is not a list of numbers"),
        (["--std", "nan"], "is not a list of numbers"),
        (["--scale", "1/0"], "is not a factor"),
        (["--scale", "1/"], "is not a factor"),
        (["--scale", "inf"], "is not a factor"),
        (["--para", "0.5"], "unrecognized arguments: --para"),
        (["--exclude"], "expected at least one argument"),
    ],
)
def test_a_bad_command_line_ends_with_code_2_and_says_why(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        run([*BARE, *flags], make_result())
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--params", "0"], "--params is 0.0"),
        (["--params", "50"], "in (0, 1]"),
        (["--macs", "nan"], "--macs is nan"),
        (["--multiple", "0"], "--multiple is 0"),
        (["--holdout", "1"], "--holdout is 1.0"),
        (["--columns", "1"], "--columns is 1"),
        (["--memory", "1MB"], "--memory is 1 MiB"),
        (["--batch", "0"], "--batch is 0"),
        (["--calibration-batch", "0"], "--calibration-batch is 0"),
        (["--latency", "2"], "--latency is 2.0"),
        (["--size", "0"], "--size is 0.0"),
        (["--max-drop", "1"], "in [0, 1)"),
        (["--max-drop", "nan"], "--max-drop is nan"),
        (["--gain", "0.1", "--size", "0.5"], "not with size"),
        (["--plan", ""], "--plan is empty"),
        (["--latency-table", ""], "--latency-table is empty"),
        (["--report", "-"], "the page goes into a file"),
        (["--report", "small.onnx"], "would overwrite the output file"),
        (["--report", "r.html", "--json", "./r.html"], "name the same file"),
        (["--threads", "0"], "--threads is 0"),
        (["--provider", "gpu"], "--provider is 'gpu'; use cpu, cuda, tensorrt"),
        (["--seed", "-1"], "--seed is -1"),
        (["--resize", "0"], "--resize is 0"),
        (["--crop", "0x3"], "--crop is (0, 3)"),
        (["--std", "0,1,1"], "--std is"),
        (["--scale", "0"], "--scale is 0.0"),
        (["--layout", "CHWN"], "--layout is 'CHWN'"),
        (["--channels", "CMYK"], "--channels is 'CMYK'"),
        (["--preset", "cifar"], "known presets: imagenet"),
        (["--shape", "x:1", "x:2"], "two shapes"),
        (["--labels", "folders"], "--labels was given without --data"),
        (["--json", "small.onnx"], "would overwrite the output file"),
        (["--json", "./model.onnx"], "would overwrite the model file"),
        (["--data", "d.npz", "--json", "d.npz"], "would overwrite the data file"),
    ],
)
def test_a_value_out_of_range_ends_with_code_2_before_any_work(flags, words, capsys):
    code, spy = run([*BARE, *flags], make_result())
    out, err = capsys.readouterr()
    assert (code, out, spy.calls) == (2, "", [])
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize("argv", [["model.onnx"], ["compress", "model.onnx"], ["model.onnx", "-o", ""]])
def test_a_missing_output_is_refused_with_the_remedy(argv, capsys):
    code, spy = run(argv, make_result())
    assert (code, spy.calls) == (2, [])
    assert capsys.readouterr().err == ("error: No output file was named.\nAdd one: onnx-lrs model.onnx -o small.onnx\n")


@pytest.mark.parametrize("argv", [[], ["inspect"], ["-o", "small.onnx"]])
def test_a_missing_model_is_a_usage_error(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert "required: MODEL" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("2GiB", 2 * GIB), ("1.5 gib", 3 * GIB // 2), ("1500MB", 1500 * 10**6), ("3kB", 3000), ("512MiB", GIB // 2)],
)
def test_sizes(text, nbytes):
    assert cli.parse_size(text) == nbytes


@given(st.text(max_size=12))
def test_a_value_is_parsed_or_refused_but_never_crashes(text):
    parsers = (cli.parse_size, cli.parse_shape, cli.parse_extent, cli.parse_crop, cli.parse_numbers, cli.parse_scale)
    for parser in parsers:
        with contextlib.suppress(argparse.ArgumentTypeError):
            parser(text)


@given(st.text(min_size=1), st.lists(st.integers(1, 10**6), min_size=1, max_size=6))
def test_shapes_come_back(name, shape):
    assert cli.parse_shape(f"{name}:{','.join(map(str, shape))}") == (name, tuple(shape))


# -------------------------------------------------------------------------------------------- errors, exit codes


ERRORS = errors.OnnxLrsError.__subclasses__()


@pytest.mark.parametrize("kind", [errors.OnnxLrsError, *ERRORS])
def test_every_error_ends_with_its_code_its_message_and_its_remedy(kind, capsys):
    code, _ = run([*BARE, "-q"], kind("Layer 'a' is 3, at most 2.", "Take less."))
    out, err = capsys.readouterr()
    assert code == kind.exit_code
    assert err == "error: Layer 'a' is 3, at most 2.\nTake less.\n"
    assert out == ""


def test_an_error_without_a_remedy_is_one_line(capsys):
    run([*BARE, "-q"], errors.ModelError("Damaged."))
    assert capsys.readouterr().err == "error: Damaged.\n"


def test_help_documents_every_exit_code(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    listed = {int(line.split()[0]) for line in text.partition("exit codes:")[2].splitlines() if line.strip()}
    assert listed == {0, 1, cli.UNCHANGED, cli.SLOW, 130} | {kind.exit_code for kind in ERRORS}
    assert text.count("  onnx-lrs model.onnx -o small.onnx") == 3
    assert max(map(len, cli.EPILOG.splitlines())) <= 110


@pytest.mark.parametrize("command", ["inspect", "demo", "compress"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("onnx-lrs 0.")


@pytest.mark.parametrize("command", ["compress", "refine"])
def test_training_for_int8_is_a_flag_of_both_ways_to_refine(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "--fake-quant" in capsys.readouterr().out
    train = ["--data", "x.npy", *(["--refine"] if command == "compress" else [])]
    models = ["model.onnx"] if command == "compress" else ["model.onnx", "small.onnx"]
    for flags in ([], ["--fake-quant"]):
        args = cli.parse([command, *models, "-o", "out.onnx", *train, *flags])
        assert cli.training_from(args) == Training(fake_quant=bool(flags))
        if command == "compress":
            assert cli.config_from(args).refine == Training(fake_quant=bool(flags))


def test_help_needs_none_of_the_heavy_libraries():
    code = (
        "import sys, onnx_lrs.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'onnx', 'onnxruntime', 'rich')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_ctrl_c_ends_with_130(capsys):
    code, _ = run([*BARE, "-q"], KeyboardInterrupt())
    assert code == 130
    told = "interrupted; nothing was written\nWith --work DIR finished layers would have been kept.\n"
    assert capsys.readouterr().err == told
    code, _ = run([*BARE, "-q", "--work", "kept"], KeyboardInterrupt())
    assert code == 130
    told = "interrupted; nothing was written\nThe same command continues from what kept holds.\n"
    assert capsys.readouterr().err == told


def test_ctrl_c_after_the_file_was_written_does_not_deny_it(capsys, monkeypatch):
    def interrupted(self, indent=2):
        raise KeyboardInterrupt

    monkeypatch.setattr(Result, "to_json", interrupted)
    code, _ = run([*BARE, "-q", "--json", "-"], make_result())
    assert code == 130
    assert capsys.readouterr().err == "interrupted; small.onnx was already written\n"


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(BARE, ZeroDivisionError())


# ---------------------------------------------------------------------------------------------------------- JSON


def test_json_on_stdout_is_nothing_but_json(capsys):
    code, _ = run([*BARE, "--json", "-"], make_result())
    out, err = capsys.readouterr()
    assert code == 0
    assert json.loads(out)["after"]["params"] == 500
    assert "2.00x smaller" in err


def test_inspect_prints_its_json_too(capsys):
    code, _ = run(["inspect", "model.onnx", "--json", "-"], make_inspection())
    out, err = capsys.readouterr()
    assert code == 0
    assert json.loads(out)["opset"] == 17
    assert "opset 17" in err


def test_quiet_says_nothing(capsys):
    assert run([*BARE, "--quiet"], make_result())[0] == 0
    assert capsys.readouterr() == ("", "")


def test_json_file_replaces_the_old_one_and_leaves_no_draft(tmp_path):
    report = tmp_path / "report.json"
    report.write_text("old")
    assert run([*BARE, "-q", "--json", str(report)], make_result())[0] == 0
    assert json.loads(report.read_text())["schema"] == 1
    assert list(tmp_path.iterdir()) == [report]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.json"
    report.write_text("old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert run([*BARE, "-q", "--json", str(report)], make_result())[0] == 7
    assert "No space left on device" in capsys.readouterr().err
    assert report.read_text() == "old"
    assert list(tmp_path.iterdir()) == [report]


def test_a_linked_report_is_written_where_the_link_points(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    cli.write_text(tmp_path / "link.json", "{}")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "{}"


@pytest.mark.skipif(os.name != "posix", reason="named pipes are files on POSIX only")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        cli.write_text(pipe, "{}")
        assert os.read(reader, 10) == b"{}"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["missing/report.json", "."])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(name, tmp_path, capsys):
    code, spy = run([*BARE, "--json", str(tmp_path / name)], make_result())
    assert (code, spy.calls) == (7, [])
    assert "folder" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_early_is_no_failure(stream):
    code = (
        "import sys\nfrom onnx_lrs import cli\nfrom tests.test_cli_parsing import Spy, make_result\n"
        "print(cli.main([*sys.argv[1:]], commands={'compress': Spy(make_result())}),"
        " file=open(2 if sys.argv[-1] == '-q' else 1, 'w', closefd=False))"
    )
    flags = ["--json", "-", "-q"] if stream == "stdout" else []
    read, write = os.pipe()
    os.close(read)
    other = "stderr" if stream == "stdout" else "stdout"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *BARE, *flags],
            **{stream: write, other: subprocess.PIPE},
            cwd=Path(__file__).parent.parent,
        )
    finally:
        os.close(write)
    assert (done.returncode, getattr(done, other)) == (0, b"0\n")


def test_a_full_stdout_is_an_output_error(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Full())
    assert run([*BARE, "-q", "--json", "-"], make_result())[0] == 7
    assert "No space left" in capsys.readouterr().err
