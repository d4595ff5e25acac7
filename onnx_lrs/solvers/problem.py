r"""The seam of the arrays wing: what a solver gets, what it may spend, what it gives back.

Notation (METHODS of the project, section 0): a layer is ``y = W x + b`` with W ``(out, d)``, ``d = channels * taps``,
columns ordered channel by channel. An approximation is ``E = left @ right + S`` with S zero outside the kept channels.

The one objective of every linear solver is the centred output error

.. math:: J(E) = \mathrm{E}\,\|(W - E)(x - \mathrm{mean}\,x)\|^2 = \mathrm{tr}\,(W - E) H (W - E)^T

with H the covariance of x, or, where no bias may be added, the same with the second moment about zero.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from onnx_lrs.solvers.activation import LINEAR, Activation, named
from onnx_lrs.solvers.moments import Moments

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
T = TypeVar("T")
Structure = Literal["channels", "elements"]
LARGEST = 0.95  # of the dense layer: a candidate that saves less is not worth a second branch


class Status(enum.Enum):
    """How a solve ended; the value is the sentence shown to the user: cause, then remedy."""

    SOLVED = "solved"
    INFEASIBLE = "the budget is smaller than the smallest factorisation; allow more parameters or leave the layer dense"
    DENSE = "the budget admits the layer as it is; nothing to factorise"
    NOT_FINITE = "the weight, the statistics or the columns hold values that are not finite; mend the model or the data"
    SINGULAR = (
        "fewer columns than features, so the moments are singular and damping decides; give more calibration data"
    )
    RANK_TOO_LARGE = "the matrix has less rank than was asked for; the largest useful rank was used"
    ERROR_TOO_SMALL = "no matrix keeps to the allowed error on these columns; raise the gain"
    NOT_CONVERGED = "the step limit came before the tolerance; the best feasible iterate was kept; allow more steps"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Sampled columns of a layer, for what second moments cannot express (the activation).

    ``inputs`` (n, d) float32, in an order that is random with respect to the data. ``outputs`` (n, out) float32 is what
    the layer should give before its activation; None stands for ``W x + b`` (inputs of the original network).
    ``offset`` (n, out) float32 is what the graph adds to the layer's output before the activation (a shortcut or a
    shift); None stands for nothing.
    """

    inputs: NDArray[np.float32]
    outputs: NDArray[np.float32] | None = None
    offset: NDArray[np.float32] | None = None


