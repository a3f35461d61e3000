"""What ``benchmarks/quality.py`` trains: SAEs of ours and of others, each by its package's own training loop.

Each peer has the defaults of its package. Only what a run says is set: d_sae, k, batch, steps, seed, learning rate; and

- ``sae_lens``: ``SAETrainer.fit``. Its config has no ``lr_end`` by default, which its trainer asks for: lr / 10, as its
  runner has it; it has no effect where the learning rate is constant.
- ``sparsify``: ``Trainer.fit``, on a model whose only layer hands out the next batch. It knows no BatchTopK.
- ``dictionary_learning``: ``trainSAE``, with ``normalize_activations`` and a decay over the last fifth of the steps, as
  in its demo; learning rate, warm-up (1000 steps) and the rest are its trainers' own, which ask for 1251 steps or more.
  It finds its factor in the first 101 batches, and trains on them too. Its AuxK looks at latents that were silent for
  ten million tokens: in runs as short as these at none.

Batches are ours, row by row and in the same order, in float32; those rows too that ours leaves out.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from subjects import UNUSED, OneLayer, Setting, stand_in
from torch import Tensor


class Batches(Protocol):
    """The batches of a run, from the first whenever they are iterated over: ``[batch, d_in]`` in float32."""

    d_in: int

    def __iter__(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Run:
    """One SAE to train.

    Attributes:
        model: a folder of the work folder's ``caches``.
        lr: None for the subject's default.
        options: further keys of the config, for ``ours``.
        label: of these, part of the run's name.
    """

    model: str
    hookpoint: str
    architecture: str
    d_sae: int
    k: int
    tokens: int
    batch: int
    subject: str
    seed: int = 0
    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        if self.subject not in TRAIN:
            raise ValueError(f"subject: {self.subject!r} is none of {', '.join(TRAIN)}")
        if self.options and not (self.subject == "ours" and self.label):
            raise ValueError("options: only a run of ours has them, and it needs a label")

    @property
    def id(self) -> str:
        rate = "default" if self.lr is None else f"{self.lr:g}"
        parts = [self.model, self.hookpoint, self.architecture, f"d{self.d_sae}", f"k{self.k}", f"b{self.batch}"]
        parts += [f"t{self.tokens}", self.subject + (f"-{self.label}" if self.label else ""), f"lr{rate}"]
        return "_".join([*parts, f"s{self.seed}"])

    @property
    def steps(self) -> int:
        return self.tokens // self.batch

    @property
    def can_be_trained(self) -> bool:
        return self.subject != "sparsify" or self.architecture == "topk"


@dataclass(frozen=True)
class Released:
    """An SAE as its package loads it from the disk: rows ``[n, d_in]`` to activations ``[n, d_sae]``, and back."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """``lr`` is what was trained with, ``seconds`` the time of the training loop, its batches' included."""

    lr: float
    seconds: float


# ---- SAELens ---------------------------------------------------------------------------------------------------------


def train_sae_lens(run: Run, batches: Batches, folder: Path) -> Trained:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae_class, config_class = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }[run.architecture]
    torch.manual_seed(run.seed)
    sae = sae_class(config_class(d_in=batches.d_in, d_sae=run.d_sae, k=run.k))
    rate = {} if run.lr is None else {"lr": run.lr}
    config = SAETrainerConfig(run.steps * run.batch, run.batch, **rate)
    config.lr_end = config.lr / 10
    trainer = SAETrainer(config, sae, data_provider=iter(batches))
    begun = time.perf_counter()
    trained = trainer.fit()
    seconds = time.perf_counter() - begun
    trained.save_inference_model(folder / "sae")
    return Trained(config.lr, seconds)


def load_sae_lens(run: Run, folder: Path) -> Released:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder / "sae")
    return Released(sae.encode, sae.decode)


# ---- sparsify --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """A data set of ``n`` sequences of ``rows`` tokens, which nobody looks at."""

    n: int
    rows: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(self.rows, dtype=torch.int64)}


def train_sparsify(run: Run, batches: Batches, folder: Path) -> Trained:
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    rows = iter(batches)
    setting = Setting(run.architecture, batches.d_in, run.d_sae, run.k, run.batch, "cpu", "float32", 1)
    model = OneLayer(setting, run.batch, lambda: next(rows))
    config = TrainConfig(
        SparseCoderConfig(num_latents=run.d_sae, k=run.k),
        batch_size=1,
        lr=run.lr,
        init_seeds=[run.seed],
        hookpoints=["layer"],
        save_dir=str(folder),
        run_name="sae",
        log_to_wandb=False,
    )
    trainer = Trainer(config, Sequences(run.steps, run.batch), model)
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    begun = time.perf_counter()
    trainer.fit()
    return Trained(lr, time.perf_counter() - begun)


