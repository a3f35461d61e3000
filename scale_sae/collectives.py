"""What the ranks of an SAE do together: sums with the right gradients, exact selection over sharded latents.

The latents of an SAE are cut over the tp ranks into contiguous ascending blocks, one ``Shard`` each, and the rows of a
batch over the dp ranks, ``Shard.dp``. A single device is a shard of size 1 and runs the same code: only this module
asks whether a group has one member.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scale_sae import interleave
from scale_sae.errors import UserError

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_RESELECT_ELEMENTS = 2**24  # scores that the exact pass over cut ties looks at in one go: bounds its memory
_KEYS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a float: the integers that share its bits
_BLOCK = 64  # most neighbouring latents that select_batch_topk looks at through their largest score

# Newer torch renames it and warns of the old name; the supported range has both.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class NonFiniteError(ValueError):
    """Some rank's scores hold NaN or an infinity. Every rank, tp and dp, raises it, so none waits for another."""


@dataclass(frozen=True)
class Ranks:
    """This rank's place among some ranks. All of them must make the same calls in the same order.

    Attributes:
        rank: this rank's position among them.
        size: how many they are.
        group: the process group; None only for size 1 (or to mean the whole world).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def all_reduce(self, x: Tensor, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
        """The elementwise ``op`` over the ranks as a new tensor, bit-identical on all of them, without gradient."""
        reduced = x.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            _complete(partial(dist.all_reduce, reduced, _OPS[op], group=self.group))
        return reduced

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's ``x`` (same shape on all) in rank order: a new tensor ``[size, *x.shape]`` without gradient."""
        if self.size == 1:
            return x.detach().clone(memory_format=torch.contiguous_format)[None]
        gathered = x.new_empty(self.size * x.numel())
        _complete(partial(_all_gather_flat, gathered, x.detach().reshape(-1).contiguous(), group=self.group))
        return gathered.view(self.size, *x.shape)

    def sum_in_order(self, x: Tensor) -> Tensor:
        """As ``all_reduce``, for a small ``x``: equal parts give equal bits in every group of ranks.

        The order of an all-reduce is its group's own, so two groups need not agree on the last bit.
        """
        return self.all_gather(x).sum(0)

    def total(self, count: int, device: torch.device) -> int:
        """The sum of every rank's ``count``; with several ranks one host synchronisation of ``device``."""
        return count if self.size == 1 else int(self.all_reduce(torch.tensor(count, device=device)))


def _complete(collective: Callable[..., dist.Work | None]) -> None:
    """Makes a collective call. Where another SAE's step waits for its turn, it runs until this call's data have come.

    A backward pass on a GPU runs in threads of its own and hands over nothing.
    """
    if not interleave.others_wait():
        collective(async_op=False)
        return
    work = collective(async_op=True)
    assert work is not None
    interleave.pause()
    work.wait()


ALONE = Ranks()


@dataclass(frozen=True)
class Shard(Ranks):
    """One tp rank's slice of the latents, and which part of each batch it sees.

    Every member of the group must make the same calls in the same order, backward passes included.

    Attributes:
        rank: this rank's position in the tp group; blocks of latents ascend with it.
        size: number of tp ranks.
        group: the process group; None only for size 1 (or to mean the whole world).
        d_sae: latents over all shards of the SAE that this is a shard of; 0 where it is not said.
        dp: the ranks with the same latents. Each has a part of the batch's rows, in rank order; one may have none.
    """

    d_sae: int = 0
    dp: Ranks = ALONE

    def over(self, d_sae: int) -> "Shard":
        """The same shard, of an SAE with ``d_sae`` latents. UserError where these cannot be split evenly."""
        self.rows(d_sae)
        return replace(self, d_sae=d_sae)

    def rows(self, total: int) -> slice:
        """This rank's block of ``total`` latents, as a slice of global latent numbers.

        Raises:
            UserError: ``total`` is not divisible by the number of shards.
        """
        if total % self.size:
            raise UserError(
                f"d_sae: {total} latents cannot be split evenly over {self.size} shards; "
                f"set topology.sae.tp to a divisor of {total}, or d_sae to a multiple of {self.size}"
            )
        width = total // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def prefix(self, width: int) -> slice:
        """The local slice of those of this rank's latents that are among the first ``width`` of all ``d_sae``."""
        assert self.d_sae, "a prefix needs a shard of known width: Shard.over(d_sae)"
        own = self.rows(self.d_sae)
        return slice(0, min(max(width - own.start, 0), own.stop - own.start))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every shard's ``x``. Its gradient, alike on all ranks, reaches each shard's ``x`` unchanged."""
        return x if self.size == 1 else _Sum.apply(x, self)

    def copy(self, x: Tensor) -> Tensor:
        """``x``, alike on all ranks, for use with local latents: its gradient is the sum over the shards' gradients."""
        return x if self.size == 1 else _Copy.apply(x, self)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        return shard.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.all_reduce(grads[0]), None


