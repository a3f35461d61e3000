"""One rank's lanes of the shuffle buffer.

Row i of the stream goes to lane i % lanes; every batch takes the same number of rows from every lane, picked by a
generator that knows only (seed, lane, step). So a batch does not depend on which rank hosts a lane.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from scale_sae.activations.schedule import Schedule
from scale_sae.seeds import generator

_BLOCK = 1024  # rows that are made float64 at once


def rows_of_lanes(start: int, count: int, lanes: range, total_lanes: int) -> Tensor:
    """Which of rows ``start`` to ``start + count`` are in ``lanes``: offsets from ``start``, ascending, int64 [n]."""
    lane = torch.arange(start, start + count) % total_lanes
    return torch.nonzero((lane >= lanes.start) & (lane < lanes.stop)).flatten()


class LaneBuffer:
    """The lanes ``lanes`` of the buffer, for every hookpoint of this rank's group.

    ``rows[h]`` is ``[len(lanes), capacity, width of h]``; slots 0 to count-1 of a lane are filled.
    All hookpoints share one order, so rows of several layers stay aligned.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        lanes: range,
        schedule: Schedule,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.lanes = lanes
        self.schedule = schedule
        self.seed = seed
        self.capacity = schedule.lane_capacity
        self.rows = {
            name: torch.zeros(len(lanes), self.capacity, width, dtype=dtype, device=device)
            for name, width in widths.items()
        }
        self.inserted = 0
        self.draws = 0
        # Of the last look at a batch: its step, how many rows had been inserted, and `_picks`.
        self.looked_at: tuple[int, int, Tensor, Tensor] = (-1, 0, torch.empty(0), torch.empty(0))

    def counts(self) -> Tensor:
        """Filled slots of each lane, int64 [len(lanes)]: arithmetic on what was inserted and drawn."""
        drawn = self.draws * (self.schedule.batch // self.schedule.lanes)
        return torch.tensor([self.schedule.inserted(lane, self.inserted) - drawn for lane in self.lanes])

    def row_norms(self, hookpoint: str) -> Tensor:
        """The norm of every row in the buffer, float64 ``[len(lanes), slots]``; NaN where a slot is not filled."""
        rows = self.state()[hookpoint]
        # Lane by lane: the sums in float64 take a copy.
        norms = torch.stack([torch.linalg.vector_norm(lane, dim=1, dtype=torch.float64) for lane in rows])
        filled = torch.arange(rows.shape[1]) < self.counts()[:, None]
        return norms.masked_fill(~filled.to(norms.device), torch.nan)

    def sums(self, hookpoint: str, usable: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over each lane's rows of what ``change`` makes of them: float64 ``[n, width]`` to the like.

        ``usable``: bool ``[len(lanes), slots]``, those that count. The result is float64 ``[len(lanes), width]``; a
        lane's sum depends on its rows alone, bit for bit.
        """
        rows = self.state()[hookpoint]
        totals = torch.zeros(len(rows), rows.shape[2], dtype=torch.float64, device=rows.device)
        for total, lane, counts in zip(totals, rows, usable, strict=True):
            # In blocks: a whole lane in float64 may take a GiB.
            for some, mask in zip(lane.split(_BLOCK), counts.split(_BLOCK), strict=True):
                total += change(some[mask].double()).sum(0)
        return totals

    def insert(self, chunk: Mapping[str, Tensor], count: int) -> None:
        """Appends this rank's part of the next ``count`` rows of the stream.

        ``chunk[h]`` holds the rows that ``rows_of_lanes`` names, in that order: ``[n, width of h]``.
        """
        index = self.inserted + rows_of_lanes(self.inserted, count, self.lanes, self.schedule.lanes)
        lane = index % self.schedule.lanes - self.lanes.start
        before = torch.tensor([self.schedule.inserted(lane, self.inserted) for lane in self.lanes])
        slot = self.counts()[lane] + index // self.schedule.lanes - before[lane]
        assert not len(slot) or int(slot.max()) < self.capacity
        for name, rows in self.rows.items():
            target = (lane * self.capacity + slot).to(rows.device)
            given = chunk[name][: len(index)].to(rows.device, non_blocking=rows.is_cuda)
            rows.flatten(0, 1).index_copy_(0, target, given)
        self.inserted += count

    def peek(self, step: int) -> dict[str, Tensor]:
        """This rank's part of batch ``step``, the next, a copy: ``[batch / lanes * len(lanes), width]`` each."""
        counts, picks = self._picks(step)
        self.looked_at = step, self.inserted, counts, picks
        taken = (self._base() + picks).flatten()
        return {name: rows.flatten(0, 1)[taken.to(rows.device)] for name, rows in self.rows.items()}

    def remove(self, step: int) -> None:
        """Removes the rows of batch ``step``, the next, which was the last to be looked at.

        They leave holes; the last rows of the lane that are not of the batch fill them, both in ascending order.
        """
        looked_at, inserted, counts, picks = self.looked_at
        assert (looked_at, inserted) == (step, self.inserted), "rows are looked at before they are removed"
        left = counts - picks.shape[1]
        tail = left[:, None] + torch.arange(picks.shape[1])
        ordered = picks.sort(1).values
        tail_is_picked = ordered.gather(1, torch.searchsorted(ordered, tail).clamp_(max=picks.shape[1] - 1)) == tail
        movers = (self._base() + tail)[~tail_is_picked]
        holes = (self._base() + ordered)[ordered < left[:, None]]
        for rows in self.rows.values():
            flat = rows.flatten(0, 1)
            flat[holes.to(rows.device)] = flat[movers.to(rows.device)]
        self.draws += 1

    def _picks(self, step: int) -> tuple[Tensor, Tensor]:
        """Filled slots of each lane, and which of them batch ``step`` takes, ``[len(lanes), batch / lanes]``."""
        per_lane = self.schedule.batch // self.schedule.lanes
        counts = self.counts()
        assert step == self.draws and int(counts.min()) >= per_lane
        return counts, torch.stack(
            [
                torch.randperm(count, generator=generator(self.seed, "draw", lane, step))[:per_lane]
                for lane, count in zip(self.lanes, counts.tolist(), strict=True)
            ]
        )

    def _base(self) -> Tensor:
        """The first slot of each lane among all of them, ``[len(lanes), 1]``."""
        return torch.arange(len(self.lanes))[:, None] * self.capacity

    def state(self) -> dict[str, Tensor]:
        """The filled part of every lane, ``[len(lanes), most filled slots of any lane, width]`` each (views)."""
        # Lane 0 is the first to get a row, on whichever rank it is.
        most = self.schedule.inserted(0, self.inserted) - self.draws * (self.schedule.batch // self.schedule.lanes)
        return {name: rows[:, :most] for name, rows in self.rows.items()}

    def start_empty(self, inserted: int, draws: int) -> None:
        """Goes on with no rows held, as after ``inserted`` rows that ``draws`` batches have taken to the last."""
        assert inserted == draws * self.schedule.batch
        self.inserted, self.draws = inserted, draws

    def restore(self, read: Callable[[str], Tensor], inserted: int, draws: int) -> None:
        """Takes up the lanes that ``state`` returned after ``inserted`` rows and ``draws`` batches.

        ``read(h)`` gives those of one hookpoint, ``[len(lanes), slots, width]``; one at a time, since they are large.
        """
        self.inserted, self.draws = inserted, draws
        for name, rows in self.rows.items():
            lanes = read(name)
            rows[:, : lanes.shape[1]] = lanes.to(rows)
