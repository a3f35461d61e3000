"""Runs the model once and keeps its activations: ``accelerate launch … -m scale_sae.cache_activations --config C.yaml
--out DIR [--dotted.key=value …]``.

The config is that of the training runs: its model, data, the hookpoints of all SAEs, and rows for
``train.training_tokens``. Every rank runs the model: the world is as many copies as ``topology.lm.tp`` goes into it.
Runs with ``--topology.lm='{cache: DIR}'`` then train from DIR. The same command goes on where one was interrupted, on
any number of ranks, and adds rows to a finished cache where ``train.training_tokens`` is larger.
"""

import inspect
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import fire
import torch
import torch.distributed as dist

from scale_sae import rundir, topology
from scale_sae.activations.cache import (
    CONTENTS,
    INDEX,
    Cache,
    ShardEntry,
    ShardWriter,
    contents,
    read_cursor,
    read_entry,
    read_index,
    read_json,
    shard_path,
)
from scale_sae.activations.schedule import schedule
from scale_sae.activations.source import ActivationSource, kept_positions
from scale_sae.activations.tokens import Chunk, open_chunks
from scale_sae.activations.transport import DIFFERENT_TEXT, kept_rows
from scale_sae.checkpoint import write_json
from scale_sae.config import LMTopology, RunConfig, differences
from scale_sae.errors import UserError
from scale_sae.jobs import resolve
from scale_sae.progress import progress_bar
from scale_sae.session import Session, agree, end_process, joined, run_command
from scale_sae.topology import LMRanks
from scale_sae.train import agree_on_folder, open_model, read_config, set_tf32


