"""Runs that were never trained: checkpoints of random SAEs, for the tests of what reads checkpoints."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sae import checkpoint, config
from scale_sae.saes import registry
from scale_sae.saes.base import DTYPES
from scale_sae.seeds import generator

D_IN = 32


def resolved_config(saes: Sequence[dict[str, Any]], hookpoints: Sequence[str], **keys: Any) -> dict[str, Any]:
    tree = {"hookpoints": list(hookpoints), "saes": list(saes), "train": {"dead_feature_window_tokens": 500}, **keys}
    return config.to_dict(config.from_dict(tree))


def tensors(d_in: int, d_sae: int, dtype: str, sae_id: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(row tensors, replicated tensors) as a trained SAE's: decoder norms far from 1, biases far from 0."""
    draw = generator("made-up", sae_id)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw)

    W_dec = normal(d_sae, d_in) * (0.05 + 2 * torch.rand(d_sae, 1, dtype=torch.float64, generator=draw))
    W_enc = W_dec + 0.3 * normal(d_sae, d_in)
    stored = {"W_enc_rows": W_enc, "W_dec": W_dec, "b_enc": 0.5 * normal(d_sae)}
    parameters = {name: tensor.to(DTYPES[dtype]) for name, tensor in stored.items()}
    moments = {f"adam.exp_avg.{name}": torch.ones_like(tensor) for name, tensor in parameters.items()}
    counters = {
        "tokens_since_fired": torch.arange(d_sae) * 10,
        "fired_count": torch.arange(d_sae) % 7,
    }
    replicated = {
        "b_dec": normal(d_in).to(DTYPES[dtype]),
        "window_tokens": torch.tensor(100),
        "frozen": torch.tensor(False),
    }
    return {**parameters, **moments, **counters}, {**replicated, "adam.exp_avg.b_dec": torch.zeros(d_in)}


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
            jobs.append(job_entry(sae_id, hookpoint, index, cfg))
            rows, replicated = tensors(D_IN, entry.d_sae, cfg.dtype, sae_id)
            folder = checkpoint.sae_folder(root, sae_id)
            digests |= checkpoint.save_replicated(root, folder, replicated)
            bounds = [0, *(cut for cut in cuts if cut < entry.d_sae), entry.d_sae]
            for start, stop in pairwise(bounds):
                part = {name: tensor[start:stop] for name, tensor in rows.items()}
                digests |= checkpoint.save_rows(root, folder, part, start)
    meta = {"step": step, "tokens": step * 2048, "config": resolved, "jobs": jobs, "stream": {}}
    return checkpoint.seal(root, digests, meta)


def job_entry(sae_id: str, hookpoint: str, entry: int, cfg: Any) -> dict[str, Any]:
    return {
        "sae_id": sae_id,
        "hookpoint": hookpoint,
        "entry": entry,
        "architecture": cfg.architecture(),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "cfg": dict(vars(cfg)),
    }
