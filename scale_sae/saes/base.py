"""What every SAE in training has: config, parameters, their initialisation, and the shape of a training step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from scale_sae.collectives import Shard
from scale_sae.kernels.codes import Codes
from scale_sae.seeds import generator

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
INIT_BLOCK = 64  # latents that share a random stream; a shard draws whole blocks and keeps its own rows


@dataclass
class TrainingSAEConfig(ABC):
    """Options of every architecture; names and defaults are SAELens's."""

    d_in: int  # width of the activations
    d_sae: int  # latents, over all shards
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"  # of the parameters
    apply_b_dec_to_input: bool = True  # subtract b_dec before the encoder
    normalize_activations: Literal["none"] = "none"
    reshape_activations: Literal["none"] = "none"
    decoder_init_norm: float | None = 0.1  # norm of each decoder row at the start; null: as drawn

    @classmethod
    @abstractmethod
    def architecture(cls) -> str:
        """The name that a config file gives this architecture."""

    def problems(self) -> dict[str, str]:
        """What is wrong with the values: field → what it must be. Types are checked before."""
        found = {}
        if self.d_sae <= 0:
            found["d_sae"] = "must be at least 1"
        if self.decoder_init_norm is not None and not self.decoder_init_norm > 0:
            found["decoder_init_norm"] = "must be more than 0, or null to keep the norms as drawn"
        return found


@dataclass
class TrainStepInput:
    """One batch of one SAE, the same on every shard but for the dead latents.

    Attributes:
        sae_in: ``[B, d_in]``, finite; rows of weight 0 hold zeros.
        dead_neuron_mask: bool ``[n_local]``, this shard's dead latents.
        num_dead: how many latents are dead over all shards.
        n_training_steps: optimizer steps made before this one.
        is_logging_step: whether the metrics of this step are written down.
        row_weights: ``[B]`` of 0 and 1 in the dtype of sae_in: which rows count. None: all.
        coefficients: the present value of each loss coefficient that warms up.
    """

    sae_in: Tensor
    dead_neuron_mask: Tensor
    num_dead: int
    n_training_steps: int
    is_logging_step: bool
    row_weights: Tensor | None = None
    coefficients: dict[str, float] = field(default_factory=dict)


@dataclass
class TrainStepOutput:
    """What a training step made. All but ``fire_counts`` and ``codes`` are the same on every shard.

    Attributes:
        sae_in: ``[B, d_in]``, as given.
        sae_out: ``[B, d_in]``, the whole reconstruction.
        loss: scalar, to be minimised.
        losses: its named parts, scalars.
        metrics: other scalars worth logging that only the SAE knows.
        fire_counts: int64 ``[n_local]``, the rows on which each latent of this shard was active.
        l0: int64 ``[B]``, active latents of each row over all shards.
        codes: the activations of this shard; None for an architecture that works on dense activations.
    """

    sae_in: Tensor
    sae_out: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    fire_counts: Tensor
    l0: Tensor
    codes: Codes | None = None

    @property
    def fired(self) -> Tensor:
        """bool ``[n_local]``: the latents of this shard that were active on any row."""
        return self.fire_counts > 0


class TrainingSAE(nn.Module, ABC):
    """One shard's part of an SAE that trains: plain local tensors, every per-latent one with the latent as dimension 0.

    Attributes:
        cfg: the options, of the whole SAE.
        shard: this shard's place among the shards; its slice of the latents is ``shard.rows(cfg.d_sae)``.
        W_enc_rows: ``[n_local, d_in]``.
        W_dec: ``[n_local, d_in]``.
        b_dec: ``[d_in]``, the same on every shard.
        replicated: names of the parameters that are whole on every shard; all others are per latent.
    """

    replicated: ClassVar[frozenset[str]] = frozenset({"b_dec"})

    def __init__(self, cfg: TrainingSAEConfig, shard: Shard, device: torch.device | str = "cpu"):
        """Parameters start at 0: call ``initialize``, or load them. UserError where d_sae cannot be split evenly."""
        super().__init__()
        self.cfg: Any = cfg  # of the architecture's own config class
        self.shard = shard
        self.dtype = DTYPES[cfg.dtype]
        self.rows = shard.rows(cfg.d_sae)
        self.n_local = self.rows.stop - self.rows.start
        self.W_enc_rows = self.zeros(self.n_local, cfg.d_in, device=device)
        self.W_dec = self.zeros(self.n_local, cfg.d_in, device=device)
        self.b_dec = self.zeros(cfg.d_in, device=device)

    def zeros(self, *shape: int, device: torch.device | str) -> nn.Parameter:
        """A parameter of zeros in the SAE's dtype."""
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=device))

    @property
    def W_enc(self) -> Tensor:
        """``[d_in, n_local]``: a view of W_enc_rows in SAELens's orientation."""
        return self.W_enc_rows.T

    @torch.no_grad()
    def initialize(self, seed: int, hookpoint: str) -> None:
        """SAELens's initialisation: W_dec Kaiming uniform with rows of norm ``decoder_init_norm``, W_enc its transpose.

        A row depends on the seed, the hookpoint and its global latent index alone, so any number of shards start alike.
        """
        for parameter in self.parameters():
            parameter.zero_()
        bound = math.sqrt(6 / self.cfg.d_in)
        for block in range(self.rows.start // INIT_BLOCK, math.ceil(self.rows.stop / INIT_BLOCK)):
            drawn = torch.empty(INIT_BLOCK, self.cfg.d_in, dtype=torch.float64)
            drawn.uniform_(-bound, bound, generator=generator(seed, hookpoint, block))
            if self.cfg.decoder_init_norm is not None:
                drawn *= self.cfg.decoder_init_norm / drawn.norm(dim=1, keepdim=True)
            first = block * INIT_BLOCK
            start, stop = max(first, self.rows.start), min(first + INIT_BLOCK, self.rows.stop)
            self.W_dec[start - self.rows.start : stop - self.rows.start] = drawn[start - first : stop - first]
        self.W_enc_rows.copy_(self.W_dec)

    @abstractmethod
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The losses of one batch. Rows of weight 0 take no part in selection, losses, gradients or counts."""

    @classmethod
    @abstractmethod
    def export_rows(cls, cfg: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released per-latent tensors (W_enc as ``[n, d_in]`` rows) from a block of n latents of every stored one."""

    @classmethod
    def export_replicated(cls, cfg: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released tensors that belong to no latent, from the stored ones."""
        return {"b_dec": tensors["b_dec"]}

    @classmethod
    @abstractmethod
    def inference_config(cls, cfg: Any) -> dict[str, Any]:
        """The fields of the released SAE's cfg.json, without its metadata."""


def squared_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Squared distance per row, ``[B]``, of two ``[B, d_in]``; in float32 where they are narrower."""
    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    return (reconstruction.to(dtype) - target.to(dtype)).square().sum(dim=1)


def mean_over_rows(per_row: Tensor, row_weights: Tensor | None) -> Tensor:
    """The mean of ``[B]`` over the rows of weight 1."""
    if row_weights is None:
        return per_row.mean()
    weights = row_weights.to(per_row.dtype)
    return (per_row * weights).sum() / weights.sum()
