"""Released SAEs, read from SAELens's format: whole on one device, for evaluation and use."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from scale_sae.collectives import Shard, select_topk
from scale_sae.errors import UserError, nearest
from scale_sae.saes.base import DTYPES
from scale_sae.saes.topk import decoder_norms


@dataclass
class SAEConfig:
    """What a released SAE's cfg.json says; fields that this class does not have are ignored, as in SAELens."""

    architecture: str
    d_in: int
    d_sae: int
    dtype: str
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class TopKSAEConfig(SAEConfig):
    """A TopK SAE's cfg.json."""

    k: int = 100
    rescale_acts_by_decoder_norm: bool = False


class SAE(nn.Module, ABC):
    """A released SAE.

    Attributes:
        cfg: its cfg.json.
        W_enc: ``[d_in, d_sae]``.
        W_dec: ``[d_sae, d_in]``.
        b_enc: ``[d_sae]``.
        b_dec: ``[d_in]``.
    """

    def __init__(self, cfg: Any, tensors: dict[str, Tensor]):
        super().__init__()
        self.cfg = cfg
        self.W_enc = nn.Parameter(tensors["W_enc"], requires_grad=False)
        self.W_dec = nn.Parameter(tensors["W_dec"], requires_grad=False)
        self.b_enc = nn.Parameter(tensors["b_enc"], requires_grad=False)
        self.b_dec = nn.Parameter(tensors["b_dec"], requires_grad=False)

    @staticmethod
    def load_from_disk(
        folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "SAE":
        """The SAE of a folder with ``cfg.json`` and ``sae_weights.safetensors``, of its own dtype unless one is given.

        UserError for a folder without a cfg.json, an unknown architecture, or an input normalisation that is not built.
        """
        folder = Path(folder)
        if not (folder / "cfg.json").is_file():
            raise UserError(f"{folder}: holds no cfg.json; give the folder of one SAE of a release")
        raw = json.loads((folder / "cfg.json").read_text())
        if raw["architecture"] not in _CLASSES:
            name, known = raw["architecture"], ", ".join(_CLASSES)
            raise UserError(
                f"{folder}/cfg.json: unknown architecture {name!r}{nearest(name, _CLASSES)}; known are {known}"
            )
        sae_class, config_class = _CLASSES[raw["architecture"]]
        known_fields = {f.name for f in fields(config_class)}
        cfg = config_class(**{name: value for name, value in raw.items() if name in known_fields})
        for name in ("normalize_activations", "reshape_activations"):
            if getattr(cfg, name) != "none":
                raise UserError(f"{folder}/cfg.json: {name} {getattr(cfg, name)!r} is not supported; it must be none")
        tensors = load_file(folder / "sae_weights.safetensors", device=str(device))
        dtype = dtype or DTYPES[cfg.dtype]
        return sae_class(cfg, {name: tensor.to(dtype) for name, tensor in tensors.items()})

    def pre_activations(self, x: Tensor) -> Tensor:
        """``[..., d_in]`` to ``[..., d_sae]``, in the SAE's dtype."""
        x = x.to(self.W_enc.dtype)
        if self.cfg.apply_b_dec_to_input:
            x = x - self.b_dec
        return F.linear(x, self.W_enc.T, self.b_enc)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations ``[..., d_sae]`` of ``[..., d_in]``."""

    @abstractmethod
    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction ``[..., d_in]`` from ``[..., d_sae]``."""

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of ``[..., d_in]``."""
        return self.decode(self.encode(x))


class TopKSAE(SAE):
    """A released TopK SAE. Ties go to the lower latent, as in training."""

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations ``[..., d_sae]``; NonFiniteError where a pre-activation is NaN or infinite."""
        scores = self.pre_activations(x)
        if self.cfg.rescale_acts_by_decoder_norm:
            scores = scores * decoder_norms(self.W_dec)
        flat = scores.reshape(-1, self.cfg.d_sae)
        selected = torch.zeros_like(flat, dtype=torch.bool)
        selected[select_topk(flat, self.cfg.k, Shard())] = True
        return scores.masked_fill(~selected.view_as(scores), 0)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction ``[..., d_in]``."""
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts / decoder_norms(self.W_dec)
        return feature_acts @ self.W_dec + self.b_dec


_CLASSES: dict[str, tuple[type[SAE], type[SAEConfig]]] = {"topk": (TopKSAE, TopKSAEConfig)}
