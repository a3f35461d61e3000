"""The trainer as a library: scripts written for SAELens, on one process and with the latents shared over several."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runs
from harness import run_ranks
from scale_sae import (
    SAE,
    ActivationScaler,
    BatchTopKTrainingSAEConfig,
    DataProvider,
    Evaluator,
    LoggingConfig,
    SAETrainer,
    SAETrainerConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    checkpoint,
    launched_shard,
)
from scale_sae.errors import UserError

D_IN, D_SAE, BATCH = 16, 64, 64
# float64: only the order of sums differs between numbers of ranks, and 50 steps of Adam amplify it little.
SAME = 1e-9
QUIET = LoggingConfig(log_to_wandb=False)


def provider(seed: int = 1, size: int = BATCH, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Sparse mixtures of fixed directions, without end: something that an SAE can learn."""
    directions = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    while True:
        strengths = torch.rand(size, 40, generator=draw, dtype=torch.float64)
        active = torch.rand(size, 40, generator=draw) < 0.1
        yield (strengths * active @ directions).to(dtype)


def settings(steps: int, **changes: Any) -> SAETrainerConfig:
    fields: dict[str, Any] = {
        "total_training_samples": steps * BATCH,
        "train_batch_size_samples": BATCH,
        "lr": 1e-2,
        "dead_feature_window": 5,
        "logger": QUIET,
        "n_batches_for_norm_estimate": 7,
    }
    return SAETrainerConfig(**fields | changes)


ARCHITECTURES: dict[str, TrainingSAEConfig] = {
    "topk": TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3, dtype="float64"),
    "batchtopk": BatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=2.5, dtype="float64", normalize_activations="expected_average_only_in"
    ),
    "standard": StandardTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, dtype="float64", l1_coefficient=0.1, l1_warm_up_steps=10
    ),
}


