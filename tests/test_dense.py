"""Steps of standard, gated and JumpReLU SAEs on the entries that count, against the same formulas on all entries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from saes_for_tests import (
    BATCH,
    D_IN,
    D_SAE,
    Case,
    Step,
    assert_close,
    build,
    differences,
    inputs,
    local_step,
    our_step,
    sharded_steps,
    step_input,
)
from scale_sae.collectives import Shard
from scale_sae.kernels import dense
from scale_sae.kernels.codes import Codes, Encoder
from scale_sae.kernels.dense import AllEntries, SomeEntries, choose_entries, encode_dense
from scale_sae.saes import (
    GatedTrainingSAE,
    JumpReLUTrainingSAE,
    StandardTrainingSAE,
    TrainingSAE,
    TrainStepInput,
    create,
    training_config,
)
from scale_sae.saes.base import SparseTrainStepOutput
from scale_sae.saes.entrywise import EntrywiseTrainingSAE

# Sums in another order: some roundings of 1e-16, magnified up to a thousandfold by the slopes of roots.
TOLERANCE = 1e-12
ON_ALL, ON_SOME = -1.0, 2.0  # thresholds of the share of entries that every batch is above, and that none is

CASES = [
    Case("standard"),
    Case("standard", {"lp_norm": 2.0}),
    Case("standard", {"lp_norm": 0.5}),
    Case("standard", {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"}),
    Case("gated"),
    Case("gated", {"normalize_activations": "constant_norm_rescale"}),
    *(
        Case("jumprelu", {"jumprelu_sparsity_loss_mode": mode, "jumprelu_ste_to_input": to_input, "target_l0": 9.0}, n)
        for mode in ("step", "tanh", "quadratic")
        for to_input in (False, True)
        for n in (0, 3)
    ),
    Case("jumprelu", {"pre_act_loss_coefficient": None, "jumprelu_bandwidth": 2.0}, 30),
    Case("transcoder"),
    Case("skip_transcoder"),
    Case("jumprelu_skip_transcoder", n_dead=3),
]


def steps(tp: int, share: float, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps on tp shards, which compute on all entries where more than ``share`` of them count."""
    monkeypatch.setitem(dense.DENSE_ABOVE, "cpu", share)
    return sharded_steps(tp, [our_step(case, torch.float64) for case in cases])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_both_ways_give_the_same_step(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, activations, counts and gradients; about half of the entries count, so that all kinds do."""
    on_all = steps(tp, ON_ALL, CASES, monkeypatch)
    on_some = steps(tp, ON_SOME, CASES, monkeypatch)
    for case, expected, actual in zip(CASES, on_all, on_some, strict=True):
        assert_close(actual, expected, TOLERANCE, case)
    # In another order of additions; if all were equal in every bit, both would have gone the same way.
    assert all(any(differences(a, b).values()) for a, b in zip(on_all, on_some, strict=True))


def test_shards_may_go_different_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold between the shards' shares some compute on all entries and some on few: nobody waits."""
    cases = [Case("standard"), Case("gated"), Case("jumprelu", n_dead=3)]
    shares = [[count_share(case, Shard(rank, 4)) for rank in range(4)] for case in cases]
    for case, of_case in zip(cases, shares, strict=True):
        low, *_, high = sorted(of_case)
        assert low < high
        expected = steps(1, ON_ALL, [case], monkeypatch)
        assert_close(steps(4, (low + high) / 2, [case], monkeypatch)[0], expected[0], TOLERANCE, case)
    # Also where a subclass makes the activations a part of its loss, which on few entries takes one encoder more.
    found = []
    for tp, share in ((1, ON_ALL), (4, sum(shares[0]) / 4)):
        monkeypatch.setitem(dense.DENSE_ABOVE, "cpu", share)
        found += sharded_steps(tp, [lambda shard: local_step(build(cases[0], shard, sae_class=Scaled), cases[0])])
    assert_close(found[1], found[0], TOLERANCE)


@pytest.mark.parametrize("case", [Case("standard"), Case("gated"), Case("jumprelu", n_dead=3)], ids=str)
def test_both_ways_in_bfloat16(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 the way on few entries, which sums in float32, is at most as wrong as that on all.

    And so are shards of which some go one way and some the other: what they send each other has one type.
    """
    shares = [count_share(case, Shard(rank, 4)) for rank in range(4)]
    between = (min(shares) + max(shares)) / 2
    ways = [
        (1, ON_ALL, torch.float64),
        (1, ON_ALL, torch.bfloat16),
        (1, ON_SOME, torch.bfloat16),
        (4, between, torch.bfloat16),
    ]
    found = []
    for tp, share, dtype in ways:
        monkeypatch.setitem(dense.DENSE_ABOVE, "cpu", share)
        (step,) = sharded_steps(tp, [our_step(case, dtype)])
        found.append({name: x.double() for name, x in step.items() if name.startswith(("grad", "loss", "sae_out"))})
    exact, on_all, *others = found
    by_all = differences(on_all, exact)
    for other in others:
        by_other = differences(other, exact)
        # Roundings of 1/256, which may add up or cancel in either.
        assert all(by_other[name] <= 2 * by_all[name] + 2**-7 for name in exact), (by_all, by_other)


def count_share(case: Case, shard: Shard) -> float:
    """The share of a shard's entries that count."""
    sae = build(case, shard)
    assert isinstance(sae, EntrywiseTrainingSAE)
    given = step_input(sae, case, inputs())
    with torch.no_grad():
        pre = inputs() - (sae.b_dec if sae.cfg.apply_b_dec_to_input else 0)
        pre = pre @ sae.W_enc + sae.encoder_bias
        return sae.may_count(pre, given).double().mean().item()


# ---- that the chosen way is the one that runs ----------------------------------------------------------------------


class LargeProducts(TorchDispatchMode):
    """Counts dense products of so many multiply-adds at least, and notes the most elements of any tensor of floats."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least, self.count, self.made = at_least, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "linear"):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1] >= self.at_least
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.made = max(self.made, tensor.numel())
        return result


@dataclass(frozen=True)
class Sparse:
    """An SAE of which about one in 60 pre-activations counts, on a batch large enough to tell sizes apart."""

    architecture: str
    d_in: int = 24
    d_sae: int = 512
    rows: int = 256

    def step(self) -> tuple[TrainingSAE, TrainStepInput]:
        cfg = training_config(self.architecture, self.d_in, {"d_sae": self.d_sae}, "saes.0")
        sae = create(self.architecture, cfg, Shard())
        sae.initialize(0, "h")
        with torch.no_grad():
            sae.W_enc_rows.copy_(F.normalize(sae.W_enc_rows))
            for name in ("b_enc", "b_gate"):
                if hasattr(sae, name):
                    sae.get_parameter(name).fill_(-2.13)
        x = torch.randn(self.rows, self.d_in, generator=torch.Generator().manual_seed(0))
        return sae, TrainStepInput(
            sae_in=x,
            coefficients={"l1": 0.5, "l0": 0.5},
            dead_neuron_mask=torch.zeros(self.d_sae, dtype=torch.bool),
            n_training_steps=0,
            is_logging_step=False,
            num_dead=0,
        )


ENCODERS = {"standard": 5, "gated": 8, "jumprelu": 5}  # products of a step on all entries


@pytest.mark.parametrize("architecture", ENCODERS)
def test_a_sparse_batch_takes_one_product(architecture: str) -> None:
    """The encoder's alone; and nothing else of its size is made, forward or backward, until somebody asks for it."""
    sparse = Sparse(architecture)
    sae, given = sparse.step()
    with LargeProducts(sparse.rows * sparse.d_in * sparse.d_sae) as products:
        output = sae.training_forward_pass(given)
        output.loss.backward()
        counts = output.fire_counts
    assert products.count == 1
    assert isinstance(output, SparseTrainStepOutput)
    assert products.made == sparse.rows * sparse.d_sae  # the pre-activations
    assert 0 < output.active_latents < 0.04 * sparse.rows * sparse.d_sae
    assert torch.equal(counts, (output.feature_acts != 0).sum(0))
    assert all(parameter.grad is not None for parameter in sae.parameters())


@pytest.mark.parametrize("architecture", ENCODERS)
def test_a_full_batch_takes_all_products(architecture: str) -> None:
    sparse = Sparse(architecture)
    sae, given = sparse.step()
    with torch.no_grad():
        for name in ("b_enc", "b_gate"):
            if hasattr(sae, name):
                sae.get_parameter(name).zero_()
    with LargeProducts(sparse.rows * sparse.d_in * sparse.d_sae) as products:
        output = sae.training_forward_pass(given)
        output.loss.backward()
    assert products.count == ENCODERS[architecture]
    assert not isinstance(output, SparseTrainStepOutput)


def test_the_threshold_is_what_the_choice_is_by() -> None:
    encoder, most = encoder_of(100, 8, 40), dense.DENSE_ABOVE["cpu"] * 4000
    for count, expected in ((int(most), SomeEntries), (int(most) + 1, AllEntries)):
        counts = torch.zeros(4000, dtype=torch.bool)
        counts[torch.randperm(4000)[:count]] = True
        assert isinstance(choose_entries(encoder, 100, lambda pre: counts.view(100, 40)), expected)  # noqa: B023


def encoder_of(n_rows: int, d_in: int, n_latents: int) -> Encoder:
    x, W_rows, b = (torch.randn(shape).double() for shape in ((n_rows, d_in), (n_latents, d_in), (n_latents,)))
    return Encoder(x, None, W_rows, b)


@pytest.mark.parametrize("block_rows", [1, 7, 20, 64])
@pytest.mark.parametrize("share", [ON_ALL, ON_SOME])
def test_blocks_of_rows_change_nothing(block_rows: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dense.DENSE_ABOVE, "cpu", share)
    encoder = encoder_of(20, 4, 30)
    # Rows of a product may differ in the last bit with the number of rows that it has.
    whole = F.linear(encoder.x, encoder.W_rows, encoder.b)
    chosen = choose_entries(encoder, block_rows, lambda pre: pre > 0.5)
    if isinstance(chosen, AllEntries):
        torch.testing.assert_close(chosen.pre, whole, rtol=1e-14, atol=1e-14)
        # Memory that is used again would change under an SAE that waits for others.
        choose_entries(encoder_of(20, 4, 30), block_rows, lambda pre: pre > 0.5)
        torch.testing.assert_close(chosen.pre, whole, rtol=1e-14, atol=1e-14)
        return
    rows, latents = (whole > 0.5).nonzero(as_tuple=True)
    assert torch.equal(chosen.codes.rows, rows) and torch.equal(chosen.codes.latents, latents)
    torch.testing.assert_close(chosen.codes.values, whole[rows, latents], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("case", [Case("standard"), Case("gated"), Case("jumprelu", n_dead=3)], ids=str)
def test_a_rank_without_rows(case: Case) -> None:
    """Where dp ranks share a small batch, one may have none; its loss is a mean over nothing and is left out."""
    sae = build(case, Shard())
    output = sae.training_forward_pass(step_input(sae, case, inputs()[:0]))
    assert output.sae_out.shape == (0, D_IN)
    assert not output.fire_counts.any() and len(output.fire_counts) == D_SAE


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("share", [ON_ALL, ON_SOME])
def test_what_is_not_a_number_reaches_the_loss(
    architecture: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dense.DENSE_ABOVE, "cpu", share)
    for value, expected in ((float("nan"), True), (float("-inf"), False)):
        sae, given = Sparse(architecture).step()
        for name in ("b_mag", "b_gate") if architecture == "gated" else ("b_enc",):
            sae.get_parameter(name).data[3] = value
        loss = sae.training_forward_pass(given).loss
        assert bool(loss.isnan()) == expected, value


# ---- classes of one's own ------------------------------------------------------------------------------------------


class SoftPlus(StandardTrainingSAE):
    """Nowhere 0."""

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return F.softplus


class SquaredLoss(JumpReLUTrainingSAE):
    """Its own loss sees every pre-activation, also those far below the threshold."""

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        return losses | {"mine": hidden_pre.square().mean()}


class Doubled(GatedTrainingSAE):
    def decode(self, feature_acts: Tensor, latents: slice = slice(None)) -> Tensor:
        return 2 * super().decode(feature_acts, latents)


@pytest.mark.parametrize(
    ("sae_class", "architecture"), [(SoftPlus, "standard"), (SquaredLoss, "jumprelu"), (Doubled, "gated")]
)
def test_a_subclass_that_replaces_a_hook_works_on_all_entries(
    sae_class: type[TrainingSAE], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(architecture)
    found = []
    for share in (ON_ALL, ON_SOME):
        monkeypatch.setitem(dense.DENSE_ABOVE, "cpu", share)
        sae = build(case, Shard(), sae_class=sae_class)
        output = sae.training_forward_pass(step_input(sae, case, inputs()))
        assert not isinstance(output, SparseTrainStepOutput)
        acts, hidden_pre = sae.encode_with_hidden_pre(inputs())
        assert torch.equal(output.feature_acts, acts) and torch.equal(output.hidden_pre, hidden_pre)
        output.loss.backward()
        found.append([parameter.grad for parameter in sae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert output.feature_acts.shape == (BATCH, D_SAE)


class Scaled(StandardTrainingSAE):
    """Replaces the step around the package's own, not what is in it."""

    def training_forward_pass(self, step_input: TrainStepInput) -> Any:
        output = super().training_forward_pass(step_input)
        output.loss = 2 * output.loss + self.shard.sum(output.feature_acts.sum())
        return output


def test_a_subclass_may_ask_for_dense_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    case, found = Case("standard"), []
    for share in (ON_ALL, ON_SOME):
        monkeypatch.setitem(dense.DENSE_ABOVE, "cpu", share)
        sae = build(case, Shard(), sae_class=Scaled)
        output = sae.training_forward_pass(step_input(sae, case, inputs()))
        assert isinstance(output, SparseTrainStepOutput) == (share == ON_SOME)
        output.loss.backward()
        found.append({name: p.grad for name, p in sae.named_parameters() if p.grad is not None})
    assert_close(found[1], found[0], TOLERANCE)


# ---- the functions -------------------------------------------------------------------------------------------------


def some_entries() -> SomeEntries:
    """Of 6 rows and 9 latents; a row and some latents have none."""
    pre = torch.randn(6, 9, generator=torch.Generator().manual_seed(3)).double()
    pre[2] = pre[:, 4] = -1
    rows, latents = (pre > 0.2).nonzero(as_tuple=True)
    return SomeEntries(Codes(rows, latents, pre[rows, latents], 6, 9))


def test_gradients_of_what_formulas_are_made_of() -> None:
    entries = some_entries()
    values = entries.codes.values.clone().requires_grad_()
    vector, W = torch.randn(9).double().requires_grad_(), torch.randn(9, 3).double().requires_grad_()
    assert gradcheck(entries.of_latents, [vector])
    assert gradcheck(entries.row_sums, [values])
    assert gradcheck(entries.row_sums, [values, vector])
    assert gradcheck(entries.decode, [values, W])


def test_formulas_mean_the_same_on_all_entries() -> None:
    entries = some_entries()
    whole = torch.zeros(6, 9).double()
    whole[entries.codes.rows, entries.codes.latents] = entries.codes.values
    on_all, vector, W = AllEntries(whole), torch.randn(9).double(), torch.randn(9, 3).double()
    values = entries.codes.values
    torch.testing.assert_close(entries.row_sums(values), on_all.row_sums(whole), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(entries.row_sums(values, vector), on_all.row_sums(whole, vector), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(entries.decode(values, W), on_all.decode(whole, W), rtol=1e-14, atol=1e-14)
    assert torch.equal(entries.of_latents(vector), vector.expand(6, 9)[entries.codes.rows, entries.codes.latents])


def test_sums_of_all_entries_in_bfloat16_are_rounded_once_at_most() -> None:
    generator = torch.Generator().manual_seed(4)
    values, weights = (torch.rand(shape, generator=generator).bfloat16() for shape in ((8, 4096), (4096,)))
    entries = AllEntries(values)
    # float32 adds 4096 numbers up to 2^-12 at worst. A sum in bfloat16 is several times off, as it stops at 2^8.
    for found, exact, rounding in (
        (entries.row_sums(values), values.double().sum(1), 2**-12),
        (entries.row_sums(values, weights), values.double() @ weights.double(), 2**-8 + 2**-12),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=0)


def test_active_entries_are_those_with_a_value() -> None:
    entries = some_entries()
    values = entries.codes.values.clone()
    assert entries.active(values).latents is entries.codes.latents
    values[[0, 4]] = 0
    active = entries.active(values.requires_grad_())
    assert not active.values.requires_grad
    kept = values != 0
    assert torch.equal(active.rows, entries.codes.rows[kept]) and torch.equal(active.values, values[kept])


@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_dense_pre_activations_and_their_gradients(with_shift: bool, given: bool) -> None:
    x = torch.randn(6, 4).double()
    shift, W_rows, b = parameters = [torch.randn(shape).double().requires_grad_() for shape in ((4,), (9, 4), (9,))]
    expected = (x - shift if with_shift else x) @ W_rows.T + b
    encoder = Encoder(x - shift.detach() if with_shift else x, shift if with_shift else None, W_rows, b)
    actual = encode_dense(encoder, expected.detach() if given else None)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)

    upstream = torch.randn(6, 9).double()
    found, wanted = (
        torch.autograd.grad(output, parameters, upstream, materialize_grads=True) for output in (actual, expected)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert with_shift == bool(found[0].any())


def test_the_shift_s_gradient_costs_no_product_of_the_batch() -> None:
    x, shift = torch.randn(32, 4), torch.randn(4).requires_grad_()
    W_rows, b = torch.randn(64, 4).requires_grad_(), torch.randn(64).requires_grad_()
    with LargeProducts(32 * 4 * 64) as products:
        encode_dense(Encoder(x, shift, W_rows, b)).square().sum().backward()
    assert products.count == 2
