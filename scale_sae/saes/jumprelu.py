"""JumpReLU SAEs: each latent has a threshold of its own, trained by straight-through estimators."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scale_sae.collectives import Shard
from scale_sae.kernels.dense import AllEntries, Entries
from scale_sae.saes.base import TrainStepInput, TrainStepOutput, keeps_hooks
from scale_sae.saes.entrywise import EntrywiseTrainingSAE
from scale_sae.saes.standard import coefficient_problems
from scale_sae.saes.training_config import TrainCoefficientConfig, TrainingSAEConfig


@dataclass(kw_only=True)
class JumpReLUTrainingSAEConfig(TrainingSAEConfig):
    """Options of a JumpReLU SAE; names and defaults are SAELens's."""

    jumprelu_init_threshold: float = 0.01
    jumprelu_bandwidth: float = 0.05  # width around the threshold in which pre-activations give it a gradient
    # step: the expected L0 (Rajamanoharan et al. 2024); quadratic: its distance from target_l0 (Gemma Scope 2);
    # tanh: Anthropic's (January 2025).
    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "step"
    l0_coefficient: float = 1.0  # of the sparsity loss
    l0_warm_up_steps: int = 0  # steps in which the coefficient rises from 0
    pre_act_loss_coefficient: float | None = None  # of a loss that pulls dead latents back; Anthropic's is 3e-6
    jumprelu_tanh_scale: float = 4.0  # of the activations in the tanh
    jumprelu_ste_to_input: bool = False  # whether the estimators' gradient reaches the encoder too, as Anthropic's does
    target_l0: float | None = None  # of the quadratic loss

    @classmethod
    def architecture(cls) -> str:
        return "jumprelu"

    def problems(self) -> dict[str, str]:
        found = super().problems() | coefficient_problems(self, "l0_coefficient", "l0_warm_up_steps")
        if not self.jumprelu_init_threshold >= 0:
            found["jumprelu_init_threshold"] = "must be 0 or more"
        if not self.jumprelu_bandwidth > 0:
            found["jumprelu_bandwidth"] = "must be above 0"
        if self.pre_act_loss_coefficient is not None and not self.pre_act_loss_coefficient >= 0:
            found["pre_act_loss_coefficient"] = "must be 0 or more, or null"
        if self.jumprelu_sparsity_loss_mode == "quadratic" and not 0 < (self.target_l0 or 0) <= self.d_sae:
            found["target_l0"] = f"must be above 0 and at most d_sae ({self.d_sae}) for the quadratic loss"
        return found


class JumpReLUTrainingSAE(EntrywiseTrainingSAE):
    """SAELens's JumpReLU SAE.

    Attributes:
        threshold: ``[n_local]``, at least float32: steps of the learning rate are lost on it in bfloat16.
    """

    changed_in_step: ClassVar[frozenset[str] | None] = frozenset({"threshold"})

    def __init__(self, cfg: Any, shard: Shard | None = None, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_enc = self.zeros(self.n_local, device=device)
        dtype = torch.promote_types(self.dtype, torch.float32)
        start = torch.full((self.n_local,), cfg.jumprelu_init_threshold, dtype=dtype, device=device)
        self.threshold = nn.Parameter(start)

    @classmethod
    def works_on_entries(cls) -> bool:
        return keeps_hooks(cls, JumpReLUTrainingSAE)

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l0": TrainCoefficientConfig(self.cfg.l0_coefficient, self.cfg.l0_warm_up_steps)}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """See the base class. A threshold that the last update took below 0 is first put back to it."""
        self.threshold.data.clamp_(min=0)
        return super().training_forward_pass(step_input)

    @property
    def encoder_bias(self) -> Tensor:
        return self.b_enc

    def may_count(self, pre: Tensor, step_input: TrainStepInput) -> Tensor:
        # Also what an estimator sees below the threshold, which is half a bandwidth; rounding must cut none of it.
        counts = (pre <= self.threshold - 0.51 * self.cfg.jumprelu_bandwidth).logical_not_()
        if self.cfg.pre_act_loss_coefficient is not None and step_input.num_dead:
            counts |= step_input.dead_neuron_mask
        return counts

    def activate(self, entries: Entries, pre: Tensor) -> tuple[Tensor, Tensor]:
        return self._estimated(entries, pre, times_input=True), pre

    def losses_at(
        self, step_input: TrainStepInput, entries: Entries, pre: Tensor, feature_acts: Tensor
    ) -> dict[str, Tensor]:
        norms = self.W_dec.norm(dim=1)
        if self.cfg.jumprelu_sparsity_loss_mode == "tanh":
            scaled = self.cfg.jumprelu_tanh_scale * feature_acts * entries.of_latents(norms)
            per_row = self.shard.sum(entries.row_sums(torch.tanh(scaled)))
        else:
            per_row = self.shard.sum(entries.row_sums(self._estimated(entries, pre)))
            if self.cfg.jumprelu_sparsity_loss_mode == "quadratic":
                per_row = 2 / self.cfg.target_l0 * (per_row - self.cfg.target_l0) ** 2
        losses = {"l0_loss": step_input.coefficients["l0"] * per_row.mean()}
        if self.cfg.pre_act_loss_coefficient is not None:
            below = torch.relu(entries.of_latents(self.threshold.to(pre.dtype)) - pre)
            dead = entries.row_sums(below, step_input.dead_neuron_mask * norms)
            losses["pre_act_loss"] = self.cfg.pre_act_loss_coefficient * self.shard.sum(dead).mean()
        return losses

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        return self.losses_at(step_input, AllEntries(hidden_pre), hidden_pre, feature_acts)

    def _estimated(self, entries: Entries, pre: Tensor, *, times_input: bool = False) -> Tensor:
        """1 where a pre-activation is above its threshold, else 0; or that times the pre-activation."""
        threshold = entries.of_latents(self.threshold.to(pre.dtype))
        return _Jump.apply(pre, threshold, self.cfg.jumprelu_bandwidth, self.cfg.jumprelu_ste_to_input, times_input)

    def encode_as_released(self, x: Tensor) -> Tensor:
        """With thresholds that the last update took below 0 put back to it, as the next step would."""
        return self.encode(x).clamp_min(0)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Tensor]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["threshold"] = state_dict["threshold"].clamp(min=0)  # as the next step would


class _Jump(torch.autograd.Function):
    """H(x − θ), or x · H(x − θ), with straight-through estimators (Rajamanoharan et al. 2024, appendix A).

    The step's slope at the threshold is spread over a rectangle of the bandwidth ε: −(1/ε) · rect((x − θ)/ε) towards θ,
    and θ times that for x · H(x − θ), as x is θ there. Towards x it has the other sign, where it is passed on at all.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool, times_input: bool
    ) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth, ctx.ste_to_input, ctx.times_input = bandwidth, ste_to_input, times_input
        # What is not a number must reach the loss, and −∞, which is below any threshold, must not become one.
        return torch.where(x <= threshold, 0, x) if times_input else (x > threshold).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, threshold = ctx.saved_tensors
        height = threshold / ctx.bandwidth if ctx.times_input else 1 / ctx.bandwidth
        near = ((x - threshold) / ctx.bandwidth).abs() < 0.5
        estimate = height * near * grad
        grad_x = estimate if ctx.ste_to_input else None
        if ctx.times_input:
            above = (x > threshold) * grad
            grad_x = above if grad_x is None else above + grad_x
        return grad_x, -estimate.sum_to_size(threshold.shape), None, None, None
