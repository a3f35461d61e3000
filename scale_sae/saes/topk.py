"""TopK SAEs: each row keeps its k largest positive pre-activations; dead latents learn what these leave over."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_sae.collectives import Shard, select_topk
from scale_sae.kernels.codes import Codes, decode_selected, encode_latents, encode_selected
from scale_sae.saes.base import (
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
    mean_over_rows,
    squared_error,
)

SMALLEST_NORM = 1e-8  # SAELens's floor under a decoder row's norm


@dataclass
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


class TopKTrainingSAE(TrainingSAE):
    """SAELens's TopK SAE in sparse codes.

    With ``rescale_acts_by_decoder_norm`` a pre-activation is multiplied by its decoder row's norm for the selection and
    divided by it again for decoding. The two cancel, in the value and in the gradient, so norms enter the selection and
    the reported activations only.
    """

    def __init__(self, cfg: TopKTrainingSAEConfig, shard: Shard, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_enc = self.zeros(self.n_local, device=device)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """See the base class. One all-reduce carries the reconstruction and, where latents are dead, AuxK's."""
        x, weights = step_input.sae_in.to(self.dtype), step_input.row_weights
        shift = self.shard.copy(self.b_dec) if self.cfg.apply_b_dec_to_input else None
        centred = x if shift is None else x - shift.detach()
        scores, scale = self._scores(centred)
        codes = self._select(scores, weights)
        pre = codes.with_values(codes.values / scale[codes.latents])
        pre_acts = encode_selected(pre, centred, shift, self.W_enc_rows, self.b_enc)
        partial = decode_selected(pre_acts, codes, self.W_dec)

        trains_dead = step_input.num_dead > 0 and self.cfg.aux_loss_coefficient > 0
        if trains_dead:
            partial = torch.cat([partial, self._dead_partial(step_input, scores, scale, centred, shift)])
        whole = self.shard.sum(partial)
        sae_out = whole[: len(x)] + self.b_dec

        mse_loss = mean_over_rows(squared_error(sae_out, x), weights)
        aux_loss = torch.zeros_like(mse_loss)
        if trains_dead:
            residual = (x - sae_out).detach()
            # A few dead latents cannot be asked to explain as much as k_aux of them.
            share = min(step_input.num_dead / self.k_aux, 1.0)
            error = mean_over_rows(squared_error(whole[len(x) :], residual), weights)
            aux_loss = self.cfg.aux_loss_coefficient * share * error
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            loss=mse_loss + aux_loss,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss},
            metrics={},
            fire_counts=codes.by_latent[1].diff(),
            l0=self.shard.all_reduce(codes.row_offsets.diff()),
            codes=codes,
        )

    @property
    def k_aux(self) -> int:
        """The most dead latents that a row's residual is given to (Gao et al. 2024, appendix B.1)."""
        return self.cfg.d_in // 2

    @torch.no_grad()
    def _scores(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """What the selection goes by, ``[B, n_local]``, and its factor over the pre-activations, ``[n_local]``."""
        scores = centred @ self.W_enc
        if not self.cfg.rescale_acts_by_decoder_norm:
            return scores.add_(self.b_enc), torch.ones_like(self.b_enc)
        norms = decoder_norms(self.W_dec)
        # (scores + b_enc) * norms in one pass over the scores.
        return torch.addcmul(self.b_enc * norms, scores, norms, out=scores), norms

    def _select(self, scores: Tensor, weights: Tensor | None) -> Codes:
        """This shard's part of each row's TopK; none where the row's weight is 0."""
        rows, latents = select_topk(scores, self.cfg.k, self.shard)
        if weights is not None:
            counts = weights[rows] > 0
            rows, latents = rows[counts], latents[counts]
        return Codes(rows, latents, scores[rows, latents], *scores.shape)

    def _dead_partial(
        self, step_input: TrainStepInput, scores: Tensor, scale: Tensor, centred: Tensor, shift: Tensor | None
    ) -> Tensor:
        """This shard's part of what each row's k_aux best dead latents, of either sign, decode to: ``[B, d_in]``.

        Dense over the dead latents: k_aux is a good part of them or all.
        """
        dead = step_input.dead_neuron_mask.nonzero().squeeze(1)
        dead_scores = scores.index_select(1, dead)
        values = encode_latents(dead_scores / scale[dead], dead, centred, shift, self.W_enc_rows, self.b_enc)
        if step_input.num_dead > self.k_aux:
            chosen = torch.zeros_like(dead_scores, dtype=torch.bool)
            chosen[select_topk(dead_scores, self.k_aux, self.shard, signed=True)] = True
            values = values.masked_fill(~chosen, 0)
        return values @ self.W_dec.index_select(0, dead)

    @classmethod
    def export_rows(cls, cfg: TopKTrainingSAEConfig, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """With rescaling the norms move from W_dec into the encoder, which changes neither activations nor output."""
        W_enc, W_dec, b_enc = rows["W_enc_rows"], rows["W_dec"], rows["b_enc"]
        if not cfg.rescale_acts_by_decoder_norm:
            return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc}
        norms = decoder_norms(W_dec.double())
        return {
            "W_enc": (W_enc.double() * norms[:, None]).to(W_enc.dtype),
            "W_dec": (W_dec.double() / norms[:, None]).to(W_dec.dtype),
            "b_enc": (b_enc.double() * norms).to(b_enc.dtype),
        }

    @classmethod
    def inference_config(cls, cfg: TopKTrainingSAEConfig) -> dict[str, Any]:
        return {
            "architecture": "topk",
            "d_in": cfg.d_in,
            "d_sae": cfg.d_sae,
            "dtype": cfg.dtype,
            "device": "cpu",
            "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
            "normalize_activations": cfg.normalize_activations,
            "reshape_activations": cfg.reshape_activations,
            "k": cfg.k,
            "rescale_acts_by_decoder_norm": cfg.rescale_acts_by_decoder_norm,
        }


def decoder_norms(W_dec: Tensor) -> Tensor:
    """The norm of each row of ``[n, d_in]``, ``[n]``, not less than SAELens's floor."""
    return W_dec.norm(dim=1).clamp_min(SMALLEST_NORM)
