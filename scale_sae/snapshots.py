"""The checkpoints of a run: what the SAE ranks copy of their state, and the thread that writes it while they train on.

`checkpoint` knows the files; this module knows what is in them. A checkpoint has two halves:

    training thread     waits for the checkpoint before, if it is still being written; fits what a release needs (device
                        collectives); copies everything to CPU memory; goes on training
    writer thread       rank 0 makes the folder; each rank writes and hashes its files; rank 0 seals and prunes

The writer threads of the ranks talk over a gloo group of their own and touch no device, so nothing that they do comes
between two collectives of the training threads. What goes wrong on one of them all of them learn, before any says so.

With ``checkpoint.buffer: refill`` a checkpoint leaves the shuffle buffer out, and a resume fills it anew:

    - The text goes on where it stood: with the first chunk that was not yet in the buffer. So no row is trained twice.
      The rows that were in the buffer are never trained: at most ``buffer.tokens`` and one chunk.
    - The rows that follow are numbered from ``step * batch`` on, as if all before had been drawn: every lane is empty
      there. From then on the arithmetic of the stream is the usual one. The run keeps its number of steps and reads as
      many rows more from the text as were left out.
    - Lanes and draws are functions of seed, row number and step, so the rows are the same on every topology. They are
      not those of the run that was never interrupted.

What a checkpoint holds decides, not the config of the launch that reads it: one with its buffer resumes bitwise.
"""

import shutil
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae import checkpoint
from scale_sae.activations.buffer import LaneBuffer
from scale_sae.config import RunConfig, to_dict
from scale_sae.errors import UserError
from scale_sae.job_trainer import JobTrainer
from scale_sae.jobs import JobSpec
from scale_sae.tensorfile import blocks
from scale_sae.topology import Topology

