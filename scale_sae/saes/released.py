"""The architectures of released SAEs, under SAELens's names. Formulas are SAELens's (6.54)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.saes.inference import SAE, SAEConfig, check_positive_integer, register_sae_class
from scale_sae.selection import select_topk

SMALLEST_NORM = 1e-8  # SAELens's floor under a decoder row's norm


def decoder_norms(W_dec: Tensor) -> Tensor:
    """The norm of each row of ``[n, d_out]``, ``[n]``, not less than SAELens's floor."""
    return W_dec.norm(dim=1).clamp_min(SMALLEST_NORM)


@dataclass(kw_only=True)
class StandardSAEConfig(SAEConfig):
    """A standard SAE's cfg.json."""

    @classmethod
    def architecture(cls) -> str:
        return "standard"


class StandardSAE(SAE):
    """``relu(pre)``, or another function of each pre-activation in a subclass."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc = self.zeros(self.cfg.d_sae)

    def encode(self, x: Tensor) -> Tensor:
        return self.activation_fn(self.pre_activations(x))


@dataclass(kw_only=True)
class GatedSAEConfig(SAEConfig):
    """A gated SAE's cfg.json."""

    @classmethod
    def architecture(cls) -> str:
        return "gated"


class GatedSAE(SAE):
    """``relu(x W_enc ∘ e^r_mag + b_mag)`` where the gate ``x W_enc + b_gate`` is above 0 (Rajamanoharan et al. 2024).

    Attributes:
        b_gate: ``[d_sae]``.
        b_mag: ``[d_sae]``.
        r_mag: ``[d_sae]``.
    """

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_gate = self.zeros(self.cfg.d_sae)
        self.b_mag = self.zeros(self.cfg.d_sae)
        self.r_mag = self.zeros(self.cfg.d_sae)

    def pre_activations(self, x: Tensor) -> Tensor:
        """Those of the magnitudes, ``[..., d_sae]``."""
        return self._magnitudes(self.process_sae_in(x) @ self.W_enc)

    def encode(self, x: Tensor) -> Tensor:
        projected = self.process_sae_in(x) @ self.W_enc
        acts = self.activation_fn(self._magnitudes(projected))
        return acts.masked_fill(projected + self.b_gate <= 0, 0)

    def _magnitudes(self, projected: Tensor) -> Tensor:
        return projected * self.r_mag.exp() + self.b_mag


@dataclass(kw_only=True)
class JumpReLUSAEConfig(SAEConfig):
    """A JumpReLU SAE's cfg.json."""

    @classmethod
    def architecture(cls) -> str:
        return "jumprelu"


class JumpReLUSAE(SAE):
    """``relu(pre)`` where ``pre`` is above the latent's threshold.

    Attributes:
        threshold: ``[d_sae]``.
    """

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc = self.zeros(self.cfg.d_sae)
        self.threshold = self.zeros(self.cfg.d_sae)

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre_activations(x)
        return self.activation_fn(pre).masked_fill(pre <= self.threshold, 0)


@dataclass(kw_only=True)
class TopKSAEConfig(SAEConfig):
    """A TopK SAE's cfg.json.

    Attributes:
        k: active latents per row.
        rescale_acts_by_decoder_norm: select and report activations as if every decoder row had norm 1.
    """

    k: int = 100
    rescale_acts_by_decoder_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_integer("k", self.k)

    @classmethod
    def architecture(cls) -> str:
        return "topk"


class TopK(nn.Module):
    """Keeps each row's k largest values above 0. Ties go to the lower latent, as in training."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, scores: Tensor) -> Tensor:
        """``[..., d_sae]`` to ``[..., d_sae]``; NonFiniteError where a score is NaN or infinite."""
        flat = scores.reshape(-1, scores.shape[-1])
        selected = select_topk(self.order(flat), self.k, Shard())
        return flat.new_zeros(flat.shape).index_put(selected, flat[selected]).view_as(scores)

    def order(self, scores: Tensor) -> Tensor:
        """What the selection goes by."""
        return scores


class AbsTopK(TopK):
    """Keeps each row's k values of largest magnitude, with their signs."""

    def order(self, scores: Tensor) -> Tensor:
        return scores.abs()


