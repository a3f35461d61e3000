"""What one rank's memory holds at its fullest, item by item.

The tensors of a training step on rows of which one is left out, so that those that count are copied. Left out: the
process itself, libraries' workspaces and what an allocator leaves between tensors; evaluations; beside a GPU, the CPU
memory, where checkpoints are copied to. Of what takes turns in time only the fullest counts: the phases of a step, and
in a colocated run the forward pass of the language model.
"""

import os
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from scale_sae.engine_settings import deepspeed_settings
from scale_sae.planning.shards import SAEShard, numbers
from scale_sae.planning.step_memory import Item, Kind, Phase, step_phases, total
from scale_sae.planning.workload import Role, Workload
from scale_sae.topology import Group

if TYPE_CHECKING:
    from scale_sae.planning.language_model import LMProfile

__all__ = ["Item", "items"]

# In this order they are shown.
_ORDER = (
    "LM weights",
    "LM activations",
    "SAE parameters",
    "gradients",
    "optimizer state",
    "codes",
    "reconstructions",
    "pre-activations",
    "batch",
    "buffer",
    "transport",
    "checkpoint",
    "counters and rest",
    "allocator",
)
# DeepSpeed's default for the elements that one of its buffers of gradients holds.
_BUCKET = 500_000_000
_BUFFER_KEYS = ("buffer.tokens", "topology.sae.tp", "topology.sae.dp", "topology.sae.groups")


def items(w: Workload, role: Role, profile: "LMProfile | None", kind: Kind, dead: int = 0) -> list[Item]:
    """What a rank of ``role`` holds, on its device or in the CPU's memory where it has none.

    Args:
        w: the run.
        role: one of ``w.roles()``.
        profile: of the language model; None for ranks that do not run it.
        kind: of device.
        dead: dead latents of each SAE of the TopK family, over all shards. AuxK takes most from d_out / 2 of them on.

    Returns:
        Items of different names, whose sum is the rank's memory; none of 0 bytes.
    """
    held: Phase = []
    forward: Phase = []
    steps: list[Phase] = []
    if profile is not None:
        # Only ranks of their own can share it.
        keys = ("topology.lm",) if w.plan.colocated else ("topology.lm.tp", "topology.lm.parallel")
        text = f"a rank's part of {profile.weights_whole} bytes over {profile.tp} ranks"
        held.append(Item("LM weights", profile.weights, text, (*keys, "model.dtype")))
        forward = _capture(w, role, profile)
    if role.group is None:
        held.append(_sending(w, role.ranks[0]))
    else:
        shards = [SAEShard.of(w, spec, role.group) for spec in w.jobs_of(role.group)]
        held += _kept(w, role.group, shards, kind)
        held += _transported(w, role)
        steps = _steps(w, shards, kind, dead)
    step = max(steps, key=total, default=[])
    if kind == "cpu":
        text = "freed memory that the C library keeps in pieces: measured, about as much as is in use at a time"
        kept = Item(
            "allocator", total([*forward, *step]), text, ("train.train_batch_size_tokens", "data.chunk_contexts")
        )
        return _joined([*held, *forward, *step, kept])
    return _joined([*held, *max(forward, step, key=total)])


def _joined(found: Phase) -> list[Item]:
    """Items of one name as one, in their order."""
    result = []
    for what in _ORDER:
        parts = [item for item in found if item.what == what and item.bytes]
        if parts:
            keys = tuple(dict.fromkeys(key for item in parts for key in item.keys))
            texts = Counter(item.formula for item in parts)
            formula = "; ".join(text if times == 1 else f"{times} x ({text})" for text, times in texts.items())
            result.append(Item(what, total(parts), formula, keys))
    return result


# ---- the language model ----------------------------------------------------------------------------------------------


def _capture(w: Workload, role: Role, profile: "LMProfile") -> Phase:
    keys = ("data.chunk_contexts", "data.context_size", "topology.lm.tp")
    text = f"forward pass of a chunk, {profile.captured} of them its activations at the hookpoints"
    found = [Item("LM activations", profile.peak, text, keys)]
    if role.group is not None:
        # The rows for others are copied when the forward pass is done, which holds less by then.
        sent = _outgoing(w, role.group)
        more = max(0, profile.captured + sent.bytes - profile.peak)
        found.append(Item("transport", more, sent.formula, sent.keys))
    return found