# Seconds that an unexpected error waits for a checkpoint that is being written: the other ranks may be gone.
GRACE = 30


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps done, chunks that went into the buffer, where the text goes on.

    ``rows_left_behind`` counts the rows that were lost with the buffers of checkpoints without one.
    """

    step: int
    chunks_inserted: int
    cursor: dict[str, Any]
    rows_left_behind: int = 0


@dataclass(frozen=True)
class File:
    """A file that a rank is to write: rows from ``start`` on, or with None what is replicated. CPU tensors."""

    folder: Path  # below the checkpoint's
    tensors: Mapping[str, Tensor]
    start: int | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save(self, root: Path) -> dict[str, checkpoint.Digest]:
        """Writes it below ``root``; the result is that of `checkpoint.save_rows`."""
        if self.start is None:
            return checkpoint.save_replicated(root, root / self.folder, self.tensors)
        return checkpoint.save_rows(root, root / self.folder, self.tensors, self.start)


class HostMemory:
    """CPU memory for copies of tensors, kept from one checkpoint to the next.

    Beside a GPU it is pinned: the copy then runs at the speed of the link. Pinning takes longer than copying, so it is
    done once.
    """

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def copy(self, key: str, tensor: Tensor, room: int = 0) -> Tensor:
        """A contiguous CPU copy of ``tensor`` in the memory that ``key`` names; on a GPU it is done after `wait`.

        Args:
            room: bytes to hold at least, for a tensor that may be larger the next time.
        """
        held = self.held.get(key)
        if held is None or len(held) < tensor.nbytes:
            size = max(tensor.nbytes, room)
            held = self.held[key] = torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda)
        source = tensor.detach()
        target = held[: source.nbytes].view(source.dtype).view(source.shape)
        if source.is_contiguous():
            target.copy_(source, non_blocking=True)
            return target
        # In blocks: a tensor that is no one piece of memory is first made one on its own device.
        for first, last in blocks(0, len(source), source[0].nbytes):
            target[first:last].copy_(source[first:last], non_blocking=True)
        return target

    def wait(self) -> None:
        """Returns when every copy is done. Other streams go on: receives of the next rows may wait there for long."""
        if any(held.is_pinned() for held in self.held.values()):
            torch.cuda.current_stream().synchronize()


@dataclass(frozen=True)
class Failure:
    """Why a checkpoint was not written: the disk, something else that a user can put right, or a defect."""

    kind: Literal["disk", "user", "defect"]
    text: str

    @classmethod
    def of(cls, error: Exception, where: Path) -> "Failure":
        """What ``error``, of work in the folder ``where``, means for the checkpoint."""
        if isinstance(error, OSError) and error.errno is not None:
            return cls("disk", f"{error.filename or where}: {error.strerror}")  # a write does not know its file's name
        if isinstance(error, UserError):
            return cls("user", str(error))
        return cls("defect", "".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        """What the training threads raise."""
        return RuntimeError(self.text) if self.kind == "defect" else UserError(self.text)


def attempt(work: Callable[[], Any], where: Path) -> Failure | None:
    """Runs ``work`` in the folder ``where``; what went wrong, if anything did."""
    try:
        work()
    except Exception as error:
        return Failure.of(error, where)
    return None


class Writer:
    """Writes one checkpoint at a time in the background, together with the writers of the other SAE ranks.

    Args:
        group: a gloo group of all SAE ranks that nothing else uses; rank 0 of it leads.
        keep, keep_every: of `checkpoint.prune`.
    """

    def __init__(self, run_dir: Path, group: dist.ProcessGroup, keep: int, keep_every: int | None):
        self.run_dir = run_dir
        self.group = group
        self.leads = dist.get_rank(group) == 0
        self.keep = keep
        self.keep_every = keep_every
        self.thread: threading.Thread | None = None
        self.failure: Failure | None = None

    def start(self, step: int, files: Sequence[File], meta: Mapping[str, Any]) -> None:
        """Begins to write; the tensors of ``files`` must stay as they are until `wait` returns."""
        assert self.thread is None, "one checkpoint at a time"
        self.thread = threading.Thread(target=self._run, args=(step, files, meta), name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Returns when nothing is being written, or after ``timeout`` seconds. Raises what went wrong."""
        if self.thread is not None:
            self.thread.join(timeout)
            self.thread = self.thread if self.thread.is_alive() else None
        if self.failure is not None:
            raise self.failure.error()

    def _run(self, step: int, files: Sequence[File], meta: Mapping[str, Any]) -> None:
        try:
            self.failure = self._write(step, files, meta)
        except Exception as error:  # of a collective: another rank is gone
            self.failure = Failure.of(error, self.run_dir)

    def _write(self, step: int, files: Sequence[File], meta: Mapping[str, Any]) -> Failure | None:
        """The checkpoint of ``step``; the result is the same on every rank."""
        root = checkpoint.aside(self.run_dir, step)
        begun = attempt(lambda: checkpoint.begin(self.run_dir, step), root) if self.leads else None
        failure = self._from_leader(begun)
        digests: dict[str, checkpoint.Digest] = {}

        def write() -> None:
            for file in files:
                digests.update(file.save(root))

        if failure is None:
            failure = attempt(write, root)
        mine = (digests, sum(file.nbytes for file in files), failure)
        gathered: list[Any] | None = [None] * dist.get_world_size(self.group) if self.leads else None
        dist.gather_object(mine, gathered, group=self.group, group_dst=0)
        if gathered is not None:
            failure = next((failed for _, _, failed in gathered if failed is not None), None)
            if failure is None:
                merged = {path: digest for part, _, _ in gathered for path, digest in part.items()}
                failure = attempt(lambda: self._complete(root, merged, meta), root)
            if failure is not None:
                failure = self._give_up(step, failure, sum(size for _, size, _ in gathered))
        return self._from_leader(failure)

    def _complete(self, root: Path, digests: Mapping[str, checkpoint.Digest], meta: Mapping[str, Any]) -> None:
        checkpoint.seal(root, digests, meta)
        checkpoint.prune(self.run_dir, self.keep, self.keep_every)

    def _give_up(self, step: int, failure: Failure, size: int) -> Failure:
        """Removes what was written and says what is left. No rank writes any more."""
        shutil.rmtree(checkpoint.aside(self.run_dir, step), ignore_errors=True)
        if failure.kind != "disk":
            return failure
        folder = self.run_dir / "checkpoints"
        free = shutil.disk_usage(folder if folder.exists() else self.run_dir).free
        kept = checkpoint.complete(self.run_dir)
        then = f"; {kept[0].name} is kept, and the same command goes on from it" if kept else ""
        text = f"output_dir: the checkpoint of step {step} cannot be written ({failure.text}): it needs {size} bytes, "
        return Failure("disk", f"{text}{folder} has {free} free; make room{then}")

    def _from_leader(self, failure: Failure | None) -> Failure | None:
        said = [failure]
        dist.broadcast_object_list(said, group=self.group, group_src=0)
        return said[0]


