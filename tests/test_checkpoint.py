"""Checkpoints: any split of the rows reads as any other, damage is found, an interrupted write harms nothing."""

import errno
import json
import multiprocessing
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from harness import run_ranks
from scale_sae import checkpoint, tensorfile
from scale_sae.errors import UserError

ROWS = 24


def whole_tensors() -> dict[str, Tensor]:
    """What an SAE of 24 latents stores by rows: every dtype and rank of tensor that a checkpoint meets."""
    values = torch.arange(ROWS * 5)
    return {
        "W_dec": values.reshape(ROWS, 5).to(torch.float32),
        "adam.exp_avg.W_dec": values.reshape(ROWS, 5).to(torch.bfloat16),
        "tokens_since_fired": values[:ROWS] * 10**12,
        "lanes": values.reshape(ROWS, 1, 5).to(torch.float64) / 7,
        "frozen": values[:ROWS] % 2 == 0,
    }


REPLICATED = {"b_dec": torch.linspace(-1, 1, 5), "window_tokens": torch.tensor(2**40), "frozen": torch.tensor(True)}


def part(tensors: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: tensor[start:stop] for name, tensor in tensors.items()}


def write(run_dir: Path, step: int, cuts: list[int], meta: dict[str, Any] | None = None) -> Path:
    root = checkpoint.begin(run_dir, step)
    folder = checkpoint.sae_folder(root, "layer.1:in/wide")
    digests = checkpoint.save_replicated(root, folder, REPLICATED)
    for start, stop in zip([0, *cuts], [*cuts, ROWS], strict=True):
        digests |= checkpoint.save_rows(root, folder, part(whole_tensors(), start, stop), start)
    return checkpoint.seal(root, digests, {"step": step, **(meta or {})})


def the_folder(saved: Path) -> Path:
    return checkpoint.sae_folder(saved, "layer.1:in/wide")


@pytest.mark.parametrize("read_cuts", [[], [12], [8, 16], [1, 2, 23], [5, 13, 20]])
@pytest.mark.parametrize("written_cuts", [[6, 12, 18], [], [7, 11]])
def test_rows_read_back_whatever_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_cuts: list[int], read_cuts: list[int]
) -> None:
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 100)  # rows of W_dec are 20 bytes: blocks end inside shards
    folder = the_folder(write(tmp_path, 3, written_cuts))
    for start, stop in zip([0, *read_cuts], [*read_cuts, ROWS], strict=True):
        expected = part(whole_tensors(), start, stop)
        loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        addresses = {name: tensor.data_ptr() for name, tensor in loaded.items()}
        checkpoint.load_rows(folder, loaded, start)
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), name
            assert loaded[name].data_ptr() == addresses[name], "optimizer state must be filled in place"
            assert torch.equal(checkpoint.read_rows(folder, name, start, stop), tensor), name
    assert checkpoint.total_rows(folder) == ROWS
    assert checkpoint.row_names(folder) == sorted(whole_tensors())


def test_replicated_tensors_read_back_with_scalars(tmp_path: Path) -> None:
    folder = the_folder(write(tmp_path, 3, []))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in REPLICATED.items()}
    checkpoint.load_replicated(folder, loaded)
    for name, tensor in REPLICATED.items():
        assert torch.equal(loaded[name], tensor), name


def test_read_rows_converts(tmp_path: Path) -> None:
    folder = the_folder(write(tmp_path, 3, [10]))
    rows = checkpoint.read_rows(folder, "W_dec", 8, 12, torch.float64)
    assert torch.equal(rows, whole_tensors()["W_dec"][8:12].double())


def test_files_are_plain_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 64)
    folder = the_folder(write(tmp_path, 3, [6]))
    ours = safetensors.torch.load_file(folder / "rows_0000000006_0000000024.safetensors")
    assert ours.keys() == whole_tensors().keys()
    for name, tensor in part(whole_tensors(), 6, ROWS).items():
        assert torch.equal(ours[name], tensor), name
    with tensorfile.Reader(folder / "rows_0000000006_0000000024.safetensors") as reader:
        assert all(entry.offset % entry.dtype.itemsize == 0 for entry in reader.entries.values())
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(whole_tensors(), theirs, metadata={"made": "elsewhere"})
    with tensorfile.Reader(theirs) as reader:
        for name, tensor in whole_tensors().items():
            assert torch.equal(reader.tensor(name), tensor), name


