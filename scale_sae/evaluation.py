"""Evaluation while a run trains: every SAE, as it would be released now, on the same held-out text each time.

All ranks take part. Of P copies of the language model, copy p takes every P-th batch of the text. For each of them

1. the copy's ranks forward it and send its kept rows to the SAE ranks of every group, cut evenly over these;
2. tp ranks join the rows of their dp rank, reconstruct them with every SAE of the group, add to the sums from which the
   figures follow, and send the reconstructions back;
3. the copy's ranks forward it again with each SAE's reconstruction in its place, and sum what the model loses.

At last rank 0 puts the figures together. Nothing that trains is touched: what is fitted for a release is put back.

SAE ranks evaluate between two steps. Dedicated LM ranks run ahead of them, and join the evaluation of step s when they
have sent their first chunk that no draw up to s waits for. The SAE ranks come to s with all earlier chunks, which have
been sent by then, and with a receive posted for just that chunk. So no side waits for what the other sends later, and
while they evaluate nothing is in flight between them: a receive that stays open would hold up whatever synchronises a
GPU. All messages of an evaluation go through CPU memory, over a group of their own.

The n-th evaluation of a launch is announced by the key ``evaluation/<n>`` of the run's store: ``begin``, or ``end``
where none follows, for whatever reason the training ended. LM ranks poll it, so that they hear signals meanwhile.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scale_sae.activations.schedule import Schedule
from scale_sae.activations.source import ActivationSource
from scale_sae.collectives import NonFiniteError
from scale_sae.config import EvaluationConfig
from scale_sae.held_out import Batch, Clean, HeldOutModel, Losses, instead, loss_figures, loss_sums, total
from scale_sae.job_trainer import JobTrainer
from scale_sae.jobs import JobSpec
from scale_sae.reconstruction import ROWS_PER_PART, Figures, Sums, usable
from scale_sae.topology import Group, Topology

# Seconds between two looks of an LM rank whether the SAE ranks have come to an evaluation.
POLL = 0.05


class Mail:
    """CPU tensors from rank to rank. Between two ranks they arrive in the order in which they were sent."""

    def __init__(self, rank: int, group: dist.ProcessGroup):
        self.rank = rank
        self.group = group
        self.own: deque[Tensor] = deque()  # from this rank to itself
        self.sent: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, to: int) -> None:
        """Begins to send ``tensor``, from wherever it is."""
        tensor = tensor.detach().cpu().contiguous()
        if to == self.rank:
            self.own.append(tensor)
            return
        work = dist.isend(tensor, to, group=self.group)
        assert work is not None
        self.sent.append((work, tensor))

    def expect(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Callable[[], Tensor]:
        """Begins to receive a tensor; what it returns waits for it, and is called in the order of the calls of this."""
        if source == self.rank:
            return self.own.popleft
        tensor = torch.empty(*shape, dtype=dtype)
        work = dist.irecv(tensor, source, group=self.group)
        assert work is not None

        def take() -> Tensor:
            work.wait()
            return tensor

        return take

    def wait(self) -> None:
        """Returns when all has left."""
        for work, _ in self.sent:
            work.wait()
        self.sent = []


class JobEvaluation:
    """One SAE in one evaluation, on an SAE rank. All ranks of its group make the same calls.

    Attributes:
        fails: whether it has given NaN or infinite values; no figures then. The same on all ranks of the group.
    """

    def __init__(self, job: JobTrainer):
        self.job = job
        self.sums = Sums(job.sae.d_out, job.sae.n_local, job.window_tokens.device, job.shard)
        self.before = {name: buffer.clone() for name, buffer in job.sae.named_buffers()}
        self.fails = bool(job.frozen)
        self._unless_it_fails(job.fit_for_release)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor, parts: int) -> Tensor:
        """The reconstruction of this dp rank's rows ``x [n, d_in]`` with the targets ``y``, in these' dtype; counted.

        In as many ``parts`` on all dp ranks, with collectives in each. Zeros for an SAE that fails.
        """
        found: list[Tensor] = []

        def work() -> None:
            with self.job.engine.whole(changes=False):
                # One of the parts may be empty, and so may all be.
                for some, targets in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
                    y_hat, acts = self.job.as_released(some)
                    self.sums.add(targets, y_hat, acts)
                    found.append(y_hat.to(y.dtype))

        self._unless_it_fails(work)
        return torch.zeros_like(y) if self.fails else torch.cat(found)

    def figures(self) -> Figures | None:
        """What follows from the sums over all rows; None where there are no figures. Ends its evaluation."""
        for name, buffer in self.job.sae.named_buffers():
            buffer.copy_(self.before[name])
        found: list[Figures] = []
        if not self.fails:
            self.sums.over(self.job.shard.dp, self.sums.sum.device)
            self.fails = not int(self.sums.rows)
        self._unless_it_fails(lambda: found.append(self.sums.figures()))
        return found[0] if found else None

    def _unless_it_fails(self, work: Callable[[], object]) -> None:
        try:
            if not self.fails:
                work()
        except NonFiniteError:
            self.fails = True


class SAESide:
    """What an SAE rank does in evaluations."""

    def __init__(
        self,
        place: Topology,
        specs: Sequence[JobSpec],
        data: Sequence[Batch],
        mail: Mail,
        jobs: Sequence[JobTrainer],
        widths: Mapping[str, int],
        dtype: torch.dtype,
    ):
        assert place.group is not None
        self.place = place
        self.group = place.group
        self.specs = specs
        self.data = data
        self.mail = mail
        self.jobs = dict(zip(place.group.jobs, jobs, strict=True))
        self.widths = widths
        self.dtype = dtype
        self.dp_rank = self.group.ranks.index(place.rank) // self.group.tp

    def reconstruct(self, saes: Mapping[int, JobEvaluation], numbers: range) -> None:
        """Reconstructs the rows of a round's batches, one from each copy of the model, and sends them back."""
        arriving = [self._expect(copy, number) for copy, number in enumerate(numbers)]
        for copy, take in enumerate(arriving):
            rows, masks = take()
            for index, sae in saes.items():
                source, target = self.specs[index].hookpoint, self.specs[index].target
                mask = masks[source] & masks[target]
                x = rows[source][mask]
                y = x if source == target else rows[target][mask]
                out = torch.zeros_like(rows[target])
                out[mask] = sae.reconstruct(x, y, math.ceil(len(mask) / ROWS_PER_PART))
                share = len(out) // self.group.tp
                part = out[self.place.shard.rank * share :][:share]
                self.mail.send(part, self.place.plan.lm[copy][0])

    def _expect(self, copy: int, number: int) -> Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Begins to receive a batch's rows; what it returns waits for this dp rank's: rows and which count, by name."""
        group, device = self.group, self.place.device
        share = rows_per_rank(self.data[number], group)
        sender = self.place.plan.sender(copy, group, self.place.rank)
        take_counts = self.mail.expect((len(group.hookpoints), share * len(group.ranks)), torch.uint8, sender)
        parts = {name: self.mail.expect((share, self.widths[name]), self.dtype, sender) for name in group.hookpoints}

        def take() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            own = slice(self.dp_rank * group.tp * share, (self.dp_rank + 1) * group.tp * share)
            counts = take_counts()[:, own].to(device).bool()
            gather = self.place.shard.all_gather
            rows = {name: gather(part().to(device)).flatten(0, 1) for name, part in parts.items()}
            return rows, dict(zip(group.hookpoints, counts, strict=True))

        return take


class LMSide:
    """What a rank that runs the language model does in evaluations.

    Attributes:
        clean: summed cross-entropy of the model as it is, by batch.
        ablated: the losses with zeros in the place of a target, by target and batch.
    """

    def __init__(
        self, place: Topology, specs: Sequence[JobSpec], data: Sequence[Batch], mail: Mail, source: ActivationSource
    ):
        replica = place.plan.replica_of(place.rank)
        assert replica is not None
        self.place = place
        self.replica = replica
        self.ranks = place.plan.lm[replica]
        self.specs = specs
        self.data = data
        self.mail = mail
        self.model = HeldOutModel(source)
        self.hookpoints = list(dict.fromkeys(name for spec in specs for name in (spec.hookpoint, spec.target)))
        self.clean: dict[int, float] = {}
        self.ablated: dict[tuple[str, int], Losses] = {}

    def prepare(self) -> None:
        """Finds what does not change while SAEs train; and whether a forward with all logits fits at all."""
        if not self.model.predicts:
            return
        for number in range(self.replica, len(self.data), len(self.place.plan.lm)):
            batch = self.data[number]
            logits = self.model.clean(batch, []).logits
            assert logits is not None
            self.clean[number] = loss_sums(logits, batch.tokens, logits).ce
            for target in dict.fromkeys(spec.target for spec in self.specs):
                self.ablated[target, number] = self.model.losses(batch, logits, {target: torch.zeros_like})

    def forward(self, number: int) -> tuple[Clean, dict[str, Tensor]]:
        """The clean forward of a batch, whose rows go to the SAE ranks; and which rows count, by hookpoint."""
        batch = self.data[number]
        clean = self.model.clean(batch, self.hookpoints)
        masks = {name: usable(rows) for name, rows in clean.rows.items()}
        for group in self.place.plan.groups:
            self._send(batch, group, clean.rows, masks)
        return clean, masks

    def _send(self, batch: Batch, group: Group, rows: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Sends a group's ranks which rows count, and to each its part of the rows."""
        share = rows_per_rank(batch, group)
        missing = share * len(group.ranks) - batch.rows
        counts = F.pad(torch.stack([masks[name] for name in group.hookpoints]).to(torch.uint8), (0, missing))
        padded = [F.pad(rows[name], (0, 0, 0, missing)) for name in group.hookpoints]
        for place, rank in enumerate(group.ranks):
            if self.place.plan.sender(self.replica, group, rank) == self.place.rank:
                self.mail.send(counts, rank)
                for whole in padded:
                    self.mail.send(whole[place * share : (place + 1) * share], rank)

    def losses(
        self, number: int, clean: Clean, masks: Mapping[str, Tensor], active: Sequence[int]
    ) -> dict[int, Losses]:
        """What the model loses with each SAE's reconstruction, where that can take its target's place."""
        found = {}
        for index in active:
            spec, batch = self.specs[index], self.data[number]
            rows = clean.rows[spec.target]
            y_hat = self._receive(index, batch, rows)
            if clean.logits is None or not clean.reaches(spec.hookpoint, before=spec.target):
                continue
            mask = (masks[spec.hookpoint] & masks[spec.target])[:, None]
            new = torch.where(mask, y_hat, rows)
            found[index] = self.model.losses(batch, clean.logits, {spec.target: instead(new)})
        return found

    def _receive(self, index: int, batch: Batch, like: Tensor) -> Tensor:
        """The reconstruction by an SAE of a batch's rows, on every rank of this copy of the model."""
        whole = torch.empty_like(like, device="cpu")
        if self.place.rank == self.ranks[0]:
            group = next(group for group in self.place.plan.groups if index in group.jobs)
            shape = rows_per_rank(batch, group), like.shape[1]
            parts = [self.mail.expect(shape, like.dtype, rank) for rank in group.ranks]
            whole = torch.cat([take() for take in parts])[: len(like)].contiguous()
        if len(self.ranks) > 1:
            dist.broadcast(whole, self.ranks[0], group=self.place.lm_control)
        return whole.to(like.device)