class TopKSAE(SAE):
    """The k largest pre-activations of each row, where above 0."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc = self.zeros(self.cfg.d_sae)

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return TopK(self.cfg.k)

    def encode(self, x: Tensor) -> Tensor:
        scores = self.pre_activations(x)
        if self.cfg.rescale_acts_by_decoder_norm:
            scores = scores * decoder_norms(self.W_dec)
        return self.activation_fn(scores)

    def decode(self, feature_acts: Tensor) -> Tensor:
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts / decoder_norms(self.W_dec)
        return super().decode(feature_acts)


@dataclass(kw_only=True)
class AbsTopKSAEConfig(TopKSAEConfig):
    """An AbsTopK SAE's cfg.json."""

    @classmethod
    def architecture(cls) -> str:
        return "abstopk"


class AbsTopKSAE(TopKSAE):
    """The k pre-activations of largest magnitude of each row, of either sign."""

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return AbsTopK(self.cfg.k)


@dataclass(kw_only=True)
class TranscoderConfig(SAEConfig):
    """A transcoder's cfg.json.

    Attributes:
        d_out: width of what it predicts.
        apply_b_dec_to_input: must be given as false: b_dec belongs to the output.
    """

    d_out: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_integer("d_out", self.d_out)
        if self.apply_b_dec_to_input:
            raise UserError(f"apply_b_dec_to_input: must be false for a {self.architecture()}")

    @classmethod
    def architecture(cls) -> str:
        return "transcoder"


class Transcoder(StandardSAE):
    """Predicts the activations of one place from those of another, of width d_out; none of its output is rescaled."""

    @property
    def d_out(self) -> int:
        """Width of what it predicts."""
        return self.cfg.d_out

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The prediction ``[..., d_out]``. The statistics of the input say nothing about it."""
        return feature_acts @ self.W_dec + self.b_dec


@dataclass(kw_only=True)
class SkipTranscoderConfig(TranscoderConfig):
    """A skip transcoder's cfg.json."""

    @classmethod
    def architecture(cls) -> str:
        return "skip_transcoder"


class SkipTranscoder(Transcoder):
    """A transcoder that also passes its input on through a matrix (Paulo et al. 2025).

    Attributes:
        W_skip: ``[d_out, d_in]``.
    """

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_skip = self.zeros(self.cfg.d_out, self.cfg.d_in)

    def add_skip(self, sae_out: Tensor, x: Tensor) -> Tensor:
        """``sae_out + W_skip x``, of the input as it came: not normalised."""
        return sae_out + F.linear(x.to(self.dtype), self.W_skip)


@dataclass(kw_only=True)
class JumpReLUTranscoderConfig(TranscoderConfig):
    """A JumpReLU transcoder's cfg.json."""

    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_transcoder"


class JumpReLUTranscoder(JumpReLUSAE, Transcoder):
    """A transcoder whose latents fire above their thresholds."""


@dataclass(kw_only=True)
class JumpReLUSkipTranscoderConfig(JumpReLUTranscoderConfig):
    """A JumpReLU skip transcoder's cfg.json."""

    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_skip_transcoder"


class JumpReLUSkipTranscoder(JumpReLUTranscoder, SkipTranscoder):
    """A transcoder with thresholds and a skip."""


_RELEASED: list[tuple[type[SAE], type[SAEConfig]]] = [
    (StandardSAE, StandardSAEConfig),
    (GatedSAE, GatedSAEConfig),
    (JumpReLUSAE, JumpReLUSAEConfig),
    (TopKSAE, TopKSAEConfig),
    (AbsTopKSAE, AbsTopKSAEConfig),
    (Transcoder, TranscoderConfig),
    (SkipTranscoder, SkipTranscoderConfig),
    (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
]
for _sae_class, _config_class in _RELEASED:
    register_sae_class(_config_class.architecture(), _sae_class, _config_class)
