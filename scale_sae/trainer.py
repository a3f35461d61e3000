"""The training loop of an SAE rank: fill the buffer, draw a batch, step every SAE of the group, log, checkpoint.

It knows no architecture by name. LM ranks of a dedicated run are driven by ``activations.transport.produce`` instead.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae import checkpoint
from scale_sae.activations.buffer import LaneBuffer
from scale_sae.activations.schedule import Schedule
from scale_sae.activations.transport import ReceivedChunk
from scale_sae.collectives import NonFiniteError, Shard
from scale_sae.config import RunConfig, to_dict
from scale_sae.errors import UserError
from scale_sae.jobs import JobSpec
from scale_sae.metrics import MetricsWriter, reconstruction_metrics, to_floats
from scale_sae.optim import Optimizer, learning_rate
from scale_sae.saes import registry
from scale_sae.saes.base import TrainStepInput, TrainStepOutput
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


class Stream(Protocol):
    """Where chunks come from: ``transport.Receiver`` or ``transport.ColocatedExchange``."""

    def next_chunk(self) -> ReceivedChunk | None: ...

    def close(self) -> None: ...


def weigh_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x with unusable rows zeroed, weights [B] of 0 and 1, count of non-finite rows, count of outlier rows).

    A function of the batch ``[B, d_in]`` alone, so that all shards agree without a message.
    """
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    finite = torch.isfinite(norms)
    median = torch.where(finite, norms, torch.nan).nanmedian()
    usable = finite & (norms <= OUTLIER_RATIO * median)
    x = torch.where(usable[:, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x, usable.to(x.dtype), (~finite).sum(), (finite & ~usable).sum()


class JobTrainer:
    """One SAE in training on this rank: its shard, optimizer and counters (all per latent tensors are local rows)."""

    def __init__(self, spec: JobSpec, shard: Shard, device: torch.device, seed: int, total_steps: int):
        self.spec = spec
        self.shard = shard
        self.total_steps = total_steps
        self.sae = registry.create(spec.cfg, shard, device)
        self.sae.initialize(seed, spec.hookpoint)
        self.optimizer = Optimizer(self.sae, shard, spec.train, total_steps)
        rows = shard.rows(spec.cfg.d_sae)
        self.start = rows.start
        n = rows.stop - rows.start
        self.tokens_since_fired = torch.zeros(n, dtype=torch.int64, device=device)
        self.fired_count = torch.zeros(n, dtype=torch.int64, device=device)
        self.window_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.frozen = torch.zeros((), dtype=torch.bool)

    def step(self, x: Tensor, weights: Tensor, step: int, is_logging_step: bool) -> dict[str, Tensor]:
        """One update on the batch ``x [B, d_in]``; returns the step's metrics (empty unless it logs)."""
        train = self.spec.train
        if step % train.feature_sampling_window == 0:
            self.fired_count.zero_()
            self.window_tokens.zero_()
        dead = self.tokens_since_fired > train.dead_feature_window_tokens
        # No latent can be dead before the window has passed once, and this is known without asking the device.
        may_be_dead = step * train.train_batch_size_tokens > train.dead_feature_window_tokens
        num_dead = int(self.shard.all_reduce(dead.sum())) if may_be_dead else 0
        output = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                dead_neuron_mask=dead,
                coefficients={},
                n_training_steps=step,
                is_logging_step=is_logging_step,
                row_weights=weights,
                num_dead=num_dead,
            )
        )
        grad_norm = self.optimizer.step(output.loss, step)
        self._count(output, weights)
        if not is_logging_step:
            return {}
        return self._metrics(output, weights, grad_norm, dead)

    def _count(self, output: TrainStepOutput, weights: Tensor) -> None:
        rows = (weights > 0).sum()  # not the sum of weights, which bfloat16 would round
        self.tokens_since_fired += rows
        self.tokens_since_fired.masked_fill_(output.fired, 0)
        self.fired_count += output.fire_counts
        self.window_tokens += rows

    def _metrics(self, output: TrainStepOutput, weights: Tensor, grad_norm: Tensor, dead: Tensor) -> dict[str, Tensor]:
        usable = weights > 0
        sums = self.shard.all_reduce(torch.stack([dead.sum(), self.tokens_since_fired.sum()]))
        return {
            "losses/overall_loss": output.loss,
            **{f"losses/{name}": value for name, value in output.losses.items()},
            **reconstruction_metrics(output.sae_in, output.sae_out, weights),
            "metrics/l0": (output.l0 * usable).sum() / usable.sum().clamp(min=1),
            **{f"metrics/{name}": value for name, value in output.metrics.items()},
            "sparsity/dead_features": sums[0],
            "sparsity/mean_tokens_since_fired": sums[1] / self.spec.cfg.d_sae,
            "details/grad_norm": grad_norm,
            "details/skipped_updates": self.optimizer.skipped,
        }

    def row_tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds of this shard's latents: dim 0 is the latent."""
        parameters = {n: p.data for n, p in self.sae.named_parameters() if n not in self.sae.replicated}
        counters = {"tokens_since_fired": self.tokens_since_fired, "fired_count": self.fired_count}
        return {**parameters, **self.optimizer.row_tensors(), **counters}

    def replicated_tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds once per SAE."""
        parameters = {n: p.data for n, p in self.sae.named_parameters() if n in self.sae.replicated}
        counters = {"window_tokens": self.window_tokens, "frozen": self.frozen}
        return {**parameters, **self.optimizer.replicated_tensors(), **counters}

    def check_replicas(self) -> None:
        """``RuntimeError`` unless the replicated parameters are bit for bit the same on all shards."""
        for name in sorted(self.sae.replicated):
            value = self.sae.get_parameter(name).data
            if not torch.equal(self.shard.all_reduce(value, "max"), self.shard.all_reduce(value, "min")):
                raise RuntimeError(
                    f"{self.spec.sae_id}: {name} differs between the shards; this is a defect, please report it"
                )


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
            JobTrainer(specs[i], topology.shard, topology.device, config.seed, schedule.steps) for i in self.group.jobs
        ]
        lanes = topology.plan.lane_block(self.group, topology.rank)
        own_widths = {name: widths[name] for name in self.group.hookpoints}
        self.buffer = LaneBuffer(own_widths, lanes, schedule, config.seed, dtype, topology.device)
        self.cursor: dict[str, Any] = {}
        self.chunks_inserted = 0
        self.step = 0
        self.saved_step: int | None = None
        # Diverged SAEs that were spoken of.
        self.reported: list[str] = []
        # Whether the text gave fewer rows than the run needs.
        self.text_ended = False
        # Rows that were left out so far: [non-finite, outliers] per hookpoint.
        self.left_out = {name: torch.zeros(2, dtype=torch.int64, device=topology.device) for name in own_widths}
        self.launched_at_step = 0
        self.clock = (time.monotonic(), 0)

    @property
    def is_main(self) -> bool:
        return self.topology.rank == 0

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(self, stream: Stream, stop_asked: Callable[[], bool], writer: MetricsWriter | None) -> bool:
        """Trains until the run has its steps, the text ends or a stop is asked for; then writes a checkpoint.

        ``stop_asked`` is polled once per step on every rank; what one rank says at step s all ranks heed at s + 1.
        ``writer`` is the main process's. Returns whether a stop ended it. The caller closes the stream.
        """
        self.clock = (time.monotonic(), self.step)
        asked: tuple[dist.Work, Tensor] | None = None
        stopped = False
        while self.step < self.schedule.steps:
            if asked is not None:
                asked[0].wait()
                stopped = bool(asked[1].item())
                if stopped:
                    break
            asked = self._announce(stop_asked())
            self.text_ended = not self._fill(stream)
            if self.text_ended:
                break
            self._train_step(writer)
            if self.step % self.config.checkpoint.every_steps == 0:
                self.save()
        self._check_non_finite()
        if self.saved_step != self.step:
            self.save()
        return stopped

    def _announce(self, stop: bool) -> tuple[dist.Work, Tensor]:
        flag = torch.tensor([int(stop)])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control, async_op=True)
        assert work is not None
        return work, flag

    def _fill(self, stream: Stream) -> bool:
        """Inserts exactly the chunks that draw ``self.step`` waits for; False if the text ends before a whole batch."""
        while self.buffer.inserted < self.schedule.rows_before_draw(self.step):
            chunk = stream.next_chunk()
            if chunk is None:
                return self.buffer.inserted >= (self.step + 1) * self.schedule.batch
            self.buffer.insert(chunk.rows, chunk.count)
            self.cursor = chunk.cursor
            self.chunks_inserted = chunk.index + 1
        return True

    def _train_step(self, writer: MetricsWriter | None) -> None:
        step = self.step
        every = self.config.logging.log_every_steps
        is_logging_step = step == 0 or (step + 1) % every == 0 or step + 1 == self.schedule.steps
        batch = {}
        for name, rows in self.buffer.draw(step).items():
            x, weights, non_finite, outliers = weigh_rows(self.topology.shard.all_gather(rows).flatten(0, 1))
            self.left_out[name] += torch.stack([non_finite, outliers])
            batch[name] = x, weights
        measured = []
        for job in self.jobs:
            if job.frozen:
                continue
            x, weights = batch[job.spec.hookpoint]
            dtype = job.sae.b_dec.dtype
            try:
                measured.append((job, job.step(x.to(dtype), weights.to(dtype), step, is_logging_step)))
            except NonFiniteError:
                # Raised on all shards at once, so they stay in step.
                job.frozen.fill_(True)
        self.step += 1
        if writer is not None:
            writer.advance()
        if is_logging_step:
            self._check_non_finite()
            self._log(measured, writer)

    # ---- logging and guards ---------------------------------------------------------------------------------------

    def _log(self, measured: Sequence[tuple[JobTrainer, dict[str, Tensor]]], writer: MetricsWriter | None) -> None:
        tokens = self.step * self.schedule.batch
        now = time.monotonic()
        rate = (self.step - self.clock[1]) * self.schedule.batch / max(now - self.clock[0], 1e-9)
        self.clock = (now, self.step)
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
                }
            )
            job.frozen.fill_(values["details/skipped_updates"] > SKIP_LIMIT)
        frozen = [job.spec.sae_id for job in self.jobs if job.frozen]
        if self.topology.shard.rank != 0:
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

    def _check_non_finite(self) -> None:
        """``UserError`` if too many rows were NaN or infinite so far; all ranks of the group see the same."""
        rows = self.step * self.schedule.batch
        for name, counts in self.left_out.items():
            bad = int(counts[0])
            if bad > NON_FINITE_LIMIT * max(rows, NON_FINITE_ROWS):
                raise UserError(
                    f"hookpoints: {bad} of {rows} activations at {name} are NaN or infinite by step {self.step}; try "
                    f"model.dtype: float32 (now {self.config.model.dtype}) or another hookpoint"
                )

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of this step, all SAE ranks together. It appears complete or not at all."""
        for job in self.jobs:
            job.check_replicas()
        if self.is_main:
            checkpoint.begin(self.run_dir, self.step)
        dist.barrier(self.control)
        aside = checkpoint.aside(self.run_dir, self.step)
        digests: dict[str, checkpoint.Digest] = {}
        for job in self.jobs:
            folder = checkpoint.sae_folder(aside, job.spec.sae_id)
            digests |= checkpoint.save_rows(aside, folder, job.row_tensors(), job.start)
            if self.topology.shard.rank == 0:
                digests |= checkpoint.save_replicated(aside, folder, job.replicated_tensors())
        for name, lanes in self.buffer.state().items():
            if self._owns(name):
                folder = checkpoint.stream_folder(aside, name)
                digests |= checkpoint.save_rows(aside, folder, {"lanes": lanes}, self.buffer.lanes.start)
                if self.topology.rank == self.group.ranks[0]:
                    digests |= checkpoint.save_replicated(aside, folder, {"left_out": self.left_out[name]})
        gathered: list[Any] | None = [None] * dist.get_world_size(self.control) if self.is_main else None
        dist.gather_object(digests, gathered, dst=0, group=self.control)
        if gathered is not None:
            merged = {path: digest for part in gathered for path, digest in part.items()}
            checkpoint.seal(aside, merged, self._meta())
            checkpoint.prune(self.run_dir, self.config.checkpoint.keep)
        dist.barrier(self.control)
        self.saved_step = self.step

    def _owns(self, hookpoint: str) -> bool:
        """Whether this group is the one that saves the lanes of ``hookpoint``: the first that has it."""
        return next(g.index for g in self.topology.plan.groups if hookpoint in g.hookpoints) == self.group.index

    def _meta(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.step * self.schedule.batch,
            "config": to_dict(self.config),
            "jobs": [spec.to_dict() for spec in self.specs],
            "stream": {
                "chunks_inserted": self.chunks_inserted,
                "rows_inserted": self.buffer.inserted,
                "cursor": self.cursor,
            },
        }

    def load(self, folder: Path) -> None:
        """Takes up the run from a complete checkpoint, whatever topology wrote it."""
        meta = checkpoint.read_meta(folder)
        for job in self.jobs:
            saved = checkpoint.sae_folder(folder, job.spec.sae_id)
            checkpoint.load_rows(saved, job.row_tensors(), job.start)
            checkpoint.load_replicated(saved, job.replicated_tensors())
        block = self.buffer.lanes
        stream = meta["stream"]

        def read(name: str) -> Tensor:
            return checkpoint.read_rows(checkpoint.stream_folder(folder, name), "lanes", block.start, block.stop)

        self.buffer.restore(read, stream["rows_inserted"], meta["step"])
        for name, counts in self.left_out.items():
            checkpoint.load_replicated(checkpoint.stream_folder(folder, name), {"left_out": counts})
        self.chunks_inserted, self.cursor = stream["chunks_inserted"], stream["cursor"]
        self.step = self.saved_step = self.launched_at_step = meta["step"]
