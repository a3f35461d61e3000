"""Checkpoints that any number of ranks writes and any other number reads.

    RUN_DIR/checkpoints/step_00000200/
        complete.json                         the marker: size and hash of every other file; written last
        meta.json                             step, config, jobs, state of the stream (JSON, written by the trainer)
        saes/<sae folder>/rows_<start>_<stop>.safetensors     one per shard: its rows of every per-latent tensor
        saes/<sae folder>/replicated.safetensors              what is the same on all shards
        stream/<hookpoint folder>/rows_*.safetensors          the shuffle buffer, by lane

A checkpoint is written aside and renamed, so a folder ``step_*`` with its marker was once whole; `verify` tells
whether it still is. Dimension 0 of every row tensor counts global rows, and the file names say which of them a file
holds: readers ask for the rows that they need, whatever the split was when they were written. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sae.errors import UserError
from scale_sae.tensorfile import Digest, Reader, blocks, file_digest, save

FORMAT = 2
MARKER = "complete.json"
META = "meta.json"
REPLICATED = "replicated.safetensors"


def folder_name(sae_id: str) -> str:
    """The folder of an SAE (``hookpoint`` or ``hookpoint/name``) or of a hookpoint: ``:in`` is written ``.in``."""
    hookpoint, slash, name = sae_id.partition("/")
    if hookpoint.endswith(":in"):
        hookpoint = hookpoint.removesuffix(":in") + ".in"
    return hookpoint + slash + name


def sae_folder(root: Path, sae_id: str) -> Path:
    """Where a checkpoint holds an SAE's tensors."""
    return root / "saes" / folder_name(sae_id)


def stream_folder(root: Path, hookpoint: str) -> Path:
    """Where a checkpoint holds the shuffle buffer of a hookpoint."""
    return root / "stream" / folder_name(hookpoint)


# --- tensors ----------------------------------------------------------------------------------------------------------


def save_rows(root: Path, folder: Path, tensors: Mapping[str, Tensor], start: int) -> dict[str, Digest]:
    """Writes one shard's rows as ``folder/rows_<start>_<stop>.safetensors``.

    Args:
        root: the checkpoint's folder while it is written: `aside`.
        folder: inside ``root``; made if it does not exist.
        tensors: each ``[rows, ...]`` with the same number of rows, global rows ``start .. start + rows``; any device.

    Returns:
        The file's path relative to ``root`` → its digest, for `seal`.
    """
    (rows,) = {len(tensor) for tensor in tensors.values()}
    return _save(root, folder / f"rows_{start:010d}_{start + rows:010d}.safetensors", tensors)


def save_replicated(root: Path, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Digest]:
    """Writes ``folder/replicated.safetensors`` (by one rank); arguments and result as `save_rows`."""
    return _save(root, folder / REPLICATED, tensors)


def _save(root: Path, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Digest]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return {path.relative_to(root).as_posix(): save(path, tensors)}


def row_names(folder: Path) -> list[str]:
    """The names of the row tensors in ``folder``."""
    with Reader(_row_files(folder)[0][2]) as reader:
        return sorted(reader.entries)


def total_rows(folder: Path) -> int:
    """How many global rows the tensors in ``folder`` have."""
    return max(stop for _, stop, _ in _row_files(folder))


