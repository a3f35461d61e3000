"""What one rank moves over each link in a step: every call that the code makes, with its formula.

Counted are the calls of a step that does not log, on rows of which none is left out, after the buffer's first filling.
Left out are the small CPU messages that go beside (a flag or a digest per step, tokens among the ranks of a copy of the
model), and what logging, checkpoints and evaluations exchange.
"""

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from scale_sae.activations.transport import HEADER_BYTES
from scale_sae.planning.flow import Flow
from scale_sae.planning.shards import SAEShard, numbers
from scale_sae.planning.workload import Role, Workload
from scale_sae.saes.gated import GatedTrainingSAE
from scale_sae.saes.jumprelu import JumpReLUTrainingSAE
from scale_sae.topology import Group

if TYPE_CHECKING:
    from scale_sae.planning.language_model import LMProfile

__all__ = ["Flow", "flows"]

# DeepSpeed's default for what one all-reduce of gradients carries: elements.
_REDUCE_BUCKET = 500_000_000
_Op = Literal["all_reduce", "all_gather", "reduce_scatter"]


def flows(w: Workload, role: Role, profile: "LMProfile | None", dead: int = 0) -> list[Flow]:
    """All that one rank of ``role`` moves per step: of LM ranks the first, which has the most receivers.

    Args:
        w: the run.
        role: one of ``w.roles()``.
        profile: of the language model; None for ranks that do not run it.
        dead: dead latents of each SAE of the TopK family, over all shards.
    """
    found: list[Flow] = []
    if role.group is not None:
        found += _of_batches(w, role.group)
        for spec in w.jobs_of(role.group):
            found += _of_an_sae(SAEShard.of(w, spec, role.group), dead)
    if w.config.topology.lm.cache is None:
        if w.plan.colocated:
            found += _exchanged(w, role.ranks[0])
        else:
            found += _sent(w, role.ranks[0]) if role.group is None else _received(w, role.group, role.ranks[0])
    if role.runs_lm and profile is not None:
        share = w.chunks_per_step / len(w.plan.lm)
        found += [replace(flow, count=flow.count * share) for flow in profile.flows]
    return _merged(flow for flow in found if flow.bytes and flow.count)


def _merged(found: Iterable[Flow]) -> list[Flow]:
    """Equal calls as one flow, in the order of their first."""
    counts: dict[Flow, Fraction | int] = {}
    for flow in found:
        key = replace(flow, count=0)
        counts[key] = counts.get(key, 0) + flow.count
    return [replace(flow, count=count) for flow, count in counts.items()]


# ---- inside an SAE group ---------------------------------------------------------------------------------------------


class _Link:
    """The calls among the tp or dp ranks of an SAE; none where there is one rank."""

    def __init__(self, name: Literal["tp", "dp"], ranks: int):
        self.name, self.ranks = name, ranks
        self.flows: list[Flow] = []

    def reduce(self, what: str, bytes_: int, formula: str, count: int = 1) -> None:
        """An all-reduce of a tensor of as many bytes."""
        self._add("all_reduce", what, 2 * bytes_, f"2 x {formula}", count)

    def gather(self, what: str, bytes_: int, formula: str, count: int = 1) -> None:
        """An all-gather of as many bytes from each rank."""
        self._add("all_gather", what, self.ranks * bytes_, f"{self.ranks} ranks x {formula}", count)

    def scatter(self, what: str, bytes_: int, formula: str) -> None:
        """A reduce-scatter of a tensor of as many bytes."""
        self._add("reduce_scatter", what, bytes_, formula, 1)

    def _add(self, op: _Op, what: str, bytes_: int, formula: str, count: int) -> None:
        if self.ranks > 1:
            self.flows.append(Flow(self.name, what, op, bytes_, count, self.ranks, formula))


def _of_batches(w: Workload, group: Group) -> list[Flow]:
    """Before the SAEs: each hookpoint's rows to all shards, and every row's norm to all dp ranks."""
    tp, dp = _Link("tp", group.tp), _Link("dp", group.dp)
    rows, own = w.batch // group.dp, w.batch // len(group.ranks)
    size, norm = w.dtype.itemsize, max(4, w.dtype.itemsize)
    for name in group.hookpoints:
        width = w.widths[name]
        tp.gather("batch", own * width * size, f"{own} rows x {width} x {size} bytes")
        dp.gather("norms of rows", rows * norm, f"{rows} rows x {norm} bytes")
    return tp.flows + dp.flows


