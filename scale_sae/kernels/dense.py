"""The entries of ``[n_rows, n_latents]`` that a step computes on: all of them, or the few that are not 0.

An activation that depends on one pre-activation alone is 0 at most entries once training has gone on for a while. The
same formulas then run on a vector of the others: values at all entries are ``[n_rows, n_latents]``, at some ``[nnz]``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scale_sae.kernels import workspace
from scale_sae.kernels.codes import Codes, Decoder, Encoder, decode_selected, encode_selected, latent_sums

# By type of device: the share of entries that count above which dense products of all take less time. For CPUs measured
# on whole steps in float32: for rows of 512 the sparse one still took 0.8 of the time at 0.1; for rows of 1536 they met
# between 0.05 and 0.1. For GPUs an estimate: each product of a code fetches a row, which per column is 4 bytes at
# 4 TB/s where a dense product takes 2 operations at 400 TFLOP/s (in bfloat16 half the bytes and twice the operations).
DENSE_ABOVE = {"cpu": 0.06, "cuda": 0.005}


class Entries(Protocol):
    """Some entries of ``[n_rows, n_latents]``, or all, and what formulas need beside elementwise operations."""

    def encode(self, encoder: Encoder) -> Tensor:
        """The pre-activations of the entries, already computed, as a function of the encoder."""

    def of_latents(self, vector: Tensor) -> Tensor:
        """``vector [n_latents]`` in a shape that goes with the entries' values."""

    def row_sums(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum of each row's values; with weights ``[n_latents]``, of values times their latent's.

        ``[n_rows]`` in float32 at least, whatever the entries: shards add theirs up, and each chose its own. With
        weights, the sums of all entries are a product in the values' dtype: each is rounded to it once (bfloat16: by
        2^-8 of itself at most).
        """

    def decode(self, values: Tensor, W: Tensor) -> Tensor:
        """``[n_rows, d]``: the sum of each row's values times the rows ``W [n_latents, d]`` of their latents."""


@dataclass
class AllEntries:
    """Every entry; ``pre [n_rows, n_latents]`` holds the pre-activations."""

    pre: Tensor

    def encode(self, encoder: Encoder) -> Tensor:
        return encode_dense(encoder, self.pre)

    def of_latents(self, vector: Tensor) -> Tensor:
        return vector

    def row_sums(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(values.dtype, torch.float32)
        return values.sum(dim=-1, dtype=wide) if weights is None else (values @ weights).to(wide)

    def decode(self, values: Tensor, W: Tensor) -> Tensor:
        return values @ W


@dataclass
class SomeEntries:
    """The entries of codes, whose values are the pre-activations. At all others activations and gradients are 0."""

    codes: Codes

    def encode(self, encoder: Encoder) -> Tensor:
        return encode_selected(self.codes, encoder)

    def of_latents(self, vector: Tensor) -> Tensor:
        return _OfLatents.apply(vector, self.codes)

    def row_sums(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        weights = values.new_ones(self.codes.n_latents) if weights is None else weights.to(values.dtype)
        return self.decode(values, weights[:, None]).squeeze(1)

    def decode(self, values: Tensor, W: Tensor) -> Tensor:
        return decode_selected(values, self.codes, Decoder(W))

    def active(self, values: Tensor) -> Codes:
        """The entries whose ``values`` are not 0, with these values and without gradient."""
        values = values.detach()
        kept = values != 0
        if kept.all():
            return self.codes.with_values(values)
        codes = self.codes
        return Codes(codes.rows[kept], codes.latents[kept], values[kept], codes.n_rows, codes.n_latents)


def choose_entries(encoder: Encoder, block_rows: int, counts: Callable[[Tensor], Tensor]) -> AllEntries | SomeEntries:
    """The entries that count, or all, whichever takes less time. Each block of rows waits for the device.

    Args:
        encoder: makes the pre-activations.
        block_rows: how many rows of them are made at once, as long as not all entries are chosen.
        counts: pre-activations ``[b, n_latents]`` to a bool of that shape, True at least where an activation or the
            gradient of a pre-activation is not 0.
    """
    x, n_rows, n_latents = encoder.x, len(encoder.x), len(encoder.W_rows)
    most = DENSE_ABOVE[x.device.type] * n_rows * n_latents
    wide = torch.promote_types(encoder.W_rows.dtype, torch.float32)
    places, values, found = [], [], 0
    with torch.no_grad():
        blocks = x.split(block_rows)
        buffer = workspace.take(len(blocks[0]), n_latents, encoder.W_rows.dtype, x.device)
        for number, rows in enumerate(blocks):
            pre = torch.addmm(encoder.b, rows, encoder.W_rows.T, out=buffer[: len(rows)])
            chosen = counts(pre).view(-1)
            found += int(chosen.count_nonzero())
            if found > most:
                return AllEntries(pre.clone() if len(rows) == n_rows else F.linear(x, encoder.W_rows, encoder.b))
            of_block = chosen.nonzero().squeeze(1)
            places.append(of_block + number * block_rows * n_latents)
            values.append(pre.view(-1)[of_block])
        place = torch.cat(places)
        row = place // n_latents
        return SomeEntries(Codes(row, place - row * n_latents, torch.cat(values).to(wide), n_rows, n_latents))


def encode_dense(encoder: Encoder, pre: Tensor | None = None) -> Tensor:
    """``[n_rows, n_latents]``: what the encoder makes, as a function of it; ``pre`` if that is already computed."""
    if pre is None:
        with torch.no_grad():
            pre = F.linear(encoder.x, encoder.W_rows, encoder.b)
    return _EncodeDense.apply(pre, encoder.x, encoder.shift, encoder.W_rows, encoder.b)


class _EncodeDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, x: Tensor, shift: Tensor | None, W_rows: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, W_rows)
        return pre.view_as(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_rows = ctx.saved_tensors
        per_latent = grad.sum(0)
        # Every row is shifted alike, so the rows' gradients are summed per latent before they meet W_enc.
        grad_shift = -(per_latent @ W_rows) if ctx.needs_input_grad[2] else None
        return None, None, grad_shift, grad.T @ x, per_latent


class _OfLatents(torch.autograd.Function):
    """``vector[latents]`` of codes, with a gradient that adds in a fixed order on GPUs too."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, codes: Codes) -> Tensor:
        ctx.codes = codes
        return vector[codes.latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return latent_sums(ctx.codes.with_values(grad)), None
