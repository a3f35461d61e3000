"""Gradients that are never written out, Adam on them, and what a step of the engine local holds in memory."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from harness import run_ranks
from runs import forked_run, sae_state, tiny_config, write_config
from saes_for_tests import shard_in_grid
from scale_sae.collectives import Shard
from scale_sae.config import TrainConfig
from scale_sae.engines import FSDP2Engine, LocalEngine
from scale_sae.kernels import plain
from scale_sae.kernels.rows import AdamStep, Collected, RowGradient
from scale_sae.optim import Optimizer
from scale_sae.saes import TopKTrainingSAE as TopK
from scale_sae.saes import TrainingSAE, TrainStepInput, create, training_config

N, D, ROWS = 37, 6, 20


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a gradient of this size comes in several, the last one shorter."""
    torch.manual_seed(0)
    monkeypatch.setattr(plain, "_BLOCK_BYTES", 5 * D * 8)


def gradients(dtype: torch.dtype = torch.float64) -> dict[str, tuple[RowGradient, Tensor]]:
    """Every form that a gradient has, and what it stands for."""
    chosen = torch.rand(N, ROWS) < 0.2
    chosen[[0, 7, N - 1]] = False  # latents without entries
    chosen[3] = True
    latents, rows = chosen.nonzero().unbind(1)
    offsets = torch.searchsorted(latents, torch.arange(N + 1))
    weights, table = torch.randn(len(rows)).to(dtype), torch.randn(ROWS, D).to(dtype)
    some, extra = torch.tensor([36, 0, 3, 12]), torch.randn(4, D).to(dtype)
    sparse = torch.zeros(N, ROWS, dtype=dtype).index_put((latents, rows), weights) @ table
    added = torch.zeros(N, D, dtype=dtype).index_put((some,), extra)
    found = {}
    for name, parts in {"entries": (1, 0), "rows": (0, 1), "both": (1, 1)}.items():
        collected = Collected()
        if parts[0]:
            collected.add_entries(rows, offsets, weights, table)
        if parts[1]:  # in two parts, of which the second is empty
            collected.add_rows(some, extra)
            collected.add_rows(some[:0], extra[:0])
        gradient = collected.take(N)
        assert gradient is not None and collected.take(N) is None
        found[name] = gradient, parts[0] * sparse + parts[1] * added
    return found | {"dense": (RowGradient(extra_rows=sparse), sparse)}


