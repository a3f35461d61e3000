"""What the planner says against what happens, on this machine and with the model that comes with the package.

    python benchmarks/planner.py            # three runs: memory, links, step time; some 4 minutes on 2 cores
    python benchmarks/planner.py --search   # every topology of 4 ranks for two configs; some 15 minutes

Both calibrate (`scale_sae.plan --calibrate` under ``accelerate launch``), the first before each run. A run is a whole
one, `scale_sae.train.run` on every rank; its step time is the mean over ``WINDOW`` steps behind the start, and what it
moves is counted at the collectives of these. ``--out FILE`` keeps the tables.
"""

import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
import yaml

from scale_sae import bench, config, topology, train
from scale_sae.planning.estimate import Estimate
from scale_sae.planning.hardware import Hardware, find
from scale_sae.planning.language_model import LMProfile, profile
from scale_sae.planning.search import colocated, dedicated, search
from scale_sae.planning.traffic import flows
from scale_sae.planning.workload import Workload
from scale_sae.trainer import Trainer

ROOT = Path(__file__).parents[1]
RANKS = 4
# Steps before those that count, in which LM ranks get as far ahead as they may; those, whole rounds of chunks in every
# topology of 4 ranks; and as many behind them as 3 copies of the model may be ahead, so that they work all along.
START, WINDOW, BEHIND = 16, 24, 20
BUFFER = 16384  # rows: 8 steps
TOPK = {"name": "k32", "architecture": "topk", "d_sae": 8192, "k": 32}
BATCHTOPK = {"name": "b32", "architecture": "batchtopk", "d_sae": 4096, "k": 32}
# name → what is its own in the config of `run_of`.
RUNS: dict[str, dict[str, Any]] = {
    "topk, LM tp 1 beside SAE tp 2": {"saes": [TOPK], "topology": {"lm": {"tp": 1}, "sae": {"tp": 2}}},
    "batchtopk, colocated, tp 2": {"saes": [BATCHTOPK], "topology": {"lm": "colocated", "sae": {"tp": 2}}},
    "topk, colocated, fsdp2 on dp 2 x tp 2": {
        "saes": [{**TOPK, "d_sae": 4096}],
        "topology": {"lm": "colocated", "sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"},
    },
}
SEARCHED: dict[str, dict[str, Any]] = {
    "one topk SAE at each of two layers": {"saes": [{**TOPK, "d_sae": 4096}]},
    "a wide batchtopk SAE at one layer": {"saes": [{**BATCHTOPK, "d_sae": 16384}], "hookpoints": ["model.layers.2"]},
}


