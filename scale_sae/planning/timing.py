"""How long a step takes: what each rank computes and sends, at the rates of its hardware.

An operation takes as long as its arithmetic or its memory traffic, whichever is longer (the roofline model: Williams,
Waterman and Patterson 2009), a message the time of a ring. Left out: checkpoints, evaluations, logging, reading and
tokenising text, loading weights.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from scale_sae.jobs import JobSpec
from scale_sae.planning.flow import Flow
from scale_sae.planning.hardware import Hardware, Link
from scale_sae.planning.shards import SAEShard
from scale_sae.planning.traffic import flows
from scale_sae.planning.work import Work, of_an_sae, of_batches
from scale_sae.planning.workload import Role, Workload
from scale_sae.topology import Group

if TYPE_CHECKING:
    from scale_sae.planning.language_model import LMProfile

# Passes over the rows of a chunk between the model and the messages: picked by position, by lane, put into a message.
PACKING_PASSES = 8


@dataclass(frozen=True)
class Part:
    """A piece of a step of one rank.

    Attributes:
        what: it is.
        seconds: that it takes; below 0 for what other pieces hide.
        flops: of matrix products.
        memory_bytes: read + written.
        link_bytes: that the rank sends or receives.
        formula: how ``seconds`` come about, with the numbers.
    """

    what: str
    seconds: float
    flops: int
    memory_bytes: int
    link_bytes: int
    formula: str


@dataclass(frozen=True)
class Prediction:
    """What a run takes on some hardware.

    Attributes:
        step_seconds: of one step, once the buffer is full.
        sides: "SAE" and "LM" → seconds per step that this side takes on its own.
        parts: a role (as text) → what its step consists of.
        waits: which side waits for which, and how long.
        startup_seconds: of the first filling of the buffer.
        total_seconds: of the run.
        tokens_per_second: that the SAEs train on, all ranks together.
    """

    step_seconds: float
    sides: Mapping[str, float]
    parts: Mapping[str, tuple[Part, ...]]
    waits: str
    startup_seconds: float
    total_seconds: float
    tokens_per_second: float


def predict(
    w: Workload, hardware: Hardware, profile: "LMProfile | None", gpus_per_node: int, dead: int = 0
) -> Prediction:
    """What ``w`` takes on ``hardware``.

    Args:
        w: the run on its topology.
        hardware: of every rank.
        profile: of its language model; None where activations come from a cache.
        gpus_per_node: ranks of a node.
        dead: dead latents of each SAE of the TopK family, in every step, over all shards.
    """
    clock = _Clock(w, hardware, profile, gpus_per_node, dead)
    steps = {role: clock.step_of(role) for role in w.roles()}
    sides: dict[str, float] = {}
    for role, step in steps.items():
        side = "LM" if role.kind == "LM" else "SAE"
        sides[side] = max(sides.get(side, 0.0), step.seconds)
    shared = clock.shared_seconds(steps)
    step_seconds = max(*sides.values(), shared)
    startup = clock.startup_seconds(steps)
    return Prediction(
        step_seconds=step_seconds,
        sides=sides,
        parts={str(role): step.parts for role, step in steps.items()},
        waits=_waits(w, sides, shared, hardware),
        startup_seconds=startup,
        total_seconds=startup + w.schedule.steps * step_seconds,
        tokens_per_second=w.batch / step_seconds,
    )


def _waits(w: Workload, sides: Mapping[str, float], shared: float, hardware: Hardware) -> str:
    """Which side waits, in words."""
    if shared > max(sides.values()):
        return (
            f"all ranks of a node share {hardware.at_once} places to compute in: a step takes {shared * 1e3:.1f} ms, "
            f"not {max(sides.values()) * 1e3:.1f}"
        )
    if "LM" not in sides:
        return (
            "SAE ranks wait for nobody, if the cache is read fast enough"
            if w.config.topology.lm.cache
            else ("no rank waits for another: each runs the language model, then its SAEs")
        )
    ahead = sides["SAE"] - sides["LM"]
    if ahead < 0:
        return (
            f"SAE ranks wait {-ahead * 1e3:.1f} ms of each step for the language model; a higher topology.lm.dp or "
            "topology.lm.tp shortens that"
        )
    return f"ranks of the language model wait {ahead * 1e3:.1f} ms of each step for the SAEs"


@dataclass(frozen=True)
class _Step:
    """One rank's step: its pieces, and which seconds of them are computing and which messages."""

    parts: tuple[Part, ...]
    computing: float
    sending: float

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)


