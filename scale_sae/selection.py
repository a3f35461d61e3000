"""Exact selection of the best scores over sharded latents, from scores that come in blocks of rows.

The first pass over a block leaves its candidates: the entries that reach a bound which no selected entry is below. It
comes from the largest scores of neighbouring latents, so that only the few neighbourhoods that reach it are looked at
again. Then the scores may be forgotten; what the ranks exchange and decide is about candidates alone.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from scale_sae import kernels
from scale_sae.collectives import NonFiniteError, Shard

_KEYS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a float: the integers that share its bits
_WIDTHS = (64, 32, 16, 8, 4, 2, 1)  # neighbouring latents that are looked at through their largest score


class Selection(Protocol):
    """Takes the scores of a batch, block by block of rows, and says which stay active."""

    def add(self, scores: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Takes the next rows ``[b, n_local]``, which it changes to ``scores · scale + bias`` (``[n_local]`` each)."""

    def choose(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, latents, scores) of this shard's selected entries, ``[nnz]``, by row, latents ascending in a row.

        Rows count from the first of the first block, latents from the shard's first; both are int64. All ranks call it.

        Raises:
            NonFiniteError: a score of any shard or dp rank is NaN or infinite.
        """


class _Candidates:
    """What has been kept of the blocks so far: entries in row-major order."""

    def __init__(self) -> None:
        self.n_rows = 0
        self.blocks: list[tuple[Tensor, Tensor, Tensor]] = []
        self.invalid: Tensor | None = None  # int64 scalar, above 0 if a score was not finite

    def take(self, scores: Tensor, best: Tensor, reach: Tensor, bound: Tensor, magnitude: bool = False) -> Tensor:
        """Keeps the entries of ``scores [b, n]`` that are at least ``bound`` and returns what they were compared by.

        Args:
            scores: floats.
            best: ``[b, n / width]``, the largest of each neighbourhood.
            reach: bool, which neighbourhoods to look at.
            bound: ``[b, 1]`` or scalar.
            magnitude: compare absolute values.
        """
        invalid = best.isnan().any().long()
        self.invalid = invalid if self.invalid is None else self.invalid + invalid
        width = scores.shape[1] // max(best.shape[1], 1)
        # Flat numbers all along: gathering whole neighbourhoods by one number is much faster than by two.
        reached = reach.flatten().nonzero().squeeze(1)
        found = scores.reshape(-1, width).index_select(0, reached) if len(reached) else scores.new_zeros(0, width)
        ranks = found.abs() if magnitude else found
        least = bound.index_select(0, reached // best.shape[1]) if bound.dim() else bound
        hits = (ranks >= least).flatten().nonzero().squeeze(1)
        flat = reached[hits // width] * width + hits % width if len(hits) else hits
        rows = flat // max(scores.shape[1], 1)
        self.blocks.append((rows + self.n_rows, flat - rows * scores.shape[1], found.flatten()[hits]))
        self.n_rows += len(scores)
        return ranks.flatten()[hits]

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, latents, scores) of all blocks, ``[m]``."""
        rows, latents, scores = (torch.cat(parts) for parts in zip(*self.blocks, strict=True))
        self.blocks = []
        return rows, latents, scores


