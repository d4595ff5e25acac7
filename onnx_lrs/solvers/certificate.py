"""What the guarantees of :mod:`ddlr` and :mod:`nettrim` say about a chain of layers (METHODS 6.5, our derivation).

For layers ``a_l = relu(W_l a_{l-1} + b_l)``, each compressed in the parallel form on the ORIGINAL network's inputs with
error at most eps_l, and relu being 1-Lipschitz, the compressed chain's error on the same columns obeys
``e_l <= eps_l + ||What_l||_2 e_{l-1}``. It holds for chains of fully connected layers followed by relu or by nothing;
not for convolutions (a column is seen by many outputs), pooling, branches, or other samples than the columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from onnx_lrs.solvers.problem import AnyFactors, Array, Solution


@dataclasses.dataclass(frozen=True)
class Link:
    """One layer of a chain: the error it may make, the one it makes on original inputs, and ``||What||_2``.

    Errors are Frobenius norms over all columns, after the activation. A layer left as it is has both errors 0.
    """

    name: str
    allowed: float
    error: float
    norm: float


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Bounds of a chain's error after its last layer: from what was allowed, and, sharper, from what was reached."""

    allowed: float
    reached: float


def link(name: str, solution: Solution, weight: Array) -> Link:
    """Return the link of a solved layer; ``weight`` (out, d) is the layer's own, which stays where factors are None.

    Raises
    ------
    ValueError
        If the solution guarantees no error (it was not asked for with ``Budget(gain=...)``, or nothing kept to it).
    """
    if solution.factors is None:
        return Link(name, 0.0, 0.0, spectral_norm(weight))
    if solution.allowed is None or solution.error is None:
        raise ValueError(f"layer {name} guarantees no error: solve it with Budget(gain=...)")
    return Link(name, solution.allowed, solution.error, norm_of(solution.factors))


def bound(links: Iterable[Link]) -> Certificate:
    """Return ``sum_l eps_l prod_{k > l} ||What_k||_2`` over the links from the first layer to the last."""
    allowed = reached = 0.0
    for item in links:
        allowed = item.allowed + item.norm * allowed
        reached = item.error + item.norm * reached
    return Certificate(allowed, reached)


def norm_of(factors: AnyFactors) -> float:
    """Return ``||What||_2`` of the matrix that factors stand for."""
    return spectral_norm(factors.dense())


def spectral_norm(weight: Array) -> float:
    """Return the largest singular value, by the smaller Gram matrix; rounded up by 1e-12 of itself."""
    size = float(np.abs(weight).max(initial=0.0))
    if size == 0.0:
        return 0.0
    scaled = weight / size
    gram = scaled @ scaled.T if len(scaled) <= scaled.shape[1] else scaled.T @ scaled
    return size * float(np.sqrt(np.linalg.eigvalsh(gram)[-1])) * (1 + 1e-12)


def chain(names: Sequence[str], solutions: Sequence[Solution], weights: Sequence[Array]) -> Certificate:
    """Return the certificate of layers in order; the shortest way from solutions to :func:`bound`."""
    return bound(link(*layer) for layer in zip(names, solutions, weights, strict=True))