@pytest.mark.parametrize("form", ["entries", "rows", "both", "dense"])
def test_adam_on_products_equals_adam_on_the_dense_gradient(form: str) -> None:
    parameter = torch.nn.Parameter(torch.randn(N, D).double())
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.8, 0.9))
    weight, moments = parameter.detach().clone(), [torch.zeros(N, D).double() for _ in range(2)]
    follower = torch.zeros(N, D, dtype=torch.bfloat16)
    clip = torch.tensor(0.3)
    for step in range(1, 4):
        gradient, dense = gradients()[form]
        assert gradient.shape == (N, D)
        # In float64 the sums differ by their order alone.
        torch.testing.assert_close(plain.dense_rows(gradient), dense, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(plain.row_squares(gradient), dense.square().sum(1), rtol=1e-13, atol=1e-13)
        update = AdamStep(torch.tensor(float(step)), 0.01, 0.8, 0.9, clip, torch.tensor(False))
        skipped = [weight.clone(), *(moment.clone() for moment in moments)]
        plain.adam_rows(gradient, weight, moments[0], moments[1], replace(update, skip=torch.tensor(True)))
        assert all(torch.equal(a, b) for a, b in zip([weight, *moments], skipped, strict=True))
        plain.adam_rows(gradient, weight, moments[0], moments[1], update, follower)
        parameter.grad = dense * clip
        adam.step()
        torch.testing.assert_close(weight, parameter.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(follower, weight.bfloat16())


def test_rounding_is_unbiased_and_depends_on_the_place_alone() -> None:
    x = torch.randn(300, 8) * torch.logspace(-20, 20, 8)
    many = torch.stack([plain.round_stochastically(x, seed, 0).double() for seed in range(400)])
    below = (x.view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    spacing = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double() - below
    share = (x.double() - below) / spacing  # of the way to the next bfloat16: how often it must be taken
    up = (many - below) / spacing
    assert ((up == 0) | (up == 1)).all()
    # The mean over 2400 places of 400 draws each has a standard deviation of √(Σ share(1 − share) / 400) / 2400.
    sigma = float((share * (1 - share) / 400).sum().sqrt()) / share.numel()
    assert abs(float((up.mean(0) - share).mean())) < 4 * sigma
    # And each place for itself: of 2400 normal deviations none is beyond 5.
    assert ((up.mean(0) - share).abs() < 5 * (share * (1 - share) / 400).sqrt() + 1e-9).all()
    whole = plain.round_stochastically(x, 7, 1000)
    assert torch.equal(plain.round_stochastically(x[100:], 7, 1100), whole[100:])
    assert not torch.equal(plain.round_stochastically(x, 8, 1000), whole)
    assert torch.equal(plain.round_stochastically(whole.float(), 9, 5), whole)  # nothing to round


# ---- whole steps -----------------------------------------------------------------------------------------------------


def new(architecture: str, shard: Shard, d_in: int, d_sae: int, **options: Any) -> TrainingSAE:
    cfg = training_config(architecture, d_in, {"d_sae": d_sae, "k": 4, **options}, "saes.0")
    sae = create(architecture, cfg, shard)
    sae.initialize(0, "model.layers.0")
    return sae


def step_input(x: Tensor, sae: TrainingSAE, step: int, dead: Tensor | None = None) -> TrainStepInput:
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool) if dead is None else dead
    return TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=mask[sae.rows],
        n_training_steps=step,
        is_logging_step=False,
        num_dead=int(mask.sum()),
    )


@pytest.mark.parametrize("num_dead", [0, 5, 40])
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "batchtopk", "matryoshka_batchtopk"])
def test_collected_gradients_equal_those_of_autograd(architecture: str, num_dead: int) -> None:
    """Of which the parity tests say that they are right. 12 wide, so k_aux is 6: fewer are dead, and more."""
    widths = {"matryoshka_widths": [10, 30]} if architecture.startswith("matryoshka") else {}
    saes = [new(architecture, Shard(), 12, 64, dtype="float64", **widths) for _ in range(2)]
    engine = LocalEngine(saes[0])
    saes[0].pre_activation_bytes = 5 * 64 * 8  # blocks of 5 rows
    dead = torch.zeros(64, dtype=torch.bool)
    dead[torch.randperm(64)[:num_dead]] = True
    x = torch.randn(32, 12).double()
    found = engine.backward(engine.training_forward_pass(step_input(x, saes[0], 0, dead)).loss)
    saes[1].training_forward_pass(step_input(x, saes[1], 0, dead)).loss.backward()
    assert found.keys() == {"W_enc_rows", "W_dec"}
    for name, parameter in saes[1].named_parameters():
        assert parameter.grad is not None
        mine = plain.dense_rows(found[name]) if name in found else engine.parameters[name].grad
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-14)


class Penalised(TopK):
    """A subclass with a term on the weights alone, whose gradient is dense."""

    def training_forward_pass(self, step_input: TrainStepInput) -> Any:
        output = super().training_forward_pass(step_input)
        output.loss = output.loss + self.W_dec.pow(4).sum()
        return output


def test_terms_of_a_subclass_are_added() -> None:
    cfg = training_config("topk", 12, {"d_sae": 64, "k": 4, "dtype": "float64"}, "saes.0")
    saes = [Penalised(cfg, Shard()) for _ in range(2)]
    for sae in saes:
        sae.initialize(0, "model.layers.0")
    x = torch.randn(32, 12).double()
    engine = LocalEngine(saes[0])
    found = engine.backward(engine.training_forward_pass(step_input(x, saes[0], 0)).loss)
    saes[1].training_forward_pass(step_input(x, saes[1], 0)).loss.backward()
    torch.testing.assert_close(plain.dense_rows(found["W_dec"]), saes[1].W_dec.grad, rtol=1e-12, atol=1e-14)


class Twice(TopK):
    """Compares what two views of the batch reconstruct."""

    def training_forward_pass(self, step_input: TrainStepInput) -> Any:
        output = super().training_forward_pass(step_input)
        other = super().training_forward_pass(replace(step_input, sae_in=step_input.sae_in + 0.1))
        output.loss = output.loss + (output.sae_out - other.sae_out).square().mean() + other.loss
        return output


