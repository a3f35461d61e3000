"""The kernels of ``plain`` in Triton, for NVIDIA GPUs: each passes over its large tensors once.

Sums are made in float32 by one program per row and tile of columns, entry after entry, without atomics, and nothing is
chosen by timing: equal inputs give equal bits. Programs run tile after tile, and inside a tile row after row, so that
the slice of a batch that entries point to (16 MiB for 8192 rows) stays in the cache while parameters stream past it. No
wrapper waits for the device. See ``plain`` for arguments that are not described.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scale_sae.kernels.rows import AdamStep, RowGradient

_TILE_BYTES = 2048  # of a table's row per program: long enough for the memory, short enough for a slice to be cached
_PER_THREAD = 4  # columns: 16 bytes of float32, so that all types of a program are laid out alike


def weighted_sums(
    indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Row i of the result ``[n, d]`` is ``Σ weights[e] · table[indices[e]]``, e in ``offsets[i]:offsets[i + 1]``.

    Moves ``nnz · d`` elements of the table, from memory where it is larger than the cache, and writes ``n · d``.
    """
    sums = table.new_empty(len(offsets) - 1, table.shape[1], dtype=dtype or table.dtype)
    entries = [part.contiguous() for part in (indices, offsets, weights, table)]
    _over_tiles(_weighted_sums, sums.shape, table, *entries, sums)
    return sums


