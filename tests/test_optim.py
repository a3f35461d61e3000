"""Adam, clip-norm, schedule and guard: against torch and SAELens, and shards against the whole."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import run_ranks
from scale_sae.collectives import Shard
from scale_sae.config import TrainConfig
from scale_sae.engines import LocalEngine
from scale_sae.optim import Optimizer, learning_rate
from scale_sae.saes import TrainingSAE, TrainStepInput, create, training_config

D_IN, D_SAE, BATCH, STEPS = 12, 48, 64, 40
# High enough that the weights move by more than their size; the gradient's norm is above and below the clip by turns.
LR = 0.02
TRAIN = TrainConfig(lr=LR, lr_warm_up_steps=5, lr_decay_steps=10, max_grad_norm=3.0)
ONE = Shard()


def batch(step: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    basis = torch.randn(20, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixture = torch.rand(BATCH, 20, dtype=torch.float64, generator=generator).pow(8)
    return scale * (mixture @ basis + 0.5)


def new(shard: Shard = ONE, **options: Any) -> TrainingSAE:
    cfg = training_config("topk", D_IN, {"d_sae": D_SAE, "k": 3, "dtype": "float64", **options}, "saes.0")
    sae = create("topk", cfg, shard)
    sae.initialize(0, "model.layers.0")
    return sae


class Run:
    """An SAE in training; a latent is dead after 2 steps without firing."""

    def __init__(self, shard: Shard = ONE, train: TrainConfig = TRAIN):
        self.sae = new(shard)
        self.optimizer = Optimizer(LocalEngine(self.sae), train, STEPS)
        self.silent = torch.zeros(self.sae.n_local, dtype=torch.int64)
        self.norms: list[Tensor] = []
        self.aux: list[Tensor] = []

    def step(self, step: int, x: Tensor | None = None) -> None:
        dead = self.silent > 2
        num_dead = int(self.sae.shard.all_reduce(dead.sum()))
        out = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=batch(step) if x is None else x,
                coefficients={},
                dead_neuron_mask=dead,
                n_training_steps=step,
                is_logging_step=False,
                num_dead=num_dead,
            )
        )
        self.norms.append(self.optimizer.step(out.loss, step))
        self.aux.append(out.losses["auxiliary_reconstruction_loss"].detach())
        self.silent = (self.silent + 1).masked_fill(out.fire_counts > 0, 0)

    def rows(self) -> dict[str, Tensor]:
        own = {name: p.data for name, p in self.sae.named_parameters() if name not in self.sae.replicated}
        return own | self.optimizer.row_tensors()

    def replicated(self) -> dict[str, Tensor]:
        return {"b_dec": self.sae.b_dec.data} | self.optimizer.replicated_tensors()


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


# ---- training -------------------------------------------------------------------------------------------------------


def train_sharded(shard: Shard) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    run = Run(shard)
    for step in range(STEPS):
        run.step(step)
    return run.rows(), run.replicated(), torch.stack(run.norms), torch.stack(run.aux)


@pytest.mark.parametrize("tp", [2, 4])
def test_training_is_the_same_on_any_number_of_shards(tp: int) -> None:
    """40 float64 steps with clipping and dead latents. Sums in another order leave 1e-13 or so; the promise is 1e-9."""
    rows, replicated, norms, aux = train_sharded(ONE)
    assert (norms > TRAIN.max_grad_norm).any() and (norms < TRAIN.max_grad_norm).any()
    assert (aux > 0).sum() > STEPS / 2
    start = new().get_parameter("W_dec")
    assert (rows["W_dec"] - start).abs().max() > start.abs().max()

    parts = run_ranks(tp, lambda rank, world: train_sharded(Shard(rank, world)))
    expected = rows | replicated | {"norms": norms, "aux": aux}
    actual = {name: torch.cat([part[0][name] for part in parts]) for name in rows}
    actual |= parts[0][1] | {"norms": parts[0][2], "aux": parts[0][3]}
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() <= 1e-12 * tensor.abs().max(), name
    for part in parts:  # replicated tensors may not drift apart at all
        for name, tensor in parts[0][1].items():
            assert torch.equal(part[1][name], tensor), name
        assert torch.equal(part[2], parts[0][2])


def test_training_equals_saelens() -> None:
    """SAELens's loop: its SAE, torch's clip and unfused Adam, its scheduler."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import TrainStepInput as SAELensInput

    run = Run()
    theirs = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3, dtype="float64"))
    theirs.W_enc.data = run.sae.W_enc.detach().clone().contiguous()
    theirs.W_dec.data = run.sae.W_dec.detach().clone()
    adam = torch.optim.Adam(theirs.parameters(), lr=LR, betas=(TRAIN.adam_beta1, TRAIN.adam_beta2))
    scheduler = saelens_scheduler(adam, TRAIN, STEPS)
    silent = torch.zeros(D_SAE, dtype=torch.int64)
    for step in range(STEPS):
        out = theirs.training_forward_pass(SAELensInput(batch(step), {}, silent > 2, step, False))
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), TRAIN.max_grad_norm)
        adam.step()
        adam.zero_grad()
        scheduler.step()
        silent = (silent + 1).masked_fill((out.feature_acts > 0).any(0), 0)
        run.step(step)
        torch.testing.assert_close(run.norms[-1], norm, rtol=1e-10, atol=0)
    for ours, expected in ((run.sae.W_enc, theirs.W_enc), (run.sae.W_dec, theirs.W_dec), (run.sae.b_dec, theirs.b_dec)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)  # roundings of 1e-16, grown over 40 steps


