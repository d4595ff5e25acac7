"""The command line: argv -> Config, one call of the library, a table on stderr, JSON on request. No logic.

``compress`` is the default command and its name may be left out, so the first argument decides: ``compare``,
``refine``, ``inspect`` and ``demo`` are commands, everything else is the model (a file called inspect is
``./inspect``).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from onnx_lrs import __version__
from onnx_lrs.config import GIB, LEAST_ROUNDS, Budget, CompareConfig, Config, CudaOptions, Preprocess, Training
from onnx_lrs.errors import ConfigError, OnnxLrsError, OutputError
from onnx_lrs.progress import Progress
from onnx_lrs.report.comparison import Comparison
from onnx_lrs.report.record import check_file, write_text
from onnx_lrs.report.refinement import Refinement
from onnx_lrs.report.result import Inspection, Result

INTERRUPTED = 130
UNCHANGED = 9
SLOW = 10
DEMO_BUDGET = Budget(params=0.25)
STDOUT = "-"
# ONNX Runtime's official builds report usage to Microsoft unless this is set before they are imported (Privacy.md in
# the wheel of 1.31). A model may be a secret, so the command line sets it; whoever wants the reports sets it to 0.
NO_TELEMETRY = ("ORT_DISABLE_TELEMETRY", "1")

TABLES = ("json", "csv", "markdown")  # what reports are written as, each a flag
PAGE = "report"  # the flag of the page, which the library writes
BESIDE = ("plan", "latency_table")  # what compress reads, or writes beside the model
Report = Result | Inspection | Comparison | Refinement
Command = Callable[[argparse.Namespace, Config, Progress], Report]

USAGE = """onnx-lrs MODEL -o OUT [options]
       onnx-lrs refine MODEL SMALL -o OUT --data PATH [options]
       onnx-lrs compare MODEL MODEL [MODEL ...] [options]
       onnx-lrs inspect MODEL [options]
       onnx-lrs demo [-o OUT] [options]"""

EPILOG = """\
examples:
  onnx-lrs model.onnx -o small.onnx --data photos/ --preset imagenet
  onnx-lrs model.onnx -o small.onnx --data photos/ --preset imagenet --latency 0.5
  onnx-lrs model.onnx -o small.onnx --data calibration.npz --macs 0.6 --json report.json

"onnx-lrs compress MODEL -o OUT" says the same. "onnx-lrs compare --help" (likewise inspect and demo) shows
the options of the other commands. Tables and progress go to stderr; stdout carries nothing but what "-"
sends there: --json - (compare: --csv - and --markdown - as well).

exit codes:
  0    done
  1    a bug in onnx-lrs (please report the traceback)
  2    the command line or a setting is wrong
  3    the model cannot be read, is not supported or does not run
  4    the calibration data or labels cannot be used
  5    the budget cannot be reached
  6    the compressed model failed a check; nothing was written
  7    the result could not be written
  8    ONNX Runtime is missing, doubled or lacks the provider
  9    nothing makes the model faster within the limits; OUT is the original
  10   compare --at-most: a model is slower than that, or may be
  130  interrupted; nothing was written (with --work the same command continues)