def read_rows(folder: Path, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
    """Global rows ``start..stop`` of a row tensor, assembled from every file that holds some of them.

    Returns:
        A new CPU tensor ``[stop - start, ...]``, of ``dtype`` or as stored.

    Raises:
        UserError: ``folder`` lacks the tensor or some of the rows.
    """
    parts, position = [], start
    for first, last, path in _row_files(folder):
        if first <= position < min(stop, last):
            with Reader(path) as reader:
                if name not in reader.entries:
                    raise UserError(f"{path} has no tensor {name}: it holds {', '.join(sorted(reader.entries))}")
                part = reader.rows(name, position - first, min(stop, last) - first)
            parts.append(part if dtype is None else part.to(dtype))
            position = min(stop, last)
    if position < stop:
        raise UserError(f"{folder} has no rows {position}..{stop} of {name}: its files do not cover them")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def load_rows(folder: Path, tensors: Mapping[str, Tensor], start: int) -> None:
    """Copies global rows ``start .. start + len`` into each of ``tensors`` in place (any device), in blocks.

    Raises:
        UserError: ``folder`` lacks a tensor or rows of it, or holds it with another shape.
    """
    for name, tensor in tensors.items():
        for first, last in blocks(0, len(tensor), tensor[0].nbytes):
            stored = read_rows(folder, name, start + first, start + last)
            _copy(f"{folder}: {name}", tensor[first:last], stored)


@torch.no_grad()
def load_replicated(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copies the replicated tensors of ``folder`` into ``tensors`` in place; errors as `load_rows`."""
    with Reader(folder / REPLICATED) as reader:
        for name, tensor in tensors.items():
            if name not in reader.entries:
                raise UserError(f"{reader.path} has no tensor {name}: it holds {', '.join(sorted(reader.entries))}")
            _copy(f"{reader.path}: {name}", tensor, reader.tensor(name))


def _copy(what: str, target: Tensor, stored: Tensor) -> None:
    # copy_ would broadcast and round without a word
    if (stored.shape, stored.dtype) != (target.shape, target.dtype):
        raise UserError(
            f"{what} is stored as {stored.dtype} {list(stored.shape)}, "
            f"but this run needs {target.dtype} {list(target.shape)}: resume with the config that wrote it"
        )
    target.copy_(stored)


def _row_files(folder: Path) -> list[tuple[int, int, Path]]:
    """(start, stop, path) of the row files in ``folder``, ascending."""
    found = sorted(folder.glob("rows_*.safetensors"))
    if not found:
        raise UserError(f"{folder} holds no rows_*.safetensors: it is not a part of a complete checkpoint")
    spans = [(*map(int, path.stem.split("_")[1:]), path) for path in found]
    return sorted(spans)  # type: ignore[arg-type]


# --- whole checkpoints ------------------------------------------------------------------------------------------------


def aside(run_dir: Path, step: int) -> Path:
    """The folder in which the ranks write the checkpoint of ``step`` until `seal` renames it."""
    return run_dir / "checkpoints" / f".writing_{step:08d}"


def begin(run_dir: Path, step: int) -> Path:
    """Makes `aside` afresh and drops what interrupted writes left. One rank calls it, before any other writes."""
    for kind in ("writing", "replaced"):
        for leftover in (run_dir / "checkpoints").glob(f".{kind}_*"):
            shutil.rmtree(leftover)
    folder = aside(run_dir, step)
    folder.mkdir(parents=True)
    return folder


def seal(folder: Path, digests: Mapping[str, Digest], meta: Mapping[str, Any]) -> Path:
    """Makes the checkpoint complete: writes ``meta.json`` and the marker, flushes, renames ``folder`` into place.

    Args:
        folder: of `begin`, holding every rank's files.
        digests: those of every rank's `save_rows` and `save_replicated`, merged.
        meta: what ``meta.json`` holds besides the format, JSON-able.

    Returns:
        The checkpoint's folder. One of the same step is replaced.

    Raises:
        UserError: a file of ``digests`` is not there: the ranks do not write to one file system.
    """
    mark(folder, digests, meta)
    final = folder.with_name(folder.name.replace(".writing_", "step_"))
    replaced = folder.with_name(folder.name.replace(".writing_", ".replaced_"))
    put_in_place(folder, final, replaced)
    return final


def put_in_place(folder: Path, final: Path, replaced: Path) -> None:
    """Renames ``folder``, which is whole, to ``final``; one that is there goes by way of ``replaced``.

    A kill at any moment leaves one of the two whole.
    """
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    folder.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # the new one is there, whatever becomes of the old


def mark(folder: Path, digests: Mapping[str, Digest], meta: Mapping[str, Any]) -> None:
    """Writes ``meta.json`` and the marker of a folder that holds every rank's files; arguments and error as `seal`."""
    for name, digest in digests.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != digest["size"]:
            raise UserError(f"{path} was written but is not seen by rank 0: output_dir must be shared by all nodes")
    write_json(folder / META, {"format": FORMAT, **meta})
    files = {**digests, META: file_digest(folder / META)}
    write_json(folder / MARKER, {"format": FORMAT, "files": files, "blake2b": _hash(files)})
    for path in {folder / parent for name in files for parent in Path(name).parents}:
        _sync(path)


def complete(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that have their marker, newest first; `verify` tells whether they are intact."""
    found = [path for path in _steps(run_dir) if (path / MARKER).exists()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder name tells."""
    return int(folder.name.removeprefix("step_"))


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint; empty where all is well.

    Args:
        share: (index, count): checks every count-th file, so that ``count`` ranks check the whole together.

    Returns:
        One line per missing, truncated or changed file, or one that the marker is missing or unreadable.
    """
    try:
        marker = json.loads((folder / MARKER).read_text())
        files, intact = marker["files"], marker["blake2b"] == _hash(marker["files"])
    except FileNotFoundError:
        return [f"{folder / MARKER} is missing: the checkpoint is not complete"]
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        return [f"{folder / MARKER} is damaged"]
    index, count = share
    problems = []
    # by size, so that the shares take about the same time
    for name in sorted(files, key=lambda name: (-files[name]["size"], name))[index::count]:
        path, digest = folder / name, files[name]
        if not path.exists():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != digest["size"]:
            problems.append(f"{path} has {path.stat().st_size} bytes instead of {digest['size']}")
        elif file_digest(path) != digest:
            problems.append(f"{path} has changed since it was written: its hash differs")
    return problems


def read_meta(folder: Path) -> dict[str, Any]:
    """The contents of ``meta.json``.

    Raises:
        UserError: another version of scale_sae wrote it in a format that this one does not read.
    """
    meta: dict[str, Any] = json.loads((folder / META).read_text())
    if meta["format"] != FORMAT:
        raise UserError(f"{folder / META}: format {meta['format']} is not {FORMAT}, which this version reads")
    for job in meta.get("jobs", []):
        if ".." in job["sae_id"] or job["sae_id"].startswith("/"):  # it becomes a folder
            raise UserError(f"{folder / META}: sae_id {job['sae_id']!r} leaves its folder: this is no run's checkpoint")
    return meta


def prune(run_dir: Path, keep: int, keep_every: int | None = None) -> None:
    """Deletes all but the newest ``keep`` complete checkpoints and those of every ``keep_every``-th step.

    What cannot be deleted, because a reader has it open on a network disk or it is another user's, is tried again the
    next time.
    """
    found = complete(run_dir)
    kept = found[:keep] + [folder for folder in found if keep_every is not None and step_of(folder) % keep_every == 0]
    for folder in _steps(run_dir):
        if folder not in kept:
            try:  # the marker first, so that a half-deleted one never looks complete
                (folder / MARKER).unlink(missing_ok=True)
            except OSError:
                continue
            shutil.rmtree(folder, ignore_errors=True)


def _steps(run_dir: Path) -> list[Path]:
    return [path for path in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, to the disk, that appears complete or not at all."""
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _hash(files: Mapping[str, Digest]) -> str:
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=32).hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