def dot_rows(rows: Tensor, latents: Tensor, g: Tensor, W: Tensor) -> Tensor:
    """``g[rows] · W[latents]`` per entry, float32 ``[nnz]``.

    Moves ``nnz · d`` elements of W; neighbours of one row, or of one latent, share its g, or W, in the cache.
    """
    nnz, d = len(rows), g.shape[1]
    dots = torch.empty(nnz, dtype=torch.float32, device=g.device)
    block = min(512 // max(g.itemsize, W.itemsize), _at_least_16(d))  # what a warp reads at once
    together = 16  # entries of a program
    if nnz:
        g, W = g.contiguous(), W.contiguous()
        with torch.cuda.device_of(g):
            _dot_rows[(triton.cdiv(nnz, together),)](
                rows.contiguous(),
                latents.contiguous(),
                g,
                W,
                dots,
                nnz,
                d,
                ENTRIES=together,
                BLOCK=block,
                **_options(4),
            )
    return dots


def row_squares(gradient: RowGradient) -> Tensor:
    """The squared norm of each row of a gradient ``[n, d]``: float32 ``[n]``."""
    n, d = gradient.shape
    source = _source(gradient)
    squares = torch.empty(triton.cdiv(d, _tile(d, source)), n, dtype=torch.float32, device=source.device)
    _over_tiles(_row_squares, (n, d), source, *_parts(gradient), squares, n)
    return squares.sum(0)


def adam_rows(
    gradient: RowGradient,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    update: AdamStep,
    follower: Tensor | None = None,
) -> None:
    """Adam's update of a matrix in place, exactly as with a dense gradient: rows without entries forget their moments.

    Reads and writes weights, moments and follower once (26 bytes per element in float32 with a bfloat16 follower), and
    the gradient's table once per entry, mostly from the cache.
    """
    assert all(t.is_contiguous() for t in (weight, exp_avg, exp_avg_sq, follower) if t is not None)
    step = update.step.double()  # what is left of 1 in the corrections would be too coarse in float32
    rate = update.rate / (1 - update.beta1**step)
    root = (1 - update.beta2**step).rsqrt()
    _over_tiles(
        _adam_rows,
        gradient.shape,
        _source(gradient),
        *_parts(gradient),
        weight,
        exp_avg,
        exp_avg_sq,
        follower,
        rate.float(),
        root.float(),
        update.clip,
        update.skip,
        1 - update.beta1,
        update.beta2,
        1 - update.beta2,
        update.eps,
        _signed(update.seed),
        update.first,
        ROUNDED=exp_avg.dtype is torch.bfloat16,
    )


def score_maxima(scores: Tensor, scale: Tensor | None, bias: Tensor | None, width: int, magnitude: bool) -> Tensor:
    """Scales scores ``[b, n]`` in place; the largest of each ``width`` neighbours, NaN where one is not finite.

    Reads scores once, and writes them once where there is a scale or a bias.
    """
    assert scores.is_contiguous()
    b, n = scores.shape
    maxima = scores.new_empty(b, n // width)
    warps = 8
    block = warps * 32 * _PER_THREAD
    chunk = min(triton.next_power_of_2(width), block)
    groups = block // chunk
    programs = triton.cdiv(b, 4) * triton.cdiv(n // width, groups)
    if programs:
        with torch.cuda.device_of(scores):
            _score_maxima[(programs,)](
                scores,
                None if scale is None else scale.contiguous(),
                None if bias is None else bias.contiguous(),
                maxima,
                b,
                n // width,
                WIDTH=width,
                GROUPS=groups,
                CHUNK=chunk,
                MAGNITUDE=magnitude,
                **_options(warps),
            )
    return maxima


def _over_tiles(kernel: Any, shape: tuple[int, ...], source: Tensor, *arguments: Any, **constants: Any) -> None:
    """Runs one program per row and tile of columns of an ``[n, d]``; row first, so that the tiles come one by one."""
    n, d = shape
    tile = _tile(d, source)
    if n * d:
        with torch.cuda.device_of(source):
            kernel[(n, triton.cdiv(d, tile))](
                *arguments, d, **constants, BLOCK=tile, **_options(max(1, tile // 32 // _PER_THREAD))
            )


def _options(warps: int) -> dict[str, Any]:
    """How a kernel is compiled: products and sums in one rounding, which is not every version's default."""
    return {"num_warps": warps, "enable_fp_fusion": True}


def _tile(d: int, source: Tensor) -> int:
    """Columns of a program: a power of two of which few stand idle past d."""
    widest = _TILE_BYTES // source.itemsize
    tiles = [tile for tile in (widest, widest // 2, widest // 4) if triton.cdiv(d, tile) * tile * 8 <= d * 9]
    return tiles[0] if tiles else min(widest // 4, _at_least_16(d))


def _at_least_16(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def _source(gradient: RowGradient) -> Tensor:
    """What the rows of a gradient are made of."""
    source = gradient.extra_rows if gradient.table is None else gradient.table
    assert source is not None
    return source


def _parts(gradient: RowGradient) -> list[Tensor | None]:
    """The tensors of a gradient, as ``_gradient`` takes them."""
    g = gradient
    parts = (g.indices, g.offsets, g.weights, g.table, g.extra_index, g.extra_rows)
    return [None if part is None else part.contiguous() for part in parts]


def _signed(seed: int) -> int:
    """The same 32 bits as a signed number, so that every seed is of one type to the compiler."""
    return seed - 2**32 if seed >= 2**31 else seed


@triton.jit
def _below(numbers, end, condition):
    """``numbers < end`` where a condition of the whole program holds, false elsewhere."""
    return numbers < tl.where(condition, end, 0)


@triton.jit
def _entry(indices, weights, table, e, end, d, columns):
    """Weight and table's row of entry e; zeros where that is past the last."""
    index = tl.load(indices + e, mask=e < end, other=0)
    weight = tl.load(weights + e, mask=e < end, other=0).to(tl.float32)
    inside = _below(columns, d, e < end)
    return weight, tl.load(table + index * d + columns, mask=inside, other=0, eviction_policy="evict_last")


@triton.jit
def _sum_of_entries(row, indices, offsets, weights, table, d, columns, BLOCK: tl.constexpr):
    """The columns of a row's sum, added up entry by entry."""
    total = tl.zeros([BLOCK], tl.float32)
    end = tl.load(offsets + row + 1)
    for e in range(tl.load(offsets + row), end, 4):  # four at a time, so that their rows arrive together
        w0, row0 = _entry(indices, weights, table, e, end, d, columns)
        w1, row1 = _entry(indices, weights, table, e + 1, end, d, columns)
        w2, row2 = _entry(indices, weights, table, e + 2, end, d, columns)
        w3, row3 = _entry(indices, weights, table, e + 3, end, d, columns)
        total += w0 * row0.to(tl.float32)
        total += w1 * row1.to(tl.float32)
        total += w2 * row2.to(tl.float32)
        total += w3 * row3.to(tl.float32)
    return total


@triton.jit
def _gradient(row, indices, offsets, weights, table, extra_index, extra_rows, d, columns, BLOCK: tl.constexpr):
    """The columns of a gradient's row."""
    if table is None:
        total = tl.zeros([BLOCK], tl.float32)
    else:
        total = _sum_of_entries(row, indices, offsets, weights, table, d, columns, BLOCK)
    if extra_rows is not None:
        place = row
        if extra_index is not None:
            place = tl.load(extra_index + row)
        inside = _below(columns, d, place >= 0)
        total += tl.load(extra_rows + place * d + columns, mask=inside, other=0).to(tl.float32)
    return total


@triton.jit
def _weighted_sums(indices, offsets, weights, table, sums, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = _sum_of_entries(row, indices, offsets, weights, table, d, columns, BLOCK)
    tl.store(sums + row * d + columns, total, mask=columns < d)


@triton.jit
def _row_squares(
    indices,
    offsets,
    weights,
    table,
    extra_index,
    extra_rows,
    squares,
    n,
    d,
    BLOCK: tl.constexpr,
):
    """The part of a tile of columns, ``[tiles, n]``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = _gradient(row, indices, offsets, weights, table, extra_index, extra_rows, d, columns, BLOCK)
    tl.store(squares + tl.program_id(1).to(tl.int64) * n + row, tl.sum(total * total, 0))


@triton.jit(do_not_specialize=["seed", "first"])
def _adam_rows(
    indices,
    offsets,
    weights,
    table,
    extra_index,
    extra_rows,
    weight,
    exp_avg,
    exp_avg_sq,
    follower,
    rate,  # over the first moment's bias correction
    root,  # over the root of the second moment's
    clip,
    skip,
    rest1,  # 1 - beta1, not to be worked out in float32
    beta2,
    rest2,
    eps,
    seed,
    first,
    d,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = row * d + columns, columns < d
    # Asked for first, to arrive while the gradient is summed; not to push the table out of the cache.
    w = tl.load(weight + place, mask=inside, eviction_policy="evict_first").to(tl.float32)
    m = tl.load(exp_avg + place, mask=inside, eviction_policy="evict_first").to(tl.float32)
    v = tl.load(exp_avg_sq + place, mask=inside, eviction_policy="evict_first").to(tl.float32)
    g = _gradient(row, indices, offsets, weights, table, extra_index, extra_rows, d, columns, BLOCK)
    g *= tl.load(clip).to(tl.float32)

    m += rest1 * (g - m)
    v = beta2 * v + rest2 * (g * g)
    w -= tl.load(rate) * tl.div_rn(m, tl.sqrt_rn(v) * tl.load(root) + eps)

    if ROUNDED:
        seed = seed.to(tl.uint32)
        bits = (first + row) * d + columns
        m = _round_stochastically(m, bits, seed)
        v = _round_stochastically(v, bits, _mix(seed ^ 0x9E3779B9))
    inside = _below(columns, d, tl.load(skip) == 0)
    tl.store(weight + place, w, mask=inside, eviction_policy="evict_first")
    tl.store(exp_avg + place, m, mask=inside, eviction_policy="evict_first")
    tl.store(exp_avg_sq + place, v, mask=inside, eviction_policy="evict_first")
    if follower is not None:
        tl.store(follower + place, w, mask=inside, eviction_policy="evict_first")


@triton.jit
def _round_stochastically(x, place, seed):
    """float32 to bfloat16, up with the probability that makes the mean exact."""
    low, high = place.to(tl.uint32), (place >> 32).to(tl.uint32)
    bits = _mix(low ^ _mix(high ^ seed))
    rounded = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _mix(h):
    """lowbias32, as in ``plain``."""
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit(do_not_specialize=["nnz"])
def _dot_rows(rows, latents, g, W, dots, nnz, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < nnz
    row = tl.load(rows + entry, mask=there, other=0)
    latent = tl.load(latents + entry, mask=there, other=0)
    products = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < d)[None, :]
        left = tl.load(g + row[:, None] * d + column[None, :], mask=inside, other=0)
        right = tl.load(W + latent[:, None] * d + column[None, :], mask=inside, other=0)
        products += left.to(tl.float32) * right.to(tl.float32)
    tl.store(dots + entry, tl.sum(products, 1), mask=there)


@triton.jit
def _score_maxima(
    scores,
    scale,
    bias,
    maxima,
    b,
    n_groups,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """GROUPS groups of neighbours in four rows, for which scale and bias are read once; CHUNK neighbours at a time."""
    blocks = tl.cdiv(n_groups, GROUPS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * 4
    group = (tl.program_id(0) % blocks) * GROUPS + tl.arange(0, GROUPS)
    here0 = group < n_groups
    here1 = _below(group, n_groups, row + 1 < b)
    here2 = _below(group, n_groups, row + 2 < b)
    here3 = _below(group, n_groups, row + 3 < b)
    best0 = tl.full([GROUPS], float("-inf"), tl.float32)
    best1, best2, best3 = best0, best0, best0
    for start in range(0, WIDTH, CHUNK):
        neighbour = start + tl.arange(0, CHUNK)
        column = group[:, None] * WIDTH + neighbour[None, :]
        exists = (neighbour < WIDTH)[None, :]
        in0, in1, in2, in3 = (
            here0[:, None] & exists,
            here1[:, None] & exists,
            here2[:, None] & exists,
            here3[:, None] & exists,
        )
        n = n_groups * WIDTH
        place = scores + row * n + column
        # All four are asked for before the first is written.
        x0 = tl.load(place, mask=in0, other=0)
        x1 = tl.load(place + n, mask=in1, other=0)
        x2 = tl.load(place + 2 * n, mask=in2, other=0)
        x3 = tl.load(place + 3 * n, mask=in3, other=0)
        if scale is not None or bias is not None:
            factor, shift = 1.0, 0.0
            if scale is not None:
                factor = tl.load(scale + column, mask=in0, other=0).to(tl.float32)
            if bias is not None:
                shift = tl.load(bias + column, mask=in0, other=0).to(tl.float32)
            x0 = _put_scaled(place, x0, factor, shift, in0)
            x1 = _put_scaled(place + n, x1, factor, shift, in1)
            x2 = _put_scaled(place + 2 * n, x2, factor, shift, in2)
            x3 = _put_scaled(place + 3 * n, x3, factor, shift, in3)
        best0 = tl.maximum(best0, _largest(x0, exists, MAGNITUDE))
        best1 = tl.maximum(best1, _largest(x1, exists, MAGNITUDE))
        best2 = tl.maximum(best2, _largest(x2, exists, MAGNITUDE))
        best3 = tl.maximum(best3, _largest(x3, exists, MAGNITUDE))
    place = maxima + row * n_groups + group
    tl.store(place, _finite_or_nan(best0), mask=here0)
    tl.store(place + n_groups, _finite_or_nan(best1), mask=here1)
    tl.store(place + 2 * n_groups, _finite_or_nan(best2), mask=here2)
    tl.store(place + 3 * n_groups, _finite_or_nan(best3), mask=here3)


@triton.jit
def _put_scaled(place, x, factor, shift, inside):
    """Writes scaled scores, and returns what was written."""
    x = (x.to(tl.float32) * factor + shift).to(x.dtype)
    tl.store(place, x, mask=inside)
    return x


@triton.jit
def _largest(x, exists, MAGNITUDE: tl.constexpr):
    """The largest of each row of scores, infinite where one is not finite."""
    x = x.to(tl.float32)
    if MAGNITUDE:
        x = tl.abs(x)
    x = tl.where(tl.abs(x) < float("inf"), x, float("inf"))
    return tl.max(tl.where(exists, x, float("-inf")), 1)


@triton.jit
def _finite_or_nan(x):
    """NaN for an infinity; 0 for −0, whose bits order differently."""
    return tl.where(x == float("inf"), float("nan"), x + 0.0)
