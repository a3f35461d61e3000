"""Standard SAEs: ReLU with an L1 penalty on the activations."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.kernels.dense import AllEntries, Entries
from scale_sae.saes.base import TrainStepInput, keeps_hooks
from scale_sae.saes.entrywise import EntrywiseTrainingSAE
from scale_sae.saes.training_config import TrainCoefficientConfig, TrainingSAEConfig


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


class StandardTrainingSAE(EntrywiseTrainingSAE):
    """SAELens's standard SAE: the penalty is the p-norm, per row, of the activations times their decoder norms."""

    def __init__(self, cfg: Any, shard: Shard | None = None, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_enc = self.zeros(self.n_local, device=device)

    @classmethod
    def works_on_entries(cls) -> bool:
        return keeps_hooks(cls, StandardTrainingSAE)

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    @property
    def encoder_bias(self) -> Tensor:
        return self.b_enc

    def may_count(self, pre: Tensor, step_input: TrainStepInput) -> Tensor:
        return (pre <= 0).logical_not_()

    def activate(self, entries: Entries, pre: Tensor) -> tuple[Tensor, Tensor]:
        return self.activation_fn(pre), pre

    def losses_at(
        self, step_input: TrainStepInput, entries: Entries, pre: Tensor, feature_acts: Tensor
    ) -> dict[str, Tensor]:
        norms, p = self.W_dec.norm(dim=1), self.cfg.lp_norm
        if p == 1:
            per_row = self.shard.sum(entries.row_sums(feature_acts.abs(), norms))
        else:
            weighted = feature_acts * entries.of_latents(norms)
            # Powers of 0 have no slope to follow; a row without activations has norm 0 and pulls at nothing.
            none = weighted == 0
            powers = torch.where(none, 0, weighted.abs().masked_fill(none, 1) ** p)
            per_row = self.shard.sum(entries.row_sums(powers)) ** (1 / p)
        return {"l1_loss": step_input.coefficients["l1"] * per_row.mean()}

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        return self.losses_at(step_input, AllEntries(hidden_pre), hidden_pre, feature_acts)
