"""Trains SAEs: ``accelerate launch … -m scale_sae.train --config C.yaml [--dotted.key=value …]``.

Every rank runs this module; the config's topology says which of them run the language model and which train SAEs.
The same command goes on from the newest checkpoint. ``scale_sae/config.py`` explains every key.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import IO, Any

import fire
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import DeviceMesh

from scale_sae import checkpoint, engine_settings, profiling, recipes, rundir, topology
from scale_sae.activations.cache import Cache, CachedStream, open_cache
from scale_sae.activations.device_map import bytes_off_device, max_memory
from scale_sae.activations.schedule import Schedule, schedule
from scale_sae.activations.source import ActivationSource, kept_positions
from scale_sae.activations.tokens import Chunk, open_chunks
from scale_sae.activations.transport import ColocatedExchange, Receiver, Sender, Start, produce
from scale_sae.config import RunConfig, SAEEntry, load, to_dict
from scale_sae.errors import UserError
from scale_sae.evaluation import Evaluation
from scale_sae.heartbeat import role_of
from scale_sae.held_out import Batch, batches
from scale_sae.jobs import JobSpec, resolve, with_rates
from scale_sae.metrics import MetricsWriter
from scale_sae.saes import registry
from scale_sae.saes.check import check_custom
from scale_sae.session import Session, Stop, agree, end_process, joined, run_command
from scale_sae.snapshots import how_it_goes_on
from scale_sae.topology import Topology
from scale_sae.trainer import Stream, Trainer


def check_classes(specs: list[JobSpec], tp: int, device: torch.device) -> None:
    """Tries the classes that are not this package's on as many shards as the run has. ``UserError`` for a wrong one."""
    tried: list[tuple[str, Any]] = []
    for spec in specs:
        if not registry.is_custom(spec.architecture) or (spec.architecture, spec.cfg) in tried:
            continue
        tried.append((spec.architecture, spec.cfg))
        try:
            note = check_custom(spec.architecture, spec.cfg, tp, device)
        except UserError as error:
            raise UserError(f"saes.{spec.entry}.architecture: {error}") from error
        if note is not None:
            print(f"note: saes.{spec.entry}.architecture: {note}", file=sys.stderr, flush=True)


def agree_on_folder(folder: Path, is_main: bool, key: str) -> None:
    """``UserError`` (of ``key``) on every rank unless all see the same ``folder``, which is there on the main one."""
    nonce = [f".shared_{uuid.uuid4().hex}"]
    if is_main:
        (folder / nonce[0]).touch()
    dist.broadcast_object_list(nonce, 0)
    try:
        agree(lambda: rundir.check_shared(folder, nonce[0], key))
    finally:
        if is_main:
            (folder / nonce[0]).unlink()


def open_model(
    config: RunConfig,
    widths: Mapping[str, int],
    devices: Sequence[torch.device],
    mesh: DeviceMesh | None,
    speaks: bool,
) -> ActivationSource:
    """This LM rank's copy of the model, or its shard of one, as ``topology.lm`` says.

    Args:
        config: of the run.
        widths: hookpoint → width.
        devices: this rank's.
        mesh: the ranks that share the copy.
        speaks: whether this rank says where the weights do not fit.
    """
    # One bar per rank says nothing.
    transformers.utils.logging.disable_progress_bar()
    lm, spread = config.topology.lm, None
    if lm.parallel == "device_map":
        spread = max_memory(devices, lm.max_memory_gib, topology.local_world_size())
    source = ActivationSource(config.model, widths, devices[0], mesh, spread)
    if config.model.compile:
        source.compile()
    if spread is not None and speaks:
        away, whole = bytes_off_device(source.model)
        if away:
            share = f"{away / whole:.0%} of the language model's weights fit on no device"
            print(f"note: {share} and are read from RAM or disk for every forward", file=sys.stderr, flush=True)
    return source


