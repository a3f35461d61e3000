"""What `SAETrainer` takes and refuses: providers of rows, settings, SAEs."""

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import RankError, run_ranks
from scale_sae import (
    SAE,
    SAETrainer,
    TrainingSAE,
    launched_shard,
    mixing_buffer,
)
from scale_sae.errors import UserError
from test_library import ARCHITECTURES, BATCH, D_IN, D_SAE, provider, settings, train_here, trained_on


def test_batches_of_any_size_are_cut_to_the_training_batch() -> None:
    """Also from a provider that writes its next rows where the last ones were."""
    rows = torch.cat(list(islice(provider(), 4)))

    def pieces() -> Iterator[Tensor]:
        memory = torch.empty(100, D_IN, dtype=torch.float64)
        for piece in rows.split([100, 1, 30, 64, 61]):
            memory.copy_(torch.full_like(memory, torch.nan))
            memory[: len(piece)] = piece
            yield memory[: len(piece)]

    whole, cut = trained_on(provider()), trained_on(pieces())
    assert torch.equal(whole.sae.W_dec, cut.sae.W_dec)
    assert torch.equal(trained_on(list(rows.split(64))).sae.W_dec, cut.sae.W_dec)  # any iterable will do


def test_a_provider_may_use_its_memory_again() -> None:
    """A mixing buffer keeps rows; batches: `test_batches_of_any_size_are_cut_to_the_training_batch`."""

    def refilled() -> Iterator[Tensor]:
        memory = torch.empty(BATCH, D_IN, dtype=torch.float64)
        for rows in islice(provider(), 4):
            yield memory.copy_(rows)
        memory.fill_(torch.nan)

    batches = list(islice(provider(), 4))
    mixed = zip(mixing_buffer(160, 16, refilled(), seed=0), mixing_buffer(160, 16, iter(batches), seed=0), strict=True)
    assert all(torch.equal(one, other) for one, other in mixed)