@torch.no_grad()
def select_topk(scores: Tensor, k: int, shard: Shard, *, signed: bool = False) -> tuple[Tensor, Tensor]:
    """The entries of this shard that belong to the TopK of each row over all shards' latents.

    A row's order is (score descending, global latent ascending), whatever the number of shards; −0.0 and 0.0 are equal.
    Costs one all-gather of ``B·k`` values per rank, one host synchronisation, ``O(B·k·size)`` memory, and beside
    ``torch.topk`` one pass over the scores, which checks that all are finite. Rows know nothing of each other: the dp
    ranks only tell each other whether they are.

    Args:
        scores: ``[B, n_local]`` of any floating dtype, the same on all shards; ``n_local`` may differ and be 0.
        k: entries to select per row, at least 1.
        shard: where ``scores`` lies among the latents.
        signed: select the k largest whatever their sign; otherwise only values above 0 are ever selected, so that a row
            may have fewer than k entries.

    Returns:
        ``rows`` and ``latents`` (local numbers), int64 ``[nnz]``, by row and ascending latent inside a row.

    Raises:
        NonFiniteError: a score of any shard is NaN or infinite, of any dp rank's rows.
    """
    n_local = scores.shape[1]
    # One candidate more than k shows whether a tie at the threshold was cut; 16-bit values tie so often that a few more
    # keep nearly all their ties among the candidates.
    spare = 8 + k // 8 if scores.dtype.itemsize == 2 else 1
    values, latents = scores.topk(min(n_local, k + spare), dim=1)
    gathered = shard.all_gather(_to_send(scores, values, k))

    floor = -math.inf if signed else 0.0
    threshold = gathered.transpose(0, 1).flatten(1).topk(k, dim=1, sorted=False).values.amin(1).clamp_(min=floor)
    # All that exceed the threshold are in; what is left of k goes to the ties, lower latents (so lower ranks) first.
    ties = (gathered == threshold[:, None]).sum(2)
    left = k - (gathered > threshold[:, None]).sum((0, 2)) - ties[: shard.rank].sum(0)
    quota = torch.minimum(left.clamp(min=0), ties[shard.rank]).masked_fill_(threshold == floor, 0)

    # torch.topk promises no order of ties: where the last candidate is one, lower latents may have been left out.
    cut = quota > 0
    if values.shape[1] < n_local:
        cut &= values[:, -1] == threshold
    else:
        cut.zero_()  # all latents are candidates
    n_invalid = shard.dp.all_reduce(gathered.isnan().sum())
    counts = torch.stack([n_invalid, cut.sum(), (values > threshold[:, None]).sum() + quota.sum()])
    n_invalid, n_cut, nnz = counts.tolist()
    if n_invalid:
        raise NonFiniteError("select_topk: the scores hold NaN or infinite values")
    if n_cut:
        rows = torch.nonzero_static(cut, size=n_cut)[:, 0]
        values[rows], latents[rows] = _reselect(scores, rows, threshold, values.shape[1])

    latents, order = latents.sort(dim=1)
    values = values.gather(1, order)
    tied = values == threshold[:, None]
    chosen = (values > threshold[:, None]) | (tied & (tied.cumsum(1) <= quota[:, None]))
    rows, slots = torch.nonzero_static(chosen, size=nnz).t().contiguous()
    return rows, latents[rows, slots]


