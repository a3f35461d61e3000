"""TopK SAEs in sparse codes: each row keeps its k best latents; dead latents learn what these leave over."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.kernels import workspace
from scale_sae.kernels.codes import (
    Codes,
    Columns,
    Decoder,
    decode_columns,
    decode_selected,
    encode_selected,
)
from scale_sae.saes.base import SparseTrainStepOutput, TrainingSAE, TrainStepInput, TrainStepOutput, keeps_hooks
from scale_sae.saes.released import decoder_norms
from scale_sae.saes.training_config import TrainingSAEConfig
from scale_sae.selection import Selection, TopK


@dataclass(kw_only=True)
class TopKTrainingSAEConfig(TrainingSAEConfig):
    """Options of a TopK SAE; names and defaults are SAELens's, but for ``k_aux``, which it has not."""

    k: int = 100  # active latents per row
    aux_loss_coefficient: float = 1.0  # of the loss that revives dead latents; 0 turns it off
    k_aux: int | None = None  # most dead latents that a row's residual is given to; null: half of the target's width
    rescale_acts_by_decoder_norm: bool = True  # select as if every decoder row had norm 1

    @classmethod
    def architecture(cls) -> str:
        return "topk"

    def problems(self) -> dict[str, str]:
        found = super().problems()
        if not 0 < self.k <= self.d_sae:
            found["k"] = f"must be from 1 to d_sae ({self.d_sae})"
        if not self.aux_loss_coefficient >= 0:
            found["aux_loss_coefficient"] = "must be 0 or more"
        if self.k_aux is not None and self.k_aux <= 0:
            found["k_aux"] = "must be at least 1, or null for half of the target's width"
        return found


@dataclass(frozen=True)
class AuxPart:
    """Dead latents that reconstruct together: a local slice, how many are dead over all shards, whose residual."""

    latents: slice
    num_dead: int
    level: int


