"""Activations on disk: the rows of a stream as the language model gave them, from which runs train without the model.

    DIR/contents.json              what the rows are of: model, data, hookpoints; written first
    DIR/shard_00000.safetensors    the rows of some consecutive chunks; all shards but the last have as many chunks
    DIR/shard_00000.json           its entry of the index, while there is no index yet
    DIR/index.json                 how many rows there are, size and hash of every shard; written last

A shard holds, in the order of the stream, ``rows/<hookpoint>`` ``[rows, width]`` in the model's dtype, ``counts`` int64
``[chunks]`` (rows of each chunk) and ``cursors`` uint8 (JSON: where the text goes on after each chunk). So a run that
reads it has the same chunks, rows and cursors as one that runs the model, and either may go on where the other stopped.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sae.activations.architecture import build_architecture
from scale_sae.activations.buffer import rows_of_lanes
from scale_sae.activations.schedule import Schedule
from scale_sae.activations.transport import ReceivedChunk, Start
from scale_sae.checkpoint import write_json
from scale_sae.config import RunConfig, differences, to_dict
from scale_sae.errors import UserError
from scale_sae.progress import progress_bar
from scale_sae.tensorfile import Entry, Reader, Writer, file_digest
from scale_sae.topology import Topology

FORMAT = 1
CONTENTS, INDEX = "contents.json", "index.json"
# What a shard should hold: small enough to be lost in a crash, large enough for a network file system.
SHARD_BYTES = 2**30
KEY = "topology.lm.cache"
_ANEW = "cache anew into another folder"
# Parts of a model's config that say nothing of what it computes, or what this package has set in it.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True)
class ShardEntry:
    """A shard's entry of the index. ``first_row`` counts the rows of the stream before it."""

    chunks: int
    first_row: int
    rows: int
    size: int
    blake2b: str


