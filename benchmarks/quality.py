"""How good SAEs are: ours against those of SAELens, sparsify and dictionary_learning, on the same rows.

In the environment of ``benchmarks/peers.py``, which says how it is made, and with ``pip install matplotlib``:

    python benchmarks/quality.py cache                                           # the model that comes with the package
    python benchmarks/quality.py cache --model FOLDER --hookpoints model.layers.8 --tokens 2100000
    python benchmarks/quality.py train --plan benchmarks/quality_plan.yaml --jobs 2
    python benchmarks/quality.py report --plan benchmarks/quality_plan.yaml --out benchmarks/results/quality.md

``cache`` keeps what all runs of a model share, in the folder ``--work``: the activations that they train on, held-out
rows, and what the model loses on held-out text without an SAE. ``train`` works through a plan, each run a process of
one thread; what is done is left alone, so that it may be stopped (SIGTERM) and started again, also with another plan.
``report`` keeps the results themselves beside the report, as ``.jsonl``, and takes from there what the work folder
lacks. ``quality_subjects.py`` says how each subject is trained.

Every SAE is measured as its own package loads it from what it saved: *FVU* = Σ‖x − x̂‖² / Σ‖x − mean‖² over 32,768
held-out rows; *L0*, the active latents of a row; the share of latents that are *silent* (fire on none of these rows)
and *dense* (on more than a tenth of them); and the *CE score*, (ablation − with SAE) / (ablation − without), of the
losses of the model while the reconstruction, or zero, takes the place of the activations (docs/evaluation.md).
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
import torch.nn.functional as F
import yaml
from peers import where
from quality_subjects import LOAD, TRAIN, Released, Run, Trained, prepare_process, runs_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from scale_sae import topology
from scale_sae.activations.buffer import LaneBuffer
from scale_sae.activations.cache import CachedStream, open_cache
from scale_sae.activations.schedule import schedule
from scale_sae.activations.source import kept_positions
from scale_sae.activations.transport import Start
from scale_sae.checkpoint import write_json
from scale_sae.config import RunConfig, load
from scale_sae.held_out import Batch, HeldOutModel, batches
from scale_sae.jobs import resolve
from scale_sae.reconstruction import usable
from scale_sae.train import open_model

CONFIG = Path(__file__).with_name("quality.yaml")
HELD_OUT_TOKENS = 2**18  # of which contexts are taken, evenly, so that many documents are among them
HELD_OUT_ROWS = 32768
CE_TOKENS = 8192
ROWS_AT_ONCE = 1024
DENSE = 0.1
Substitute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """The work folder."""

    root: Path

    def cache(self, model: str) -> Path:
        return self.root / "caches" / model

    def held_out(self, model: str) -> Path:
        return self.root / "held_out" / model

    def run(self, run: Run) -> Path:
        return self.root / "runs" / run.id

    def result(self, run: Run) -> Path:
        return self.run(run) / "result.json"


def model_options(work: Work, model: str) -> dict[str, Any]:
    """The keys of the config that the cache of ``model`` was made with."""
    about = json.loads((work.cache(model) / "contents.json").read_text())
    return {"model.name": about["model"]["name"], "hookpoints": list(about["hookpoints"])}


def run_options(work: Work, run: Run) -> dict[str, Any]:
    """The keys of the config of a run, without those of its recipe."""
    return {
        **model_options(work, run.model),
        "hookpoints": [run.hookpoint],
        "saes": [{"architecture": run.architecture, "d_sae": run.d_sae, "k": run.k}],
        "topology": {"lm": {"cache": str(work.cache(run.model).resolve())}, "sae": {"tp": 1}},
        "train.training_tokens": run.tokens,
        "train.train_batch_size_tokens": run.batch,
        "seed": run.seed,
    }


# ---- the rows --------------------------------------------------------------------------------------------------------


class Stream:
    """The batches that `scale_sae.train` trains the one SAE of ``config`` on. What is iterated over begins anew.

    All of the config is looked at here: dictionary_learning's imports change parts of torch that this needs.
    """

    def __init__(self, config: RunConfig):
        widths, specs = resolve(config)
        ((self.hookpoint, self.d_in),) = widths.items()
        self.seed = config.seed
        self.dtype = getattr(torch, config.model.dtype)
        self.sizes = schedule(config, kept_positions(config.model, config.data))
        self.cache = open_cache(config, widths)
        plan = topology.plan(config.topology, [spec.planned for spec in specs], config.buffer.lanes)
        self.place: Any = SimpleNamespace(plan=plan, group=plan.groups[0], rank=0, device=torch.device("cpu"))

    def __iter__(self) -> Iterator[Tensor]:
        """The batches ``[batch, d_in]`` in float32, each a tensor of its own."""
        assert self.cache is not None
        sizes, widths = self.sizes, {self.hookpoint: self.d_in}
        rows = CachedStream(self.cache, self.place, sizes, Start(0, 0))
        buffer = LaneBuffer(widths, range(sizes.lanes), sizes, self.seed, self.dtype, self.place.device)
        try:
            for step in range(sizes.steps):
                while buffer.inserted < sizes.rows_before_draw(step):
                    chunk = rows.next_chunk()
                    assert chunk is not None  # with too few rows CachedStream had raised
                    buffer.insert(chunk.rows, chunk.count)
                batch = buffer.peek(step)[self.hookpoint]
                buffer.remove(step)
                yield batch.float()
        finally:
            rows.close()


def cache(work: Work, model: str, hookpoints: str | None, tokens: int | None) -> None:
    """Makes what the runs of a model share, as far as it is not there."""
    options: dict[str, Any] = {"model.name": model}
    if hookpoints is not None:
        options["hookpoints"] = hookpoints.split(",")
    if tokens is not None:
        options["train.training_tokens"] = tokens
    name = Path(model).name
    flags = [f"--{key}={json.dumps(value)}" for key, value in options.items()]
    command = ["-m", "scale_sae.cache_activations", "--config", str(CONFIG), "--out", str(work.cache(name)), *flags]
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    subprocess.run([sys.executable, *launcher, *command], check=True)
    if not (work.held_out(name) / "losses.json").exists():
        hold_out(work.held_out(name), load(CONFIG, options))


# ---- held-out text ---------------------------------------------------------------------------------------------------


def evenly(config: RunConfig, tokens: int) -> list[Batch]:
    """``tokens`` tokens of the held-out text, a context each, evenly spaced."""
    found = batches(config, HELD_OUT_TOKENS)
    contexts = [
        Batch(*pair) for batch in found for pair in zip(batch.tokens.split(1), batch.keep.split(1), strict=True)
    ]
    wanted = tokens // config.data.context_size
    if wanted > len(contexts):
        raise SystemExit(f"the held-out text has less than {tokens} tokens: give more of it")
    return [contexts[i * len(contexts) // wanted] for i in range(wanted)]


class HeldOut:
    """A model on held-out text. ``widths``: hookpoint → width."""

    def __init__(self, config: RunConfig, widths: Mapping[str, int]):
        self.config = config
        self.widths = widths
        self.source = open_model(config, widths, (torch.device("cpu"),), None, True)
        self.model = HeldOutModel(self.source)

    def rows(self) -> dict[str, Tensor]:
        """hookpoint → held-out rows ``[HELD_OUT_ROWS, width]``, of those that training would keep."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.widths}
        for batch in evenly(self.config, HELD_OUT_ROWS * 9 // 8):
            for name, rows in self.model.clean(batch, list(self.widths)).rows.items():
                parts[name].append(rows[usable(rows)])
        found = {name: torch.cat(some)[:HELD_OUT_ROWS].clone() for name, some in parts.items()}
        if any(len(rows) < HELD_OUT_ROWS for rows in found.values()):
            raise SystemExit(f"the held-out text gives less than {HELD_OUT_ROWS} rows: too many are left out")
        return found

    @torch.no_grad()
    def loss(self, hookpoint: str, change: Substitute) -> float:
        """The mean cross-entropy in nats on CE_TOKENS held-out tokens, with what ``change`` makes of the kept rows."""
        total, predictions = 0.0, 0
        for batch in evenly(self.config, CE_TOKENS):
            with self.model.changed(hookpoint, change, batch.keep):
                logits = self.source.logits(batch.tokens)[:, :-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="sum"))
            predictions += batch.predictions
        return total / predictions


