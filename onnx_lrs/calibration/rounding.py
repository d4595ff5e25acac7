"""What rounding a finished network to eight bits needs to know of its activations, reduced batch by batch.

That is a sample of the tensors between two linear maps, for the basis between them, and the mean input of every
product, for its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.graph.linear import Link, Product, columns, rows
from onnx_lrs.graph.tuning import constants
from onnx_lrs.runtime.session import Feed, Session, with_outputs
from onnx_lrs.solvers.rounding import Pair

AT_ONCE = 32  # links that one pass looks at: what they hold stays in memory
ROWS = 4096  # of a tensor between, over all batches
FEWEST = 16  # of one batch
Feeds = Callable[[], Iterable[Feed]]


def pairs(
    model: onnx.ModelProto, links: Sequence[Link], feeds: Feeds, count: int, threads: int
) -> Iterator[tuple[Link, Pair]]:
    """Yield each link with what stands between its two products.

    ``count`` is the number of feeds; positions are drawn with a fixed seed, ROWS of each tensor at most.
    """
    values, each = constants(model), max(ROWS // max(count, 1), FEWEST)
    for start in range(0, len(links), AT_ONCE):
        group = links[start : start + AT_ONCE]
        rng = np.random.default_rng(0)
        found: dict[str, list[NDArray[np.float32]]] = {link.between: [] for link in group}
        energies: dict[str, list[float]] = {link.first.input: [] for link in group}
        for given in _runs(model, [*found, *energies], feeds, threads):
            for link in group:
                z = _features_last(given[link.between], link.first.axis)
                drawn = rng.choice(len(z), min(len(z), each), replace=False)
                found[link.between].append(np.asarray(z[drawn], np.float32))
            for name, own in energies.items():
                own.append(float(np.mean(np.square(given[name], dtype=np.float64))))
        for link in group:
            first = rows(link.first, values[link.first.weight])
            energy = float(np.mean(energies[link.first.input])) * first.shape[1]
            second = columns(link.second, values[link.second.weight])
            between = np.concatenate(found.pop(link.between)).astype(np.float64)
            yield link, Pair(between, first, second, energy)


def _features_last(value: NDArray[np.floating], axis: int) -> NDArray[np.floating]:
    moved = np.moveaxis(value, axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def mean_inputs(
    model: onnx.ModelProto, products: Sequence[Product], feeds: Feeds, threads: int
) -> dict[str, NDArray[np.float64]]:
    """Return the mean of each product's input over all samples, by its name, shape (1, ...).

    Samples are rows of axis 0. An input whose other axes change from batch to batch is left out.
    """
    names = list(dict.fromkeys(product.input for product in products))
    sums: dict[str, NDArray[np.float64]] = {}
    counts = dict.fromkeys(names, 0)
    for given in _runs(model, names, feeds, threads):
        for name in names:
            total = given[name].sum(axis=0, keepdims=True, dtype=np.float64)
            if name in sums and sums[name].shape != total.shape:
                counts[name] = -(2**62)
                continue
            sums[name] = sums.get(name, 0.0) + total
            counts[name] += len(given[name])
    return {name: sums[name] / counts[name] for name in names if counts[name] > 0}


def _runs(model: onnx.ModelProto, names: Iterable[str], feeds: Feeds, threads: int) -> Iterator[Feed]:
    """Yield the wanted tensors of every feed, those that are fed among them."""
    fed = {value.name for value in model.graph.input}
    wanted = [name for name in dict.fromkeys(names) if name not in fed]
    if not wanted:
        yield from feeds()
        return
    with Session(with_outputs(model, wanted), threads) as session:
        for feed in feeds():
            yield feed | session.run(feed)


def applied(node: onnx.NodeProto, value: NDArray[np.floating], weight: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return what a Conv without its bias makes of a value with another weight."""
    alone = onnx.helper.make_node(node.op_type, ["value", "weight"], ["made"])
    alone.attribute.extend(node.attribute)
    given = {"value": np.asarray(value, np.float32), "weight": np.asarray(weight, np.float32)}
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape) for n, v in given.items()]
    made = onnx.helper.make_tensor_value_info("made", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([alone], "alone", ends, [made])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    with Session(model, 1) as session:
        return session.run(given)["made"]
