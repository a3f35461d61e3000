"""What ``benchmarks/peers.py`` measures: the training steps of others and of ours, each in a process of its own."""

import contextlib
import importlib
import itertools
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import util
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MEASURED_STEP = 3  # of those whose memory is measured
BATCHES = 4  # distinct ones, which a subject takes in turns
NEVER = 10**12  # tokens or steps
SUBJECTS = (
    "floor",
    "ours",
    "ours@2",
    "sae_lens",
    "sparsify",
    "sparsify_adam",
    "sparsify@2",
    "dictionary_learning",
)
# What the peers import for parts that are not measured; where it is missing, an empty stand-in takes its place.
UNUSED = ("wandb", "datasets", "nnsight", "fire")


@dataclass(frozen=True)
class Setting:
    """What is trained, and with what: equal for all subjects."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    device: str
    dtype: str
    threads: int


class Done(Exception):
    """Raised where a subject asks for its next batch and there is none."""


class Turns:
    """A subject's side of the conversation: hands it batches when it is its turn, and measures in between."""

    def __init__(self, connection: Connection, setting: Setting, rows: int, seed: int):
        self.connection = connection
        self.device = torch.device(setting.device)
        draw = torch.Generator(self.device).manual_seed(seed)
        shape, dtype = (rows, setting.d_in), getattr(torch, setting.dtype)
        self.batches = itertools.cycle(
            [torch.randn(shape, generator=draw, device=self.device).to(dtype) for _ in range(BATCHES)]
        )
        self.steps = 0
        self.left = 0
        self.memory: Any = None
        self.clock = self.processor = 0.0
        self.laps: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def next(self) -> Tensor:
        """The next batch ``[rows, d_in]``; by asking for it a subject says that its step before is over."""
        if self.memory is not None:
            self.steps += 1
            if self.steps == MEASURED_STEP:
                self.memory.restart()
            elif self.steps > MEASURED_STEP:
                raise Done
        elif not self.left:
            if self.steps:
                seconds = (self.now() - self.clock) / self.steps
                used = (time.process_time() - self.processor) / self.steps
                laps = {name: value / self.steps for name, value in self.laps.items()}
                memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
                self.connection.send({"seconds": seconds, "processor": used, "laps": laps, "memory": memory})
            else:
                self.connection.send("ready")
            self.left = self.steps = self.connection.recv()
            if not self.steps:
                raise Done
            self.laps.clear()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.clock, self.processor = self.now(), time.process_time()
        self.left -= 1
        return next(self.batches)

    @contextlib.contextmanager
    def measured_memory(self) -> Iterator[None]:
        """Instead of waiting for turns, trains some steps and tells the memory of the last one."""
        from scale_sae.profiling import peak_memory

        with peak_memory(self.device) as self.memory, contextlib.suppress(Done):
            yield
        self.connection.send(self.memory.bytes)

    def lap(self, name: str, begun: float) -> float:
        """Counts the time since ``begun`` to ``name``; returns the time."""
        now = self.now()
        self.laps[name] = self.laps.get(name, 0.0) + now - begun
        return now


def ours(setting: Setting, turns: Turns, rank: int, world: int) -> None:
    from scale_sae import config, topology
    from scale_sae.activations.schedule import schedule
    from scale_sae.jobs import resolve
    from scale_sae.trainer import Trainer

    entry = {"architecture": setting.architecture, "d_sae": setting.d_sae, "k": setting.k, "dtype": setting.dtype}
    hookpoint = "model.layers.1"
    run = config.from_dict(
        {
            "recipe": "saelens",
            "model": {"dtype": setting.dtype},
            "hookpoints": [hookpoint],
            "saes": [entry],
            "topology": {"lm": "colocated", "sae": {"tp": world}},
            "train": {
                "training_tokens": NEVER,
                "train_batch_size_tokens": setting.batch,
                "dead_feature_window_tokens": NEVER,
            },
            "buffer": {"tokens": setting.batch, "lanes": world},
        }
    )
    specs = [replace(spec, cfg=replace(spec.cfg, d_in=setting.d_in)) for spec in resolve(run)[1]]
    backend = "gloo" if setting.device == "cpu" else "nccl"
    store = topology.connect(rank, world, backend)
    planned = topology.plan(run.topology, [spec.planned for spec in specs], run.buffer.lanes)
    place = topology.build(planned, rank, torch.device(setting.device), backend, store)
    sizes = replace(schedule(run, 1), chunk_rows=1)
    trainer = Trainer(run, specs, {hookpoint: setting.d_in}, sizes, place, getattr(torch, setting.dtype))
    for step in itertools.count():
        x = turns.next()
        trainer.jobs[0].step(x, x, setting.batch, step, False)


def sae_lens(setting: Setting, turns: Turns, rank: int, world: int) -> None:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae_class, config_class = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }[setting.architecture]
    sae = sae_class(config_class(d_in=setting.d_in, d_sae=setting.d_sae, k=setting.k, device=setting.device))
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=NEVER,
            train_batch_size_samples=setting.batch,
            lr_end=3e-5,
            device=setting.device,
            autocast=setting.dtype != "float32",
            dead_feature_window=NEVER,
        ),
        sae,
        data_provider=iter(()),
    )
    sae.to(setting.device)
    while True:
        trainer.maybe_reset_sparsity()
        trainer.step(turns.next())
        trainer._checkpoint_if_needed()
        trainer.n_training_steps += 1