def test_tensors_that_are_no_contiguous_block_are_saved_as_they_read(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    folder = tmp_path / "saes"
    checkpoint.save_rows(tmp_path, folder, {"view": matrix.T, "strided": torch.arange(8)[::2]}, 0)
    assert torch.equal(checkpoint.read_rows(folder, "view", 0, 4), matrix.T)
    assert checkpoint.read_rows(folder, "strided", 0, 4).tolist() == [0, 2, 4, 6]


def test_ranks_write_one_checkpoint_that_other_ranks_share(tmp_path: Path) -> None:
    """4 ranks write, 3 others verify a share each and read uneven slices."""
    root = checkpoint.begin(tmp_path, 20)

    def save(rank: int, world: int) -> dict[str, checkpoint.Digest]:
        start = rank * ROWS // world
        rows = part(whole_tensors(), start, start + ROWS // world)
        return checkpoint.save_rows(root, checkpoint.sae_folder(root, "layer.1"), rows, start)

    digests = {path: digest for saved in run_ranks(4, save) for path, digest in saved.items()}
    saved = checkpoint.seal(root, digests, {"step": 20})

    def load(rank: int, world: int) -> tuple[list[str], Tensor]:
        start, stop = [(0, 9), (9, 10), (10, ROWS)][rank]
        rows = checkpoint.read_rows(checkpoint.sae_folder(saved, "layer.1"), "lanes", start, stop)
        return checkpoint.verify(saved, (rank, world)), rows

    results = run_ranks(3, load)
    assert [problems for problems, _ in results] == [[], [], []]
    assert torch.equal(torch.cat([rows for _, rows in results]), whole_tensors()["lanes"])


def files_of(saved: Path) -> list[Path]:
    return sorted(path for path in saved.rglob("*") if path.is_file())


def test_an_intact_checkpoint_has_no_problems_and_its_meta(tmp_path: Path) -> None:
    saved = write(tmp_path, 200, [6, 12, 18], {"config": {"seed": 4, "hookpoints": ["a"]}})
    assert saved == tmp_path / "checkpoints" / "step_00000200"
    assert checkpoint.verify(saved) == []
    assert checkpoint.read_meta(saved)["config"] == {"seed": 4, "hookpoints": ["a"]}
    assert checkpoint.read_meta(saved)["step"] == 200
    assert not checkpoint.aside(tmp_path, 200).exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [("flip a bit", "has changed since"), ("cut a byte off", "bytes instead of"), ("delete", "is missing")],
)
def test_every_file_is_guarded(tmp_path: Path, damage: str, said: str) -> None:
    """Each file in turn, the marker and the meta too; the line names the file and what is wrong with it."""
    pristine = write(tmp_path / "pristine", 7, [10])
    names = [path.relative_to(pristine) for path in files_of(pristine)]
    assert len(names) == 5  # two row files, replicated, meta, marker
    for name in names:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        path = shutil.copytree(pristine, tmp_path / "copy") / name
        data = bytearray(path.read_bytes())
        if damage == "delete":
            path.unlink()
        elif damage == "flip a bit":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        else:
            path.write_bytes(data[:-1])
        problems = checkpoint.verify(tmp_path / "copy")
        assert len(problems) == 1 and str(path) in problems[0], (name, problems)
        assert said in problems[0] or (path.name == checkpoint.MARKER and "is damaged" in problems[0])


def test_no_flipped_bit_of_the_marker_passes(tmp_path: Path) -> None:
    marker = write(tmp_path, 7, []) / "complete.json"
    original = marker.read_bytes()
    checked = 0
    for position in range(len(original)):
        data = bytearray(original)
        data[position] ^= 2
        marker.write_bytes(data)
        # the format number and white space say nothing about the files
        if chr(original[position]) not in " \n" and position > original.index(b'"files"'):
            assert checkpoint.verify(marker.parent), position
            checked += 1
    assert checked > 300


def test_shares_cover_every_file_once(tmp_path: Path) -> None:
    saved = write(tmp_path, 7, [4, 8, 12, 16, 20])
    for path in files_of(saved):
        if path.name != checkpoint.MARKER:
            path.unlink()
    alone = checkpoint.verify(saved)
    shared = [line for index in range(3) for line in checkpoint.verify(saved, (index, 3))]
    assert len(alone) == 8 and sorted(shared) == sorted(alone)


def test_complete_lists_newest_first_and_only_what_has_its_marker(tmp_path: Path) -> None:
    assert checkpoint.complete(tmp_path) == []
    for step in (100, 99_999_999, 123_456_789, 5):
        write(tmp_path, step, [])
    (tmp_path / "checkpoints" / "step_00000100" / checkpoint.MARKER).unlink()
    checkpoint.begin(tmp_path, 999)
    assert [path.name for path in checkpoint.complete(tmp_path)] == [
        "step_123456789",
        "step_99999999",
        "step_00000005",
    ]


def test_prune_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, [])
    (tmp_path / "checkpoints" / "step_00000004" / checkpoint.MARKER).unlink()
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]