def _outgoing(w: Workload, own: Group) -> Item:
    """What a rank of a colocated run copies of its chunk for the others."""
    rows = w.rows_per_chunk
    width = sum(w.widths[name] for group in w.plan.groups for name in group.hookpoints)
    width -= sum(w.widths[name] for name in own.hookpoints) // len(own.ranks)
    text = f"{rows} rows of a chunk x {width} numbers of all hookpoints, for other ranks"
    return Item("transport", rows * width * w.dtype.itemsize, text, ("data.chunk_contexts",))


def _sending(w: Workload, rank: int) -> Item:
    """Two chunks in flight: one on its way while the model computes the next."""
    bytes_ = 0
    for group in w.plan.groups:
        for receiver in w.plan.receivers(rank, group):
            rows = w.schedule.most_rows(len(w.plan.lane_block(group, receiver)))
            bytes_ += rows * sum(w.widths[name] for name in group.hookpoints) * w.dtype.itemsize
    text = f"2 chunks in flight x {bytes_} bytes, the messages to this rank's receivers"
    return Item("transport", 2 * bytes_, text, ("data.chunk_contexts", "topology.lm.tp"))


# ---- what SAE ranks keep ---------------------------------------------------------------------------------------------


def _kept(w: Workload, group: Group, shards: list[SAEShard], kind: Kind) -> Phase:
    """What is there between steps."""
    found = [item for s in shards for item in _state(w, s, kind)]
    found += [*_batch(w, group, shards), _buffer(w, group)]
    if kind == "cpu":
        if w.schedule.steps > w.config.checkpoint.every_steps:
            found.append(_checkpoint(w, group, found))
        in_turns = _in_turns(shards)
        room = sorted((_workspace(s) for s in shards), reverse=True)[:in_turns]
        text = f"the largest SAE's rows at once, for each of {in_turns} in turns"
        found.append(Item("pre-activations", sum(room), text, ("topology.pre_activation_mib",)))
    return found


def _in_turns(shards: list[SAEShard]) -> int:
    """SAEs that are under way at a time: two, where a step waits for messages."""
    return 2 if len(shards) > 1 and shards[0].tp * shards[0].dp > 1 else 1


def _workspace(s: SAEShard) -> int:
    """A CPU's memory for pre-activations, which a thread keeps."""
    return 0 if s.kind == "dense" else s.block_rows * s.latents * s.itemsize