@pytest.mark.parametrize("num_dead", [0, 4, 30])
def test_a_class_may_run_the_step_twice(num_dead: int) -> None:
    cfg = training_config("topk", 12, {"d_sae": 64, "k": 4, "dtype": "float64"}, "saes.0")
    saes = [Twice(cfg, Shard()) for _ in range(2)]
    dead = torch.arange(64) < num_dead
    for sae in saes:
        sae.initialize(0, "model.layers.0")
    x = torch.randn(32, 12).double()
    engine = LocalEngine(saes[0])
    found = engine.backward(engine.training_forward_pass(step_input(x, saes[0], 0, dead)).loss)
    saes[1].training_forward_pass(step_input(x, saes[1], 0, dead)).loss.backward()
    for name in ("W_dec", "W_enc_rows"):
        expected = saes[1].get_parameter(name).grad
        torch.testing.assert_close(plain.dense_rows(found[name]), expected, rtol=1e-12, atol=1e-14)


def test_what_looks_at_a_gradient_sees_it_and_what_is_frozen_stays() -> None:
    sae = new("topk", Shard(), 12, 64)
    seen: list[Tensor] = []
    sae.W_dec.register_hook(lambda grad: seen.append(grad) or torch.zeros_like(grad))  # type: ignore[func-returns-value]
    sae.W_enc_rows.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    optimizer = Optimizer(LocalEngine(sae), TrainConfig(lr=0.01), 3)
    for step in range(3):
        x = torch.randn(32, 12)
        optimizer.step(optimizer.engine.training_forward_pass(step_input(x, sae, step)).loss, step)
    assert len(seen) == 3 and all(grad.abs().sum() > 0 for grad in seen)
    for name in ("W_dec", "W_enc_rows"):
        assert torch.equal(sae.get_parameter(name), before[name])
    assert not torch.equal(sae.get_parameter("b_enc"), before["b_enc"])


class _Largest(TorchDispatchMode):
    """The bytes of the largest memory that any operation under it allocates for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.untyped_storage()._cdata for a in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_step_holds_nothing_as_large_as_a_matrix_or_the_dense_activations(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    d_in, d_sae, batch = 64, 4096, 256
    sae = new(architecture, Shard(), d_in, d_sae)
    optimizer = Optimizer(LocalEngine(sae), TrainConfig(lr=0.01), 3)
    block = batch * d_in * 4  # bytes of a batch, to which the working sets are bounded here
    sae.pre_activation_bytes = block
    monkeypatch.setattr(plain, "_BLOCK_BYTES", block)
    with _Largest() as largest:
        for step in range(2):
            output = optimizer.engine.training_forward_pass(step_input(torch.randn(batch, d_in), sae, step))
            optimizer.step(output.loss, step)
    # BatchTopK's histograms have 2**16 bins of 8 bytes whatever the sizes.
    assert largest.bytes <= max(block, 2**19 if architecture == "batchtopk" else 0)
    assert largest.bytes < d_in * d_sae * 4 and largest.bytes < batch * d_sae * 4 / 4


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


def batch(step: int) -> Tensor:
    """128 rows, mixtures of 24 directions."""
    basis = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    return torch.rand(128, 24, generator=torch.Generator().manual_seed(step)).pow(8) @ basis


def trained(shard: Shard, steps: int, train: TrainConfig, **options: Any) -> tuple[Optimizer, float]:
    """An SAE after some steps on rows of a mixture, and the mean loss of the last quarter of them."""
    sae = new("topk", shard, 16, 64, **options)
    optimizer = Optimizer(LocalEngine(sae), train, steps)
    losses = []
    for step in range(steps):
        output = optimizer.engine.training_forward_pass(step_input(batch(step).to(sae.dtype), sae, step))
        optimizer.step(output.loss, step)
        losses.append(float(output.losses["mse_loss"].detach()))
    return optimizer, sum(losses[-steps // 4 :]) / (steps // 4)


def test_small_steps_of_bfloat16_add_up() -> None:
    """A rate of 1e-6 is below half of the last bit of nearly all weights: alone in bfloat16 they would never move."""
    train = TrainConfig(lr=1e-6)
    optimizer, _ = trained(Shard(), 50, train, dtype="bfloat16")
    engine = optimizer.engine
    before = new("topk", Shard(), 16, 64, dtype="bfloat16")
    for name, follower in engine.narrow.items():
        master = engine.parameters[name]
        assert master.dtype == torch.float32 and follower.dtype == torch.bfloat16
        assert torch.equal(follower, master.bfloat16()) and follower.data_ptr() == getattr(engine.sae, name).data_ptr()
    moved = engine.parameters["W_dec"] - before.W_dec.float()
    assert (moved != 0).float().mean() > 0.9
    assert moved.abs().max() < 60 * 1e-6


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_narrow_types_train_like_float32(moments: Literal["float32", "bfloat16"]) -> None:
    """bfloat16 has 8 bits: a reconstruction rounded to it is off by 2**-9 of itself, and so is the loss's root."""
    train = TrainConfig(lr=3e-3)
    _, expected = trained(Shard(), 200, train)
    _, found = trained(Shard(), 200, replace(train, moments_dtype=moments), dtype="bfloat16")
    assert found == pytest.approx(expected, rel=0.05)


