"""Our training step against those of SAELens, sparsify and dictionary_learning, in turns in one run.

In an environment of its own, since the peers ask for other versions of many things:

    python -m venv runs/peers && source runs/peers/bin/activate
    pip install torch==2.13.0
    pip install -r benchmarks/peers-requirements.txt
    pip uninstall --yes torchvision     # asked for by nobody here, and often of another build than torch
    pip install --no-deps --editable .
    python benchmarks/peers.py

Where other processes use the cores too, set ``OMP_WAIT_POLICY=PASSIVE``: threads that spin while they wait for each
other take the time that those would need.

Every subject is a process of its own (or two, with ``@2``) that has its batches in memory and trains when it is its
turn: a round is ``--steps`` steps of each, one subject after the other, so that all see the same weather. Figures are
medians over ``--rounds`` rounds. A step is, of

- ``ours``: ``JobTrainer.step``, the whole of it. ``ours@2``: tp=2, with half of the threads each.
- ``sae_lens``: ``SAETrainer.step`` as ``SAETrainer.fit`` calls it.
- ``sparsify``: ``Trainer.fit`` itself, on a model whose only layer hands out the batch. Its default optimizer is
  signum; ``sparsify_adam`` uses Adam. ``sparsify@2``: under DDP, half of the batch each. It knows no BatchTopK.
- ``dictionary_learning``: ``update`` of its trainers, as in the part of a run in which the threshold is followed.
- ``floor``: one encoder GEMM, ``torch.topk`` of its result, fused Adam over W_enc and W_dec; into existing memory.

No latent is ever dead, so that nobody has an auxiliary loss to compute, and nothing is logged. *MiB above* is the most
memory that a subject's tensors have at once in a step, less 12 bytes per parameter: the parameters and Adam's two
moments in float32 (of its shard, for ``ours@2``). On a CPU it takes a run of its own, with ``--memory``.

On a GPU: ``--device cuda --dtype bfloat16``. Ours then has ``dtype: bfloat16``, the peers their autocast; sparsify has
bfloat16 always. Subjects that do not fit side by side are run one after the other with ``--alone``.
"""

import argparse
import contextlib
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata, util
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from pathlib import Path
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


# ---- the subjects ----------------------------------------------------------------------------------------------------


