"""Writes an SAE of a checkpoint as one SAELens folder, a block of latents at a time, and proves it equal.

Neither the SAE nor the file is ever in memory whole: d_sae · d_in may be larger than the machine. Folder and formats
are SAELens's: ``sae_weights.safetensors``, ``cfg.json``, ``sparsity.safetensors`` (absent before the first step) and
``runner_cfg.json``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sae import checkpoint
from scale_sae.checkpoint import read_rows, write_json
from scale_sae.saes import registry
from scale_sae.saes.base import DTYPES
from scale_sae.saes.topk import decoder_norms
from scale_sae.seeds import generator
from scale_sae.tensorfile import Reader, Writer, blocks, save

WEIGHTS = "sae_weights.safetensors"
CFG = "cfg.json"
SPARSITY = "sparsity.safetensors"
RUNNER_CFG = "runner_cfg.json"

COUNTERS = ("tokens_since_fired", "fired_count")
CHECK_ROWS = 16


class ExportError(RuntimeError):
    """What was written is not the SAE of the checkpoint."""


@dataclass(frozen=True)
class Report:
    """What `export_sae` did. ``difference``: the largest relative difference to the sharded SAE (see `check`)."""

    sae_id: str
    folder: Path
    dtype: str
    difference: float


class StoredSAE:
    """An SAE in a checkpoint, read by blocks of latents in float64, so that a release is rounded once."""

    def __init__(self, checkpoint_folder: Path, job: Mapping[str, Any]):
        self.folder = checkpoint.sae_folder(checkpoint_folder, job["sae_id"])
        self.d_in: int = job["d_in"]
        self.d_sae: int = job["d_sae"]
        self.cfg = registry.training_config(job["architecture"], self.d_in, job["cfg"], f"checkpoint: {job['sae_id']}")
        self._class = registry.training_class(job["architecture"])
        self._parameters = [
            name for name in checkpoint.row_names(self.folder) if not name.startswith("adam.") and name not in COUNTERS
        ]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of latents whose W_enc and W_dec rows fill a block together, in float64."""
        return blocks(0, self.d_sae, 2 * 8 * self.d_in)

    def rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """The per-latent parameters of latents ``start..stop``, float64."""
        return {name: read_rows(self.folder, name, start, stop, torch.float64) for name in self._parameters}

    def replicated(self, name: str) -> Tensor:
        """A replicated tensor as stored."""
        with Reader(self.folder / checkpoint.REPLICATED) as reader:
            return reader.tensor(name)

    def released_rows(self, rows: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """What the release holds of a block that `rows` gave; the latent is dimension 0 of all, W_enc too."""
        return {name: tensor.to(dtype) for name, tensor in self._class.export_rows(self.cfg, rows).items()}

    def released_replicated(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the release holds besides."""
        with Reader(self.folder / checkpoint.REPLICATED) as reader:
            stored = {name: reader.tensor(name).double() for name in reader.entries if name in self._class.replicated}
        return {name: tensor.to(dtype) for name, tensor in self._class.export_replicated(self.cfg, stored).items()}

    def inference_config(self) -> dict[str, Any]:
        """The fields of the release's cfg.json, without dtype and metadata of the release."""
        return self._class.inference_config(self.cfg)


def export_sae(
    checkpoint_folder: Path,
    job: Mapping[str, Any],
    out_folder: Path,
    metadata: Mapping[str, Any],
    dtype: str | None = None,
) -> Report:
    """Writes one SAE of a checkpoint to ``out_folder`` (made here), reads it back and compares it.

    Args:
        checkpoint_folder: a complete checkpoint.
        job: its entry in ``meta.json``'s ``jobs``.
        metadata: ``cfg.json``'s ``metadata``, to which the options that only training has are added.
        dtype: float32, float64 or bfloat16; None: as trained.

    Raises:
        ExportError: the file is not, bit for bit, what the checkpoint gives, or does not compute what the shards do.
    """
    sae = StoredSAE(checkpoint_folder, job)
    name = dtype or sae.cfg.dtype
    out_folder.mkdir(parents=True)
    write_weights(sae, out_folder / WEIGHTS, DTYPES[name])
    cfg = {**sae.inference_config(), "dtype": name}
    details = {option: value for option, value in asdict(sae.cfg).items() if option not in cfg}
    write_json(out_folder / CFG, {**cfg, "metadata": {**metadata, "training_architecture_details": details}})
    write_json(out_folder / RUNNER_CFG, checkpoint.read_meta(checkpoint_folder)["config"])
    write_sparsity(sae, out_folder / SPARSITY)
    difference = check(sae, out_folder / WEIGHTS, cfg, job["sae_id"])
    return Report(job["sae_id"], out_folder, name, difference)


def write_weights(sae: StoredSAE, path: Path, dtype: torch.dtype) -> None:
    """The single file of weights, as SAELens has them: W_enc ``[d_in, d_sae]``, all others with the latent first."""
    replicated = sae.released_replicated(dtype)
    shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in replicated.items()}
    for name, row in sae.released_rows(sae.rows(0, 1), dtype).items():
        shapes[name] = (sae.d_in, sae.d_sae) if name == "W_enc" else (sae.d_sae, *row.shape[1:])
    with Writer(path, {name: (dtype, shape) for name, shape in shapes.items()}) as file:
        for name, tensor in replicated.items():
            file.tensor(name, tensor)
        for start, stop in sae.blocks():
            for name, rows in sae.released_rows(sae.rows(start, stop), dtype).items():
                if name == "W_enc":
                    file.columns(name, start, rows.T)
                else:
                    file.rows(name, start, rows)


def write_sparsity(sae: StoredSAE, path: Path) -> None:
    """``sparsity [d_sae]`` float32: log10 of the share of tokens, in the window so far, on which each latent fired."""
    tokens = sae.replicated("window_tokens").item()
    if tokens:
        share = read_rows(sae.folder, "fired_count", 0, sae.d_sae, torch.float64) / tokens
        save(path, {"sparsity": torch.log10(share + 1e-10).float()})


def tolerance(dtype: str) -> float:
    """The largest relative difference that rounding to ``dtype`` explains.

    `check` computes in float64, so the release's rounding is all that may differ: at most eps / 2 in each weight, which
    the sums over d_in and k average out to about 0.3 eps of the result (measured). 1e-5 is the promise for float32 (84
    eps) and wider; narrower dtypes get 2 eps, six times what is expected.
    """
    return max(1e-5, 2 * torch.finfo(DTYPES[dtype]).eps)


@torch.no_grad()
def check(sae: StoredSAE, path: Path, cfg: Mapping[str, Any], sae_id: str) -> float:
    """Compares the weights in ``path`` with the checkpoint: bit for bit with a new fold, and by what they compute.

    16 random rows go through the shards' weights as they were trained (with the decoder's norms) and through the file
    as a reader of ``cfg`` uses it. Compared are all pre-activations, and the reconstructions from the latents that the
    shards select: selecting twice would report near-ties, which any rounding flips, as large differences.

    Returns:
        max |a - b| / max |b|, the larger of the two comparisons.

    Raises:
        ExportError: they differ, or are not finite.
    """
    x = torch.randn(CHECK_ROWS, sae.d_in, dtype=torch.float64, generator=generator("export check", sae_id))
    dtype = DTYPES[cfg["dtype"]]
    trained_b_dec = sae.replicated("b_dec").double()
    pre, released_pre = x.new_empty(CHECK_ROWS, sae.d_sae), x.new_empty(CHECK_ROWS, sae.d_sae)
    with Reader(path) as file:
        for name, tensor in sae.released_replicated(dtype).items():
            _require_equal(sae_id, name, file.tensor(name), tensor)
        b_dec = file.tensor("b_dec").double()
        for start, stop in sae.blocks():
            rows = sae.rows(start, stop)
            pre[:, start:stop] = _encode(asdict(sae.cfg), trained_b_dec, _trained(rows), x)
            folded = sae.released_rows(rows, dtype)
            del rows
            released = {name: _released(file, name, start, stop) for name in folded}
            for name, tensor in folded.items():
                _require_equal(sae_id, name, released[name], tensor)
            released_pre[:, start:stop] = _encode(cfg, b_dec, released, x)

        x_hat, released_x_hat = _reconstruct(sae, file, cfg, pre, released_pre)
        x_hat += trained_b_dec
        released_x_hat += b_dec
    difference = max(_relative(released_pre, pre), _relative(released_x_hat, x_hat))
    if difference > tolerance(cfg["dtype"]):
        raise ExportError(
            f"{sae_id}: the released SAE differs from the sharded one by {difference:.1e} (relative), "
            f"more than the {tolerance(cfg['dtype']):.1e} that {cfg['dtype']} explains; nothing was released"
        )
    return difference


def _reconstruct(
    sae: StoredSAE, file: Reader, cfg: Mapping[str, Any], pre: Tensor, released_pre: Tensor
) -> tuple[Tensor, Tensor]:
    """Both reconstructions ``[B, d_in]`` without b_dec, from the latents that ``pre [B, d_sae]`` selects."""
    latents = pre.topk(sae.cfg.k).indices
    acts = torch.zeros_like(pre).scatter_(1, latents, pre.gather(1, latents).relu())
    released_acts = torch.zeros_like(pre).scatter_(1, latents, released_pre.gather(1, latents).relu())
    x_hat, released_x_hat = torch.zeros(2, len(pre), sae.d_in, dtype=torch.float64)
    for start, stop in sae.blocks():
        W_dec = read_rows(sae.folder, "W_dec", start, stop, torch.float64)
        x_hat += _decode(asdict(sae.cfg), W_dec, acts[:, start:stop])
        released_x_hat += _decode(cfg, file.rows("W_dec", start, stop).double(), released_acts[:, start:stop])
    return x_hat, released_x_hat


def _trained(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"W_enc": rows["W_enc_rows"], "W_dec": rows["W_dec"], "b_enc": rows["b_enc"]}


def _released(file: Reader, name: str, start: int, stop: int) -> Tensor:
    """Latents ``start..stop`` of a released tensor, latent first, as stored."""
    return file.columns(name, start, stop).T if name == "W_enc" else file.rows(name, start, stop)


def _encode(cfg: Mapping[str, Any], b_dec: Tensor, block: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Float64 pre-activations ``[B, n]`` of a TopK SAE: a block of n latents (W_enc as rows) and ``x [B, d_in]``."""
    pre = (x - b_dec if cfg["apply_b_dec_to_input"] else x) @ block["W_enc"].double().T + block["b_enc"].double()
    return pre * decoder_norms(block["W_dec"].double()) if cfg["rescale_acts_by_decoder_norm"] else pre


def _decode(cfg: Mapping[str, Any], W_dec: Tensor, acts: Tensor) -> Tensor:
    """What a block's activations ``[B, n]`` add to the reconstruction ``[B, d_in]``; ``W_dec [n, d_in]``, float64."""
    return (acts / decoder_norms(W_dec) if cfg["rescale_acts_by_decoder_norm"] else acts) @ W_dec


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def _require_equal(sae_id: str, name: str, written: Tensor, expected: Tensor) -> None:
    if not expected.isfinite().all():
        raise ExportError(f"{sae_id}: {name} is not finite: its training has diverged; nothing was released")
    if not torch.equal(written, expected):
        raise ExportError(f"{sae_id}: {name} read back from the release is not what was written; nothing was released")