class TopK:
    """The k best of each row over all shards' latents, in the order (score descending, global latent ascending).

    −0.0 and 0.0 are equal. Costs one all-gather of ``B·k`` values per rank. Rows know nothing of each other: the dp
    ranks only tell each other whether all scores are finite.
    """

    def __init__(self, k: int, shard: Shard, *, signed: bool = False, magnitude: bool = False):
        """
        Args:
            k: entries to select per row, at least 1.
            shard: where the scores lie among the latents.
            signed: select the k largest whatever their sign; otherwise only values above 0 are ever selected, so that a
                row may have fewer than k entries.
            magnitude: go by absolute values; the scores keep their sign.
        """
        self.k, self.shard, self.signed, self.magnitude = k, shard, signed, magnitude
        self.candidates = _Candidates()

    def add(self, scores: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        n = scores.shape[1]
        # Several neighbourhoods for each entry to select: the bound would be loose otherwise.
        best = kernels.on(scores).score_maxima(scores, scale, bias, _width(n, n // (4 * self.k)), self.magnitude)
        if self.k < best.shape[1]:
            # The best of neighbourhoods are entries too, so the k-th of them is not above the k-th of all.
            bound = best.topk(self.k, dim=1, sorted=False).values.amin(1, keepdim=True)
        else:
            bound = torch.full_like(scores[:, :1], -math.inf)
        reach = best >= bound
        if not self.signed:
            reach &= best > 0
        self.candidates.take(scores, best, reach, bound, self.magnitude)

    @torch.no_grad()
    def choose(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, latents, scores = self.candidates.all()
        n_rows, k = self.candidates.n_rows, self.k
        ranks = scores.abs() if self.magnitude else scores
        offsets, longest = _row_offsets(rows, n_rows)
        if longest > 2 * k:
            kept = _needed(rows, ranks, n_rows, k)
            rows, latents, scores, ranks = rows[kept], latents[kept], scores[kept], ranks[kept]
            offsets, longest = _row_offsets(rows, n_rows)
        width = max(k, longest)
        slots = torch.arange(len(rows), device=rows.device) - offsets[rows]
        lists = ranks.new_full((n_rows, width), -math.inf)
        lists[rows, slots] = ranks

        best = lists.topk(k, dim=1).values
        assert self.candidates.invalid is not None
        best[:1, :1] += torch.where(self.candidates.invalid > 0, math.nan, 0.0).to(best.dtype)
        gathered = self.shard.all_gather(best)
        floor = -math.inf if self.signed else 0.0
        threshold = gathered.transpose(0, 1).flatten(1).topk(k, dim=1, sorted=False).values.amin(1)
        threshold.clamp_(min=floor)
        # What exceeds the threshold is in; what is left of k goes to the ties, lower latents (so lower ranks) first.
        ties = (gathered == threshold[:, None]).sum(2)
        left = k - (gathered > threshold[:, None]).sum((0, 2)) - ties[: self.shard.rank].sum(0)
        quota = torch.minimum(left.clamp(min=0), ties[self.shard.rank]).masked_fill_(threshold == floor, 0)
        if int(self.shard.dp.all_reduce(gathered.isnan().sum())):
            raise NonFiniteError("TopK: the scores hold NaN or infinite values")

        tied = lists == threshold[:, None]
        chosen = (lists > threshold[:, None]) | (tied & (tied.cumsum(1) <= quota[:, None]))
        kept = chosen[rows, slots].nonzero().squeeze(1)
        return rows[kept], latents[kept], scores[kept]


class BatchTopK:
    """The ``count`` best of a whole batch over all shards' latents and all dp ranks' rows, which follow each other.

    The order is (score descending, row ascending, global latent ascending). Only values above 0 are ever selected: all
    of them where there are fewer than ``count``.

    No index and no score crosses the link. A rank sends a histogram of 128 KiB, one of 256 KiB more for each 16 bits
    of the dtype beyond the first 16, and ``4·B`` bytes of tie counts (``4·B·size`` received); over dp the histograms
    again and one count. Memory beside the scores: some ``count · (1 + ln(blocks))`` candidates.
    """

    def __init__(self, count: int, shard: Shard):
        """``count``: entries to select over all rows, those of the other dp ranks too, and all shards; at least 0."""
        self.count, self.shard = count, shard
        self.candidates = _Candidates()
        self.keys: list[Tensor] = []
        self.seen: Tensor | None = None  # histogram of the candidates' keys

    def add(self, scores: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        shift = 8 * scores.dtype.itemsize - 16
        # A block is a part of the batch, and so narrower than it needs to be: the bound gets no looser by that.
        width = _width(scores.shape[1], scores.numel() // (4 * max(self.count, 1)))
        best = kernels.on(scores).score_maxima(scores, scale, bias, width, False)
        keys = best.view(_KEYS[best.dtype.itemsize])
        histogram = _histogram(keys.flatten(), shift)
        # The best of neighbourhoods are entries too, and so are the candidates of earlier blocks: the count-th of both
        # is not above the count-th of all.
        known = histogram if self.seen is None else histogram + self.seen
        digit, _ = _descend(known, torch.full_like(known[:1], self.count))
        bound = (digit << shift).clamp_(min=1).to(keys.dtype).view(best.dtype).squeeze()  # from 1: values above 0
        found = self.candidates.take(scores, best, best >= bound, bound).view(keys.dtype)
        self.keys.append(found)
        histogram = _histogram(found, shift)
        self.seen = histogram if self.seen is None else self.seen + histogram

    @torch.no_grad()
    def choose(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, latents, scores = self.candidates.all()
        keys = torch.cat(self.keys).long()
        assert self.seen is not None and self.candidates.invalid is not None
        shifts = range(8 * scores.dtype.itemsize - 16, -1, -16)  # of the 16-bit digits of a key, highest first
        counts = _over_all(torch.cat([self.seen, self.candidates.invalid[None]]), self.count, self.shard)
        counts, invalid = counts.split([2**15, 1])
        if int(invalid):
            raise NonFiniteError("BatchTopK: the scores hold NaN or infinite values")
        threshold, left = _descend(counts, torch.full_like(invalid, self.count))
        for shift in shifts[1:]:
            histogram = _histogram(keys, shift, threshold)
            digit, left = _descend(_over_all(histogram, self.count, self.shard), left)
            threshold = threshold << 16 | digit
        tied = keys == threshold
        chosen = (keys > threshold) | _first_ties(rows, tied, left, self.candidates.n_rows, self.shard)
        kept = chosen.nonzero().squeeze(1)
        return rows[kept], latents[kept], scores[kept]


def select_topk(scores: Tensor, k: int, shard: Shard, *, signed: bool = False) -> tuple[Tensor, Tensor]:
    """(rows, latents) that ``TopK`` selects of scores ``[B, n_local]`` that exist at once."""
    return _select(TopK(k, shard, signed=signed), scores)


def select_batch_topk(scores: Tensor, count: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """(rows, latents) that ``BatchTopK`` selects of scores ``[B, n_local]`` that exist at once."""
    return _select(BatchTopK(count, shard), scores)


def _select(selection: Selection, scores: Tensor) -> tuple[Tensor, Tensor]:
    selection.add(scores.detach().contiguous())
    rows, latents, _ = selection.choose()
    return rows, latents


def _row_offsets(rows: Tensor, n_rows: int) -> tuple[Tensor, int]:
    """Where each row's entries begin in ascending ``rows``, int64 ``[n_rows + 1]``, and how many the longest has."""
    offsets = torch.searchsorted(rows, torch.arange(n_rows + 1, device=rows.device))
    return offsets, int(offsets.diff().max()) if n_rows else 0


def _needed(rows: Tensor, ranks: Tensor, n_rows: int, k: int) -> Tensor:
    """Which candidates are left where each row keeps only the first k of those that tie with its last.

    No more can be selected, and a row of equal scores would have all of its latents among the candidates.
    """
    least = ranks.new_full((n_rows,), math.inf).scatter_reduce_(0, rows, ranks, "amin")
    tied = ranks == least[rows]
    place = tied.cumsum(0)
    before = torch.cat([place.new_zeros(1), place])[torch.searchsorted(rows, torch.arange(n_rows, device=rows.device))]
    return (~tied | (place - before[rows] <= k)).nonzero().squeeze(1)


def _width(n: int, most: int) -> int:
    """How many neighbours to look at together: a divisor of n, ``most`` at most."""
    return next(width for width in _WIDTHS if width == 1 or (width <= most and n % width == 0))


def _over_all(counts: Tensor, wanted: int, shard: Shard) -> Tensor:
    """int64: the sum of counts over all shards and dp ranks, or some number from ``wanted`` on where it is that large.

    So they fit into 4 bytes on the link, and whoever looks for the ``wanted``-th finds the same.
    """
    most = max(wanted, 1)
    narrow = torch.int32 if most * shard.size * shard.dp.size < 2**31 else torch.int64
    return shard.dp.all_reduce(shard.all_reduce(counts.clamp(max=most).to(narrow))).long()


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