class Caching:
    """One rank's part in filling a cache. ``kept`` are the shards that are there already."""

    def __init__(self, session: Session, config: RunConfig, folder: Path, place: LMRanks, widths: Mapping[str, int]):
        self.session = session
        self.config = config
        self.folder = folder
        self.place = place
        self.widths = widths
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        chunk_rows = schedule(config, kept_positions(config.model, config.data)).chunk_rows
        self.about = contents(config, widths, chunk_rows)
        self.shard_chunks: int = self.about["shard_chunks"]
        self.rows_wanted = config.train.training_tokens
        self.kept: dict[int, ShardEntry] = {}
        self.text_ended = False
        self.held: IO[str] | None = None

    def run(self) -> bool:
        """Fills the cache; False if a stop was asked for before the end."""
        if self.open_folder():
            return True
        agree(lambda: self.check_room() if self.session.is_main else None)
        done = self.fill()
        if done:
            agree(lambda: self.finish() if self.session.is_main else None)
        return done

    # ---- what is there already --------------------------------------------------------------------------------------

    def open_folder(self) -> bool:
        """Takes the folder and finds the shards to keep, on every rank; True if the cache has all rows already."""

        def take() -> None:
            if self.session.is_main:
                self.held = rundir.lock(self.folder, "--out")
                self._check_contents()
                self._unpack_index()
                write_json(self.folder / CONTENTS, self.about)

        agree(take)
        agree_on_folder(self.folder, self.session.is_main, "--out")
        found: list[Any] = [None]
        if self.session.is_main:
            finished = (self.folder / INDEX).exists()
            found = [(finished, {} if finished else self._whole_shards())]
        dist.broadcast_object_list(found, 0)
        finished, self.kept = found[0]
        return bool(finished)

    def _check_contents(self) -> None:
        """``UserError`` unless the folder is new or holds a cache of the same rows."""
        path = self.folder / CONTENTS
        if not path.exists():
            strange = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
            if strange:
                raise UserError(f"--out: {self.folder} holds {strange[0]} and no cache; choose another folder")
            return
        found = differences(read_json(path), self.about)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(
                f"--out: {self.folder} holds activations of another config ({found[0]}{more}); choose another folder, "
                "or restore the config"
            )

    def _unpack_index(self) -> None:
        """Goes back to entries beside the shards where an index stands over too few rows, or over a lost shard."""
        path = self.folder / INDEX
        if not path.exists():
            return
        shards, text_ended = read_index(self.folder)
        whole = all(self._is_there(number, shard) for number, shard in enumerate(shards))
        rows = sum(shard.rows for shard in shards)
        if whole and (rows >= self.rows_wanted or text_ended):
            return
        for number, shard in enumerate(shards):
            if self._is_there(number, shard):
                write_json(self._entry(number), asdict(shard))
        path.unlink()

    def _whole_shards(self) -> dict[int, ShardEntry]:
        """Shards that need not be written again: whole, and not cut short by the end of an earlier, shorter cache."""
        found = {}
        for path in sorted(self.folder.glob("shard_*.json")):
            number, shard = int(path.stem.removeprefix("shard_")), read_entry(path)
            complete = shard.chunks == self.shard_chunks or shard.first_row + shard.rows >= self.rows_wanted
            if complete and self._is_there(number, shard):
                found[number] = shard
            else:
                path.unlink()
        return found

    def _is_there(self, number: int, shard: ShardEntry) -> bool:
        path = shard_path(self.folder, number)
        return path.exists() and path.stat().st_size == shard.size

    def _entry(self, number: int) -> Path:
        return shard_path(self.folder, number).with_suffix(".json")

    def check_room(self) -> None:
        """``UserError`` where the disk has too little room for the rows that are missing."""
        row = sum(self.widths.values()) * self.dtype.itemsize
        missing = (self.rows_wanted - sum(shard.rows for shard in self.kept.values())) * row
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise UserError(
                f"--out: {self.folder} needs {missing / 2**30:.1f} GiB more for {self.rows_wanted} rows of {row} "
                f"bytes, and the disk has {free / 2**30:.1f} GiB free; make room, or lower train.training_tokens"
            )

    # ---- filling it -------------------------------------------------------------------------------------------------

    def fill(self) -> bool:
        """Writes the shards that are missing; False if a stop was asked for before the end."""
        start = next(number for number in range(len(self.kept) + 1) if number not in self.kept)
        cursor, rows = None, 0
        if start:
            cursor = read_cursor(shard_path(self.folder, start - 1))
            rows = self.kept[start - 1].first_row + self.kept[start - 1].rows

        def prepare() -> tuple[Any, ActivationSource]:
            chunks = iter(open_chunks(self.config.data, self.config.model, cursor))
            speaks = self.session.is_main
            return chunks, open_model(self.config, self.widths, self.place.devices, self.place.lm_mesh, speaks)

        chunks, source = agree(prepare)
        self.session.before = "\n"
        if self.place.leads:
            with ThreadPoolExecutor(1, "shards") as writer:
                stopped = self._lead(chunks, source, start, rows, writer)
        else:
            stopped = self._follow(source)
        flag = torch.tensor(int(stopped))
        # Waits long: other copies of the model may have a shard more to write.
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.place.control)
        return not bool(flag)

    def _lead(
        self, chunks: Iterator[Chunk], source: ActivationSource, start: int, rows: int, writer: ThreadPoolExecutor
    ) -> bool:
        """The first rank of a copy: reads text, forwards this copy's shards and writes them; whether it was stopped."""
        bar = None
        if self.session.is_main:
            bar = progress_bar(self.rows_wanted, "caching", "rows", initial=rows)
        # The disk takes its time while the model goes on, one chunk behind it at most.
        pending: deque[Future[None]] = deque()
        for number, first_row, shard in self._shards(chunks, start, rows):
            counts = [int(chunk.keep.sum()) for chunk in shard]
            if bar is not None:
                bar.update(first_row - bar.n)  # past shards that are there already
            if number % self.place.replicas == self.place.replica:
                cursors = [chunk.cursor for chunk in shard]
                file = ShardWriter(self.folder, number, first_row, counts, cursors, self.widths, self.dtype)
                for chunk, count in zip(shard, counts, strict=True):
                    if self._stop_asked():
                        self._tell(None)
                        return True
                    self._tell(chunk)
                    rows_of = kept_rows(source, chunk, self.place.device)
                    while pending:
                        pending.popleft().result()
                    pending.append(writer.submit(file.add, {name: v.cpu() for name, v in rows_of.items()}, count))
                    if bar is not None:
                        bar.update(count)
                pending.append(writer.submit(file.finish))
            elif bar is not None:
                bar.update(sum(counts))
        self._tell(None)
        while pending:
            pending.popleft().result()
        if bar is not None:
            bar.close()
        return False

    def _follow(self, source: ActivationSource) -> bool:
        """The other ranks of a copy forward what the first one reads."""
        while True:
            item: list[Chunk | None] = [None]
            dist.broadcast_object_list(item, group_src=0, group=self.place.lm_control)
            if item[0] is None:
                return False
            self._stop_asked()
            kept_rows(source, item[0], self.place.device)

    def _tell(self, chunk: Chunk | None) -> None:
        """Hands a chunk to the other ranks of this copy; None: there is no more."""
        if self.place.lm_mesh.size() > 1:
            dist.broadcast_object_list([chunk], group_src=0, group=self.place.lm_control)

    def _stop_asked(self) -> bool:
        """Whether any rank got a signal; passes on this one's."""
        if self.session.stop.signalled:
            self.session.store.set("stop_asked", "1")
        return self.session.store.check(["stop_asked"])

    def _shards(self, chunks: Iterator[Chunk], number: int, rows: int) -> Iterator[tuple[int, int, list[Chunk]]]:
        """(number, rows of the stream before it, its chunks) of each missing shard from ``number``, the first, on."""
        shard: list[Chunk] = []
        first_row = rows
        while rows < self.rows_wanted:
            chunk = next(chunks, None)
            if chunk is None:
                self.text_ended = True
                break
            shard.append(chunk)
            rows += int(chunk.keep.sum())
            if len(shard) == self.shard_chunks:
                yield number, first_row, shard
                number, rows, chunks = self._beyond_kept(number + 1, rows, chunks)
                first_row, shard = rows, []
        if shard:
            yield number, first_row, shard

    def _beyond_kept(self, number: int, rows: int, chunks: Iterator[Chunk]) -> tuple[int, int, Iterator[Chunk]]:
        """The first missing shard from ``number`` on, the rows before it, and the text from there on."""
        start = number
        while number in self.kept:
            rows = self.kept[number].first_row + self.kept[number].rows
            number += 1
        if number > start and rows < self.rows_wanted:
            cursor = read_cursor(shard_path(self.folder, number - 1))
            chunks = iter(open_chunks(self.config.data, self.config.model, cursor))
        return number, rows, chunks

    def finish(self) -> None:
        """Writes the index. One rank calls it, once all shards are there. ``UserError`` if they do not fit together."""
        shards: list[ShardEntry] = []
        for path in sorted(self.folder.glob("shard_*.json")):
            rows = sum(shard.rows for shard in shards)
            if rows >= self.rows_wanted:
                break  # the rest is of an attempt at a larger cache
            shards.append(read_entry(path))
            if shards[-1].first_row != rows:
                raise UserError(DIFFERENT_TEXT)
        index = {"rows": sum(shard.rows for shard in shards), "text_ended": self.text_ended}
        write_json(self.folder / INDEX, index | {"shards": [asdict(shard) for shard in shards]})
        for number in range(len(shards)):
            self._entry(number).unlink()