class TopKTrainingSAE(TrainingSAE):
    """SAELens's TopK SAE in sparse codes.

    With ``rescale_acts_by_decoder_norm`` a pre-activation is multiplied by its decoder row's norm for the selection and
    divided by it again for decoding. The two cancel, in the value and in the gradient, so norms enter the selection and
    the reported activations only.

    The reconstruction may come in levels, prefixes of the latents that nest: one for TopK, several for Matryoshka SAEs.
    A subclass that replaces one of ``DENSE_HOOKS`` is trained on dense activations.
    """

    changed_in_step: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, cfg: Any, shard: Shard | None = None, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_enc = self.zeros(self.n_local, device=device)

    @classmethod
    def works_on_codes(cls) -> bool:
        """Whether the step is that on codes; a subclass may have replaced what only the dense one calls."""
        return keeps_hooks(cls, TopKTrainingSAE)

    @classmethod
    def multiply_adds(cls, cfg: Any) -> int:
        """See the base class. On codes d_in·d_sae for the encoder, and for each of a row's k latents d_in + 3·d_out.

        These are the encoder's gradient, the decoder, its gradient and that of the activations. AuxK, which costs
        nothing where no latent is dead, is left out.
        """
        if not cls.works_on_codes():
            return super().multiply_adds(cfg)
        d_out = getattr(cfg, "d_out", None) or cfg.d_in
        return int(cfg.d_in * cfg.d_sae + cfg.k * (cfg.d_in + 3 * d_out))

    # ---- what the kinds of TopK differ in ---------------------------------------------------------------------------

    def selection(self, n_rows: int) -> Selection:
        """What takes the scores of a batch, of which this rank has ``n_rows``, and says which stay active."""
        return TopK(self.cfg.k, self.shard)

    def aux_selection(self) -> Selection:
        """What chooses k_aux dead latents of each row: by their scores, of either sign."""
        return TopK(self.k_aux, self.shard, signed=True)

    def level_ends(self) -> list[int]:
        """Where each level ends among this shard's latents, the last with all of them."""
        return [self.n_local]

    def aux_parts(self, step_input: TrainStepInput) -> list[AuxPart]:
        """The dead latents of a step, in the groups that reconstruct a residual each; none where nothing is dead."""
        return [AuxPart(slice(0, self.n_local), step_input.num_dead, -1)]

    def inner_losses(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Named losses of the levels before the last, from their reconstructions ``[levels - 1, B, d_out]``."""
        return {}

    @property
    def k_aux(self) -> int:
        """The most dead latents that a row's residual is given to; null: as Gao et al. 2024, appendix B.1."""
        return max(1, self.d_out // 2) if self.cfg.k_aux is None else int(self.cfg.k_aux)

    # ---- the step on codes ------------------------------------------------------------------------------------------

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """See the base class. One all-reduce carries the reconstruction and, where latents are dead, AuxK's."""
        if not self.works_on_codes():
            return self._dense_forward_pass(step_input)
        encoder = replace(self.encoder(step_input.sae_in, self.b_enc), collected=self.collected("W_enc_rows"))
        parts = self._parts(step_input)
        codes, pre_acts, columns = self._select(encoder.x, parts, [dead_latents(step_input, part) for part in parts])

        decoder = Decoder(self.W_dec, self.collected("W_dec"))
        partial = [self._decode_levels(encode_selected(codes.with_values(pre_acts), encoder), codes, decoder)]
        partial += [decode_columns(some, encoder, decoder) for some in columns]
        n_levels = len(self.level_ends())
        whole = self.shard.sum(torch.cat(partial)).unflatten(0, (n_levels + len(parts), len(encoder.x)))
        outputs = self.row_norm.restore(whole[:n_levels].cumsum(0) + self.b_dec)
        outputs = self.add_skip(outputs, step_input.sae_in)
        sae_out = outputs[-1]
        residuals = [(step_input.target - outputs[part.level]).detach() for part in parts]
        losses = {
            "mse_loss": self.mse_loss_fn(sae_out, step_input.target).sum(dim=-1).mean(),
            "auxiliary_reconstruction_loss": self._aux_loss(parts, whole[n_levels:], residuals, sae_out),
            **self.inner_losses(outputs[:-1], step_input.target),
        }
        return SparseTrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            codes=codes,
            dense=lambda: self._dense_activations(step_input.sae_in, codes),
            loss=sum(losses.values(), torch.zeros_like(losses["mse_loss"])),
            losses=losses,
        )

    @torch.no_grad()
    def _select(self, centred: Tensor, parts: list[AuxPart], dead: list[Tensor]) -> tuple[Codes, Tensor, list[Columns]]:
        """The codes of a batch, their pre-activations, and the pre-activations of each part's chosen dead latents."""
        scale, bias = self._scale_and_bias()
        selection = self.selection(len(centred))
        # Where there are no more dead latents than may be chosen, all are.
        choices = [self.aux_selection() if part.num_dead > self.k_aux else None for part in parts]
        others = [_DeadScores(latents, choice) for latents, choice in zip(dead, choices, strict=True)]
        for block in self._score_blocks(centred):
            selection.add(block, scale, bias)
            for dead_scores in others:
                dead_scores.add(block)
        rows, latents, scores = selection.choose()
        codes = Codes(
            rows, latents, scores.to(torch.promote_types(self.dtype, torch.float32)), len(centred), self.n_local
        )
        _ = codes.by_latent  # worked out once, for all that share these entries
        pre_acts = codes.values if scale is None else codes.values / scale[latents]
        columns = [
            part.columns(len(centred), self.k_aux, scale, self.block_rows(len(part.latents) + 1)) for part in others
        ]
        return codes, pre_acts, columns

    def _scale_and_bias(self) -> tuple[Tensor | None, Tensor]:
        """What makes scores, by which latents are selected, of ``x @ W_enc``: factors and summands, ``[n_local]``."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return None, self.b_enc.detach()
        norms = decoder_norms(self.W_dec.detach())
        return norms, self.b_enc.detach() * norms

    @torch.no_grad()
    def _score_blocks(self, centred: Tensor) -> Iterator[Tensor]:
        """``centred @ W_enc``, block by block of rows: ``[b, n_local]``, valid until the next is made."""
        blocks = centred.split(self.block_rows(self.n_local))
        scores = workspace.take(len(blocks[0]), self.n_local, self.dtype, centred.device)
        for rows in blocks:
            yield torch.mm(rows, self.W_enc, out=scores[: len(rows)])

    def _decode_levels(self, pre_acts: Tensor, codes: Codes, decoder: Decoder) -> Tensor:
        """What the latents that each level adds decode to, as far as they are here: ``[levels · B, d_out]``."""
        ends = self.level_ends()
        if len(ends) == 1:
            return decode_selected(pre_acts, codes, decoder)
        level = torch.bucketize(codes.latents, torch.tensor(ends, device=codes.latents.device), right=True)
        rows, order = (level * codes.n_rows + codes.rows).sort(stable=True)
        by_level = Codes(rows, codes.latents[order], codes.values[order], len(ends) * codes.n_rows, codes.n_latents)
        return decode_selected(pre_acts[order], by_level, decoder)

    def _parts(self, step_input: TrainStepInput) -> list[AuxPart]:
        """``aux_parts``, where AuxK is on and something is dead."""
        return self.aux_parts(step_input) if step_input.num_dead and self.cfg.aux_loss_coefficient else []

    def _aux_loss(
        self, parts: list[AuxPart], recons: Tensor | list[Tensor], residuals: list[Tensor], sae_out: Tensor
    ) -> Tensor:
        """The error of each part's reconstruction ``[B, d_out]`` of its residual, as SAELens weighs it."""
        loss = sae_out.new_zeros((), dtype=torch.promote_types(sae_out.dtype, torch.float32))
        for part, recon, residual in zip(parts, recons, residuals, strict=True):
            # A few dead latents cannot be asked to explain as much as k_aux of them.
            share = min(part.num_dead / self.k_aux, 1.0)
            error = self.mse_loss_fn(self.row_norm.restore_difference(recon), residual).sum(dim=-1).mean()
            loss = loss + self.cfg.aux_loss_coefficient * share * error
        return loss

    # ---- the same on dense activations, for subclasses --------------------------------------------------------------

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return self._activate

    def _activate(self, hidden_pre: Tensor) -> Tensor:
        selection = self.selection(len(hidden_pre))
        selection.add(hidden_pre.detach().contiguous())
        return keep(hidden_pre, *selection.choose()[:2])

    def _hidden_pre(self, sae_in: Tensor) -> Tensor:
        hidden_pre = self.pre_activations(sae_in, self.b_enc)
        return hidden_pre * decoder_norms(self.W_dec) if self.cfg.rescale_acts_by_decoder_norm else hidden_pre

    def _dense_activations(self, sae_in: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
        hidden_pre = self._hidden_pre(sae_in)
        return keep(hidden_pre, codes.rows, codes.latents), hidden_pre

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden_pre = self._hidden_pre(x)
        return self.activation_fn(hidden_pre), hidden_pre

    def decode(self, feature_acts: Tensor, latents: slice = slice(None)) -> Tensor:
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts / decoder_norms(self.W_dec[latents])
        return super().decode(feature_acts, latents)

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        ends, recons, residuals = self.level_ends(), [], []
        parts = self._parts(step_input)
        for part in parts:
            dead = dead_latents(step_input, part)
            norms = decoder_norms(self.W_dec[dead]) if self.cfg.rescale_acts_by_decoder_norm else 1
            scores = hidden_pre[:, dead]
            values = scores / norms
            if part.num_dead > self.k_aux:
                selection = self.aux_selection()
                selection.add(scores.detach())
                values = keep(values, *selection.choose()[:2])
            recons.append(self.shard.sum(values @ self.W_dec.index_select(0, dead)))
            inner = slice(0, ends[part.level])
            output = self.add_skip(self.decode(feature_acts[:, inner], inner), step_input.sae_in)
            residuals.append((step_input.target - output).detach())
        return {"auxiliary_reconstruction_loss": self._aux_loss(parts, recons, residuals, sae_out)}

    def _dense_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        inner = [slice(0, end) for end in self.level_ends()[:-1]]
        if inner:
            decoded = torch.stack([self.decode(output.feature_acts[:, part], part) for part in inner])
            outputs = self.add_skip(decoded, step_input.sae_in)
            inner_losses = self.inner_losses(outputs, step_input.target)
            output.losses |= inner_losses
            output.loss = sum(inner_losses.values(), output.loss)
        return output

    # ---- the release ------------------------------------------------------------------------------------------------

    def activation_factor(self, target_factor: float) -> float:
        """With rescaling activations are in units of the decoder's norms, which the fold divides by the factor."""
        return target_factor if self.cfg.rescale_acts_by_decoder_norm else 1.0

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Tensor]) -> None:
        """With rescaling the norms move from W_dec into the encoder, which changes neither activations nor output."""
        super().process_state_dict_for_saving_inference(state_dict)
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = decoder_norms(state_dict["W_dec"])
            state_dict["W_enc"] = state_dict["W_enc"] * norms
            state_dict["b_enc"] = state_dict["b_enc"] * norms
            state_dict["W_dec"] = state_dict["W_dec"] / norms[:, None]


