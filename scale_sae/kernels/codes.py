"""Products of sparse codes, and the autograd functions that the TopK family is made of.

The dense pre-activations are computed outside, for the selection; the functions here say what the selected ones are to
the parameters, so that no gradient of size rows × latents ever exists. No two threads add into the same number: equal
inputs give equal bits, on GPUs too.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scale_sae import kernels
from scale_sae.kernels.rows import Collected


@dataclass
class Codes:
    """The sparse latent activations of a batch: row-major, latents ascending inside a row, no entry twice.

    Attributes:
        rows: int64 ``[nnz]``, the row of each entry.
        latents: int64 ``[nnz]``, its latent, counted from the first latent of this shard.
        values: ``[nnz]``, its activation.
        n_rows: rows of the batch.
        n_latents: latents of this shard.
    """

    rows: Tensor
    latents: Tensor
    values: Tensor
    n_rows: int
    n_latents: int

    @cached_property
    def row_offsets(self) -> Tensor:
        """int64 ``[n_rows + 1]``: the entries of row r are ``row_offsets[r]:row_offsets[r + 1]``."""
        return _offsets(self.rows, self.n_rows)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The entries in latent-major order, int64 ``[nnz]``, and where each latent's begin, ``[n_latents + 1]``."""
        latents, order = self.latents.sort(stable=True)
        return order, _offsets(latents, self.n_latents)

    @cached_property
    def rows_by_latent(self) -> Tensor:
        """int64 ``[nnz]``, the row of each entry in latent-major order."""
        return self.rows[self.by_latent[0]]

    def with_values(self, values: Tensor) -> "Codes":
        """The same entries with other values, sharing what has been worked out about their order."""
        other = copy.copy(self)
        other.values = values
        return other


def decode(codes: Codes, W: Tensor) -> Tensor:
    """``Z @ W``: codes with W ``[n_latents, d]`` to ``[n_rows, d]``."""
    return kernels.on(W).weighted_sums(codes.latents, codes.row_offsets, codes.values, W)


def scatter_rows(codes: Codes, g: Tensor) -> Tensor:
    """``Zᵀ @ g``: codes with g ``[n_rows, d]`` to ``[n_latents, d]``, 0 for a latent without entries."""
    order, offsets = codes.by_latent
    return kernels.on(g).weighted_sums(codes.rows_by_latent, offsets, codes.values[order], g)


def latent_sums(codes: Codes) -> Tensor:
    """The sum of each latent's values, ``[n_latents]``."""
    return scatter_rows(codes, codes.values.new_ones(codes.n_rows, 1)).squeeze(1)


def dot_rows(rows: Tensor, latents: Tensor, g: Tensor, W: Tensor) -> Tensor:
    """``g[rows] · W[latents]`` per entry, float32 at least, for g ``[n_rows, d]`` and W ``[n_latents, d]``."""
    return kernels.on(W).dot_rows(rows, latents, g, W)


@dataclass
class Encoder:
    """What makes pre-activations ``(x - shift) @ W_rowsᵀ + b``; shift, W_rows and b get gradients.

    Attributes:
        x: ``[n_rows, d_in]``, the input after the shift.
        shift: ``[d_in]``, or None where the input is taken as it is.
        W_rows: ``[n_latents, d_in]``.
        b: ``[n_latents]``.
        collected: takes the gradient of W_rows, in parts; None: autograd gets it, dense.
    """

    x: Tensor
    shift: Tensor | None
    W_rows: Tensor
    b: Tensor
    collected: Collected | None = None


@dataclass
class Decoder:
    """The rows ``W [n_latents, d_out]`` that latents write; ``collected`` as an encoder's."""

    W: Tensor
    collected: Collected | None = None


def encode_selected(codes: Codes, encoder: Encoder) -> Tensor:
    """The pre-activations ``codes.values`` ``[nnz]``, already computed, as a function of the encoder."""
    return _EncodeSelected.apply(codes, encoder, encoder.shift, encoder.W_rows, encoder.b)


def decode_selected(values: Tensor, codes: Codes, decoder: Decoder) -> Tensor:
    """``decode`` of the entries of codes with these values ``[nnz]``, as a function of these and the decoder."""
    return _DecodeSelected.apply(values, codes, decoder, decoder.W)