def cache_in(session: Session, config: RunConfig, folder: Path) -> bool:
    """Fills the cache ``folder`` on the ranks of ``session``; False if it was asked to stop.

    ``UserError`` where the text has fewer rows than asked for; all of them are then cached.
    """
    set_tf32(config.train.allow_tf32)
    devices = agree(lambda: topology.pick_devices(config.topology, session.rank, session.local_rank, sae_ranks=0))
    widths, _ = agree(lambda: resolve(config))
    place = agree(
        lambda: topology.build_lm(session.rank, session.world_size, config.topology.lm.tp, devices, session.backend)
    )
    session.pulse.introduce(f"LM rank of replica {place.replica}, tp {session.rank % config.topology.lm.tp}")
    caching = Caching(session, config, folder, place, widths)
    try:
        if not caching.run():
            session.say(f"stopped as asked; the same command goes on with what is in {folder}")
            return False
    except OSError as error:
        raise UserError(
            f"--out: {folder} cannot be written ({error.strerror or error}); make room, then run the command again"
        ) from error
    finally:
        if caching.held is not None:
            caching.held.close()  # another session of this process may take the folder
    agree(lambda: _check_rows(config, folder) if session.is_main else None)
    return True


def _check_rows(config: RunConfig, folder: Path) -> None:
    """Says what the finished cache holds; ``UserError`` where that is less than asked for."""
    cache = Cache.open(folder)
    if cache.rows < config.train.training_tokens:
        raise UserError(
            f"data.dataset: {config.data.dataset} gave {cache.rows} rows, but train.training_tokens needs "
            f"{config.train.training_tokens}; all are in {folder}. Give more text, or train on at most {cache.rows}"
        )
    size = sum(shard.size for shard in cache.shards)
    print(f"{folder}: {cache.rows} rows at {len(cache.about['hookpoints'])} hookpoints, {size / 2**30:.2f} GiB")


def cache(config: RunConfig, folder: Path) -> bool:
    """Caches from Python what the command does, on every rank; ``UserError`` on every rank, False if stopped."""
    with joined() as session:
        return cache_in(session, of_lm_ranks(config), folder)


def of_lm_ranks(config: RunConfig) -> RunConfig:
    """``config`` for ranks that run the model alone: without what it says of ranks that also train, or of a cache."""
    lm = config.topology.lm
    if lm.shares_ranks:
        lm = LMTopology()
    return replace(config, topology=replace(config.topology, lm=lm))


def main(config: Any = None, *extra: Any, out: Any = None, **overrides: Any) -> None:
    """python -m scale_sae.cache_activations --config C.yaml --out DIR [--dotted.key=value ...]

    Runs the model over the text of a training config and writes its activations, from which runs then train.

    Args:
        config: the YAML file of a training run.
        out: folder of the cache. Without it: topology.lm.cache of the config.
        overrides: any key of the config, dotted, as for scale_sae.train.
    """
    if overrides.keys() & {"help", "h"}:  # Fire hands them over, as it does every flag that is not declared
        print(inspect.getdoc(main))
        return

    def work(session: Session) -> None:
        run = agree(lambda: read_config(config, extra, overrides))
        folder = out or run.topology.lm.cache
        if not isinstance(folder, str):
            raise UserError("--out is missing: give the folder of the cache")
        cache_in(session, of_lm_ranks(run), Path(folder))

    end_process(run_command(work))


if __name__ == "__main__":
    fire.Fire(main)