def rows_per_rank(batch: Batch, group: Group) -> int:
    """The rows of a batch that go to each rank of a group; the last may have none, and zeros fill them up."""
    return max(1, math.ceil(batch.rows / len(group.ranks)))


@dataclass(frozen=True)
class Part:
    """What one rank knows at the end of an evaluation: by SAE, and by batch what the model lost."""

    figures: dict[int, Figures | None]
    with_sae: dict[tuple[int, int], Losses]
    ablated: dict[tuple[str, int], Losses]
    clean: dict[int, float]


class Evaluation:
    """One rank's part in the evaluations of a run."""

    def __init__(
        self,
        settings: EvaluationConfig,
        place: Topology,
        specs: Sequence[JobSpec],
        schedule: Schedule,
        data: Sequence[Batch],
        start_step: int,
        source: ActivationSource | None,
        jobs: Sequence[JobTrainer],
        widths: Mapping[str, int],
        dtype: torch.dtype,
    ):
        """
        Args:
            settings: how often.
            place: with a group for evaluations.
            specs: all SAEs of the run.
            schedule: of the run.
            data: the held-out text, the same on all ranks.
            start_step: where this launch begins; what was due at that step has been done.
            source: this rank's copy of the model, or its part of one; None on ranks that only train.
            jobs: the SAEs of this rank's group; none on LM ranks.
            widths: of the hookpoints.
            dtype: of their activations.
        """
        assert settings.every_steps is not None and place.evaluation is not None
        self.every = settings.every_steps
        self.place = place
        self.specs = specs
        self.schedule = schedule
        self.data = data
        self.mail = Mail(place.rank, place.evaluation)
        self.lm = None if source is None else LMSide(place, specs, data, self.mail, source)
        self.sae = None
        if place.group is not None:
            self.sae = SAESide(place, specs, data, self.mail, jobs, widths, dtype)
        self.count = 0
        self.last_step = start_step
        self.next_step = self._after(start_step)
        self.ended = False

    def prepare(self) -> None:
        """Does, before training begins, what needs no SAE. All ranks call it."""
        if self.lm is not None:
            self.lm.prepare()

    # ---- when -------------------------------------------------------------------------------------------------------

    def _after(self, step: int) -> int | None:
        """The first step above ``step`` at which an evaluation is due."""
        steps = self.schedule.steps
        return min((step // self.every + 1) * self.every, steps) if step < steps else None

    def after_step(self, step: int, is_last: bool) -> list[dict[str, Any]]:
        """Evaluates on SAE ranks, after ``step`` steps, if it is due: the records of all SAEs on rank 0.

        ``is_last``: no step follows, though the run was to have more.
        """
        if step != self.next_step and not (is_last and step > self.last_step):
            return []
        self._announce("begin")
        results = self._evaluate()
        self.last_step, self.next_step = step, self._after(step)
        where = {"step": step, "tokens": step * self.schedule.batch}
        return [{**where, "sae_id": self.specs[index].sae_id, **flat(figures)} for index, figures in results.items()]

    def end(self) -> None:
        """Says, on SAE ranks, that no evaluation follows."""
        self._announce("end")

    def _announce(self, word: str) -> None:
        if self.place.rank == 0 and not self.place.plan.colocated:
            self.place.store.set(f"evaluation/{self.count}", word)

    def follow(self, sent_row: int, stop_asked: Callable[[], bool]) -> None:
        """Takes part, on LM ranks, in what is due once the chunk that begins at row ``sent_row`` has been sent.

        ``stop_asked`` is called while it waits, to pass signals on.
        """
        while self.next_step is not None and self.schedule.rows_before_draw(self.next_step) <= sent_row:
            if not self._join(stop_asked):
                return

    def follow_to_end(self, stop_asked: Callable[[], bool]) -> None:
        """Takes part, on LM ranks that have sent all, in the evaluations that are left."""
        while self._join(stop_asked):
            pass

    def _join(self, stop_asked: Callable[[], bool]) -> bool:
        """Waits for the SAE ranks to come to the next evaluation, and takes part; False if none follows."""
        key = f"evaluation/{self.count}"
        while not self.ended and not self.place.store.check([key]):
            stop_asked()
            time.sleep(POLL)
        self.ended = self.ended or self.place.store.get(key) == b"end"
        if self.ended:
            return False
        self._evaluate()
        self.next_step = None if self.next_step is None else self._after(self.next_step)
        return True

    # ---- what -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> dict[int, Figures]:
        """Every rank's part in one evaluation. SAE → figures on rank 0, without the SAEs that have none."""
        self.count += 1
        saes = {} if self.sae is None else {index: JobEvaluation(job) for index, job in self.sae.jobs.items()}
        sound = {index: sae for index, sae in saes.items() if not sae.fails}
        everywhere: list[Any] = [None] * self.place.plan.world_size
        dist.all_gather_object(everywhere, list(sound), group=self.place.evaluation)
        active = sorted({index for indices in everywhere for index in indices})
        with_sae: dict[tuple[int, int], Losses] = {}
        copies = len(self.place.plan.lm)
        for first in range(0, len(self.data), copies):
            numbers = range(first, min(first + copies, len(self.data)))
            forwarded = None
            if self.lm is not None and first + self.lm.replica in numbers:
                forwarded = self.lm.forward(first + self.lm.replica)
            if self.sae is not None:
                self.sae.reconstruct(sound, numbers)
            if self.lm is not None and forwarded is not None:
                number = first + self.lm.replica
                losses = self.lm.losses(number, *forwarded, active)
                with_sae |= {(index, number): lost for index, lost in losses.items()}
            self.mail.wait()
        figures = {index: sae.figures() for index, sae in saes.items()}
        if self.sae is not None and self.place.rank != self.sae.group.ranks[0]:
            figures = {}
        if self.lm is not None and self.place.rank == self.lm.ranks[0]:
            return self._gather(Part(figures, with_sae, self.lm.ablated, self.lm.clean))
        return self._gather(Part(figures, {}, {}, {}))

    def _gather(self, mine: Part) -> dict[int, Figures]:
        """All figures of each SAE on rank 0, in the order of the config; sums over batches in the order of these."""
        is_main = self.place.rank == 0
        parts: list[Any] | None = [None] * self.place.plan.world_size if is_main else None
        dist.gather_object(mine, parts, group=self.place.evaluation, group_dst=0)
        if parts is None:
            return {}
        numbers = range(len(self.data))
        figures = {index: of for part in parts for index, of in part.figures.items() if of is not None}
        with_sae = {key: lost for part in parts for key, lost in part.with_sae.items()}
        ablated = {key: lost for part in parts for key, lost in part.ablated.items()}
        clean = {number: ce for part in parts for number, ce in part.clean.items()}
        for index in figures:
            if (index, 0) not in with_sae:
                continue
            lost = total([with_sae[index, number] for number in numbers])
            zeroed = total([ablated[self.specs[index].target, number] for number in numbers])
            figures[index] |= loss_figures(self.data, sum(clean[number] for number in numbers), lost, zeroed)
        return dict(sorted(figures.items()))


def flat(figures: Figures) -> dict[str, Any]:
    """``<section>/<name>`` → value."""
    return {f"{section}/{name}": value for section, part in figures.items() for name, value in part.items()}
