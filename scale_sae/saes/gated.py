"""Gated SAEs: one encoder, whose gate and magnitudes have biases of their own (Rajamanoharan et al. 2024)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.kernels.dense import AllEntries, Entries
from scale_sae.saes.base import TrainStepInput, keeps_hooks
from scale_sae.saes.entrywise import EntrywiseTrainingSAE
from scale_sae.saes.standard import coefficient_problems
from scale_sae.saes.training_config import TrainCoefficientConfig, TrainingSAEConfig


@dataclass(kw_only=True)
class GatedTrainingSAEConfig(TrainingSAEConfig):
    """Options of a gated SAE; names and defaults are SAELens's."""

    l1_coefficient: float = 1.0  # of the sparsity penalty
    l1_warm_up_steps: int = 0  # steps in which the coefficient rises from 0

    @classmethod
    def architecture(cls) -> str:
        return "gated"

    def problems(self) -> dict[str, str]:
        return super().problems() | coefficient_problems(self, "l1_coefficient", "l1_warm_up_steps")


class GatedTrainingSAE(EntrywiseTrainingSAE):
    """SAELens's gated SAE, whose auxiliary reconstruction trains the decoder too.

    Attributes:
        b_gate, b_mag: ``[n_local]``, biases of the gate and of the magnitudes.
        r_mag: ``[n_local]``, log of the magnitudes' factor over the gate's encoder rows.
    """

    def __init__(self, cfg: Any, shard: Shard | None = None, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_gate = self.zeros(self.n_local, device=device)
        self.b_mag = self.zeros(self.n_local, device=device)
        self.r_mag = self.zeros(self.n_local, device=device)

    @classmethod
    def works_on_entries(cls) -> bool:
        return keeps_hooks(cls, GatedTrainingSAE)

    @classmethod
    def multiply_adds(cls, cfg: Any) -> int:
        """As the base class, with a second decoder for the auxiliary loss, and on dense activations an encoder too."""
        d_out = getattr(cfg, "d_out", None) or cfg.d_in
        encoder = 0 if cls.works_on_entries() else 2 * cfg.d_in * cfg.d_sae
        return super().multiply_adds(cfg) + encoder + 3 * cfg.d_sae * d_out

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    @property
    def encoder_bias(self) -> Tensor:
        """None: the gate and the magnitudes share the products, and each adds a bias of its own."""
        return torch.zeros_like(self.b_gate)

    def may_count(self, pre: Tensor, step_input: TrainStepInput) -> Tensor:
        return (pre <= -self.b_gate).logical_not_()

    def activate(self, entries: Entries, pre: Tensor) -> tuple[Tensor, Tensor]:
        """The second result is the pre-activation of the magnitudes."""
        gate = (pre + entries.of_latents(self.b_gate) > 0).to(pre.dtype)
        hidden_pre = pre * entries.of_latents(self.r_mag.exp()) + entries.of_latents(self.b_mag)
        return gate * self.activation_fn(hidden_pre), hidden_pre

    def losses_at(
        self, step_input: TrainStepInput, entries: Entries, pre: Tensor, feature_acts: Tensor
    ) -> dict[str, Tensor]:
        """The gate's own activations are kept sparse, and must reconstruct the input: its step has no slope."""
        gate_acts = torch.relu(pre + entries.of_latents(self.b_gate))
        l1 = self.shard.sum(entries.row_sums(gate_acts, self.W_dec.norm(dim=1))).mean()
        via_gate = self.reconstruct(step_input, entries, gate_acts)
        error = self.mse_loss_fn(via_gate, step_input.target).sum(dim=-1).mean()
        return {"l1_loss": step_input.coefficients["l1"] * l1, "auxiliary_reconstruction_loss": error}

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        pre = self.pre_activations(step_input.sae_in, self.encoder_bias)
        return self.losses_at(step_input, AllEntries(pre), pre, feature_acts)