def weights_of(sae: SAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def train_here(folder: Path, architecture: str, steps: int = 50, **changes: Any) -> None:
    """Trains on this rank and saves the SAE in ``folder``."""
    shard = launched_shard()
    sae = TrainingSAE.from_dict(ARCHITECTURES[architecture].to_dict(), shard=shard)
    trainer = SAETrainer(settings(steps, **changes), sae, provider() if shard.rank == 0 else None)
    trained = trainer.fit()
    assert trained is sae and trained.cfg.normalize_activations == "none"
    trained.save_inference_model(folder)


# ---- results ---------------------------------------------------------------------------------------------------------


def trained_on(rows: Any, steps: int = 4, **changes: Any) -> SAETrainer[Any]:
    trainer = SAETrainer(settings(steps, **changes), TrainingSAE.from_dict(ARCHITECTURES["topk"].to_dict()), rows)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_number_of_ranks_trains_the_same_sae(tmp_path: Path, architecture: str) -> None:
    """The released SAE of 50 steps, in which latents die and AuxK revives them, is that of one process."""
    saved = {}
    for world in (1, 2, 4):
        folder = tmp_path / str(world)
        run_ranks(world, lambda rank, world, folder=folder: train_here(folder, architecture))
        saved[world] = weights_of(SAE.load_from_disk(folder))
    start = TrainingSAE.from_dict(ARCHITECTURES[architecture].to_dict())
    assert runs.largest_difference({"W_dec": start.W_dec.detach()}, {"W_dec": saved[1]["W_dec"]}) > 0.1  # it trained
    for world in (2, 4):
        assert runs.largest_difference(saved[world], saved[1]) < SAME, world


def saelens_trained(cfg: Any, first: dict[str, Tensor], **changes: Any) -> tuple[Any, Any]:
    """(the SAE, its trainer) of SAELens's own classes, from the same weights on the same rows."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.config import SAETrainerConfig as TheirConfig
    from sae_lens.saes.sae import TrainingSAE as TheirSAE
    from sae_lens.training.sae_trainer import SAETrainer as TheirTrainer

    theirs = getattr(sae_lens, type(cfg).__name__).from_dict(cfg.to_dict())
    sae = TheirSAE.from_dict(theirs.to_dict())
    sae.load_state_dict({**sae.state_dict(), **first})
    fields = {**vars(settings(30, **changes)), "logger": sae_lens.LoggingConfig(log_to_wandb=False)}
    trainer = TheirTrainer(TheirConfig(**fields), sae, provider())
    return trainer.fit(), trainer


@pytest.mark.parametrize(
    ("architecture", "schedule"),
    [
        ("topk", {"lr_warm_up_steps": 5, "lr_decay_steps": 10, "lr_end": 1e-3}),
        ("standard", {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 3, "lr_end": 1e-4}),
    ],
)
def test_it_trains_as_saelens_does(architecture: str, schedule: dict[str, Any]) -> None:
    cfg = ARCHITECTURES[architecture]
    scaled = type(cfg).from_dict({**cfg.to_dict(), "normalize_activations": "expected_average_only_in"})
    sae = TrainingSAE.from_dict(scaled.to_dict())
    first = {name: getattr(sae, name).detach().clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    trainer = SAETrainer(settings(30, **schedule), sae, provider())
    trained = trainer.fit()
    theirs, their_trainer = saelens_trained(scaled, first, **schedule)
    ours = {name: getattr(trained, name).detach() for name in first}
    expected = {name: getattr(theirs, name).detach() for name in first}
    # In float64 throughout but for the norms of SAELens's scaling factor, which it sums in float32: to 1e-7, which 30
    # steps carry on.
    assert runs.largest_difference(ours, expected) < 1e-5
    assert torch.equal(trainer.dead_neurons, their_trainer.dead_neurons)
    assert trainer.dead_neurons.any() == (architecture == "topk")  # so AuxK is a part of what is compared
    torch.testing.assert_close(trainer.log_feature_sparsity, their_trainer.log_feature_sparsity, atol=1e-6, rtol=0)
    assert trained.metadata["l0"] == pytest.approx(theirs.cfg.metadata.l0, rel=1e-6)
    assert trained.metadata["num_dead_features"] == theirs.cfg.metadata.num_dead_features


def test_a_saved_sae_is_saelenss_too(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    train_here(tmp_path, "batchtopk", 30)
    ours, theirs, x = SAE.load_from_disk(tmp_path), sae_lens.SAE.load_from_disk(str(tmp_path)), next(provider(2))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)  # the same formulas in float64
    # The threshold is of the last few batches, for unscaled inputs; another batch has about as many latents active.
    assert (ours.encode(x) > 0).sum(dim=1).double().mean() == pytest.approx(2.5, rel=0.25)


def test_bfloat16_has_float32_masters() -> None:
    """Updates far below half a step of bfloat16 add up, and the SAE follows them."""
    cfg = StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="bfloat16", l1_coefficient=0.1)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    before = sae.W_dec.detach().clone()
    trainer = SAETrainer(settings(40, lr=1e-5), sae, provider(dtype=torch.bfloat16))
    assert trainer.fit().W_dec.dtype == torch.bfloat16
    # A weight of 0.025 has neighbours 1e-4 apart, and a step moves it by 1e-5: without masters none would ever move.
    assert (sae.W_dec != before).float().mean() > 0.5


# ---- what a script sees ----------------------------------------------------------------------------------------------


def test_evaluations_take_nothing_from_the_training(tmp_path: Path) -> None:
    """With an evaluator that draws batches, spoils them and stops at the end, the SAE is bit for bit the same."""
    seen: list[list[Tensor]] = []

    def evaluator(sae: TrainingSAE[Any], batches: DataProvider, scaler: ActivationScaler) -> dict[str, Any]:
        assert not sae.training and not torch.is_grad_enabled()
        drawn = [next(batches) for _ in range(6)]
        seen.append([batch.clone() for batch in drawn])
        mse = torch.stack([(sae.decode(sae.encode(scaler(x))) - scaler(x)).square().mean() for x in drawn]).mean()
        drawn[0].zero_()
        return {"eval": {"mse": mse, "batches": len(drawn)}}

    logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=2, eval_every_n_wandb_logs=2)
    saved = []
    for with_evaluator in (False, True):
        sae = TrainingSAE.from_dict(ARCHITECTURES["batchtopk"].to_dict())
        cfg = settings(12, logger=logger, checkpoint_path=str(tmp_path), n_batches_for_norm_estimate=2)
        trainer = SAETrainer(cfg, sae, islice(provider(), 16), evaluator if with_evaluator else None)
        trainer.fit().save_inference_model(tmp_path / str(with_evaluator))
        assert trainer.n_training_samples == 12 * BATCH and trainer.sae.training
        saved.append((tmp_path / str(with_evaluator) / "sae_weights.safetensors").read_bytes())
    assert saved[0] == saved[1]
    # Two batches gave the scaling factor; after step 4 come those of steps 5 to 10, after step 8 the six that are left,
    # the last two of them past the end of the training. After step 12 these two are too few for an evaluation.
    batches = list(islice(provider(), 16))
    assert len(seen) == 2
    for step, drawn in zip((4, 8), seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(drawn, batches[2 + step :], strict=False))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval/mse" in record] == [4, 8]


def test_a_ranks_evaluator_sees_the_same_batches(tmp_path: Path) -> None:
    def worker(rank: int, world: int) -> list[float]:
        found: list[float] = []

        def evaluator(sae: TrainingSAE[Any], batches: DataProvider, scaler: ActivationScaler) -> dict[str, Any]:
            x = next(batches)
            found.append(float((sae(x) - x).square().mean()))
            return {"mse": found[-1]}

        shard = launched_shard()
        sae = TrainingSAE.from_dict(ARCHITECTURES["topk"].to_dict(), shard=shard)
        logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=1, eval_every_n_wandb_logs=3)
        SAETrainer(settings(6, logger=logger), sae, provider() if rank == 0 else None, evaluator).fit()
        return found

    (alone,), (first, second) = run_ranks(1, worker), run_ranks(2, worker)
    assert len(alone) == 2 and first == second
    assert first == pytest.approx(alone, rel=1e-12)


def test_the_log(tmp_path: Path) -> None:
    logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=4)
    sae = TrainingSAE.from_dict(ARCHITECTURES["topk"].to_dict())
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\nof another program\n')
    SAETrainer(settings(10, logger=logger, checkpoint_path=str(tmp_path)), sae, provider()).fit()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 4, 8, 10]
    assert [record["details/n_training_samples"] for record in records] == [step * BATCH for step in (1, 4, 8, 10)]
    names = {
        *("losses/overall_loss", "losses/mse_loss", "losses/auxiliary_reconstruction_loss", "metrics/l0"),
        *("metrics/explained_variance", "sparsity/dead_features", "details/current_learning_rate"),
    }
    assert all(names <= record.keys() for record in records)
    assert all(record["metrics/l0"] == 3 for record in records[1:])
    assert "metrics/mean_log10_feature_sparsity" in records[-1]  # the sampling window ends with the training


@pytest.mark.slow  # wandb starts a service of its own
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    def fit(name: str) -> None:
        logger = LoggingConfig(wandb_project="p", run_name=name, wandb_log_frequency=2)
        cfg = settings(6, logger=logger, checkpoint_path=str(tmp_path / name), n_checkpoints=1)
        SAETrainer(cfg, TrainingSAE.from_dict(ARCHITECTURES["topk"].to_dict()), provider()).fit()

    fit("own")
    assert wandb.run is None and list((tmp_path / "own" / "wandb").glob("offline-run-*"))
    run: Any = wandb.init(project="theirs")
    fit("theirs")
    assert wandb.run == run and not (tmp_path / "theirs" / "wandb").exists()  # the script's run, left open
    assert run.summary["metrics/l0"] == 3
    run.finish()


def test_a_script_of_the_guide(tmp_path: Path) -> None:
    """Types, attributes and calls of SAELens's guide, after a change of imports."""

    def create_evaluator() -> Evaluator[TrainingSAE[Any]] | None:
        return None

    class Mine(StandardTrainingSAE):
        cfg: StandardTrainingSAEConfig

    sae_cfg = StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_IN * 8, l1_coefficient=5.0)
    theirs = {**sae_cfg.to_dict(), "device": "cpu", "metadata": {"hook_name": "blocks.6"}}  # as SAELens's to_dict
    for sae in (TrainingSAE.from_dict(theirs).to("cpu"), Mine(sae_cfg), StandardTrainingSAE(sae_cfg)):
        trainer_cfg = SAETrainerConfig(
            total_training_samples=2_000,
            train_batch_size_samples=256,
            device="cpu",
            lr=3e-4,
            lr_end=3e-5,
            lr_scheduler_name="constant",
            lr_warm_up_steps=1,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            dead_feature_window=1000,
            feature_sampling_window=2000,
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            logger=LoggingConfig(log_to_wandb=False),
        )
        data_provider = provider(size=256, dtype=torch.float32)
        trainer = SAETrainer(cfg=trainer_cfg, sae=sae, data_provider=data_provider, evaluator=create_evaluator())
        trained_sae = trainer.fit()
        assert trained_sae.W_dec.norm(dim=1).min() > 0  # one made by its class alone has got its first weights
        assert trainer.n_training_samples == 2048 == trainer_cfg.total_training_steps * 256  # the last batch is whole
        trained_sae.eval()
        batch = next(data_provider).to(trained_sae.device)
        assert trained_sae.decode(trained_sae.encode(batch)).shape == batch.shape
        trained_sae.save_inference_model(str(tmp_path / "sae"))
        loaded = SAE.load_from_disk(tmp_path / "sae")
        torch.testing.assert_close(loaded(batch), trained_sae(batch))
    assert TrainingSAE.from_dict(theirs).metadata == {"hook_name": "blocks.6"}


