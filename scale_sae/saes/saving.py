"""Writes an SAE that trains, or has trained, as a folder of SAELens's format, straight from the ranks that hold it.

A block of latents at a time, each as an SAE of its own in float64: what is folded into the weights is rounded once, and
neither the first rank nor any other needs memory for a second SAE. ``consolidate`` does the same from a checkpoint.
"""

import copy
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.saes.inference import CFG_FILE, DTYPES, SAELENS_VERSION, WEIGHTS_FILE, cast
from scale_sae.tensorfile import Writer, blocks


def save_release(
    sae: Any, folder: Path, tensors: Mapping[str, Tensor] | None = None, scale: float = 1.0, target_scale: float = 1.0
) -> tuple[Path, Path]:
    """Writes ``sae_weights.safetensors`` and ``cfg.json`` into ``folder``, which is made. All shards call it.

    Args:
        sae: a ``TrainingSAE``; it stays as it is.
        tensors: this shard's, in place of the SAE's own of the same names: wider ones, which train in its stead.
        scale, target_scale: what inputs and targets are multiplied by in training; folded into what is written.

    Returns:
        The paths of the two files, each of which appears whole or not at all.

    Raises:
        UserError: a weight is not finite, or the disk is full or cannot be written. On all ranks.
    """
    blocks_of = _LiveBlocks(sae, {**sae.tensors(), **(tensors or {})}, scale, target_scale)
    dtype = DTYPES[sae.cfg.dtype]
    weights, cfg_file = folder / WEIGHTS_FILE, folder / CFG_FILE
    aside = weights.with_name(f".{WEIGHTS_FILE}.writing")
    leads = sae.shard.rank == 0
    agree = partial(sae.shard.agree, folder=str(folder))
    finite = torch.ones((), device=sae.device)
    with ExitStack() as stack:
        shapes = blocks_of.shapes(dtype)
        writer = agree(lambda: stack.enter_context(_begin(aside, shapes)) if leads else None)
        for start, stop in blocks(0, sae.n_local, 2 * 8 * sae.cfg.d_in):
            for name, tensor in blocks_of.released(start, stop, dtype).items():
                finite *= tensor.isfinite().all().to(finite)
                axis = blocks_of.axes[name]
                if axis is None:
                    if start == 0:
                        agree(partial(_put_whole, writer, name, tensor))
                    continue
                gathered = sae.shard.all_gather(tensor.to(sae.device))
                firsts = range(start, sae.cfg.d_sae, sae.n_local)
                agree(partial(_put_latents, writer, name, axis, firsts, gathered))
        agree(stack.close)
    if not sae.shard.all_reduce(finite, "min"):
        if leads:
            aside.unlink()
        raise UserError(f"{folder}: the SAE's weights are not finite: its training has diverged; nothing was saved")
    agree(lambda: _finish(sae, aside, weights, cfg_file) if leads else None)
    return weights, cfg_file


def _begin(path: Path, shapes: Mapping[str, tuple[torch.dtype, list[int]]]) -> Writer:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Writer(path, shapes)


def _put_whole(writer: Writer | None, name: str, tensor: Tensor) -> None:
    if writer is not None:
        writer.tensor(name, tensor)


def _put_latents(writer: Writer | None, name: str, axis: int, firsts: range, gathered: Tensor) -> None:
    """Writes every shard's latents of a block, ``gathered [shards, ...]``, from the ``firsts`` on."""
    if writer is None:
        return
    put = writer.rows if axis == 0 else writer.columns
    for first, part in zip(firsts, gathered.cpu(), strict=True):
        put(name, first, part)


def _finish(sae: Any, aside: Path, weights: Path, cfg_file: Path) -> None:
    _write_json(cfg_file, cfg_dict(sae))
    os.replace(aside, weights)


