"""Exact selection over shards, dp ranks and blocks of rows, against stable sorts on one process."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness import run_ranks
from saes_for_tests import shard_in_grid
from scale_sae import selection
from scale_sae.collectives import NonFiniteError, Shard
from scale_sae.selection import BatchTopK, TopK, select_batch_topk, select_topk

B, N = 48, 256
SIZES = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def shard_of(rank: int, world: int) -> Shard:
    return Shard(rank, world, dist.group.WORLD)


def gaussian() -> Tensor:
    return torch.randn(B, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def with_zeros_of_both_signs() -> Tensor:
    """Few positives, so that the zeros lie where a row's k-th value would be."""
    zeros = torch.where(gaussian() > 0, 0.0, -0.0).double()
    return torch.where(gaussian().abs() > 2.2, gaussian(), zeros)


def one_hot_shard() -> Tensor:
    x = -gaussian().abs()
    x[:, N // 2 : N // 2 + N // 8] *= -1
    return x


def ties_across_shards() -> Tensor:
    """The threshold of a row of k = 20 is 1, which three of eight shards share; 2 and 3 lie elsewhere."""
    x = -torch.ones(B, N, dtype=torch.float64)
    x[:, 30:40], x[:, 60:70], x[:, 200:230] = 1, 1, 1
    x[:, 250], x[:, 10] = 2, 3
    return x


def one_hot_row() -> Tensor:
    x = -gaussian().abs()
    x[B // 3] *= -1
    return x


def cut_in_some_rows() -> Tensor:
    return torch.where(torch.arange(B)[:, None] % 3 == 0, (2 * gaussian()).round(), gaussian())


CASES: dict[str, Callable[[], Tensor]] = {
    "gaussian": gaussian,
    "few positives": lambda: gaussian() - 2.5,
    "none positive": lambda: -gaussian().abs() - 1,
    "heavy ties": lambda: (2 * gaussian()).round(),
    "cut ties in some rows": cut_in_some_rows,
    "ties across shards": ties_across_shards,
    "all equal": lambda: torch.ones(B, N, dtype=torch.float64),
    "zeros of both signs": with_zeros_of_both_signs,
    "one hot shard": one_hot_shard,
    "one hot row": one_hot_row,
    "tiny": lambda: 1e-30 * gaussian(),
    "huge": lambda: gaussian().clamp(-1, 1).sign() * torch.finfo(torch.bfloat16).max,
    "huge and different": lambda: 1e38 * gaussian().clamp(-3, 3),
}


def reference(scores: Tensor, k: int, signed: bool) -> Tensor:
    """bool ``[B, n]``: the first k of each row by (value descending, latent ascending), by a stable sort in float64."""
    values = scores.double().numpy()
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return torch.from_numpy(chosen if signed else chosen & (values > 0))


def assert_selected(
    results: list[dict[object, tuple[Tensor, Tensor]]], key: object, expected: Tensor, bounds: list[int]
) -> None:
    """Every rank returned exactly its part of ``expected``, row by row, latents ascending and in local numbers."""
    for rank, result in enumerate(results):
        rows, latents = expected[:, bounds[rank] : bounds[rank + 1]].nonzero().unbind(1)
        assert torch.equal(result[key][0], rows) and torch.equal(result[key][1], latents), (key, rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_select_topk_equals_a_stable_sort(size: int, dtype: torch.dtype) -> None:
    # k = 48 exceeds the latents of a shard at size 8, k = 256 is all of them.
    inputs = {
        (name, k, signed): make() for name, make in CASES.items() for k in (1, 20, 48, N) for signed in (False, True)
    }
    assert not torch.equal(inputs["tiny", 1, True].to(dtype), torch.zeros(B, N, dtype=dtype))

    def worker(rank: int, world: int) -> dict[object, tuple[Tensor, Tensor]]:
        shard = shard_of(rank, world)
        own = shard.rows(N)
        return {key: select_topk(x[:, own].to(dtype), key[1], shard, signed=key[2]) for key, x in inputs.items()}

    results = run_ranks(size, worker)
    bounds = [N * rank // size for rank in range(size + 1)]
    for key, x in inputs.items():
        assert_selected(results, key, reference(x.to(dtype), key[1], key[2]), bounds)


@pytest.mark.parametrize("bounds", [[0, 0, 5, N, N], [0, 100, 101, 101, N], [0, N, N]], ids=str)
def test_signed_selection_on_uneven_and_empty_shards(bounds: list[int]) -> None:
    """As for AuxK, whose dead latents may all live on one shard."""
    size = len(bounds) - 1
    inputs = {(name, k): CASES[name]() for name in CASES for k in (1, 20, N)}

    def worker(rank: int, world: int) -> dict[object, tuple[Tensor, Tensor]]:
        shard, own = shard_of(rank, world), slice(bounds[rank], bounds[rank + 1])
        return {key: select_topk(x[:, own], key[1], shard, signed=True) for key, x in inputs.items()}

    results = run_ranks(size, worker)
    for key, x in inputs.items():
        assert_selected(results, key, reference(x, key[1], signed=True), bounds)


def test_no_rows_and_no_latents() -> None:
    for shape in ((0, N), (3, 0)):
        rows, latents = select_topk(torch.zeros(shape), 4, Shard(), signed=True)
        assert rows.shape == latents.shape == (0,)


def batch_reference(scores: Tensor, count: int) -> Tensor:
    """bool ``[B, n]``: the positives among the first ``count`` by (value descending, row ascending, latent ascending).

    A stable sort of the flat batch, in float64, is that order.
    """
    return reference(scores.reshape(1, -1), count, signed=False).view(scores.shape)


def denormals(dtype: torch.dtype) -> Tensor:
    """Values of either sign from the 40 smallest magnitudes that the dtype has."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    draw = torch.Generator().manual_seed(4)
    return torch.randint(0, 40, (B, N), generator=draw, dtype=bits).view(dtype).copysign(gaussian().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_select_batch_topk_equals_a_stable_sort(size: int, dtype: torch.dtype) -> None:
    cases = {name: make().to(dtype) for name, make in CASES.items()} | {"denormals": denormals(dtype)}
    usual, none, everything = 20 * B + 3, 0, B * N
    assert (cases["denormals"].double() > 0).sum() > usual
    inputs = {(name, usual): x for name, x in cases.items()}
    inputs |= {("heavy ties", count): cases["heavy ties"] for count in (none, everything)}
    if size == 1:  # histograms over gloo are slow
        # With these, blocks are 64, 16, 2 and 1 latents wide.
        inputs |= {(name, count): x for name, x in cases.items() for count in (1, 150, everything - 1, everything)}

    def worker(rank: int, world: int) -> dict[object, tuple[Tensor, Tensor]]:
        shard = shard_of(rank, world)
        own = shard.rows(N)
        return {key: select_batch_topk(x[:, own], key[1], shard) for key, x in inputs.items()}

    results = run_ranks(size, worker)
    bounds = [N * rank // size for rank in range(size + 1)]
    for key, x in inputs.items():
        assert_selected(results, key, batch_reference(x, key[1]), bounds)


@pytest.mark.parametrize("bounds", [[0, 0, 5, N, N], [0, 100, 101, 101, N], [0, N, N]], ids=str)
def test_batch_selection_on_uneven_and_empty_shards(bounds: list[int]) -> None:
    size = len(bounds) - 1
    names = [name for name in CASES if not name.startswith("huge")]  # which float16 cannot hold
    # Blocks of 64, wider than some shards, and of 1 to 8, which do not divide some.
    inputs = {(name, count): CASES[name]().half() for name in names for count in (2, 20 * B + 3)}

    def worker(rank: int, world: int) -> dict[object, tuple[Tensor, Tensor]]:
        shard, own = shard_of(rank, world), slice(bounds[rank], bounds[rank + 1])
        return {key: select_batch_topk(x[:, own], key[1], shard) for key, x in inputs.items()}

    results = run_ranks(size, worker)
    for key, x in inputs.items():
        assert_selected(results, key, batch_reference(x, key[1]), bounds)


# dp, tp, where the rows of each dp rank begin and end; some have none, as where all of a rank's rows are left out.
GRIDS = [(2, 2, [0, 20, B]), (3, 1, [0, 0, 31, B]), (2, 1, [0, B, B]), (4, 2, [0, 12, 12, 13, B])]


@pytest.mark.parametrize(("dp", "tp", "rows"), GRIDS, ids=str)
def test_batch_selection_over_dp_ranks_equals_a_stable_sort(dp: int, tp: int, rows: list[int]) -> None:
    dtypes = DTYPES if (dp, tp) == (2, 2) else (torch.bfloat16,)
    inputs = {(name, dtype, 20 * B + 3): make().to(dtype) for dtype in dtypes for name, make in CASES.items()}
    inputs |= {("heavy ties", dtype, count): CASES["heavy ties"]().to(dtype) for dtype in dtypes for count in (0, 700)}

    def worker(rank: int, world: int) -> dict[object, tuple[Tensor, Tensor]]:
        shard = shard_in_grid(rank, dp, tp)
        part, own = slice(rows[shard.dp.rank], rows[shard.dp.rank + 1]), shard.rows(N)
        return {key: select_batch_topk(x[part, own], key[2], shard) for key, x in inputs.items()}

    results = run_ranks(dp * tp, worker)
    bounds = [N * t // tp for t in range(tp + 1)]
    for key, x in inputs.items():
        expected = batch_reference(x, key[2])
        for p in range(dp):
            assert_selected(results[p * tp : (p + 1) * tp], key, expected[rows[p] : rows[p + 1]], bounds)


def test_batch_selection_of_no_rows_and_no_latents() -> None:
    for shape in ((0, N), (3, 0), (0, 0)):
        for count in (0, 4):
            rows, latents = select_batch_topk(torch.zeros(shape), count, Shard())
            assert rows.shape == latents.shape == (0,) and rows.dtype == latents.dtype == torch.int64


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_batch_selection_looks_at_few_entries_and_sends_few_bytes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, sent = [], []
    histogram, all_reduce, all_gather = selection._histogram, Shard.all_reduce, Shard.all_gather

    def counting(keys: Tensor, *args: Any) -> Tensor:
        counted.append(keys.numel())
        return histogram(keys, *args)

    def reducing(shard: Shard, x: Tensor) -> Tensor:
        sent.append(x.nbytes)
        return all_reduce(shard, x)

    def gathering(shard: Shard, x: Tensor) -> Tensor:
        sent.append(x.nbytes)
        return all_gather(shard, x)

    monkeypatch.setattr(selection, "_histogram", counting)
    monkeypatch.setattr(Shard, "all_reduce", reducing)
    monkeypatch.setattr(Shard, "all_gather", gathering)
    count = 64 * 32
    scores = torch.randn(64, 8192, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    select_batch_topk(scores.to(dtype), count, Shard())
    # A quarter of the blocks of 64 reach the bound: a share p of all entries, 1 − (1 − p)**64 = 1/4, that is 1.15 times
    # count. Float64 keeps 4 bits of mantissa in the bound, which rounds it down by up to 1/16: half as many again.
    assert counted[0] == scores.numel() // 64 and count <= counted[1] < 1.8 * count
    histograms = 2**17 + (dtype.itemsize // 2 - 1) * 2**18
    assert sum(sent) == histograms + 4 + 4 * 64  # the flag of non-finite scores, and a count of ties per row


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_reports_a_non_finite_score(size: int) -> None:
    bad = (math.nan, -math.nan, math.inf, -math.inf)
    selections: dict[str, Callable[[Tensor, Shard], object]] = {
        "topk": lambda own, shard: select_topk(own, 4, shard),
        "signed topk": lambda own, shard: select_topk(own, 4, shard, signed=True),
        "batch topk": lambda own, shard: select_batch_topk(own, 4 * B, shard),
        "batch topk of none": lambda own, shard: select_batch_topk(own, 0, shard),
    }

    def worker(rank: int, world: int) -> tuple[list[object], float]:
        shard = shard_of(rank, world)
        missed: list[object] = []
        for dtype in DTYPES:
            for value in bad:
                scores = gaussian().to(dtype)
                scores[B - 1, N - 3] = value  # on the last shard alone
                for name, select in selections.items():
                    try:
                        select(scores[:, shard.rows(N)], shard)
                        missed.append((dtype, value, name))
                    except NonFiniteError:
                        pass
        return missed, shard.all_reduce(torch.ones(())).item()  # the ranks still agree on what comes next

    assert run_ranks(size, worker) == [([], size)] * size


@pytest.mark.parametrize("selection", ["topk", "batch topk"])
def test_every_dp_rank_reports_a_non_finite_score(selection: str) -> None:
    """Of one row on one shard: the other dp ranks would wait for the gradients of those that leave."""

    def worker(rank: int, world: int) -> bool:
        shard = shard_in_grid(rank, 2, 2)
        scores = gaussian()
        scores[0, 0] = math.nan
        own = scores[shard.dp.rank * 20 :][:, shard.rows(N)]  # the bad row is the first dp rank's
        with pytest.raises(NonFiniteError):
            select_topk(own, 4, shard) if selection == "topk" else select_batch_topk(own, 4 * B, shard)
        return True

    assert run_ranks(4, worker) == [True] * 4


BLOCKS = (1, 7, B)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_rows_change_nothing(dtype: torch.dtype) -> None:
    """And what comes back are the scores, scaled and shifted, with their sign."""
    scale, bias = torch.rand(N).to(dtype), torch.randn(N).to(dtype)
    plain = gaussian().to(dtype)
    scored = torch.addcmul(bias, plain, scale)
    for block in BLOCKS:
        for make in (
            lambda: TopK(20, Shard()),
            lambda: TopK(20, Shard(), signed=True),
            lambda: TopK(3, Shard(), magnitude=True),
            lambda: BatchTopK(20 * B, Shard()),
            lambda: BatchTopK(B, Shard()),
        ):
            whole, parts = make(), make()
            whole.add(scored.clone())
            for some in plain.clone().split(block):
                parts.add(some, scale, bias)
            rows, latents, values = parts.choose()
            for found, expected in zip((rows, latents, values), whole.choose(), strict=True):
                assert torch.equal(found, expected)
            assert torch.equal(values, scored[rows, latents])


@pytest.mark.parametrize("size", SIZES)
def test_magnitudes_are_selected_with_their_sign(size: int) -> None:
    scores = (2 * gaussian()).round()  # many ties, of both signs

    def worker(rank: int, world: int) -> Any:
        shard = shard_of(rank, world)
        chosen = TopK(20, shard, magnitude=True)
        chosen.add(scores[:, shard.rows(N)].contiguous())
        rows, latents, values = chosen.choose()
        assert torch.equal(values, scores[:, shard.rows(N)][rows, latents])
        return {"magnitudes": (rows, latents)}

    bounds = [N * i // size for i in range(size + 1)]
    assert_selected(run_ranks(size, worker), "magnitudes", reference(scores.abs(), 20, False), bounds)


def test_rows_of_equal_scores_make_no_dense_lists() -> None:
    scores = gaussian()
    scores[5], scores[9] = 1.0, 0.0
    for signed in (True, False):
        chosen = TopK(20, Shard(), signed=signed)
        chosen.add(scores)
        with _Widest() as widest:
            rows, latents, _ = chosen.choose()
        assert_selected([{"ties": (rows, latents)}], "ties", reference(scores, 20, signed), [0, N])
        assert widest.columns < N // 2


class _Widest(TorchDispatchMode):
    """Notes the most columns of any matrix with all rows that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 2 and len(result) == B:
            self.columns = max(self.columns, result.shape[1])
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_entries_are_candidates(dtype: torch.dtype) -> None:
    """Ties apart, hardly more than are selected, whatever the number of blocks: the rest is looked at once."""
    k, wide = 32, torch.randn(64, 8192, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    for chosen, most in ((TopK(k, Shard()), 1.3), (BatchTopK(64 * k, Shard()), 3.5)):
        # BatchTopK's block i knows i/8 of the rows, and so keeps 1/i of count: 1 + 1/2 + … + 1/8 = 2.7 times count, and
        # what the bound's rounding and the neighbourhoods add.
        for rows in wide.clone().split(8):
            chosen.add(rows)
        kept = sum(len(rows) for rows, _, _ in chosen.candidates.blocks)
        assert 64 * k <= kept < most * 64 * k