def test_a_trained_sae_is_an_ordinary_module() -> None:
    """Its own losses give gradients where every module has them, though the training collects them elsewhere."""
    sae = trained_on(provider()).sae
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    batch = TrainStepInput(
        sae_in=next(provider()),
        coefficients={},
        dead_neuron_mask=dead,
        n_training_steps=4,
        is_logging_step=False,
        num_dead=0,
    )
    sae.training_forward_pass(batch).loss.backward()
    assert sae.W_dec.grad is not None and sae.W_enc_rows.grad is not None


def test_the_script_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(
        r"```python\n(from collections.*?)```", (runs.ROOT / "docs/library.md").read_text(), re.DOTALL
    )
    exec(script, {"__name__": "script"})
    assert SAE.load_from_disk("my_sae").cfg.d_sae == 512


def test_config_and_dict() -> None:
    cfg = ARCHITECTURES["batchtopk"]
    assert type(cfg).from_dict(cfg.to_dict()) == cfg and cfg.to_dict()["architecture"] == "batchtopk"
    one, other = (TrainingSAE.from_dict(cfg.to_dict(), seed=seed) for seed in (0, 1))
    assert torch.equal(TrainingSAE.from_dict(cfg.to_dict()).W_dec, one.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)
    assert SAETrainerConfig(1000, 100).for_command.dead_feature_window_tokens == 1000 * 100


