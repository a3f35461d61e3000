"""Shards without process groups: threads of one process that hand each other tensors.

An exchange that some shard does not join is an error at once, where processes would wait for each other.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from scale_sae.collectives import Shard

T = TypeVar("T")

_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


class OutOfStepError(RuntimeError):
    """The shards made different calls at one time. All of them raise it."""


LeftAloneError = threading.BrokenBarrierError  # in a shard that waits when another fails


class _Meeting:
    """Where the threads of some shards meet, each with a tensor."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size)
        self.brought: list[tuple[str, Tensor]] = [("", torch.empty(0))] * size

    def exchange(self, rank: int, call: str, tensor: Tensor) -> list[Tensor]:
        """What all have brought, in rank order. OutOfStepError for all of them unless they came with one ``call``."""
        self.brought[rank] = call, tensor.detach().clone()
        self.barrier.wait()
        brought = list(self.brought)
        self.barrier.wait()  # nobody brings the next before all have seen this
        calls = [other for other, _ in brought]
        if other := next((i for i, there in enumerate(calls) if there != calls[0]), 0):
            raise OutOfStepError(f"shard 0 is at {calls[0]}, shard {other} at {calls[other]}")
        return [part for _, part in brought]


@dataclass(frozen=True)
class _SimulatedShard(Shard):
    """A shard whose group is the threads of a meeting."""

    meeting: _Meeting = None  # type: ignore[assignment]

    def all_reduce(self, x: Tensor, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
        result, *others = self._exchange(f"all_reduce ({op})", x)
        for other in others:
            result = _COMBINE[op](result, other)
        return result.contiguous()

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange("all_gather", x))

    def _exchange(self, call: str, x: Tensor) -> list[Tensor]:
        return self.meeting.exchange(self.rank, f"{call} of {list(x.shape)} {x.dtype}", x)


def on_shards(size: int, fn: Callable[[Shard], T]) -> list[T]:
    """``fn`` of each of ``size`` shards, side by side; raises the error of the lowest shard that failed by itself."""
    meeting = _Meeting(size)
    results: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        # No process group: what calls torch.distributed past the shard is an error, and no message to other ranks.
        shard = _SimulatedShard(rank, size, object(), meeting=meeting)  # type: ignore[arg-type]
        try:
            results[rank] = fn(shard)
            meeting.exchange(rank, "the end of the step", torch.empty(0))
        except BaseException as error:  # sys.exit too: the others would wait for this one
            errors[rank] = error
            if not isinstance(error.__cause__ or error, OutOfStepError):  # which all shards raise
                meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [errors[rank] for rank in sorted(errors) if not isinstance(errors[rank], LeftAloneError)]
    if own:
        # A shard that was done when the others called for it cannot say where.
        raise min(own, key=lambda error: isinstance(error, OutOfStepError))
    return results
