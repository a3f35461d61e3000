"""Products of sparse codes, in plain torch, and the autograd functions that the TopK family is made of.

The dense pre-activations are computed outside, for the selection; the functions here say what the selected ones are to
the parameters, so that no gradient of size rows × latents ever exists. No two threads add into the same number: equal
inputs give equal bits, on GPUs too.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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

    def with_values(self, values: Tensor) -> "Codes":
        """The same entries with other values, sharing what has been worked out about their order."""
        other = copy.copy(self)
        other.values = values
        return other


def decode(codes: Codes, W: Tensor) -> Tensor:
    """``Z @ W``: codes with W ``[n_latents, d]`` to ``[n_rows, d]``."""
    return _weighted_sums(codes.latents, codes.row_offsets, codes.values, W)


def scatter_rows(codes: Codes, g: Tensor) -> Tensor:
    """``Zᵀ @ g``: codes with g ``[n_rows, d]`` to ``[n_latents, d]``, 0 for a latent without entries."""
    order, offsets = codes.by_latent
    return _weighted_sums(codes.rows[order], offsets, codes.values[order], g)


def dot_rows(rows: Tensor, latents: Tensor, g: Tensor, W: Tensor) -> Tensor:
    """``g[rows] · W[latents]`` per entry, ``[nnz]``, for g ``[n_rows, d]`` and W ``[n_latents, d]``."""
    # The gradient of an embedding bag by its weights is this product, and never gathers an [nnz, d].
    no_offsets = rows.new_zeros(1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(g, W, latents, no_offsets, rows, 0)


def encode_selected(codes: Codes, x: Tensor, shift: Tensor | None, W_enc_rows: Tensor, b_enc: Tensor) -> Tensor:
    """The selected entries of ``(x - shift) @ W_enc_rowsᵀ + b_enc``, with gradients for shift, W_enc_rows and b_enc.

    Args:
        codes: the selected entries; ``values`` holds the pre-activations, already computed.
        x: ``[n_rows, d_in]``, the input after the shift; it gets no gradient.
        shift: ``[d_in]``, or None where the input is taken as it is.
        W_enc_rows: ``[n_latents, d_in]``.
        b_enc: ``[n_latents]``.

    Returns:
        ``codes.values`` ``[nnz]`` as a function of the parameters.
    """
    return _EncodeSelected.apply(codes, x, shift, W_enc_rows, b_enc)


def decode_selected(values: Tensor, codes: Codes, W_dec: Tensor) -> Tensor:
    """``decode`` of the entries of codes with these values ``[nnz]``, with gradients for values and W_dec."""
    return _DecodeSelected.apply(values, codes, W_dec)


def encode_latents(
    pre: Tensor, latents: Tensor, x: Tensor, shift: Tensor | None, W_enc_rows: Tensor, b_enc: Tensor
) -> Tensor:
    """Some latents' columns of ``(x - shift) @ W_enc_rowsᵀ + b_enc``, with gradients for shift, W_enc_rows and b_enc.

    Args:
        pre: ``[n_rows, m]``, these columns, already computed.
        latents: int64 ``[m]``, without repeats.
        x, shift, W_enc_rows, b_enc: see ``encode_selected``.

    Returns:
        ``pre`` as a function of the parameters.
    """
    return _EncodeLatents.apply(pre, latents, x, shift, W_enc_rows, b_enc)


def encode_dense(x: Tensor, shift: Tensor | None, W_enc_rows: Tensor, b_enc: Tensor) -> Tensor:
    """``(x - shift) @ W_enc_rowsᵀ + b_enc``, ``[n_rows, n_latents]``, with gradients for shift, W_enc_rows and b_enc.

    Arguments as ``encode_selected``: x is the input after the shift.
    """
    return _EncodeDense.apply(x, shift, W_enc_rows, b_enc)


class _EncodeSelected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Codes, x: Tensor, shift: Tensor | None, W_enc_rows: Tensor, b_enc: Tensor) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(x, W_enc_rows)
        return codes.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc_rows = ctx.saved_tensors
        codes = ctx.codes.with_values(grad)
        grad_b = scatter_rows(codes, grad.new_ones(codes.n_rows, 1)).squeeze(1)
        # Every row is shifted alike, so the rows' gradients are summed per latent before they meet W_enc.
        grad_shift = -(grad_b @ W_enc_rows) if ctx.needs_input_grad[2] else None
        return None, None, grad_shift, scatter_rows(codes, x), grad_b


class _EncodeDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor | None, W_enc_rows: Tensor, b_enc: Tensor) -> Tensor:
        ctx.save_for_backward(x, W_enc_rows)
        return F.linear(x, W_enc_rows, b_enc)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc_rows = ctx.saved_tensors
        per_latent = grad.sum(0)
        grad_shift = -(per_latent @ W_enc_rows) if ctx.needs_input_grad[1] else None
        return None, grad_shift, grad.T @ x, per_latent


class _EncodeLatents(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, latents: Tensor, x: Tensor, shift: Tensor | None, W_enc_rows: Tensor, b_enc: Tensor
    ) -> Tensor:
        ctx.save_for_backward(latents, x, W_enc_rows, b_enc)
        return pre.view_as(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latents, x, W_enc_rows, b_enc = ctx.saved_tensors
        per_latent = grad.sum(0)
        grad_W = torch.zeros_like(W_enc_rows).index_copy_(0, latents, grad.T @ x)
        grad_b = torch.zeros_like(b_enc).index_copy_(0, latents, per_latent)
        grad_shift = -(per_latent @ W_enc_rows[latents]) if ctx.needs_input_grad[3] else None
        return None, None, None, grad_shift, grad_W, grad_b


class _DecodeSelected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: Codes, W_dec: Tensor) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(values, W_dec)
        return decode(codes.with_values(values), W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        grad_values = dot_rows(ctx.codes.rows, ctx.codes.latents, grad, W_dec)
        return grad_values, None, scatter_rows(ctx.codes.with_values(values), grad)


def _offsets(sorted_keys: Tensor, n: int) -> Tensor:
    """Where each of the keys 0..n begins in a sorted int64 list: ``[n + 1]``."""
    return torch.searchsorted(sorted_keys, torch.arange(n + 1, device=sorted_keys.device))


def _weighted_sums(indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Row i of the result is the sum of ``weights[e] * table[indices[e]]`` over e in ``offsets[i]:offsets[i + 1]``."""
    return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
