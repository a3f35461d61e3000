"""Sums over ranks and their gradients, against plain references on one process."""

from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from harness import run_ranks
from scale_sae.collectives import Ranks, Shard
from scale_sae.errors import UserError

B, N = 48, 256
SIZES = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def shard_of(rank: int, world: int) -> Shard:
    return Shard(rank, world, dist.group.WORLD)


def test_sums_in_order_and_totals_over_dp_ranks() -> None:
    def worker(rank: int, world: int) -> tuple[Tensor, int]:
        ranks = Ranks(rank, world, dist.group.WORLD)
        # In float32 the order shows: 1e8 + 1 + 1 − 1e8 is 0 from the left and 2 at best.
        value = torch.tensor([1e8, 1.0, 1.0, -1e8])[rank]
        return ranks.sum_in_order(value), ranks.total(rank + 2, torch.device("cpu"))

    results = run_ranks(4, worker)
    assert [total for _, total in results] == [2 + 3 + 4 + 5] * 4
    assert len({value.item() for value, _ in results}) == 1
    assert Ranks().total(7, torch.device("cpu")) == 7


@pytest.mark.parametrize("size", SIZES)
def test_gradients_through_sum_and_copy_equal_the_unsharded_ones(size: int) -> None:
    d_in, d_sae = 7, 24
    draw = torch.Generator().manual_seed(3)
    x, W_enc, W_dec, b_dec, target = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((5, d_in), (d_sae, d_in), (d_sae, d_in), (d_in,), (5, d_in))
    )

    def worker(rank: int, world: int) -> list[Tensor]:
        shard = shard_of(rank, world)
        own = shard.rows(d_sae)
        enc, dec, bias = (t.clone().requires_grad_() for t in (W_enc[own], W_dec[own], b_dec))
        acts = torch.tanh((x - shard.copy(bias)) @ enc.T)
        loss = (shard.sum(acts @ dec) + bias - target).pow(2).mean()
        loss.backward()
        assert enc.grad is not None and dec.grad is not None and bias.grad is not None
        return [loss, enc.grad, dec.grad, bias.grad]

    full = [t.clone().requires_grad_() for t in (W_enc, W_dec, b_dec)]
    expected_loss = (torch.tanh((x - full[2]) @ full[0].T) @ full[1] + full[2] - target).pow(2).mean()
    expected = torch.autograd.grad(expected_loss, full)
    losses, enc, dec, bias = zip(*run_ranks(size, worker), strict=True)
    # Sums of 24 terms of order 1 in another order differ by about 1e-15; a missing reduction by a factor.
    for got, want in ((torch.cat(enc), expected[0]), (torch.cat(dec), expected[1]), (bias[0], expected[2])):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(losses[0].detach(), expected_loss.detach(), rtol=1e-12, atol=0.0)
    assert all(torch.equal(other, bias[0]) for other in bias), "replicated parameters would drift apart"


@pytest.mark.parametrize("size", SIZES)
def test_all_reduce_and_all_gather_make_new_tensors_of_every_dtype(size: int) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)

    def worker(rank: int, world: int) -> None:
        shard = shard_of(rank, world)
        assert shard.over(world).group is shard.group is not None
        for dtype in dtypes:
            x = torch.full((3, 2), rank + 1).to(dtype).T  # not contiguous
            wanted: dict[Literal["sum", "max", "min"], int] = {"sum": world * (world + 1) // 2, "max": world, "min": 1}
            for op, want in wanted.items():
                assert torch.equal(shard.all_reduce(x, op), torch.full((2, 3), want, dtype=dtype)), (dtype, op)
            gathered = shard.all_gather(x)
            expected = torch.arange(1, world + 1).to(dtype)[:, None, None].expand(world, 2, 3)
            assert gathered.dtype == dtype and torch.equal(gathered, expected)
            shard.all_reduce(x).zero_()
            gathered.zero_()
            assert torch.equal(x, torch.full((2, 3), rank + 1).to(dtype)), "the result shares memory with the input"
        assert shard.all_gather(torch.ones(0, 4)).shape == (world, 0, 4)
        assert shard.all_gather(torch.tensor(2.0)).shape == (world,)
        fired = torch.arange(world) == rank
        assert shard.all_reduce(fired, "max").all() and shard.all_reduce(fired, "max").dtype == torch.bool

    run_ranks(size, worker)


def test_all_reduce_gives_every_rank_the_same_bits() -> None:
    def worker(rank: int, world: int) -> list[Tensor]:
        x = torch.randn(10007, generator=torch.Generator().manual_seed(rank))
        return [shard_of(rank, world).all_reduce(x.to(dtype)) for dtype in DTYPES]

    results = run_ranks(8, worker)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_rows_prefix_and_over() -> None:
    shards = [Shard(rank, 4).over(8) for rank in range(4)]
    assert shards[1] == Shard(1, 4, d_sae=8)
    assert [shard.rows(8) for shard in shards] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    for width in range(9):
        local = [list(range(2))[shard.prefix(width)] for shard in shards]
        assert [2 * rank + i for rank, part in enumerate(local) for i in part] == list(range(width))
    with pytest.raises(UserError, match=r"d_sae.* 10 .*4"):
        shards[1].rows(10)
    with pytest.raises(UserError, match=r"d_sae.* 10 .*4"):
        Shard(1, 4).over(10)
    with pytest.raises(AssertionError, match="over"):
        Shard(1, 4).prefix(3)
