"""The kernels in plain torch: what they mean, and what runs where no faster twin exists.

Wide stands for the type that sums are made in: that of the data, but float32 at least.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_sae.kernels.rows import AdamStep, RowGradient

_BLOCK_BYTES = 2**22  # of a gradient's rows that exist at once: they stay in a core's cache between two passes


def weighted_sums(
    indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Row i of the result is ``Σ weights[e] · table[indices[e]]`` over e in ``offsets[i]:offsets[i + 1]``.

    Args:
        indices: int64 ``[nnz]``.
        offsets: int64 ``[n + 1]``, ascending from 0 to nnz.
        weights: ``[nnz]``.
        table: ``[m, d]``.
        dtype: of the result; None: the table's.

    Returns:
        ``[n, d]``.
    """
    dtype = table.dtype if dtype is None else dtype
    table = table.to(torch.promote_types(table.dtype, dtype))
    sums = F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )
    return sums.to(dtype)


def dot_rows(rows: Tensor, latents: Tensor, g: Tensor, W: Tensor) -> Tensor:
    """``g[rows] · W[latents]`` per entry, wide ``[nnz]``, for g ``[n_rows, d]`` and W ``[n_latents, d]``.

    Rounded to the precision of g on the way.
    """
    # The gradient of an embedding bag by its weights is this product, and never gathers an [nnz, d].
    no_offsets = rows.new_zeros(1)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(g, W, latents, no_offsets, rows, 0)
    return dots.to(_wide(dots.dtype))


def row_squares(gradient: RowGradient) -> Tensor:
    """The squared norm of each row of a gradient ``[n, d]``: wide ``[n]``."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1).square_() for _, rows in _blocks(gradient)])


def dense_rows(gradient: RowGradient) -> Tensor:
    """A gradient written out, wide ``[n, d]``."""
    return torch.cat([rows for _, rows in _blocks(gradient)])


def adam_rows(
    gradient: RowGradient,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    update: AdamStep,
    follower: Tensor | None = None,
) -> None:
    """Adam's update of a matrix in place, exactly as with a dense gradient: rows without entries forget their moments.

    Args:
        gradient: of ``weight``, before clipping.
        weight: ``[n, d]``, wide.
        exp_avg, exp_avg_sq: ``[n, d]``, wide, or bfloat16: then rounded stochastically.
        update: the rate and the other constants.
        follower: ``[n, d]``, takes the new weights, rounded to its type.
    """
    found_inf = update.skip.to(torch.float32)
    rounded = exp_avg.dtype != weight.dtype
    for part, rows in _blocks(gradient):
        moments = [exp_avg[part], exp_avg_sq[part]]
        if rounded:
            moments = [moment.to(weight.dtype) for moment in moments]
        torch._fused_adam_(
            [weight[part]],
            [rows.mul_(update.clip)],
            [moments[0]],
            [moments[1]],
            [],
            [update.step],
            lr=update.rate,
            beta1=update.beta1,
            beta2=update.beta2,
            weight_decay=0.0,
            eps=update.eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
        if rounded:
            seeds = update.seed, int(_mix(torch.tensor(update.seed ^ 0x9E3779B9)))
            for stored, moment, seed in zip((exp_avg, exp_avg_sq), moments, seeds, strict=True):
                stored[part] = round_stochastically(moment.float(), seed, update.first + part.start)
        if follower is not None:
            follower[part] = weight[part]


def score_maxima(scores: Tensor, scale: Tensor | None, bias: Tensor | None, width: int, magnitude: bool) -> Tensor:
    """Scales scores in place and finds the largest of each ``width`` neighbours.

    Args:
        scores: ``[b, n]``; becomes ``scores · scale + bias``.
        scale, bias: ``[n]``, or None for 1 and 0.
        width: divides n.
        magnitude: compare absolute values.

    Returns:
        ``[b, n / width]``, NaN where one of the neighbours is not finite.
    """
    best = scores.new_empty(len(scores), scores.shape[1] // width)
    step = max(1, _BLOCK_BYTES // max(scores.shape[1] * scores.itemsize, 1))
    for part, found in zip(scores.split(step), best.split(step), strict=True):
        if scale is not None:
            torch.addcmul(scores.new_zeros(1) if bias is None else bias, part, scale, out=part)
        elif bias is not None:
            part.add_(bias)
        if width == 1:
            high = low = part
        else:
            neighbours = part.unflatten(1, (found.shape[1], width))
            high, low = neighbours.amax(2), neighbours.amin(2)
        finite = (high - high) + (low - low)  # 0, or NaN
        torch.add(torch.maximum(high, -low) if magnitude else high, finite, out=found)
    return best


def round_stochastically(x: Tensor, seed: int, first: int) -> Tensor:
    """float32 ``[n, d]`` rounded to bfloat16, up with the probability that makes the mean exact.

    The bits that decide depend on the seed, the global row (``first`` is that of row 0) and the column.
    """
    n, d = x.shape
    place = torch.arange(first * d, (first + n) * d, device=x.device).view(n, d)
    bits = _mix((place & 0xFFFFFFFF) ^ _mix((place >> 32) ^ seed))
    rounded = (x.view(torch.int32).long() + (bits & 0xFFFF)) & ~0xFFFF
    return rounded.to(torch.int32).view(torch.float32).to(torch.bfloat16)


def _mix(h: Tensor) -> Tensor:
    """A hash of 32 bits in an int64, as good as random: lowbias32 (Wellons 2018, "Prospecting for Hash Functions")."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & 0xFFFFFFFF
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _blocks(gradient: RowGradient) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a gradient, block by block: where they are, and wide ``[b, d]`` for the caller to change."""
    n, d = gradient.shape
    source = gradient.extra_rows if gradient.table is None else gradient.table
    assert source is not None
    wide = _wide(source.dtype)
    step = max(1, _BLOCK_BYTES // (d * wide.itemsize))
    starts = range(0, n, step)
    ends = [min(start + step, n) for start in starts]
    bounds = [] if gradient.offsets is None else gradient.offsets[[0, *ends]].tolist()
    table = None if gradient.table is None else gradient.table.to(wide)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        part = slice(start, end)
        yield part, _rows(gradient, part, table, bounds[number : number + 2], wide)


def _rows(gradient: RowGradient, part: slice, table: Tensor | None, entries: list[int], wide: torch.dtype) -> Tensor:
    """Some rows of a gradient, wide; ``entries``: the first of theirs and the one after the last."""
    extra, index = gradient.extra_rows, gradient.extra_index
    if table is None:
        assert extra is not None
        if index is None:
            return extra[part].to(wide, copy=True)
        rows = extra.new_zeros(part.stop - part.start, extra.shape[1], dtype=wide)
    else:
        assert gradient.indices is not None and gradient.weights is not None and gradient.offsets is not None
        first, last = entries
        offsets = gradient.offsets[part.start : part.stop + 1] - first
        rows = weighted_sums(gradient.indices[first:last], offsets, gradient.weights[first:last], table)
    if extra is not None:
        if index is None:
            rows += extra[part]
        else:
            places = (index[part] >= 0).nonzero().squeeze(1)
            rows[places] += extra[index[part][places]].to(wide)
    return rows
