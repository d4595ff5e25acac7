r"""Low rank + kept channels by three-block ADMM in the H-metric: another way to a support (METHODS 4).

After 3BASiL (NeurIPS 2025), with whole channels in place of entries:

.. math:: \min \|(T - L - S) H^{1/2}\|_F^2 \quad \text{s.t. rank } L \le r,\; S = D,\; D \text{ has } k \text{ channels}

with the scaled dual V and the penalty rho. Every step is closed form and the system is factorised once:

    S = R + (D - V - R) rho (H + rho I)^{-1},  R = T - L     L: rank r in the H-metric of T - S
    D: the k channels of S + V with the largest norm         V += S - D

The support it ends with goes to the closed form of spectral.py, which is exact for a given support; that is where the
two meet and where the better one is kept. The iteration is run in float32: only a set of channels is read from it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.solvers.channels import inverse_spd
from onnx_lrs.solvers.loop import Run, Step, iterate
from onnx_lrs.solvers.problem import Array, Indices, columns_of
from onnx_lrs.solvers.prox import group_norms, largest

STEPS = 20
# rho relative to the mean diagonal of H. On 64 x 576 and 1024 x 512 layers 0.003 and 0.01 wandered off, 0.1 hardly
# moved; 0.03 lowered J by up to 28 % where the elimination had taken channels that the low-rank part explains as well.
PENALTY = 0.03
TOLERANCE = 1e-3
Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class State:
    """One iterate: the low-rank part with its basis (m, r), the sparse copy D, the dual V; L, D, V are (m, d)."""

    low: Floats
    basis: Floats
    kept: Floats
    dual: Floats
    support: Indices


def propose(target: Array, metric: Array, taps: int, start: tuple[Array, Array, Indices]) -> Run[State]:
    """Return the run from an approximation of ``target``; ``run.last.support`` are the channels it proposes.

    Parameters
    ----------
    target : ndarray, shape (m, d)
        T.
    metric : ndarray, shape (d, d)
        Damped H.
    taps : int
        Columns per channel.
    start : (basis (m, r), sparse (m, d), support (k,))
        Where to begin: L is ``basis basis^T (T - S)``.
    """
    basis, sparse, support = start
    level = PENALTY * float(np.trace(metric)) / len(metric)
    pull = (inverse_spd(metric + level * np.eye(len(metric))) * level).astype(np.float32)
    weight, narrow = target.astype(np.float32), metric.astype(np.float32)

    def advance(state: State, number: int) -> tuple[State, Step]:
        rest = weight - state.low
        free = np.asarray(rest + (state.kept - state.dual - rest) @ pull, np.float32)
        low, found = _low_rank(weight - free, narrow, state.basis)
        kept, chosen = _keep(free + state.dual, len(support), taps)
        gap, size = free - kept, max(float(np.linalg.norm(kept)), 1e-30)
        left = weight - low - kept
        step = Step(
            value=float(np.vdot(left @ narrow, left)),
            primal=float(np.linalg.norm(gap)) / size,
            dual=float(np.linalg.norm(kept - state.kept)) / size,
        )
        return State(low, found, kept, state.dual + gap, chosen), step

    first = basis.astype(np.float32)
    sparse32 = sparse.astype(np.float32)
    low = first @ (first.T @ (weight - sparse32))
    begin = State(low, first, sparse32, np.zeros_like(weight), np.sort(support))
    return iterate(advance, begin, np.inf, STEPS, TOLERANCE)


def _low_rank(rest: Floats, metric: Floats, basis: Floats) -> tuple[Floats, Floats]:
    """Return the projection of ``rest`` on the basis after one step of subspace iteration on ``rest H rest^T``."""
    found, _ = np.linalg.qr(rest @ (metric @ (rest.T @ basis)))
    return found @ (found.T @ rest), found


def _keep(sparse: Floats, count: int, taps: int) -> tuple[Floats, Indices]:
    support = np.flatnonzero(largest(group_norms(sparse, taps).astype(np.float64), count))
    kept = np.zeros_like(sparse)
    columns = columns_of(support, taps)
    kept[:, columns] = sparse[:, columns]
    return kept, support
