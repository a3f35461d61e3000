"""The Triton kernels against the plain ones: on a GPU where there is one, else in Triton's interpreter.

Expected values are those of the plain kernels in float64, and tolerances are the bounds of float32's rounding: a sum of
k products, in any order, is off by at most k·2⁻²⁴ of the sum of their sizes (Higham 2002, section 3.1), where products
are rounded too by (k + 1)·2⁻²⁴.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# Read when a kernel is defined: Triton's own, at its import, and ours. Not for the processes that other tests start.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from triton import language as tl

import scale_sae.kernels
from scale_sae.collectives import Shard
from scale_sae.config import TrainConfig
from scale_sae.engines import LocalEngine
from scale_sae.kernels import fused, on, plain
from scale_sae.kernels.rows import AdamStep, RowGradient
from scale_sae.optim import Optimizer
from scale_sae.saes import TrainStepInput, create, training_config

del os.environ["TRITON_INTERPRET"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16 = torch.float32, torch.bfloat16
ULP = 2.0**-24  # of float32, half a unit in the last place: what one rounding is off by, relative to the result
EXACT = {F32: 0.0, BF16: 2.0**-8}  # what the rounding of a result to its type may add, relative
SHAPES = [(1, 1), (11, 12), (4, 768), (3, 1536)]  # rows and columns: few are powers of two, some take many tiles
# Numbers that are not finite are meant; numpy warns of them, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds to the nearest bfloat16, ties to even, as GPUs do; by itself it cuts the bits off."""
    if DEVICE == "cuda":
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    assert isinstance(fused._adam_rows, interpreter.InterpretedFunction), "triton was imported before these tests"
    assert isinstance(tl.sum, interpreter.InterpretedFunction), "triton was imported before these tests"
    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def entries(n: int, n_rows: int, counts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Indices below n_rows and offsets of n rows; the first, the third and the last are empty, the second is long."""
    if counts is None:
        counts = torch.randint(0, 7, (n,)).tolist()
        for row, count in ((0, 0), (2, 0), (-1, 0), (1, 21)):
            if n > 2:
                counts[row] = count
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return torch.randint(0, n_rows, (int(offsets[-1]),)).to(DEVICE), offsets.to(DEVICE)


def row_gradient(n: int, d: int, dtype: torch.dtype = F32, extra: str = "none", sparse: bool = True) -> RowGradient:
    """A gradient with entries (``sparse``) and with whole rows: none, for some latents, or for all in their order."""
    gradient = RowGradient()
    if sparse:
        gradient.indices, gradient.offsets = entries(n, 9)
        gradient.weights, gradient.table = randn(len(gradient.indices)), randn(9, d, dtype=dtype)
    if extra == "some":
        gradient.extra_index = torch.full((n,), -1, device=DEVICE)
        latents = torch.arange(n - 1, -1, -2, device=DEVICE)  # backwards: a row's place is not its latent's
        gradient.extra_index[latents] = torch.arange(len(latents), device=DEVICE)
        gradient.extra_rows = randn(len(latents), d, dtype=dtype)
    elif extra == "all":
        gradient.extra_rows = randn(n, d, dtype=dtype)
    return gradient


def mapped(gradient: RowGradient, change) -> RowGradient:
    """The gradient with its floating tensors changed."""
    parts = {field.name: getattr(gradient, field.name) for field in dataclasses.fields(gradient)}
    floats = {name: change(part) for name, part in parts.items() if part is not None and part.is_floating_point()}
    return RowGradient(**{**parts, **floats})


def whole(gradient: RowGradient) -> Tensor:
    """All rows, float64 ``[n, d]``."""
    return torch.cat([rows.clone() for _, rows in plain._blocks(mapped(gradient, Tensor.double))])


def rounding_of(gradient: RowGradient) -> Tensor:
    """What float32 may be off by at most in the gradient's elements, ``[n, d]``."""
    longest = 1 if gradient.offsets is None else int(gradient.offsets.diff().max()) + 2
    return whole(mapped(gradient, Tensor.abs)) * longest * ULP


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert actual.shape == expected.shape
    excess = (actual.double() - expected).abs() - bound
    assert not excess.isnan().any() and (excess <= 0).all(), f"{excess.max().item()} over the bound"


GRADIENTS = [("none", True), ("some", True), ("all", True), ("some", False), ("all", False)]


def test_tensors_of_gpus_go_to_these_kernels() -> None:
    for dtype in (F32, BF16):
        assert on(torch.empty(1, dtype=dtype, device=DEVICE)) is (fused if DEVICE == "cuda" else plain)
    assert on(torch.empty(1, dtype=torch.float64, device=DEVICE)) is plain


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("table_dtype, dtype", [(F32, None), (BF16, None), (BF16, F32), (F32, BF16)], ids=str)
def test_weighted_sums(shape: tuple[int, int], table_dtype: torch.dtype, dtype: torch.dtype | None) -> None:
    n, d = shape
    indices, offsets = entries(n, 9)
    weights, table = randn(len(indices), dtype=table_dtype), randn(9, d, dtype=table_dtype)
    actual = fused.weighted_sums(indices, offsets, weights, table, dtype)
    assert actual.dtype == (dtype or table_dtype)
    expected = plain.weighted_sums(indices, offsets, weights.double(), table.double())
    sizes = plain.weighted_sums(indices, offsets, weights.double().abs(), table.double().abs())
    bound = sizes * (int(offsets.diff().max()) + 1) * ULP + expected.abs() * EXACT[actual.dtype] * 1.01
    assert_within(actual, expected, bound)
    assert torch.equal(actual, fused.weighted_sums(indices, offsets, weights, table, dtype))
    assert not actual[offsets.diff() == 0].any()


def test_entries_are_summed_in_their_order() -> None:
    """Large terms that cancel, then a small one: only in this order the small one survives."""
    terms = torch.tensor([2.0**30, -(2.0**30), 1.0, 2.0**30, 1.0, -(2.0**30), 2.0**-20], device=DEVICE)
    offsets = torch.tensor([0, 7], device=DEVICE)
    sums = fused.weighted_sums(torch.arange(7, device=DEVICE), offsets, terms.new_ones(7), terms[:, None])
    assert sums.tolist() == [[2.0**-20]]


@pytest.mark.parametrize("counts", [[0, 0, 0], [300], [0, 3, 4, 5, 300, 0]], ids=str)
def test_latents_without_entries_and_with_very_many(counts: list[int]) -> None:
    indices, offsets = entries(len(counts), 20_000, counts)
    weights, table = randn(len(indices)), randn(20_000, 20)
    expected = plain.weighted_sums(indices, offsets, weights.double(), table.double())
    sizes = plain.weighted_sums(indices, offsets, weights.double().abs(), table.double().abs())
    assert_within(fused.weighted_sums(indices, offsets, weights, table), expected, sizes * 301 * ULP)


def test_entries_of_other_rows_are_not_looked_at() -> None:
    """Rows of three entries beside rows whose weights or values are not finite."""
    offsets, weights, table = torch.arange(0, 19, 3, device=DEVICE), randn(18), randn(18, 20)
    expected = fused.weighted_sums(torch.arange(18, device=DEVICE), offsets, weights, table)
    weights[3:6], table[9:12] = math.nan, math.inf
    actual = fused.weighted_sums(torch.arange(18, device=DEVICE), offsets, weights, table)
    assert actual.isfinite().all(1).tolist() == [True, False, True, False, True, True]
    assert torch.equal(actual[[0, 2, 4, 5]], expected[[0, 2, 4, 5]])


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_sum(n: int) -> None:
    no_entries, no_weights = torch.empty(0, dtype=torch.int64, device=DEVICE), randn(0)
    offsets, table = torch.zeros(n + 1, dtype=torch.int64, device=DEVICE), randn(4, 20)
    assert torch.equal(fused.weighted_sums(no_entries, offsets, no_weights, table), table.new_zeros(n, 20))
    assert fused.dot_rows(no_entries, no_entries, table, table).shape == (0,)
    gradient = RowGradient(no_entries, offsets, no_weights, table)
    assert torch.equal(fused.row_squares(gradient), table.new_zeros(n))
    before = [randn(n, 20), randn(n, 20), randn(n, 20).square()]
    weight, m, v = (part.clone() for part in before)
    fused.adam_rows(gradient, weight, m, v, adam_step(rate=0.0))
    assert torch.equal(weight, before[0])
    # A gradient of 0 leaves what is left of a moment: one product, or a difference that is rounded twice.
    torch.testing.assert_close(m, 0.9 * before[1], rtol=3 * ULP * 10, atol=0)
    torch.testing.assert_close(v, 0.99 * before[2], rtol=3 * ULP, atol=0)


def test_inputs_need_not_be_contiguous() -> None:
    indices, offsets = entries(5, 9)
    weights, table = randn(2 * len(indices))[::2], randn(30, 9).T
    whole_parts = indices, offsets, weights.contiguous(), table.contiguous()
    expected = fused.weighted_sums(*whole_parts)
    assert torch.equal(fused.weighted_sums(indices, offsets, weights, table), expected)
    squares = fused.row_squares(RowGradient(*whole_parts))
    assert torch.equal(fused.row_squares(RowGradient(indices, offsets, weights, table)), squares)


@pytest.mark.parametrize("d", [1, 12, 768])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=str)
@pytest.mark.parametrize("nnz", [1, 16, 21])
def test_dot_rows(d: int, dtypes: tuple[torch.dtype, torch.dtype], nnz: int) -> None:
    g, W = randn(7, d, dtype=dtypes[0]), randn(11, d, dtype=dtypes[1])
    rows, latents = torch.randint(0, 7, (nnz,)).sort().values.to(DEVICE), torch.randint(0, 11, (nnz,)).to(DEVICE)
    actual = fused.dot_rows(rows, latents, g, W)
    assert actual.dtype == F32
    expected = plain.dot_rows(rows, latents, g.double(), W.double())
    sizes = plain.dot_rows(rows, latents, g.double().abs(), W.double().abs())
    assert_within(actual, expected, sizes * (d + 1) * ULP)
    assert torch.equal(actual, fused.dot_rows(rows, latents, g, W))