def _of_an_sae(s: SAEShard, dead: int) -> list[Flow]:
    tp, dp = _Link("tp", s.tp), _Link("dp", s.dp)
    parts = s.aux_parts(dead)
    if s.may_have_dead:
        tp.reduce("count of dead latents", 8, "8 bytes")
    if parts and s.divides_aux:
        tp.reduce("counts of dead latents", 8 * s.levels, f"{s.levels} levels x 8 bytes")
    if s.cfg.apply_b_dec_to_input:
        tp.reduce("gradient of b_dec", s.d_out * s.itemsize, f"{s.d_out} x {s.itemsize} bytes")
    if s.selects == "rows":
        _choice_in_rows(s, int(s.cfg.k), tp, dp)
    elif s.selects == "batch":
        _choice_in_batch(s, tp, dp)
    for part in parts:
        if part > s.k_aux:
            _choice_in_rows(s, s.k_aux, tp, dp)
    _reconstruction(s, len(parts), tp)
    _update(s, tp, dp)
    return tp.flows + dp.flows


def _choice_in_rows(s: SAEShard, k: int, tp: _Link, dp: _Link) -> None:
    """``selection.TopK``: the k best of each row from every shard; whether all scores are finite."""
    tp.gather("best of each row", s.rows * k * s.itemsize, f"{s.rows} rows x k {k} x {s.itemsize} bytes")
    dp.reduce("scores that are not finite", 8, "8 bytes")


