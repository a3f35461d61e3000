"""Evaluation while a run trains: every SAE, as it would be released now, on the same held-out text each time.

All ranks take part. Of P copies of the language model, copy p takes every P-th batch of the text. For each of them

1. the copy's ranks forward it and send its kept rows to the SAE ranks of every group, cut evenly over these;
2. for one SAE after the other, the tp ranks of its group join the rows of their dp rank, reconstruct them, add to the
   sums from which the figures follow, and send the reconstruction back;
3. the copy's ranks forward it again with that reconstruction in its place, and sum what the model loses.

At last rank 0 puts the figures together. Nothing that trains is touched.

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
from scale_sae.held_out import Batch, Clean, HeldOutModel, Losses, WithoutSAE, instead
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
        self.fails = bool(job.frozen)

    @property
    def rows_at_once(self) -> int:
        """Rows whose activations may be dense at once, within ``topology.pre_activation_mib``: some copies exist."""
        return min(ROWS_PER_PART, max(1, self.job.sae.block_rows(self.job.sae.n_local) // 4))

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


@dataclass(frozen=True)
class Share:
    """What an SAE rank has of a batch, in CPU memory, by hookpoint.

    Attributes:
        rows: its own part, ``[n, width]``.
        counts: bool ``[tp · n]``, which rows count of those of all its tp ranks.
    """

    rows: dict[str, Tensor]
    counts: dict[str, Tensor]


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

    def receive(self, numbers: range) -> list[Share]:
        """Waits for this rank's rows of a round's batches, one from each copy of the model."""
        arriving = [self._expect(copy, number) for copy, number in enumerate(numbers)]
        return [take() for take in arriving]

    def _expect(self, copy: int, number: int) -> Callable[[], Share]:
        group = self.group
        share = rows_per_rank(self.data[number], group)
        sender = self.place.plan.sender(copy, group, self.place.rank)
        take_counts = self.mail.expect((len(group.hookpoints), share * len(group.ranks)), torch.uint8, sender)
        parts = {name: self.mail.expect((share, self.widths[name]), self.dtype, sender) for name in group.hookpoints}

        def take() -> Share:
            own = slice(self.dp_rank * group.tp * share, (self.dp_rank + 1) * group.tp * share)
            counts = take_counts()[:, own].bool()
            return Share(
                {name: part() for name, part in parts.items()}, dict(zip(group.hookpoints, counts, strict=True))
            )

        return take

    def reconstruct(self, index: int, sae: JobEvaluation, shares: Sequence[Share]) -> None:
        """Reconstructs a round's rows with one SAE, and sends each copy of the model its batch's."""
        source, target = self.specs[index].hookpoint, self.specs[index].target
        for copy, share in enumerate(shares):
            mask = (share.counts[source] & share.counts[target]).to(self.place.device)
            out = self._joined(share.rows[target])
            y = out[mask]
            x = y if source == target else self._joined(share.rows[source])[mask]
            out[mask] = sae.reconstruct(x, y, math.ceil(len(mask) / sae.rows_at_once))
            n = len(share.rows[target])
            self.mail.send(out[self.place.shard.rank * n :][:n], self.place.plan.lm[copy][0])

    def _joined(self, rows: Tensor) -> Tensor:
        """The rows of this dp rank, of which each of its tp ranks has ``rows``; a tensor of its own."""
        return self.place.shard.all_gather(rows.to(self.place.device)).flatten(0, 1)


class LMSide:
    """What a rank that runs the language model does in evaluations.

    Attributes:
        without_sae: what its copy of the model loses on the batches that are this copy's.
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
        self.without_sae = WithoutSAE(data)

    def prepare(self) -> None:
        """Finds what does not change while SAEs train; and whether a forward with all logits fits at all."""
        if not self.model.predicts:
            return
        for number in range(self.replica, len(self.data), len(self.place.plan.lm)):
            logits = self.model.clean(self.data[number], []).logits
            assert logits is not None
            for target in dict.fromkeys(spec.target for spec in self.specs):
                self.without_sae.find(self.model, number, logits, (target,))

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

    def losses(self, number: int, clean: Clean, masks: Mapping[str, Tensor], index: int) -> Losses | None:
        """What the model loses with an SAE's reconstruction; None where that cannot take its target's place."""
        spec, batch = self.specs[index], self.data[number]
        rows = clean.rows[spec.target]
        y_hat = self._receive(index, batch, rows)
        if clean.logits is None or not clean.reaches(spec.hookpoint, before=spec.target):
            return None
        mask = (masks[spec.hookpoint] & masks[spec.target])[:, None]
        return self.model.losses(batch, clean.logits, {spec.target: instead(torch.where(mask, y_hat, rows))})

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
    """What one rank knows at the end of an evaluation: by SAE, and what the model lost by batch."""

    figures: dict[int, Figures | None]
    with_sae: dict[int, dict[int, Losses]]
    without_sae: dict[tuple[tuple[str, ...], int], Losses]


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
        with_sae: dict[int, dict[int, Losses]] = {index: {} for index in active}
        copies = len(self.place.plan.lm)
        for first in range(0, len(self.data), copies):
            self._round(range(first, min(first + copies, len(self.data))), sound, with_sae)
        figures = {index: sae.figures() for index, sae in saes.items()}
        if self.sae is not None and self.place.rank != self.sae.group.ranks[0]:
            figures = {}
        if self.lm is not None and self.place.rank == self.lm.ranks[0]:
            return self._gather(Part(figures, with_sae, self.lm.without_sae.losses))
        return self._gather(Part(figures, {}, {}))

    def _round(
        self, numbers: range, sound: Mapping[int, JobEvaluation], with_sae: Mapping[int, dict[int, Losses]]
    ) -> None:
        """Evaluates on a batch for each copy of the model, with one SAE after the other.

        Every rank comes to the SAEs in the same order, and goes on when what it sent for one has left: so it holds
        the reconstruction of one SAE at a time, and none waits for what is sent later.
        """
        number, forwarded = 0, None
        if self.lm is not None and numbers.start + self.lm.replica in numbers:
            number = numbers.start + self.lm.replica
            forwarded = self.lm.forward(number)
        shares = [] if self.sae is None else self.sae.receive(numbers)
        self.mail.wait()
        for index, lost in with_sae.items():
            if self.sae is not None and index in sound:
                self.sae.reconstruct(index, sound[index], shares)
            if self.lm is not None and forwarded is not None:
                losses = self.lm.losses(number, *forwarded, index)
                if losses is not None:
                    lost[number] = losses
            self.mail.wait()

    def _gather(self, mine: Part) -> dict[int, Figures]:
        """All figures of each SAE on rank 0, in the order of the config; sums over batches in the order of these."""
        is_main = self.place.rank == 0
        parts: list[Any] | None = [None] * self.place.plan.world_size if is_main else None
        dist.gather_object(mine, parts, group=self.place.evaluation, group_dst=0)
        if parts is None:
            return {}
        without_sae = WithoutSAE(self.data)
        for part in parts:
            without_sae.losses |= part.without_sae
        figures = {index: of for part in parts for index, of in part.figures.items() if of is not None}
        for index in figures:
            lost = {number: of for part in parts for number, of in part.with_sae.get(index, {}).items()}
            figures[index] |= without_sae.figures((self.specs[index].target,), lost)
        return dict(sorted(figures.items()))


def flat(figures: Figures) -> dict[str, Any]:
    """``<section>/<name>`` → value."""
    return {f"{section}/{name}": value for section, part in figures.items() for name, value in part.items()}