@pytest.mark.parametrize("shape, dtype", list(zip(SHAPES, (F32, BF16, F32, BF16), strict=True)), ids=str)
@pytest.mark.parametrize("extra, sparse", GRADIENTS)
def test_row_squares(shape: tuple[int, int], dtype: torch.dtype, extra: str, sparse: bool) -> None:
    gradient = row_gradient(*shape, dtype, extra, sparse)
    actual = fused.row_squares(gradient)
    assert actual.dtype == F32
    rows, off = whole(gradient), rounding_of(gradient)
    bound = (2 * rows.abs() * off + off * off).sum(1) + (shape[1] + 1) * ULP * rows.square().sum(1)
    assert_within(actual, plain.row_squares(mapped(gradient, Tensor.double)), bound)
    assert torch.equal(actual, fused.row_squares(gradient))


def adam_step(
    skip: bool = False,
    clip: float = 0.5,
    seed: int = 0,
    first: int = 0,
    t: float = 3.0,
    rate: float = 1e-2,
    beta1: float = 0.9,
    beta2: float = 0.99,
    eps: float = 1e-8,
) -> AdamStep:
    step, factor = torch.tensor(t, device=DEVICE), torch.tensor(clip, device=DEVICE)
    return AdamStep(step, rate, beta1, beta2, factor, torch.tensor(skip, device=DEVICE), eps, seed, first)