# ---- the guard ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad: str) -> None:
    run, twin = Run(), Run()
    for step in range(3):
        run.step(step)
        twin.step(step)
    before = snapshot(run.rows() | run.replicated())
    p = run.sae.W_dec
    # The gradient of a root at 0 is infinite, the root is not.
    loss = p.sum() * torch.inf if bad == "loss" else (p[0, 0] - p[0, 0].detach()).sqrt()
    norm = run.optimizer.step(loss, 3)
    assert not norm.isfinite()
    assert loss.isfinite() == (bad == "gradient")
    after = run.rows() | run.replicated()
    assert after.pop("skipped") == 1 and before.pop("skipped") == 0
    assert all(torch.equal(after[name], before[name]) for name in before)
    run.step(3)
    twin.step(3)
    assert all(torch.equal(tensor, twin.rows()[name]) for name, tensor in run.rows().items())


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is() -> None:
    run = Run()
    before = run.sae.W_dec.detach().clone()
    norm = run.optimizer.step(run.sae.W_dec.sum() + torch.nan, 0)
    assert norm.isfinite() and run.optimizer.skipped == 1
    assert torch.equal(run.sae.W_dec, before)


def test_one_shard_s_bad_gradient_stops_all() -> None:
    def run(rank: int, world: int) -> tuple[bool, int]:
        shard = Shard(rank, world)
        sae = new(shard)
        optimizer = Optimizer(LocalEngine(sae), TRAIN, STEPS)
        before = sae.W_dec.detach().clone()
        p = sae.W_dec[0, 0]
        optimizer.step((p - p.detach()).sqrt() if rank == 1 else p.square(), 0)  # the losses are finite on both
        return torch.equal(sae.W_dec, before), int(optimizer.skipped)

    assert run_ranks(2, run) == [(True, 1), (True, 1)]