def test_the_top_level_import_is_light() -> None:
    code = (
        "import sys, scale_sae\n"
        "heavy = {'transformers', 'datasets', 'wandb', 'fire', 'scale_sae.trainer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(scale_sae.__all__) <= set(dir(scale_sae)) | set(scale_sae._LATE)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, check=True, timeout=120)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def checkpointed(folder: Path, architecture: str, world: int, resume: Path | None = None) -> None:
    """Trains 24 steps on ``world`` ranks, from the start or from a checkpoint, saving on the way and at the end."""

    def worker(rank: int, world: int) -> None:
        shard = launched_shard()
        sae = TrainingSAE.from_dict(ARCHITECTURES[architecture].to_dict(), shard=shard, seed=0 if resume is None else 9)
        cfg = settings(24, checkpoint_path=str(folder), n_checkpoints=2, save_final_checkpoint=True)
        rows = provider()
        trainer = SAETrainer(cfg, sae, rows)
        if resume is not None:
            trainer.load_trainer_state(resume)
            skipped = 7 if trainer.activation_scaler.scaling_factor is not None else 0  # those of the scaling factor
            assert trainer.n_samples_drawn == (skipped + 9) * BATCH
            assert len(list(islice(rows, skipped + 9))) == skipped + 9
        trainer.fit().save_inference_model(folder / "end")

    run_ranks(world, worker)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_checkpoints_are_saes_and_go_on(tmp_path: Path, architecture: str) -> None:
    checkpointed(tmp_path / "whole", architecture, 2)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    # Due after 512 and 1024 rows; SAELens saves at the first step beyond them.
    assert names == {"576", "1088", "final_1536", "end", "metrics.jsonl"}
    x = next(provider(3))
    for name in ("576", "1088", "final_1536"):
        loaded = SAE.load_from_disk(tmp_path / "whole" / name)
        # Rows as they are, though the training scaled them: no worse than the mean is a low bar that a wrong scale of
        # √16 / 1.2 would not pass.
        assert (loaded(x) - x).square().sum() < (x - x.mean(0)).square().sum()
        about = json.loads((tmp_path / "whole" / name / "cfg.json").read_text())["metadata"]
        assert about["training_tokens"] == int(name.removeprefix("final_"))
    final, end = (weights_of(SAE.load_from_disk(tmp_path / "whole" / name)) for name in ("final_1536", "end"))
    assert runs.largest_difference(final, end) < 1e-14  # folded by blocks and in place: a rounding in float64
    for world in (1, 2):
        folder = tmp_path / f"resumed{world}"
        checkpointed(folder, architecture, world, tmp_path / "whole" / "576")
        # What is behind is not due again.
        assert {path.name for path in folder.iterdir()} == {"1088", "final_1536", "end", "metrics.jsonl"}
        resumed = weights_of(SAE.load_from_disk(folder / "end"))
        assert runs.largest_difference(resumed, end) <= (0 if world == 2 else SAME)


def test_state_that_cannot_be_taken_up(tmp_path: Path) -> None:
    def trainer(cfg: TrainingSAEConfig) -> SAETrainer[Any]:
        return SAETrainer(settings(6), TrainingSAE.from_dict(cfg.to_dict()), provider())

    cfg = ARCHITECTURES["topk"]
    told: list[Path | None] = []
    sae, changes = TrainingSAE.from_dict(cfg.to_dict()), {"checkpoint_path": str(tmp_path)}
    first = SAETrainer(
        settings(4, **changes), sae, provider(), None, lambda checkpoint_path: told.append(checkpoint_path)
    )
    with pytest.raises(UserError, match="no step was made"):
        first.save_checkpoint("early")
    first.fit()
    for name in ("", ".", "..", "a/b", "../mine", "/mine"):
        with pytest.raises(UserError, match=f"checkpoint_name: '{re.escape(name)}' must be the name of a folder"):
            first.save_checkpoint(name)
    folder = first.save_checkpoint("mine")
    first.save_checkpoint_fn = None
    assert first.save_checkpoint("mine") == folder  # in place of the first
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "mine"}
    assert told == [folder] == [tmp_path / "mine"]
    with pytest.raises(UserError, match="has trained already"):
        first.load_trainer_state(folder)
    with pytest.raises(UserError, match=r"state/meta.json; give a checkpoint of SAETrainer"):
        trainer(cfg).load_trainer_state(tmp_path)
    other = type(cfg).from_dict({**cfg.to_dict(), "k": 4})
    with pytest.raises(UserError, match=r"is of another SAE: sae.k: 3 != 4"):
        trainer(other).load_trainer_state(folder)
    (rows,) = (folder / "state").glob("rows_*")
    rows.write_bytes(rows.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"rows_.* bytes instead of .*; go on from another checkpoint"):
        trainer(cfg).load_trainer_state(folder)


