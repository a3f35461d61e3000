"""Writes an SAE that trains, or has trained, as a folder of SAELens's format, straight from the ranks that hold it.

A block of latents at a time, each as an SAE of its own in float64: what is folded into the weights is rounded once, and
neither the first rank nor any other needs memory for a second SAE. ``consolidate`` does the same from a checkpoint.
"""

import copy
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
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
        UserError: a weight is not finite. On all ranks.
    """
    blocks_of = _Blocks(sae, {**sae.tensors(), **(tensors or {})}, scale, target_scale)
    weights, cfg_file = folder / WEIGHTS_FILE, folder / CFG_FILE
    aside = weights.with_name(f".{WEIGHTS_FILE}.writing")
    leads = sae.shard.rank == 0
    finite = torch.ones((), device=sae.device)
    with ExitStack() as stack:
        writer = None
        if leads:
            folder.mkdir(parents=True, exist_ok=True)
            writer = stack.enter_context(Writer(aside, blocks_of.layout()))
        for start, stop in blocks(0, sae.n_local, 2 * 8 * sae.cfg.d_in):
            for name, tensor in blocks_of.released(start, stop).items():
                finite *= tensor.isfinite().all().to(finite)
                axis = blocks_of.axes[name]
                if axis is None:
                    if writer is not None and start == 0:
                        writer.tensor(name, tensor)
                    continue
                gathered = sae.shard.all_gather(tensor.to(sae.device))
                if writer is not None:
                    put = writer.rows if axis == 0 else writer.columns
                    for shard, part in enumerate(gathered.cpu()):
                        put(name, shard * sae.n_local + start, part)
    if not sae.shard.all_reduce(finite, "min"):
        if leads:
            aside.unlink()
        raise UserError(f"{folder}: the SAE's weights are not finite: its training has diverged; nothing was saved")
    if leads:
        _write_json(cfg_file, cfg_dict(sae))
        os.replace(aside, weights)
    return weights, cfg_file


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


class _Blocks:
    """This shard's latents in the form of the release, by blocks.

    Attributes:
        axes: the dimension of the latents in each released tensor; None where it has none.
    """

    def __init__(self, sae: Any, tensors: Mapping[str, Tensor], scale: float, target_scale: float):
        self.sae, self.tensors = sae, tensors
        self.scale, self.target_scale = scale, target_scale
        self.dtype = DTYPES[sae.cfg.dtype]
        self.axes = latent_axes(lambda n: self._made_up(n).inference_state_dict())

    def _made_up(self, n_latents: int) -> Any:
        return type(self.sae)(of_latents(self.sae.cfg, n_latents), Shard())

    @torch.no_grad()
    def released(self, start: int, stop: int) -> dict[str, Tensor]:
        """The released tensors of local latents ``start..stop``, and those without latents, on the CPU."""
        block = self._made_up(stop - start)
        for name, tensor in block.tensors().items():
            own = self.tensors[name].detach()
            tensor.copy_(own if name in block.replicated else own[start:stop])
        if (self.scale, self.target_scale) != (1, 1):
            block.fold_activation_norm_scaling_factor(self.scale, self.target_scale)
        return {name: cast(name, tensor, self.dtype) for name, tensor in block.inference_state_dict().items()}

    def layout(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of every released tensor of the whole SAE."""
        found = {}
        for name, tensor in self.released(0, 1).items():
            shape, axis = list(tensor.shape), self.axes[name]
            if axis is not None:
                shape[axis] = self.sae.cfg.d_sae
            found[name] = tensor.dtype, shape
        return found


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(value, indent=1))
    os.replace(aside, path)
