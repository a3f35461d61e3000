"""What a researcher's script yields, as the batches of a training: checked, cut to size, the same on every shard."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.tensorfile import NAMES

# Yields rows [n, d_in]. Name: SAELens's.
DataProvider = Iterator[Tensor]

# What the first rank sends before each batch.
_BATCH, _END, _FAILED = range(3)
_DTYPES = [dtype for dtype in NAMES if dtype.is_floating_point]


class Batches:
    """The batches of one SAE on one rank, as an iterator: ``[batch, d_in]`` on the SAE's device, equal on all ranks.

    Only the first rank's provider is read. Every rank must draw the same number of batches.

    Attributes:
        rows_left: rows at the provider's end that fill no batch; None before.
    """

    def __init__(self, provider: Iterable[Tensor] | None, d_in: int, batch: int, shard: Shard, device: torch.device):
        """``provider`` may be None on all ranks but the first."""
        self.d_in, self.batch, self.shard, self.device = d_in, batch, shard, device
        self.rows_left: int | None = None
        self.drawn: deque[Tensor] = deque()  # by an evaluation, and yet to be trained on
        self.parts: deque[Tensor] = deque()
        self.held = 0
        self.provider = provider
        self.iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The next batch that was not trained on. UserError, on all ranks, if the provider yields what is none."""
        return self.drawn.popleft() if self.drawn else self._draw()

    def ahead(self) -> Iterator[Tensor]:
        """The batches that come next, copied, for an evaluation: they are still there to be trained on."""
        place = 0
        while True:
            if place == len(self.drawn):
                try:
                    self.drawn.append(self._draw().clone())
                except StopIteration:
                    return
            yield self.drawn[place].clone()
            place += 1

    def _draw(self) -> Tensor:
        """A batch from the provider."""
        if self.shard.size == 1:
            return self._read()
        batch, kind, error = torch.empty(0), _BATCH, None
        if self.shard.rank == 0:
            try:
                batch = self._read()
            except StopIteration:
                kind = _END
            except Exception as raised:  # whatever a researcher's code raises
                kind, error = _FAILED, raised
        dtype = _DTYPES.index(batch.dtype)
        head = torch.tensor([kind, dtype, -1 if self.rows_left is None else self.rows_left], device=self.device)
        dist.broadcast(head, group=self.shard.group, group_src=0)
        kind, dtype, left = head.tolist()
        if kind == _END:
            self.rows_left = left
            raise StopIteration
        if kind == _FAILED:
            self._fail(error)
        if self.shard.rank != 0:
            batch = torch.empty(self.batch, self.d_in, dtype=_DTYPES[dtype], device=self.device)
        dist.broadcast(batch, group=self.shard.group, group_src=0)
        return batch

    def _fail(self, error: Exception | None) -> None:
        """Raises the first rank's error on all ranks, so that none of them waits."""
        said: list[Any] = [None if error is None else (isinstance(error, UserError), type(error).__name__, str(error))]
        dist.broadcast_object_list(said, group=self.shard.group, group_src=0)
        if error is not None:
            raise error
        is_user_error, kind, text = said[0]
        raise UserError(text) if is_user_error else RuntimeError(f"data_provider of the first rank: {kind}: {text}")

    def _read(self) -> Tensor:
        """A batch, contiguous, of the rows that the provider yields, in their order."""
        while self.held < self.batch:
            try:
                rows = self._checked(self._next())
            except StopIteration:
                self.rows_left = self.held
                raise
            # What waits here is copied: a provider may write its next rows where these are.
            self.parts.append(rows if len(rows) == self.batch and not self.held else rows.clone())
            self.held += len(rows)
        taken, missing = [], self.batch
        while missing:
            rows = self.parts.popleft()
            if len(rows) > missing:
                self.parts.appendleft(rows[missing:])
            taken.append(rows[:missing])
            missing -= len(taken[-1])
        self.held -= self.batch
        return taken[0].contiguous() if len(taken) == 1 else torch.cat(taken)

    def _next(self) -> Any:
        if self.iterator is None:
            if not isinstance(self.provider, Iterable):
                kind = type(self.provider).__name__
                raise UserError(
                    f"data_provider: {kind} is no iterator; give one that yields tensors [rows, {self.d_in}]"
                )
            self.iterator = iter(self.provider)
        return next(self.iterator)

    def _checked(self, rows: Any) -> Tensor:
        """What the provider yielded, on the SAE's device. UserError where it is no rows for this SAE."""
        if not isinstance(rows, Tensor):
            raise UserError(
                f"data_provider: yielded {type(rows).__name__}; yield a tensor [rows, {self.d_in}] each time"
            )
        if not rows.is_floating_point() or rows.dtype not in _DTYPES:
            raise UserError(f"data_provider: yielded {rows.dtype}; yield activations of a floating-point type")
        if rows.dim() != 2:
            hint = "; flatten it: x.flatten(0, -2)" if rows.dim() > 2 else ""
            raise UserError(f"data_provider: yielded shape {list(rows.shape)}, but rows are [n, {self.d_in}]{hint}")
        if rows.shape[1] != self.d_in:
            raise UserError(
                f"data_provider: yielded rows of width {rows.shape[1]}, but the SAE has d_in {self.d_in}; set "
                f"d_in: {rows.shape[1]} or yield other activations"
            )
        if not len(rows):
            raise UserError("data_provider: yielded a tensor without rows; leave it out")
        return rows.detach().to(self.device)
