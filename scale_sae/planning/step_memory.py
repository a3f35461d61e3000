"""What one SAE's training step holds beside its parameters, phase by phase.

Not all of it is there at once, so each phase has its own items; the fullest counts. Coefficients are numbers of tensors
that live at that place of the code, in the sizes that the comments name. With R rows of this rank, n latents of this
shard, "numbers" of the SAE's dtype and "wide" ones of float32 at least.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scale_sae.planning.shards import SAEShard, numbers
from scale_sae.saes.gated import GatedTrainingSAE
from scale_sae.saes.jumprelu import JumpReLUTrainingSAE

Kind = Literal["cpu", "cuda"]
# A CPU's rows of a gradient that exist at once: those of ``kernels.plain``.
BLOCK_BYTES = 2**22
# More candidates than selected entries: a bound from neighbourhoods is not quite tight, as measured on normal scores.
LOOSE = 1.15
BATCH_KEYS = ("train.train_batch_size_tokens", "topology.sae.dp")


@dataclass(frozen=True)
class Item:
    """Part of a rank's memory.

    Attributes:
        what: its name.
        bytes: of it.
        formula: how ``bytes`` comes about, with the numbers put in.
        keys: the config keys that change it, the most effective first.
    """

    what: str
    bytes: int
    formula: str
    keys: tuple[str, ...]


Phase = list[Item]


def total(items: Sequence[Item]) -> int:
    """Bytes of all of them."""
    return sum(item.bytes for item in items)


def step_phases(s: SAEShard, kind: Kind, converts: bool, bucket: int, dead: int) -> list[Phase]:
    """The phases of one SAE's step, in their order.

    Args:
        s: the SAE on this rank.
        kind: of device.
        converts: whether inputs are copied for a change of dtype or scale.
        bucket: bytes of the buffers in which DeepSpeed joins gradients; 0 with other engines.
        dead: dead latents over all shards; they count in the TopK family.
    """
    step = _Step(s, kind, converts, bucket, s.aux_parts(dead) if s.kind == "codes" else [])
    forward = [step.selection()] if s.kind == "codes" else []
    backward = [step.losses(), *([step.dead_latents()] if step.parts else []), *step.reduction()]
    return [*forward, *backward, step.update()]


@dataclass(frozen=True)
class _Step:
    s: SAEShard
    kind: Kind
    converts: bool
    bucket: int
    parts: list[int]

    # ---- sizes ----------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> int:
        """Selected entries on this shard, in the mean over the shards."""
        s = self.s
        return -(-int(s.cfg.k * s.rows) // s.tp)

    @property
    def inputs(self) -> int:
        """Numbers of what is kept of the input: converted, and as the encoder sees it."""
        s = self.s
        changed = s.cfg.apply_b_dec_to_input or s.cfg.normalize_activations in _ROW_NORMS
        targets = s.d_out if s.spec.target != s.spec.hookpoint else 0
        return s.rows * (changed * s.d_in + self.converts * (s.d_in + targets))

    @property
    def outputs(self) -> int:
        """Numbers of the reconstructions of all levels."""
        return self.s.levels * self.s.rows * self.s.d_out

    @property
    def dead(self) -> list[tuple[int, int, bool]]:
        """Of each part: its latents on this shard, how many of them a row has, whether these are chosen."""
        k_aux = self.s.k_aux
        local = [(-(-part // self.s.tp), part > k_aux) for part in self.parts]
        return [(some, min(some, k_aux), chosen) for some, chosen in local]

    # ---- phases ---------------------------------------------------------------------------------------------------

    def selection(self) -> Phase:
        """Of codes: candidates beside the encoder's input, and on a GPU the pre-activations that they come from."""
        adding, choosing, what = self._candidates()
        formula = f"{what}: {adding} bytes while they are found, {choosing} while they are chosen from; a bound"
        held, of_dead = self._dead_scores()
        codes = Item("codes", max(adding, choosing) + held, formula, ("saes.k", *BATCH_KEYS))
        if of_dead > codes.bytes:
            codes = Item("codes", of_dead, f"candidates of AuxK among {sum(self.parts)} dead latents; a bound", _AUX)
        found = [*self._parameters(2), codes, self._reconstructions(self.inputs, 0, "the encoder's input")]
        return [*found, self._pre_activations()] if self.kind == "cuda" else found

    def _dead_scores(self) -> tuple[int, int]:
        """Bytes of the dead latents' scores while others are chosen; and while AuxK chooses, with the codes."""
        s = self.s
        held = of_dead = 0
        for number, slots, chosen in self.dead:
            # Candidates of a choice in rows, of k_aux; or scores of all, in blocks and joined.
            candidates, scores = int(LOOSE * s.rows * slots), s.rows * number * s.itemsize
            held += candidates * (16 + s.itemsize) if chosen else scores
            of_dead += candidates * self._each_candidate if chosen else 2 * scores
        return held, of_dead + self.entries * self._each_entry if of_dead else 0

    @property
    def _each_entry(self) -> int:
        """Bytes of a selected one: indices of row, latent and order (int64), the score, what is decoded, its copy."""
        return 24 + 3 * self.s.wide + (28 if self.s.levels > 1 else 0)

    @property
    def _each_candidate(self) -> int:
        """Bytes of a candidate of a row's choice; of all shards' lists one comes, and one is sorted."""
        return 55 + 3 * self.s.itemsize + (2 * self.s.tp * self.s.itemsize if self.s.tp > 1 else 0)

    def _candidates(self) -> tuple[int, int, str]:
        """Bytes of the candidates while the last are found and while it is chosen from them; how many they are."""
        s, size = self.s, self.s.itemsize
        blocks, block = -(-s.rows // self.s.block_rows), self.s.block_rows * s.latents
        kept = 16 + size  # indices of row and latent (int64), the score
        if s.selects == "batch":
            # The first block alone may have as many as the batch selects; each later one adds to a tighter bound.
            first = int(LOOSE * self.entries)
            number = int(first * sum(1 / i for i in range(1, blocks + 1)))
            width = _neighbours(block - 1, s.selected)  # in a block that lacks a row
            # A histogram of the best of each neighbourhood, 3 tensors of int64; or the neighbourhoods of the first.
            looking = max(number * (kept + size) + block // width * (25 + size), first * (width * (size + 1) + 45))
            return looking, number * (52 + 2 * size), f"about {number} candidates in {blocks} blocks"
        # Each shard may have all of a row's best.
        number = int(LOOSE * s.rows * s.cfg.k)
        width = _neighbours(s.latents, s.cfg.k)
        of_a_block = number // blocks * (width * (size + 1) + 45) + block // width * (size + 1)
        return number * kept + of_a_block, number * self._each_candidate, f"about {number} candidates"

    def losses(self) -> Phase:
        """The backward pass of the squared error, where most tensors of rows x width live."""
        s = self.s
        one = s.rows * s.d_out
        narrow, sums = self.outputs, 4 * one
        text = "reconstruction; difference and 3 tensors of its gradient"
        if s.levels > 1:
            # Of all levels: the reconstructions, their gradient, and 3 tensors of a running sum's gradient.
            narrow, sums, text = 5 * self.outputs, 0, f"5 tensors of {s.levels} levels"
        if s.kind == "codes":
            own = [self._codes(self._each_entry)]
        else:
            own = [self._dense(), *self._matrix_gradients()]
            narrow, sums, text = self.outputs, one, "reconstruction, difference"
        return [*self._parameters(2), *own, self._reconstructions(self.inputs + narrow, sums, f"input, {text}")]

    def dead_latents(self) -> Phase:
        """The losses where AuxK has parts, and then the gradients of their latents' rows."""
        s, size = self.s, self.s.itemsize
        one, together = s.rows * s.d_out, s.levels + len(self.parts)
        # Each level's and part's sum, joined and restored, and the part's residual; differences and a square.
        forward = self.inputs + 3 * together * one, (len(self.parts) + 2 + (size < s.wide)) * one
        backward = self.inputs + self.outputs + 3 * together * one, len(self.parts) * one
        narrow, wide = max(forward, backward, key=lambda of: of[0] * size + of[1] * s.wide)
        found = [*self._parameters(2), self._codes(self._each_entry)]
        found.append(self._reconstructions(narrow, wide, "AuxK's too"))
        for number, slots, chosen in self.dead:
            values = s.rows * slots * (2 * size + (8 if chosen else 0))
            rows = number * (size * s.d_out + s.wide * (s.d_out + s.d_in))
            text = f"{s.rows} rows x {slots} values of dead latents, rows and gradients of {number} on this shard"
            found.append(Item("codes", values + rows, f"{text}; a bound", _AUX))
        return found

    def reduction(self) -> list[Phase]:
        """The end of the backward pass of engines that divide: dense gradients, and what they are summed in."""
        s = self.s
        if s.engine == "local":
            return []
        held = self._reconstructions(self.inputs + 2 * self.outputs, 0, "input, reconstruction, its gradient")
        whole = numbers(s.divided)
        if s.engine == "deepspeed":
            formula = f"{whole} parameters x {s.wide} bytes, and DeepSpeed's reduce_bucket_size x 4 bytes"
            keys = ("topology.sae.tp", "topology.deepspeed")
            return [[Item("gradients", whole * s.wide + self.bucket, formula, keys), held]]
        # fully_shard's input of the reduce-scatter, made of the gradients, then beside the part that comes of it. gloo
        # works on a copy; so does a single rank.
        copy = self.kind == "cpu" or s.dp == 1
        summed = max(whole * (s.itemsize + s.wide), whole * s.wide * (1 + copy) + whole // s.dp * s.wide)
        formula = f"{whole} parameters, gradients and the reduce-scatter's buffers"
        return [
            [*self._parameters(2), held],
            [Item("gradients", summed, formula, _MATRICES), self._reconstructions(self.outputs, 0, "reconstruction")],
        ]

    def update(self) -> Phase:
        """Clipping and Adam, on codes with gradients that are never written out."""
        s = self.s
        found: Phase = []
        if s.engine != "local":
            own = numbers(s.divided) // s.dp
            found.append(Item("gradients", own * s.wide, f"{own} parameters x {s.wide} bytes", _MATRICES))
            tables = self.outputs
        elif s.kind == "codes":
            # Indices of row and latent, order, rows by latent twice (int64); score, pre-activation, weights (wide).
            found.append(self._codes(40 + 4 * s.wide + (28 if s.levels > 1 else 0)))
            tables = self.inputs + 2 * self.outputs
        else:
            found += self._matrix_gradients()
            tables = self.outputs
        sums = s.rows * max(s.d_in, s.levels * s.d_out) if self.kind == "cpu" and s.itemsize < s.wide else 0
        found.append(self._reconstructions(tables, sums, "input, reconstruction, its gradient"))
        if self.kind == "cpu":
            found.append(self._blocks())
        return found

    # ---- their parts ------------------------------------------------------------------------------------------------

    def _codes(self, each: int) -> Item:
        formula = f"{self.entries} entries on this shard x {each} bytes, in the mean over the shards"
        return Item("codes", self.entries * each, formula, ("saes.k", *BATCH_KEYS))

    def _parameters(self, times: int) -> Phase:
        """The parameters that fully_shard holds gathered: beside what the all-gather gave, or their gradients."""
        s = self.s
        if s.engine != "fsdp2":
            return []
        whole = numbers(s.divided)
        text = f"{times} x {whole} gathered parameters x {s.itemsize} bytes, as they came and in place, or gradients"
        return [Item("gradients", times * whole * s.itemsize, text, _MATRICES)]

    def _matrix_gradients(self) -> Phase:
        """Dense gradients of what the backward pass does not collect."""
        s = self.s
        if s.engine != "local":
            return []
        count = numbers(s.matrices)
        return [Item("gradients", count * s.itemsize, f"{count} parameters x {s.itemsize} bytes", _MATRICES)]

    def _reconstructions(self, narrow: int, wide: int, what: str) -> Item:
        s = self.s
        bytes_ = narrow * s.itemsize + wide * s.wide
        parts = [f"{count} x {size} bytes" for count, size in ((narrow, s.itemsize), (wide, s.wide)) if count]
        return Item("reconstructions", bytes_, f"{' + '.join(parts)} ({what}; {s.rows} rows)", BATCH_KEYS)

    def _pre_activations(self) -> Item:
        s = self.s
        bytes_ = self.s.block_rows * s.latents * s.itemsize
        formula = f"{self.s.block_rows} rows at once x {s.latents} latents x {s.itemsize} bytes"
        return Item("pre-activations", bytes_, formula, ("topology.pre_activation_mib",))

    def _dense(self) -> Item:
        """Where all entries are computed on: early in a run, and in classes of one's own."""
        s = self.s
        size, wide = s.itemsize, s.wide
        each, kind = 6 * size + wide, "an SAE of one's own, an estimate"
        if isinstance(s.sae, GatedTrainingSAE):
            # Pre-activations; gate, magnitudes and both of their activations; the gate's, and 2 of gradients.
            each, kind = 8 * size, "gated"
        elif isinstance(s.sae, JumpReLUTrainingSAE):
            # Pre-activations, activations and their gradient; 2 of the estimators, in the thresholds' dtype; masks.
            each, kind = 4 * size + 2 * wide + 2, "JumpReLU"
        elif s.kind == "entries":
            # Pre-activations, activations and 3 of their gradient.
            each, kind = 4 * size + wide, "ReLU"
        formula = (
            f"{s.rows} rows x {s.latents} latents x {each} bytes ({kind}); a bound: less once few entries can be active"
        )
        return Item("pre-activations", s.rows * s.latents * each, formula, ("topology.sae.tp", *BATCH_KEYS))

    def _blocks(self) -> Item:
        """A CPU's rows of gradients, two blocks of which live at once; bfloat16 moments take their random bits."""
        s = self.s
        of_one = [min(BLOCK_BYTES, p.numel() // s.dp * s.wide) for p in s.matrices.values()]
        times = 13 if s.spec.train.moments_dtype == "bfloat16" else 2
        formula = f"{times} blocks of a gradient's rows"
        return Item("counters and rest", times * max(of_one, default=0), formula, ("train.moments_dtype",))


def _neighbours(scores: int, wanted: int) -> int:
    """How many scores ``selection`` looks at through their largest: several such groups for each entry wanted."""
    return 2 ** min(6, max(0, int(math.log2(max(1, scores / (4 * max(wanted, 1)))))))


_AUX = ("saes.aux_loss_coefficient", *BATCH_KEYS)
_ROW_NORMS = ("layer_norm", "constant_norm_rescale")
_MATRICES = ("topology.sae.tp", "topology.sae.dp", "saes.d_sae")
