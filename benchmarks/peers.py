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
import inspect
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from subjects import PACKAGES, SUBJECTS, Setting, parts, worker


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
        """Seconds per step: medians over the rounds, and the least."""
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
    commit, changed = "unknown", ""
    if shutil.which("git"):
        git = ["git", "-C", str(package)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "scale_sae"], capture_output=True, text=True).stdout
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit + (" and changes" if changed else ""),
        "python": platform.python_version(),
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
