"""What a long run tells while it works: stages with steps. The console draws it, a library call may ignore it."""

from __future__ import annotations

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
