"""A network's activations at a cut of its graph: all samples advance together, part by part (METHODS 8).

Only the tensors that later parts read are kept (calibration/store.py), so a whole pass costs one forward run of the
samples, however many cuts it makes. A second network that differs from some layer on reads from the first one what is
equal in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.calibration.store import Store
from onnx_lrs.data import Samples, batches
from onnx_lrs.graph.segments import Cutter
from onnx_lrs.progress import Timer
from onnx_lrs.runtime.session import Feed, Session


@dataclasses.dataclass(frozen=True)
class Call:
    """The samples of one inference call and the role they play."""

    role: str
    items: NDArray[np.int64]


def calls_of(
    samples: Samples, roles: Sequence[tuple[str, NDArray[np.int64]]], size: int, dynamic: bool
) -> Iterator[tuple[Call, Feed]]:
    """Yield every inference call of some roles with its feed."""
    for role, items in roles:
        for indices, feed in batches(samples, items, size, dynamic):
            yield Call(role, indices), feed


class Frontier:
    """The live tensors of one network, for every call."""

    def __init__(self, cutter: Cutter, store: Store, threads: int, timer: Timer, base: Frontier | None = None) -> None:
        self._cutter = cutter
        self._store = store
        self._threads = threads
        self._timer = timer
        self._base = base
        self.count: int = 0 if base is None else base.count

    def begin(self, feeds: Iterator[Feed], inputs: Collection[str]) -> None:
        """Take in the graph inputs that are read anywhere, call by call; those not in a feed have defaults."""
        defaults: Feed = {}
        for feed in feeds:
            for name in inputs:
                if name not in feed and name not in defaults:
                    defaults[name] = self._cutter.default(name)
                self._store.put(self._key(name), self.count, feed[name] if name in feed else defaults[name])
            self.count += 1

    def _key(self, name: str) -> tuple[int, str]:
        return id(self), name

    def value(self, name: str, call: int) -> NDArray[np.generic]:
        """Return a live tensor of this network for one call."""
        if self._key(name) in self._store or self._base is None:
            return self._store.get(self._key(name), call)
        return self._base.value(name, call)

    def has(self, name: str) -> bool:
        """Return whether a tensor is live in this network itself."""
        return self._key(name) in self._store

    def advance(
        self,
        nodes: Sequence[int],
        keep: Collection[str],
        also: Collection[str] = (),
        change: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
    ) -> Iterator[tuple[int, Feed]]:
        """Run some nodes for every call; keep what they make of ``keep`` and yield what they make of ``also``.

        ``change`` takes the nodes as a model and returns what computes the same tensors in another way.
        """
        made = self._cutter.makes(nodes)
        outputs = sorted(made & {*keep, *also})
        if not outputs:
            yield from ((call, {}) for call in range(self.count))
            return
        fed = sorted(self._cutter.reads(nodes) - made)
        model = self._cutter.submodel(nodes, {name: self.value(name, 0) for name in fed}, outputs)
        if change is not None:
            model = change(model)
        with Session(model, self._threads) as session:
            for call in range(self.count):
                with self._timer.of("forward"):
                    found = session.run({name: self.value(name, call) for name in fed}, outputs)
                    for name in outputs:
                        if name in keep:
                            self._store.put(self._key(name), call, found[name])
                yield call, {name: found[name] for name in also if name in found}

    def release(self, keep: Collection[str]) -> None:
        """Drop every live tensor of this network that is not in ``keep``."""
        for owner, name in [key for key in self._store.names() if isinstance(key, tuple)]:
            if owner == id(self) and name not in keep:
                self._store.drop((owner, name))