"""


# ------------------------------------------------------------------------------------------- values of the flags


def parse_size(text: str) -> int:
    """Return the bytes in ``2GiB``, ``1500MB`` or ``1.5 GiB``; the unit is not optional."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": GIB}
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Z]+)", text.strip().upper(), flags=re.ASCII)
    if match is None or match[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write a number and a unit: 2GiB or 1500MB")
    return int(float(match[1]) * units[match[2]])


def parse_counts(text: str) -> tuple[int, ...]:
    """Return the whole numbers of ``1,8,32``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers; write 1 or 1,8,32")
    return tuple(map(int, parts))


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names of ``cpu,cuda``."""
    return tuple(part.strip() for part in text.split(","))


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Return (name, dimensions) of ``input:1,3,224,224``; the name may hold colons itself."""
    name, _, dimensions = text.rpartition(":")
    parts = [part.strip() for part in dimensions.split(",")]
    if not name or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write NAME:1,3,224,224 with positive numbers")
    return name, tuple(map(int, parts))


def parse_option(text: str) -> tuple[str, str]:
    """Return (name, value) of ``reduce_range=True``."""
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not an option; write NAME=VALUE: reduce_range=True")
    return name, value


def parse_extent(text: str) -> int | tuple[int, int]:
    """Return 224 for ``224`` and (height, width) for ``224x320``."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in pixels; write 224 or 224x320 (height x width)")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def parse_crop(text: str) -> tuple[int, int]:
    """Return (height, width) for ``224x320``, a square for ``224``."""
    extent = parse_extent(text)
    return (extent, extent) if isinstance(extent, int) else extent


def parse_numbers(text: str) -> tuple[float, ...]:
    """Return the finite numbers of ``0.485,0.456,0.406``."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers; write 0.5 or 0.485,0.456,0.406")
    return numbers


def parse_scale(text: str) -> float:
    """Return the number in ``0.0039`` or the quotient in ``1/255``."""
    try:
        above, slash, below = text.partition("/")
        scale = float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        scale = math.nan
    if not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor; write 1/255 or 0.0039")
    return scale


def parse_ratio(text: str) -> float:
    """Return the positive finite number in ``0.8``."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio; write a positive number: 0.8")
    return ratio


# ------------------------------------------------------------------------------------------------------- parsers
# A flag that sets a field of Config or Preprocess has that field's name as its dest and None as its default.


def _new_parser(prog: str, description: str, **more: Any) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **more,
    )


def _compress_parser() -> argparse.ArgumentParser:
    parser = _new_parser(
        "onnx-lrs",
        "Make an .onnx file smaller: low-rank + structured sparse weights, fitted to the activations.",
        usage=USAGE,
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="the .onnx file to compress")
    parser.add_argument("-o", "--output", metavar="OUT", help="the .onnx file to write (required)")
    _add_budget(parser, "--max-drop 0.01 where there is data, else --params 0.5")
    _add_plan(parser)
    data = parser.add_argument_group("calibration data")
    source = data.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="PATH", help="a folder of images, or an .npy or .npz file")
    source.add_argument("--random-data", action="store_true", default=None, help="fit on random inputs (worse)")
    data.add_argument("--test", metavar="PATH", help="other samples to judge on; without it a share of DATA judges")
    data.add_argument(
        "--labels",
        metavar="PATH|folders",
        help="true classes of the samples that judge (TEST if given, else DATA); 'folders': one subfolder a class",
    )
    _add_shape(data)
    _add_image_flags(parser)
    _add_fit(parser)
    train = _add_training(parser)
    train.add_argument(
        "--refine",
        action="store_true",
        default=None,
        help='train the small model to give what the original gives; needs pip install "onnx-lrs[refine]"',
    )
    train.add_argument("--rounds", type=int, metavar="K", help="compress and train in K steps down to the budget (1)")
    _add_precision(parser)
    _add_page(_add_output(parser))
    return parser


