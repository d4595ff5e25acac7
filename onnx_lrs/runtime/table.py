"""Measured latencies of layers, kept on disk: each shape is timed once a device, not once a run.

A layer in a small graph (graph/small.py) is known by a text, its candidates by another. What is kept of a candidate is
its time relative to the dense layer's, both measured in turn, so that an entry of a busy day serves on a quiet one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Collection
from typing import Any

from onnx_lrs.errors import ConfigError, OutputError
from onnx_lrs.report.environment import accelerators, processor
from onnx_lrs.runtime.session import runtime
from onnx_lrs.work import replacing

FORMAT = 1
IDENTITY = ("model name", "cpu family", "model", "stepping", "Hardware", "CPU part")  # of a processor, in /proc/cpuinfo


@dataclasses.dataclass(frozen=True)
class Device:
    """What measured latencies hold for."""

    provider: str
    name: str
    onnxruntime: str
    threads: int
    precision: str = "float32"

    @classmethod
    def here(cls, provider: str, threads: int, precision: str = "float32") -> Device:
        """Return this machine with a provider of ONNX Runtime; ``precision`` is that of what is timed."""
        cpu = processor(IDENTITY)
        name = cpu if provider == "cpu" else f"{cpu}, {accelerators()}"
        return cls(provider, name, str(runtime().__version__), threads, precision)

    @property
    def key(self) -> str:
        """A short text that is equal for equal devices."""
        told = dataclasses.asdict(self)
        if self.precision == "float32":
            del told["precision"]  # tables of before there were others keep their place
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        kind = "" if self.precision == "float32" else f" {self.precision}"
        return f"{self.name}, {self.provider}{kind}, {self.threads} threads, ONNX Runtime {self.onnxruntime}"


@dataclasses.dataclass
class Entry:
    """What is known of one layer: the dense one's milliseconds, and each candidate's time relative to that."""

    dense_ms: float
    ratios: dict[str, float]


class Table:
    """Latencies of one device: layers by key, whole models by digest and batch.

    Parameters
    ----------
    device : Device
        What they were measured on.
    place : path, optional
        The file they are kept in; None: in memory only.
    """

    def __init__(self, device: Device, place: pathlib.Path | None = None) -> None:
        self.device = device
        self.layers: dict[str, Entry] = {}
        self.models: dict[str, float] = {}
        self._place = place

    @classmethod
    def cached(cls, device: Device) -> Table:
        """Return the table that this user's cache folder holds for a device; a damaged one is begun anew."""
        import platformdirs

        folder = platformdirs.user_cache_path("onnx-lrs", appauthor=False) / "latency"
        table = cls(device, folder / f"{device.key}.json")
        try:
            table._take(json.loads(table._place.read_text(encoding="utf-8")))  # type: ignore[union-attr]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            table.layers, table.models = {}, {}
        return table

    @classmethod
    def read(cls, place: pathlib.Path) -> Table:
        """Return a table from a file that :meth:`write` made.

        Raises
        ------
        ConfigError
            If the file cannot be read or is no such table.
        """
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
            table = cls(Device(**content["device"]))
            table._take(content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"--latency-table {place} is no table of latencies: {error}.",
                "Make it on the target device: onnx-lrs MODEL --data DATA --latency 0.5 --dry-run --latency-table FILE "
                "(a file that does not exist yet).",
            ) from None
        return table

    def _take(self, content: dict[str, Any]) -> None:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']} instead of {FORMAT}")
        self.layers = {
            key: Entry(float(e["dense_ms"]), {k: float(v) for k, v in e["ratios"].items()})
            for key, e in content["layers"].items()
        }
        self.models = {key: float(ms) for key, ms in content["models"].items()}
        numbers = [*self.models.values(), *(e.dense_ms for e in self.layers.values())]
        numbers += [ratio for e in self.layers.values() for ratio in e.ratios.values()]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("a latency that is not a positive number")

    def keep(self) -> None:
        """Write the table to its file; a cache that cannot be written is no error.

        What another run has put there meanwhile stays.
        """
        if self._place is None:
            return
        with contextlib.suppress(OSError, OutputError):
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._join_what_was_kept()
            self.write(self._place)

    def _join_what_was_kept(self) -> None:
        assert self._place is not None
        other = Table(self.device)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            other._take(json.loads(self._place.read_text(encoding="utf-8")))
        self.models = other.models | self.models
        for key, entry in other.layers.items():
            own = self.layers.setdefault(key, entry)
            own.ratios = entry.ratios | own.ratios

    def part(self, layers: Collection[str], models: Collection[str]) -> Table:
        """Return what the table knows of some layers and models, by key: what one run needs and no other told it."""
        found = Table(self.device)
        found.layers = {key: entry for key, entry in self.layers.items() if key in layers}
        found.models = {key: ms for key, ms in self.models.items() if key in models}
        return found

    def write(self, place: pathlib.Path) -> None:
        """Write the table to a file, in one piece.

        Raises
        ------
        OutputError
            If that is not possible.
        """
        content = {
            "format": FORMAT,
            "device": dataclasses.asdict(self.device),
            "models": self.models,
            "layers": {key: dataclasses.asdict(entry) for key, entry in self.layers.items()},
        }
        try:
            with replacing(place) as file:
                file.write(json.dumps(content, sort_keys=True, indent=1).encode())
        except OSError as error:
            raise OutputError(
                f"The latencies cannot be written to {place}: {error.strerror or error}.", "Choose another file."
            ) from None