def _to_send(scores: Tensor, values: Tensor, k: int) -> Tensor:
    """``[B, k]``: this shard's k best of each row, −inf where it has fewer; with a NaN if a score is not finite."""
    best = F.pad(values[:, :k], (0, max(0, k - values.shape[1])), value=-math.inf)
    if scores.shape[1]:
        low, high = scores.amin(1), values[:, 0]  # NaN wins both
        best[:, 0] += (low - low) + (high - high)  # 0, or NaN where an end is NaN or infinite
    return best


def _reselect(scores: Tensor, rows: Tensor, threshold: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` candidates of each of ``rows``: those above the threshold, then its ties by ascending latent.

    The keys that stand for the scores are all different, so the order is exact: n + (n − latent) above the threshold,
    n − latent on it, 0 below.
    """
    n = scores.shape[1]
    descending = torch.arange(n, 0, -1, dtype=torch.int32, device=scores.device)
    found = []
    for block in rows.split(max(1, _RESELECT_ELEMENTS // n)):
        block_scores, block_threshold = scores[block], threshold[block, None]
        keys = (block_scores > block_threshold).int().mul_(n).add_(descending)
        keys.masked_fill_(block_scores < block_threshold, 0)
        found.append(keys.topk(count, dim=1).indices)
    latents = torch.cat(found)
    return scores[rows[:, None], latents], latents


@torch.no_grad()
def select_batch_topk(scores: Tensor, count: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """The entries of this shard that belong to the ``count`` largest of the whole batch over all shards' latents.

    The order is (score descending, row ascending, global latent ascending), whatever the number of shards and of dp
    ranks, whose rows follow each other. Only values above 0 are ever selected: all of them where there are fewer than
    ``count``.

    No index and no score crosses the link. A rank sends two histograms of 128 KiB, one of 256 KiB more for each 16 bits
    of the dtype beyond the first 16, and ``4·B`` bytes of tie counts (``4·B·size`` received); over dp the histograms
    again and one count. Three host synchronisations. Two passes over the scores: one checks that all are finite, one
    takes the largest of each block of neighbours. These largest bound the threshold from below; all else looks at the
    few blocks that reach the bound, which are many only where most scores differ by less than the bound's 16 bits can
    tell.

    Args:
        scores: ``[B, n_local]`` of any floating dtype, the same on all shards; ``n_local`` may differ and be 0. ``B``
            may differ between dp ranks and be 0.
        count: entries to select over all rows, those of the other dp ranks too, and all shards; at least 0.
        shard: where ``scores`` lies among the latents and in the batch.

    Returns:
        ``rows`` and ``latents`` (local numbers), int64 ``[nnz]``, by row and ascending latent inside a row.

    Raises:
        NonFiniteError: a score of any shard or dp rank is NaN or infinite.
    """
    shifts = range(8 * scores.dtype.itemsize - 16, -1, -16)  # of the 16-bit digits of a key, highest first
    blocks = _key_blocks(scores, count, shard)
    best = blocks.amax(2)
    # The blocks' best are entries too, so the count-th largest of them is not above the threshold.
    histogram = torch.cat([_histogram(best.flatten(), shifts[0]), _invalid(scores, best)])
    histogram, invalid = _over_all(histogram, count, shard).split([2**15, 1])
    digit, _ = _descend(histogram, torch.full_like(invalid, count))
    bound = (digit << shifts[0]).clamp_(min=1).to(blocks.dtype)  # keys from 1 are those of values above 0

    reach = best >= bound
    n_invalid, n_reach = torch.cat([invalid, reach.sum()[None]]).tolist()
    if n_invalid:
        raise NonFiniteError("select_batch_topk: the scores hold NaN or infinite values")
    rows, numbers = torch.nonzero_static(reach, size=n_reach).t()
    found = blocks[rows, numbers]
    which, places = (found >= bound).nonzero().t()
    keys = found[which, places].long()
    rows, latents = rows[which], numbers[which] * blocks.shape[2] + places

    threshold, left = _descend(_over_all(_histogram(keys, shifts[0]), count, shard), torch.full_like(digit, count))
    for shift in shifts[1:]:
        digit, left = _descend(_over_all(_histogram(keys, shift, threshold), count, shard), left)
        threshold = threshold << 16 | digit
    chosen = (keys > threshold) | _first_ties(rows, keys == threshold, left, len(scores), shard)
    slots = chosen.nonzero()[:, 0]
    return rows[slots], latents[slots]


def _over_all(counts: Tensor, wanted: int, shard: Shard) -> Tensor:
    """int64: the sum of counts over all shards and dp ranks, or some number from ``wanted`` on where it is that large.

    So they fit into 4 bytes on the link, and whoever looks for the ``wanted``-th finds the same.
    """
    most = max(wanted, 1)
    narrow = torch.int32 if most * shard.size * shard.dp.size < 2**31 else torch.int64
    return shard.dp.all_reduce(shard.all_reduce(counts.clamp(max=most).to(narrow))).long()


def _key_blocks(scores: Tensor, count: int, shard: Shard) -> Tensor:
    """``[B, blocks, width]``: the integers with the scores' bits, rows filled up with 0 to whole blocks of neighbours.

    As integers, positive floats keep their order, 0.0 is 0, and all that have a sign, −0.0 too, are negative. Blocks
    are so narrow that there are several for each entry to select: the bound would be loose otherwise.
    """
    keys = scores.view(_KEYS[scores.dtype.itemsize])
    several = scores.numel() * shard.size * shard.dp.size // (4 * max(count, 1))
    width = min(_BLOCK, 2 ** max(several.bit_length() - 1, 0))
    if rest := keys.shape[1] % width:
        keys = F.pad(keys, (0, width - rest))
    return keys.unflatten(1, (keys.shape[1] // width, width))


def _invalid(scores: Tensor, best: Tensor) -> Tensor:
    """int64 ``[1]``: above 0 if a score is NaN or infinite; ``best`` holds the largest keys of its blocks."""
    infinity = torch.tensor(math.inf, dtype=scores.dtype).view(best.dtype).item()
    above = (best >= infinity).any()  # infinity, or NaN without a sign
    below = scores.amin().isfinite().logical_not_() if scores.numel() else torch.zeros_like(above)  # −inf, or any NaN
    return (above | below).long()[None]


def _histogram(keys: Tensor, shift: int, head: Tensor | None = None) -> Tensor:
    """How many of the positive ``keys`` ``[n]`` have each 16-bit digit at ``shift``, the bits above it being ``head``.

    int64 ``[2**16]``. Without ``head`` the digit is the highest one: ``[2**15]``, since the sign takes a bit of it.
    """
    digits, counted = keys.long() >> shift, keys > 0
    if head is not None:
        counted &= digits >> 16 == head
    bins = 2**15 if head is None else 2**16
    return torch.zeros(bins, dtype=torch.int64, device=keys.device).index_add_(0, digits & (bins - 1), counted.long())


def _descend(histogram: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The digit of the ``left``-th largest key and its place among the keys of that digit, all int64 ``[1]``.

    With fewer keys the digit is −1, in the following digits too: all keys are above it. With ``left`` 0 it is the last.
    """
    reached = histogram.flip(0).cumsum(0).flip(0)  # keys of each digit or a higher one
    digit = (reached >= left).sum(0, keepdim=True).sub_(1)
    return digit, left - (reached - histogram)[digit]


def _first_ties(rows: Tensor, tied: Tensor, left: Tensor, n_rows: int, shard: Shard) -> Tensor:
    """Which of this shard's candidates, in ascending ``rows`` ``[n]``, are among the first ``left`` ties of all shards.

    The order is (dp rank, row, shard, place in the shard), and the prefix sums below run in it.
    """
    own = torch.zeros(n_rows, dtype=torch.int32, device=rows.device).index_add_(0, rows, tied.int())
    counts = shard.all_gather(own)
    reached = counts.t().flatten().cumsum(0).view(n_rows, shard.size)[:, shard.rank]
    elsewhere = reached - own.cumsum(0)  # ties of other shards that come before this shard's part of each row
    earlier = shard.dp.all_gather(counts.sum())[: shard.dp.rank].sum()  # in the rows of lower dp ranks
    return tied & (tied.cumsum(0) + elsewhere[rows] + earlier <= left)
