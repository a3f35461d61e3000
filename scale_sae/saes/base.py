"""What every SAE in training has: parameters, their initialisation, a training step, and its way to a release.

Names and signatures are SAELens's, so that a class written for it shards after a change of imports and a few words:
tensors over latents hold this shard's latents only, and what mixes latents goes through ``self.shard``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, nn

from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.kernels.codes import Codes, Encoder
from scale_sae.kernels.dense import encode_dense
from scale_sae.kernels.rows import Collected
from scale_sae.saes import saving
from scale_sae.saes.inference import DTYPES
from scale_sae.saes.norms import row_norm
from scale_sae.saes.training_config import Config, TrainCoefficientConfig
from scale_sae.seeds import generator

INIT_BLOCK = 64  # latents that share a random stream; a shard draws whole blocks and keeps its own rows


@dataclass(kw_only=True)
class TrainStepInput:
    """One batch of one SAE, the same on every shard but for the dead latents.

    Attributes:
        sae_in: ``[B, d_in]``, finite. Where dp ranks share the batch, this rank's rows, which may be none.
        coefficients: the present value of each of ``get_coefficients``.
        dead_neuron_mask: bool ``[n_local]``, this shard's dead latents.
        n_training_steps: optimizer steps made before this one.
        is_logging_step: whether the metrics of this step are written down.
        num_dead: how many latents are dead over all shards.
        target: ``[B, d_out]``, what to reconstruct: ``sae_in`` itself, but for transcoders.
    """

    sae_in: Tensor
    coefficients: dict[str, float]
    dead_neuron_mask: Tensor
    n_training_steps: int
    is_logging_step: bool
    num_dead: int
    target: Tensor = None  # type: ignore[assignment]  # never None after __post_init__

    def __post_init__(self) -> None:
        if self.target is None:
            self.target = self.sae_in


@dataclass
class TrainStepOutput:
    """What a training step made. All but the activations is the same on every shard.

    Attributes:
        sae_in: ``[B, d_in]``, as given.
        sae_out: ``[B, d_out]``, the whole reconstruction.
        feature_acts: ``[B, n_local]``, this shard's activations. A latent has fired on a row where it is not 0.
        hidden_pre: ``[B, n_local]``, before the activation function.
        loss: scalar, to be minimised: a mean over the rows, with or without terms of the parameters alone. Where dp
            ranks share a batch, it is averaged over them by their rows; and so are its parts.
        losses: its named parts, scalars.
        metrics: other scalars worth logging that only the SAE knows; what can be called is called when it is logged.
    """

    sae_in: Tensor
    sae_out: Tensor
    feature_acts: Tensor
    hidden_pre: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor | float | int | Callable[[], Tensor | float | int]] = field(default_factory=dict)

    @property
    def fire_counts(self) -> Tensor:
        """int64 ``[n_local]``: the rows on which each latent of this shard was active."""
        return (self.feature_acts != 0).sum(0)

    @property
    def active_latents(self) -> Tensor:
        """int64 scalar: the latents of this shard that were active, summed over the rows."""
        return (self.feature_acts != 0).sum()


class SparseTrainStepOutput(TrainStepOutput):
    """The output of an SAE that works on codes: its dense activations are made when somebody asks for them.

    Attributes:
        codes: the activations of this shard.
    """

    def __init__(
        self,
        *,
        sae_in: Tensor,
        sae_out: Tensor,
        codes: Codes,
        dense: Callable[[], tuple[Tensor, Tensor]],
        loss: Tensor,
        losses: dict[str, Tensor],
    ):
        """``dense`` gives (feature_acts, hidden_pre) as functions of the parameters."""
        self.sae_in, self.sae_out = sae_in, sae_out
        self.loss, self.losses = loss, losses
        self.metrics = {}
        self.codes = codes
        self._dense = dense

    @cached_property
    def _dense_activations(self) -> tuple[Tensor, Tensor]:
        return self._dense()

    @property
    def feature_acts(self) -> Tensor:  # type: ignore[override]
        return self._dense_activations[0]

    @property
    def hidden_pre(self) -> Tensor:  # type: ignore[override]
        return self._dense_activations[1]

    @property
    def fire_counts(self) -> Tensor:
        return self.codes.by_latent[1].diff()

    @property
    def active_latents(self) -> Tensor:
        return torch.tensor(len(self.codes.latents), device=self.codes.latents.device)


# What a config of SAELens's says beside the options: it is said elsewhere here, or asks for nothing.
NOT_OPTIONS = frozenset({"architecture", "device", "metadata", "use_sparse_activations"})

# What a subclass may replace only on dense activations: steps on codes or on few entries do not call it.
DENSE_HOOKS = (
    "get_activation_fn",
    "activation_fn",
    "process_sae_in",
    "pre_activations",
    "encode",
    "encode_with_hidden_pre",
    "decode",
    "calculate_aux_loss",
)


class TrainingSAE(nn.Module, ABC, Generic[Config]):
    """One shard's part of an SAE that trains: plain local tensors, every per-latent one with the latent as dimension 0.

    Attributes:
        cfg: the options, of the whole SAE.
        metadata: where the SAE comes from, for the ``metadata`` of its cfg.json: ``hook_name``, ``model_name``, ...
        shard: this shard's place among the shards; its slice of the latents is ``shard.rows(cfg.d_sae)``.
        n_local: the latents of this shard.
        d_out: width of what is reconstructed: d_in, but for transcoders.
        W_enc_rows: ``[n_local, d_in]``.
        W_dec: ``[n_local, d_out]``.
        b_dec: ``[d_out]``, the same on every shard.
        replicated: names of the parameters and buffers that are whole on every shard; all others are per latent.
        row_gradients: where the backward pass of a step on codes leaves the gradients of W_enc_rows and W_dec, by name,
            as products of sparse factors; None: in their ``grad``.
        pre_activation_bytes: most bytes of pre-activations that a step on codes makes at once.
        changed_in_step: names of the parameters that ``training_forward_pass`` itself changes in place; None: any may
            be, and with dp ranks or in bfloat16 all are copied after each forward pass.
    """

    cfg: Any  # of the architecture's own config class
    replicated: ClassVar[frozenset[str]] = frozenset({"b_dec"})
    changed_in_step: ClassVar[frozenset[str] | None] = None

    def __init__(self, cfg: Any, shard: Shard | None = None, device: torch.device | str = "cpu"):
        """Weights are 0 until ``initialize`` or a checkpoint fills them; ``from_dict`` makes an SAE that is filled.

        ``shard``: None for an SAE that is whole. UserError if d_sae cannot be split evenly.
        """
        super().__init__()
        shard = Shard() if shard is None else shard
        self.cfg = cfg
        self.metadata: dict[str, Any] = {}
        self.shard = shard.over(cfg.d_sae)
        self.dtype = DTYPES[cfg.dtype]
        self.rows = shard.rows(cfg.d_sae)
        self.n_local = self.rows.stop - self.rows.start
        self.d_out: int = getattr(cfg, "d_out", None) or cfg.d_in
        self.row_norm = row_norm(cfg.normalize_activations)
        self.row_gradients: dict[str, Collected] | None = None
        self.pre_activation_bytes = 2**29
        self.W_enc_rows = self.zeros(self.n_local, cfg.d_in, device=device)
        self.W_dec = self.zeros(self.n_local, self.d_out, device=device)
        self.b_dec = self.zeros(self.d_out, device=device)

    @staticmethod
    def from_dict(
        config_dict: Mapping[str, Any],
        shard: Shard | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> "TrainingSAE[Any]":
        """A new SAE, of the class that is registered for its ``architecture``, with its first weights.

        Args:
            config_dict: what the config's ``to_dict`` gives; one of SAELens's configs will do.
            shard: this process's, where several share the latents (``launched_shard``); None: the SAE is whole.
            device: where it goes; None: the ``device`` that the dict names, else the CPU.
            seed: of the weights, which do not depend on the number of shards.

        Raises:
            UserError: an unknown architecture; an option that is unknown, missing or wrong; d_sae cannot be split
                evenly over the shards.
        """
        from scale_sae.saes import registry  # which needs this module

        architecture, d_in = config_dict.get("architecture"), config_dict.get("d_in")
        if not isinstance(architecture, str) or not isinstance(d_in, int):
            raise UserError("the config of an SAE: names no architecture and d_in; give what its to_dict() returns")
        options = {name: value for name, value in config_dict.items() if name not in NOT_OPTIONS}
        cfg = registry.training_config(architecture, d_in, options, "sae")
        device = config_dict.get("device", "cpu") if device is None else device
        sae = registry.create(architecture, cfg, Shard() if shard is None else shard, device)
        sae.metadata = dict(config_dict.get("metadata") or {})
        sae.initialize(seed, "")
        return sae

    @classmethod
    def multiply_adds(cls, cfg: Any) -> int:
        """What a training step of such an SAE costs per row, over all shards; by it SAEs are dealt out to groups.

        Matrix products alone, those of a class on dense activations: 2·d_in·d_sae for the encoder and its gradient (its
        input has none), 3·d_sae·d_out for the decoder, its gradient and that of the activations.
        """
        d_out = getattr(cfg, "d_out", None) or cfg.d_in
        return 2 * cfg.d_in * cfg.d_sae + 3 * cfg.d_sae * d_out

    def zeros(self, *shape: int, device: torch.device | str) -> nn.Parameter:
        """A parameter of zeros in the SAE's dtype."""
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=device))

    def collected(self, name: str) -> Collected | None:
        """Where a backward pass leaves the gradient of the matrix ``name``; None: autograd gets it, dense.

        So it is where nobody collects it, and where a subclass has frozen it, computes it or looks at its gradient.
        """
        matrix = getattr(self, name)
        seen = matrix._backward_hooks or matrix._post_accumulate_grad_hooks
        return (self.row_gradients or {}).get(name) if matrix.is_leaf and matrix.requires_grad and not seen else None

    def block_rows(self, columns: int) -> int:
        """How many rows of a dense matrix with as many columns may exist at once."""
        return max(1, self.pre_activation_bytes // (columns * self.dtype.itemsize))

    @property
    def device(self) -> torch.device:
        """That of the weights."""
        return self.b_dec.device

    @property
    def W_enc(self) -> Tensor:
        """``[d_in, n_local]``: a view of W_enc_rows in SAELens's orientation."""
        return self.W_enc_rows.T

    @torch.no_grad()
    def initialize(self, seed: int, hookpoint: str) -> None:
        """SAELens's initialisation: W_dec Kaiming uniform with rows of norm ``decoder_init_norm``, W_enc its transpose.

        A row depends on the seed, the hookpoint and its global latent index alone, so any number of shards start alike.
        """
        self.draw_rows(self.W_dec, seed, hookpoint)
        self.W_enc_rows.copy_(self.W_dec)

    @torch.no_grad()
    def draw_rows(self, target: Tensor, *key: int | str) -> None:
        """Fills ``target [n_local, d]`` with Kaiming uniform rows of norm ``decoder_init_norm``, if it is set.

        ``key`` names the random stream; row i depends on the key and its global latent index.
        """
        width = target.shape[1]
        bound = math.sqrt(6 / width)
        for block in range(self.rows.start // INIT_BLOCK, math.ceil(self.rows.stop / INIT_BLOCK)):
            drawn = torch.empty(INIT_BLOCK, width, dtype=torch.float64)
            drawn.uniform_(-bound, bound, generator=generator(*key, block))
            if self.cfg.decoder_init_norm is not None:
                drawn *= self.cfg.decoder_init_norm / drawn.norm(dim=1, keepdim=True)
            first = block * INIT_BLOCK
            start, stop = max(first, self.rows.start), min(first + INIT_BLOCK, self.rows.stop)
            target[start - self.rows.start : stop - self.rows.start] = drawn[start - first : stop - first]

    # ---- the training step ------------------------------------------------------------------------------------------

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """What makes ``[B, n]`` activations of this shard's pre-activations, or of a slice of them."""
        return torch.relu

    @property
    def activation_fn(self) -> Callable[[Tensor], Tensor]:
        """What ``get_activation_fn`` gives, which is what a subclass replaces."""
        # No attribute: one that is a method of the SAE would make it refer to itself, and outlive its last use.
        return self.get_activation_fn()

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """The loss coefficients by name; a step finds their present values in ``step_input.coefficients``."""
        return {}

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """``[B, d_in]`` as the encoder sees it: in the SAE's dtype, normalised, less b_dec where the config says so."""
        x = self.row_norm.normalize(sae_in.to(self.dtype))
        return x - self.shard.copy(self.b_dec) if self.cfg.apply_b_dec_to_input else x

    def pre_activations(self, sae_in: Tensor, bias: Tensor) -> Tensor:
        """``process_sae_in(sae_in) @ W_enc + bias``, ``[B, n_local]``, for a bias ``[n_local]``.

        The same value and gradients as that line of code, without the product that a gradient of its input would take.
        """
        if type(self).process_sae_in is not TrainingSAE.process_sae_in:
            return self.process_sae_in(sae_in) @ self.W_enc + bias  # of a researcher's own
        return encode_dense(self.encoder(sae_in, bias))

    def encoder(self, sae_in: Tensor, bias: Tensor) -> Encoder:
        """What makes this shard's pre-activations of ``[B, d_in]``, for a bias ``[n_local]``."""
        x = self.row_norm.normalize(sae_in.to(self.dtype))
        shift = self.shard.copy(self.b_dec) if self.cfg.apply_b_dec_to_input else None
        return Encoder(x if shift is None else x - shift.detach(), shift, self.W_enc_rows, bias)

    @abstractmethod
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, d_in]`` to this shard's (feature_acts, hidden_pre), ``[B, n_local]`` each."""

    def encode(self, x: Tensor) -> Tensor:
        """``[B, d_in]`` to this shard's activations ``[B, n_local]``."""
        return self.encode_with_hidden_pre(x)[0]

    def decode(self, feature_acts: Tensor, latents: slice = slice(None)) -> Tensor:
        """The whole reconstruction ``[B, d_out]`` from this shard's activations, ``[B, n]`` of the n local ``latents``.

        One all-reduce. Rows are restored by the statistics of the rows that were last encoded.
        """
        return self.row_norm.restore(self.shard.sum(feature_acts @ self.W_dec[latents]) + self.b_dec)

    def add_skip(self, sae_out: Tensor, sae_in: Tensor) -> Tensor:
        """``[..., B, d_out]`` with what a skip connection takes straight from the input: here nothing."""
        return sae_out

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction ``[B, d_out]`` of ``[B, d_in]``."""
        return self.add_skip(self.decode(self.encode(x)), x)

    @staticmethod
    def mse_loss_fn(preds: Tensor, target: Tensor) -> Tensor:
        """Squared differences, elementwise; in float32 where they are narrower."""
        dtype = torch.promote_types(preds.dtype, torch.float32)
        return (preds.to(dtype) - target.to(dtype)).square()

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """What is added to the squared error: named scalars, or one scalar. Sums over latents need ``shard.sum``."""
        return {}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The losses of one batch: squared error, summed over the width and averaged over rows, and the aux losses."""
        feature_acts, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        sae_out = self.add_skip(self.decode(feature_acts), step_input.sae_in)
        mse_loss = self.mse_loss_fn(sae_out, step_input.target).sum(dim=-1).mean()
        aux_losses = self.calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        losses = {"mse_loss": mse_loss}
        if isinstance(aux_losses, dict):
            losses |= aux_losses
        loss = sum(aux_losses.values(), mse_loss) if isinstance(aux_losses, dict) else mse_loss + aux_losses
        return TrainStepOutput(step_input.sae_in, sae_out, feature_acts, hidden_pre, loss, losses)

    # ---- the release ------------------------------------------------------------------------------------------------

    def encode_as_released(self, x: Tensor) -> Tensor:
        """As ``encode``, by the rule of the release where that is another. Rows must know nothing of each other."""
        return self.encode(x)

    def activation_factor(self, target_factor: float) -> float:
        """What the release's activations are multiplied by here, where targets are multiplied by ``target_factor``."""
        return 1.0

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float, target_factor: float | None = None) -> None:
        """Makes weights for inputs times ``scaling_factor`` those of inputs as they are, in place.

        ``target_factor`` is the factor of what is reconstructed, for transcoders; else the same.
        """
        target_factor = scaling_factor if target_factor is None else target_factor
        self.W_enc_rows.mul_(scaling_factor)
        self.W_dec.div_(target_factor)
        self.b_dec.div_(target_factor)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Tensor]) -> None:
        """Turns the tensors of this SAE into those of a release, in place.

        Consolidation calls it on blocks of latents, each an SAE of its own with as many latents as it has, in float64;
        so what it does to a latent must depend on that latent and on replicated tensors alone. W_enc is ``[d_in, n]``.
        """

    @torch.no_grad()
    def inference_state_dict(self) -> dict[str, Tensor]:
        """Copies of this shard's tensors as a release has them, W_enc as ``[d_in, n_local]``."""
        state = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}
        state["W_enc"] = state.pop("W_enc_rows").T
        self.process_state_dict_for_saving_inference(state)
        return state

    def save_inference_model(self, path: Path | str) -> tuple[Path, Path]:
        """Writes the SAE as SAELens releases one; ``scale_sae.SAE.load_from_disk`` and SAELens's read it.

        All shards call it; the first one writes. The SAE stays as it is.

        Args:
            path: the folder of the SAE; made if it is not there.

        Returns:
            The paths of ``sae_weights.safetensors`` and ``cfg.json``, which are written aside and renamed.

        Raises:
            UserError: a weight is not finite, or the factor of ``expected_average_only_in`` is not folded in.
        """
        if self.cfg.normalize_activations == "expected_average_only_in":
            raise UserError(
                "normalize_activations: expected_average_only_in, but its factor is not folded into the weights yet; "
                "save what SAETrainer.fit returns"
            )
        return saving.save_release(self, Path(path))

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers: what a checkpoint holds."""
        return dict(self.named_parameters()) | dict(self.named_buffers())


def keeps_hooks(cls: type, of: type) -> bool:
    """Whether a class has the ``DENSE_HOOKS`` of another that it derives from."""
    return all(getattr(cls, name) is getattr(of, name) for name in DENSE_HOOKS)
