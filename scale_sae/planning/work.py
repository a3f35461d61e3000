"""What one rank computes in a step: products, passes over memory, gathered rows, as the code of the step makes them.

No step logs; checkpoints and evaluations are left out, and AuxK on dense activations (of subclasses of one's own).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scale_sae.planning.shards import SAEShard, numbers
from scale_sae.planning.workload import Workload
from scale_sae.topology import Group

# What `kernels.plain` (on CPUs) and `kernels.fused` (on NVIDIA GPUs) do differently.
# Passes over the scores of a selection: both read them and write them scaled; plain reads them twice more, for the
# largest and the smallest of neighbours.
SCORE_PASSES = {"cpu": 4, "cuda": 2}
# Rows of memory that `dot_rows` reads per entry: fused finds one of the two in its cache; plain reads both, and at half
# the rate of `weighted_sums` (measured: it adds up along rows).
DOT_ROWS = {"cpu": 4, "cuda": 1}
# plain works on so many bytes at a time, with so many operations for each block of scores, and of parameters; fused has
# blocks of rows as large as they may be, and updates a matrix at once.
BLOCK, SCORE_OPS, ADAM_OPS = 2**22, 7, 20
# Passes over [B, d] for input, reconstruction, loss and their gradients.
ROW_PASSES = 25
# Passes over a rank's own rows of a batch (into the buffer, out of it, holes filled), and over all rows of its batch.
BUFFER_PASSES, BATCH_PASSES = 8, 2
# Operations of an SAE's step on codes or on dense activations, those of a step beside, and those for each lane, counted
# at torch's dispatcher.
CODES_OPS, DENSE_OPS, STEP_OPS, LANE_OPS = 270, 200, 100, 2
# Dense activations: reads and writes of [B, latents] beside matrix products, and how many of the writes go to new
# tensors, counted at torch's dispatcher.
DENSE_PASSES = {"standard": (25, 9.5), "jumprelu": (42, 17), "gated": (50, 20)}
# AuxK, counted at torch's dispatcher: reads and writes of [B, dead latents] beside matrix products, and operations,
# where all of these latents count; the same where k_aux of each row are chosen, without the passes of the selection.
AUX_PASSES, AUX_OPS = 9, 70
AUX_CHOICE_PASSES, AUX_CHOICE_OPS = 6, 210
# Seconds of the host for each row of the buffer, which every draw puts into a random order (torch.randperm).
DRAW = 1e-8


@dataclass(frozen=True)
class Work:
    """A piece of a rank's step.

    Attributes:
        what: it is.
        formula: where the numbers come from.
        dtype: of the matrix products.
        flops: of them, 2 per multiply-add.
        streamed: bytes that passes over large tensors read and write.
        gathered: bytes of rows that are read by their numbers.
        fresh: bytes of new large tensors.
        candidates: of a selection.
        calls: operations that the host calls.
        host: seconds that the host is busy otherwise.
        times: how often it is done, for as many SAEs that are alike.
    """

    what: str
    formula: str
    dtype: str = "float32"
    flops: int = 0
    streamed: int = 0
    gathered: int = 0
    fresh: int = 0
    candidates: int = 0
    calls: int = 0
    host: float = 0.0
    times: int = 1


def of_an_sae(s: SAEShard, kind: str, times: int = 1, dead: int = 0) -> Iterator[Work]:
    """The step of one SAE on one rank.

    Args:
        s: the SAE on the rank.
        kind: of the device, "cpu" or "cuda".
        times: how many SAEs are like it.
        dead: its dead latents over all shards, as many on each.
    """
    if s.kind == "codes":
        yield from _on_codes(s, kind, times)
        for part in s.aux_parts(dead):
            yield from _aux(s, kind, times, part)
    else:
        yield from _on_dense(s, times)
    yield _adam(s, kind, times)


def _on_codes(s: SAEShard, kind: str, times: int) -> Iterator[Work]:
    """The forward and backward pass of `saes.topk`."""
    cfg: Any = s.spec.cfg
    size, scores, entries = s.itemsize, s.rows * s.latents, _entries(s)
    skip = 4 * s.rows * s.d_in * s.d_out if "W_skip" in s.parameters else 0  # the product and its gradient
    yield Work(
        "encoder product",
        f"2 x {s.rows} rows x {s.d_in} x {s.latents} latents" + (", and W_skip" if skip else ""),
        cfg.dtype,
        flops=2 * scores * s.d_in + skip,
        streamed=(scores + (s.rows + s.latents) * s.d_in) * size,
        times=times,
    )
    # The k best of each row are known when all shards have sent theirs; the best of a batch from a histogram.
    candidates = entries if s.selects == "batch" else math.ceil(s.rows * min(cfg.k, s.latents))
    blocks = -(-scores * size // BLOCK) if kind == "cpu" else -(-s.rows // s.block_rows)
    norms = s.latents * s.d_out * size if cfg.rescale_acts_by_decoder_norm else 0
    yield Work(
        "selection",
        f"{SCORE_PASSES[kind]} passes over {s.rows} x {s.latents} scores of {size} bytes, {candidates} candidates",
        streamed=SCORE_PASSES[kind] * scores * size + norms,
        candidates=candidates,
        calls=SCORE_OPS * blocks,
        times=times,
    )
    gathers = 1 + DOT_ROWS[kind]
    yield Work(
        "products with codes",
        f"{gathers} x {entries} entries x {s.d_out} x {size} bytes gathered; {ROW_PASSES} passes over rows",
        # A sum over all latents, the gradient of b_dec through the encoder, reads its weights once.
        streamed=s.levels * _row_bytes(s) + s.latents * s.d_in * size,
        gathered=gathers * entries * s.d_out * size,
        calls=CODES_OPS,
        times=times,
    )
    width = s.d_in + s.d_out
    whole = numbers(s.divided)
    yield Work(
        "gradients written out" if whole else "gradient norm",
        f"{entries} entries x {width} x {size} bytes gathered"
        + (f", {whole} gradients of {s.wide} bytes and gathered parameters copied" if whole else ""),
        streamed=whole * (3 * s.wide + 2 * size),
        gathered=entries * width * size,
        fresh=_of_division(s),
        times=times,
    )


def _aux(s: SAEShard, kind: str, times: int, dead: int) -> Iterator[Work]:
    """AuxK of one part's latents, ``dead`` of them over all shards: `kernels.codes.decode_columns`, on all of these."""
    here = min(-(-dead // s.tp), s.latents)
    scores = s.rows * here
    chosen = min(s.k_aux, here) if dead > s.k_aux else 0
    passes = AUX_CHOICE_PASSES + SCORE_PASSES[kind] if chosen else AUX_PASSES
    yield Work(
        "AuxK: scores",
        f"{passes} passes over {s.rows} rows x {here} dead latents of {s.itemsize} bytes"
        + (f", of which {chosen} in each row are chosen" if chosen else ""),
        streamed=passes * scores * s.itemsize,
        candidates=s.rows * chosen,
        calls=AUX_CHOICE_OPS if chosen else AUX_OPS,
        times=times,
    )
    width = 3 * s.d_out + s.d_in
    yield Work(
        "AuxK: products",
        f"2 x {s.rows} rows x {here} dead latents x (3 x {s.d_out} + {s.d_in})",
        s.spec.cfg.dtype,
        flops=2 * scores * width,
        streamed=(4 * scores + s.rows * width + here * width) * s.itemsize,
        times=times,
    )


def _on_dense(s: SAEShard, times: int) -> Iterator[Work]:
    """Forward and backward pass while most entries count: what computes on entries takes less once few are active."""
    names = [base.__name__.lower() for base in type(s.sae).__mro__]
    kind = next((kind for kind in DENSE_PASSES if any(kind in name for name in names)), "standard")
    passes, new = DENSE_PASSES[kind]
    activations = s.rows * s.latents * s.itemsize
    multiply_adds = type(s.sae).multiply_adds(s.spec.cfg)
    yield Work(
        "matrix products, at most",
        f"2 x {multiply_adds} multiply-adds of a row / {s.tp} shards x {s.rows} rows",
        s.spec.cfg.dtype,
        flops=2 * multiply_adds * s.rows // s.tp,
        times=times,
    )
    yield Work(
        "activations, at most",
        f"{passes} passes over {s.rows} x {s.latents} activations of {s.itemsize} bytes, {new:g} into new tensors",
        streamed=passes * activations + _row_bytes(s) + numbers(s.divided) * (3 * s.wide + 2 * s.itemsize),
        fresh=int(new * activations) + _of_division(s),
        calls=DENSE_OPS,
        times=times,
    )


def _of_division(s: SAEShard) -> int:
    """Bytes of new tensors where dp ranks divide the parameters: gathered, copied out, their gradients, the sums."""
    whole = numbers(s.divided)
    return whole * (3 * s.itemsize + s.wide) + whole // s.dp * s.wide


def _entries(s: SAEShard) -> int:
    """Codes of this rank's rows and latents, if those of all shards are as many."""
    cfg: Any = s.spec.cfg
    return math.ceil(s.rows * cfg.k / s.tp)


def _row_bytes(s: SAEShard) -> int:
    return ROW_PASSES * s.rows * (s.d_in + s.d_out) // 2 * s.itemsize


def _adam(s: SAEShard, kind: str, times: int) -> Work:
    """The optimizer's pass over weights and moments of what this rank owns.

    Without dp, a TopK SAE's gradient is summed in the same pass; others are tensors, read for the norm and changed.
    """
    owned = numbers(s.matrices) // s.dp
    moment = 2 if s.spec.train.moments_dtype == "bfloat16" else s.wide
    follower = s.itemsize if s.itemsize < s.wide else 0
    summed = s.kind == "codes" and not s.divided
    each = 2 * (s.wide + 2 * moment) + follower + (0 if summed else 4 * s.wide)
    return Work(
        "Adam",
        f"{owned} parameters x {each} bytes read and written",
        streamed=owned * each,
        gathered=_entries(s) * (s.d_in + s.d_out) * s.itemsize if summed else 0,
        calls=ADAM_OPS * (-(-owned * s.wide // BLOCK) if kind == "cpu" else len(s.matrices)),
        times=times,
    )


def of_batches(w: Workload, group: Group) -> Work:
    """The batch on its way through the buffer to the shards of ``group``."""
    row = sum(w.widths[name] for name in group.hookpoints) * w.dtype.itemsize
    own, whole = w.batch // len(group.ranks), w.batch // group.dp
    slots = w.schedule.buffer // len(group.ranks)
    return Work(
        "buffer and batch",
        f"({BUFFER_PASSES} x {own} + {BATCH_PASSES} x {whole}) rows of {row} bytes, {slots} slots put in order",
        streamed=(BUFFER_PASSES * own + BATCH_PASSES * whole) * row,
        calls=STEP_OPS + LANE_OPS * w.schedule.lanes // len(group.ranks),
        host=DRAW * slots,
    )