def hold_out(folder: Path, config: RunConfig) -> None:
    """Keeps held-out rows, and the losses of the model as it is and with zeros, by hookpoint."""
    held_out = HeldOut(config, resolve(config)[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(held_out.rows(), folder / "rows.safetensors")
    losses = {
        name: {"clean": held_out.loss(name, lambda rows: rows), "ablated": held_out.loss(name, torch.zeros_like)}
        for name in config.hookpoints
    }
    write_json(folder / "losses.json", losses)


@torch.no_grad()
def figures(sae: Released, rows: Tensor) -> dict[str, float]:
    """FVU, L0 and the shares of silent and dense latents, on ``rows [n, d_in]``."""
    wide = rows.double()
    variance = (wide - wide.mean(0)).square().sum()
    error = torch.zeros((), dtype=torch.float64)
    fired: Any = 0
    for x in rows.float().split(ROWS_AT_ONCE):
        acts = sae.encode(x)
        error += (x.double() - sae.decode(acts).double()).square().sum()
        fired += (acts != 0).sum(0)
    share = fired.double() / len(rows)
    return {
        "fvu": float(error / variance),
        "l0": float(share.sum()),
        "silent": float((share == 0).double().mean()),
        "dense": float((share > DENSE).double().mean()),
    }


def ce_figures(work: Work, run: Run, sae: Released, d_in: int) -> dict[str, float]:
    """What the model loses with the SAE in place, in nats per token, and the score of that."""

    def change(rows: Tensor) -> Tensor:
        mask, out = usable(rows), rows.clone()
        out[mask] = sae.decode(sae.encode(rows[mask].float())).to(rows.dtype)
        return out

    known = json.loads((work.held_out(run.model) / "losses.json").read_text())[run.hookpoint]
    config = load(CONFIG, run_options(work, run))
    loss = HeldOut(config, {run.hookpoint: d_in}).loss(run.hookpoint, change)
    return {"ce_loss": loss, "ce_score": (known["ablated"] - loss) / (known["ablated"] - known["clean"])}


# ---- runs ------------------------------------------------------------------------------------------------------------


def train_one(work: Work, run: Run) -> None:
    """Trains and measures, in this process or one that it starts."""
    folder, options = work.run(run), run_options(work, run)
    trained: Trained
    if run.subject == "ours":
        trained = TRAIN["ours"](run, CONFIG, options, folder)
    else:
        trained = TRAIN[run.subject](run, Stream(load(CONFIG, options)), folder)
    sae = LOAD[run.subject](run, folder)
    rows = load_file(work.held_out(run.model) / "rows.safetensors")[run.hookpoint]
    measured = {**figures(sae, rows), **ce_figures(work, run, sae, rows.shape[1])}
    about = {"run": asdict(run), "stream": stream_settings(), **asdict(trained)}
    write_json(work.result(run), {**about, "figures": measured, "where": where()})


def stream_settings() -> dict[str, Any]:
    """What else decides the rows of a batch: sections of the config."""
    tree = yaml.safe_load(CONFIG.read_text())
    return {name: tree[name] for name in ("data", "buffer")}


def read_plan(path: Path) -> list[Run]:
    return runs_of(yaml.safe_load(path.read_text())["runs"])


class Queue:
    """Works through a plan, some runs at a time. The plan is read before each: it may change meanwhile.

    Several queues may share a work folder: each run is one queue's at a time.
    """

    def __init__(self, work: Work, plan: Path, jobs: int):
        self.work = work
        self.plan = plan
        self.jobs = jobs
        self.begun: set[str] = set()
        self.going: dict[subprocess.Popen[bytes], tuple[Run, IO[str]]] = {}
        self.failed: list[Run] = []

    def work_through(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped as asked; the same command goes on"))
        try:
            while True:
                found = self._next() if len(self.going) < self.jobs else None
                if found is not None:
                    self.going[self._start(found[0])] = found
                elif self.going:
                    self._look()
                else:
                    break
        finally:
            for process in self.going:
                process.terminate()
            for process in self.going:
                process.wait()
        if self.failed:
            sys.exit(f"{len(self.failed)} runs failed: {', '.join(run.id for run in self.failed)}")

    def _next(self) -> tuple[Run, IO[str]] | None:
        """The first run of the plan that is not made, and the lock on it."""
        for run in read_plan(self.plan):
            if run.id not in self.begun and (lock := self._take(run)) is not None:
                self.begun.add(run.id)
                return run, lock
        return None

    def _take(self, run: Run) -> IO[str] | None:
        """A lock on a run that is to be made; None where it is made already, or another queue has it."""
        folder = self.work.run(run).parent
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{run.id}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        result = self.work.result(run)
        if not result.exists():
            return lock
        known = json.loads(result.read_text())
        if known["run"] != asdict(run):
            sys.exit(f"{run.id}: there is a result with other options; give this one another label")
        if known["stream"] != stream_settings():
            sys.exit(f"{run.id}: there is a result with other data or another buffer; choose another --work")
        return None

    def _start(self, run: Run) -> subprocess.Popen[bytes]:
        print(f"{time.strftime('%H:%M:%S')} {run.id}", flush=True)
        folder = self.work.run(run)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--work", str(self.work.root), "one", "--run", json.dumps(asdict(run))]
        with (folder / "log").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def _look(self) -> None:
        """Waits a moment, and puts away what has ended."""
        time.sleep(0.5)
        for process in [process for process in self.going if process.poll() is not None]:
            run, lock = self.going.pop(process)
            lock.close()
            result = self.work.result(run)
            if result.exists():
                found = json.loads(result.read_text())
                print(f"  FVU {found['figures']['fvu']:.4f}, {found['seconds']:.0f} s: {run.id}", flush=True)
            else:
                self.failed.append(run)
                print(f"  failed, {self.work.run(run) / 'log'} says why", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("cache", help="what the runs of a model share")
    made.add_argument("--model", default="embedded", help="a folder, or a name of the hub")
    made.add_argument("--hookpoints", help="with commas between them")
    made.add_argument("--tokens", type=int, help="rows to keep")
    trained = commands.add_parser("train", help="works through a plan")
    trained.add_argument("--plan", type=Path, required=True)
    trained.add_argument("--jobs", type=int, default=1, help="processes at a time")
    one = commands.add_parser("one", help="one run, in this process")
    one.add_argument("--run", type=json.loads, required=True, help="its fields, as JSON")
    reported = commands.add_parser("report", help="tables and plots of what there is")
    reported.add_argument("--plan", type=Path, required=True, help="of the runs to report")
    reported.add_argument("--out", type=Path, required=True, help="a Markdown file; results and plots go beside it")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    work = Work(chosen.work)
    if chosen.command == "cache":
        cache(work, chosen.model, chosen.hookpoints, chosen.tokens)
    elif chosen.command == "train":
        Queue(work, chosen.plan, chosen.jobs).work_through()
    elif chosen.command == "one":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a process that it has started ends with it
        prepare_process()
        train_one(work, Run(**chosen.run))
    else:
        from quality_report import report

        report(work.root / "runs", read_plan(chosen.plan), stream_settings(), chosen.out)


if __name__ == "__main__":
    main()