class _Clock:
    """Turns work into seconds on some hardware."""

    def __init__(self, w: Workload, hardware: Hardware, profile: "LMProfile | None", per_node: int, dead: int):
        self.w = w
        self.hardware = hardware
        self.profile = profile
        self.per_node = per_node
        self.dead = dead
        self.on_gpu = hardware.kind == "cuda"
        self.links: dict[tuple[str, bool, int], Link] = {}

    # ---- ranks ------------------------------------------------------------------------------------------------------

    def step_of(self, role: Role) -> _Step:
        """What a rank of ``role`` does in a step."""
        computing: list[Part] = []
        if role.group is not None:
            computing += self._of_saes(role.group)
        if role.runs_lm and self.profile is not None:
            computing += self._of_lm(self.profile)
        computed = sum(part.seconds for part in computing)
        moved = [(flow, self._part_of(flow, role)) for flow in flows(self.w, role, self.profile, self.dead)]
        sending = [part for _, part in moved]
        hidden = self._hidden(role, computed, moved)
        parts = [*computing, *sending]
        if hidden:
            parts.append(Part("messages while others compute", -hidden, 0, 0, 0, "on links that are busy beside"))
        return _Step(tuple(parts), computed, sum(part.seconds for part in sending) - hidden)

    def _of_saes(self, group: Group) -> list[Part]:
        alike: Counter[tuple[str, ...]] = Counter()
        first: dict[tuple[str, ...], JobSpec] = {}
        for spec in self.w.jobs_of(group):
            key: tuple[str, ...] = (spec.architecture, str(spec.cfg), spec.train.moments_dtype)
            alike[key] += 1
            first.setdefault(key, spec)
        work = [of_batches(self.w, group)]
        for key, times in alike.items():
            work += of_an_sae(SAEShard.of(self.w, first[key], group), self.hardware.kind, times, self.dead)
        parts = _joined(self.part(one) for one in work)
        return [*parts, *self._calls(sum(one.calls * one.times for one in work), parts, sum(o.host for o in work))]

    def _of_lm(self, profile: "LMProfile") -> list[Part]:
        chunks = float(self.w.chunks_per_step / len(self.w.plan.lm))
        rate, bandwidth = self.rate(self.w.config.model.dtype), self.hardware.bandwidth
        seconds = sum(max(op.flops / rate, op.bytes / bandwidth) * times for op, times in profile.ops)
        forward = Part(
            "language model",
            chunks * seconds,
            round(chunks * profile.flops),
            round(chunks * profile.bytes),
            0,
            f"{chunks:.4g} chunks x {profile.n_ops} operations, each by its arithmetic or its memory traffic",
        )
        rows, width = chunks * self.w.rows_per_chunk, sum(self.w.widths.values())
        moved = round(PACKING_PASSES * rows * width * self.w.dtype.itemsize)
        packing = Part(
            "rows of chunks",
            moved / bandwidth,
            0,
            moved,
            0,
            f"{PACKING_PASSES} passes over {rows:.0f} rows x {width} x {self.w.dtype.itemsize} bytes",
        )
        return [forward, packing, *self._calls(chunks * profile.n_ops, [forward, packing])]

    def _calls(self, count: float, parts: Sequence[Part], host: float = 0.0) -> list[Part]:
        """What the host adds: all of its time on a CPU; where a GPU works beside it, what is left of it then."""
        seconds = count * self.hardware.overhead + host
        formula = f"{count:.0f} operations x {self.hardware.overhead * 1e6:.1f} us"
        if self.on_gpu:
            seconds = max(0.0, seconds - sum(part.seconds for part in parts))
            formula += ", less what the GPU takes"
        return [Part("calls by the host", seconds, 0, 0, 0, formula)] if seconds else []

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def rate(self, dtype: str) -> float:
        """FLOP/s of matrix products in ``dtype``; of float32, where nothing else is known of it."""
        rates = self.hardware.matrix
        if dtype == "float32" and self.w.config.train.allow_tf32:
            dtype = "tf32"
        return rates.get(dtype, rates["float32"])

    def part(self, work: Work) -> Part:
        """``work`` in seconds."""
        hardware = self.hardware
        moved = work.streamed / hardware.bandwidth + work.gathered / hardware.gather
        if hardware.fresh is not None:
            moved += work.fresh / hardware.fresh
        moved += work.candidates * hardware.candidate
        seconds = max(work.flops / self.rate(work.dtype), moved) if work.flops else moved
        return Part(
            work.what,
            work.times * seconds,
            work.times * work.flops,
            work.times * (work.streamed + work.gathered),
            0,
            work.formula if work.times == 1 else f"{work.times} x ({work.formula})",
        )

    def _part_of(self, flow: Flow, role: Role) -> Part:
        link = self._link(flow, role)
        count = float(flow.count)
        return Part(
            f"{flow.link}: {flow.what}",
            count * link.seconds(flow.op, flow.bytes, flow.ranks),
            0,
            0,
            round(count * flow.bytes),
            f"{count:.4g} x {flow.op} of {flow.bytes} bytes over {flow.ranks} ranks at {link.bandwidth / 1e9:.1f} GB/s",
        )

    def _link(self, flow: Flow, role: Role) -> Link:
        """The slowest link that such calls of ranks of ``role`` use: who waits for it sets the pace of all.

        A ring that passes between nodes enters each through as many of its network cards as it has ranks there.
        """
        intra, inter = self.hardware.intra, self.hardware.inter
        is_ring = flow.op not in ("send", "recv")
        key = (flow.link, is_ring, role.ranks[0])
        if key in self.links:
            return self.links[key]
        nodes = (Counter(rank // self.per_node for rank in ranks) for ranks in self._calls_among(flow.link, role))
        across = (on_nodes for on_nodes in nodes if len(on_nodes) > 1)
        if is_ring:
            cards = min((min(on_nodes.values()) for on_nodes in across), default=0)
            link = Link(min(intra.bandwidth, cards * inter.bandwidth), inter.latency) if cards else intra
        else:
            link = intra if next(across, None) is None else inter
        self.links[key] = link
        return link

    def _calls_among(self, link: str, role: Role) -> Iterator[Sequence[int]]:
        """The ranks of every call over ``link`` in which one of ``role`` takes part, a pair for messages."""
        plan, among = self.w.plan, set(role.ranks)
        groups = [group for group in plan.groups if role.group is None or group.ranks[0] in among]
        if link == "LM tp":
            yield from plan.lm
        elif link == "LM to SAE" and plan.colocated:
            yield plan.sae_ranks  # each sends to every other
        elif link == "LM to SAE":
            for ranks in plan.lm:
                for group in groups:
                    yield from ((ranks[place % len(ranks)], rank) for place, rank in enumerate(group.ranks))
        else:
            for group in groups:
                rows = [group.ranks[first : first + group.tp] for first in range(0, len(group.ranks), group.tp)]
                yield from rows if link == "tp" else zip(*rows, strict=True)

    # ---- what happens at once ---------------------------------------------------------------------------------------

    def _hidden(self, role: Role, computed: float, moved: Sequence[tuple[Flow, Part]]) -> float:
        """Seconds of messages that pass while the rank computes. On CPUs none: their cores carry the messages.

        The next batch travels during a whole step; of several SAEs, the messages of one pass while another computes
        (`interleave`), all but those of the first. Rows that leave a dedicated rank travel while it computes its next
        chunk, and are received ahead; in a colocated run they come while others go. What fsdp2 and deepspeed exchange
        over dp is waited for, and what the ranks of a copy of the language model exchange.
        """
        if not self.on_gpu:
            return 0.0
        ahead = sum(part.seconds for flow, part in moved if _passes_beside(flow, role, self.w.plan.colocated))
        inside = sum(part.seconds for flow, part in moved if flow.link == "tp" and flow.what != "batch")
        if role.group is not None and (jobs := len(role.group.jobs)) > 1:
            ahead += inside * (jobs - 1) / jobs
        ways = [sum(part.seconds for flow, part in moved if flow.op == op) for op in ("send", "recv")]
        return min(ahead, computed) + (min(ways) if self.w.plan.colocated else 0.0)

    def shared_seconds(self, steps: Mapping[Role, _Step]) -> float:
        """The least that a step takes where ranks of a node share its cores: all of their computing, over the cores."""
        at_once = self.hardware.at_once
        if at_once is None:
            return 0.0
        of_rank = {rank: step for role, step in steps.items() for rank in role.ranks}
        slowest = 0.0
        for first in range(0, len(of_rank), self.per_node):
            node = [of_rank[rank] for rank in range(first, min(first + self.per_node, len(of_rank)))]
            computing = sum(step.computing for step in node) / min(at_once, len(node))
            slowest = max(slowest, computing + max(step.sending for step in node))
        return slowest

    def startup_seconds(self, steps: Mapping[Role, _Step]) -> float:
        """Until the buffer is full: the language model alone, at its pace."""
        w = self.w
        if self.profile is None:
            return 0.0
        chunks = math.ceil(w.schedule.rows_before_draw(0) / w.rows_per_chunk)
        rounds = math.ceil(chunks / len(w.plan.lm))
        per_step = float(w.chunks_per_step / len(w.plan.lm))
        role = next(role for role in steps if role.runs_lm)
        computing = sum(part.seconds for part in self._of_lm(self.profile))
        sending = sum(
            self._part_of(flow, role).seconds
            for flow in flows(w, role, self.profile)
            if flow.link in ("LM tp", "LM to SAE")
        )
        at_once = self.hardware.at_once
        if at_once is not None:
            running = Counter(rank // self.per_node for ranks in w.plan.lm for rank in ranks)
            computing *= max(1.0, max(running.values()) / at_once)
        return rounds / per_step * (computing + sending)


def _passes_beside(flow: Flow, role: Role, colocated: bool) -> bool:
    """Whether a message travels while its rank goes on computing, whatever else is trained."""
    return flow.what == "batch" or (flow.link == "LM to SAE" and not colocated)


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Parts of the same name as one, in the order of the first."""
    found: dict[str, Part] = {}
    for part in parts:
        before = found.get(part.what)
        found[part.what] = (
            part
            if before is None
            else replace(
                before,
                seconds=before.seconds + part.seconds,
                flops=before.flops + part.flops,
                memory_bytes=before.memory_bytes + part.memory_bytes,
                formula=f"{before.formula}; {part.formula}",
            )
        )
    return list(found.values())