def origin(config: RunConfig) -> dict[str, Any]:
    """What the rows at a hookpoint depend on (JSON-able): model and data, with a digest of the model's own config."""
    tree = to_dict(config)
    model = {name: value for name, value in tree["model"].items() if name != "trust_remote_code"}
    architecture: dict[str, Any] = build_architecture(config.model).config.to_diff_dict()
    known = {name: value for name, value in architecture.items() if name not in _NOT_THE_MODEL}
    model["config"] = hashlib.blake2b(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return {"model": model, "data": tree["data"]}


def contents(config: RunConfig, widths: Mapping[str, int], chunk_rows: int) -> dict[str, Any]:
    """What a cache holds, and how many chunks are a shard; a function of the config alone.

    Args:
        config: of the run.
        widths: hookpoint → width, all that the SAEs read and predict.
        chunk_rows: the most rows of one chunk.
    """
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    chunk_bytes = chunk_rows * sum(widths.values()) * dtype.itemsize
    shard_chunks = max(1, SHARD_BYTES // chunk_bytes)
    return {"format": FORMAT, **origin(config), "hookpoints": dict(widths), "shard_chunks": shard_chunks}


def shard_path(folder: Path, index: int) -> Path:
    """The file of shard ``index``."""
    return folder / f"shard_{index:05d}.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; ``UserError`` where the file is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{KEY}: {path} cannot be read ({error}); {_ANEW}") from None
    if not isinstance(found, dict):
        raise UserError(f"{KEY}: {path} holds no mapping; {_ANEW}")
    return found


def read_contents(folder: Path) -> dict[str, Any]:
    """What `contents` gave for the cache in ``folder``; ``UserError`` where the file is damaged."""
    path = folder / CONTENTS
    about = read_json(path)
    if about.get("format") != FORMAT:
        message = f"has format {about.get('format')}, this program reads {FORMAT}"
        raise UserError(f"{KEY}: {folder} {message}; {_ANEW}")
    kinds = {"model": dict, "data": dict, "hookpoints": dict, "shard_chunks": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]
    if wrong:
        raise UserError(f"{KEY}: {path} is damaged at {wrong[0]}; {_ANEW}")
    return about


def read_entry(path: Path, value: Any = None) -> ShardEntry:
    """The shard's entry in the file ``path``, or ``value`` as one of those in it; ``UserError`` where it is none."""
    found = read_json(path) if value is None else value
    try:
        entry = ShardEntry(**found)
        sound = [type(part) for part in astuple(entry)] == [int, int, int, int, str]
    except TypeError:
        sound = False
    if not sound:
        raise UserError(f"{KEY}: {path} is damaged (no entry of a shard: {found!r:.100}); {_ANEW}")
    return entry


def read_index(folder: Path) -> tuple[list[ShardEntry], bool]:
    """Every shard's entry, and whether the text has no more rows; ``UserError`` where the index is damaged."""
    path = folder / INDEX
    index = read_json(path)
    shards, ended = index.get("shards"), index.get("text_ended")
    if not isinstance(shards, list) or not isinstance(ended, bool):
        raise UserError(f"{KEY}: {path} is damaged at {'shards' if isinstance(ended, bool) else 'text_ended'}; {_ANEW}")
    return [read_entry(path, shard) for shard in shards], ended


class ShardWriter:
    """Writes one shard, chunk after chunk, aside; `finish` puts it in its place.

    Args:
        folder: the cache.
        index: the shard's number.
        first_row: rows of the stream before it.
        counts: rows of each of its chunks.
        cursors: where the text goes on after each of them.
        widths: hookpoint → width.
        dtype: of the rows.
    """

    def __init__(
        self,
        folder: Path,
        index: int,
        first_row: int,
        counts: Sequence[int],
        cursors: Sequence[Mapping[str, Any]],
        widths: Mapping[str, int],
        dtype: torch.dtype,
    ):
        self.path = shard_path(folder, index)
        self.aside = self.path.with_name(f".{self.path.name}")
        self.first_row, self.counts = first_row, list(counts)
        text = torch.frombuffer(bytearray(json.dumps(cursors).encode()), dtype=torch.uint8)
        small = {"counts": torch.tensor(self.counts), "cursors": text}
        tensors: dict[str, tuple[torch.dtype, Sequence[int]]] = {name: (t.dtype, t.shape) for name, t in small.items()}
        tensors |= {f"rows/{name}": (dtype, (sum(counts), width)) for name, width in widths.items()}
        self.writer = Writer(self.aside, tensors)
        for name, tensor in small.items():
            self.writer.tensor(name, tensor)
        self.written = 0

    def add(self, rows: Mapping[str, Tensor], count: int) -> None:
        """Writes the ``count`` rows of the next chunk, ``[count, width]`` per hookpoint, on the CPU."""
        for name, values in rows.items():
            if count:
                self.writer.rows(f"rows/{name}", self.written, values)
        self.written += count

    def finish(self) -> None:
        """Puts the file on the disk and in its place, and its entry beside it."""
        assert self.written == sum(self.counts)
        with self.writer:
            pass
        digest = file_digest(self.aside)
        self.aside.rename(self.path)
        shard = ShardEntry(len(self.counts), self.first_row, self.written, digest["size"], digest["blake2b"])
        write_json(self.path.with_suffix(".json"), asdict(shard))


@dataclass(frozen=True)
class Cache:
    """A finished cache. ``text_ended``: the text has no more rows than these."""

    folder: Path
    about: Mapping[str, Any]
    shards: Sequence[ShardEntry]
    text_ended: bool

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def shard_chunks(self) -> int:
        return int(self.about["shard_chunks"])

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """``UserError`` unless ``folder`` holds a finished cache, every shard of its size."""
        if not (folder / CONTENTS).exists():
            raise UserError(f"{KEY}: {folder} holds no cached activations; write them with scale_sae.cache_activations")
        if not (folder / INDEX).exists():
            done = len(list(folder.glob("shard_*.json")))
            raise UserError(
                f"{KEY}: {folder} is not finished ({done} shards so far); the command that began it goes on: "
                "scale_sae.cache_activations"
            )
        cache = cls(folder, read_contents(folder), *read_index(folder))
        for number, shard in enumerate(cache.shards):
            path = shard_path(folder, number)
            found = path.stat().st_size if path.exists() else None
            if found != shard.size:
                what = "is missing" if found is None else f"has {found} bytes instead of {shard.size}"
                raise UserError(f"{KEY}: {path} {what}; {_REPAIR}")
        return cache

    def check(self, config: RunConfig, widths: Mapping[str, int]) -> None:
        """``UserError`` unless the rows are those that ``config`` would have its model compute at ``widths``."""
        own = origin(config)
        for line in differences({name: self.about[name] for name in own}, own):
            key, _, values = line.partition(": ")
            theirs, _, ours = values.partition(" != ")
            raise UserError(
                f"{KEY}: {self.folder} was made with {key}: {theirs}, but this run has {ours}; set the cache's value, "
                "or cache activations anew into another folder"
            )
        for name, width in widths.items():
            if self.about["hookpoints"].get(name) != width:
                raise UserError(
                    f"{KEY}: {self.folder} has no activations of hookpoint {name} (width {width}), but of "
                    f"{', '.join(self.about['hookpoints'])}; train at those, or cache anew into another folder"
                )

    def needed(self, start: Start, rows_needed: int) -> range:
        """The shards that a stream from ``start`` on reads; ``UserError`` where there are too few rows."""
        first = start.chunk // self.shard_chunks
        rows, last = start.rows, first
        if first < len(self.shards):
            counts = read_counts(shard_path(self.folder, first))
            rows -= sum(counts[: start.chunk % self.shard_chunks])
        while last < len(self.shards) and rows < rows_needed:
            rows += self.shards[last].rows
            last += 1
        if rows < rows_needed:
            cure = (
                f"its text has ended: set train.training_tokens to at most {self.rows}, or cache more text"
                if self.text_ended
                else "cache more into the same folder with scale_sae.cache_activations and this train.training_tokens"
            )
            raise UserError(
                f"{KEY}: {self.folder} gives this run {rows} rows (it holds {self.rows}), but train.training_tokens "
                f"needs {rows_needed}; {cure}"
            )
        return range(first, last)

    def verify(self, numbers: Sequence[int], shows: bool) -> None:
        """Reads shards whole; ``UserError`` for one whose bytes are not those that were written.

        ``shows``: whether this rank shows its progress.
        """
        sizes = [self.shards[number].size for number in numbers]
        bar = progress_bar(sum(sizes), "checking cached activations", "B") if shows else None
        for number in numbers:
            path, shard = shard_path(self.folder, number), self.shards[number]
            if file_digest(path) != {"size": shard.size, "blake2b": shard.blake2b}:
                raise UserError(f"{KEY}: {path} is damaged (its hash is not that of the index); {_REPAIR}")
            if bar is not None:
                bar.update(shard.size)
        if bar is not None:
            bar.close()


_REPAIR = "remove the file and run the same scale_sae.cache_activations command again"


def read_counts(path: Path) -> list[int]:
    """The rows of each chunk of a shard."""
    with Reader(path) as reader:
        counts: list[int] = reader.tensor("counts").tolist()
    return counts


def read_cursor(path: Path) -> dict[str, Any]:
    """Where the text goes on after a shard."""
    with Reader(path) as reader:
        last: dict[str, Any] = json.loads(reader.tensor("cursors").numpy().tobytes())[-1]
    return last


def open_cache(config: RunConfig, widths: Mapping[str, int]) -> Cache | None:
    """The cache that ``topology.lm.cache`` names, checked against the run; None where it names none."""
    if config.topology.lm.cache is None:
        return None
    cache = Cache.open(Path(config.topology.lm.cache))
    cache.check(config, widths)
    return cache


class _OpenShard:
    """A shard's file, mapped: what is not read takes no memory."""

    def __init__(self, path: Path, hookpoints: Sequence[str]):
        with Reader(path) as reader:
            self.counts: list[int] = reader.tensor("counts").tolist()
            self.cursors: list[dict[str, Any]] = json.loads(reader.tensor("cursors").numpy().tobytes())
            entries = {name: reader.entries[f"rows/{name}"] for name in hookpoints}
        self.starts = [0, *accumulate(self.counts)]
        mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        self.rows = {name: _view(mapped, entry) for name, entry in entries.items()}


def _view(data: Tensor, entry: Entry) -> Tensor:
    return data[entry.offset : entry.offset + entry.nbytes].view(entry.dtype).view(entry.shape)


class CachedStream:
    """An SAE rank's stream from a cache: of its own lanes' rows alone, the next chunk read while this one is used.

    Args:
        cache: checked against the run.
        topology: this rank's.
        schedule: of the run.
        start: where the stream begins.

    Raises:
        UserError: the cache has too few rows from there on.
    """

    def __init__(self, cache: Cache, topology: Topology, schedule: Schedule, start: Start):
        assert topology.group is not None
        self.cache = cache
        self.hookpoints = topology.group.hookpoints
        self.lanes = topology.plan.lane_block(topology.group, topology.rank)
        # From pinned memory a GPU copies while the main thread goes on. It is pinned in the thread that reads.
        self.pins = topology.device.type == "cuda"
        self.schedule = schedule
        self.next_index, self.next_row = start.chunk, start.rows
        self.shards = cache.needed(start, schedule.rows_needed)
        self.open: tuple[int, _OpenShard] | None = None
        self.reader = ThreadPoolExecutor(1, "cache")
        self.ahead: Future[ReceivedChunk | None] = self.reader.submit(self._read)

    def next_chunk(self) -> ReceivedChunk | None:
        """The next chunk of the stream; None once the run has its rows."""
        chunk = self.ahead.result()
        if chunk is not None:
            self.ahead = self.reader.submit(self._read)
        return chunk

    def close(self) -> None:
        """Ends the thread that reads."""
        self.reader.shutdown(cancel_futures=True)

    def _read(self) -> ReceivedChunk | None:
        number, place = divmod(self.next_index, self.cache.shard_chunks)
        if number not in self.shards:
            return None
        if self.open is None or self.open[0] != number:
            self.open = number, _OpenShard(shard_path(self.cache.folder, number), self.hookpoints)
        shard = self.open[1]
        if place == len(shard.counts):
            return None
        count = shard.counts[place]
        index = shard.starts[place] + rows_of_lanes(self.next_row, count, self.lanes, self.schedule.lanes)
        rows = {name: values[index] for name, values in shard.rows.items()}
        if self.pins:
            rows = {name: values.pin_memory() for name, values in rows.items()}
        chunk = ReceivedChunk(self.next_index, self.next_row, count, rows, shard.cursors[place])
        self.next_index, self.next_row = self.next_index + 1, self.next_row + count
        return chunk