def adam(gradient: RowGradient, state: list[Tensor], update: AdamStep, follower: Tensor | None = None) -> None:
    weight, exp_avg, exp_avg_sq = state
    fused.adam_rows(gradient, weight, exp_avg, exp_avg_sq, update, follower)


def double_adam(gradient: RowGradient, state: list[Tensor], update: AdamStep) -> list[Tensor]:
    """Weight and moments after the plain update, in float64."""
    after = [part.double() for part in state]
    plain.adam_rows(mapped(gradient, Tensor.double), after[0], after[1], after[2], update)
    return after


@pytest.mark.parametrize("shape, dtype", list(zip(SHAPES, (F32, BF16, F32, BF16), strict=True)), ids=str)
@pytest.mark.parametrize("extra, sparse", GRADIENTS)
def test_adam_rows(shape: tuple[int, int], dtype: torch.dtype, extra: str, sparse: bool) -> None:
    gradient = row_gradient(*shape, dtype, extra, sparse)
    state = [randn(*shape), randn(*shape), randn(*shape).square() + 0.1]
    update = adam_step()
    expected = double_adam(gradient, state, update)
    follower = torch.empty(shape, dtype=BF16, device=DEVICE)
    before = [part.clone() for part in state]
    adam(gradient, state, update, follower if dtype is BF16 else None)

    g, off = 0.5 * whole(gradient), 0.5 * rounding_of(gradient)
    # A moment is off by its share of what g is off, and by the rounding of the (at most four) steps to it.
    off_m = 0.1 * off + 4 * ULP * (before[1].abs() + g.abs())
    off_v = 0.01 * (2 * g.abs() * off + off * off) + 4 * ULP * expected[2]
    assert_within(state[1], expected[1], off_m)
    assert_within(state[2], expected[2], off_v)
    # rate / correction · m / root(v): 8 roundings, of constants too, and what m and v are off by.
    rate, root = 1e-2 / (1 - 0.9**3), (expected[2] / (1 - 0.99**3)).sqrt()
    size = rate * expected[1].abs() / root
    off_w = rate * off_m / root + size * (off_v / expected[2] + 8 * ULP) + ULP * expected[0].abs() * 2
    assert_within(state[0], expected[0], off_w)
    if dtype is BF16:
        assert torch.equal(follower, state[0].to(BF16))

    again = [part.clone() for part in before]
    adam(gradient, again, update)
    assert all(torch.equal(a, b) for a, b in zip(again, state, strict=True))


