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
        n_taken: rows of the batches that were taken, less those that an evaluation only looked at.
        rows_left: rows at the provider's end that fill no batch; None before.
    """

    def __init__(self, provider: Iterable[Tensor] | None, d_in: int, batch: int, shard: Shard, device: torch.device):
        """``provider`` may be None on all ranks but the first."""
        self.d_in, self.batch, self.shard, self.device = d_in, batch, shard, device
        self.n_taken = 0
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
        batch = self.drawn.popleft() if self.drawn else self._draw()
        self.n_taken += len(batch)
        return batch

    def ahead(self) -> Iterator[Tensor]:
        """The batches that come next, copied, for an evaluation: they are still there to be trained on."""
        place = 0
        while True:
            if place == len(self.drawn):
                try:
                    self.drawn.append(self._draw())
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
        head = torch.tensor([kind, dtype, -1 if self.rows_left is None else self.rows_left], device=self._head_device())
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

    def _head_device(self) -> torch.device:
        """The CPU where the group speaks there (`launched_shard`'s does): a step then waits for no GPU."""
        speaks = dist.get_backend_config(self.shard.group)
        return torch.device("cpu") if "cpu:" in speaks else self.device

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
                self.parts.append(self._checked(self._next()))
            except StopIteration:
                self.rows_left = self.held
                raise
            self.held += len(self.parts[-1])
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
        # A generator that yields inside `with torch.no_grad()` leaves its mode behind.
        before = torch.is_grad_enabled()
        try:
            rows = next(self.iterator)
        finally:
            torch.set_grad_enabled(before)
        if torch.is_inference_mode_enabled():
            raise UserError(
                "data_provider: yields inside torch.inference_mode(), which then holds for the training too; end its "
                "block before the yield, or use torch.no_grad()"
            )
        return rows

    def _checked(self, rows: Any) -> Tensor:
        """A copy of what the provider yielded, on the SAE's device. UserError where it is no rows for this SAE."""
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
        # A provider may write its next rows where these are, of which a batch may need a part. A copy is also no
        # inference tensor, which cannot be trained on.
        return rows.detach().to(self.device, copy=True)