@dataclass(kw_only=True)
class AbsTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """Options of an AbsTopK SAE; names and defaults are SAELens's."""

    @classmethod
    def architecture(cls) -> str:
        return "abstopk"


class AbsTopKTrainingSAE(TopKTrainingSAE):
    """SAELens's AbsTopK SAE: each row keeps the k latents largest in magnitude, with their sign."""

    def selection(self, n_rows: int) -> Selection:
        return TopK(self.cfg.k, self.shard, magnitude=True)

    def aux_selection(self) -> Selection:
        return TopK(self.k_aux, self.shard, signed=True, magnitude=True)


class _DeadScores:
    """The scores of a part's dead latents: all of them, or those that a selection chooses."""

    def __init__(self, latents: Tensor, selection: Selection | None):
        """``latents``: int64, local numbers; ``selection``: None where all are chosen."""
        self.latents, self.selection = latents, selection
        self.blocks: list[Tensor] = []

    def add(self, scores: Tensor) -> None:
        """Takes the scores ``[b, n_local]`` of the next rows."""
        dead = scores.index_select(1, self.latents)
        if self.selection is None:
            self.blocks.append(dead)
        else:
            self.selection.add(dead)

    def columns(self, n_rows: int, most: int, scale: Tensor | None, block_rows: int) -> Columns:
        """The pre-activations of the chosen, ``most`` in each of ``n_rows`` rows; ``scale`` made scores of them."""
        of_latents = None if scale is None else scale[self.latents]
        if self.selection is None:
            scores = torch.cat(self.blocks)
            return Columns(self.latents, scores if of_latents is None else scores / of_latents, None, block_rows)
        rows, chosen, scores = self.selection.choose()
        values = scores.new_zeros(n_rows, min(most, len(self.latents)))
        places = torch.full(values.shape, -1, dtype=torch.int64, device=rows.device)
        slots = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        values[rows, slots] = scores if of_latents is None else scores / of_latents[chosen]
        places[rows, slots] = chosen
        return Columns(self.latents, values, places, block_rows)


def keep(hidden_pre: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
    """``hidden_pre [B, n]`` at the given entries, 0 elsewhere."""
    selected = torch.zeros_like(hidden_pre, dtype=torch.bool)
    selected[rows, latents] = True
    return hidden_pre.masked_fill(~selected, 0)


def dead_latents(step_input: TrainStepInput, part: AuxPart) -> Tensor:
    """int64: the dead latents of this shard that are in a part, by their local numbers."""
    return step_input.dead_neuron_mask[part.latents].nonzero().squeeze(1) + part.latents.start