def test_fsdp2_keeps_float32_masters_too() -> None:
    """Of which each dp rank has its rows; what the SAE computes with is gathered in bfloat16."""
    train = TrainConfig(lr=1e-6)

    def worker(rank: int, world: int) -> dict[str, Tensor]:
        shard = shard_in_grid(rank, world, 1)
        assert shard.dp.group is not None
        sae = new("topk", shard, 16, 64, dtype="bfloat16")
        optimizer = Optimizer(FSDP2Engine(sae, DeviceMesh.from_group(shard.dp.group, "cpu")), train, 20)
        for step in range(20):
            x = batch(step)[rank * 64 : rank * 64 + 64].bfloat16()
            output = optimizer.engine.training_forward_pass(step_input(x, sae, step))
            assert output.sae_out.dtype == sae.W_dec.dtype == torch.bfloat16  # whole and gathered
            optimizer.step(output.loss, step, 0.5)
        with optimizer.engine.whole(changes=True):
            pass  # a look changes nothing
        return {name: tensor.detach() for name, tensor in optimizer.parameters.items()}

    parts = run_ranks(2, worker)
    optimizer, _ = trained(Shard(), 20, train, dtype="bfloat16")
    start = new("topk", Shard(), 16, 64, dtype="bfloat16")
    for name in ("W_dec", "W_enc_rows", "b_enc", "b_dec"):
        found = parts[0][name] if name == "b_dec" else torch.cat([part[name] for part in parts])
        whole = optimizer.parameters[name]
        assert found.dtype == whole.dtype == torch.float32 and found.shape == whole.shape
        # 20 steps of up to 1e-6 each; a gradient near 0, whose sign the order of bfloat16 sums decides, may step back.
        assert ((whole - start.get_parameter(name).float()).abs() > 2e-6).float().mean() > 0.5
        assert (found - whole).abs().max() < 40e-6 and ((found - whole).abs() < 2e-6).float().mean() > 0.8


def test_rounded_moments_are_the_same_on_shards() -> None:
    train = TrainConfig(lr=1e-3, moments_dtype="bfloat16")

    def worker(rank: int, world: int) -> dict[str, Tensor]:
        optimizer, _ = trained(shard_in_grid(rank, 1, world), 5, train)
        assert optimizer.state["W_dec"]["exp_avg"].dtype == torch.bfloat16
        assert optimizer.state["b_enc"]["exp_avg"].dtype == torch.float32
        return optimizer.row_tensors()

    whole = run_ranks(1, worker)[0]
    parts = run_ranks(2, worker)
    for name in ("adam.exp_avg.W_dec", "adam.exp_avg_sq.W_enc_rows"):
        joined = torch.cat([part[name] for part in parts])
        # The shards' sums differ in float32's last bits, which moves a rounding over its border at few entries.
        assert (joined == whole[name]).float().mean() > 0.99


def test_a_run_in_bfloat16_goes_on_bitwise(tmp_path: Path) -> None:
    """Masters and rounded moments are what a checkpoint holds; one rank, three SAEs, resumed in the middle."""
    run = tiny_config(
        tmp_path,
        hookpoints=["model.layers.0"],
        saes=[
            {"name": "topk", "d_sae": 128, "k": 4, "dtype": "bfloat16", "dead_feature_window_tokens": 1000},
            {"name": "batchtopk", "architecture": "batchtopk", "d_sae": 128, "k": 4, "dtype": "bfloat16"},
            {"name": "jumprelu", "architecture": "jumprelu", "d_sae": 128, "dtype": "bfloat16"},
        ],
        train={"training_tokens": 20 * 128, "train_batch_size_tokens": 128, "moments_dtype": "bfloat16"},
        checkpoint={"every_steps": 10, "keep": 2},
    )
    path = write_config(tmp_path, run)
    forked_run(path, 1)
    folder = tmp_path / "run"
    whole = sae_state(folder)
    for name in ("topk", "batchtopk", "jumprelu"):
        assert whole[f"model.layers.0/{name}/W_dec"].dtype == torch.float32
        assert whole[f"model.layers.0/{name}/adam.exp_avg.W_dec"].dtype == torch.bfloat16
    shutil.rmtree(folder / "checkpoints" / "step_00000020")
    forked_run(path, 1)
    resumed = sae_state(folder)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