class Run:
    """One rank's life from the process groups on."""

    def __init__(
        self,
        config: RunConfig,
        place: Topology,
        devices: tuple[torch.device, ...],
        specs: list[JobSpec],
        widths: dict[str, int],
        stop: Stop,
        cache: Cache | None = None,
        profile_steps: range | None = None,
        text_may_end: bool = False,
    ):
        self.config = config
        self.place = place
        self.devices = devices
        self.specs = specs
        self.widths = widths
        self.stop = stop
        self.cache = cache
        self.text_may_end = text_may_end
        self.run_dir = Path(config.output_dir)
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self.schedule: Schedule = schedule(config, kept_positions(config.model, config.data))
        self.held: IO[str] | None = None
        self.recorder: profiling.Recorder | None = None
        if profile_steps is not None:
            self.recorder = profiling.Recorder(profile_steps, self.run_dir, place.rank, place.store)

    @property
    def is_main(self) -> bool:
        return self.place.rank == 0

    def say(self, line: str) -> None:
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def stop_asked(self) -> bool:
        """Polled by SAE ranks each step; the main process also speaks for the stop file and for LM ranks."""
        if not self.is_main:
            return self.stop.signalled
        return self.stop.signalled or (self.run_dir / rundir.STOP).exists() or self.place.store.check(["stop_asked"])

    def lm_should_stop(self) -> bool:
        """Polled by LM ranks before each chunk; passes a signal on, and ends once the SAE ranks have agreed to."""
        if self.recorder is not None and self.place.group is None:
            self.recorder.follow()
        if self.stop.signalled:
            self.place.store.set("stop_asked", "1")
        return self.place.store.check(["stopping"])

    def open_run_dir(self) -> Path | None:
        """Locks and checks ``output_dir``, leaving in it what there is; returns the checkpoint to go on from."""

        def take() -> None:
            if self.is_main:
                self.held = rundir.lock(self.run_dir)
                rundir.check(self.config)
                # Of an earlier launch; one that comes from now on, while the model loads, counts.
                (self.run_dir / rundir.STOP).unlink(missing_ok=True)

        agree(take)
        agree_on_folder(self.run_dir, self.is_main, "output_dir")

        def join(problems: list[str]) -> list[str]:
            lists: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(lists, problems)
            return [line for part in lists for line in part]

        return rundir.find_checkpoint(self.config, (self.place.rank, dist.get_world_size()), join, self.say)

    def train(self) -> bool:
        """The whole run; False if it was asked to stop before its end. ``UserError`` if the text ended too early."""
        found = self.open_run_dir()
        stream: dict[str, Any] = {"chunks_inserted": 0, "rows_inserted": 0, "cursor": None}
        if found is not None:
            stream = checkpoint.read_meta(found)["stream"]
        start = Start(stream["chunks_inserted"], stream["rows_inserted"])
        runs_lm = self.cache is None and self.place.plan.replica_of(self.place.rank) is not None

        def prepare_saes() -> Trainer | None:
            if self.place.group is None:
                return None
            trainer = Trainer(self.config, self.specs, self.widths, self.schedule, self.place, self.dtype)
            if found is None:
                trainer.start()
            else:
                trainer.load(found)
            return trainer

        def prepare_lm() -> tuple[Any, ActivationSource | None]:
            chunks, source = None, None
            if runs_lm:
                chunks = iter(open_chunks(self.config.data, self.config.model, stream["cursor"]))
                source = open_model(self.config, self.widths, self.devices, self.place.lm_mesh, self._speaks_for_lm)
            return chunks, source

        # First what a user may have got wrong and is soon found out, then the model.
        trainer = agree(prepare_saes)
        cached = agree(lambda: self._open_cache(start))
        held_out = self._read_held_out()
        chunks, source = agree(prepare_lm)
        evaluation = self._open_evaluation(held_out, trainer, source, found)
        if self.recorder is not None and source is not None:
            profiling.name_range(source, "capture", "LM forward")
        self._begin(found)
        forwarded: Sender | ColocatedExchange | None
        if trainer is None:
            assert source is not None
            forwarded = Sender(self.place, self.widths, self.schedule, self.dtype)
            if self.recorder is not None:
                profiling.name_range(forwarded, "send", "send")
            self._run_lm(source, forwarded, start, chunks, evaluation)
        elif source is None:
            received = cached or Receiver(self.place, self.widths, self.schedule, self.dtype, start)
            self._train_saes(trainer, received, evaluation)
            forwarded = None
        else:
            forwarded = ColocatedExchange(self.place, self.widths, self.schedule, self.dtype, start, chunks, source)
            self._train_saes(trainer, forwarded, evaluation)
        self._wait_for_all()
        if self.recorder is not None:
            self.recorder.end()
        self._summarise(trainer, source, forwarded)
        agree(lambda: self._check_text(trainer))
        return not self.place.store.check(["stopping"])

    def _open_cache(self, start: Start) -> CachedStream | None:
        """The stream of a run from cached activations, every shard that it needs read once by one of the ranks."""
        if self.cache is None:
            return None
        stream = CachedStream(self.cache, self.place, self.schedule, start)
        self.cache.verify(stream.shards[self.place.rank :: dist.get_world_size()], self.is_main)
        return stream

    @property
    def _speaks_for_lm(self) -> bool:
        return self.place.plan.replica_of(self.place.rank) == 0

    def _begin(self, found: Path | None) -> None:
        """Makes the folder this run's, once nothing that the user wrote can be wrong any more."""
        if found is not None:
            self.say(how_it_goes_on(found))
        if self.is_main:
            rundir.record(self.config)
            if found is not None and found.parent.resolve() == (self.run_dir / "checkpoints").resolve():
                rundir.set_aside_newer(self.run_dir, found)

    def _read_held_out(self) -> list[Batch] | None:
        """The text of evaluations during the run, the same on all ranks; None where there are to be none."""
        settings = self.config.evaluation
        if settings.every_steps is None:
            return None
        reader = self.place.plan.lm[0][0]
        read = [agree(lambda: batches(self.config, settings.tokens) if self.place.rank == reader else None)]
        dist.broadcast_object_list(read, reader)
        return read[0]

    def _open_evaluation(
        self, data: list[Batch] | None, trainer: Trainer | None, source: ActivationSource | None, found: Path | None
    ) -> Evaluation | None:
        """This rank's part in evaluations. Where activations come from a cache, the model is here for them alone."""
        if data is None:
            return None
        if self.cache is not None:
            source = agree(lambda: open_model(self.config, self.widths, self.devices, None, self._speaks_for_lm))
        start_step = 0 if found is None else checkpoint.read_meta(found)["step"]
        jobs = [] if trainer is None else trainer.jobs
        evaluation = Evaluation(
            self.config.evaluation,
            self.place,
            self.specs,
            self.schedule,
            data,
            start_step,
            source,
            jobs,
            self.widths,
            self.dtype,
        )
        agree(evaluation.prepare)
        return evaluation

    def _run_lm(
        self,
        source: ActivationSource,
        sender: Sender,
        start: Start,
        chunks: Iterator[Chunk],
        evaluation: Evaluation | None,
    ) -> None:
        """What a dedicated LM rank does until the training ends."""
        if evaluation is None:
            produce(self.place, source, sender, self.schedule, start, chunks, self.lm_should_stop)
            return
        follow = partial(evaluation.follow, stop_asked=self.lm_should_stop)
        produce(self.place, source, sender, self.schedule, start, chunks, self.lm_should_stop, follow)
        evaluation.follow_to_end(self.lm_should_stop)

    def _train_saes(self, trainer: Trainer, stream: Stream, evaluation: Evaluation | None) -> None:
        writer = None
        if self.is_main:
            settings = self.config.logging
            writer = MetricsWriter(
                self.run_dir, settings, self.schedule.steps, self.schedule.batch, trainer.step, to_dict(self.config)
            )
        with writer or nullcontext():
            with trainer.snapshots:
                evaluate = None if evaluation is None else evaluation.after_step
                stopped = trainer.fit(stream, self._between_steps(trainer, stream), writer, evaluate)
            if self.recorder is not None:
                self.recorder.end()
        if stopped:
            if self.is_main:
                self.place.store.set("stopping", "1")
            self.say(f"stopped at step {trainer.step} as asked; the same command goes on from there")
        if evaluation is not None:
            evaluation.end()
        stream.close()

    def _between_steps(self, trainer: Trainer, stream: Stream) -> Callable[[], bool]:
        """What SAE ranks call before each step: whether a stop was asked for, and where they record, that it is one."""
        recorder = self.recorder
        if recorder is None:
            return self.stop_asked
        if trainer.step >= recorder.steps.stop:
            self.say(f"note: --profile_steps: the run goes on at step {trainer.step}, so that nothing is recorded")
        profiling.name_range(stream, "next_chunk", "wait for chunk")
        profiling.name_range(trainer, "save", "checkpoint")
        profiling.name_steps(trainer.jobs)

        def between() -> bool:
            recorder.reach(trainer.step)
            return self.stop_asked()

        return between

    def _wait_for_all(self) -> None:
        """LM ranks end long before the SAE ranks have used up the buffer; a signal to one of them still counts."""
        work = dist.all_reduce(torch.zeros(1), group=self.place.control, async_op=True)
        assert work is not None
        while not work.is_completed():
            self.lm_should_stop()
            time.sleep(0.05)
        work.wait()

    def _summarise(
        self, trainer: Trainer | None, source: ActivationSource | None, forwarded: Sender | ColocatedExchange | None
    ) -> None:
        """Writes ``summary.json``: how many tokens the LM ran since launch, and what became of them."""
        mine = {"lm_forward_tokens": 0, "lm_rows_kept": 0}
        # The ranks of one LM replica run the same tokens, so only the first counts them.
        if source is not None and forwarded is not None and self.place.rank in [r[0] for r in self.place.plan.lm]:
            mine = {"lm_forward_tokens": source.forward_tokens, "lm_rows_kept": forwarded.rows_sent}
        counts: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(counts, mine)
        if not self.is_main or trainer is None:
            return
        trained = trainer.step * self.schedule.batch
        summary = {
            "step": trainer.step,
            "steps": self.schedule.steps,
            "launched_at_step": trainer.launched_at_step,
            "rows_trained": trained,
            "rows_in_buffer": trainer.buffer.inserted - trained,
            **{name: sum(count[name] for count in counts) for name in mine},
        }
        (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    def _check_text(self, trainer: Trainer | None) -> None:
        if trainer is None or not trainer.text_ended:
            return
        behind = trainer.rows_left_behind
        lost = f" and {behind} that were lost with shuffle buffers (checkpoint.buffer: refill)" if behind else ""
        found = (
            f"data.dataset: {self.config.data.dataset} gave {trainer.buffer.inserted} rows{lost}, but "
            f"train.training_tokens needs {self.schedule.rows_needed}; all {trainer.step} whole batches were "
            "trained and saved"
        )
        if not self.text_may_end or trainer.step == 0:
            raise UserError(f"{found}. For a longer run give more text, and another output_dir")
        self.say(f"note: {found}")


def set_tf32(allowed: bool) -> None:
    """Whether NVIDIA GPUs multiply float32 in TF32; said either way, as cuDNN does so unless told not to."""
    # Of torch's two ways to say it, which must not be mixed, the one that torch.compile can read back.
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def read_config(path: object, extra: tuple[object, ...], overrides: dict[str, Any]) -> RunConfig:
    """The run's config from the command line's arguments; ``UserError`` for what is none."""
    if extra:
        raise UserError(f"{extra[0]!r} is no option; options look like --train.lr=1e-4")
    if not isinstance(path, str):
        raise UserError("--config: name the YAML file of the run, for example --config configs/quickstart.yaml")
    return load(path, overrides)


def run(path: object, extra: tuple[object, ...], overrides: dict[str, Any], profile_steps: object = None) -> int:
    """Trains; returns this rank's exit code. What a user can put right is one line of one rank."""

    def work(session: Session) -> None:
        config = agree(lambda: read_config(path, extra, overrides))
        train_in(session, config, f"-m scale_sae.train --config {path}", profile_steps)

    return run_command(work)


def train(config: RunConfig) -> bool:
    """Trains from Python what the command trains, on every rank; the same call goes on from the newest checkpoint.

    Returns:
        Whether the run is done; False if SIGTERM or the stop file asked it to stop.

    Raises:
        UserError: on every rank, what the command says in one line.
    """
    with joined() as session:
        return train_in(session, config, sys.argv[0])


def train_in(
    session: Session, config: RunConfig, program: str, profile_steps: object = None, text_may_end: bool = False
) -> bool:
    """The run of ``config`` on the ranks of ``session``; result and errors as for `train`.

    ``program`` is what ``accelerate launch`` starts, for a message that says how. ``text_may_end``: that the text ended
    early is a note, and the run done, if it has trained a batch.
    """
    rank, world_size = session.rank, session.world_size
    set_tf32(config.train.allow_tf32)
    profiled = agree(lambda: profiling.parse_steps(profile_steps, schedule(config, 1).steps))
    agree(lambda: topology.check_world_size(config.topology, world_size, program))
    devices = agree(lambda: topology.pick_devices(config.topology, rank, session.local_rank))
    widths, specs = agree(lambda: resolve(config))
    config = with_rates(config, specs)
    agree(lambda: engine_settings.check_jobs(config.topology, specs))
    cache = agree(lambda: open_cache(config, widths))
    deepspeed = agree(lambda: engine_settings.deepspeed_settings(config.topology, os.environ))
    planned = agree(lambda: topology.plan(config.topology, [spec.planned for spec in specs], config.buffer.lanes))
    # One rank is enough: the check simulates the shards.
    agree(lambda: check_classes(specs, config.topology.sae.tp, devices[0]) if rank == 0 else None)
    evaluates = config.evaluation.every_steps is not None
    place = topology.build(planned, rank, devices[0], session.backend, session.store, deepspeed, evaluates)
    session.pulse.introduce(role_of(planned, rank))
    session.before = "\n"
    run = Run(config, place, devices, specs, widths, session.stop, cache, profiled, text_may_end)
    try:
        return run.train()
    finally:
        if run.held is not None:
            run.held.close()  # another run of this process may take the folder


def help_text() -> str:
    """The usage and every key with its default; ``config_schema.py`` says what each means."""
    example = RunConfig(("model.layers.1",), (SAEEntry(options={"d_sae": 2048, "k": 32}),))
    filled = recipes.fill(example, ()).saes[0].train

    def leaves(tree: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            elif prefix == "train." and name in filled:
                yield f"  --{prefix}{name}={json.dumps(filled[name])}   by the recipe, for this SAE and run"
            else:
                yield f"  --{prefix}{name}={value if isinstance(value, str) else json.dumps(value)}"

    usage = "usage: accelerate launch ... -m scale_sae.train --config C.yaml [--dotted.key=value ...]"
    options = (
        "  --profile_steps=A:B   records steps A to B-1 on every rank, as RUN_DIR/profile/rank<r>.json.gz for Perfetto"
    )
    return "\n".join([usage, options, "", "keys of the config and their defaults:", *leaves(to_dict(example), "")])


def main(config: str | None = None, *extra: object, profile_steps: object = None, **overrides: Any) -> None:
    """Trains the SAEs of a config file; the same command goes on from the newest checkpoint.

    Args:
        config: the YAML file of the run.
        profile_steps: A:B records steps A to B-1 on every rank, as RUN_DIR/profile/rank<r>.json.gz for Perfetto.
        overrides: any key of the config, dotted: --saes.0.k=64 --topology.sae.tp=4 --hookpoints='[model.layers.2]'
    """
    if overrides.keys() & {"help", "h"}:  # Fire hands them over, as it does every flag that is not declared
        print(help_text())
        return
    end_process(run(config, extra, overrides, profile_steps))


if __name__ == "__main__":
    fire.Fire(main)
