"""The runners of SAELens's users: the same fields, the engine of the commands, one process or several."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import runs
from harness import run_ranks
from scale_sae import (
    LoggingConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    consolidate,
    register_sae_training_class,
    session,
    train,
)
from scale_sae.errors import UserError
from scale_sae.jobs import resolve
from scale_sae.runners import (
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
)
from scale_sae.trainer import Trainer

STEPS, BATCH = 12, 64


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default paths are relative."""
    monkeypatch.chdir(tmp_path)
    runs.write_texts(tmp_path / "texts.jsonl", files=4)


def topk(**changes: Any) -> TopKTrainingSAEConfig:
    return TopKTrainingSAEConfig(d_in=256, d_sae=128, k=4, dtype="float64", **changes)


def shared() -> dict[str, Any]:
    """What a run and its cache have in common."""
    return {
        "model_name": "embedded",
        "hook_name": "blocks.1.hook_resid_post",
        "dataset_path": str(Path("texts.jsonl").absolute()),
        "context_size": 32,
        "training_tokens": STEPS * BATCH,
        "dtype": "float64",
    }


def config(**changes: Any) -> LanguageModelSAERunnerConfig:
    tiny: dict[str, Any] = {
        "sae": topk(),
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 2,
        "lr": 1e-3,
        "n_eval_batches": 0,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=4),
    }
    return LanguageModelSAERunnerConfig(**shared() | tiny | changes)


