"""A timeline of some training steps on every rank (``--profile_steps``), and the memory that tensors take on a CPU.

Timelines are Chrome traces, ``RUN_DIR/profile/rank<r>.json.gz``; https://ui.perfetto.dev opens them as they are. Named
ranges say what a rank is at: ``wait for chunk``, ``draw`` (of the next step's batch, which the shards send each other
during this one), ``wait for the batch``, each SAE by its ``sae_id`` with ``forward``, ``backward`` and ``optimizer``
inside, ``checkpoint``; where a language model runs, ``LM forward`` and ``send``.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store
from torch.profiler import ProfilerActivity, profile, record_function

from scale_sae.errors import UserError

FOLDER = "profile"
BEGUN, ENDED = "profile_begun", "profile_ended"


def parse_steps(text: object, total: int) -> range | None:
    """``A:B`` → the steps A..B-1, from 0, of a run of ``total``; None for None. ``UserError`` for what is none."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", str(text))
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--profile_steps: {text!r} is no range of steps; for the 3 steps 10, 11 and 12 write 10:13")
    if int(match[1]) >= total:
        raise UserError(
            f"--profile_steps: {text} begins behind the run's last step, {total - 1}; choose smaller numbers"
        )
    return range(int(match[1]), int(match[2]))


class Recorder:
    """One rank's timeline: of ``steps`` on SAE ranks, on others of the time that the main process's takes.

    A run that goes on behind ``steps`` records nothing.
    """

    def __init__(self, steps: range, run_dir: Path, rank: int, store: Store):
        self.steps = steps
        self.path = run_dir / FOLDER / f"rank{rank}.json.gz"
        self.rank = rank
        self.store = store
        self.running: profile | None = None
        self.done = False

    def reach(self, step: int) -> None:
        """Called on SAE ranks before each step: begins before the first of ``steps``, ends after the last."""
        if step in self.steps:
            self._begin()
            if self.rank == 0:
                self.store.set(BEGUN, "1")
        elif step >= self.steps.stop:
            self.end()

    def follow(self) -> None:
        """Called on LM ranks again and again: they know no steps, and do what the main process says."""
        if self.running is None and not self.done and self.store.check([BEGUN]):
            self._begin()
        if self.running is not None and self.store.check([ENDED]):
            self.end()

    def end(self) -> None:
        """Writes the file, if anything is recorded; also at the end of a run that has fewer steps."""
        if self.rank == 0 and not self.done:
            self.store.set(ENDED, "1")
        self.done = True
        if self.running is None:
            return
        self.running.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name("." + self.path.name)
        self.running.export_chrome_trace(str(aside))
        aside.rename(self.path)
        self.running = None

    def _begin(self) -> None:
        if self.running is not None or self.done:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        # All threads: the collectives of one SAE pass while another computes in a second one.
        from torch._C._profiler import _ExperimentalConfig  # private, so not for every run to import

        self.running = profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))
        self.running.start()


def name_range(owner: object, method: str, name: str) -> None:
    """Calls of this object's ``method`` are ranges called ``name``. Where nothing is recorded, nothing is named."""
    call: Callable[..., Any] = getattr(owner, method)

    def named(*args: Any, **keys: Any) -> Any:
        with record_function(name):
            return call(*args, **keys)

    setattr(owner, method, named)


def name_steps(jobs: Iterable[Any]) -> None:
    """Names the step of each SAE (``JobTrainer``), and its parts."""
    for job in jobs:
        name_range(job, "step", job.spec.sae_id)
        name_range(job.engine, "training_forward_pass", "forward")
        name_range(job.engine, "backward", "backward")
        name_range(job.optimizer, "_update", "optimizer")


# ---- memory ----------------------------------------------------------------------------------------------------------


MARK = "peak memory from here"


class PeakMemory:
    """The most bytes that tensors have at once while ``peak_memory``'s block runs.

    Attributes:
        bytes: of tensors that were made in the block, whenever; known once it has ended.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0

    def restart(self) -> None:
        """Forgets the peak so far, not what is held."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with record_function(MARK):
                pass


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measures the memory of tensors in a block.

    On a GPU it is what torch's allocator counts. On a CPU it is the sum over the allocations and frees that torch's
    profiler reports, of this Python thread and the backward passes it starts; the process's resident memory would also
    hold what the allocator keeps and what libraries map.
    """
    found = PeakMemory(device)
    if device.type == "cuda":
        found.restart()
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield found
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    held = 0
    changes = _allocations(recorded.profiler.kineto_results.experimental_event_tree())
    for _, change in sorted(changes, key=lambda one: one[0]):
        if change is None:
            found.bytes = held
        else:
            held += change
            found.bytes = max(found.bytes, held)


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int | None]]:
    """(time, bytes; negative where they are freed, None where the peak is to be forgotten) of all events."""
    from torch._C._profiler import _EventType

    left = list(events)
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        elif event.name == MARK:
            yield event.start_time_ns, None
