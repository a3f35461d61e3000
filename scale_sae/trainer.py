"""The training loop of an SAE rank: fill the buffer, draw a batch, step every SAE of the group, log, checkpoint.

It knows no architecture by name. LM ranks of a dedicated run are driven by ``activations.transport.produce`` instead.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from scale_sae import checkpoint
from scale_sae.activations.buffer import LaneBuffer
from scale_sae.activations.schedule import Schedule
from scale_sae.activations.transport import ReceivedChunk
from scale_sae.collectives import ALONE, NonFiniteError, Ranks
from scale_sae.config import RunConfig
from scale_sae.errors import UserError
from scale_sae.interleave import Interleaver
from scale_sae.job_trainer import JobTrainer, ends_window, new_sae
from scale_sae.jobs import JobSpec
from scale_sae.metrics import MetricsWriter, Stopwatch, to_floats
from scale_sae.optim import learning_rate
from scale_sae.snapshots import Position, Snapshots
from scale_sae.topology import Topology

# A row whose norm is more than this many times the batch's median is left out: massive activations, which some models
# have at a few positions, would otherwise be most of the loss.
OUTLIER_RATIO = 10.0
# The share of non-finite rows that ends a run: more is no accident of one position but a broken model or dtype.
NON_FINITE_LIMIT = 1e-3
# A share is only meaningful of so many rows: a handful in the first batch may stay the only ones.
NON_FINITE_ROWS = 100_000
# After this many skipped updates an SAE is taken for diverged and is not trained on.
SKIP_LIMIT = 100


def too_many_non_finite(bad: int, rows: int) -> bool:
    """Whether a run ends because ``bad`` of its ``rows`` so far are NaN or infinite."""
    return bad > NON_FINITE_LIMIT * max(rows, NON_FINITE_ROWS)


class Stream(Protocol):
    """Where chunks come from: ``transport.Receiver`` or ``transport.ColocatedExchange``."""

    def next_chunk(self) -> ReceivedChunk | None: ...

    def close(self) -> None: ...


def largest_usable_norm(norms: Tensor) -> Tensor:
    """What the norm of a row may be, scalar: ``OUTLIER_RATIO`` times the median of those that are finite."""
    return OUTLIER_RATIO * torch.where(norms.isfinite(), norms, torch.nan).nanmedian()


def usable_rows(x: Tensor, dp: Ranks = ALONE) -> tuple[Tensor, Tensor, Tensor]:
    """(bool [B]: which rows of the batch count, count of non-finite rows, count of outlier rows).

    ``x [B / dp, d_in]`` are this dp rank's rows. A function of the batch alone, so that all shards agree without a
    message; dp ranks tell each other the norms.
    """
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    norms = dp.all_gather(norms).flatten()
    finite = torch.isfinite(norms)
    usable = finite & (norms <= largest_usable_norm(norms))
    return usable, (~finite).sum(), (finite & ~usable).sum()


class Trainer:
    """An SAE rank's run: its jobs, its lanes of the buffer, and where the stream stands."""

    def __init__(
        self,
        config: RunConfig,
        specs: Sequence[JobSpec],
        widths: Mapping[str, int],
        schedule: Schedule,
        topology: Topology,
        dtype: torch.dtype,
    ):
        assert topology.group is not None and topology.sae_control is not None
        self.config = config
        self.specs = specs
        self.schedule = schedule
        self.topology = topology
        self.group = topology.group
        self.control = topology.sae_control
        self.run_dir = Path(config.output_dir)
        self.jobs = [
            JobTrainer(
                specs[i],
                new_sae(specs[i], topology.shard, topology.device, config.seed),
                schedule.steps,
                topology.dp_mesh,
                topology.deepspeed,
            )
            for i in self.group.jobs
        ]
        for job in self.jobs:
            job.sae.pre_activation_bytes = config.topology.pre_activation_mib * 2**20
        lanes = topology.plan.lane_block(self.group, topology.rank)
        own_widths = {name: widths[name] for name in self.group.hookpoints}
        self.buffer = LaneBuffer(own_widths, lanes, schedule, config.seed, dtype, topology.device)
        # What gives the next batch, by hookpoint: its rows are in the buffer yet, and on their way to the shards.
        self.ahead: dict[str, Callable[[], Tensor]] = {}
        self.cursor: dict[str, Any] = {}
        self.chunks_inserted = 0
        # Rows that were lost with the buffers of checkpoints without one.
        self.rows_left_behind = 0
        self.step = 0
        self.saved_step: int | None = None
        # Diverged SAEs that were spoken of.
        self.reported: list[str] = []
        # Whether the text gave fewer rows than the run needs.
        self.text_ended = False
        # Rows that were left out so far: [non-finite, outliers] per hookpoint.
        self.left_out = {name: torch.zeros(2, dtype=torch.int64, device=topology.device) for name in own_widths}
        self.snapshots = Snapshots(config, specs, topology, self.jobs, self.buffer, self.left_out)
        # The collectives of one SAE pass while another computes.
        self.interleaver = Interleaver(topology.device)
        self.launched_at_step = 0
        self.stopwatch = Stopwatch()
        self.logged_step = 0
        # Whether the last checkpoint was begun by this launch, and wandb has not been given it.
        self.unstored = False

    @property
    def is_main(self) -> bool:
        return self.topology.rank == 0

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(
        self,
        stream: Stream,
        stop_asked: Callable[[], bool],
        writer: MetricsWriter | None,
        evaluate: Callable[[int, bool], Sequence[Mapping[str, Any]]] | None = None,
    ) -> bool:
        """Trains until the run has its steps, the text ends or a stop is asked for; then writes a checkpoint.

        ``stop_asked`` is polled once per step on every rank; what one rank says at step s all ranks heed at s + 1.
        ``writer`` is the main process's. ``evaluate`` is told after each step how many are done, and whether the text
        has ended before the run; what it returns is logged. Returns whether a stop ended it. The caller closes the
        stream.
        """
        self.stopwatch.lap()
        self.logged_step = self.step
        asked: tuple[dist.Work, Tensor] | None = None
        stopped = False
        while self.step < self.schedule.steps:
            if asked is not None:
                asked[0].wait()
                stopped = bool(asked[1].item())
                if stopped:
                    break
            asked = self._announce(stop_asked() or self.snapshots.failed)
            self.text_ended = not self.advance(stream, writer)
            if evaluate is not None:
                # Before the checkpoint: one that goes on from it has the records of its step, and is not to make them.
                self._evaluate(evaluate, writer)
            if self.text_ended:
                break
            if self.step % self.config.checkpoint.every_steps == 0:
                self.save(writer)
        for finish in self.ahead.values():
            finish()
        self.ahead = {}
        self._check_non_finite()
        if self.saved_step != self.step:
            self.save(writer)
        self._store_last(writer)
        return stopped

    def advance(self, stream: Stream, writer: MetricsWriter | None = None) -> bool:
        """One step; False, and none, if the text ends before a whole batch.

        The next step's rows are under way to the shards while this one computes.
        """
        if not self.ahead and not self._look_ahead(stream, self.step):
            return False
        if self.step == 0:
            self._start_from_rows()
        with record_function("wait for the batch"), self.stopwatch.during("activations"):
            rows = {name: finish().flatten(0, 1) for name, finish in self.ahead.items()}
        self.buffer.remove(self.step)
        self.ahead = {}
        if self.step + 1 < self.schedule.steps:
            self._look_ahead(stream, self.step + 1)
        with self.stopwatch.during("training"):
            self._train_step(rows, writer)
        return True

    def _look_ahead(self, stream: Stream, step: int) -> bool:
        """Begins to gather the batch of ``step``, the next to be removed; False if the text ends before it is whole."""
        if not self._fill(stream, step):
            return False
        with record_function("draw"):
            parts = self.buffer.peek(step)
        self.ahead = {name: self.topology.shard.start_all_gather(part) for name, part in parts.items()}
        return True

    def _announce(self, stop: bool) -> tuple[dist.Work, Tensor]:
        flag = torch.tensor([int(stop)])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control, async_op=True)
        assert work is not None
        return work, flag

    def _fill(self, stream: Stream, step: int) -> bool:
        """Inserts exactly the chunks that draw ``step`` waits for; False if the text ends before a whole batch."""
        while self.buffer.inserted < self.schedule.rows_before_draw(step):
            with self.stopwatch.during("activations"):
                chunk = stream.next_chunk()
            if chunk is None:
                return self.buffer.inserted >= (step + 1) * self.schedule.batch
            self.buffer.insert(chunk.rows, chunk.count)
            self.cursor = chunk.cursor
            self.chunks_inserted = chunk.index + 1
        return True

    def _train_step(self, rows: Mapping[str, Tensor], writer: MetricsWriter | None) -> None:
        """One step on ``rows [batch, width]`` of each hookpoint."""
        step = self.step
        every = self.config.logging.log_every_steps
        # Of all SAEs, so that every group logs at the same steps.
        window_ends = any(ends_window(spec.train, step, self.schedule.steps) for spec in self.specs)
        is_logging_step = step == 0 or (step + 1) % every == 0 or window_ends
        usable = {}
        for name, some in rows.items():
            usable[name], non_finite, outliers = usable_rows(some, self.topology.shard.dp)
            self.left_out[name] += torch.stack([non_finite, outliers])
        batches = self._batches(rows, usable)
        jobs = [job for job in self.jobs if not job.frozen]
        steps = [
            partial(job.step, *batches[job.spec.hookpoint, job.spec.target], step, is_logging_step) for job in jobs
        ]
        measured = []
        for job, metrics in zip(jobs, self.interleaver.run(steps, NonFiniteError), strict=True):
            if isinstance(metrics, NonFiniteError):
                # Raised on all shards and dp ranks at once, so they stay in step.
                job.frozen.fill_(True)
            elif metrics:
                measured.append((job, metrics))
        self.step += 1
        if writer is not None:
            writer.advance()
        if is_logging_step:
            self._check_non_finite()
            with self.stopwatch.during("logging"):
                self._log(measured, writer)

    def _batches(
        self, rows: Mapping[str, Tensor], usable: Mapping[str, Tensor]
    ) -> dict[tuple[str, str], tuple[Tensor, Tensor, int]]:
        """(hookpoint, target) → the rows of both that count at both, the same object where they are one; how many.

        The rows are this dp rank's, their number that of all dp ranks.
        """
        pairs = list(dict.fromkeys((job.spec.hookpoint, job.spec.target) for job in self.jobs))
        both = [usable[source] & usable[target] for source, target in pairs]
        dp = self.topology.shard.dp
        own = [mask.view(dp.size, -1)[dp.rank] for mask in both]
        # The one reading of a batch that the host does.
        counts = torch.stack([torch.stack([mask.sum() for mask in masks]) for masks in (both, own)]).t().tolist()
        batches = {}
        for (source, target), mask, (n_rows, count) in zip(pairs, own, counts, strict=True):
            x = rows[source] if count == len(mask) else rows[source][mask]
            y = x if source == target else rows[target] if count == len(mask) else rows[target][mask]
            batches[source, target] = x, y, n_rows
        return batches

    def _start_from_rows(self) -> None:
        """Sets what SAEs take from the rows in the buffer: the factors of their inputs, and b_dec at the mean.

        The buffer's first filling: many rows, none held for this alone, the same whatever the topology. Rows that
        training would leave out are left out.
        """
        norms: dict[str, tuple[Tensor, Tensor]] = {}
        means: dict[tuple[str, str], Tensor] = {}
        for job in self.jobs:
            source, target = job.spec.hookpoint, job.spec.target
            for name in (source, target):
                if name not in norms and (job.scales_inputs or job.starts_at_mean):
                    norms[name] = self._first_norms(name)
            if job.scales_inputs:
                job.set_scales(self._scale(source, norms[source][1]), self._scale(target, norms[target][1]))
            if job.starts_at_mean:
                key = target, str(job.spec.cfg.normalize_activations)
                if key not in means:
                    means[key] = self._first_mean(target, norms[target][0], job.sae.row_norm.normalize)
                job.set_b_dec(means[key])

    def _first_norms(self, name: str) -> tuple[Tensor, Tensor]:
        """Which rows of this rank's lanes count, bool ``[lanes, slots]``, and the norms of all lanes' that do."""
        shard = self.topology.shard
        own = self.buffer.row_norms(name)
        norms = shard.dp.all_gather(shard.all_gather(own)).flatten()
        limit = largest_usable_norm(norms)
        return own <= limit, norms[norms <= limit]

    def _scale(self, name: str, norms: Tensor) -> float:
        """√d_in / mean norm."""
        return float(self.buffer.rows[name].shape[2] ** 0.5 / norms.mean())

    def _first_mean(self, name: str, usable: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of all lanes' rows that count, after ``change``: float64 ``[width]``, the same bits on all ranks."""
        shard = self.topology.shard
        own = self.buffer.sums(name, usable, change)
        sums = shard.dp.all_gather(shard.all_gather(torch.cat([own, usable.sum(1, keepdim=True)], dim=1)))
        total = sums.flatten(0, 2).sum(0)  # in the order of the lanes
        return total[:-1] / total[-1]

    # ---- logging and guards ---------------------------------------------------------------------------------------

    def _log(
        self, measured: Sequence[tuple[JobTrainer, dict[str, Tensor | float]]], writer: MetricsWriter | None
    ) -> None:
        tokens = self.step * self.schedule.batch
        seconds = self.stopwatch.lap()
        rate = (self.step - self.logged_step) * self.schedule.batch / max(sum(seconds.values()), 1e-9)
        self.logged_step = self.step
        records = []
        for job, metrics in measured:
            values = to_floats(metrics)
            non_finite, outliers = self.left_out[job.spec.hookpoint].tolist()
            lr = learning_rate(self.step - 1, self.schedule.steps, job.spec.train)
            records.append(
                {
                    "step": self.step,
                    "tokens": tokens,
                    "sae_id": job.spec.sae_id,
                    **values,
                    "details/current_learning_rate": lr,
                    "details/n_training_samples": tokens,
                    "stream/non_finite_rows": non_finite,
                    "stream/outlier_rows": outliers,
                    "perf/tokens_per_second": rate,
                    **seconds,
                }
            )
            job.frozen.fill_(values["details/skipped_updates"] > SKIP_LIMIT)
        frozen = [job.spec.sae_id for job in self.jobs if job.frozen]
        if self.topology.rank != self.group.ranks[0]:
            records = []
        gathered: list[Any] = [None] * dist.get_world_size(self.control)
        dist.all_gather_object(gathered, (records, frozen), group=self.control)
        # In the order of the config, whichever groups the SAEs are in.
        order = {spec.sae_id: i for i, spec in enumerate(self.specs)}
        all_records = sorted((r for part, _ in gathered for r in part), key=lambda record: order[record["sae_id"]])
        all_frozen = sorted({sae_id for _, ids in gathered for sae_id in ids}, key=order.__getitem__)
        if writer is not None:
            for sae_id in all_frozen:
                if sae_id not in self.reported:
                    writer.say(f"{sae_id} has diverged: its values are no longer finite. It is trained no further")
            if all_records:
                writer.write(self.step, all_records)
        self.reported = all_frozen
        if len(all_frozen) == len(self.specs):
            raise UserError(
                f"train.lr: every SAE has diverged by step {self.step} (non-finite values); lower it, or raise "
                "train.lr_warm_up_steps"
            )

    def _evaluate(
        self, evaluate: Callable[[int, bool], Sequence[Mapping[str, Any]]], writer: MetricsWriter | None
    ) -> None:
        with self.stopwatch.during("evaluation"):
            records = evaluate(self.step, self.text_ended)
        if writer is not None and records:
            writer.write_evaluation(self.step, records)

    def _check_non_finite(self) -> None:
        """``UserError`` if too many rows were NaN or infinite so far; all ranks of the group see the same."""
        rows = self.step * self.schedule.batch
        for name, counts in self.left_out.items():
            bad = int(counts[0])
            if too_many_non_finite(bad, rows):
                raise UserError(
                    f"hookpoints: {bad} of {rows} activations at {name} are NaN or infinite by step {self.step}; try "
                    f"model.dtype: float32 (now {self.config.model.dtype}) or another hookpoint"
                )

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, writer: MetricsWriter | None = None) -> None:
        """Begins a checkpoint of this step, all SAE ranks together; it is written while the training goes on."""
        with self.stopwatch.during("checkpoint"):
            self._store_last(writer)
            self.snapshots.save(Position(self.step, self.chunks_inserted, self.cursor, self.rows_left_behind))
        self.saved_step, self.unstored = self.step, True

    def _store_last(self, writer: MetricsWriter | None) -> None:
        """Waits for the last checkpoint; the main process gives it to wandb before a later one may remove it."""
        self.snapshots.wait()
        if writer is not None and self.unstored:
            writer.store_weights(checkpoint.complete(self.run_dir)[0])
        self.unstored = False

    def start(self) -> None:
        """Begins a new run, from the weights of releases where the config says so. ``UserError`` if they do not fit."""
        for job in self.jobs:
            job.load_release()

    def load(self, folder: Path) -> None:
        """Takes up the run from a complete checkpoint, whatever topology wrote it."""
        position = self.snapshots.load(folder)
        self.chunks_inserted, self.cursor = position.chunks_inserted, position.cursor
        self.rows_left_behind = position.rows_left_behind
        self.step = self.saved_step = self.launched_at_step = position.step