def ours(setting: Setting, turns: Turns, rank: int, world: int) -> None:
    from scale_sae import config, topology
    from scale_sae.activations.schedule import schedule
    from scale_sae.jobs import resolve
    from scale_sae.trainer import Trainer

    entry = {"architecture": setting.architecture, "d_sae": setting.d_sae, "k": setting.k, "dtype": setting.dtype}
    hookpoint = "model.layers.1"
    run = config.from_dict(
        {
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


# ---- the controller --------------------------------------------------------------------------------------------------


class Subject:
    """The controller's side: the processes of a subject, and what they told."""

    def __init__(self, name: str, setting: Setting, memory: bool = False):
        self.name, self.world = name, parts(name)[1]
        self.setting = setting
        self.failed = False
        self.rounds: list[dict[str, Any]] = []
        context, port = multiprocessing.get_context("spawn"), free_port()
        self.connections, self.processes = [], []
        for rank in range(self.world):
            own, other = context.Pipe()
            process = context.Process(target=worker, args=(other, name, setting, rank, port, memory), daemon=True)
            process.start()
            other.close()
            self.connections.append(own)
            self.processes.append(process)

    def begin(self) -> None:
        """Lets it make what it trains; it ``answers`` when it is ready."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send("begin")

    def answers(self) -> list[Any]:
        try:
            found = [connection.recv() for connection in self.connections]
        except EOFError:
            found = ["failed"]
        self.failed = self.failed or "failed" in found
        return found

    def train(self, steps: int) -> None:
        """``steps`` steps of all of its ranks; 0 ends it."""
        if self.failed:
            return
        for connection in self.connections:
            connection.send(steps)
        if steps:
            found = self.answers()
            if not self.failed:
                self.rounds.append(
                    {
                        "seconds": max(one["seconds"] for one in found),
                        "processor": sum(one["processor"] for one in found),
                        "laps": found[0]["laps"],
                        "memory": found[0]["memory"],
                    }
                )

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.train(0)
        for process in self.processes:
            process.join(20)
            process.kill()

    def figures(self) -> dict[str, Any]:
        """Seconds per step: medians over the rounds but for the first, and the least."""
        if self.failed or not self.rounds:
            return {"failed": True}
        found: dict[str, Any] = {
            name: statistics.median(one[name] for one in self.rounds) for name in ("seconds", "processor")
        }
        laps = {name: statistics.median(one["laps"][name] for one in self.rounds) for name in self.rounds[0]["laps"]}
        if self.rounds[-1]["memory"] is not None and not laps:
            found["memory"] = self.rounds[-1]["memory"] - state_bytes(self.name, self.setting)
        return {**found, "least": min(one["seconds"] for one in self.rounds), **({"laps": laps} if laps else {})}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def applicable(subject: str, setting: Setting) -> bool:
    name, world = parts(subject)
    if name.startswith("sparsify") and setting.architecture != "topk":
        return False
    if setting.device == "cuda" and world > torch.cuda.device_count():
        return False
    return name not in PACKAGES or util.find_spec(PACKAGES[name].partition(".")[0]) is not None


def measure(names: list[str], setting: Setting, rounds: int, steps: int, warmup: int, alone: bool) -> dict[str, Any]:
    """Subject → its figures."""
    subjects = [Subject(name, setting) for name in names]
    try:
        for together in [[subject] for subject in subjects] if alone else [subjects]:
            in_turns(together, rounds, steps, warmup)
            if alone:
                together[0].end()
    finally:
        for subject in subjects:
            subject.end()
    return {subject.name: subject.figures() for subject in subjects}


def in_turns(subjects: list["Subject"], rounds: int, steps: int, warmup: int) -> None:
    for subject in subjects:
        subject.begin()
    for subject in subjects:
        subject.answers()
    for subject in subjects:
        subject.train(warmup)
        subject.rounds.clear()
    for _ in range(rounds):
        for subject in subjects:
            subject.train(steps)


def state_bytes(name: str, setting: Setting) -> int:
    """Of a rank's parameters and of Adam's two moments, in float32."""
    kind, world = parts(name)
    return 12 * (2 * setting.d_in * setting.d_sae + setting.d_sae + setting.d_in) // (world if kind == "ours" else 1)


def memory_above(names: list[str], setting: Setting) -> dict[str, int]:
    """Subject → bytes of the rank that has most, beyond ``state_bytes``; from a run of each, one after the other."""
    subjects = [Subject(name, setting, memory=True) for name in names if name != "floor"]
    found = {}
    for subject in subjects:
        subject.begin()
        answers = subject.answers()
        subject.end()
        if not subject.failed:
            found[subject.name] = max(answers) - state_bytes(subject.name, setting)
    return found


def table(setting: Setting, found: dict[str, Any]) -> Iterator[str]:
    """One line per subject: its figures, and ours as a multiple of it."""
    mine = found.get("ours", {}).get("seconds")
    rows = []
    for name, figures in found.items():
        if figures.get("failed"):
            rows.append((name, None, None))
        elif "laps" in figures:
            rows += [(f"floor: {part}", {"seconds": value}, None) for part, value in figures["laps"].items()]
            rows.append(("floor: their sum", {"seconds": sum(figures["laps"].values())}, True))
        else:
            rows.append((name, figures, name != "ours"))
    for name, figures, has_ratio in rows:
        cells = [f"{setting.architecture} {setting.d_in} x {setting.d_sae}", name]
        if figures is None:
            cells += ["failed", "", "", "", ""]
        else:
            cells += [
                f"{figures[key] * 1e3:.1f}" if key in figures else "" for key in ("seconds", "least", "processor")
            ]
            cells.append(f"{mine / figures['seconds']:.2f}" if mine and has_ratio else "")
            cells.append(f"{figures['memory'] / 2**20:.0f}" if figures.get("memory") is not None else "")
        yield f"| {' | '.join(cells)} |"


HEADER = "| | subject | ms per step | least | of processors | ours / it | MiB above |\n|---|---|---|---|---|---|---|"


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "sae-lens", "eai-sparsify", "dictionary-learning"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def where() -> dict[str, Any]:
    """Date, hardware, versions, and the commit of the package that is measured."""
    package = Path(util.find_spec("scale_sae").origin).parents[1]  # type: ignore[union-attr,arg-type]
    git = ["git", "-C", str(package)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "scale_sae"], capture_output=True, text=True).stdout
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit + (" and changes" if changed else ""),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
    }


def main(
    sizes: str = "512x8192,768x24576",
    architectures: str = "topk,batchtopk",
    subjects: str = ",".join(SUBJECTS),
    k: int = 32,
    batch: int = 2048,
    rounds: int = 7,
    steps: int = 2,
    warmup: int = 3,
    threads: int = 2,
    device: str = "cpu",
    dtype: str = "float32",
    alone: bool = False,
    memory: bool = False,
) -> None:
    lines, results = [HEADER], []
    for size, architecture in itertools.product(sizes.split(","), architectures.split(",")):
        d_in, d_sae = map(int, size.split("x"))
        setting = Setting(architecture, d_in, d_sae, k, batch, device, dtype, threads)
        names = [name for name in subjects.split(",") if applicable(name, setting)]
        found = measure(names, setting, rounds, steps, warmup, alone)
        if memory:
            for name, above in memory_above(names, setting).items():
                found[name]["memory"] = above
        lines += table(setting, found)
        results.append({**vars(setting), "subjects": found})
        print("\n".join([HEADER, *table(setting, found)]), file=sys.stderr, flush=True)
    print("\n".join(lines))
    print(json.dumps({**where(), "rounds": rounds, "steps": steps, "results": results}))


def arguments() -> dict[str, Any]:
    """The parameters of ``main``, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in inspect.signature(main).parameters.items():
        if parameter.default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(parameter.default), default=parameter.default)
    return vars(parser.parse_args())


if __name__ == "__main__":
    main(**arguments())
