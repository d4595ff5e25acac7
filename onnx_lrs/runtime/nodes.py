"""What each node takes, by ONNX Runtime's own profiler."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Collection, Mapping, Sequence

import onnx

from onnx_lrs.config import Provider
from onnx_lrs.errors import ModelError
from onnx_lrs.graph.model import load
from onnx_lrs.runtime.latency import WARM_UP
from onnx_lrs.runtime.optimised import COPIES, LAYERS
from onnx_lrs.runtime.session import CPU, CUDA, PROVIDERS, Feed, Gpu, Session

KERNEL, RUN = "_kernel_time", "model_run"  # what ends the name of a node's event; the name of a call's
BODIES = {"If", "Loop", "Scan"}  # the nodes inside have events of their own


@dataclasses.dataclass(frozen=True)
class NodeTime:
    """Milliseconds a call of one node of the graph that ONNX Runtime made; ``provider`` is who ran it."""

    name: str
    op: str
    provider: str
    ms: float


@dataclasses.dataclass(frozen=True)
class Placement:
    """How many nodes of a graph on a GPU run where; ``copies`` carry tensors between GPU and CPU.

    ``on_cuda`` counts what TensorRT left to CUDA, and is None on CUDA itself.
    """

    on_cuda: int | None
    on_cpu: int
    copies: int


def profiled(
    model: onnx.ModelProto | pathlib.Path, feed: Feed, how: tuple[int, Provider, Gpu], runs: int
) -> tuple[NodeTime, ...]:
    """Run a model and return what its nodes took in ``runs`` calls after the warm-up.

    ``how`` is (threads, provider, how a GPU is used). A CUDA graph is left out: nodes cannot be told apart in one.

    Raises
    ------
    ModelError
        If ONNX Runtime fails to load or run the model.
    """
    threads, provider, gpu = how
    plain = dataclasses.replace(gpu, cuda=dataclasses.replace(gpu.cuda, cuda_graph=False))
    with tempfile.TemporaryDirectory(prefix="onnx-lrs-") as folder:
        place = pathlib.Path(folder) / "profile"
        with Session(model, threads, False, provider, gpu=plain, profile=place) as session:
            for _ in range(WARM_UP + runs):
                session.run(feed)
            return read(session.end_profile(), WARM_UP)


def node_name(node: onnx.NodeProto) -> str:
    """Return a node's name, or that of its first output where it has none."""
    return node.name or next((name for name in node.output if name), "")


def with_names(path: pathlib.Path) -> onnx.ModelProto:
    """Return the model of a file with a name for every node, by which the profile calls them."""
    model = load(path)
    for node in model.graph.node:
        node.name = node_name(node)
    return model


def read(place: pathlib.Path, skip: int) -> tuple[NodeTime, ...]:
    """Return what each node took in the calls of a profile but the first ``skip``, per call.

    A node in the body of a loop runs many times a call, one in a branch in some calls only: all its times together
    count, divided by the calls. What came behind the last call that was recorded to its end does not (ONNX Runtime
    stops at a million events).
    """
    events = json.loads(place.read_text(encoding="utf-8"))
    calls = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == RUN)[skip:]
    begun, end = calls[0][0], calls[-1][1]
    took: dict[tuple[str, str, str], float] = {}  # (name, op, number) of each node -> microseconds
    providers: dict[tuple[str, str, str], str] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(KERNEL) or not begun <= event["ts"] < end:
            continue
        args = event["args"]
        if args["op_name"] in BODIES:
            continue
        key = event["name"].removesuffix(KERNEL), args["op_name"], str(args.get("node_index", ""))
        took[key] = took.get(key, 0.0) + event["dur"]
        providers[key] = args.get("provider", CPU)
    return tuple(NodeTime(*key[:2], providers[key], us / 1e3 / len(calls)) for key, us in took.items())


def placement(kernels: Sequence[NodeTime], provider: Provider) -> Placement:
    """Return where the nodes of a graph that was given to a GPU's provider run.

    Raises
    ------
    ModelError
        If none runs on that provider.
    """
    copies = sum(kernel.op in COPIES for kernel in kernels)
    asked, by_provider = PROVIDERS[provider][0], collections.Counter(k.provider for k in kernels if k.op not in COPIES)
    if not by_provider[asked]:
        shares = "".join(f", {count} on {name}" for name, count in sorted(by_provider.items()))
        raise ModelError(
            f"--provider {provider}: 0 of {by_provider.total()} nodes run on {asked}{shares}.",
            "The times would be another provider's: leave this one out.",
        )
    return Placement(None if asked == CUDA else by_provider[CUDA], by_provider[CPU], copies)


def by_layer(kernels: Sequence[NodeTime], model: onnx.ModelProto, nodes: Mapping[str, str]) -> dict[str, float]:
    """Return what each layer took, by name, in milliseconds a call; what belongs to none counts for "".

    ``model`` is the one that was profiled, its nodes named by :func:`node_name`; ``nodes`` are those of the model that
    it was made from, name -> op. A kernel is traced back to the node that it was made of; that counts for the layer of
    its name, else, if the other model has no such node, for the layer with the longest name that its own begins with,
    as those of the parts of a compressed layer do (``conv1.left_product``).
    """
    layers = [name for name, op in nodes.items() if op in LAYERS]
    took = dict.fromkeys(["", *layers], 0.0)
    longest = sorted(layers, key=len, reverse=True)
    trace = Trace(model, {kernel.name for kernel in kernels})
    for kernel in kernels:
        source = trace.source(kernel)
        is_other = source in nodes and source not in took
        home = "" if is_other else next((layer for layer in longest if _is_of(source, layer)), "")
        took[home] += kernel.ms
    return took


def _is_of(node: str, layer: str) -> bool:
    return node == layer or (node.startswith(layer) and not node[len(layer)].isalnum())


class Trace:
    """Finds the node that a kernel of ONNX Runtime was made of by the name of the kernel.

    Those of fused nodes are called ``fused fc1`` by the first node, those in the blocked layout ``r1_nchwc`` by the
    output of the last, be it a ReLU or a sum (1.31.1).
    """

    def __init__(self, model: onnx.ModelProto, kernels: Collection[str]) -> None:
        self._nodes = {node.name: node for node in model.graph.node}
        self._makers = {output: node for node in model.graph.node for output in node.output if output}
        self._named = {_plain(name) for name in kernels}

    def source(self, kernel: NodeTime) -> str:
        """Return the name of the node, of a layer where the kernel is one; the kernel's own if none is found."""
        name = _plain(kernel.name)
        node = self._nodes.get(name) or self._makers.get(name)
        if node is None:
            return name
        if kernel.op in LAYERS and node.op_type not in LAYERS:
            return self._layer_before(node) or name
        return str(node.name)

    def _layer_before(self, node: onnx.NodeProto) -> str:
        """Return the nearest layer in front that has no kernel by its own name, as the other side of a sum has."""
        waiting, seen = collections.deque(node.input), set()
        while waiting:
            name = waiting.popleft()
            maker = self._makers.get(name)
            if maker is None or name in seen:
                continue
            seen.add(name)
            if maker.op_type not in LAYERS:
                waiting += maker.input
            elif not {maker.name, *maker.output} & self._named:
                return str(maker.name)
        return ""


def _plain(name: str) -> str:
    return name.removeprefix("fused ").removesuffix("_nchwc")