def _add_precision(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision")
    group.add_argument(
        "--quantize",
        dest="precision",
        metavar="NAME",
        help="int8 (static, QDQ, per channel, calibrated on DATA; the plan is made for it) or fp16 (for GPUs)",
    )
    group.add_argument(
        "--quantize-option",
        dest="quantize_options",
        type=parse_option,
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="of onnxruntime.quantization.quantize_static: calibrate_method=percentile (minmax, entropy), "
        "reduce_range=True, activation_type=QInt8, or one of its extra_options",
    )


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _new_parser("onnx-lrs inspect", "Show what a model holds and which layers can be compressed.")
    default = Config()
    parser.add_argument("model", metavar="MODEL", help="the .onnx file to look at; it is not changed")
    parser.add_argument("--data", metavar="PATH", help="samples: tells the effective rank of each layer as well")
    parser.add_argument("--threads", type=int, metavar="N", help=f"threads of ONNX Runtime ({default.threads})")
    _add_shape(parser)
    _add_image_flags(parser)
    _add_output(parser)
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    default = CompareConfig()
    parser = _new_parser(
        "onnx-lrs compare",
        "Time models against each other in turn; the first one is what the others are held against.",
        epilog="With --data the outputs are compared as well. A model against itself shows how noisy the machine is.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="two or more .onnx files with the same inputs")
    runs = parser.add_argument_group("what runs")
    runs.add_argument("--batch", dest="batches", type=parse_counts, metavar="N,N", help="samples in a call: 1,8,32 (1)")
    runs.add_argument("--threads", type=int, metavar="N", help=f"threads of ONNX Runtime ({default.threads})")
    runs.add_argument("--seconds", type=float, metavar="S", help=f"of timing, for all together ({default.seconds:g})")
    runs.add_argument("--rounds", type=int, metavar="N", help=f"calls of each model instead, at least {LEAST_ROUNDS}")
    runs.add_argument("--seed", type=int, metavar="N", help=f"of random inputs and orders ({default.seed})")
    runs.add_argument("--profile", action="store_true", default=None, help="times of each layer as well (CPU only)")
    runs.add_argument(
        "--at-most",
        type=parse_ratio,
        metavar="R",
        help=f"exit with code {SLOW} unless every other model surely takes at most R of the first one's latency",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="PATH", help="a folder of images, or an .npy or .npz file; else random numbers")
    data.add_argument("--labels", metavar="PATH|folders", help="true classes; 'folders': one subfolder a class")
    _add_shape(data)
    _add_image_flags(parser)
    _add_devices(parser)
    output = _add_output(parser)
    output.add_argument("--csv", metavar="FILE|-", help="write a line for each timing")
    output.add_argument("--markdown", metavar="FILE|-", help="write tables to paste")
    _add_page(output)
    return parser


def _add_devices(parser: argparse.ArgumentParser) -> None:
    devices = parser.add_argument_group("devices")
    devices.add_argument(
        "--provider",
        dest="providers",
        type=parse_names,
        metavar="NAME,NAME",
        help="cpu (default), cuda, tensorrt; one that does not start is an error",
    )
    binding = devices.add_mutually_exclusive_group()
    binding.add_argument(
        "--io-binding",
        action="store_true",
        default=None,
        help="inputs and outputs lie on the device while calls are timed (default on GPUs)",
    )
    binding.add_argument("--no-io-binding", dest="io_binding", action="store_false", default=None)
    devices.add_argument(
        "--cuda-graph", action="store_true", default=None, help="launch the kernels of a call together"
    )
    devices.add_argument("--no-tf32", dest="tf32", action="store_false", default=None, help="full float32 products")
    devices.add_argument("--prefer-nhwc", action="store_true", default=None, help="convolutions with channels last")
    devices.add_argument("--cudnn-conv-algo-search", metavar="NAME", help="exhaustive (default), heuristic or default")


def _refine_parser() -> argparse.ArgumentParser:
    default = Config()
    parser = _new_parser(
        "onnx-lrs refine",
        "Train a compressed model to give what the original gives; no labels are needed. Ranks, kept channels and the "
        'graph stay what they are. Needs pip install "onnx-lrs[refine]".',
    )
    parser.add_argument("model", metavar="MODEL", help="the original")
    parser.add_argument("small", metavar="SMALL", help="what was made of it")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the .onnx file to write")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="PATH", required=True, help="a folder of images, or an .npy or .npz file")
    data.add_argument("--test", metavar="PATH", help="other samples to judge on; without it a share of DATA judges")
    data.add_argument(
        "--labels", metavar="PATH|folders", help="true classes of the samples that judge; without --test trained on too"
    )
    data.add_argument("--holdout", type=float, metavar="F", help=f"share of DATA that judges ({default.holdout:g})")
    _add_shape(data)
    _add_image_flags(parser)
    _add_training(parser)
    runs = parser.add_argument_group("runs")
    runs.add_argument("--threads", type=int, metavar="N", help=f"threads ({default.threads})")
    runs.add_argument("--seed", type=int, metavar="N", help=f"of orders and augmentation ({default.seed})")
    _add_memory(runs, "samples that stay in memory; beyond it they are read again", default)
    runs.add_argument("--work", metavar="DIR", help="keep the state of each epoch in DIR: the same command continues")
    _add_output(parser)
    return parser


def _add_memory(group: argparse._ArgumentGroup, meaning: str, default: Config) -> None:
    told = f"{meaning}, 1500MB or 2GiB, at least 256MiB ({default.memory_bytes // GIB}GiB)"
    group.add_argument("--memory", dest="memory_bytes", type=parse_size, metavar="SIZE", help=told)


def _add_training(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    default = Training()
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, metavar="N", help=f"passes over the samples at most ({default.epochs})")
    train.add_argument("--minutes", type=float, metavar="M", help="of time at most, which shortens the course")
    train.add_argument("--train-batch", type=int, metavar="N", help=f"samples in a step ({default.train_batch})")
    train.add_argument("--learning-rate", type=float, metavar="X", help=f"the highest ({default.learning_rate:g})")
    train.add_argument("--loss", metavar="NAME", help="auto (default), kl (class scores) or l2 (relative error)")
    train.add_argument("--temperature", type=float, metavar="T", help=f"of class scores ({default.temperature:g})")
    train.add_argument(
        "--label-share", type=float, metavar="F", help=f"of the labels in the loss, if any ({default.label_share:g})"
    )
    train.add_argument(
        "--block-share", type=float, metavar="F", help="of the tensors between blocks in the loss (0: outputs only)"
    )
    train.add_argument("--no-augment", dest="augment", action="store_false", default=None, help="images as they are")
    train.add_argument("--patience", type=int, metavar="N", help=f"epochs without a gain ({default.patience})")
    train.add_argument("--device", metavar="NAME", help="cpu (default) or cuda")
    train.add_argument("--autocast", metavar="NAME", help="bfloat16: auto (default: if faster), on or off")
    told = "for INT8: train with weights rounded as quantising will; the file holds them unrounded"
    train.add_argument("--fake-quant", action="store_true", default=None, help=told)
    return train


def _demo_parser() -> argparse.ArgumentParser:
    parser = _new_parser("onnx-lrs demo", "Compress the LeNet-5 that comes with onnx-lrs, digits and labels included.")
    parser.add_argument("-o", "--output", metavar="OUT", help="also write the small model here")
    parser.set_defaults(default_budget=DEMO_BUDGET)
    _add_budget(parser, str(DEMO_BUDGET))
    _add_fit(parser)
    _add_page(_add_output(parser))
    return parser


def _add_budget(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group(
        "budget", f"Fractions of the original in (0, 1]; several hold at once. Default: {default}"
    )
    group.add_argument("--latency", type=float, metavar="F", help="at most this fraction of the measured latency")
    group.add_argument("--params", type=float, metavar="F", help="at most this fraction of the parameters")
    group.add_argument("--macs", type=float, metavar="F", help="at most this fraction of the multiply-accumulates")
    group.add_argument("--size", type=float, metavar="F", help="at most this fraction of the file's bytes")
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="D",
        help="as fast as it gets while no more than this is lost: accuracy with --labels, else agreement with the "
        "original, else relative error; 0.01 is one point. Other limits must be met as well",
    )
    group.add_argument(
        "--gain", type=float, metavar="E", help="ddlr, nettrim: the relative error that each layer's output may have"
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--dry-run", action="store_true", default=None, help="make the plan and say what to expect; write no model"
    )
    plan.add_argument(
        "--plan", metavar="FILE", help="carry out the plan in FILE if it exists, else write the plan of this run to it"
    )
    plan.add_argument(
        "--latency-table",
        metavar="FILE",
        help="take latencies of layers from FILE if it exists (another device's), else write those measured to it",
    )


def _add_fit(parser: argparse.ArgumentParser) -> None:
    default = Config()
    fit = parser.add_argument_group("fitting")
    fit.add_argument(
        "--method",
        metavar="NAME",
        help="lrs (default), admm, greedy, ddlr, nettrim; baselines: hsvd, channels, svd, spatial, magnitude",
    )
    fit.add_argument(
        "--fit",
        metavar="NAME",
        help="cascade (default): each layer sees the compressed ones in front and its activation; "
        "cascade-linear: without the activation; independent: each layer alone",
    )
    fit.add_argument("--structure", metavar="NAME", help="greedy: keep whole channels (default) or single elements")
    fit.add_argument("--steps", type=int, metavar="N", help="most iterations of one solve (the method's own limit)")
    fit.add_argument(
        "--multiple",
        type=int,
        metavar="N",
        help="ranks and kept channels are multiples of N, not with --gain (16 where latency decides, else 8)",
    )
    fit.add_argument(
        "--exclude", nargs="+", action="extend", metavar="PATTERN", help="layers to leave dense: '*head*' (quote it)"
    )
    fit.add_argument(
        "--holdout", type=float, metavar="F", help=f"share of the samples that only judges ({default.holdout})"
    )
    fit.add_argument("--columns", type=int, metavar="N", help=f"sampled positions a layer ({default.columns})")
    fit.add_argument("--seed", type=int, metavar="N", help=f"same seed, same file ({default.seed})")
    _add_memory(fit, "working memory besides the model", default)
    fit.add_argument("--batch", type=int, metavar="N", help=f"samples in the call that is timed ({default.batch})")
    fit.add_argument(
        "--calibration-batch",
        type=int,
        metavar="N",
        help=f"most samples in one call of the calibration ({default.calibration_batch})",
    )
    fit.add_argument("--threads", type=int, metavar="N", help=f"threads of ONNX Runtime ({default.threads})")
    fit.add_argument("--jobs", type=int, metavar="N", help="layers solved at the same time (as many as threads)")
    fit.add_argument(
        "--provider",
        metavar="NAME",
        help="where both models are compared and timed: cpu (default), cuda or tensorrt; the fit runs on the CPU",
    )
    fit.add_argument(
        "--work",
        metavar="DIR",
        help="keep finished layers and statistics in DIR: the same command continues after an interruption. Reads the "
        "samples once more, to know them again; DIR may be deleted afterwards",
    )


def _add_image_flags(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group(
        "images",
        "A pixel p in 0..255 becomes (p * scale - mean) / std after resize and centre crop. Default: 0..1 at the\n"
        "model's input size. Single flags override the preset. Write --mean=-1,0,0 if the first number is negative.",
    )
    images.add_argument("--preset", metavar="NAME", help="imagenet, caffe or raw")
    images.add_argument("--resize", type=parse_extent, metavar="N|HxW", help="short side in pixels, or both sides")
    images.add_argument("--crop", type=parse_crop, metavar="N|HxW", help="centre crop")
    images.add_argument("--mean", type=parse_numbers, metavar="a,b,c", help="one value, or one a channel")
    images.add_argument("--std", type=parse_numbers, metavar="a,b,c", help="one value, or one a channel")
    images.add_argument("--scale", type=parse_scale, metavar="X", help="factor on the pixel value, 1/255 allowed")
    images.add_argument("--layout", type=str.upper, metavar="NAME", help="NCHW or NHWC (default: the model's)")
    images.add_argument("--channels", type=str.upper, metavar="NAME", help="RGB, BGR or GRAY (default: the model's)")


def _add_shape(container: argparse._ActionsContainer) -> None:
    container.add_argument(
        "--shape",
        dest="shapes",
        type=parse_shape,
        nargs="+",
        action="extend",
        metavar="NAME:1,3,224,224",
        help="sizes of an input with dynamic dimensions",
    )


def _add_output(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE|-", help="write the report as JSON; '-' is stdout")
    loudness = output.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="errors only")
    loudness.add_argument("-v", "--verbose", action="store_true", help="every layer, and why a layer was left")
    output.add_argument("--version", action="version", version=f"onnx-lrs {__version__}")
    return output


def _add_page(output: argparse._ArgumentGroup) -> None:
    output.add_argument(
        "--report",
        metavar="FILE",
        help='write a page with tables and plots (HTML, one file); needs pip install "onnx-lrs[report]"',
    )


PARSERS: Mapping[str, Callable[[], argparse.ArgumentParser]] = {
    "compress": _compress_parser,
    "compare": _compare_parser,
    "refine": _refine_parser,
    "inspect": _inspect_parser,
    "demo": _demo_parser,
}


# ------------------------------------------------------------------------------------------------ argv -> Config


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; ``command`` holds the command's name.

    Raises
    ------
    SystemExit
        With code 2 and argparse's message on stderr, or 0 after --help and --version.
    """
    named = bool(argv) and argv[0] in PARSERS
    command, rest = (argv[0], argv[1:]) if named else ("compress", argv)
    return PARSERS[command]().parse_args(rest, argparse.Namespace(command=command))


def config_from(args: argparse.Namespace) -> Config:
    """Return the settings that the flags ask for; what no flag sets keeps its default.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen, limits = _of(Config, given), _of(Budget, given)
    if limits:
        chosen["budget"] = Budget(**limits)
    elif "default_budget" in given:
        chosen["budget"] = given["default_budget"]
    if "exclude" in given:
        chosen["exclude"] = tuple(given["exclude"])
    if "shapes" in given:
        chosen["shapes"] = _shapes(given["shapes"])
    if "quantize_options" in given:
        chosen["quantize_options"] = dict(given["quantize_options"])
    if args.command == "compress":
        if chosen.pop("refine", False):
            chosen["refine"] = training_from(args)
        else:
            _refuse_training(given)
    return Config(**chosen, preprocess=_preprocess(given))


def _of(record: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that belong to a record's fields."""
    return {field.name: given[field.name] for field in dataclasses.fields(record) if field.name in given}


def _refuse_training(given: Mapping[str, Any]) -> None:
    """Refuse settings of a training that was not asked for."""
    for field in dataclasses.fields(Training):
        if field.name in given:
            flag = "--no-augment" if field.name == "augment" else f"--{field.name.replace('_', '-')}"
            raise ConfigError(f"{flag} is about training.", f"Add --refine, or leave {flag} out.")


def compare_config_from(args: argparse.Namespace, config: Config) -> CompareConfig:
    """Return the settings of a comparison; what both kinds of run have comes from ``config``.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    names = {field.name for field in dataclasses.fields(CompareConfig)} & given.keys()
    cuda = {field.name for field in dataclasses.fields(CudaOptions)} & given.keys()
    both = {name: getattr(config, name) for name in ("threads", "seed", "shapes", "preprocess")}
    own = {name: given[name] for name in names if name not in both}
    return CompareConfig(**both, **own, cuda=CudaOptions(**{name: given[name] for name in cuda}))


def training_from(args: argparse.Namespace) -> Training:
    """Return how to train; what no flag sets keeps its default.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    return Training(**_of(Training, given))


def _shapes(pairs: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in pairs:
        if shapes.setdefault(name, shape) != shape:
            raise ConfigError(f"--shape gives input {name!r} two shapes: {shapes[name]} and {shape}.", "Keep one.")
    return shapes


def _preprocess(given: Mapping[str, Any]) -> Preprocess | None:
    names = {field.name for field in dataclasses.fields(Preprocess)} & given.keys()
    if not names:
        return None
    base = Preprocess.from_preset(given["preset"]) if "preset" in given else Preprocess()
    return dataclasses.replace(base, **{name: given[name] for name in names})


def _check_files(args: argparse.Namespace) -> None:
    """Refuse before the work starts what could only fail, or destroy a file, after it."""
    given = vars(args)
    if args.command == "compress" and not given["output"] and not given["dry_run"]:
        raise ConfigError("No output file was named.", f"Add one: onnx-lrs {args.model} -o small.onnx")
    if given.get("test") and not (given["data"] or given["random_data"]):
        raise ConfigError("--test was given without --data.", "The fit needs samples of its own: add --data PATH.")
    if given.get("labels") and not (given["data"] or given.get("test")):
        raise ConfigError("--labels was given without --data.", "Labels belong to samples: add --data PATH.")
    if given.get("output"):
        _refuse_same("-o", given, "output", ("data", "test", "labels"))
    written = (*TABLES, PAGE)
    for name in written:
        if given.get(name) not in (None, STDOUT):
            _check_report(name, given)
    _refuse_shared({name: given[name] for name in written if given.get(name) is not None})


def _refuse_shared(places: Mapping[str, str]) -> None:
    """Refuse two reports in one place."""
    for (one, place), (other, its) in itertools.combinations(places.items(), 2):
        if STDOUT in (place, its):
            if place == its:
                raise ConfigError("Two reports would go to stdout.", "Give one of them a file.")
        elif Path(place).resolve() == Path(its).resolve():
            raise ConfigError(f"--{one} and --{other} name the same file, {place}.", "Give each its own.")


def _check_report(name: str, given: Mapping[str, Any]) -> None:
    """Refuse a report's file that would destroy another one, or cannot be written."""
    report = Path(given[name])
    _refuse_same(f"--{name}", given, name, ("model", "models", "small", "output", "data", "test", "labels", *BESIDE))
    check_file(report, f"--{name}")


def _refuse_same(flag: str, given: Mapping[str, Any], written: str, read: Sequence[str]) -> None:
    target = Path(given[written])
    for name in read:
        paths = given.get(name) or []
        for path in paths if isinstance(paths, list) else [paths]:
            if target.resolve() == Path(path).resolve():
                kind = "model" if name == "models" else name
                raise ConfigError(f"{flag} {target} would overwrite the {kind} file.", "Give it its own name.")


# ---------------------------------------------------------------------------------------------------------- runs


def _compress(args: argparse.Namespace, config: Config, progress: Progress) -> Result:
    from onnx_lrs.api import compress

    sources = {name: getattr(args, name) for name in ("data", "labels", "test")}
    return compress(args.model, args.output, **sources, config=config, progress=progress, call=args.call)


def _inspect(args: argparse.Namespace, config: Config, progress: Progress) -> Inspection:
    from onnx_lrs.api import inspect

    return inspect(args.model, data=args.data, config=config, progress=progress)


def _demo(args: argparse.Namespace, config: Config, progress: Progress) -> Result:
    from onnx_lrs import demo

    return demo.run(Path(args.output) if args.output else None, config, progress, args.call)


def _compare(args: argparse.Namespace, config: Config, progress: Progress) -> Comparison:
    from onnx_lrs.api import compare

    settings = compare_config_from(args, config)
    sources = {name: getattr(args, name) for name in ("data", "labels")}
    return compare(args.models, **sources, config=settings, progress=progress, call=args.call)


def _refine(args: argparse.Namespace, config: Config, progress: Progress) -> Refinement:
    from onnx_lrs.api import refine

    sources = {name: getattr(args, name) for name in ("data", "labels", "test")}
    training = training_from(args)
    return refine(
        args.model,
        args.small,
        args.output,
        **sources,
        training=training,
        config=config,
        progress=progress,
        call=args.call,
    )


COMMANDS: Mapping[str, Command] = {
    "compress": _compress,
    "compare": _compare,
    "refine": _refine,
    "inspect": _inspect,
    "demo": _demo,
}


def main(argv: Sequence[str] | None = None, *, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run the command line and return the exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments without the program's name; ``sys.argv[1:]`` by default.
    commands : mapping of str to callable
        What each command calls.

    Returns
    -------
    int
        The exit code; :mod:`onnx_lrs.errors` lists them.

    Raises
    ------
    SystemExit
        From argparse: 2 for a bad command line, 0 for --help and --version.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    args = parse(given)
    args.call = (subprocess.list2cmdline if os.name == "nt" else shlex.join)(["onnx-lrs", *given])
    os.environ.setdefault(*NO_TELEMETRY)
    try:
        return _run(args, commands[args.command])
    except OnnxLrsError as error:
        _say(f"error: {error.message}")
        if error.remedy:
            _say(error.remedy)
        return error.exit_code
    except KeyboardInterrupt as stop:
        _say(f"interrupted; {str(stop) or 'nothing was written'}")
        if str(stop):
            return INTERRUPTED
        if getattr(args, "work", None):
            _say(f"The same command continues from what {args.work} holds.")
        elif hasattr(args, "work"):
            _say("With --work DIR finished layers would have been kept.")
        return INTERRUPTED


def _run(args: argparse.Namespace, command: Command) -> int:
    from onnx_lrs.report.console import ConsoleProgress

    _check_files(args)
    config = config_from(args)
    try:
        with ConsoleProgress(quiet=args.quiet) as progress:
            report = command(args, config, progress)
    finally:
        found = getattr(sys.exc_info()[1], "record", None)  # of a run whose page could not be made
        if found is not None:
            _publish(found, args)
    try:
        _publish(report, args)
    except KeyboardInterrupt:
        written = report.output if isinstance(report, Result) else None
        _say(f"interrupted; {written} was already written" if written else "interrupted; nothing was written")
        return INTERRUPTED
    if isinstance(report, Result) and report.unchanged:
        return UNCHANGED
    if isinstance(report, Comparison) and args.at_most is not None:
        return _gate(report, args.at_most)
    return 0


def _gate(report: Comparison, at_most: float) -> int:
    """Say which models are not surely within the limit, and return the exit code."""
    slow = report.slower_than(at_most)
    for t in slow:
        _say(
            f"{t.model}, {t.provider}, batch {t.batch}: between {t.ratio_low:.3f} and {t.ratio_high:.3f} of the first "
            f"model's latency, not surely at most {at_most:g}"
        )
    return SLOW if slow else 0


def _publish(report: Report, args: argparse.Namespace) -> None:
    from onnx_lrs.report import console

    if not args.quiet and isinstance(report, Result):
        console.print_result(report, args.verbose)
    elif not args.quiet and isinstance(report, Inspection):
        console.print_inspection(report, args.verbose)
    elif not args.quiet and isinstance(report, Comparison):
        console.print_comparison(report)
    elif not args.quiet and isinstance(report, Refinement):
        console.print_refinement(report, args.verbose)
    for name in TABLES:
        place = getattr(args, name, None)
        if place == STDOUT:
            _print_report(getattr(report, f"to_{name}")().rstrip("\n"))
        elif place is not None:
            write_text(Path(place), getattr(report, f"to_{name}")().rstrip("\n") + "\n")


def _print_report(text: str) -> None:
    try:
        _write_line(text, sys.stdout)
    except OSError as error:
        raise OutputError(
            f"The report could not be written to stdout: {error.strerror or error}.", "Check where it is redirected to."
        ) from error


def _say(text: str) -> None:
    _write_line(text, sys.stderr)


def _write_line(text: str, stream: IO[str]) -> None:
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        from onnx_lrs.report.console import discard

        discard(stream)  # or Python tries again at exit and complains
        if not isinstance(error, BrokenPipeError):  # a reader (head, less) that has seen enough is no failure
            raise
