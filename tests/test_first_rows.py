"""b_dec at the mean of the first rows, k_aux and Adam's eps: options that SAELens has not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_trainer as stream
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from harness import run_ranks
from saes_for_tests import (
    D_IN,
    D_OUT,
    Case,
    assert_close,
    build,
    gradients,
    inputs,
    our_step,
    shard_in_grid,
    sharded_steps,
    step_input,
)
from scale_sae import TopKTrainingSAEConfig, TrainingSAE, config
from scale_sae.collectives import Shard
from scale_sae.config import TrainConfig
from scale_sae.engines import FSDP2Engine, LocalEngine
from scale_sae.job_trainer import JobTrainer, new_sae
from scale_sae.jobs import resolve
from scale_sae.optim import Optimizer
from scale_sae.sae_trainer import SAETrainer, SAETrainerConfig
from scale_sae.trainer import Trainer
from scale_sae.zero import DeepSpeedEngine, ZeroOptimizer
from written_out import Plain

# ---- b_dec at the mean of the first rows ----------------------------------------------------------------------------

SCALED = {"normalize_activations": "expected_average_only_in", "b_dec_init": "mean"}
AT_MEAN: list[dict[str, Any]] = [
    {"name": "topk", "architecture": "topk", "k": 4, **SCALED},
    {**stream.TRANSCODER, **SCALED},
    {"name": "plain", "architecture": "standard", "b_dec_init": "mean", "normalize_activations": "none"},
    {"name": "normed", "architecture": "topk", "k": 4, "b_dec_init": "mean", "normalize_activations": "layer_norm"},
    {"name": "zeros", "architecture": "topk", "k": 4, "b_dec_init": "zeros"},
    {"name": "narrow", "architecture": "topk", "k": 4, **SCALED, "dtype": "bfloat16"},
]
FIRST = 2 * stream.CHUNK  # rows of the buffer's first filling
GRIDS: dict[str, dict[str, Any]] = {
    "tp=1": {"sae": {"tp": 1}},
    "tp=4": {"sae": {"tp": 4}},
    "dp=2, tp=2": {"sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"},
}


def first_rows() -> dict[str, Tensor]:
    """Rows with means of their own; some do not count, and those after the first filling say nothing."""
    rows = stream.made_up_rows(4 * FIRST)
    rows[stream.IN] += torch.linspace(-2, 3, stream.WIDTH, dtype=torch.float64)
    rows[stream.OUT] = 0.2 * rows[stream.OUT] + torch.linspace(1, 0, stream.WIDTH, dtype=torch.float64)
    for x in rows.values():
        x[FIRST:] *= 5
    rows[stream.IN][5] *= 1000
    rows[stream.OUT][[6, 77]] = torch.nan
    return rows


def expected_b_dec(scales: dict[str, tuple[float, float]]) -> dict[str, Tensor]:
    """Written out: the mean over the rows that count, times the scale of the targets that the run has found."""
    counts = {stream.IN: torch.arange(FIRST) != 5, stream.OUT: ~torch.isin(torch.arange(FIRST), torch.tensor([6, 77]))}
    kept = {name: x[:FIRST][counts[name]] for name, x in first_rows().items()}
    x = kept[stream.IN]
    normed = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    found = {"plain": x.mean(0), "normed": normed.mean(0), "zeros": torch.zeros(stream.WIDTH, dtype=torch.float64)}
    found |= {"topk": x.mean(0), "narrow": x.mean(0), "t": kept[stream.OUT].mean(0)}
    return {name: found[name] * scales[name][1] for name in scales}


Start = dict[str, tuple[Tensor, Tensor, tuple[float, float]]]


def starts(folder: Path, saes: list[dict[str, Any]], grid: str) -> list[Start]:
    """Per rank and SAE: what its optimizer has of b_dec before the first step, what the SAE has, the factors."""
    tree = config.to_dict(stream.config_of(folder, saes, 2 * stream.BATCH, buffer=FIRST))
    run = config.from_dict({**tree, "topology": {"lm": "colocated", **GRIDS[grid]}, "output_dir": str(folder / "run")})
    seen: Start = {}
    original = Trainer._start_from_rows

    def watch(trainer: Trainer) -> None:
        original(trainer)
        for job in trainer.jobs:
            b_dec = job.engine.parameters["b_dec"].detach().clone(), job.sae.b_dec.detach().clone()
            seen[job.spec.sae_id.rpartition("/")[2]] = (*b_dec, (job.scale.item(), job.target_scale.item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_start_from_rows", watch)
        return stream.train(run, first_rows(), lambda trainer: seen)


def test_b_dec_starts_at_the_mean(tmp_path: Path) -> None:
    by_grid = {grid: starts(tmp_path / grid, AT_MEAN, grid) for grid in ("tp=1", "tp=4", "dp=2, tp=2")}
    (whole,) = by_grid["tp=1"]
    expected = expected_b_dec({name: scales for name, (_, _, scales) in whole.items()})
    assert whole["topk"][2][0] != 1 and whole["t"][2][0] != whole["t"][2][1]
    for name, (owned, used, _) in whole.items():
        if name == "narrow":  # float32 masters, which hold what bfloat16 loses
            assert (owned.dtype, used.dtype) == (torch.float32, torch.bfloat16)
            torch.testing.assert_close(owned, expected[name].float(), rtol=1e-6, atol=1e-6)
            assert torch.equal(used, owned.bfloat16()) and not torch.equal(used.float(), owned)
        else:
            # Sums of 96 rows in another order.
            torch.testing.assert_close(owned, expected[name], rtol=0, atol=1e-13)
            assert torch.equal(used, owned)
    for ranks in by_grid.values():
        for rank in ranks:
            for name, start in rank.items():
                assert all(torch.equal(a, b) for a, b in zip(start[:2], whole[name][:2], strict=True)), name


def test_b_dec_is_set_under_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    spec = resolve(stream.config_of(tmp_path, [{**AT_MEAN[0], "dtype": "float32"}], stream.BATCH))[1][0]
    mean = torch.linspace(-1, 1, stream.WIDTH, dtype=torch.float64)

    def worker(rank: int, world: int) -> list[Tensor]:
        sae = new_sae(spec, shard_in_grid(rank, 2, 1), torch.device("cpu"), 0)
        job = JobTrainer(spec, sae, 1, deepspeed={"zero_optimization": {"stage": 1}})
        job.set_scales(3.0, 3.0)
        job.set_b_dec(mean)
        return [tensor.detach().clone() for tensor in (job.engine.parameters["b_dec"], job.sae.b_dec)]

    for found in run_ranks(2, worker):
        assert all(torch.equal(tensor, (mean * 3).float()) for tensor in found)


def test_weights_that_are_loaded_keep_their_b_dec(tmp_path: Path) -> None:
    run = stream.config_of(tmp_path, [AT_MEAN[0]], stream.BATCH)
    spec = resolve(run)[1][0]
    made = [replace(spec, init_from=init_from) for init_from in (None, config.InitFrom("a/release"))]
    jobs = [JobTrainer(spec, new_sae(spec, Shard(), torch.device("cpu"), 0), 1) for spec in made]
    assert [job.starts_at_mean for job in jobs] == [True, False]


@pytest.mark.parametrize("scales", [False, True])
def test_the_library_sets_b_dec_from_the_batches_of_its_estimate(scales: bool) -> None:
    batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)).double() + i for i in range(6)]
    batches[1][3, 2] = torch.inf
    options: dict[str, Any] = SCALED if scales else {"b_dec_init": "mean"}
    cfg = TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, dtype="float64", **options)
    first = torch.cat(batches[:3])
    first = first[first.isfinite().all(1)]
    factor = 4 / first.norm(dim=1).mean() if scales else 1.0

    def start(rank: int, world: int, given: float) -> tuple[Tensor, int]:
        sae = TrainingSAE.from_dict(cfg.to_dict(), shard=Shard(rank, world))
        sae.b_dec.data.fill_(given)
        settings = SAETrainerConfig(24, 8, n_batches_for_norm_estimate=3)
        trainer = SAETrainer(settings, sae, iter(batches) if rank == 0 else None)
        trainer._start_from_rows()
        return sae.b_dec.data.clone(), trainer.n_samples_drawn

    for found, drawn in [start(0, 1, 0.0), *run_ranks(2, start, 0.0)]:
        torch.testing.assert_close(found, first.mean(0) * factor, rtol=0, atol=1e-13)  # sums in another order
        assert drawn == 24
    # What a script has set stays.
    found, drawn = start(0, 1, 0.5)
    assert (found == 0.5).all() and drawn == (24 if scales else 0)


# ---- k_aux and Adam's eps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_k_aux(tp: int) -> None:
    """Steps with 30 dead latents, of which k_aux are chosen, against the same written out; at last all are."""
    own = {"use_matryoshka_aux_loss": True}
    cases = [
        *(Case(kind, {"k_aux": 3}, n_dead=30) for kind in ("topk", "abstopk", "batchtopk_skip_transcoder")),
        Case("matryoshka_batchtopk", {"k_aux": 5, **own}, n_dead=30),
        Case("topk", {"k_aux": 40}, n_dead=30),
    ]
    steps = sharded_steps(tp, [our_step(case, torch.float64) for case in cases])
    for case, step in zip(cases, steps, strict=True):
        # Sums in another order, as in test_parity.
        assert_close(step, Plain(case, torch.float64).step(), 1e-12, case)
    losses = [float(step["auxiliary_reconstruction_loss"]) for step in steps]
    assert min(losses) > 0 and losses[0] != losses[4]


def test_k_aux_null_is_half_of_the_width() -> None:
    for architecture, width in (("topk", D_IN), ("batchtopk_transcoder", D_OUT)):
        cases = [Case(architecture, {"k_aux": k_aux}, n_dead=30) for k_aux in (None, width // 2)]
        null, half = (our_step(case, torch.float64)(Shard()) for case in cases)
        for found, expected in zip(null, half, strict=True):
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


EPS = 0.03


@pytest.mark.parametrize("engine", ["local", "fsdp2", "deepspeed"])
def test_adam_s_eps(engine: str) -> None:
    """The first update of Adam is lr · g / (|g| + eps), whatever the betas: of matrices, of biases, in every engine."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    dtype = torch.float32 if engine == "deepspeed" else torch.float64
    case, train = Case("topk"), TrainConfig(lr=0.01, adam_eps=EPS, max_grad_norm=1e9)
    whole = build(case, Shard(), dtype)
    before = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    loss = whole.training_forward_pass(step_input(whole, case, inputs(dtype))).loss
    grads = gradients(loss, dict(whole.named_parameters()))
    size = torch.cat([grad.abs().flatten() for grad in grads.values()])
    assert (size < EPS).any() and (size > EPS).any()

    def worker(rank: int, world: int) -> dict[str, Tensor]:
        dp = 1 if engine == "local" else 2
        sae = build(case, shard_in_grid(rank, dp, world // dp), dtype)
        if engine == "deepspeed":
            made = DeepSpeedEngine(sae, {"zero_optimization": {"stage": 1}}, train)
            optimizer: Optimizer = ZeroOptimizer(made, train, 1)
        else:
            mesh = DeviceMesh("cpu", list(range(dp))) if engine == "fsdp2" else None
            optimizer = Optimizer(FSDP2Engine(sae, mesh) if mesh else LocalEngine(sae), train, 1)
        rows = inputs(dtype).chunk(dp)[rank % dp]
        optimizer.step(optimizer.engine.training_forward_pass(step_input(sae, case, rows)).loss, 0, 1 / dp)
        return {name: parameter.detach().clone() for name, parameter in optimizer.engine.parameters.items()}

    parts = run_ranks(2, worker)
    for name, start in before.items():
        found = parts[0][name] if name in whole.replicated else torch.cat([part[name] for part in parts])
        moved = 0.01 * grads[name] / (grads[name].abs() + EPS)
        # Of a step of 0.01: gradients summed in another order, and in float32 the rounding of weights of about 1.
        torch.testing.assert_close(found, start - moved, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)
