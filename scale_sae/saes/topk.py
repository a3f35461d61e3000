"""TopK SAEs in sparse codes: each row keeps its k best latents; dead latents learn what these leave over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale_sae.collectives import Shard, select_topk
from scale_sae.kernels.codes import Codes, decode_selected, encode_latents, encode_selected
from scale_sae.saes.base import (
    SparseTrainStepOutput,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from scale_sae.saes.released import decoder_norms

# What a subclass may replace only on dense activations: the sparse step does not call it.
DENSE_HOOKS = (
    "get_activation_fn",
    "process_sae_in",
    "pre_activations",
    "encode",
    "encode_with_hidden_pre",
    "decode",
    "calculate_aux_loss",
)


@dataclass(kw_only=True)
class TopKTrainingSAEConfig(TrainingSAEConfig):
    """Options of a TopK SAE; names and defaults are SAELens's."""

    k: int = 100  # active latents per row
    aux_loss_coefficient: float = 1.0  # of the loss that revives dead latents; 0 turns it off
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

    def __init__(self, cfg: Any, shard: Shard, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_enc = self.zeros(self.n_local, device=device)

    @classmethod
    def works_on_codes(cls) -> bool:
        """Whether the step is that on codes; a subclass may have replaced what only the dense one calls."""
        return all(getattr(cls, name) is getattr(TopKTrainingSAE, name) for name in DENSE_HOOKS)

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

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, latents), row-major, of the ``[B, n]`` scores of this shard, or of a slice, that stay active."""
        return select_topk(scores, self.cfg.k, self.shard)

    def aux_ranking(self, dead_scores: Tensor) -> Tensor:
        """What dead latents are chosen by, of their scores: by these themselves, of either sign."""
        return dead_scores

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
        """The most dead latents that a row's residual is given to (Gao et al. 2024, appendix B.1)."""
        return max(1, self.d_out // 2)

    # ---- the step on codes ------------------------------------------------------------------------------------------

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """See the base class. One all-reduce carries the reconstruction and, where latents are dead, AuxK's."""
        if not self.works_on_codes():
            return self._dense_forward_pass(step_input)
        x = self.row_norm.normalize(step_input.sae_in.to(self.dtype))
        shift = self.shard.copy(self.b_dec) if self.cfg.apply_b_dec_to_input else None
        centred = x if shift is None else x - shift.detach()
        scores, scale = self._scores(centred)
        rows, latents = self.select(scores)
        codes = Codes(rows, latents, scores[rows, latents], *scores.shape)
        _ = codes.by_latent  # worked out once, for all that share these entries
        pre = codes.with_values(codes.values / scale[latents])
        pre_acts = encode_selected(pre, centred, shift, self.W_enc_rows, self.b_enc)

        partial = [self._decode_levels(pre_acts, codes)]
        parts = self._parts(step_input)
        for part in parts:
            dead = dead_latents(step_input, part)
            values = encode_latents(scores[:, dead] / scale[dead], dead, centred, shift, self.W_enc_rows, self.b_enc)
            partial.append(self._decode_dead(values, scores[:, dead], dead, part))
        n_levels = len(self.level_ends())
        whole = self.shard.sum(torch.cat(partial)).unflatten(0, (n_levels + len(parts), len(x)))
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
    def _scores(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """What the selection goes by, ``[B, n_local]``, and its factor over the pre-activations, ``[n_local]``."""
        scores = centred @ self.W_enc
        if not self.cfg.rescale_acts_by_decoder_norm:
            return scores.add_(self.b_enc), torch.ones_like(self.b_enc)
        norms = decoder_norms(self.W_dec)
        # (scores + b_enc) * norms in one pass over the scores.
        return torch.addcmul(self.b_enc * norms, scores, norms, out=scores), norms

    def _decode_levels(self, pre_acts: Tensor, codes: Codes) -> Tensor:
        """What the latents that each level adds decode to, as far as they are here: ``[levels · B, d_out]``."""
        ends = self.level_ends()
        if len(ends) == 1:
            return decode_selected(pre_acts, codes, self.W_dec)
        level = torch.bucketize(codes.latents, torch.tensor(ends, device=codes.latents.device), right=True)
        rows, order = (level * codes.n_rows + codes.rows).sort(stable=True)
        by_level = Codes(rows, codes.latents[order], codes.values[order], len(ends) * codes.n_rows, codes.n_latents)
        return decode_selected(pre_acts[order], by_level, self.W_dec)

    def _parts(self, step_input: TrainStepInput) -> list[AuxPart]:
        """``aux_parts``, where AuxK is on and something is dead."""
        return self.aux_parts(step_input) if step_input.num_dead and self.cfg.aux_loss_coefficient else []

    def _decode_dead(self, values: Tensor, dead_scores: Tensor, dead: Tensor, part: AuxPart) -> Tensor:
        """This shard's part of what each row's k_aux best dead latents, of either sign, decode to: ``[B, d_out]``.

        Dense over the dead latents, ``values [B, n_dead]``: k_aux is a good part of them or all.
        """
        if part.num_dead > self.k_aux:
            chosen = torch.zeros_like(dead_scores, dtype=torch.bool)
            ranking = self.aux_ranking(dead_scores.detach())
            chosen[select_topk(ranking, self.k_aux, self.shard, signed=True)] = True
            values = values.masked_fill(~chosen, 0)
        return values @ self.W_dec.index_select(0, dead)

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
        return keep(hidden_pre, *self.select(hidden_pre.detach()))

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
            values = hidden_pre[:, dead] / norms
            recons.append(self.shard.sum(self._decode_dead(values, hidden_pre[:, dead], dead, part)))
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

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return super().select(scores.abs())

    def aux_ranking(self, dead_scores: Tensor) -> Tensor:
        return dead_scores.abs()


def keep(hidden_pre: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
    """``hidden_pre [B, n]`` at the given entries, 0 elsewhere."""
    selected = torch.zeros_like(hidden_pre, dtype=torch.bool)
    selected[rows, latents] = True
    return hidden_pre.masked_fill(~selected, 0)


def dead_latents(step_input: TrainStepInput, part: AuxPart) -> Tensor:
    """int64: the dead latents of this shard that are in a part, by their local numbers."""
    return step_input.dead_neuron_mask[part.latents].nonzero().squeeze(1) + part.latents.start
