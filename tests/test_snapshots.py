"""Checkpoints written while the training goes on: real ranks, whose writer threads are held up or made to fail.

`scale_sae.snapshots.File.save` is what the tests reach into: they delay it, or let it raise what a disk would.
"""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runs
from harness import free_port, renew_thread_pool, run_ranks
from scale_sae import checkpoint, config, tensorfile, train
from scale_sae.activations.buffer import LaneBuffer
from scale_sae.activations.source import ActivationSource, inspect_model
from scale_sae.activations.tokens import open_chunks
from scale_sae.errors import UserError
from scale_sae.snapshots import File, HostMemory, Snapshots

PATIENCE = 60  # seconds after which a thread that waits for another gives up: only in a test that fails
TP2 = runs.TOPOLOGIES["colocated tp=2"][0]


def before_each_file(act: Callable[[int], None]) -> None:
    """Lets the writer thread of this rank call ``act(step)`` before it writes a file."""
    original = File.save

    def save(self: File, root: Path) -> dict[str, checkpoint.Digest]:
        act(int(root.name.removeprefix(".writing_")))
        return original(self, root)

    File.save = save  # type: ignore[method-assign]


def before_each_draw(act: Callable[[int], None]) -> None:
    """Lets the training thread of this rank call ``act(step)`` before it draws the batch of ``step``."""
    original = LaneBuffer.remove

    def remove(self: LaneBuffer, step: int) -> None:
        act(step)
        original(self, step)

    LaneBuffer.remove = remove  # type: ignore[method-assign]


def run(path: Path, world: int, prepare: Callable[[int], None], **overrides: Any) -> list[tuple[int, str]]:
    """Trains on forked ranks that end as the command does, after ``prepare(rank)``; (exit code, output) of each."""
    port = free_port()

    def rank_main(rank: int, output: Path) -> None:
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        renew_thread_pool()
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
        prepare(rank)
        code = train.run(str(path), (), overrides)
        sys.stderr.flush()
        os._exit(code)

    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name) / str(rank) for rank in range(world)]
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=rank_main, args=(rank, outputs[rank])) for rank in range(world)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: torch's idle pools
                for process in ranks:
                    process.start()
            for process in ranks:
                process.join(180)
            found = [(process.exitcode, path.read_text()) for process, path in zip(ranks, outputs, strict=True)]
        finally:
            for process in ranks:
                process.kill()
                process.join()
    ended = [(code, said) for code, said in found if code is not None]
    assert len(ended) == world, f"a rank did not end: {found}"
    return ended


def nothing(rank: int) -> None:
    pass