def weights(folder: str | Path = "output") -> dict[str, Tensor]:
    return load_file(Path(folder) / "sae_weights.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


# ---- the engine ------------------------------------------------------------------------------------------------------


def test_it_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's SAE is bitwise that of the config file which says the same; twice in one process, the same again.

    Where a launcher starts the script again, the run that was done before is not made again.
    """
    run = {
        "output_dir": "by_command",
        "recipe": "saelens",
        "seed": 42,
        "model": {"name": "embedded", "dtype": "float64"},
        "data": {"dataset": str(tmp_path / "texts.jsonl"), "context_size": 32, "chunk_contexts": 4}
        | {"exclude_special_tokens": False},
        "hookpoints": ["model.layers.1"],
        "saes": [{"architecture": "topk", "d_sae": 128, "k": 4, "dtype": "float64"}],
        # dead_feature_window 3 steps of 64 rows; a buffer of 2 x 4 x 32 rows.
        "train": {"training_tokens": STEPS * BATCH, "train_batch_size_tokens": BATCH, "lr": 1e-3}
        | {"dead_feature_window_tokens": 3 * BATCH},
        "buffer": {"tokens": 256, "lanes": 64},
        "topology": {"lm": "colocated"},
    }
    assert train.run(str(runs.write_config(tmp_path, run)), (), {}) == 0  # (which ends the process group as well)
    consolidate.consolidate(Path("by_command"), Path("release"))
    expected = weights("release/model.layers.1")
    for _ in range(2):
        sae = LanguageModelSAETrainingRunner(config(dead_feature_window=3)).run()
        assert equal(weights(), expected) and equal(dict(sae.state_dict()), expected)
    # The finished run was set aside, and no checkpoint is left of either.
    first, second = sorted(Path("checkpoints").iterdir())
    assert second.name == f"{first.name}.1" and not list(Path("checkpoints").rglob("*.safetensors"))
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "losses/overall_loss" in line} == {1, 4, 8, 12}
    assert {path.name for path in Path("output").iterdir()} >= {
        "cfg.json",
        "sae_weights.safetensors",
        "runner_cfg.json",
    }
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with monkeypatch.context() as patch:
        patch.delattr(Trainer, "fit")
        again = LanguageModelSAETrainingRunner(config(dead_feature_window=3))
        assert equal(dict(again.run().state_dict()), expected) and len(list(Path("checkpoints").iterdir())) == 2
    # What another run of the script has written to the same folder is not taken for it.
    with Path("output/sae_weights.safetensors").open("ab") as file:
        file.write(b" ")
    assert not again._begin(Path(again.run_config.output_dir)) and len(list(Path("checkpoints").iterdir())) == 2
    assert Path(f"{first}.2").exists()


def test_ranks_share_the_latents_and_go_on_after_an_error() -> None:
    """Two ranks, twice in the same processes and with an error between: the SAE of one process."""

    def worker(rank: int, world: int) -> tuple[str, list[dict[str, Tensor]]]:
        names = [f"two_{number}" for number in range(2)]
        found = [dict(LanguageModelSAETrainingRunner(config(output_path=names[0])).run().state_dict())]
        with pytest.raises(UserError) as error:
            LanguageModelSAETrainingRunner(config(topology={"sae": {"tp": 4}})).run()
        assert not torch.distributed.is_initialized()
        dedicated = {"lm": {"tp": 1}, "sae": {"tp": 1}}
        again = config(output_path=names[1], topology=dedicated, checkpoint_path=None)
        found.append(dict(LanguageModelSAETrainingRunner(again).run().state_dict()))
        return str(error.value), found

    results = run_ranks(2, worker, init=False)
    one = dict(LanguageModelSAETrainingRunner(config()).run().state_dict())
    for said, saes in results:
        assert said.startswith("topology: needs 4 ranks but 2 were started")
        for found in saes:
            # float64: another order of sums gives 1e-14 or so; a wrong row or latent, 1e-4 and more.
            assert runs.largest_difference(found, one) <= 1e-9
    assert not list(Path().glob(".two_1*"))


@pytest.mark.parametrize("kept", ["checkpoints", pytest.param(None, marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on(kept: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    LanguageModelSAETrainingRunner(config(output_path="whole")).run()
    original = Trainer.advance
    before = signal.getsignal(signal.SIGTERM)

    def advance(self: Trainer, *arguments: Any) -> bool:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    cfg = config(lr=1e-3, checkpoint_path=kept, n_checkpoints=0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Trainer, "advance", advance)
        LanguageModelSAETrainingRunner(cfg).run()
    assert end.value.code == 0 and not Path("output").exists()
    assert signal.getsignal(signal.SIGTERM) is before and not torch.distributed.is_initialized()
    seen: list[int] = []
    load = Trainer.load

    def note(self: Trainer, folder: Path) -> None:
        load(self, folder)
        seen.append(self.step)

    def consolidate_signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return released(*arguments)

    released = consolidate.consolidate
    monkeypatch.setattr(Trainer, "load", note)
    monkeypatch.setattr(consolidate, "consolidate", consolidate_signalled)
    with pytest.raises(SystemExit) as end:  # once the SAE is written
        LanguageModelSAETrainingRunner(cfg).run()
    assert end.value.code == 0
    assert 5 <= seen[0] < STEPS and equal(weights(), weights("whole"))


def test_the_text_ends(capfd: pytest.CaptureFixture[str]) -> None:
    """The SAE of the whole batches that there are, and a line that says so."""
    Path("few.jsonl").write_text(json.dumps({"text": "ab" * 200}))
    tiny = {"sae": StandardTrainingSAEConfig(d_in=256, d_sae=16), "dataset_path": "few.jsonl", "streaming": False}
    LanguageModelSAETrainingRunner(config(checkpoint_path=None, train_batch_size_tokens=32, **tiny)).run()
    # 400 bytes are as many tokens; with a BOS for every 31 of them they are 13 contexts of 32, the last not full.
    (note,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: data.dataset")]
    rows, batches = map(int, re.findall(r"few\.jsonl gave (\d+) rows, .* needs 768; all (\d+) whole batches", note)[0])
    assert batches == rows // 32 and 12 * 31 <= rows <= 12 * 32
    assert {path.name for path in Path().iterdir()} == {"few.jsonl", "output", "texts.jsonl"}


def steps_kept(run: Any, steps: int) -> list[int]:
    """The checkpoints that stay beside the last one of a run."""
    made = range(run.checkpoint.every_steps, steps, run.checkpoint.every_steps)
    return [step for step in made if step % run.checkpoint.keep_every == 0]


def test_how_many_checkpoints_are_kept() -> None:
    for steps, asked in ((12, 2), (1000, 1), (1000, 3), (999, 3), (30_517, 10), (10**6, 1)):
        run = built(training_tokens=steps * BATCH, n_checkpoints=asked)
        kept = steps_kept(run, steps)
        assert len(kept) == asked
        # Evenly spaced to a step for each of the checkpoints in between, none of which a crash puts farther back than
        # it does where none are asked for.
        assert all(abs(b - a - steps / (asked + 1)) <= steps / 200 for a, b in zip([0, *kept], kept, strict=False))
        assert run.checkpoint.every_steps <= 200 and run.checkpoint.keep_every % run.checkpoint.every_steps == 0
    assert len(steps_kept(built(training_tokens=10 * BATCH, n_checkpoints=6), 10)) <= 6


@pytest.mark.slow
def test_checkpoints_that_are_asked_for() -> None:
    LanguageModelSAETrainingRunner(config(n_checkpoints=2, save_final_checkpoint=True, output_path=None)).run()
    (folder,) = Path("checkpoints").iterdir()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000008",
        "step_00000012",
    ]
    assert not Path("output").exists() and not (folder / "release").exists()
    # One of them starts another run.
    start = str(folder / "checkpoints/step_00000004")
    LanguageModelSAETrainingRunner(config(resume_from_checkpoint=start, checkpoint_path="branch")).run()
    LanguageModelSAETrainingRunner(config(output_path="whole")).run()
    assert equal(weights(), weights("whole"))


def test_from_the_cache_of_the_other_runner() -> None:
    """Cached by two processes, trained by two: bitwise the live run of two."""

    def worker(rank: int, world: int) -> str:
        cached = CacheActivationsRunnerConfig(d_in=256, model_batch_size=4, **shared())
        folder = CacheActivationsRunner(cached).run()
        LanguageModelSAETrainingRunner(config(output_path="live")).run()
        # store_batch_size_prompts is the cache's, but for the size of the buffer: 8 x 32 rows in both.
        read = config(use_cached_activations=True, store_batch_size_prompts=2, n_batches_in_buffer=4)
        LanguageModelSAETrainingRunner(read).run()
        return str(folder)

    dataset = shared()["dataset_path"].replace("/", "_")
    assert run_ranks(2, worker, init=False) == [f"activations/{dataset}/embedded/blocks.1.hook_resid_post"] * 2
    assert equal(weights(), weights("live"))


@dataclasses.dataclass
class HalvedConfig(StandardTrainingSAEConfig):
    factor: float = 0.5

    @classmethod
    def architecture(cls) -> str:
        return "halved_of_test_runners"


class Halved(StandardTrainingSAE):
    cfg: HalvedConfig  # type: ignore[assignment]


def test_a_class_of_ones_own() -> None:
    register_sae_training_class("halved_of_test_runners", Halved, HalvedConfig)
    sae = LanguageModelSAETrainingRunner(config(sae=HalvedConfig(d_in=256, d_sae=64, factor=0.25))).run()
    assert sae.cfg.architecture() == "standard" and sae.cfg.d_sae == 64
    assert json.loads(Path("output/runner_cfg.json").read_text())["saes"][0]["factor"] == 0.25


# ---- the fields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LanguageModelSAERunnerConfig", "CacheActivationsRunnerConfig"])
def test_fields_and_defaults_are_saelens(name: str) -> None:
    import sae_lens.config

    ours, theirs = (
        {f.name: f for f in dataclasses.fields(cls)} for cls in (globals()[name], getattr(sae_lens.config, name))
    )
    # Versions of SAELens are no setting.
    assert theirs.keys() - ours.keys() <= {"sae_lens_version", "sae_lens_training_version"}
    own = {"topology", "exclude_special_tokens", "sequence_separator_token"}
    assert ours.keys() - theirs.keys() <= own
    for key in ours.keys() & theirs.keys() - {"sae", "logger"}:
        a, b = (f.default_factory() if callable(f.default_factory) else f.default for f in (ours[key], theirs[key]))
        # A device that is chosen when the module is imported is one that a config may choose later.
        assert a == b or (key == "device" and a is None), key


def test_what_the_fields_become() -> None:
    """The fields whose names or units are others in a config file."""
    cfg = config(
        hook_name="model.layers.0.mlp",
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"center_writing_weights": False, "revision": "main"},
        seqpos_slice=(1, None),
        exclude_special_tokens=[0, 3],
        sequence_separator_token=None,
        compile_llm=True,
        dead_feature_window=7,
        n_batches_in_buffer=3,
        train_batch_size_tokens=96,
        n_eval_batches=5,
        eval_batch_size_prompts=2,
        logger=LoggingConfig(wandb_entity="team", wandb_log_frequency=3, eval_every_n_wandb_logs=7),
        topology={"lm": {"tp": 2}},
    )
    run = cfg.to_run_config(1)
    assert run.hookpoints == ("model.layers.0.mlp",)
    assert (run.model.revision, run.model.compile, run.model.dtype) == ("main", True, "float64")
    assert run.data.seqpos_slice == (1, None) and run.data.exclude_special_tokens == (0, 3)
    assert run.data.sequence_separator_token is None and run.data.chunk_contexts == 4
    assert run.train.dead_feature_window_tokens == 7 * 96
    # gcd(64, 96) lanes; 3 x 4 x 32 = 384 rows are 12 to each.
    assert (run.buffer.lanes, run.buffer.tokens) == (32, 384)
    assert (run.evaluation.every_steps, run.evaluation.tokens) == (21, 5 * 2 * 32)
    logging = run.logging
    assert (logging.log_every_steps, logging.wandb_entity, logging.log_weights_to_wandb) == (3, "team", True)
    assert logging.run_name == "topk-128-LR-0.001-Tokens-7.680e+02"
    assert run.topology.lm.tp == 2
    # The SAE has the ranks that the model leaves; where it is cached or colocated, all.
    laid_out = [({"lm": {"tp": 2, "dp": 2}}, 4), ({}, 8), ({"lm": {"cache": "x"}}, 8), ({"sae": {"groups": 1}}, 1)]
    for laid, tp in laid_out:
        assert config(topology=laid).to_run_config(8).topology.sae.tp == tp
    # A logger that several configs share gets no name of the first one.
    shared_logger = LoggingConfig()
    assert config(logger=shared_logger).logger.run_name is not None and shared_logger.run_name is None
    assert (config().to_run_config(2).topology.sae.tp, config().to_run_config(2).topology.lm.colocated) == (2, True)
    # SAELens's defaults, with which it cannot train: the buffer would be smaller than a batch.
    small = config(n_batches_in_buffer=1, train_batch_size_tokens=512).to_run_config(1)
    assert small.buffer.tokens == 512
    names = {name: runs_name(name) for name in ("gpt2-small", "pythia-70m", "gemma-2-2b", "meta-llama/Llama-3.2-1B")}
    assert names == {
        "gpt2-small": "gpt2",
        "pythia-70m": "EleutherAI/pythia-70m",
        "gemma-2-2b": "google/gemma-2-2b",
        "meta-llama/Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    }


def runs_name(name: str) -> str:
    from scale_sae.runner_config import hub_name

    return hub_name(name)


INERT: dict[str, Any] = {
    "hook_head_index": 3,
    "use_chat_formatting": True,
    "disable_concat_sequences": True,
    "activations_mixing_fraction": 0.1,
    "llm_device": "cuda:1",
    "act_store_device": "with_model",
    "prefetch_llm_batches": True,
    "autocast": True,
    "autocast_lm": True,
    "llm_compilation_mode": "max-autotune",
    "compile_sae": True,
    "sae_compilation_mode": "default",
    "n_batches_for_norm_estimate": 10,
    "model_kwargs": {"a": 1},
}
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "sae_lens": (lambda: config(sae={"d_in": 256}), r"sae: builtins\.dict is no training config of scale_sae; import"),
    "logger": (lambda: config(logger={"log_to_wandb": False}), r"logger: dict must be a scale_sae\.LoggingConfig"),
    "cuda": (lambda: config(device="cuda"), r"device: 'cuda', but this process has no GPU"),
    "mps": (lambda: config(device="mps"), r"device: 'mps' is not supported; use cuda or cpu"),
    "number": (
        lambda: config(device="cuda:1"),
        r"device: 'cuda:1' cannot be chosen by number; set CUDA_",
    ),
    "mamba": (lambda: built(model_class_name="HookedMamba"), r"model_class_name: HookedMamba is not supported"),
    "kwargs": (
        lambda: built(model_from_pretrained_kwargs={"n_devices": 2}),
        r"model_from_pretrained_kwargs\.n_devices: 2",
    ),
    "model": (lambda: built(model_name="no/such"), r"model\.name: no/such cannot be loaded"),
    "hook": (
        lambda: built(hook_name="blocks.9.hook_resid_pre"),
        r"hook_name: blocks\.9\.hook_resid_pre, but the",
    ),
    "hook kind": (lambda: built(hook_name="blocks.1.hook_resid_pst"), r"hook_name: .*hook_resid_pst.*hook_resid_post"),
    "batch": (lambda: built(train_batch_size_tokens=0), r"train_batch_size_tokens: 0 must be above 0"),
    "tokens": (lambda: built(training_tokens=10), r"train\.training_tokens: 10 is less than one batch"),
    "dtype": (lambda: built(dtype="half"), r"model\.dtype: 'half'"),
    "scheduler": (lambda: built(lr_scheduler_name="linear"), r"train\.lr_scheduler_name: 'linear'"),
    "d_in": (lambda: resolve(built(sae=StandardTrainingSAEConfig(d_in=99, d_sae=64))), r"d_in: 99 must be 256"),
    "both": (
        lambda: built(use_cached_activations=True, topology={"lm": "colocated"}),
        r"topology\.lm: with use_c",
    ),
    "cache": (
        lambda: LanguageModelSAETrainingRunner(config(use_cached_activations=True)).run(),
        r"topology\.lm\.cache: activations/\S+texts\.jsonl/embedded/blocks\.1\.hook_resid_post holds no cached",
    ),
    "output": (
        lambda: LanguageModelSAETrainingRunner(config(output_path="texts.jsonl/sae")).run(),
        r"output_path: texts\.jsonl/sae cannot be written \(Not a directory\); choose another folder, or make room",
    ),
    "no context": (lambda: caching(context_size=-1), r"context_size: -1; give the tokens per context"),
    "hub": (lambda: caching(hf_repo_id="me/mine"), r"hf_repo_id: 'me/mine' is not there; upload the finished folder"),
    "width": (lambda: resolve(caching(d_in=768).to_run_config()), r"d_in: 768 must be 256, the width of its hookpoint"),
}


def built(**changes: Any) -> Any:
    return config(**changes).to_run_config(1)


def caching(**changes: Any) -> CacheActivationsRunnerConfig:
    return CacheActivationsRunnerConfig(**shared() | {"d_in": 256, "model_batch_size": 4} | changes)


@pytest.mark.parametrize("name", INERT)
def test_fields_without_effect(name: str) -> None:
    """What cannot have the effect that it has in SAELens is not passed over in silence."""
    with pytest.raises(UserError, match=rf"^{name}: .*(is not there|has no effect|takes one|cannot|is not handed).*;"):
        config(**{name: INERT[name]})


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values(name: str) -> None:
    attempt, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        attempt()
    assert "\n" not in str(error.value)


def test_a_process_group_that_is_there_already(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"torch\.distributed: the process group exists already"), session.joined():
            pass
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["runners.md", "cache.md"])
def test_the_documented_code_runs(page: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (runs.ROOT / "docs" / page).read_text(), re.DOTALL)
    exec(code.replace("200_000", "20_000"), {})
    made = Path("output/cfg.json") if page == "runners.md" else Path("activations/example/index.json")
    assert made.exists()


@pytest.mark.slow
def test_a_script_under_a_launcher(tmp_path: Path) -> None:
    """accelerate launch of a script with the documented code: two processes, the SAE of one."""
    (code,) = re.findall(r"```python\n(.*?)```", (runs.ROOT / "docs/runners.md").read_text(), re.DOTALL)
    for old, new in (
        ("200_000", "20_000"),
        ("n_eval_batches=2", "n_eval_batches=0"),
        # float64 of model and SAE, so that the order of sums shows as rounding alone
        ("k=32", "k=32, dtype='float64'"),
        ("lr=3e-4", "lr=3e-4, dtype='float64'"),
    ):
        assert old in code
        code = code.replace(old, new)
    saes = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "my_run.py").write_text(code)
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        done = subprocess.run(
            [*launcher, "--config_file", str(runs.ROOT / "launch/cpu.yaml"), "my_run.py"],
            cwd=folder,
            env=runs.environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        saes.append(weights(folder / "output"))
    assert runs.largest_difference(*saes) <= 1e-9
