"""Cut a model into parts that run one after the other: which nodes, what they read, and the part as a model.

What is computed from constants alone belongs to no part; its nodes are repeated in every part that reads it. Tensors
that somebody wants to see are an exception: they and what follows from them are computed like those of any input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx

from onnx_lrs.graph.model import INITIALISERS_NO_INPUTS, View
from onnx_lrs.graph.splice import outer_reads

RANDOM = ("RandomNormal", "RandomUniform")  # operators without inputs whose value is no constant
SHAPES = ("Shape", "Size")  # operators that see no value of what they read


class Cutter:
    """Knows who reads what in a model's main graph; nodes are named by their place in it.

    ``seen`` are tensors that have to be known even where they are computed from constants alone.
    """

    def __init__(self, view: View, seen: Collection[str] = ()) -> None:
        self.view = view
        graph = view.model.graph
        self._nodes = list(graph.node)
        self._makers = {name: i for i, node in enumerate(self._nodes) for name in node.output if name}
        self._reads = [outer_reads(node) for node in self._nodes]
        self._stored = {t.name: t for t in graph.initializer}
        self._sparse = {t.values.name: t for t in graph.sparse_initializer}
        self._constant = self._computed_at_load(seen)

    def _computed_at_load(self, seen: Collection[str]) -> set[int]:
        found: set[int] = set()
        for index, node in enumerate(self._nodes):  # ONNX keeps nodes in topological order
            sources = [self._makers.get(name) for name in self._reads[index] if not self._is_stored(name)]
            wanted = node.op_type in RANDOM or not set(node.output).isdisjoint(seen)
            if all(s is not None and s in found for s in sources) and not wanted:
                found.add(index)
        return found

    def _is_stored(self, name: str) -> bool:
        return name in self._stored or name in self._sparse

    def index_of(self, tensor: str) -> int:
        """Return the node that makes a tensor."""
        return self._makers[tensor]

    def is_given(self, tensor: str) -> bool:
        """Return whether a tensor is made by no node: an input of the graph."""
        return tensor not in self._makers

    def default(self, tensor: str) -> np.ndarray:
        """Return the stored value of an input that callers need not give."""
        return onnx.numpy_helper.to_array(self._stored[tensor])

    def reads(self, nodes: Iterable[int]) -> set[str]:
        """Return the computed tensors that some nodes read, those made by themselves included."""
        names = {name for node in nodes for name in self._reads[node]}
        return {name for name in names if not self._is_stored(name) and self._makers.get(name) not in self._constant}

    def makes(self, nodes: Iterable[int]) -> set[str]:
        """Return the tensors that some nodes make."""
        return {name for node in nodes for name in self._nodes[node].output if name}

    def ancestors(self, tensors: Iterable[str], done: Collection[int] = ()) -> list[int]:
        """Return the nodes that lead to some tensors, in order, less those ``done`` and what leads to them."""
        found: set[int] = set()
        waiting = [self._makers[name] for name in tensors if name in self._makers]
        while waiting:
            node = waiting.pop()
            if node in found or node in done or node in self._constant:
                continue
            found.add(node)
            waiting += [self._makers[name] for name in self._reads[node] if name in self._makers]
        return sorted(found)

    def follows_samples(self, tensor: str) -> bool:
        """Return whether a tensor depends on the values of an input, and not on constants and shapes alone."""
        done: set[str] = set()
        waiting = [tensor]
        while waiting:
            name = waiting.pop()
            if name in done or self._is_stored(name):
                continue
            done.add(name)
            if name not in self._makers:
                return True
            node = self._makers[name]
            if self._nodes[node].op_type not in SHAPES:
                waiting += self._reads[node]
        return False

    def levels(self, starts: Mapping[str, Sequence[str]], wanted: Iterable[str]) -> tuple[list[list[int]], list[int]]:
        """Divide the nodes that lead to the ``wanted`` tensors into levels, each of which some layers begin.

        Parameters
        ----------
        starts : mapping of str to sequence of str
            First output of each node that begins a level -> further tensors that must lie in lower levels.
        wanted : iterable of str
            Tensors to be reached.

        Returns
        -------
        list of list of int
            Nodes level by level, each in the graph's order; level 0 comes before every start.
        list of int
            Those of the starts, in the order of ``starts``.
        """
        known: dict[int, int] = {}
        needed = self.ancestors([*wanted, *(name for more in starts.values() for name in more)])
        more = {self._makers[name]: others for name, others in starts.items()}
        waiting = needed[::-1]
        while waiting:  # depth first: a start may wait for a node behind it in the graph's order
            node = waiting[-1]
            names = [*self._reads[node], *more.get(node, ())]
            sources = {self._makers[n] for n in names if n in self._makers} - self._constant
            missing = [s for s in sources if s not in known]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            known[node] = max((known[s] for s in sources), default=0) + (node in more)
        levels: list[list[int]] = [[] for _ in range(max(known.values(), default=0) + 1)]
        for node in sorted(known):
            levels[known[node]].append(node)
        return levels, [known[node] for node in more]

    def submodel(self, nodes: Sequence[int], fed: Mapping[str, np.ndarray], outputs: Sequence[str]) -> onnx.ModelProto:
        """Return some nodes as a model of their own.

        Parameters
        ----------
        nodes : sequence of int
            In the graph's order.
        fed : mapping of str to ndarray
            A value of every tensor that comes from outside; its dtype and number of dimensions become the input's.
        outputs : sequence of str
            The tensors it gives.
        """
        constants = self._constants_of(nodes)
        used = {name for node in (*constants, *nodes) for name in self._reads[node]}
        model = onnx.ModelProto(ir_version=max(self.view.model.ir_version, INITIALISERS_NO_INPUTS))
        model.opset_import.extend(self.view.model.opset_import)
        model.functions.extend(self.view.model.functions)
        graph = model.graph
        graph.name = "part"
        graph.node.extend(self._nodes[node] for node in (*constants, *nodes))
        graph.initializer.extend(t for name, t in self._stored.items() if name in used)
        graph.sparse_initializer.extend(t for name, t in self._sparse.items() if name in used)
        graph.input.extend(_as_input(name, value) for name, value in fed.items())
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return model

    def _constants_of(self, nodes: Iterable[int]) -> list[int]:
        found: set[int] = set()
        waiting = [self._makers[n] for node in nodes for n in self._reads[node] if n in self._makers]
        while waiting:
            node = waiting.pop()
            if node in self._constant and node not in found:
                found.add(node)
                waiting += [self._makers[n] for n in self._reads[node] if n in self._makers]
        return sorted(found)


def _as_input(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * value.ndim)