def test_what_cannot_be_pruned_stays(tmp_path: Path) -> None:
    """A marker in what is no folder cannot be deleted, nor can one of another user."""
    for step in (1, 2, 3):
        write(tmp_path, step, [])
    stuck = tmp_path / "checkpoints" / "step_00000000"
    stuck.write_text("")
    checkpoint.prune(tmp_path, 1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000000", "step_00000003"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 9, [], {"attempt": 1})
    saved = write(tmp_path, 9, [12], {"attempt": 2})
    assert checkpoint.read_meta(saved)["attempt"] == 2
    assert checkpoint.verify(saved) == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000009"]


def test_begin_drops_what_an_interrupted_write_left(tmp_path: Path) -> None:
    folder = checkpoint.begin(tmp_path, 5)
    checkpoint.save_rows(folder, folder / "saes", {"x": torch.ones(3)}, 0)
    checkpoint.begin(tmp_path, 6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".writing_00000006"]


def test_seal_refuses_files_that_it_does_not_see(tmp_path: Path) -> None:
    root = checkpoint.begin(tmp_path, 5)
    digests = checkpoint.save_rows(root, root / "saes", {"x": torch.ones(3)}, 0)
    elsewhere = {"saes/rows_0000000003_0000000006.safetensors": next(iter(digests.values()))}
    with pytest.raises(UserError, match="output_dir must be shared by all nodes"):
        checkpoint.seal(root, digests | elsewhere, {"step": 5})
    assert checkpoint.complete(tmp_path) == []


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk: the write ends with an OSError in the middle of a file."""
    before = write(tmp_path, 1, [])

    def save_with_little_room(queue: "multiprocessing.Queue[int | None]") -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
        try:
            root = checkpoint.begin(tmp_path, 2)
            checkpoint.save_rows(root, root / "saes", {"x": torch.ones(1_000_000)}, 0)
        except OSError as error:
            queue.put(error.errno)

    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    process = context.Process(target=save_with_little_room, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == errno.EFBIG
    process.join()
    assert checkpoint.complete(tmp_path) == [before]
    assert checkpoint.verify(before) == []
    after = write(tmp_path, 2, [])  # there is room again
    assert checkpoint.complete(tmp_path) == [after, before]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]


def test_missing_rows_and_tensors_are_named(tmp_path: Path) -> None:
    folder = the_folder(write(tmp_path, 1, [10]))
    with pytest.raises(UserError, match=r"no rows 24\.\.25 of W_dec"):
        checkpoint.read_rows(folder, "W_dec", 20, 25)
    with pytest.raises(UserError, match=r"no tensor W_enc: it holds .*W_dec"):
        checkpoint.read_rows(folder, "W_enc", 0, 5)
    (folder / "rows_0000000000_0000000010.safetensors").unlink()
    with pytest.raises(UserError, match=r"no rows 8\.\.12 of W_dec"):
        checkpoint.read_rows(folder, "W_dec", 8, 12)
    with pytest.raises(UserError, match=r"no tensor b: it holds b_dec"):
        checkpoint.load_replicated(folder, {"b": torch.zeros(5)})
    with pytest.raises(UserError, match=r"holds no rows_\*\.safetensors"):
        checkpoint.total_rows(tmp_path)


def test_what_copy_would_broadcast_or_round_is_refused(tmp_path: Path) -> None:
    folder = the_folder(write(tmp_path, 1, [10]))
    with pytest.raises(UserError, match="lanes is stored as"):
        checkpoint.load_rows(folder, {"lanes": torch.zeros(ROWS, 6, 5, dtype=torch.float64)}, 0)
    with pytest.raises(UserError, match=r"needs torch.float64 \[24, 5\]"):
        checkpoint.load_rows(folder, {"W_dec": torch.zeros(ROWS, 5, dtype=torch.float64)}, 0)
    with pytest.raises(UserError, match=r"window_tokens is stored as torch.int64 \[\]"):
        checkpoint.load_replicated(folder, {"window_tokens": torch.zeros(3, dtype=torch.int64)})


@pytest.mark.parametrize("sae_id", ["../../elsewhere", "/elsewhere", "model.layers.1/../../elsewhere"])
def test_an_sae_id_that_leaves_its_folder_is_refused(tmp_path: Path, sae_id: str) -> None:
    """Consolidation would write to the folder of that name."""
    saved = write(tmp_path, 1, [])
    meta = {"format": checkpoint.FORMAT, "step": 1, "jobs": [{"sae_id": sae_id}]}
    (saved / checkpoint.META).write_text(json.dumps(meta))
    with pytest.raises(UserError, match="leaves its folder"):
        checkpoint.read_meta(saved)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    saved = write(tmp_path, 1, [])
    newer = checkpoint.FORMAT + 1
    (saved / checkpoint.META).write_text(json.dumps({"format": newer, "step": 1}))
    with pytest.raises(UserError, match=f"format {newer} is not {checkpoint.FORMAT}"):
        checkpoint.read_meta(saved)


@pytest.mark.parametrize(
    ("sae_id", "folder"),
    [
        ("model.layers.1", "model.layers.1"),
        ("model.layers.1:in", "model.layers.1.in"),
        ("model.layers.1:in/k32", "model.layers.1.in/k32"),
        ("model.layers.1/a:in", "model.layers.1/a:in"),
    ],
)
def test_folder_names(sae_id: str, folder: str) -> None:
    assert checkpoint.folder_name(sae_id) == folder


def test_truncated_file_is_named_when_read(tmp_path: Path) -> None:
    folder = the_folder(write(tmp_path, 1, []))
    (path,) = folder.glob("rows_*")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="truncated"):
        for name in whole_tensors():
            checkpoint.read_rows(folder, name, 0, ROWS)