def _state(w: Workload, s: SAEShard, kind: Kind) -> Phase:
    """Parameters, moments and counters of one SAE."""
    n, divided, whole = s.latents, numbers(s.divided), numbers(s.parameters)
    undivided = sum(p.nbytes for p in s.undivided.values())
    masters = sum(p.numel() * s.wide for p in s.undivided.values() if p.itemsize < s.wide)
    own = divided // s.dp * s.wide
    offloaded = kind == "cuda" and _offloads(_zero(w))
    if s.engine == "deepspeed":
        parameters = divided * s.itemsize + undivided + (0 if offloaded else own)
        text = f"{whole} x {s.itemsize} bytes, and 1/{s.dp} of them once more for Adam"
    else:
        parameters = own + undivided + masters
        text = f"{whole} parameters ({n} of {s.cfg.d_sae} latents) x {s.itemsize} bytes"
        if divided:
            text = f"1/{s.dp} of {divided} parameters x {s.wide} bytes, and {whole - divided} whole"
        text += ", and float32 masters" if masters else ""
    moments = 0
    for name, p in s.parameters.items():
        size = 2 if s.spec.train.moments_dtype == "bfloat16" and name in s.matrices else max(4, p.itemsize)
        moments += 2 * size * (p.numel() // (s.dp if name in s.divided else 1))
    if offloaded:
        moments -= 2 * own
    each = 2 if s.spec.train.moments_dtype == "bfloat16" else s.wide
    of_entry = f"saes.{s.spec.entry}"
    keys = ("topology.sae.tp", "topology.sae.dp", f"{of_entry}.d_sae", "topology.sae.groups")
    return [
        Item("SAE parameters", parameters, text, (*keys, f"{of_entry}.dtype")),
        Item(
            "optimizer state", moments, f"2 moments x {each} bytes for each parameter", ("train.moments_dtype", *keys)
        ),
        # Rows since a latent fired, and on which it fired (int64), are kept; a step has masks, norms, sums and offsets.
        Item("counters and rest", 56 * n, f"{n} latents x 56 bytes", ("topology.sae.tp",)),
    ]


def _zero(w: Workload) -> dict[str, object]:
    """DeepSpeed's ``zero_optimization``; empty with other engines."""
    if w.plan.engine != "deepspeed":
        return {}
    settings = deepspeed_settings(w.config.topology, os.environ)
    assert settings is not None
    zero: dict[str, object] = settings["zero_optimization"]
    return zero


def _offloads(zero: Mapping[str, object]) -> bool:
    """Whether Adam's part of the parameters and its moments are in CPU memory."""
    settings = zero.get("offload_optimizer")
    return isinstance(settings, dict) and settings.get("device", "none") != "none"


def _batch(w: Workload, group: Group, shards: list[SAEShard]) -> Phase:
    """This step's rows, the next step's, and the rows that count."""
    rows, size = w.batch // group.dp, w.dtype.itemsize
    width = sum(w.widths[name] for name in group.hookpoints)
    # What a rank gave to the all-gather of either lives as long as its result.
    own = width // group.tp if group.tp > 1 else 0
    pairs = {(s.spec.hookpoint, s.spec.target) for s in shards}
    counted = sum(w.widths[x] + (w.widths[y] if x != y else 0) for x, y in pairs)
    columns = 2 * (width + own) + counted
    text = (
        f"{rows} rows x {columns} x {size} bytes: of {width} numbers in {len(group.hookpoints)} hookpoints, this "
        "step's and the next one's; copies where a row is left out; a bound"
    )
    keys = ("train.train_batch_size_tokens", "topology.sae.dp", "topology.sae.groups")
    return [Item("batch", rows * columns * size, text, keys)]


def _buffer(w: Workload, group: Group) -> Item:
    lanes, slots = w.plan.lanes // len(group.ranks), w.schedule.lane_capacity
    width = sum(w.widths[name] for name in group.hookpoints)
    text = f"{lanes} of {w.plan.lanes} lanes x {slots} slots x {width} numbers x {w.dtype.itemsize} bytes"
    return Item("buffer", lanes * slots * width * w.dtype.itemsize, text, _BUFFER_KEYS)


def _checkpoint(w: Workload, group: Group, kept: Phase) -> Item:
    """The copies that a checkpoint is written from, kept for the next one; beside a GPU they are in CPU memory."""
    saved = [item for item in kept if item.what in ("SAE parameters", "optimizer state")]
    saves_rows = w.config.checkpoint.buffer == "save"
    saved += [item for item in kept if item.what == "buffer" and saves_rows]
    text = "copies of parameters and optimizer state" + (" and of the buffer" if saves_rows else "")
    return Item("checkpoint", total(saved), f"{text}; a bound", ("checkpoint.buffer", "checkpoint.every_steps"))


def _transported(w: Workload, role: Role) -> Phase:
    """What SAE ranks hold of chunks that are on their way to the buffer."""
    group = role.group
    assert group is not None
    width = sum(w.widths[name] for name in group.hookpoints)
    if w.config.topology.lm.cache is not None:
        return []
    if w.plan.colocated:
        rows = -(-w.rows_per_chunk * len(w.plan.sae_ranks) // len(group.ranks))
        text = f"{rows} rows of a round of {len(w.plan.sae_ranks)} chunks x {width} x {w.dtype.itemsize} bytes"
        return [Item("transport", rows * width * w.dtype.itemsize, text, ("data.chunk_contexts",))]
    copies = len(w.plan.lm)
    rows = w.schedule.most_rows(w.plan.lanes // len(group.ranks))
    text = f"a chunk from each of {copies} copies of the model: {rows} rows x {width} x {w.dtype.itemsize} bytes"
    keys = ("data.chunk_contexts", "topology.lm.dp")
    return [Item("transport", copies * rows * width * w.dtype.itemsize, text, keys)]


# ---- steps -----------------------------------------------------------------------------------------------------------


def _steps(w: Workload, shards: list[SAEShard], kind: Kind, dead: int) -> list[Phase]:
    """The phases of the SAE that takes most; beside each, the fullest one of a second SAE, where two take turns."""
    found = []
    for s in shards:
        converts = s.sae.dtype != w.dtype or s.spec.cfg.normalize_activations == "expected_average_only_in"
        found.append(step_phases(s, kind, converts, _bucket(w), min(dead, s.cfg.d_sae)))
    found.sort(key=lambda phases: max(map(total, phases)), reverse=True)
    if _in_turns(shards) == 1:
        return found[0]
    second = max(found[1], key=total)
    return [[*phase, *second] for phase in found[0]]


def _bucket(w: Workload) -> int:
    """Bytes of the buffers in which DeepSpeed joins gradients."""
    if w.plan.engine != "deepspeed":
        return 0
    zero = _zero(w)
    size = zero.get("reduce_bucket_size", _BUCKET)
    assert isinstance(size, int | float)
    return int(size) * 4 * (1 + bool(zero.get("overlap_comm")))
