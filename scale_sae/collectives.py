"""What the ranks of an SAE do together: gathers, sums with the right gradients.

The latents of an SAE are cut over the tp ranks into contiguous ascending blocks, one ``Shard`` each, and the rows of a
batch over the dp ranks, ``Shard.dp``. A single device is a shard of size 1 and runs the same code: only this module
asks whether a group has one member.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae import interleave
from scale_sae.errors import UserError

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# Newer torch renames it and warns of the old name; the supported range has both.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


T = TypeVar("T")


class AgreedError(UserError):
    """What every rank raises, so that none waits for another."""


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

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins an ``all_gather``; what it returns waits for the result, which may share the memory of ``x``."""
        if self.size == 1:
            return lambda: x.detach()[None]
        gathered = x.new_empty(self.size * x.numel())
        work = _all_gather_flat(gathered, x.detach().reshape(-1).contiguous(), group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return gathered.view(self.size, *x.shape)

        return finish

    def sum_in_order(self, x: Tensor) -> Tensor:
        """As ``all_reduce``, for a small ``x``: equal parts give equal bits in every group of ranks.

        The order of an all-reduce is its group's own, so two groups need not agree on the last bit.
        """
        return self.all_gather(x).sum(0)

    def total(self, count: int, device: torch.device) -> int:
        """The sum of every rank's ``count``; with several ranks one host synchronisation of ``device``."""
        return count if self.size == 1 else int(self.all_reduce(torch.tensor(count, device=device)))

    def agree(self, attempt: Callable[[], T], folder: str) -> T:
        """Runs ``attempt``, which exchanges nothing, on every rank.

        Raises:
            UserError: the first one's, on all ranks, if it is one on any of them. What a disk refuses is one too;
                ``folder`` says in its message what the user has set.
        """

        def said() -> T:
            try:
                return attempt()
            except OSError as error:
                raise UserError(f"{folder} cannot be used ({error}); make room, or name another folder") from error

        return said() if self.size == 1 else agree(said, self.group)


def agree(attempt: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs ``attempt`` on every rank of ``group`` (None: the whole world).

    Raises:
        AgreedError: a ``UserError`` on any of them: the first one's message, on all.
    """
    result, message = None, None
    try:
        result = attempt()
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, message, group=group)
    for said in messages:
        if said is not None:
            raise AgreedError(said)
    return result  # type: ignore[return-value]


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
