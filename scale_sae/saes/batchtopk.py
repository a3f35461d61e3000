"""BatchTopK SAEs, which share k · batch active latents between the rows, and Matryoshka SAEs, which nest such SAEs."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.saes.base import TrainStepInput, TrainStepOutput
from scale_sae.saes.inference import SAEConfig
from scale_sae.saes.released import JumpReLUSAEConfig
from scale_sae.saes.topk import AuxPart, TopKTrainingSAE, TopKTrainingSAEConfig
from scale_sae.selection import BatchTopK, Selection

# In a release's threshold: many, since the thresholds of single batches of 512 rows differ by several percent, and so
# does L0; few, since weights change.
RECENT_STEPS = 32


@dataclass(kw_only=True)
class BatchTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """Options of a BatchTopK SAE; names and defaults are SAELens's."""

    k: float = 100  # type: ignore[assignment]  # active latents per row, in the mean over a batch
    topk_threshold_lr: float = 0.01  # share of each step in the running mean of the threshold that is logged

    @classmethod
    def architecture(cls) -> str:
        return "batchtopk"

    def problems(self) -> dict[str, str]:
        found = super().problems()
        if "k" in found:
            found["k"] = f"must be above 0 and at most d_sae ({self.d_sae})"
        if not 0 < self.topk_threshold_lr <= 1:
            found["topk_threshold_lr"] = "must be above 0 and at most 1"
        return found

    def get_inference_config_class(self) -> type[SAEConfig]:
        """A JumpReLU SAE: used row by row, it cannot compare with a batch."""
        return JumpReLUSAEConfig


class BatchTopKTrainingSAE(TopKTrainingSAE):
    """SAELens's BatchTopK SAE: the k · B best of a whole batch stay active.

    Attributes:
        topk_threshold: float64 scalar, the running mean of each batch's smallest activation, in which every batch
            counts from the first on (SAELens's begins at 0 and takes thousands of steps to leave it).
        topk_threshold_weight: float64 scalar, what the mean's weights add up to.
        release_threshold: float64 scalar, the release's: the running mean of the thresholds of the last steps alone.
    """

    replicated: ClassVar[frozenset[str]] = TopKTrainingSAE.replicated | {
        "topk_threshold",
        "topk_threshold_weight",
        "release_threshold",
    }
    topk_threshold: Tensor
    topk_threshold_weight: Tensor
    release_threshold: Tensor

    def __init__(self, cfg: Any, shard: Shard | None = None, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        for name in ("topk_threshold", "topk_threshold_weight", "release_threshold"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device=device))

    def selection(self, n_rows: int) -> Selection:
        rows_of_all = self.shard.dp.total(n_rows, self.b_dec.device)
        return BatchTopK(int(self.cfg.k * rows_of_all), self.shard)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        smallest = self._smallest(output)
        self.update_topk_threshold(smallest)
        self._update_release_threshold(smallest, step_input.n_training_steps)
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    def _smallest(self, output: TrainStepOutput) -> Tensor:
        """The smallest activation of a step over all shards and rows, float64; infinite where there is none."""
        codes = getattr(output, "codes", None)
        acts = (output.feature_acts[output.feature_acts > 0] if codes is None else codes.values).detach()
        infinity = torch.full((1,), torch.inf, dtype=torch.float64, device=acts.device)
        least = self.shard.all_reduce(torch.cat([acts.double(), infinity]).amin(), "min")
        return self.shard.dp.all_reduce(least, "min")

    @torch.no_grad()
    def update_topk_threshold(self, smallest: Tensor) -> None:
        """Takes the smallest activation of a batch into the running mean; nothing where it is infinite."""
        found = smallest.isfinite()
        rate = self.cfg.topk_threshold_lr * found.double()
        weight = self.topk_threshold_weight * (1 - rate) + rate
        step = torch.where(found, smallest - self.topk_threshold, 0.0)
        self.topk_threshold += torch.where(weight > 0, rate / weight, 0.0) * step
        self.topk_threshold_weight.copy_(weight)

    @torch.no_grad()
    def _update_release_threshold(self, smallest: Tensor, steps: int) -> None:
        """The same for the release, after ``steps`` steps: at first, while weights move fast, of few of the last."""
        rate = min(1.0, max(1 / RECENT_STEPS, 8 / (steps + 1)))
        self.release_threshold += torch.where(smallest.isfinite(), rate * (smallest - self.release_threshold), 0.0)

    def encode_as_released(self, x: Tensor) -> Tensor:
        """What lies above the release's threshold."""
        hidden_pre = self._hidden_pre(x)
        # With a dimension, so that it is compared in its own dtype, as a release's are.
        threshold = self.release_threshold[None].to(torch.promote_types(self.dtype, torch.float32))
        return torch.relu(hidden_pre).masked_fill(hidden_pre <= threshold, 0)

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float, target_factor: float | None = None) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor, target_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            # The thresholds are in units of the decoder's norms, which the fold has just divided.
            self.topk_threshold /= scaling_factor if target_factor is None else target_factor
            self.release_threshold /= scaling_factor if target_factor is None else target_factor

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Tensor]) -> None:
        """As TopK, with one threshold for all latents."""
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["topk_threshold"], state_dict["topk_threshold_weight"]
        state_dict["threshold"] = torch.ones_like(state_dict["b_enc"]) * state_dict.pop("release_threshold")


@dataclass(kw_only=True)
class MatryoshkaBatchTopKTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """Options of a Matryoshka BatchTopK SAE; names and defaults are SAELens's."""

    matryoshka_widths: list[int] = field(default_factory=list)  # latents of each nested SAE; d_sae may be left out
    use_matryoshka_aux_loss: bool = False  # dead latents reconstruct what the SAE of their own level leaves over

    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_batchtopk"

    def problems(self) -> dict[str, str]:
        found = super().problems()
        widths = self.matryoshka_widths
        if not widths:
            found["matryoshka_widths"] = "must name the widths of the nested SAEs, for example [512, 2048]"
        elif widths[0] <= 0 or any(wide <= narrow for narrow, wide in pairwise(widths)):
            found["matryoshka_widths"] = "must be positive and increase from each to the next"
        elif widths[-1] > self.d_sae:
            found["matryoshka_widths"] = f"must not exceed d_sae ({self.d_sae})"
        return found

    @property
    def widths(self) -> list[int]:
        """The latents of each level, the last with all of them."""
        inner = [width for width in self.matryoshka_widths if width < self.d_sae]
        return [*inner, self.d_sae]


class MatryoshkaBatchTopKTrainingSAE(BatchTopKTrainingSAE):
    """SAELens's Matryoshka SAE (Bussmann et al. 2025): a BatchTopK SAE, prefixes of which reconstruct too."""

    def level_ends(self) -> list[int]:
        return [self.shard.prefix(width).stop for width in self.cfg.widths]

    def inner_losses(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {
            f"inner_mse_loss_{width}": self.mse_loss_fn(output, target).sum(dim=-1).mean()
            for width, output in zip(self.cfg.widths[:-1], outputs, strict=True)
        }

    def aux_parts(self, step_input: TrainStepInput) -> list[AuxPart]:
        if not self.cfg.use_matryoshka_aux_loss:
            return super().aux_parts(step_input)
        ends = self.level_ends()
        slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        dead = step_input.dead_neuron_mask
        counts = self.shard.all_reduce(torch.stack([dead[part].sum() for part in slices])).tolist()
        return [AuxPart(part, count, i) for i, (part, count) in enumerate(zip(slices, counts, strict=True)) if count]