@pytest.mark.parametrize("constants", [{"t": 1.0}, {"t": 1e6}, {"t": 40.0, "beta1": 0.0, "beta2": 0.999}, {"eps": 0.5}])
def test_constants_of_adam(constants: dict[str, float]) -> None:
    gradient = row_gradient(3, 12, extra="all", sparse=False)
    state = [torch.zeros(3, 12, device=DEVICE), randn(3, 12), randn(3, 12).square() + 0.1]
    update = adam_step(**constants)  # type: ignore[arg-type]
    expected = double_adam(gradient, state, update)
    adam(gradient, state, update)
    # From a weight of 0 the update is seen whole: within ten roundings, and those of the gradient's part of a moment.
    for actual, wanted in zip(state, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=20 * ULP, atol=20 * ULP * float(wanted.abs().max()))


@pytest.mark.parametrize("moments", [F32, BF16], ids=str)
@pytest.mark.parametrize("clip, value", [(1.0, 2.0), (math.nan, 2.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_skipped_update_changes_no_bit(moments: torch.dtype, clip: float, value: float) -> None:
    gradient = row_gradient(5, 20, extra="all")
    assert gradient.extra_rows is not None
    gradient.extra_rows[2:4, 7] = value
    state = [randn(5, 20), randn(5, 20, dtype=moments), randn(5, 20, dtype=moments), randn(5, 20, dtype=BF16)]
    before = [part.clone() for part in state]
    adam(gradient, state[:3], adam_step(skip=True, clip=clip), state[3])
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("shape", [(5, 12), (3, 700)], ids=str)
@pytest.mark.parametrize("first", [0, 3 * 2**31, 2**33 // 700])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_moments_are_rounded_by_the_bits_of_the_plain_kernel(shape: tuple[int, int], first: int, seed: int) -> None:
    """From moments of 0 and with betas of a half, both new moments are exact but for one product, the square."""
    gradient = row_gradient(*shape, extra="all", sparse=False)
    assert gradient.extra_rows is not None
    g = gradient.extra_rows
    state = [randn(*shape), *(torch.zeros(shape, dtype=BF16, device=DEVICE) for _ in range(2))]
    update = adam_step(clip=1.0, seed=seed, first=first, beta1=0.5, beta2=0.5)
    adam(gradient, state, update)
    second = int(plain._mix(torch.tensor(seed ^ 0x9E3779B9)))
    assert torch.equal(state[1], plain.round_stochastically(0.5 * g, seed, first))
    assert torch.equal(state[2], plain.round_stochastically(0.5 * (g * g), second, first))


def test_the_weight_takes_moments_before_they_are_rounded() -> None:
    gradient = row_gradient(4, 40, extra="some")
    state = [randn(4, 40), randn(4, 40, dtype=BF16), (randn(4, 40).square() + 0.1).to(BF16)]
    wide = [part.float() for part in state]
    adam(gradient, state, adam_step(seed=5))
    adam(gradient, wide, adam_step(seed=5))
    assert torch.equal(state[0], wide[0])
    for rounded, moment in zip(state[1:], wide[1:], strict=True):
        assert ((rounded.float() - moment).abs() < 2.0**-7 * moment.abs()).all()  # to one of the two neighbours


def test_the_mean_of_many_roundings_is_exact() -> None:
    """30 % of the way between neighbours: a share of 0.3 goes up, within five standard deviations of that share."""
    value, n, d = 1 + 0.3 * 2**-7, 32, 512
    gradient = RowGradient(extra_rows=torch.full((n, d), 2 * value, device=DEVICE))
    exact = float(torch.tensor(value))
    ups = []
    for seed in (1, 2**31, 77):
        m, v = (torch.zeros(n, d, dtype=BF16, device=DEVICE) for _ in range(2))
        fused.adam_rows(gradient, randn(n, d), m, v, adam_step(clip=1.0, seed=seed, beta1=0.5))
        assert set(m.unique().tolist()) == {1.0, 1 + 2**-7}
        ups.append((m > 1).double())
    share, draws = (exact - 1) * 2**7, 3 * n * d
    shares = torch.stack(ups)
    deviation = math.sqrt(share * (1 - share))
    assert abs(float(shares.mean()) - share) <= 5 * deviation / math.sqrt(draws)
    # Nor along a row or column, nor from one seed to the next, are they alike.
    assert float((shares.mean((0, 1)) - share).abs().max()) <= 5 * deviation / math.sqrt(3 * n)
    assert float((shares.mean((0, 2)) - share).abs().max()) <= 5 * deviation / math.sqrt(3 * d)
    both = float((shares[0] * shares[1]).mean())
    assert abs(both - share**2) <= 5 * math.sqrt(share**2 * (1 - share**2) / (n * d))


WIDTHS = [(1, 1, 1), (3, 12, 3), (5, 96, 32), (6, 1200, 48), (2, 3000, 1500), (4, 64, 1)]
SCALINGS = [(True, False), (False, True), (False, False)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize(
    "b, n, width, scaled, shifted", [(*w, True, True) for w in WIDTHS] + [(5, 96, 32, *s) for s in SCALINGS]
)
def test_score_maxima(
    dtype: torch.dtype, magnitude: bool, b: int, n: int, width: int, scaled: bool, shifted: bool
) -> None:
    """Of numbers with few bits, so that the only rounding is that to the scores' type: equal bits are due."""
    scores = (torch.randint(-99, 99, (b, n)) / 8).to(dtype).to(DEVICE)
    scale = (torch.randint(1, 9, (n,)) / 4).to(DEVICE) if scaled else None
    bias = (torch.randint(-9, 9, (n,)) / 16).to(DEVICE) if shifted else None
    expected = scores.clone()
    wanted = plain.score_maxima(expected, scale, bias, width, magnitude)
    actual = fused.score_maxima(scores, scale, bias, width, magnitude)
    assert actual.dtype == dtype and torch.equal(scores, expected) and torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scores_of_any_numbers(dtype: torch.dtype) -> None:
    scores, scale, bias = randn(6, 640, dtype=dtype), randn(640), randn(640)
    expected = scores.double() * scale.double() + bias.double()
    sizes = (scores.double() * scale.double()).abs() + bias.double().abs()
    actual = fused.score_maxima(scores, scale, bias, 32, False)
    assert_within(scores, expected, 2 * ULP * sizes + EXACT[dtype] * 1.01 * expected.abs())
    assert torch.equal(actual, plain.score_maxima(scores.clone(), None, None, 32, False))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_shows(dtype: torch.dtype, magnitude: bool, value: float) -> None:
    scores = randn(7, 96, dtype=dtype)
    scores[[0, 5, 6], [0, 47, 95]] = value
    expected = plain.score_maxima(scores.clone(), None, None, 16, magnitude)
    assert expected.isnan().sum() == 3
    actual = fused.score_maxima(scores, None, None, 16, magnitude)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_largest_score_is_never_minus_zero(dtype: torch.dtype) -> None:
    scores = torch.full((1, 32), -1.0, dtype=dtype, device=DEVICE)
    scores[0, ::5] = -0.0
    largest = fused.score_maxima(scores, None, None, 8, False)
    assert not largest.any() and not largest.signbit().any()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scores_that_overflow_show(dtype: torch.dtype) -> None:
    scores, scale = randn(2, 64, dtype=dtype), torch.ones(64, device=DEVICE)
    scores[1, 20], scale[20] = 3e38, 4.0
    assert fused.score_maxima(scores, scale, None, 16, False).isnan().nonzero().tolist() == [[1, 1]]


def test_tables_of_more_than_2_to_the_31_elements() -> None:
    """4 GiB of bfloat16, of which the last rows are written and read: the others take no memory of a CPU."""
    d, rows = 4096, 2**19 + 8
    table = torch.empty(rows, d, dtype=BF16, device=DEVICE)
    table[-8:] = randn(8, d, dtype=BF16)
    indices, offsets = torch.arange(rows - 8, rows, device=DEVICE), torch.tensor([0, 3, 8], device=DEVICE)
    weights, small = randn(8), torch.arange(8, device=DEVICE)
    last = table[-8:].clone()
    for actual, expected in (
        (fused.weighted_sums(indices, offsets, weights, table), fused.weighted_sums(small, offsets, weights, last)),
        (fused.dot_rows(small, indices, last, table), fused.dot_rows(small, small, last, last)),
    ):
        assert expected.any() and torch.equal(actual, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too many programs for the interpreter: needs a GPU")
def test_matrices_of_more_than_2_to_the_31_elements() -> None:
    """The last rows of a matrix and of scores are updated as those of a small one are."""
    d, n = 4096, 2**19 + 8
    gradient = RowGradient(
        torch.zeros(8, dtype=torch.int64, device=DEVICE),
        torch.arange(-n + 8, 9, device=DEVICE).clamp(min=0),
        randn(8),
        randn(1, d),
    )
    assert gradient.offsets is not None
    state = [torch.zeros(n, d, dtype=dtype, device=DEVICE) for dtype in (F32, BF16, BF16)]
    update = adam_step(seed=3)
    adam(gradient, state, update)
    small = [torch.zeros(8, d, dtype=part.dtype, device=DEVICE) for part in state]
    few = dataclasses.replace(gradient, offsets=gradient.offsets[-9:])
    adam(few, small, dataclasses.replace(update, first=n - 8))
    for actual, expected in zip(state, small, strict=True):
        assert torch.equal(actual[-8:], expected) and not actual[:-8].any()
    assert torch.equal(fused.row_squares(gradient)[-8:], fused.row_squares(few))
    scores = state[1]
    assert torch.equal(
        fused.score_maxima(scores, None, None, 32, True)[-8:], scores[-8:].unflatten(1, (-1, 32)).abs().amax(2)
    )


def test_scores_that_overflow_where_they_are_rounded_show() -> None:
    """Above the largest bfloat16, 3.3895e38, and finite in float32."""
    scores, bias = torch.full((1, 16), 3.3895e38, dtype=BF16, device=DEVICE), torch.zeros(16, device=DEVICE)
    bias[3] = 1e36
    assert fused.score_maxima(scores, None, bias, 8, False).isnan().tolist() == [[True, False]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What compiling for an H100 or H200 says of each kernel at the sizes of real runs."""
    script = Path(__file__).with_name("compile_fused.py")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_kernel_compiles_for_hopper_without_spills(compiled: list[dict]) -> None:
    kernels = {name for name, value in vars(fused).items() if isinstance(value, type(fused._adam_rows))}
    launched = {"_weighted_sums", "_row_squares", "_adam_rows", "_dot_rows", "_score_maxima"}
    assert launched <= kernels and {report["kernel"] for report in compiled} == launched
    print()
    for report in compiled:
        print(report)
        assert report["target"] == "sm_90a"
        assert (report["spill_stores"], report["spill_loads"], report["stack"]) == (0, 0, 0), report


def test_sums_have_no_atomics_and_full_rows_are_read_in_vectors(compiled: list[dict]) -> None:
    for report in compiled:
        assert report["atomics"] == 0, report
        real_size = report["constants"].get("BLOCK", report["constants"].get("WIDTH")) > 16
        assert bool(report["vector_loads"]) == real_size, report


# ---- whole runs ------------------------------------------------------------------------------------------------------

STEPS, BATCH, N_LATENTS = 8, 24, 40  # few: the interpreter takes milliseconds for each row


def trained(architecture: str, dtype: str, kernels: Any) -> tuple[dict[str, Tensor], list[float]]:
    """What an SAE has learnt, its moments, and its losses, from a run on these kernels; k_aux is below the dead."""
    options = {"d_sae": N_LATENTS, "k": 4, "dtype": dtype, "decoder_init_norm": 1.0}
    sae = create(architecture, training_config(architecture, 12, options, "saes.0"), Shard(), DEVICE)
    sae.initialize(0, "model.layers.0")
    sae.pre_activation_bytes = 10 * N_LATENTS * sae.dtype.itemsize  # blocks of 10 rows
    optimizer = Optimizer(LocalEngine(sae), TrainConfig(lr=0.02), STEPS)
    dead = torch.arange(N_LATENTS) % 4 == 0
    basis = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_sae.kernels, "on", lambda tensor: kernels)
        for step in range(STEPS):
            mixture = torch.rand(BATCH, 20, generator=torch.Generator().manual_seed(step)).pow(8)
            made = TrainStepInput(
                sae_in=(mixture @ basis).to(sae.dtype).to(DEVICE),
                coefficients={},
                dead_neuron_mask=dead.to(DEVICE),
                n_training_steps=step,
                is_logging_step=False,
                num_dead=10 if step % 2 else 0,
            )
            output = optimizer.engine.training_forward_pass(made)
            optimizer.step(output.loss, step)
            losses.append(output.loss.item())
    return {name: p.detach() for name, p in optimizer.parameters.items()} | optimizer.row_tensors(), losses


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("topk", "float32"), pytest.param("batchtopk", "bfloat16", marks=pytest.mark.slow)]
)
def test_a_whole_run_on_either_kernels_is_the_same(architecture: str, dtype: str) -> None:
    """Of 8 steps of up to 0.02 each.

    float32: sums differ in their last bits, by about 1e-7, which Adam lets grow where a gradient is rounding; no latent
    is selected by one run alone, which would show as a whole step. bfloat16: a reconstruction may round to the next of
    2**-8, and so the loss, which is its square; and a gradient near 0 may have either sign, for some steps of 8.
    """
    (fast, fast_losses), (slow, slow_losses) = (trained(architecture, dtype, kernels) for kernels in (fused, plain))
    assert fast_losses == pytest.approx(slow_losses, rel=1e-5 if dtype == "float32" else 2**-6)
    assert slow_losses[-2] < 0.8 * slow_losses[0]
    for name, tensor in fast.items():
        difference = (tensor - slow[name]).abs().max() / slow[name].abs().max()
        assert difference < (1e-4 if dtype == "float32" else 0.25), name
