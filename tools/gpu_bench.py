r"""Dense models against compressed ones on a GPU: batches, with CUDA graphs and without.

    python tools/gpu_bench.py --pairs vgg16.onnx vgg16_small.onnx --pairs googlenet.onnx googlenet_small.onnx \
        --vgg224 --batches 1 32 256 --out gpu.jsonl
    python tools/gpu_bench.py --render gpu.jsonl  # the table of docs/gpu.md

``--vgg224`` adds a network of VGG-16's shape on 224 x 224 pixels with random weights, and one of its layers as low-rank
pairs of a quarter of the multiply-accumulates: what a call takes does not depend on the values. With ``--provider cpu``
the same runs on the CPU, without CUDA graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from trials import Record, append_record, markdown, read_records, say

import onnx_lrs
from onnx_lrs import CompareConfig, Config, CudaOptions
from onnx_lrs.calibration.subject import examine
from onnx_lrs.errors import OnnxLrsError
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.graph.small import Shape, random_factors

WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max-pool
HIDDEN, CLASSES, PIXELS = 4096, 1000, 224
SHARE, STEP, LEAST = 0.25, 16, 32  # of a layer's MACs; ranks are multiples; fewer channels stay dense
NOTHING = np.zeros(0, np.int64)


def vgg(pixels: int = PIXELS, widths: Sequence[int] = WIDTHS, hidden: int = HIDDEN) -> onnx.ModelProto:
    """Return a network of VGG-16's shape with random weights: image (N, 3, pixels, pixels) -> logits (N, 1000)."""
    rng, nodes, weights = np.random.default_rng(0), [], {}
    here, channels, size = "image", 3, pixels

    def layer(op: str, shape: tuple[int, ...], name: str, **attributes: object) -> None:
        nonlocal here
        scale = np.sqrt(2 / np.prod(shape[1:]))
        weights[f"{name}.w"] = (scale * rng.standard_normal(shape, np.float32)).astype(np.float32)
        weights[f"{name}.b"] = np.zeros(shape[0], np.float32)
        nodes.append(helper.make_node(op, [here, f"{name}.w", f"{name}.b"], [f"{name}.y"], name, **attributes))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.r"], f"{name}.relu"))
        here = f"{name}.r"

    for number, width in enumerate(widths):
        if width:
            layer("Conv", (width, channels, 3, 3), f"conv{number}", pads=[1] * 4)
            channels = width
        else:
            nodes.append(
                helper.make_node(
                    "MaxPool", [here], [f"p{number}"], f"pool{number}", kernel_shape=[2, 2], strides=[2, 2]
                )
            )
            here, size = f"p{number}", size // 2
    nodes.append(helper.make_node("Flatten", [here], ["flat"], "flatten"))
    here = "flat"
    for number, (out, features) in enumerate(((hidden, channels * size**2), (hidden, hidden), (CLASSES, hidden))):
        layer("Gemm", (out, features), f"fc{number}", transB=1)
    nodes.pop()  # no ReLU behind the last
    graph = helper.make_graph(
        nodes,
        "vgg",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, pixels, pixels])],
        [helper.make_tensor_value_info(f"fc{number}.y", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def thinned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its layers as low-rank pairs of a quarter of the multiply-accumulates, values random."""
    subject = examine(model, model, Config(), None)
    factors = {}
    for layer in subject.layers:
        rank = int(SHARE * layer.params / (layer.out + layer.d)) // STEP * STEP
        if layer.channels >= LEAST and rank:
            factors[layer.node] = random_factors(layer, Shape("low-rank", rank), NOTHING)
    return rewrite(subject.view, subject.layers, factors, subject.ranks).model


@contextlib.contextmanager
def pairs(arguments: argparse.Namespace) -> Iterator[list[tuple[str, Path, Path]]]:
    """Yield (name, dense, compressed) of everything that is compared."""
    found = [(dense.stem, dense, small) for dense, small in arguments.pairs]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.vgg224:
            dense, small = (Path(folder) / f"{name}.onnx" for name in ("vgg224", "vgg224-low-rank"))
            model = vgg()
            onnx.save(model, dense)
            onnx.save(thinned(model), small)
            found.append(("VGG-16's shape, 224 x 224, random weights", dense, small))
        yield found


def measured(name: str, paths: Sequence[Path], graph: bool, arguments: argparse.Namespace) -> Record:
    """Return what one comparison gave."""
    config = CompareConfig(
        batches=tuple(arguments.batches),
        providers=(arguments.provider,),
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        cuda=CudaOptions(cuda_graph=graph, tf32=not arguments.no_tf32),
    )
    found = onnx_lrs.compare(paths, config=config)
    return {"name": name} | found.to_dict()


def render(records: Sequence[Record]) -> str:
    """Return the comparisons as a table in Markdown, a row for each batch, with its device and date."""
    header = ["network", "batch", "CUDA graph", "TF32", "dense, ms", "compressed, ms", "latency ratio", "MB"]
    body = []
    for record in records:
        env, cuda = record["environment"], record["settings"]["cuda"]
        megabytes = ", ".join(f"{model['file_bytes'] / 1e6:.3g}" for model in record["models"])
        device = env["gpu"] or f"{env['cpu']}, {env['cpu_count']} cores, {env['threads']} threads"
        for one, other in zip(record["timings"][::2], record["timings"][1::2], strict=True):
            on_gpu = one["provider"] != "cpu"
            ratio = f"{other['ratio']:.3f} ({other['ratio_low']:.3f} - {other['ratio_high']:.3f})"
            left = [f"{one[key]}, {other[key]}" if on_gpu else "" for key in ("on_cpu", "copies")]
            flags = ["on" if cuda[key] else "off" for key in ("cuda_graph", "tf32")] if on_gpu else ["", ""]
            times = [f"{t['median_ms']:.4g}" for t in (one, other)]
            place = [one["provider"], device, env["date"]]
            body.append([record["name"], str(one["batch"]), *flags, *times, ratio, megabytes, *left, *place])
    versions = (record["environment"]["versions"] for record in records)
    used = dict.fromkeys(found.get("onnxruntime-gpu") or found.get("onnxruntime") for found in versions)
    table = markdown([*header, "on CPU", "copies", "provider", "device", "date"], body)
    return f"{table}\n\nONNX Runtime {', '.join(used)}; ratios are of medians, with 99 % intervals."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", nargs=2, type=Path, action="append", default=[], metavar=("DENSE", "SMALL"), help="two models"
    )
    parser.add_argument("--vgg224", action="store_true", help="add the network of VGG-16's shape")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256], metavar="N", help="1 32 256")
    parser.add_argument("--provider", default="cuda", choices=("cpu", "cuda", "tensorrt"), help="cuda")
    parser.add_argument("--no-tf32", action="store_true", help="full float32 products")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each comparison (10)")
    parser.add_argument("--rounds", type=int, metavar="N", help="calls of each model instead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the records go, one a line")
    parser.add_argument("--render", type=Path, metavar="FILE", help="only print the page of a finished run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code: 0, or that of the error that ended it."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.render is not None:
        print(render(read_records(arguments.render)))
        return 0
    if arguments.out is None or not (arguments.pairs or arguments.vgg224):
        parser.error("--out, and --pairs or --vgg224, are needed")
    records = []
    with pairs(arguments) as found:
        for name, dense, small in found:
            for graph in (False, True)[: 1 if arguments.provider == "cpu" else 2]:
                try:
                    record = measured(name, (dense, small), graph, arguments)
                except OnnxLrsError as error:
                    print(f"{name}: {error}", file=sys.stderr)
                    return error.exit_code
                append_record(arguments.out, record)
                records.append(record)
                say(f"{name}, CUDA graph {'on' if graph else 'off'}: done")
    print(render(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