# ---- clip-norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 4])
def test_clip_norm_counts_replicated_parameters_once(tp: int) -> None:
    """With gradients of 1 everywhere the norm is the root of the number of parameters, on any number of shards."""

    def run(rank: int, world: int) -> Tensor:
        shard = Shard(rank, world)
        sae = new(shard)
        loss = torch.stack([p.sum() for p in sae.parameters()]).sum()
        return Optimizer(LocalEngine(sae), TRAIN, STEPS).step(loss, 0)

    n = 2 * D_SAE * D_IN + D_SAE + D_IN
    for norm in [run(0, 1)] if tp == 1 else run_ranks(tp, run):
        assert norm.item() == pytest.approx(n**0.5, rel=1e-14)


# ---- state ----------------------------------------------------------------------------------------------------------


def test_state_is_there_from_the_start_and_covers_every_parameter() -> None:
    optimizer = Run().optimizer
    rows, replicated = optimizer.row_tensors(), optimizer.replicated_tensors()
    per_latent = {"W_enc_rows", "W_dec", "b_enc"}
    assert rows.keys() == {f"adam.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in per_latent}
    assert replicated.keys() == {
        "skipped",
        "adam.exp_avg.b_dec",
        "adam.exp_avg_sq.b_dec",
        *(f"adam.step.{name}" for name in per_latent | {"b_dec"}),
    }
    assert all(len(tensor) == D_SAE for tensor in rows.values())
    assert not any(tensor.any() for tensor in (rows | replicated).values())


def test_state_copied_into_a_new_run_goes_on_bitwise() -> None:
    run = Run()
    for step in range(6):
        run.step(step)
    resumed = Run()
    for name, tensor in (resumed.rows() | resumed.replicated()).items():
        tensor.copy_((run.rows() | run.replicated())[name])
    resumed.silent.copy_(run.silent)
    for step in range(6, 12):
        run.step(step)
        resumed.step(step)
    expected = run.rows() | run.replicated()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in (resumed.rows() | resumed.replicated()).items())


# ---- the schedule ---------------------------------------------------------------------------------------------------


def saelens_scheduler(adam: torch.optim.Optimizer, train: TrainConfig, total_steps: int) -> Any:
    from sae_lens.training.optim import get_lr_scheduler

    assert train.lr is not None
    return get_lr_scheduler(
        train.lr_scheduler_name,
        adam,
        training_steps=total_steps,
        lr=train.lr,
        warm_up_steps=train.lr_warm_up_steps,
        decay_steps=train.lr_decay_steps,
        lr_end=train.lr / 10 if train.lr_end is None else train.lr_end,
        num_cycles=train.n_restart_cycles,
    )


def schedules() -> Iterator[TrainConfig]:
    for warm_up in (0, 1, 7):
        for decay in (0, 1, 11):
            constant = TrainConfig(lr=3e-4, lr_warm_up_steps=warm_up, lr_decay_steps=decay)
            yield constant
            yield replace(constant, lr_scheduler_name="cosineannealing")
            yield replace(constant, lr_scheduler_name="cosineannealing", lr_end=2e-4)
            yield replace(constant, lr_scheduler_name="cosineannealingwarmrestarts", n_restart_cycles=3)


@pytest.mark.filterwarnings("ignore")  # torch warns of the order in which SAELens steps its schedulers
@pytest.mark.parametrize("total_steps", [40, 41])
def test_schedule_equals_saelens(total_steps: int) -> None:
    pytest.importorskip("sae_lens")
    for train in schedules():
        adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=train.lr or 0.0)
        scheduler = saelens_scheduler(adam, train, total_steps)
        for step in range(total_steps):
            ours, theirs = learning_rate(step, total_steps, train), adam.param_groups[0]["lr"]
            assert ours == pytest.approx(theirs, rel=1e-12), (train, step)
            adam.step()
            scheduler.step()


def test_schedule_sets_the_step_size() -> None:
    """Adam's first update moves every weight by lr, here 1/5 of the peak."""
    run = Run()
    before = run.sae.b_dec.detach().clone()
    run.step(0)
    moved = (run.sae.b_dec - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, LR / 5), rtol=1e-5, atol=0)  # eps is 1e-8 beside |g|
