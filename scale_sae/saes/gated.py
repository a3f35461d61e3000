"""Gated SAEs: one encoder, whose gate and magnitudes have biases of their own (Rajamanoharan et al. 2024)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.saes.base import TrainCoefficientConfig, TrainingSAE, TrainingSAEConfig, TrainStepInput
from scale_sae.saes.standard import coefficient_problems


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


class GatedTrainingSAE(TrainingSAE):
    """SAELens's gated SAE, whose auxiliary reconstruction trains the decoder too.

    Attributes:
        b_gate, b_mag: ``[n_local]``, biases of the gate and of the magnitudes.
        r_mag: ``[n_local]``, log of the magnitudes' factor over the gate's encoder rows.
    """

    changed_in_step: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, cfg: Any, shard: Shard, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_gate = self.zeros(self.n_local, device=device)
        self.b_mag = self.zeros(self.n_local, device=device)
        self.r_mag = self.zeros(self.n_local, device=device)

    @classmethod
    def multiply_adds(cls, cfg: Any) -> int:
        """As the base class, twice: the auxiliary loss encodes and decodes once more."""
        return 2 * super().multiply_adds(cfg)

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The second result is the pre-activation of the magnitudes."""
        return self._encode(self._products(x))

    def _products(self, x: Tensor) -> Tensor:
        """Inputs times encoder rows, ``[B, n_local]``: the gate and the magnitudes share them."""
        return self.pre_activations(x, torch.zeros_like(self.b_gate))

    def _encode(self, products: Tensor) -> tuple[Tensor, Tensor]:
        gate = (products + self.b_gate > 0).to(self.dtype)
        hidden_pre = products * self.r_mag.exp() + self.b_mag
        return gate * self.activation_fn(hidden_pre), hidden_pre

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The gate's own activations are kept sparse, and must reconstruct the input: its step has no slope."""
        gate_acts = torch.relu(self._products(step_input.sae_in) + self.b_gate)
        l1 = self.shard.sum((gate_acts * self.W_dec.norm(dim=1)).sum(dim=-1)).mean()
        via_gate = self.add_skip(self.decode(gate_acts), step_input.sae_in)
        error = self.mse_loss_fn(via_gate, step_input.target).sum(dim=-1).mean()
        return {"l1_loss": step_input.coefficients["l1"] * l1, "auxiliary_reconstruction_loss": error}