def test_a_checkpoint_is_never_lost_to_the_next(tmp_path: Path) -> None:
    """The first one is still there if there is no second one to put in its place."""
    final, replaced = tmp_path / "final", tmp_path / ".replaced_final"
    (final / "state").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        checkpoint.put_in_place(tmp_path / ".writing_final", final, replaced)
    assert (replaced / "state").is_dir()


def test_what_the_first_rank_cannot_write_ends_all(tmp_path: Path) -> None:
    """One message on all ranks: none of them waits for one that has given up."""
    (tmp_path / "file").touch()

    def worker(rank: int, world: int) -> list[str]:
        said = []
        sae = TrainingSAE.from_dict(ARCHITECTURES["topk"].to_dict(), shard=launched_shard())

        def trainer(folder: str, rows: DataProvider | None = None) -> SAETrainer[Any]:
            return SAETrainer(settings(4, checkpoint_path=str(tmp_path / folder)), sae, rows)

        def full() -> Iterator[Tensor]:
            """Lets the disk be full once two batches are drawn."""
            yield from islice(provider(), 2)
            assert filling.log is not None and filling.log.file is not None
            filling.log.file.close()
            filling.log.file = Path("/dev/full").open("a")  # noqa: SIM115 (closed by the log)
            yield from provider()

        def refused(attempt: Callable[[], Any]) -> None:
            with pytest.raises(UserError) as caught:
                attempt()
            said.append(str(caught.value))

        refused(trainer("file/below").fit)
        filling = trainer("full", full())
        refused(filling.fit)
        trained = trainer("saved", provider())
        trained.fit()
        folder = trained.save_checkpoint("good")
        if rank == 0:
            (folder.parent / ".writing_next").touch()
            (damaged,) = (folder / "state").glob("rows_0000000032*")
            damaged.write_bytes(damaged.read_bytes()[:-8])
        refused(lambda: trained.save_checkpoint("next"))
        refused(lambda: trained.fit().save_inference_model(tmp_path / "file"))
        refused(lambda: trainer("other").load_trainer_state(folder))
        return said

    first, second = run_ranks(2, worker)
    assert first == second and all("\n" not in line for line in first)
    assert (
        first[0] == f"checkpoint_path: {tmp_path}/file/below cannot be used "
        f"([Errno 20] Not a directory: '{tmp_path}/file/below'); make room, or name another folder"
    )
    assert first[1] == "checkpoint_path: /dev/full cannot be written: No space left on device; make room"
    assert first[2].startswith(f"checkpoint_path: {tmp_path}/saved cannot be used (")
    assert first[3].startswith(f"{tmp_path}/file cannot be used ([Errno 17] File exists")
    assert re.search(r"rows_0000000032_0000000064.safetensors has \d+ bytes instead of", first[4])


# ---- what providers yield --------------------------------------------------------------------------------------------