def test_a_provider_may_turn_gradients_off() -> None:
    def yields_inside(mode: Any) -> Iterator[Tensor]:
        with mode:
            yield from provider()

    def made_inside() -> Iterator[Tensor]:
        for rows in provider():
            with torch.inference_mode():
                made = rows * 1
            assert made.is_inference()
            yield made

    def mixed(rows: Iterator[Tensor]) -> Iterator[Tensor]:
        return mixing_buffer(160, 16, rows, seed=0)

    plain, plain_mixed = trained_on(provider()).sae.W_dec, trained_on(mixed(provider())).sae.W_dec
    for rows in (yields_inside(torch.no_grad()), made_inside()):
        assert torch.equal(trained_on(rows).sae.W_dec, plain)
    for rows in (yields_inside(torch.no_grad()), made_inside()):
        assert torch.equal(trained_on(mixed(rows)).sae.W_dec, plain_mixed)
    rows = yields_inside(torch.inference_mode())
    try:
        with pytest.raises(UserError, match=r"data_provider: yields inside torch.inference_mode\(\)"):
            trained_on(rows)
    finally:
        rows.close()  # type: ignore[attr-defined]  # a generator; it ends the mode
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no iterator": (lambda: 3, "data_provider: int is no iterator"),
    "no tensor": (lambda: iter([[1.0]]), "data_provider: yielded list; yield a tensor"),
    "width": (lambda: iter([torch.zeros(64, 8)]), "rows of width 8, but the SAE has d_in 16; set d_in: 8"),
    "token ids": (lambda: iter([torch.zeros(64, 16, dtype=torch.int64)]), "yielded torch.int64; yield activations"),
    "contexts": (lambda: iter([torch.zeros(4, 16, 16)]), r"yielded shape \[4, 16, 16\].*; flatten it"),
    "one row": (lambda: iter([torch.zeros(16)]), r"yielded shape \[16\], but rows are \[n, 16\]$"),
    "no rows": (lambda: iter([torch.zeros(0, 16)]), "yielded a tensor without rows"),
    "nothing": (lambda: iter([]), "yielded 0 rows, less than a batch; train_batch_size_samples is 64"),
    "too little": (lambda: iter([torch.zeros(63, 16)]), "yielded 63 rows, less than a batch"),
    "not finite": (lambda: iter([torch.full((64, 16), torch.nan)]), "64 of 64 rows are NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_providers(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        trained_on(make())


def test_a_bad_provider_ends_all_ranks() -> None:
    """What only the first rank reads all ranks refuse, with one message; a script's own error is its own there."""

    def worker(rank: int, world: int, make: Callable[[], Any]) -> str:
        shard = launched_shard()
        sae = TrainingSAE.from_dict(ARCHITECTURES["topk"].to_dict(), shard=shard)
        try:
            SAETrainer(settings(4), sae, make() if rank == 0 else None).fit()
        except (UserError, RuntimeError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"
        return "trained"

    def fails() -> Iterator[Tensor]:
        yield next(provider())
        raise ZeroDivisionError("of the script")

    for case in ("width", "nothing", "no iterator"):
        first, second = run_ranks(2, worker, BAD[case][0])
        assert first == second and first.startswith("UserError: data_provider: ")
    first, second = run_ranks(2, worker, fails)
    assert first == "ZeroDivisionError: of the script"
    assert second == "RuntimeError: data_provider of the first rank: ZeroDivisionError: of the script"
    ended = run_ranks(2, worker, lambda: islice(provider(), 2))
    assert ended == ["trained", "trained"]


def test_a_provider_that_ends_early(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*islice(provider(), 3), next(provider())[:10]]
    trainer = trained_on(iter(rows), steps=8)
    assert (trainer.n_training_steps, trainer.n_training_samples) == (3, 3 * BATCH)
    assert "ended after 192 of 512 rows in whole batches (10 were left over)" in capsys.readouterr().err
    with pytest.raises(UserError, match="n_batches_for_norm_estimate: 7, but data_provider ended after 5 batches"):
        sae = TrainingSAE.from_dict(ARCHITECTURES["batchtopk"].to_dict())
        SAETrainer(settings(8), sae, islice(provider(), 5)).fit()


def test_rows_that_are_not_finite_are_left_out() -> None:
    rows = list(islice(provider(), 4))
    rows[1][5, 3], rows[2][7] = torch.nan, torch.inf
    trainer = trained_on(iter(rows))
    assert trainer.n_non_finite == 2 and int(trainer.job.window_tokens) == 4 * BATCH - 2
    assert trainer.sae.W_dec.isfinite().all()


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autocast": True}, "autocast: True is not there; set the SAE's dtype to bfloat16"),
        ({"lr": 0.0}, "lr: 0.0 must be above 0"),
        ({"lr": "fast"}, "lr: 'fast' is not a number"),
        ({"lr_scheduler_name": "cosine"}, "lr_scheduler_name: 'cosine' is not .*did you mean cosineannealing"),
        ({"lr_warm_up_steps": 9, "lr_decay_steps": 2}, "lr_decay_steps: 2 and lr_warm_up_steps 9 are more than the 10"),
        ({"total_training_samples": 0}, "total_training_samples: 0 must be above 0"),
        ({"train_batch_size_samples": 4.5}, "train_batch_size_samples: 4.5 is not an integer"),
        ({"n_checkpoints": 2}, "checkpoint_path: None must name a folder, since n_checkpoints is 2"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used"),
        ({"logger": {"log_to_wandb": False}}, "logger: dict must be a scale_sae.LoggingConfig"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        settings(10, **changes)
    assert "\n" not in str(caught.value)


def test_bad_saes(tmp_path: Path) -> None:
    known = ARCHITECTURES["topk"].to_dict()
    with pytest.raises(UserError, match=r"sae.kk: not an option of topk"):
        TrainingSAE.from_dict({**known, "kk": 3})
    with pytest.raises(UserError, match=r"sae.k: 65 must be from 1 to d_sae"):
        TrainingSAE.from_dict({**known, "k": 65})
    with pytest.raises(UserError, match="unknown architecture 'top'"):
        TrainingSAE.from_dict({**known, "architecture": "top"})
    with pytest.raises(UserError, match="names no architecture and d_in"):
        TrainingSAE.from_dict({"d_sae": 3})
    with pytest.raises(RankError, match="64 latents cannot be split evenly over 3 shards"):
        run_ranks(3, lambda rank, world: TrainingSAE.from_dict(known, shard=launched_shard()))
    transcoder = {"architecture": "transcoder", "d_in": D_IN, "d_sae": D_SAE, "d_out": D_IN}
    with pytest.raises(UserError, match="transcoder needs a target"):
        SAETrainer(settings(4), TrainingSAE.from_dict(transcoder), provider())
    with pytest.raises(UserError, match=r"has become torch.float32, but its config says torch.float64"):
        SAETrainer(settings(4), TrainingSAE.from_dict(known).float(), provider())
    train_here(tmp_path, "standard", 2)
    with pytest.raises(UserError, match="StandardSAE is none that trains"):
        SAETrainer(settings(4), SAE.load_from_disk(tmp_path), provider())  # type: ignore[type-var]
    scaled = TrainingSAE.from_dict(ARCHITECTURES["batchtopk"].to_dict())
    with pytest.raises(UserError, match=r"save what SAETrainer.fit returns"):
        scaled.save_inference_model(tmp_path)


def test_processes_that_share_nothing_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    SAETrainer(settings(4), TrainingSAE.from_dict(ARCHITECTURES["topk"].to_dict()), provider())
    assert "2 processes were launched, but each trains an SAE of its own" in capsys.readouterr().err
    with pytest.raises(UserError, match="checkpoint_path: 'out' would be written by all: 2 processes were launched"):
        SAETrainer(settings(4, checkpoint_path="out"), TrainingSAE.from_dict(ARCHITECTURES["topk"].to_dict()), None)


def test_sums_on_a_gpu_are_the_same_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert launched_shard().size == 1
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # one of the two that PyTorch's notes name for this


def test_an_sae_that_diverges(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lr: the SAE has diverged by step \d+ .* with 1e\+200; lower it"):
        trained_on(provider(), 8, lr=1e200)
    sae = TrainingSAE.from_dict(ARCHITECTURES["standard"].to_dict())
    with torch.no_grad():
        sae.b_dec[3] = torch.nan
    with pytest.raises(UserError, match="weights are not finite"):
        sae.save_inference_model(tmp_path / "sae")
    assert list((tmp_path / "sae").iterdir()) == []


# ---- the small things ------------------------------------------------------------------------------------------------
