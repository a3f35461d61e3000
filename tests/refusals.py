"""The command ``train`` on forked ranks, and what ends it: exit codes and what the ranks printed."""

import faulthandler
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

import runs
from harness import renew_thread_pool
from scale_sae import train

# A run that ends takes 1 to 3 s; the rest is for a busy machine. A rank that waits for a lost one waits an hour.
TIMEOUT = 60
PROGRESS = ("training:", "Loading weights:")
THREE_RANKS = {"lm": {"tp": 1}, "sae": {"tp": 2}}


@dataclass
class Ended:
    """What the ranks of a run left: exit codes and all that they printed, in rank order."""

    codes: list[int | None]
    printed: list[str]

    @property
    def lines(self) -> list[str]:
        """What they printed, but for blank lines and progress bars."""
        lines = [line for text in self.printed for line in text.replace("\r", "\n").splitlines()]
        return [line for line in lines if line.strip() and not line.startswith(PROGRESS)]


def hold_store(port: Any) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    port.recv()  # until the parent ends this process


def rank_main(rank: int, world: int, port: int, printed: Path, path: Path, overrides: dict[str, Any]) -> None:
    out = printed.open("w", buffering=1)
    sys.stdout = sys.stderr = out
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    faulthandler.dump_traceback_later(TIMEOUT - 2, file=out)
    renew_thread_pool()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    train.main(str(path), **overrides)


def end_of(path: Path, world: int, overrides: dict[str, Any] | None = None) -> Ended:
    """Runs the command ``train`` on ``world`` forked ranks, which end as the command does, by ``os._exit``."""
    folder = path.parent / f"printed_{time.monotonic_ns()}"
    folder.mkdir()
    printed = [folder / str(rank) for rank in range(world)]
    context = multiprocessing.get_context("fork")
    # As with torchrun, a process of its own holds the store: it outlives the ranks, and this one stays without threads.
    ours, theirs = context.Pipe()
    host = context.Process(target=hold_store, args=(theirs,))
    host.start()
    port = ours.recv()
    ranks: list[BaseProcess] = [
        context.Process(target=rank_main, args=(rank, world, port, printed[rank], path, overrides or {}))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in [*ranks, host]:
        process.kill()
        process.join()
    texts = [file.read_text() for file in printed]
    assert None not in codes, f"exit codes after {TIMEOUT} s: {codes}\n" + "\n".join(texts)
    return Ended(codes, texts)


def check_refused(ended: Ended, words: list[str], said: list[str] | None = None) -> None:
    """Every rank failed and one line was printed, with ``words`` in it; before it came those in ``said``."""
    assert ended.codes == [1] * len(ended.codes), ended.printed
    *notes, line = sorted(ended.lines, key=lambda line: line.startswith("error"))
    assert notes == (said or [])
    assert line.startswith("error: ") and [word for word in words if word not in line] == [], line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def short_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of 8 steps with a checkpoint after 4."""
    changes = {
        "model": {"name": "embedded"},
        "saes": [{"d_sae": 64, "k": 4}],
        "train": {"training_tokens": 8 * 128, "train_batch_size_tokens": 128, "lr": 1e-3},
        "checkpoint": {"every_steps": 4},
        "topology": THREE_RANKS,
        **changes,
    }
    return runs.tiny_config(folder, **changes)
