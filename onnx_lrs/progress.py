"""What a long run tells while it works: stages with steps. The console draws it, a library call may ignore it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol


class Progress(Protocol):
    """Receiver of progress. Calls come from one thread, in order."""

    def stage(self, name: str, steps: int) -> None:
        """Begin the stage ``name`` of ``steps`` steps; the one before is over."""

    def step(self, label: str) -> None:
        """One step of the current stage is done; ``label`` names it (a layer, a batch)."""

    def note(self, text: str) -> None:
        """Say one plain sentence to the user."""


class Silent:
    """Progress that tells nobody."""

    def stage(self, name: str, steps: int) -> None:
        """Ignore it."""

    def step(self, label: str) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


class Pace:
    """One step for every ``every`` items, however they come grouped; ceil(items / every) steps in all."""

    def __init__(self, progress: Progress, every: int) -> None:
        self._progress = progress
        self._every = every
        self._waiting = 0

    def advance(self, items: int) -> None:
        """Count items that are done."""
        self._waiting += items
        while self._waiting >= self._every:
            self._waiting -= self._every
            self._progress.step(f"{self._every} samples")

    def finish(self) -> None:
        """Make the last step, for the rest."""
        if self._waiting:
            self._progress.step(f"{self._waiting} samples")
            self._waiting = 0


class Timer:
    """Adds up wall-clock seconds by kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Count the time of a block."""
        begun = time.perf_counter()
        yield
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - begun

    def rounded(self) -> dict[str, float]:
        """Return the seconds to the millisecond, the longest first."""
        return {kind: round(s, 3) for kind, s in sorted(self.seconds.items(), key=lambda pair: -pair[1])}


class Clock:
    """Wall-clock seconds by stage; tells the progress display as well."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._start = time.perf_counter()
        self.timer = Timer()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, count: int | None = None) -> Iterator[None]:
        """Time one stage of ``count`` steps, which its work tells; None: of one step, told here."""
        self._progress.stage(name, 1 if count is None else count)
        begun = time.perf_counter()
        yield
        if count is None:
            self._progress.step(name)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begun, 3)

    def total(self) -> dict[str, float]:
        """Return the stages and the total."""
        return self.seconds | {"total": round(time.perf_counter() - self._start, 3)}