def load_sparsify(run: Run, folder: Path) -> Released:
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder / "sae/layer")

    def encode(x: Tensor) -> Tensor:
        found = sae.encode(x)
        return x.new_zeros(len(x), run.d_sae).scatter(1, found.top_indices, found.top_acts)

    def decode(acts: Tensor) -> Tensor:
        # No activation is below 0, so that these are all that are not 0.
        top = acts.topk(run.k)
        return sae.decode(top.values, top.indices)

    return Released(encode, decode)


# ---- dictionary_learning ---------------------------------------------------------------------------------------------

DECAY_FROM = 0.8  # of the steps: the demo's


def train_dictionary_learning(run: Run, batches: Batches, folder: Path) -> Trained:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    config = {
        "trainer": {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[run.architecture],
        "steps": run.steps,
        "activation_dim": batches.d_in,
        "dict_size": run.d_sae,
        "k": run.k,
        "layer": 1,
        "lm_name": run.model,
        "lr": run.lr,
        "decay_start": int(DECAY_FROM * run.steps),
        "seed": run.seed,
        "device": "cpu",
    }
    begun = time.perf_counter()
    trainSAE(batches, [config], run.steps, save_dir=str(folder / "sae"), normalize_activations=True, device="cpu")
    seconds = time.perf_counter() - begun
    return Trained(json.loads((folder / "sae/trainer_0/config.json").read_text())["trainer"]["lr"], seconds)


def load_dictionary_learning(run: Run, folder: Path) -> Released:
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    weights = torch.load(folder / "sae/trainer_0/ae.pt", weights_only=True)
    d_in = len(weights["b_dec"])
    sae = {"topk": AutoEncoderTopK, "batchtopk": BatchTopKSAE}[run.architecture](d_in, run.d_sae, run.k)
    sae.load_state_dict(weights)
    return Released(sae.encode, sae.decode)


# ---- ours ------------------------------------------------------------------------------------------------------------


def train_ours(run: Run, config: Path, options: Mapping[str, Any], folder: Path) -> Trained:
    """The commands themselves: train, then consolidate. ``options`` are those of the run's config."""
    from scale_sae.config import load

    log, release = folder / "train", folder / "release"
    settings = {**options, "output_dir": str(log), "checkpoint.buffer": "refill"}
    if run.lr is not None:
        settings["train.lr"] = run.lr
    settings |= run.options
    flags = [f"--{name}={json.dumps(value)}" for name, value in settings.items()]
    python = [sys.executable, "-m"]
    subprocess.run([*python, "scale_sae.train", "--config", str(config), *flags], check=True)
    summary = json.loads((log / "summary.json").read_text())
    if summary["step"] != run.steps:
        raise RuntimeError(f"stopped at step {summary['step']} of {run.steps}")
    subprocess.run([*python, "scale_sae.consolidate", str(log), "--out", str(release)], check=True)
    records = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(value for record in records for name, value in record.items() if name.startswith("perf/seconds_"))
    shutil.rmtree(log / "checkpoints")
    resolved = load(log / "config.yaml")
    return Trained(resolved.train_of(resolved.saes[0]).lr, seconds)


def load_ours(run: Run, folder: Path) -> Released:
    from scale_sae.saes.inference import SAE

    sae = SAE.load_from_disk(folder / "release" / run.hookpoint)
    return Released(sae.encode, sae.decode)


# ---- all of them -----------------------------------------------------------------------------------------------------

# subject → what trains a run's SAE into a folder; ours begins from the config and not from batches.
TRAIN: dict[str, Callable[..., Trained]] = {
    "ours": train_ours,
    "sae_lens": train_sae_lens,
    "sparsify": train_sparsify,
    "dictionary_learning": train_dictionary_learning,
}
# subject → what loads it from there.
LOAD: dict[str, Callable[[Run, Path], Released]] = {
    "ours": load_ours,
    "sae_lens": load_sae_lens,
    "sparsify": load_sparsify,
    "dictionary_learning": load_dictionary_learning,
}


def prepare_process() -> None:
    """For all that is trained: one thread, no bars, stand-ins for what peers import and do not use here."""
    from importlib import util

    os.environ |= {"TQDM_DISABLE": "1", "SPARSIFY_DISABLE_TRITON": "1"}  # Triton knows no tensors on a CPU
    torch.set_num_threads(1)
    for module in UNUSED:
        if util.find_spec(module) is None:
            stand_in(module)


def runs_of(entries: list[Mapping[str, Any]]) -> list[Run]:
    """The runs of a plan. An entry has the fields of `Run`; a list stands for a run with each of its values.

    The field that is written first changes last. ``lr: default`` is the subject's. What cannot be trained is left out.
    """
    runs: list[Run] = []
    for entry in entries:
        choices = [value if isinstance(value, list) else [value] for value in entry.values()]
        for values in itertools.product(*choices):
            fields = dict(zip(entry, values, strict=True))
            if "lr" in fields:
                fields["lr"] = None if fields["lr"] == "default" else float(fields["lr"])
            run = Run(**fields)
            if run.can_be_trained and run not in runs:
                runs.append(run)
    return runs