class OneLayer(nn.Module):
    """What sparsify takes for a language model: its layer's output is the next batch, as one sequence."""

    def __init__(self, setting: Setting, rows: int, next_batch: Callable[[], Tensor]):
        super().__init__()
        self.layer = nn.Identity()
        self.next_batch = next_batch
        self.device = torch.device(setting.device)
        self.config = types.SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"x": torch.zeros(1, rows, setting.d_in)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.is_floating_point() else self.next_batch()[None])


class Tokens:
    """As many sequences of ``rows`` tokens as are ever asked for."""

    def __init__(self, rows: int):
        self.row = {"input_ids": torch.zeros(rows, dtype=torch.int64)}

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row


def sparsify(setting: Setting, turns: Turns, rank: int, world: int, optimizer: str = "signum") -> None:
    import sparsify.trainer
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    if setting.device == "cpu":
        # It names the GPU of a rank even where there is none.
        ddp = sparsify.trainer.DDP
        sparsify.trainer.DDP = lambda module, device_ids: ddp(module)
    rows = setting.batch // world
    if world > 1:
        dist.init_process_group("gloo" if setting.device == "cpu" else "nccl", rank=rank, world_size=world)
    config = TrainConfig(
        SparseCoderConfig(num_latents=setting.d_sae, k=setting.k),
        batch_size=1,
        optimizer=optimizer,
        hookpoints=["layer"],
        save_every=NEVER,
        log_to_wandb=False,
    )
    trainer = Trainer(config, Tokens(rows), OneLayer(setting, rows, turns.next))
    trainer.fit()


def dictionary_learning(setting: Setting, turns: Turns, rank: int, world: int) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[setting.architecture](
        steps=NEVER,
        activation_dim=setting.d_in,
        dict_size=setting.d_sae,
        k=setting.k,
        layer=1,
        lm_name="none",
        device=setting.device,
    )
    cast = contextlib.nullcontext
    if setting.device != "cpu":
        cast = lambda: torch.autocast("cuda", dtype=getattr(torch, setting.dtype))  # noqa: E731
    for step in itertools.chain([0], itertools.count(trainer.threshold_start_step + 1)):
        x = turns.next()
        with cast():
            trainer.update(step, x)


def floor(setting: Setting, turns: Turns, rank: int, world: int) -> None:
    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    made = {"device": device}
    weights = [torch.randn(setting.d_in, setting.d_sae, **made), torch.randn(setting.d_sae, setting.d_in, **made)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    adam = torch.optim.Adam(weights, lr=1e-4, fused=True)
    out = torch.empty(setting.batch, setting.d_sae, dtype=dtype, **made)
    chosen = (
        torch.empty(setting.batch, setting.k, dtype=dtype, **made),
        torch.empty(setting.batch, setting.k, dtype=torch.int64, **made),
    )
    used = weights[0].to(dtype)
    while True:
        x = turns.next()
        clock = turns.now()
        torch.mm(x, used, out=out)
        clock = turns.lap("GEMM", clock)
        torch.topk(out, setting.k, sorted=False, out=chosen)
        clock = turns.lap("torch.topk", clock)
        adam.step()
        turns.lap("fused Adam", clock)


RUN: dict[str, Callable[..., None]] = {
    "floor": floor,
    "ours": ours,
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "sparsify_adam": lambda *args: sparsify(*args, optimizer="adam"),
    "dictionary_learning": dictionary_learning,
}
# What each imports before its turn to be made, all side by side.
PACKAGES = {
    "ours": "scale_sae.trainer",
    "sae_lens": "sae_lens.training.sae_trainer",
    "sparsify": "sparsify.trainer",
    "sparsify_adam": "sparsify.trainer",
    "dictionary_learning": "dictionary_learning.trainers.top_k",
}


def parts(subject: str) -> tuple[str, int]:
    """(what runs, in how many processes)."""
    name, _, world = subject.partition("@")
    return name, int(world or 1)


def stand_in(name: str) -> None:
    """Makes ``name`` importable: any name in it is an empty class."""

    def attribute(of: str) -> type:
        if of.startswith("__"):
            raise AttributeError(of)
        return type(of, (), {})

    module = types.ModuleType(name)
    module.__getattr__ = attribute  # type: ignore[method-assign]
    module.__spec__ = ModuleSpec(name, None)
    sys.modules[name] = module


def worker(connection: Connection, subject: str, setting: Setting, rank: int, port: int, memory: bool) -> None:
    """A subject's process. Without a controller there is nobody to train for, so it ends with it."""
    name, world = parts(subject)
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TQDM_DISABLE="1",
        CUBLAS_WORKSPACE_CONFIG=":4096:8",  # as in our training; another order of cuBLAS's sums may be faster
    )
    os.dup2(2, 1)  # what they print is not a result
    torch.set_num_threads(max(1, setting.threads // world))
    for module in UNUSED:
        if name != "ours" and util.find_spec(module) is None:
            stand_in(module)
    if setting.device == "cpu":
        # Where Triton can be imported sparsify would use it, also for tensors on a CPU, which Triton does not know.
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    try:
        if name in PACKAGES:
            importlib.import_module(PACKAGES[name])
        connection.recv()
        if setting.device == "cuda":
            setting = replace(setting, device=f"cuda:{rank}")
            torch.cuda.set_device(rank)
        torch.manual_seed(0)
        rows = setting.batch // world if name == "sparsify" else setting.batch
        # Shards of a dictionary have the same batch, replicas of it different ones.
        turns = Turns(connection, setting, rows, seed=rank if name == "sparsify" else 0)
        with turns.measured_memory() if memory else contextlib.nullcontext():
            RUN[name](setting, turns, rank, world)
    except (Done, EOFError):
        pass
    except Exception:
        traceback.print_exc()
        connection.send("failed")
    finally:
        connection.close()
        os._exit(0)  # the connections between two ranks would be waited for
