"""Runs that were never trained: checkpoints of random SAEs, for the tests of what reads checkpoints."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sae import checkpoint, config
from scale_sae.collectives import Shard
from scale_sae.saes import registry
from scale_sae.seeds import generator

D_IN = 32
# Of inputs and targets, in SAEs whose config scales them; powers of 2, so that scaling a number does not round it.
SCALES = (0.25, 8.0)


def resolved_config(saes: Sequence[dict[str, Any]], hookpoints: Sequence[str], **keys: Any) -> dict[str, Any]:
    train = {"lr": 4e-4, "dead_feature_window_tokens": 500}
    tree = {"hookpoints": list(hookpoints), "saes": list(saes), "recipe": "saelens", "train": train, **keys}
    return config.to_dict(config.from_dict(tree))


def scales(cfg: Any) -> tuple[float, float]:
    """(factor of the inputs, factor of the targets) in the made-up training of an SAE."""
    if cfg.normalize_activations != "expected_average_only_in":
        return 1.0, 1.0
    return SCALES if hasattr(cfg, "d_out") else (SCALES[0], SCALES[0])


def weights(architecture: str, cfg: Any, sae_id: str) -> dict[str, Tensor]:
    """Every tensor of an SAE, as one that was trained: decoder norms far from 1, biases far from 0."""
    draw = generator("made-up", sae_id)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), dtype=torch.float64, generator=draw)

    made = {}
    for name, tensor in registry.create(architecture, cfg, Shard()).tensors().items():
        if name == "W_dec":
            made[name] = normal(tensor.shape) * (0.05 + 2 * torch.rand(len(tensor), 1, generator=draw).double())
        elif "threshold" in name:
            made[name] = 0.5 + normal(tensor.shape).abs()
        else:
            made[name] = (1.0 if tensor.dim() == 2 else 0.5) * normal(tensor.shape)
        made[name] = made[name].to(tensor.dtype)
    return made


def tensors(architecture: str, cfg: Any, sae_id: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(row tensors, replicated tensors) of an SAE's checkpoint."""
    whole = registry.training_class(architecture).replicated
    own = weights(architecture, cfg, sae_id)
    rows = {name: tensor for name, tensor in own.items() if name not in whole}
    moments = {f"adam.exp_avg.{name}": torch.ones_like(tensor) for name, tensor in rows.items()}
    counters = {
        "tokens_since_fired": torch.arange(cfg.d_sae) * 10,
        "fired_count": torch.arange(cfg.d_sae) % 7,
    }
    replicated = {
        **{name: tensor for name, tensor in own.items() if name in whole},
        **job_scalars(100, scales(cfg)),
        "adam.exp_avg.b_dec": torch.zeros(cfg.d_in),
    }
    return {**rows, **moments, **counters}, replicated


def job_scalars(window_tokens: int, scales: tuple[float, float] = (1.0, 1.0)) -> dict[str, Tensor]:
    """What a checkpoint holds once per SAE and that is no tensor of the SAE."""
    return {
        "window_tokens": torch.tensor(window_tokens),
        "activation_scale": torch.tensor(scales[0], dtype=torch.float64),
        "target_scale": torch.tensor(scales[1], dtype=torch.float64),
        "skipped": torch.tensor(0),
        "frozen": torch.tensor(False),
    }


def save_run(
    run_dir: Path,
    step: int = 40,
    saes: Sequence[dict[str, Any]] = ({"architecture": "topk", "d_sae": 96, "k": 8},),
    hookpoints: Sequence[str] = ("model.layers.1",),
    cuts: Sequence[int] = (24, 70),
    keys: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of one SAE per entry and hookpoint, cut at the latents ``cuts``; returns its folder."""
    resolved = resolved_config(saes, hookpoints, **(keys or {}))
    root = checkpoint.begin(run_dir, step)
    digests: dict[str, checkpoint.Digest] = {}
    jobs = []
    for index, entry in enumerate(config.from_dict(resolved).saes):
        for hookpoint in hookpoints:
            sae_id = f"{hookpoint}/{entry.name}" if entry.name else hookpoint
            cfg = registry.training_config(entry.architecture, D_IN, entry.options, f"saes.{index}")
            target = entry.hookpoint_out
            assert target is None or isinstance(target, str)
            jobs.append(job_entry(sae_id, hookpoint, index, cfg, entry.architecture, target))
            rows, replicated = tensors(entry.architecture, cfg, sae_id)
            folder = checkpoint.sae_folder(root, sae_id)
            digests |= checkpoint.save_replicated(root, folder, replicated)
            bounds = [0, *(cut for cut in cuts if cut < entry.d_sae), entry.d_sae]
            for start, stop in pairwise(bounds):
                part = {name: tensor[start:stop] for name, tensor in rows.items()}
                digests |= checkpoint.save_rows(root, folder, part, start)
    meta = {"step": step, "tokens": step * 2048, "config": resolved, "jobs": jobs, "stream": {}}
    return checkpoint.seal(root, digests, meta)


def job_entry(
    sae_id: str, hookpoint: str, entry: int, cfg: Any, architecture: str = "topk", target: str | None = None
) -> dict[str, Any]:
    return {
        "sae_id": sae_id,
        "hookpoint": hookpoint,
        "target": target or hookpoint,
        "entry": entry,
        "architecture": architecture,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "cfg": asdict(cfg),
    }
