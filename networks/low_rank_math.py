"""The mathematics of the tools for network files: the change of a weight as a product of two thin matrices.

A LoRA changes a weight by ``alpha / rank * up @ down`` (https://arxiv.org/abs/2106.09685). Of all changes of a smaller
rank, the truncated singular value decomposition comes nearest (Eckart and Young 1936). That of a product is found from
its thin factors, so a sum of networks never becomes a dense matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

DynamicMethod = Literal["sv_ratio", "sv_fro", "sv_cumulative"]

_NOTHING: Final = 1e-6
"""A largest singular value up to this is that of a layer that was not trained."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one layer's weight, ``alpha / rank * up @ down``.

    Attributes:
        down: (r, in) of a linear layer, (r, in, k, k) of a convolution.
        up: (out, r) or (out, r, 1, 1).
        alpha: Strength times rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Columns of up, rows of down."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    def to(self, dtype: torch.dtype, device: str | None = None) -> "LowRank":
        """The same with other numbers, or elsewhere."""
        return replace(self, down=self.down.to(device, dtype), up=self.up.to(device, dtype))


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The singular value decomposition ``left @ diag(values) @ right`` of a matrix (m, n).

    Attributes:
        left: (m, k), orthonormal columns.
        values: (k,), largest first.
        right: (k, n), orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> "Decomposition":
        """That of any matrix."""
        if matrix.shape[0] >= matrix.shape[1]:
            return cls(*torch.linalg.svd(matrix, full_matrices=False))
        # Several times as fast as that of a wide matrix.
        left, values, right = torch.linalg.svd(matrix.T, full_matrices=False)
        return cls(right.T, values, left.T)

    @classmethod
    def of_product(cls, up: Tensor, down: Tensor, *, at_least: int) -> "Decomposition":
        """That of ``up @ down``, with ``at_least`` values as far as the matrix has so many (the rest are 0).

        Args:
            up: (m, r).
            down: (r, n).
            at_least: Number of values wanted.
        """
        missing = max(min(at_least, up.shape[0], down.shape[1]) - down.shape[0], 0)
        up = torch.nn.functional.pad(up, (0, missing))
        down = torch.nn.functional.pad(down, (0, 0, 0, missing))
        up_basis, up_rest = torch.linalg.qr(up)
        down_basis, down_rest = torch.linalg.qr(down.T)
        inner = cls.of_matrix(up_rest @ down_rest.T)
        return cls(up_basis @ inner.left, inner.values, inner.right @ down_basis.T)

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """``(up, down)`` of the best approximation of this rank; down is orthonormal."""
        return self.left[:, :rank] * self.values[:rank], self.right[:rank]

    def kept(self, rank: int) -> tuple[float, float]:
        """The squared Frobenius norms of the best approximation of this rank, and of the whole."""
        squares = self.values.double().square()
        return float(squares[:rank].sum()), float(squares.sum())


def exact_sum(changes: Sequence[tuple[LowRank, float]]) -> LowRank:
    """The sum of ``factor * change``, without loss: its rank is the sum of the ranks, its alpha the same.

    A factor is divided between up and down, which keeps small ones within the range of fp16.
    """
    ups, downs = [], []
    for change, factor in changes:
        strength = change.scale * factor
        half = abs(strength) ** 0.5
        ups.append(change.up * (half if strength >= 0 else -half))
        downs.append(change.down.reshape(-1, *changes[0][0].down.shape[1:]) * half)
    shape = changes[0][0].up.shape[2:]
    down, up = torch.cat(downs), torch.cat([up.flatten(1) for up in ups], dim=1)
    return LowRank(down, up.reshape(*up.shape, *shape), float(down.shape[0]))


def best_of_rank(change: LowRank, rank: int) -> tuple[LowRank, tuple[float, float]]:
    """The nearest change of this rank with alpha = rank, and the squared norms of both (:meth:`Decomposition.kept`).

    A rank above that of the change is filled up with zeros, one above the layer's own is cut to it.
    """
    found = Decomposition.of_product(change.up.flatten(1), change.down.flatten(1) * change.scale, at_least=rank)
    rank = min(rank, found.values.numel())
    up, down = found.truncated(rank)
    return shaped_like(change, up, down, alpha=float(rank)), found.kept(rank)


def shaped_like(change: LowRank, up: Tensor, down: Tensor, *, alpha: float) -> LowRank:
    """Matrices ``up`` and ``down`` in the form that the layer of ``change`` needs."""
    up = up.reshape(*up.shape, *change.up.shape[2:])
    return LowRank(down.reshape(-1, *change.down.shape[1:]), up, alpha)


def dynamic_rank(values: Tensor, method: DynamicMethod, target: float) -> int:
    """The rank that a target asks for, at least 1; one more than the smallest that reaches it.

    Args:
        values: Singular values, largest first.
        method: ``sv_ratio``: values above the largest one divided by ``target`` are kept; ``sv_cumulative``: their sum
            reaches this share; ``sv_fro``: the Frobenius norm does.
        target: The target.
    """
    if float(values[0]) <= _NOTHING:
        return 1
    if method == "sv_ratio":
        return max(int((values > values[0] / target).sum()), 1) + 1
    weights = values.double() if method == "sv_cumulative" else values.double().square()
    share = target if method == "sv_cumulative" else target**2
    reached = torch.cumsum(weights / weights.sum(), 0)
    return int(torch.searchsorted(reached, share)) + 2


def clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """``up`` and ``down`` limited to plus and minus this quantile of all their values; as they are with 1.

    A decomposition leaves the sign of each rank open. The quantile is that of the values with either sign, so it does
    not depend on the choice.
    """
    if quantile >= 1:
        return up, down
    sizes = torch.cat([up.flatten(), down.flatten()]).abs()
    # torch's own quantile takes 16 million values at the most.
    limit = float(np.quantile(sizes.cpu().numpy(), max(2 * quantile - 1, 0.0)))
    return up.clamp(-limit, limit), down.clamp(-limit, limit)


def shuffled(change: LowRank, generator: torch.Generator) -> LowRank:
    """The same change with its ranks in another order."""
    order = torch.randperm(change.rank, generator=generator).to(change.down.device)
    return replace(change, down=change.down[order], up=change.up[:, order])