def cfg_dict(sae: Any) -> dict[str, Any]:
    """What the ``cfg.json`` of an SAE holds: what its readers need, and in ``metadata`` where it comes from."""
    cfg = sae.cfg.get_inference_sae_cfg_dict()
    metadata = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "training_library": "scale_sae",
        "training_architecture": sae.cfg.architecture(),
        **sae.metadata,
        "training_architecture_details": {name: value for name, value in asdict(sae.cfg).items() if name not in cfg},
    }
    return {**cfg, "metadata": metadata}


def of_latents(cfg: Any, n_latents: int) -> Any:
    """The config of an SAE like that of ``cfg``, with as many latents, in float64: so a release is rounded once."""
    cfg = copy.copy(cfg)
    cfg.d_sae, cfg.dtype = n_latents, "float64"
    return cfg


def latent_axes(released: Callable[[int], Mapping[str, Tensor]]) -> dict[str, int | None]:
    """The dimension of the latents in each released tensor: the one that grows with their number. None: it has none.

    ``released(n)`` gives the tensors of an SAE of n latents.
    """
    few, more = released(2), released(3)
    return {
        name: next((axis for axis, size in enumerate(few[name].shape) if size != more[name].shape[axis]), None)
        for name in few
    }


class LatentBlocks(ABC):
    """A trained SAE in the form of its release, by blocks of latents: SAEs of their own, in float64, on the CPU.

    Attributes:
        scale, target_scale: what inputs and targets are multiplied by in training; a release has them folded in.
        axes: the dimension of the latents in each released tensor; None where it has none.
    """

    def __init__(self, cfg: Any, scale: float, target_scale: float):
        self.cfg = cfg
        self.scale, self.target_scale = scale, target_scale
        self.axes = latent_axes(lambda n: self.convert(self.made_up(n).inference_state_dict()))

    @abstractmethod
    def made_up(self, n_latents: int) -> Any:
        """A ``TrainingSAE`` like this one, of other latents: all zeros, float64."""

    @abstractmethod
    def trained(self, name: str, start: int, stop: int, *, replicated: bool) -> Tensor:
        """Latents ``start..stop`` of a tensor as it is trained, or all of one that shards replicate."""

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """SAELens's names and orientation, as the release has them."""
        return dict(tensors)

    @torch.no_grad()
    def block(self, start: int, stop: int) -> Any:
        """Latents ``start..stop`` as a ``TrainingSAE`` of their own, float64, as they were trained."""
        sae = self.made_up(stop - start)
        for name, tensor in sae.tensors().items():
            tensor.copy_(self.trained(name, start, stop, replicated=name in sae.replicated))
        return sae

    @torch.no_grad()
    def unscaled_block(self, start: int, stop: int) -> Any:
        """``block`` for inputs as they are, where training scaled them."""
        sae = self.block(start, stop)
        if (self.scale, self.target_scale) != (1, 1):
            sae.fold_activation_norm_scaling_factor(self.scale, self.target_scale)
        return sae

    @torch.no_grad()
    def released(self, start: int, stop: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the release holds of latents ``start..stop`` (W_enc as ``[d_in, stop - start]``) and what has none."""
        tensors = self.convert(self.unscaled_block(start, stop).inference_state_dict())
        return {
            name: cast(name, tensor, dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }

    def shapes(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of every released tensor of the whole SAE."""
        found = {}
        for name, tensor in self.released(0, 1, dtype).items():
            shape, axis = list(tensor.shape), self.axes[name]
            if axis is not None:
                shape[axis] = self.cfg.d_sae
            found[name] = tensor.dtype, shape
        return found


class _LiveBlocks(LatentBlocks):
    """This shard's latents; those of a block are counted from its first."""

    def __init__(self, sae: Any, tensors: Mapping[str, Tensor], scale: float, target_scale: float):
        self.sae, self.tensors = sae, tensors
        super().__init__(sae.cfg, scale, target_scale)

    def made_up(self, n_latents: int) -> Any:
        return type(self.sae)(of_latents(self.cfg, n_latents), Shard())

    def trained(self, name: str, start: int, stop: int, *, replicated: bool) -> Tensor:
        own = self.tensors[name].detach()
        return own if replicated else own[start:stop]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(value, indent=1))
    os.replace(aside, path)