def steps_of(run_dir: Path) -> list[str]:
    """Everything that lies beside the checkpoints, and they."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """The tensor files of a checkpoint: path → bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tp=2 run of 60 steps with all its checkpoints, in which training waited for each of them."""
    folder = tmp_path_factory.mktemp("waited")
    path = runs.write_config(folder, runs.tiny_config(folder, topology=TP2, checkpoint={"every_steps": 20, "keep": 9}))

    def prepare(rank: int) -> None:
        save = Snapshots.save

        def save_and_wait(self: Snapshots, position: Any) -> None:
            save(self, position)
            self.wait()

        Snapshots.save = save_and_wait  # type: ignore[method-assign]

    assert [code for code, _ in run(path, 2, prepare)] == [0, 0]
    yield folder / "run"


# ---- in the background -----------------------------------------------------------------------------------------------


def test_training_goes_on_meanwhile_and_the_next_checkpoint_waits(tmp_path: Path, waited: Path) -> None:
    """The writers of step 20 do nothing until training has come to the next checkpoint, which then must wait."""

    def prepare(rank: int) -> None:
        drawn = {step: threading.Event() for step in range(60)}
        before_each_draw(lambda step: drawn[step].set())

        def hold(step: int) -> None:
            if step == 20:
                assert drawn[39].wait(PATIENCE), "training waits for the checkpoint"
                # A second is a hundred steps here.
                assert not drawn[40].wait(1), "training has overtaken the checkpoint before"

        before_each_file(hold)

    keys = {"topology": TP2, "checkpoint": {"every_steps": 20, "keep": 9}}
    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path, **keys))
    results = run(path, 2, prepare)
    assert [code for code, _ in results] == [0, 0], results[0][1]
    names = [f"step_{step:08d}" for step in (20, 40, 60)]
    assert steps_of(tmp_path / "run") == steps_of(waited) == names
    for name in names:
        # Twenty updates have passed since the state was copied: it is that of its step all the same.
        written = contents(tmp_path / "run/checkpoints" / name)
        assert written == contents(waited / "checkpoints" / name) and len(written) > 8
        assert checkpoint.verify(tmp_path / "run/checkpoints" / name) == []


def test_an_error_elsewhere_lets_the_checkpoint_be_finished(tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        raised = threading.Event()

        def break_down(step: int) -> None:
            if step == 25:
                raised.set()
                raise UserError("train.lr: made up")

        def hold(step: int) -> None:
            assert raised.wait(PATIENCE)

        before_each_draw(break_down)
        before_each_file(hold)

    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path, topology=TP2))
    results = run(path, 2, prepare)
    assert [code for code, _ in results] == [1, 1]
    assert "".join(said for _, said in results).count("error: train.lr: made up\n") == 1
    assert steps_of(tmp_path / "run") == ["step_00000020"]
    assert checkpoint.verify(tmp_path / "run/checkpoints/step_00000020") == []


def failing(rank_that_fails: int, step_that_fails: int, error: Exception) -> Callable[[int], None]:
    def prepare(rank: int) -> None:
        def fail(step: int) -> None:
            if rank == rank_that_fails and step == step_that_fails:
                raise error

        before_each_file(fail)

    return prepare


@pytest.mark.parametrize(
    ("step", "failing_rank"),
    [(40, 0), (60, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((40, 1), (60, 0)))],
)
def test_a_writer_that_fails_ends_the_run_with_one_line(
    tmp_path: Path, waited: Path, failing_rank: int, step: int
) -> None:
    """In the middle of the run and at its end; the same command then goes on, and nothing is lost but time."""
    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path, topology=TP2, checkpoint={"every_steps": 20}))
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file")
    results = run(path, 2, failing(failing_rank, step, error))
    assert [code for code, _ in results] == [1, 1]
    lines = [line for _, said in results for line in said.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    last = f"step_{step - 20:08d}"
    for part in (
        f"output_dir: the checkpoint of step {step} cannot be written (/a/file: No space left",
        f"; {last} is",
    ):
        assert part in lines[0]
    assert steps_of(tmp_path / "run")[-1] == last and ".writing" not in "".join(steps_of(tmp_path / "run"))
    # It does not train on to the next checkpoint: one step may be under way and one more be agreed on.
    assert [code for code, _ in run(path, 2, nothing)] == [0, 0]
    final = tmp_path / "run/checkpoints/step_00000060"
    assert contents(final) == contents(waited / "checkpoints" / final.name)


def test_a_failed_checkpoint_ends_the_run_at_once(tmp_path: Path) -> None:
    """Not at the next checkpoint, which may be an hour away."""

    def prepare(rank: int) -> None:
        failing(1, 20, OSError(errno.EIO, "made up"))(rank)
        # The writers end long before training could: each of the later steps takes a while.
        before_each_draw(lambda step: time.sleep(0.2 if step >= 20 else 0))

    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path, topology=TP2))
    overrides: dict[str, Any] = {
        "train.training_tokens": 400 * 128,
        "checkpoint.every_steps": 20,
        "logging.log_every_steps": 1,
    }
    overrides["data.dataset"] = str(runs.write_texts(tmp_path / "more.jsonl", 40))
    results = run(path, 2, prepare, **overrides)
    assert [code for code, _ in results] == [1, 1]
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"]
    # 15 steps of 0.2 s: far more than two writers need to tell each other.
    assert 20 <= last < 35
    assert steps_of(tmp_path / "run") == []


def test_a_defect_of_a_writer_is_told_with_its_traceback(tmp_path: Path) -> None:
    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path, topology=TP2))
    results = run(path, 2, failing(1, 40, KeyError("made up")))
    assert [code for code, _ in results] == [1, 1]
    said = "".join(said for _, said in results)
    assert "KeyError: 'made up'" in said and "in fail" in said and said.count("\nerror on rank") == 1
    assert steps_of(tmp_path / "run") == ["step_00000020"]


def test_two_failures_are_both_told(tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        raised = threading.Event()

        def break_down(step: int) -> None:
            if step == 25:
                raised.set()
                raise UserError("train.lr: made up")

        def fail(step: int) -> None:
            assert raised.wait(PATIENCE)
            raise OSError(errno.EIO, "the disk is made up too")

        before_each_draw(break_down)
        before_each_file(fail)

    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path, topology=TP2))
    results = run(path, 2, prepare)
    (line,) = [line for _, said in results for line in said.splitlines() if line.startswith("error")]
    assert "train.lr: made up. Besides, output_dir: the checkpoint of step 20" in line
    assert "the disk is made up too" in line


def test_sigkill_in_the_middle_of_a_write(tmp_path: Path, waited: Path) -> None:
    def prepare(rank: int) -> None:
        written = []

        def die(step: int) -> None:
            written.append(step)
            if rank == 1 and written.count(40) == 2:  # one file is there, the next ones are not
                os.kill(os.getpid(), signal.SIGKILL)

        before_each_file(die)

    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path, topology=TP2))
    codes = [code for code, _ in run(path, 2, prepare)]
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL
    assert steps_of(tmp_path / "run") == [".writing_00000040", "step_00000020"]
    assert [code for code, _ in run(path, 2, nothing)] == [0, 0]
    assert steps_of(tmp_path / "run") == ["step_00000040", "step_00000060"]
    final = tmp_path / "run/checkpoints/step_00000060"
    assert contents(final) == contents(waited / "checkpoints" / final.name)


MOUNT = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]


def may_mount() -> bool:
    """Whether a process of this user may mount a small file system that only it sees."""
    script = "mount -t tmpfs -o size=1m tmpfs /tmp"
    return shutil.which("unshare") is not None and subprocess.run([*MOUNT, script], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="mounting is not permitted here")
def test_a_full_disk(tmp_path: Path, waited: Path) -> None:
    """A file system with room for one checkpoint and a half, then with more; the ranks are launched for real."""

    def size_of(name: str) -> int:
        return sum(path.stat().st_size for path in (waited / "checkpoints" / name).rglob("*") if path.is_file())

    size = size_of("step_00000020")
    disk = tmp_path / "disk"
    disk.mkdir()
    path = runs.write_config(
        tmp_path, runs.tiny_config(tmp_path, topology=TP2, checkpoint={"every_steps": 20}, output_dir=str(disk / "run"))
    )
    launch = f"{sys.executable} -m accelerate.commands.launch --config_file {runs.ROOT}/launch/cpu.yaml"
    launch += f" --num_processes 2 -m scale_sae.train --config {path}"
    script = f"""
        mount -t tmpfs -o size={size * 3 // 2} tmpfs {disk}
        {launch} 2> {tmp_path}/first || echo $? > {tmp_path}/code
        ls -A {disk}/run/checkpoints > {tmp_path}/left
        mount -o remount,size={size * 10} tmpfs {disk}
        {launch}
        cp -r {disk}/run {tmp_path}/result
    """
    done = subprocess.run([*MOUNT, script], env=runs.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "code").read_text() == "1\n"
    lines = [line for line in (tmp_path / "first").read_text().splitlines() if line.startswith("error")]
    assert len(lines) == 1, (tmp_path / "first").read_text()[-3000:]
    print(lines[0])
    begin = "error: output_dir: the checkpoint of step 40 cannot be written "
    assert lines[0].startswith(f"{begin}({disk}/run/checkpoints/.writing_00000040: No space left on device): it needs ")
    assert "; step_00000020 is kept, and the same command goes on from it" in lines[0]
    needed, free = (int(word) for word in lines[0].split() if word.isdigit() and int(word) > 1000)
    # Files are a little more than their tensors, and take whole blocks; config and metrics are small.
    assert 0.95 * size_of("step_00000040") < needed <= size_of("step_00000040")
    assert 0.4 * size < free <= 0.5 * size
    assert (tmp_path / "left").read_text().split() == ["step_00000020"]
    final = tmp_path / "result/checkpoints/step_00000060"
    assert contents(final) == contents(waited / "checkpoints" / final.name)


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_copies_are_their_own_and_their_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 64)
    memory = HostMemory()
    tensors = {
        "matrix": torch.arange(12.0).reshape(3, 4),
        "not one piece": torch.arange(48.0).reshape(4, 6, 2)[:, :5],
        "turned": torch.arange(12.0, dtype=torch.float64).reshape(3, 4).T,
        "half": torch.arange(5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2**40),
        "empty": torch.zeros(0, 3),
    }
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = {name: memory.copy(name, tensor, room=200) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    for name, copied in copies.items():
        assert torch.equal(copied, expected[name]) and copied.dtype == expected[name].dtype, name
        assert copied.is_contiguous()
    larger = memory.copy("matrix", torch.ones(5, 4))
    assert larger.data_ptr() == copies["matrix"].data_ptr() and torch.equal(larger, torch.ones(5, 4))
    assert torch.equal(memory.copy("matrix", torch.ones(50, 4)), torch.ones(50, 4))  # more than there is room for


# ---- which are kept --------------------------------------------------------------------------------------------------


def test_every_so_many_steps_one_is_kept_for_good(tmp_path: Path) -> None:
    keys = {"every_steps": 5, "keep": 2, "keep_every": 20}
    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path, checkpoint=keys))
    runs.forked_run(path, 1)
    assert steps_of(tmp_path / "run") == [f"step_{step:08d}" for step in (20, 40, 55, 60)]
    runs.forked_run(path, 1, {"train.training_tokens": 66 * 128})  # 66 is saved since the run ends there
    assert steps_of(tmp_path / "run") == [f"step_{step:08d}" for step in (20, 40, 60, 65, 66)]


# ---- checkpoints without the shuffle buffer --------------------------------------------------------------------------

REFILL = {"every_steps": 20, "keep": 9, "buffer": "refill"}


def recorded(path: Path, world: int) -> tuple[Tensor, str]:
    """The batches of layer 0 that a run draws, ``[steps, batch, width]``, and what its ranks printed."""

    def worker(rank: int, world: int) -> tuple[list[Tensor], str]:
        drawn: list[Tensor] = []
        original = LaneBuffer.remove

        def remove(self: LaneBuffer, step: int) -> None:
            drawn.extend(rows for name, rows in self.peek(step).items() if name == "model.layers.0")
            original(self, step)

        LaneBuffer.remove = remove  # type: ignore[method-assign]
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = train.run(str(path), (), {})
        assert code == 0, said.getvalue()
        return drawn, said.getvalue()

    results = run_ranks(world, worker, timeout=180, init=False)
    parts = [torch.stack(drawn) for drawn, _ in results if drawn]
    return torch.cat(parts, dim=1), "".join(said for _, said in results)


def cut_off(whole: Path, moved: Path, step: int, **changes: Any) -> Path:
    """The config of a copy of the run in ``whole/run`` as it was when it ended at ``step``."""
    shutil.copytree(whole, moved)
    for folder in (moved / "run/checkpoints").iterdir():
        if checkpoint.step_of(folder) > step:
            shutil.rmtree(folder)
    tree = runs.tiny_config(moved, **changes)
    tree["data"]["dataset"] = str(whole / "texts.jsonl")
    return runs.write_config(moved, tree)


@pytest.fixture(scope="module")
def without_buffer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Tensor]]:
    """A run of 60 steps whose checkpoints hold no buffer, and the batches that it drew."""
    folder = tmp_path_factory.mktemp("refill")
    drawn, said = recorded(runs.write_config(folder, runs.tiny_config(folder, checkpoint=REFILL)), 1)
    assert "refill" not in said
    yield folder, drawn


def chunks_of(path: Path) -> list[Tensor]:
    """The rows of layer 0 of every chunk of a config's text, in order: a model and a text read by this process."""
    run = config.load(path)
    source = ActivationSource(run.model, inspect_model(run.model, ["model.layers.0", "model.layers.1"]))
    return [
        source.capture(chunk.tokens)["model.layers.0"].flatten(0, 1)[chunk.keep.flatten()]
        for chunk in open_chunks(run.data, run.model)
    ]


def counted(rows: Tensor) -> Counter[bytes]:
    return Counter(row.numpy().tobytes() for row in rows.flatten(0, -2))


def test_a_refilled_buffer_takes_the_text_that_follows(tmp_path: Path, without_buffer: tuple[Path, Tensor]) -> None:
    whole, before = without_buffer
    saved = whole / "run/checkpoints/step_00000020"
    assert list((saved / "stream").rglob("rows_*")) == []
    stream = checkpoint.read_meta(saved)["stream"]
    path = cut_off(whole, tmp_path / "moved", 20, checkpoint=REFILL)
    after, said = recorded(path, 1)
    chunks = chunks_of(path)
    first = stream["chunks_inserted"]
    held = sum(map(len, chunks[:first])) - 20 * 128
    (line,) = [line for line in said.splitlines() if "refill" in line]
    assert line.startswith("going on from") and f"the {held} rows that it held are not trained" in line
    # The number of steps stays: 40 whole batches. Each is of rows that had not been in the buffer, none twice.
    assert after.shape[:2] == (40, 128)
    assert counted(before[:20]) <= counted(torch.cat(chunks[:first]))
    assert counted(after) <= counted(torch.cat(chunks[first:]))
    # The text is taken in order, and a chunk only when it is needed.
    needed, number = 40 * 128, 0
    while sum(map(len, chunks[first : first + number])) < needed:
        number += 1
    assert counted(after) <= counted(torch.cat(chunks[first : first + number]))
    final = checkpoint.read_meta(tmp_path / "moved/run/checkpoints/step_00000060")["stream"]
    assert (final["chunks_inserted"], final["rows_left_behind"]) == (first + number, held)
    # The first batch is drawn from the first filling: the 512 rows of the buffer, up to the end of a chunk.
    number = next(n for n in range(1, 99) if sum(map(len, chunks[first : first + n])) >= 512)
    assert counted(after[0]) <= counted(torch.cat(chunks[first : first + number]))


@pytest.mark.parametrize("name", ["colocated tp=2", "LM dp=2, SAE tp=1", "SAE tp=4", "colocated groups=2, tp=2"])
def test_a_refill_is_the_same_on_every_topology(tmp_path: Path, without_buffer: tuple[Path, Tensor], name: str) -> None:
    whole, _ = without_buffer
    alone, _ = recorded(cut_off(whole, tmp_path / "alone", 40, checkpoint=REFILL), 1)
    topology, world = runs.TOPOLOGIES[name]
    drawn, _ = recorded(cut_off(whole, tmp_path / "moved", 40, checkpoint=REFILL, topology=topology), world)
    assert alone.shape[0] == 20 and torch.equal(drawn, alone)
    difference = runs.largest_difference(runs.sae_state(tmp_path / "moved/run"), runs.sae_state(tmp_path / "alone/run"))
    assert difference <= 1e-9  # float64: far above changed sums, far below a wrong row


def test_a_checkpoint_with_its_buffer_is_bitwise_whatever_the_config_says_now(tmp_path: Path, waited: Path) -> None:
    moved = tmp_path / "moved"
    path = cut_off(waited.parent, moved, 20, topology=TP2, checkpoint=REFILL)
    results = run(path, 2, nothing)
    assert [code for code, _ in results] == [0, 0] and "refill" not in results[0][1]
    state, expected = runs.sae_state(moved / "run"), runs.sae_state(waited)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def test_text_that_a_refill_uses_up_is_told(tmp_path: Path) -> None:
    """A run longer than its text: cut off at step 20 it ends that many rows earlier, and says so."""
    whole = tmp_path / "whole"
    whole.mkdir()
    keys: dict[str, Any] = {"checkpoint": REFILL}
    keys["train"] = {"training_tokens": 10**6, "train_batch_size_tokens": 128, "lr": 1e-3}
    tree = runs.tiny_config(whole, **keys)
    text = json.loads(runs.texts(3).splitlines()[-1])["text"][:4500]  # of some 4,500 rows, 35 batches
    (whole / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    ((code, said),) = run(runs.write_config(whole, tree), 1, nothing)
    rows = sum(map(len, chunks_of(whole / "config.yaml")))
    assert code == 1 and f" gave {rows} rows, but" in said
    moved = tmp_path / "moved"
    path = cut_off(whole, moved, 20, **keys)
    ((code, said),) = run(path, 1, nothing)
    lost = checkpoint.read_meta(whole / "run/checkpoints/step_00000020")["stream"]["rows_not_saved"]
    assert 512 - 128 <= lost < 512 + 8 * 32  # the buffer less a batch, and a chunk of 8 contexts on top
    assert code == 1 and f" gave {rows - lost} rows and {lost} that were lost with shuffle buffers" in said