@dataclasses.dataclass(frozen=True)
class Response:
    """What the layer should give for the columns of the moments, before its activation.

    ``mean`` (out,) with the bias inside, ``cross`` (out, d) the covariance of the response with the columns; float64.
    """

    mean: Array
    cross: Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer to approximate.

    Parameters
    ----------
    weight : ndarray, shape (out, d)
        The layer's matrix W, ``d = channels * taps``, channel-major; kept as float64.
    taps : int
        Columns that belong to one input channel (kernel positions of a convolution, 1 for a matrix product).
    moments : Moments or None
        Statistics the fit uses; None stands for the identity (weights only).
    validation : Moments or None
        Statistics of other samples, which choose between candidates; None: those of the fit.
    affine : bool
        True if a bias may absorb the mean, so that only deviations from the mean count.
    kernel : (int, int) or None
        Height and width of a 2-D kernel, for the spatial form.
    width : int or None
        Columns of the layer when ``weight`` stands for it in a smaller space; costs are counted with it.
    bias : ndarray, shape (out,), or None
        The layer's bias b; matters only where an activation follows.
    activation : Activation
        What follows the layer, phi; the names "linear" and "relu" do as well. Its argument is
        ``u = scale * (W x + b) + offset`` with the offset of the columns.
    columns, checks : Columns or None
        Sampled columns to fit on, and others that choose between iterates.
    scale : ndarray, shape (out,), or None
        What the graph multiplies the layer's output by before the activation; None stands for 1.
    response : Response or None
        What the layer should give where that is not ``W x + b``: behind layers that are already compressed.
    """

    weight: Array
    taps: int = 1
    moments: Moments | None = None
    validation: Moments | None = None
    affine: bool = True
    kernel: tuple[int, int] | None = None
    width: int | None = None
    bias: Array | None = None
    activation: Activation = LINEAR
    columns: Columns | None = None
    checks: Columns | None = None
    scale: Array | None = None
    response: Response | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", np.asarray(self.weight, np.float64))
        object.__setattr__(self, "activation", named(self.activation))
        if self.scale is not None:
            object.__setattr__(self, "scale", np.asarray(self.scale, np.float64))
        self._check_shapes()

    def _check_shapes(self) -> None:
        out, d = self.weight.shape
        if d % self.taps:
            raise ValueError(f"{d} columns are no multiple of {self.taps} taps")
        for m in (self.moments, self.validation):
            if m is not None and m.mean.shape != (d,):
                raise ValueError(f"moments of {m.mean.shape[0]} columns for a weight of {d}")
        for sample in (self.columns, self.checks):
            if sample is None:
                continue
            n, width = sample.inputs.shape
            if width != d:
                raise ValueError(f"columns of {width} features for a weight of {d}")
            if sample.offset is not None and sample.offset.shape != (n, out):
                raise ValueError(f"offset of shape {sample.offset.shape} for {n} columns and {out} outputs")
        if self.scale is not None and self.scale.shape != (out,):
            raise ValueError(f"scale of shape {self.scale.shape} for {out} outputs")

    @property
    def finite(self) -> bool:
        """Whether weight, bias, scale, statistics and columns hold finite values only."""
        arrays: list[NDArray[Any]] = [self.weight, *(a for a in (self.bias, self.scale) if a is not None)]
        for m in (self.moments, self.validation):
            arrays += [] if m is None else [m.mean, np.diagonal(m.cov)]  # |h_ij| <= sqrt(h_ii h_jj)
        for sample in (self.columns, self.checks):
            given = () if sample is None else (sample.inputs, sample.outputs, sample.offset)
            arrays += [a for a in given if a is not None]
        return all(bool(np.isfinite(a).all()) for a in arrays)

    @property
    def out(self) -> int:
        """Number of outputs (rows of W)."""
        return int(self.weight.shape[0])

    @property
    def d(self) -> int:
        """Number of columns of W."""
        return int(self.weight.shape[1])

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return self.d // self.taps

    @property
    def rank_cost(self) -> int:
        """Parameters of one more rank."""
        return self.out + (self.width or self.d)

    @property
    def params(self) -> int:
        """Parameters of the dense layer, without the bias."""
        return self.out * (self.width or self.d)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one layer may cost, bias not counted.

    Parameters
    ----------
    params : int, optional
        Upper limit of ``rank * (out + d)`` plus the entries of S; the solver chooses the split.
    rank, channels, elements : int, optional
        The split itself: the rank together with the number of kept channels, or of single entries of S.
    gain : float, optional
        The error that is allowed, ``||phi(y) - phi(y')||_F <= gain * ||phi(y)||_F`` on the columns; the solver finds
        the smallest factors that keep to it (methods with a guarantee only).
    multiple : int
        Ranks and kept channels are multiples of it; not the rank of a guaranteed error.
    """

    params: int | None = None
    rank: int | None = None
    channels: int | None = None
    elements: int | None = None
    gain: float | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        given = {name for name in ("params", "rank", "channels", "elements", "gain") if getattr(self, name) is not None}
        if given not in ({"params"}, {"rank", "channels"}, {"rank", "elements"}, {"gain"}):
            raise ValueError("a layer budget takes params, or rank and channels, or rank and elements, or gain")
        if self.gain is not None and not 0 <= self.gain < np.inf:
            raise ValueError(f"a gain of {self.gain}: the allowed relative error must be a number from 0 up")
        if self.multiple < 1:
            raise ValueError(f"ranks and kept channels cannot be multiples of {self.multiple}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a method works, besides what it may spend.

    Parameters
    ----------
    structure : {"channels", "elements"}
        What the sparse part keeps: whole input channels, or single entries.
    steps : int, optional
        Limit of the iterations of one solve; None: the method's own.
    tolerance : float
        Relative residuals at which an iteration ends.
    seed : int
        Decides random starts.
    """

    structure: Structure = "channels"
    steps: int | None = None
    tolerance: float = 1e-4
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Factors:
    """``W ~ left @ right + S``; S holds ``sparse`` in the columns of the ``kept`` channels and is zero elsewhere.

    Shapes: left (out, rank), right (rank, d), kept (k,) sorted channel numbers, sparse (out, k * taps), float64.
    ``bias_shift`` (out,) is what the bias gains so that the mean output stays: ``(W - E) mean x``.
    """

    left: Array
    right: Array
    kept: Indices
    sparse: Array
    bias_shift: Array
    taps: int

    @property
    def rank(self) -> int:
        """Rank of the low-rank part; 0 if there is none."""
        return int(self.left.shape[1])

    @property
    def params(self) -> int:
        """Parameters, bias not counted."""
        return self.left.size + self.right.size + self.sparse.size

    def dense(self) -> Array:
        """Return E, shape (out, d)."""
        dense = self.left @ self.right
        dense[:, columns_of(self.kept, self.taps)] += self.sparse
        return dense


@dataclasses.dataclass(frozen=True)
class SpatialFactors:
    """A k x k kernel as k x 1 followed by 1 x k: ``W[o, i, a, b] ~ sum_r left[o, r, b] right[r, i, a]``.

    Shapes: left (out, rank, kw), right (rank, channels, kh), bias_shift (out,), float64.
    """

    left: Array
    right: Array
    bias_shift: Array

    form: ClassVar[str] = "spatial"

    @property
    def rank(self) -> int:
        """Number of filters between the two convolutions."""
        return self.inner

    @property
    def inner(self) -> int:
        """Number of filters of the first convolution."""
        return int(self.right.shape[0])

    @property
    def last(self) -> Array:
        """The weights of the last convolution, a row an output."""
        return self.left

    def of_outputs(self, rows: Indices) -> Self:
        """Return the factors of some of the outputs."""
        return dataclasses.replace(self, left=self.left[rows], bias_shift=self.bias_shift[rows])

    @property
    def params(self) -> int:
        """Parameters, bias not counted."""
        return self.left.size + self.right.size

    def dense(self) -> Array:
        """Return E, shape (out, d)."""
        full = np.einsum("orb,ria->oiab", self.left, self.right, optimize=True)
        return np.ascontiguousarray(full.reshape(full.shape[0], -1))


@dataclasses.dataclass(frozen=True)
class ProjectedFactors(SpatialFactors):
    """A k x k kernel as 1 x 1 followed by k x k: the spatial form of a kernel that is read as 1 x k^2.

    Shapes: left (out, rank, taps), right (rank, channels, 1), bias_shift (out,), float64.
    """

    form: ClassVar[str] = "projected"


@dataclasses.dataclass(frozen=True)
class TuckerFactors(ProjectedFactors):
    """A k x k kernel as 1 x 1, k x k, 1 x 1 (Tucker-2): the projected form, its k x k part of low rank over outputs.

    ``W[o, i, t] ~ sum_sr outer[o, s] left[s, r, t] right[r, i]``. Shapes: outer (out, rank), left (rank, inner, taps),
    right (inner, channels, 1), bias_shift (out,), float64.
    """

    outer: Array

    form: ClassVar[str] = "tucker"

    @property
    def rank(self) -> int:
        """Number of filters of the k x k convolution."""
        return int(self.outer.shape[1])

    @property
    def last(self) -> Array:
        """The weights of the last convolution, a row an output."""
        return self.outer

    def of_outputs(self, rows: Indices) -> Self:
        """Return the factors of some of the outputs."""
        return dataclasses.replace(self, outer=self.outer[rows], bias_shift=self.bias_shift[rows])

    @property
    def params(self) -> int:
        """Parameters, bias not counted."""
        return super().params + self.outer.size

    def dense(self) -> Array:
        """Return E, shape (out, d)."""
        return np.asarray(self.outer @ super().dense())


@dataclasses.dataclass(frozen=True)
class ElementFactors:
    """``W ~ left @ right + S`` with single entries in S: a smaller file at the speed of the dense layer.

    Shapes: left (out, rank), right (rank, d), float64; sparse (out, d) in CSR form; bias_shift (out,) as in Factors.
    """

    left: Array
    right: Array
    sparse: scipy.sparse.csr_array
    bias_shift: Array

    @property
    def rank(self) -> int:
        """Rank of the low-rank part; 0 if there is none."""
        return int(self.left.shape[1])

    @property
    def params(self) -> int:
        """Parameters: both factors and the entries stored, bias and indices not counted."""
        return int(self.left.size + self.right.size + self.sparse.nnz)

    def dense(self) -> Array:
        """Return E, shape (out, d)."""
        return np.asarray(self.left @ self.right + self.sparse.toarray(), np.float64)


AnyFactors = Factors | SpatialFactors | ElementFactors
CHAINS = (SpatialFactors.form, ProjectedFactors.form, TuckerFactors.form)  # of a k x k kernel


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One point of a layer's error curve.

    ``loss`` is J relative to the layer's output variance on the validation moments (ddlr and nettrim: the relative
    squared error behind the activation); ``support`` the kept channels;
    ``damping`` the share of the mean diagonal of H that was added to it; ``elements`` the single entries of S;
    ``inner`` the channels between the first two of three convolutions; ``at_outputs`` the relative squared error that
    the network's outputs are expected to have of it, None where that was not measured.
    """

    form: str
    rank: int
    params: int
    loss: float
    support: Indices
    damping: float
    elements: int = 0
    inner: int = 0
    at_outputs: float | None = None


@dataclasses.dataclass(frozen=True)
class Solution:
    """What :func:`onnx_lrs.solvers.solve` returns.

    ``objective`` is J(E), float64, on the undamped moments of the fit (of the columns where there are none);
    ``history`` what the method lowers, step by step; ``residuals`` the relative primal and dual residual of each step
    of a splitting method. Methods with a guarantee set ``allowed``, the error eps, and ``error`` <= eps, the one
    reached: both ``||phi(y) - phi(y')||_F`` over the columns.
    """

    status: Status
    factors: AnyFactors | None
    objective: float
    history: tuple[float, ...] = ()
    residuals: tuple[tuple[float, float], ...] = ()
    allowed: float | None = None
    error: float | None = None


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many of some sorted items, denser at the low end, both ends among them."""
    if len(items) <= most:
        return list(items)
    return [items[i - 1] for i in np.unique(np.round(np.geomspace(1, len(items), most)).astype(int))]


def columns_of(channels: Indices, taps: int) -> Indices:
    """Return the columns of W that belong to ``channels``, in their order; shape (len(channels) * taps,)."""
    return (np.asarray(channels, np.int64)[:, None] * taps + np.arange(taps)).ravel()


def objective(weight: Array, approximation: Array, moments: Moments | None, affine: bool = True) -> float:
    """Return J(E) in float64 on undamped moments; the squared Frobenius distance when ``moments`` is None."""
    difference = np.asarray(weight, np.float64) - approximation
    if moments is None:
        return float(np.vdot(difference, difference))
    return max(float(np.vdot(difference @ moments.second(affine), difference)), 0.0)


def judged(weight: Array, factors: AnyFactors, moments: Moments, affine: bool = True) -> float:
    """Return the relative error ||y - y'|| / ||y - mean y|| on other samples' moments (uncentred when not affine).

    The bias shift of the factors is part of y', so a shifted mean counts as an error.
    """
    difference = weight - factors.dense()
    spread = float(np.vdot(difference @ moments.cov, difference))
    offset = difference @ moments.mean - factors.bias_shift
    reference = float(np.vdot(weight @ moments.second(affine), weight))
    return float(np.sqrt(max(spread + float(offset @ offset), 0.0) / reference)) if reference > 0 else 0.0