def _choice_in_batch(s: SAEShard, tp: _Link, dp: _Link) -> None:
    """``selection.BatchTopK``: a histogram per 16 bits of the dtype, ties of each row, and the smallest choice."""
    wanted = max(s.selected, 1)
    count = 4 if wanted * s.tp * s.dp < 2**31 else 8
    for link in (tp, dp):
        # The sign takes a bit of the first digit; one bin more carries whether all scores are finite.
        link.reduce("histogram of scores", count * (2**15 + 1), f"(2^15 + 1) bins x {count} bytes")
        for _ in range(s.itemsize // 2 - 1):
            link.reduce("histogram of scores", count * 2**16, f"2^16 bins x {count} bytes")
        link.reduce("smallest choice", 8, "8 bytes")
    tp.gather("ties of each row", s.rows * 4, f"{s.rows} rows x 4 bytes")
    dp.gather("ties", 8, "8 bytes")
    dp.reduce("rows of all", 8, "8 bytes")


def _reconstruction(s: SAEShard, aux: int, tp: _Link) -> None:
    """What the shards add up: reconstructions, and of each row the penalties of SAEs that choose nothing."""
    one = s.rows * s.d_out * s.itemsize
    formula = f"{s.rows} rows x {s.d_out} x {s.itemsize} bytes"
    if s.kind == "codes":
        together = s.levels + aux
        tp.reduce("reconstruction", together * one, formula if together == 1 else f"{together} x {formula}")
        return
    own = "" if s.kind == "entries" else "; what a class of one's own sends beside is not known"
    gated, jumps = isinstance(s.sae, GatedTrainingSAE), isinstance(s.sae, JumpReLUTrainingSAE)
    tp.reduce("reconstruction", one, formula + own, 1 + (gated and s.kind == "entries"))
    if s.kind == "entries":
        penalties = 1 + (jumps and s.cfg.pre_act_loss_coefficient is not None)
        tp.reduce(
            "penalty of each row", s.rows * s.wide, f"{s.rows} rows x {s.wide} bytes, in float32 at least", penalties
        )


def _update(s: SAEShard, tp: _Link, dp: _Link) -> None:
    """What engine and optimizer exchange: parameters and gradients over dp, norms, and which latents fired."""
    if s.engine == "fsdp2":
        whole = numbers(s.divided)
        dp.gather("parameters", whole // s.dp * s.itemsize, f"{whole // s.dp} parameters x {s.itemsize} bytes")
        dp.scatter("gradients", whole * s.wide, f"{whole} parameters x {s.wide} bytes, in float32 at least")
    elif s.engine == "deepspeed":
        _deepspeed(s, tp, dp)
    for name, tensor in s.undivided.items():
        dp.gather(f"gradient of {name}", tensor.nbytes, f"{tensor.numel()} x {tensor.itemsize} bytes")
    tp.gather("norm of the gradient", s.wide, f"{s.wide} bytes")
    dp.gather("loss, and norm of the gradient", s.wide, f"{s.wide} bytes", 2)
    dp.reduce("rows on which latents fired", 8 * s.latents, f"{s.latents} latents x 8 bytes")


def _deepspeed(s: SAEShard, tp: _Link, dp: _Link) -> None:
    """ZeRO-1 and ZeRO-2: gradients summed in buckets, parameters gathered one by one."""
    whole = numbers(s.divided)
    buckets = -(-whole // _REDUCE_BUCKET)
    bytes_ = whole * s.wide // buckets
    split = "" if buckets == 1 else f" in {buckets} buckets of about this size"
    dp.reduce("gradients", bytes_, f"{whole // buckets} parameters x {s.wide} bytes{split}", buckets)
    for name, tensor in s.divided.items():
        part = tensor.numel() // s.dp
        dp.gather(f"parameter {name}", part * s.itemsize, f"{part} x {s.itemsize} bytes")
    for link in (tp, dp):
        link.reduce("norm of a parameter's gradient", 4, "4 bytes", len(s.divided))


# ---- from the language model to the SAEs -----------------------------------------------------------------------------


def _message(w: Workload, group: Group, rank: int, name: str) -> tuple[int, str]:
    """Bytes of a chunk's message to ``rank`` for one hookpoint, which has room for the most rows that can come."""
    lanes = len(w.plan.lane_block(group, rank))
    rows, width, size = w.schedule.most_rows(lanes), w.widths[name], w.dtype.itemsize
    return rows * width * size, f"{rows} rows ({lanes} of {w.plan.lanes} lanes) x {width} x {size} bytes"


def _received(w: Workload, group: Group, rank: int) -> list[Flow]:
    """What an SAE rank gets of every chunk, whichever copy of the model forwards it."""
    count, copies = w.chunks_per_step, len(w.plan.lm)
    found = [_header("recv", count, copies)]
    for name in group.hookpoints:
        bytes_, formula = _message(w, group, rank, name)
        found.append(Flow("LM to SAE", "rows of a chunk", "recv", bytes_, count, copies, formula))
    return found


def _sent(w: Workload, rank: int) -> list[Flow]:
    """What an LM rank sends of the chunks of its copy: to every lm.tp-th rank of each SAE group."""
    chunks, found = w.chunks_per_step / len(w.plan.lm), []
    peers = sum(len(w.plan.receivers(rank, group)) for group in w.plan.groups)
    for group in w.plan.groups:
        for receiver in w.plan.receivers(rank, group):
            found.append(_header("send", chunks, peers))
            for name in group.hookpoints:
                bytes_, formula = _message(w, group, receiver, name)
                found.append(Flow("LM to SAE", "rows of a chunk", "send", bytes_, chunks, peers, formula))
    return found


def _header(op: Literal["send", "recv"], count: Fraction, peers: int) -> Flow:
    formula = f"{HEADER_BYTES} bytes, through CPU memory"
    return Flow("LM to SAE", "header of a chunk", op, HEADER_BYTES, count, peers, formula)


def _exchanged(w: Workload, rank: int) -> list[Flow]:
    """A colocated run: a rank forwards one chunk of a round, gives each rank its rows of it, and gets its own."""
    ranks = w.plan.sae_ranks
    own = w.chunks_per_step / len(ranks)
    found = []
    for group in w.plan.groups:
        rows = Fraction(w.rows_per_chunk, len(group.ranks))
        others = len(group.ranks) - (rank in group.ranks)
        for name in group.hookpoints:
            width, size = w.widths[name], w.dtype.itemsize
            bytes_ = round(rows * width * size)
            formula = f"{float(rows):g} rows of a chunk of {w.rows_per_chunk} x {width} x {size} bytes"
            formula += "" if w.rows_per_chunk % w.plan.lanes == 0 else ", in the mean: a lane has a row more or less"
            peers = len(ranks) - 1
            found.append(Flow("LM to SAE", "rows of a chunk", "send", bytes_, own * others, peers, formula))
            if rank in group.ranks:
                found.append(Flow("LM to SAE", "rows of a chunk", "recv", bytes_, own * peers, peers, formula))
    return found
