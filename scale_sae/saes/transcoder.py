"""Transcoders: SAEs whose input is taken at one hookpoint and whose target at another (Dunefsky et al. 2024).

Each kind is an SAE of that kind with a decoder to the target's width, and optionally a linear skip connection past the
latents (Paulo et al. 2025). b_dec belongs to the target, so it is not subtracted from the input.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.saes.base import TrainingSAE
from scale_sae.saes.batchtopk import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from scale_sae.saes.inference import SAEConfig
from scale_sae.saes.jumprelu import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from scale_sae.saes.released import (
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoderConfig,
    SkipTranscoderConfig,
    TranscoderConfig,
)
from scale_sae.saes.standard import StandardTrainingSAE, StandardTrainingSAEConfig
from scale_sae.saes.training_config import TrainingSAEConfig


class Transcoding(TrainingSAE):
    """What turns a class of SAEs into one of transcoders; it stands before that class among the bases."""

    @torch.no_grad()
    def initialize(self, seed: int, hookpoint: str) -> None:
        """Encoder and decoder rows are drawn apart: the directions that are read are not those that are written."""
        self.draw_rows(self.W_dec, seed, hookpoint)
        self.draw_rows(self.W_enc_rows, seed, hookpoint, "encoder")


class SkipTranscoding(Transcoding):
    """A transcoder with a skip connection.

    Attributes:
        W_skip: ``[d_out, d_in]``, 0 at the start, the same on every shard.
    """

    replicated: ClassVar[frozenset[str]] = Transcoding.replicated | {"W_skip"}

    def __init__(self, cfg: Any, shard: Shard | None = None, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.W_skip = self.zeros(self.d_out, cfg.d_in, device=device)

    @classmethod
    def multiply_adds(cls, cfg: Any) -> int:
        """As the class without a skip connection, and 2·d_in·d_out for that and its gradient."""
        return super().multiply_adds(cfg) + 2 * cfg.d_in * (cfg.d_out or cfg.d_in)

    def add_skip(self, sae_out: Tensor, sae_in: Tensor) -> Tensor:
        # After the sum over the shards, so that each of them finds the whole gradient of W_skip.
        return sae_out + sae_in.to(self.dtype) @ self.W_skip.T

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float, target_factor: float | None = None) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor, target_factor)
        self.W_skip.mul_(scaling_factor / (scaling_factor if target_factor is None else target_factor))


@dataclass(kw_only=True)
class _TranscoderOptions(TrainingSAEConfig):
    """Options of every transcoder; it stands before the options of the kind among the bases."""

    d_out: int | None = None  # width of the target; null: that of the input
    apply_b_dec_to_input: bool = False

    def problems(self) -> dict[str, str]:
        found = super().problems()
        if self.apply_b_dec_to_input:
            found["apply_b_dec_to_input"] = "must be false: a transcoder's b_dec belongs to the target"
        if self.normalize_activations not in ("none", "expected_average_only_in"):
            found["normalize_activations"] = (
                "must be none or expected_average_only_in: a transcoder's target has other statistics than its input"
            )
        return found


@dataclass(kw_only=True)
class TranscoderTrainingConfig(_TranscoderOptions, StandardTrainingSAEConfig):
    """Options of a ReLU transcoder with an L1 penalty."""

    @classmethod
    def architecture(cls) -> str:
        return "transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TranscoderConfig


@dataclass(kw_only=True)
class SkipTranscoderTrainingConfig(TranscoderTrainingConfig):
    """Options of a ReLU transcoder with a skip connection."""

    @classmethod
    def architecture(cls) -> str:
        return "skip_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return SkipTranscoderConfig


@dataclass(kw_only=True)
class JumpReLUTranscoderTrainingConfig(_TranscoderOptions, JumpReLUTrainingSAEConfig):
    """Options of a JumpReLU transcoder."""

    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUTranscoderConfig


@dataclass(kw_only=True)
class JumpReLUSkipTranscoderTrainingConfig(JumpReLUTranscoderTrainingConfig):
    """Options of a JumpReLU transcoder with a skip connection."""

    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_skip_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSkipTranscoderConfig


@dataclass(kw_only=True)
class BatchTopKTranscoderTrainingConfig(_TranscoderOptions, BatchTopKTrainingSAEConfig):
    """Options of a BatchTopK transcoder, released as a JumpReLU transcoder."""

    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUTranscoderConfig


@dataclass(kw_only=True)
class BatchTopKSkipTranscoderTrainingConfig(BatchTopKTranscoderTrainingConfig):
    """Options of a BatchTopK transcoder with a skip connection, released as a JumpReLU skip transcoder."""

    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_skip_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSkipTranscoderConfig


class TrainingTranscoder(Transcoding, StandardTrainingSAE):
    """A ReLU transcoder with an L1 penalty."""


class SkipTrainingTranscoder(SkipTranscoding, StandardTrainingSAE):
    """A ReLU transcoder with an L1 penalty and a skip connection."""


class JumpReLUTrainingTranscoder(Transcoding, JumpReLUTrainingSAE):
    """A JumpReLU transcoder."""


class JumpReLUSkipTrainingTranscoder(SkipTranscoding, JumpReLUTrainingSAE):
    """A JumpReLU transcoder with a skip connection."""


class BatchTopKTrainingTranscoder(Transcoding, BatchTopKTrainingSAE):
    """A BatchTopK transcoder."""


class BatchTopKSkipTrainingTranscoder(SkipTranscoding, BatchTopKTrainingSAE):
    """A BatchTopK transcoder with a skip connection."""

    replicated: ClassVar[frozenset[str]] = SkipTranscoding.replicated | BatchTopKTrainingSAE.replicated
