"""Standard SAEs: ReLU with an L1 penalty on the activations."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.saes.base import TrainCoefficientConfig, TrainingSAE, TrainingSAEConfig, TrainStepInput


@dataclass(kw_only=True)
class StandardTrainingSAEConfig(TrainingSAEConfig):
    """Options of a standard SAE; names and defaults are SAELens's."""

    l1_coefficient: float = 1.0  # of the sparsity penalty
    lp_norm: float = 1.0  # the p of the norm of each row's activations that is the penalty
    l1_warm_up_steps: int = 0  # steps in which the coefficient rises from 0

    @classmethod
    def architecture(cls) -> str:
        return "standard"

    def problems(self) -> dict[str, str]:
        found = super().problems() | coefficient_problems(self, "l1_coefficient", "l1_warm_up_steps")
        if not self.lp_norm > 0:
            found["lp_norm"] = "must be above 0"
        return found


def coefficient_problems(cfg: Any, coefficient: str, warm_up_steps: str) -> dict[str, str]:
    """What is wrong with a loss coefficient and its warm-up."""
    found = {}
    for name in (coefficient, warm_up_steps):
        if not getattr(cfg, name) >= 0:
            found[name] = "must be 0 or more"
    return found


class StandardTrainingSAE(TrainingSAE):
    """SAELens's standard SAE: the penalty is the p-norm, per row, of the activations times their decoder norms."""

    changed_in_step: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, cfg: Any, shard: Shard, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_enc = self.zeros(self.n_local, device=device)

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden_pre = self.pre_activations(x, self.b_enc)
        return self.activation_fn(hidden_pre), hidden_pre

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        weighted = feature_acts * self.W_dec.norm(dim=1)
        return {"l1_loss": step_input.coefficients["l1"] * self._norm_over_latents(weighted).mean()}

    def _norm_over_latents(self, acts: Tensor) -> Tensor:
        """The p-norm of each row of ``[B, n_local]`` over the latents of all shards, ``[B]``."""
        p = self.cfg.lp_norm
        if p == 1:
            return self.shard.sum(acts.abs().sum(dim=-1))
        # Powers of 0 have no slope to follow; a row without activations has norm 0 and pulls at nothing.
        powers = torch.where(acts == 0, 0, acts.abs().masked_fill(acts == 0, 1) ** p)
        return self.shard.sum(powers.sum(dim=-1)) ** (1 / p)
