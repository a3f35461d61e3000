"""Gradients of matrices of rows that are never written out, and what Adam does with them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RowGradient:
    """The gradient of a matrix ``[n, d]`` with a latent per row, as a product of sparse factors and a few whole rows.

    Row i is ``Σ weights[e] · table[indices[e]]`` over e in ``offsets[i]:offsets[i + 1]``, plus
    ``extra_rows[extra_index[i]]`` where that index is not negative.

    Attributes:
        indices: int64 ``[nnz]``, entries in latent-major order; None, as the next three, where there are no entries.
        offsets: int64 ``[n + 1]``.
        weights: ``[nnz]``.
        table: ``[n_rows, d]``.
        extra_index: int64 ``[n]``, −1 for a latent without; None with extra_rows: row i of these is that of latent i.
        extra_rows: ``[m, d]``, or None.
    """

    indices: Tensor | None = None
    offsets: Tensor | None = None
    weights: Tensor | None = None
    table: Tensor | None = None
    extra_index: Tensor | None = None
    extra_rows: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)"""
        if self.offsets is not None and self.table is not None:
            return len(self.offsets) - 1, self.table.shape[1]
        assert self.extra_rows is not None, "a gradient without entries and rows"
        return len(self.extra_rows if self.extra_index is None else self.extra_index), self.extra_rows.shape[1]


class Collected:
    """Where a backward pass leaves the parts of one matrix's gradient, each of which comes from another product."""

    def __init__(self) -> None:
        self.found = RowGradient()
        self.rows: list[tuple[Tensor, Tensor]] = []

    def add_entries(self, indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> bool:
        """Takes a sparse part, see ``RowGradient``; False, and does not, if it already has one."""
        if self.found.table is not None:
            return False
        self.found = RowGradient(indices, offsets, weights, table)
        return True

    def add_rows(self, latents: Tensor, rows: Tensor) -> None:
        """Takes whole rows ``[m, d]`` of ``latents``, int64 ``[m]``, each of which is given once in a call."""
        self.rows.append((latents, rows))

    def take(self, n: int) -> RowGradient | None:
        """All of it, for a matrix of ``n`` rows, once; None where nothing came."""
        found, parts = self.found, self.rows
        self.found, self.rows = RowGradient(), []
        if parts:
            latents, found.extra_rows = parts[0] if len(parts) == 1 else _added(parts)
            found.extra_index = torch.full((n,), -1, dtype=torch.int64, device=latents.device)
            found.extra_index[latents] = torch.arange(len(latents), device=latents.device)
        return None if found.table is None and found.extra_rows is None else found


def _added(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(latents, rows) of several such pairs, in which a latent may come again: its rows are added, in this order."""
    unique = torch.cat([latents for latents, _ in parts]).unique()
    added = parts[0][1].new_zeros(len(unique), parts[0][1].shape[1])
    for latents, rows in parts:
        added[torch.searchsorted(unique, latents)] += rows  # none twice in a pair
    return unique, added


@dataclass(frozen=True)
class AdamStep:
    """One update by Adam (Kingma & Ba 2015) without weight decay; the scalar tensors are on the device.

    Attributes:
        step: float32, the number of this update, from 1.
        clip: the factor of every gradient.
        skip: bool, whether weights and moments stay as they are.
        eps: what is added to the root of the second moment.
        seed: 32 bits that the stochastic rounding of bfloat16 moments depends on, and nothing else.
        first: the global number of row 0: random bits depend on the seed, the global row and the column.
    """

    step: Tensor
    rate: float
    beta1: float
    beta2: float
    clip: Tensor
    skip: Tensor
    eps: float = 1e-8
    seed: int = 0
    first: int = 0