def run_of(changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A config whose chunks have 4096 rows and whose batches 2048, so that rounds of chunks are whole steps."""
    return {
        "output_dir": str(folder / "run"),
        "model": {"name": "embedded"},
        "data": {"context_size": 128, "chunk_contexts": 32, "exclude_special_tokens": False},
        "hookpoints": ["model.layers.1", "model.layers.3"],
        "train": {
            "training_tokens": (START + WINDOW + BEHIND) * 2048 + BUFFER,
            "train_batch_size_tokens": 2048,
            "lr": 1e-3,
        },
        "buffer": {"tokens": BUFFER},
        "checkpoint": {"every_steps": 10**6, "buffer": "refill"},
        "logging": {"log_every_steps": 10**6},
        **changes,
    }


# ---- one rank of a run -----------------------------------------------------------------------------------------------


def rank(path: str, out: str) -> None:
    """Trains as this rank; leaves in ``out`` what it saw: memory, time of steps, bytes on links."""
    links: dict[str, str] = {}
    seen: list[tuple[float, Counter[str]]] = []
    found: dict[str, Any] = {}
    build, advance = topology.build, Trainer.advance

    def built(*args: Any) -> topology.Topology:
        place = build(*args)
        named = [(place.shard.group, "tp"), (place.shard.dp.group, "dp")]
        headers = () if place.plan.colocated else place.header.values()
        named += [(group, "LM to SAE") for group in (*place.data.values(), *headers)]
        links.update({group.group_name: link for group, link in named if group is not None})
        return place

    with bench.counted_bytes(links) as moved:

        def advanced(trainer: Trainer, *args: Any) -> bool:
            went_on = advance(trainer, *args)
            seen.append((time.perf_counter(), moved.copy()))
            if len(seen) == START + WINDOW and trainer.is_main:
                (trainer.run_dir / "stop").touch()
            found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return went_on

        topology.build, Trainer.advance = built, advanced  # type: ignore[assignment]
        code = train.run(path, (), {})
    found["maxrss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if seen:
        (begun, before), (ended, after) = seen[START - 1], seen[START + WINDOW - 1]
        found["step"] = (ended - begun) / WINDOW
        found["links"] = {link: (after[link] - before[link]) / WINDOW for link in set(links.values())}
    number = os.environ.get("RANK", "0")
    (Path(out) / f"rank{number}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(code)


def launched(run: Mapping[str, Any], ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a run saw, each started as users start it."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(dict(run)))
    _accelerate(ranks, __file__, "--rank", str(path), "--out", str(folder))
    return _found(folder, ranks)


def forked(run: Mapping[str, Any], ranks: int, folder: Path) -> list[dict[str, Any]]:
    """The same without the seconds that imports take. Their memory is this process's too."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(dict(run)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_as_rank, args=(number, ranks, port, str(path), str(folder))) for number in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"a run has failed: {run}")
    return _found(folder, ranks)


def _as_rank(number: int, ranks: int, port: str, path: str, out: str) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    torch.set_num_threads(1)  # torch then replaces the pool of threads, which the fork has broken
    rank(path, out)


def _accelerate(ranks: int, *command: str) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu.yaml")]
    options = ["--num_processes", str(ranks), "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *launcher, *options, *command], env=environment, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-4000:])


def _found(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{number}.json").read_text()) for number in range(ranks)]


# ---- the two tables --------------------------------------------------------------------------------------------------


def calibrated(folder: Path) -> Hardware:
    """This machine, as users measure it."""
    path = folder / "machine.json"
    _accelerate(RANKS, "-m", "scale_sae.plan", "--calibrate", str(path))
    return find(str(path), {})


def planned(run: Mapping[str, Any]) -> Workload:
    return Workload.of(config.from_dict(dict(run)))


def compared() -> Iterator[str]:
    """Memory, links and step time of ``RUNS``."""
    yield "| run | | predicted | measured | ratio |"
    yield "|---|---|---|---|---|"
    for name, changes in RUNS.items():
        with tempfile.TemporaryDirectory() as found:
            folder = Path(found)
            hardware = calibrated(folder)
            run = run_of(changes, folder)
            w = planned(run)
            lm = profile(w.config, w.widths, hardware.kind)
            seen = launched(run, w.plan.world_size, folder)
        said = Estimate(w, hardware, RANKS, lm)
        for role in w.roles():
            # While it trains: what a last checkpoint takes comes behind the window.
            measured = max(seen[number].get("memory", seen[number]["maxrss"]) for number in role.ranks)
            yield _row(name, f"MiB of {role}", said.held(role) / 2**20, measured / 2**20)
        sae = w.roles()[0]
        sums: Counter[str] = Counter()
        for flow in flows(w, sae, lm if sae.runs_lm else None):
            sums[flow.link] += float(flow.count * flow.bytes)  # type: ignore[assignment]
        for link in ("tp", "dp", "LM to SAE"):
            if sums[link]:
                yield _row(name, f"KiB per step on {link}", sums[link] / 2**10, seen[0]["links"][link] / 2**10)
        yield _row(name, "ms per step", said.prediction.step_seconds * 1e3, seen[0]["step"] * 1e3)


def _row(name: str, what: str, predicted: float, measured: float) -> str:
    return f"| {name} | {what} | {predicted:.2f} | {measured:.2f} | {predicted / measured:.3f} |"


def searched() -> Iterator[str]:
    """Every topology of at most ``RANKS`` ranks for ``SEARCHED``, and where the one that a search puts first lands."""
    for name, changes in SEARCHED.items():
        with tempfile.TemporaryDirectory() as found:
            hardware = calibrated(Path(found))
            w = planned(run_of({**changes, "topology": {"lm": "colocated", "sae": {"tp": 1}}}, Path(found)))
        choices = sorted(every(w, hardware), key=lambda one: one.prediction.step_seconds)
        chosen = search(w, hardware, RANKS, RANKS, partial(lm_of, w, hardware))[0].workload.config.topology
        yield f"\n{name}: {len(choices)} topologies, in the planner's order; * is what --search puts first\n"
        yield "| topology | ranks | predicted ms | measured ms | ratio |"
        yield "|---|---|---|---|---|"
        steps = {}
        for choice in choices:
            laid_out = choice.workload.config.topology
            with tempfile.TemporaryDirectory() as found:
                run = run_of({**changes, "topology": config.to_dict(choice.workload.config)["topology"]}, Path(found))
                seen = forked(run, choice.workload.plan.world_size, Path(found))
            measured, predicted = seen[0]["step"] * 1e3, choice.prediction.step_seconds * 1e3
            steps[laid_out] = measured
            yield (
                f"| {described(laid_out)}{' *' if laid_out == chosen else ''} | {choice.workload.plan.world_size} "
                f"| {predicted:.1f} | {measured:.1f} | {predicted / measured:.3f} |"
            )
        yield f"\nthe first takes {steps[chosen] / min(steps.values()):.3f} times as long as the fastest"


def every(w: Workload, hardware: Hardware) -> Iterator[Estimate]:
    """All topologies of at most ``RANKS`` ranks, those too that a search leaves out for want of a use."""
    laid_out = list(colocated(w, RANKS))
    for one, most in dedicated(w, RANKS):
        laid_out += [replace(one, lm=replace(one.lm, dp=copies)) for copies in range(1, most + 1)]
    for one in laid_out:
        placed = w.on(one)
        yield Estimate(placed, hardware, RANKS, lm_of(w, hardware, placed.config))


def lm_of(w: Workload, hardware: Hardware, run: config.RunConfig) -> LMProfile:
    return profile(run, w.widths, hardware.kind)


def described(laid_out: config.TopologyConfig) -> str:
    lm, sae = laid_out.lm, laid_out.sae
    model = "colocated" if lm.colocated else f"LM tp {lm.tp} dp {lm.dp}"
    return f"{model}, SAE groups {sae.groups} dp {sae.dp} tp {sae.tp}"


def command(search: bool = False, out: str | None = None) -> None:
    """Prints the tables, and writes them to ``out``."""
    torch.set_num_threads(1)
    lines = []
    for line in searched() if search else compared():
        print(line, flush=True)
        lines.append(line)
    if out is not None:
        Path(out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], sys.argv[4])
    fire.Fire(command)