@dataclass
class Columns:
    """Activations of some latents, at most as many in each row as there are slots.

    Attributes:
        latents: int64 ``[m]``, without repeats.
        values: ``[n_rows, slots]``.
        places: int64 ``[n_rows, slots]``, which of ``latents`` each slot is of, none twice in a row; −1 where the slot
            is empty. None: slot i is of latent i.
        block_rows: rows that are made dense, ``[block_rows, m]``, at once.
    """

    latents: Tensor
    values: Tensor
    places: Tensor | None
    block_rows: int

    def dense(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows, at least one: where they are, and ``values [n_rows, slots]`` as ``[b, m]``."""
        for start in range(0, max(len(values), 1), self.block_rows):
            rows = slice(start, min(start + self.block_rows, len(values)))
            if self.places is None:
                yield rows, values[rows]
                continue
            # Empty slots all write into a column of their own, which is left out.
            block = values.new_zeros(rows.stop - rows.start, len(self.latents) + 1)
            places = self.places[rows] % (len(self.latents) + 1)
            yield rows, block.scatter_(1, places, values[rows])[:, :-1]

    def entries(self, block: Tensor, rows: slice) -> Tensor:
        """The slots ``[b, slots]`` of a block ``[b, m]``, 0 where they are empty."""
        if self.places is None:
            return block
        places = self.places[rows]
        return block.gather(1, places.clamp(min=0)).masked_fill_(places < 0, 0)


def decode_columns(columns: Columns, encoder: Encoder, decoder: Decoder) -> Tensor:
    """What columns of pre-activations, already computed, decode to: ``[n_rows, d_out]``, a function of the parameters.

    Dense products over the columns' latents: for latents of which a good part is active in every row.
    """
    return _DecodeColumns.apply(columns, encoder, decoder, encoder.shift, encoder.W_rows, encoder.b, decoder.W)


class _EncodeSelected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Codes, encoder: Encoder, shift: Tensor | None, W_rows: Tensor, b: Tensor) -> Tensor:
        ctx.codes, ctx.collected = codes, encoder.collected
        ctx.save_for_backward(encoder.x, W_rows, b)
        return codes.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_rows, b = ctx.saved_tensors
        codes = ctx.codes.with_values(grad)
        grad_b = latent_sums(codes).to(b.dtype)
        # Every row is shifted alike, so the rows' gradients are summed per latent before they meet W_enc.
        grad_shift = -(grad_b @ W_rows) if ctx.needs_input_grad[2] else None
        grad_W = _rows_gradient(codes, x, ctx.collected) if ctx.needs_input_grad[3] else None
        return None, None, grad_shift, grad_W, grad_b


class _DecodeSelected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: Codes, decoder: Decoder, W: Tensor) -> Tensor:
        ctx.codes, ctx.collected = codes, decoder.collected
        ctx.save_for_backward(values, W)
        return decode(codes.with_values(values), W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = dot_rows(ctx.codes.rows, ctx.codes.latents, grad, W)
        codes = ctx.codes.with_values(values)
        return grad_values, None, None, _rows_gradient(codes, grad, ctx.collected) if ctx.needs_input_grad[3] else None


class _DecodeColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        columns: Columns,
        encoder: Encoder,
        decoder: Decoder,
        shift: Tensor | None,
        W_rows: Tensor,
        b: Tensor,
        W: Tensor,
    ) -> Tensor:
        ctx.columns, ctx.collected = columns, (encoder.collected, decoder.collected)
        ctx.save_for_backward(encoder.x, W_rows, b, W)
        of_latents = W.index_select(0, columns.latents)
        return torch.cat([block @ of_latents for _, block in columns.dense(columns.values)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_rows, b, W = ctx.saved_tensors
        columns, latents = ctx.columns, ctx.columns.latents
        wide = torch.promote_types(W.dtype, torch.float32)
        of_latents = W.index_select(0, latents)
        grad_W = torch.zeros(of_latents.shape, dtype=wide, device=W.device)
        grad_values = torch.empty_like(columns.values)
        for rows, block in columns.dense(columns.values):
            grad_W += block.T @ grad[rows]
            grad_values[rows] = columns.entries(grad[rows] @ of_latents.T, rows)
        grad_W_rows = torch.zeros(len(latents), x.shape[1], dtype=wide, device=W.device)
        per_latent = torch.zeros(len(latents), dtype=wide, device=W.device)
        for rows, block in columns.dense(grad_values):
            grad_W_rows += block.T @ x[rows]
            per_latent += block.sum(0)
        per_latent = per_latent.to(b.dtype)
        grad_b = torch.zeros_like(b).index_copy_(0, latents, per_latent)
        grad_shift = -(per_latent @ W_rows.index_select(0, latents)) if ctx.needs_input_grad[3] else None
        found: list[Tensor | None] = []
        for place, whole, rows_of, collected in zip(
            (4, 6), (W_rows, W), (grad_W_rows, grad_W), ctx.collected, strict=True
        ):
            if not ctx.needs_input_grad[place]:
                found.append(None)
            elif collected is None:
                found.append(torch.zeros_like(whole).index_copy_(0, latents, rows_of.to(whole.dtype)))
            else:
                collected.add_rows(latents, rows_of)
                found.append(None)
        return None, None, None, grad_shift, found[0], grad_b, found[1]


def _rows_gradient(codes: Codes, table: Tensor, collected: Collected | None) -> Tensor | None:
    """The gradient ``Zᵀ @ table`` of a matrix of rows: dense, or left with ``collected``."""
    order, offsets = codes.by_latent
    if collected is not None and collected.add_entries(codes.rows_by_latent, offsets, codes.values[order], table):
        return None
    return scatter_rows(codes, table)


def _offsets(sorted_keys: Tensor, n: int) -> Tensor:
    """Where each of the keys 0..n begins in a sorted int64 list: ``[n + 1]``."""
    return torch.searchsorted(sorted_keys, torch.arange(n + 1, device=sorted_keys.device))