class Snapshots:
    """The checkpoints of one SAE rank: of its jobs, its lanes of the buffer and the rows that were left out.

    As a context it holds the training loop: what is being written when the loop ends, for whatever reason, is finished.
    """

    def __init__(
        self,
        config: RunConfig,
        specs: Sequence[JobSpec],
        topology: Topology,
        jobs: Sequence[JobTrainer],
        buffer: LaneBuffer,
        left_out: Mapping[str, Tensor],
    ):
        assert topology.group is not None and topology.checkpoint_control is not None
        self.config = config
        self.specs = specs
        self.topology = topology
        self.group = topology.group
        self.jobs = jobs
        self.buffer = buffer
        self.left_out = left_out
        self.memory = HostMemory()
        settings = config.checkpoint
        self.writer = Writer(Path(config.output_dir), topology.checkpoint_control, settings.keep, settings.keep_every)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # A UserError is one of all ranks: the checkpoint will be complete, or each will know why not.
        timeout = None if error is None or isinstance(error, UserError) else GRACE
        try:
            self.writer.wait(timeout)
        except Exception as failure:
            if error is None:
                raise
            if str(failure) == str(error):
                return
            # The first error is why the run ends; that the checkpoint is lost too must not go unsaid.
            if isinstance(error, UserError):
                raise UserError(f"{error}. Besides, {failure}") from error
            error.add_note(f"Besides, {failure}")

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `wait` and `save` raise why."""
        return self.writer.failure is not None

    def save(self, position: Position) -> None:
        """Begins a checkpoint, all SAE ranks together. It will appear complete or not at all.

        Returns when the state is copied; waits first for the checkpoint before.

        Raises:
            UserError: the checkpoint before could not be written. On all ranks.
        """
        self.wait()
        for job in self.jobs:
            job.check_replicas()
        files = self._copies()
        self.memory.wait()
        self.writer.start(position.step, files, self._meta(position))

    def wait(self) -> None:
        """Returns when the last checkpoint is complete; ``UserError`` on all ranks if it could not be written."""
        self.writer.wait()

    def load(self, folder: Path) -> Position:
        """Takes up the run from a complete checkpoint, whatever topology wrote it."""
        meta = checkpoint.read_meta(folder)
        for job in self.jobs:
            job.load(checkpoint.sae_folder(folder, job.spec.sae_id))
        block = self.buffer.lanes
        stream = meta["stream"]

        def read(name: str) -> Tensor:
            return checkpoint.read_rows(checkpoint.stream_folder(folder, name), "lanes", block.start, block.stop)

        if left_behind(stream) is None:
            self.buffer.restore(read, stream["rows_inserted"], meta["step"])
        else:
            self.buffer.start_empty(stream["rows_inserted"], meta["step"])
        for name, counts in self.left_out.items():
            checkpoint.load_replicated(checkpoint.stream_folder(folder, name), {"left_out": counts})
        lost = stream.get("rows_left_behind", 0) + (left_behind(stream) or 0)
        return Position(meta["step"], stream["chunks_inserted"], stream["cursor"], lost)

    def _copies(self) -> list[File]:
        """The files of this rank, with copies of the tensors."""
        first = self.topology.rank == self.group.ranks[0]
        files: list[File] = []

        def add(folder: Path, tensors: Mapping[str, Tensor], start: int | None, room: int = 0) -> None:
            copies = {name: self.memory.copy(f"{folder}/{name}", tensor, room) for name, tensor in tensors.items()}
            files.append(File(folder, copies, start))

        for job in self.jobs:
            folder = checkpoint.sae_folder(Path(), job.spec.sae_id)
            add(folder, job.row_tensors(), job.start)
            if first:
                add(folder, job.replicated_tensors(), None)
        for name, lanes in self.buffer.state().items():
            folder = checkpoint.stream_folder(Path(), name)
            if not self._owns(name):
                continue
            if self.config.checkpoint.buffer == "save":
                add(folder, {"lanes": lanes}, self.buffer.lanes.start, self.buffer.rows[name].nbytes)
            if first:
                add(folder, {"left_out": self.left_out[name]}, None)
        return files

    def _owns(self, hookpoint: str) -> bool:
        """Whether this group is the one that saves the lanes of ``hookpoint``: the first that has it."""
        return next(g.index for g in self.topology.plan.groups if hookpoint in g.hookpoints) == self.group.index

    def _meta(self, position: Position) -> dict[str, Any]:
        trained = position.step * self.config.train.train_batch_size_tokens
        stream = {
            "chunks_inserted": position.chunks_inserted,
            "rows_inserted": self.buffer.inserted,
            "cursor": position.cursor,
            "rows_left_behind": position.rows_left_behind,
        }
        if self.config.checkpoint.buffer == "refill":
            # The numbers from which a resume goes on: those of an empty buffer.
            stream |= {"rows_inserted": trained, "rows_not_saved": self.buffer.inserted - trained}
        return {
            "step": position.step,
            "tokens": trained,
            "config": to_dict(self.config),
            "jobs": [spec.to_dict() for spec in self.specs],
            "stream": stream,
        }


def left_behind(stream: Mapping[str, Any]) -> int | None:
    """How many rows of the buffer a checkpoint left out, from its ``meta["stream"]``; None: it holds the buffer."""
    return stream.get("rows_not_saved")


def how_it_goes_on(folder: Path) -> str:
    """What a resume from a checkpoint says: from where, and whether the rows will be those of the run before."""
    lost = left_behind(checkpoint.read_meta(folder)["stream"])
    if lost is None:
        return f"going on from {folder}"
    return (
        f"going on from {folder}, which holds no shuffle buffer (checkpoint.buffer: refill): it is refilled from the "
        f"text that follows, the {lost} rows that it held are not trained, and from here on the rows differ from those "
        "of an uninterrupted run"
    )
