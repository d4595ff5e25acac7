"""Make a model with external data of any size, layer by layer, and calibration samples for it.

    python tools/make_large_model.py --out big/    # model.onnx, its .data of about 2.5 GB, samples.npz
    python tools/make_large_model.py --out small/ --size 100MB --width 1024 --hidden 2048

Blocks as in a transformer: x + Gemm(Relu(MatMul(x) + b)). A weight is low-rank plus noise, so that there is something
to compress; it goes to the disk before the next one is made. Same arguments, same bytes.
"""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

NOISE = 0.3  # standard deviation of the noise, in that of the low-rank part
RANK_SHARE = 16  # the smaller side of a weight divided by its rank
ALIGNED = 4096  # bytes: tensors begin at pages of the data file
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def size_in_bytes(text: str) -> int:
    """Return 2500000000 for "2.5GB".

    Raises
    ------
    argparse.ArgumentTypeError
        If the text is no size.
    """
    match = re.fullmatch(r"([\d.]+) *(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 2.5GB or 300MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def weight(rows: int, columns: int, seed: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a weight that keeps the size of what it is multiplied with, low rank plus noise."""
    random = np.random.default_rng(seed)
    rank = max(min(rows, columns) // RANK_SHARE, 1)
    left = random.standard_normal((rows, rank), np.float32) / np.float32(np.sqrt(rank))
    made = left @ random.standard_normal((rank, columns), np.float32)
    made += np.float32(NOISE) * random.standard_normal((rows, columns), np.float32)
    made *= np.float32(1 / np.sqrt(rows * (1 + NOISE**2)))
    return made


def tensors(blocks: int, width: int, hidden: int, seed: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the weights of all blocks by name, one at a time."""
    for block in range(blocks):
        yield f"up{block}", weight(width, hidden, (seed, block, 0))
        yield f"up_bias{block}", np.full(hidden, 0.05, np.float32)
        yield f"down{block}", weight(hidden, width, (seed, block, 1))
        yield f"down_bias{block}", np.full(width, -0.05, np.float32)


def nodes(blocks: int) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of all blocks; the last one writes ``y``."""
    for block in range(blocks):
        before, after = ("x" if block == 0 else f"x{block}"), ("y" if block == blocks - 1 else f"x{block + 1}")
        make = helper.make_node
        yield make("MatMul", [before, f"up{block}"], [f"h{block}"], name=f"up{block}")
        yield make("Add", [f"h{block}", f"up_bias{block}"], [f"a{block}"], name=f"bias{block}")
        yield make("Relu", [f"a{block}"], [f"r{block}"], name=f"relu{block}")
        yield make("Gemm", [f"r{block}", f"down{block}", f"down_bias{block}"], [f"g{block}"], name=f"down{block}")
        yield make("Add", [before, f"g{block}"], [after], name=f"residual{block}")


def make_model(folder: pathlib.Path, size: int, width: int, hidden: int, seed: int) -> pathlib.Path:
    """Write ``model.onnx`` and ``model.onnx.data`` of about ``size`` bytes into the folder; return the model's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    blocks = max(round(size / (8 * width * hidden)), 1)
    stored = []
    with (folder / "model.onnx.data").open("wb") as data:
        for name, values in tensors(blocks, width, hidden, seed):
            data.write(b"\0" * (-data.tell() % ALIGNED))
            stored.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape))
            stored[-1].data_location = TensorProto.EXTERNAL
            place = {"location": "model.onnx.data", "offset": data.tell(), "length": values.nbytes}
            for key, value in place.items():
                stored[-1].external_data.add(key=key, value=str(value))
            data.write(values.data)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in ("x", "y")]
    graph = helper.make_graph(list(nodes(blocks)), "large", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def make_samples(path: pathlib.Path, count: int, width: int, seed: int) -> None:
    """Write samples of a few directions plus noise as ``x`` of an .npz file."""
    random = np.random.default_rng((seed, 2))
    directions = random.standard_normal((max(width // 8, 1), width)) / np.sqrt(max(width // 8, 1))
    values = random.standard_normal((count, len(directions))) @ directions
    values += 0.1 * random.standard_normal((count, width))
    np.savez(path, x=values.astype(np.float32))


def main() -> None:
    """Make what the command line asks for and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the three files")
    parser.add_argument("--size", type=size_in_bytes, default="2.5GB", help="of all weights (default: 2.5GB)")
    parser.add_argument("--width", type=int, default=2048, help="of the input and output (default: 2048)")
    parser.add_argument("--hidden", type=int, default=8192, help="width inside a block (default: 8192)")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    path = make_model(given.out, given.size, given.width, given.hidden, given.seed)
    make_samples(given.out / "samples.npz", given.samples, given.width, given.seed)
    print(f"{path}: {path.with_name('model.onnx.data').stat().st_size / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
