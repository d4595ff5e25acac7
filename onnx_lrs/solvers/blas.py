"""How many threads BLAS uses: one for small matrices, where threads wait for each other longer than they work."""

from __future__ import annotations

import contextlib
import functools

from threadpoolctl import ThreadpoolController

LARGE = 1024  # rows from which a second thread pays (Cholesky and eigh on 2 cores)


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looking for the loaded libraries takes milliseconds: once


def threads_for(size: int, threads: int) -> contextlib.AbstractContextManager[object]:
    """Limit NumPy's and SciPy's BLAS while matrices of ``size`` rows are worked on; at most ``threads``."""
    limit: contextlib.AbstractContextManager[object] = _controller().limit(
        limits=threads if size >= LARGE else 1, user_api="blas"
    )
    return limit
