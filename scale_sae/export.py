"""Writes an SAE of a checkpoint as one folder, a block of latents at a time, and proves it equal.

Neither the SAE nor the file is ever in memory whole: d_sae · d_in may be larger than the machine. In SAELens's format a
folder has ``sae_weights.safetensors``, ``cfg.json``, ``sparsity.safetensors`` (absent before the first step) and
``runner_cfg.json``; in the others of ``formats`` the first two have other names and contents.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sae import checkpoint
from scale_sae.checkpoint import read_rows, write_json
from scale_sae.collectives import Shard
from scale_sae.formats import LAYOUTS, PtReader
from scale_sae.saes import registry
from scale_sae.saes.base import TrainingSAE
from scale_sae.saes.inference import DTYPES, SAE, build
from scale_sae.saes.saving import LatentBlocks, of_latents
from scale_sae.seeds import generator
from scale_sae.tensorfile import Reader, blocks, save

SPARSITY = "sparsity.safetensors"
RUNNER_CFG = "runner_cfg.json"

PASSES = 3  # over the latents of an SAE: one writes, two compare
CHECK_ROWS = 16
CHECK_LATENTS = 32  # active latents per row of the check


class ExportError(RuntimeError):
    """What was written is not the SAE of the checkpoint."""


class DivergedError(ExportError):
    """The checkpoint's weights are not finite."""


@dataclass(frozen=True)
class Report:
    """What `export_sae` did. ``difference``: the largest relative difference to the sharded SAE (see `check`)."""

    sae_id: str
    folder: Path
    dtype: str
    difference: float


class StoredSAE(LatentBlocks):
    """An SAE in a checkpoint, read by blocks of latents in float64, so that a release is rounded once.

    ``progress`` is told of how many latents a pass over them has gone on.
    """

    def __init__(
        self,
        checkpoint_folder: Path,
        job: Mapping[str, Any],
        layout: str = "saelens",
        progress: Callable[[int], object] = lambda latents: None,
    ):
        """UserError: the layout, of that name in ``formats``, cannot express the SAE."""
        self.progress = progress
        self.sae_id: str = job["sae_id"]
        self.folder = checkpoint.sae_folder(checkpoint_folder, self.sae_id)
        self.d_in: int = job["d_in"]
        self.d_sae: int = job["d_sae"]
        self.architecture: str = job["architecture"]
        cfg = registry.training_config(self.architecture, self.d_in, job["cfg"], f"checkpoint: {self.sae_id}")
        self.layout = LAYOUTS[layout](cfg.get_inference_sae_cfg_dict(), cfg)
        scales = [self.replicated(name).item() for name in ("activation_scale", "target_scale")]
        super().__init__(cfg, *scales)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of latents whose W_enc and W_dec rows fill a block together, in float64."""
        for start, stop in blocks(0, self.d_sae, 2 * 8 * self.d_in):
            yield start, stop
            self.progress(stop - start)

    def made_up(self, n_latents: int) -> TrainingSAE:
        return registry.create(self.architecture, of_latents(self.cfg, n_latents), Shard())

    def trained(self, name: str, start: int, stop: int, *, replicated: bool) -> Tensor:
        return self.replicated(name) if replicated else read_rows(self.folder, name, start, stop)

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.layout.convert(tensors)

    def replicated(self, name: str) -> Tensor:
        """A replicated tensor as stored."""
        with Reader(self.folder / checkpoint.REPLICATED) as reader:
            return reader.tensor(name)


def export_sae(
    checkpoint_folder: Path,
    job: Mapping[str, Any],
    out_folder: Path,
    metadata: Mapping[str, Any],
    dtype: str | None = None,
    layout: str = "saelens",
    progress: Callable[[int], object] = lambda latents: None,
) -> Report:
    """Writes one SAE of a checkpoint to ``out_folder`` (made here), reads it back and compares it.

    Args:
        checkpoint_folder: a complete checkpoint.
        job: its entry in ``meta.json``'s ``jobs``.
        metadata: ``cfg.json``'s ``metadata``, to which the options that only training has are added.
        dtype: float32, float64 or bfloat16; None: as trained.
        layout: a name of ``formats.LAYOUTS``.
        progress: called with latents, ``PASSES`` times d_sae of them in all.

    Raises:
        UserError: the layout cannot express the SAE.
        ExportError: a file is not, bit for bit, what the checkpoint gives, or they do not compute what the shards do.
        DivergedError: the checkpoint's weights are not finite.
    """
    sae = StoredSAE(checkpoint_folder, job, layout, progress)
    name = dtype or sae.cfg.dtype
    out_folder.mkdir(parents=True)
    weights = out_folder / sae.layout.weights
    write_weights(sae, weights, DTYPES[name])
    details = {option: value for option, value in asdict(sae.cfg).items() if option not in {*sae.layout.cfg, "dtype"}}
    about = {**metadata, "training_architecture_details": details}
    described = write_description(sae, out_folder / sae.layout.description, sae.layout.describe(name, about))
    write_description(sae, out_folder / RUNNER_CFG, checkpoint.read_meta(checkpoint_folder)["config"])
    write_sparsity(sae, out_folder / SPARSITY)
    difference = check(sae, weights, {**sae.layout.told(described), "dtype": name})
    return Report(sae.sae_id, out_folder, name, difference)


def write_weights(sae: StoredSAE, path: Path, dtype: torch.dtype) -> None:
    """The single file of weights; in SAELens's format W_enc is ``[d_in, d_sae]``, all others have the latent first."""
    with sae.layout.writer(path, sae.shapes(dtype)) as file:
        for start, stop in sae.blocks():
            for name, tensor in sae.released(start, stop, dtype).items():
                axis = sae.axes[name]
                if axis == 0:
                    file.rows(name, start, tensor)
                elif axis == 1:
                    file.columns(name, start, tensor)
                elif start == 0:
                    file.tensor(name, tensor)


def read_block(sae: StoredSAE, file: Reader | PtReader, start: int, stop: int) -> dict[str, Tensor]:
    """Latents ``start..stop`` of every tensor in a file of weights, and what has no latents, as stored."""
    found = {}
    for name, axis in sae.axes.items():
        if axis is None:
            found[name] = file.tensor(name)
        else:
            found[name] = (file.rows if axis == 0 else file.columns)(name, start, stop)
    return found


def write_description(sae: StoredSAE, path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a JSON file; returns what was read back from it. ExportError where that is something else."""
    write_json(path, value)
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        found = {}
    if json.dumps(found) != json.dumps(value):  # as texts, in which NaN is equal to itself
        raise _not_as_written(sae, path.name)
    return found


def write_sparsity(sae: StoredSAE, path: Path) -> None:
    """``sparsity [d_sae]`` float32: log10 of the share of tokens, in the window so far, on which each latent fired.

    ExportError where the file, read back, holds something else.
    """
    tokens = sae.replicated("window_tokens").item()
    if tokens:
        share = read_rows(sae.folder, "fired_count", 0, sae.d_sae, torch.float64) / tokens
        sparsity = torch.log10(share + 1e-10).float()
        save(path, {"sparsity": sparsity})
        with Reader(path) as file:
            _require_equal(sae, "sparsity", file.tensor("sparsity"), sparsity)


def tolerance(dtype: str) -> float:
    """The largest relative difference that rounding to ``dtype`` explains.

    `check` computes in float64, so the release's rounding is all that may differ: at most eps / 2 in each weight, which
    the sums over d_in and k average out to about 0.3 eps of the result (measured). 1e-5 is the promise for float32 (84
    eps) and wider; narrower dtypes get 2 eps, six times what is expected.
    """
    return max(1e-5, 2 * torch.finfo(DTYPES[dtype]).eps)


@torch.no_grad()
def check(sae: StoredSAE, path: Path, cfg: Mapping[str, Any]) -> float:
    """Compares the weights in ``path`` with the checkpoint: bit for bit with a new fold, and by what they compute.

    16 random rows go through the shards' weights as they were trained and through the file as a reader of ``cfg`` uses
    it. Compared are all pre-activations, after a scale of the inputs is taken from the weights (some are in units of
    the decoder's norms, which it changes), and the reconstructions from the largest pre-activations of each row by the
    trained weights: selecting twice would report near-ties, which any rounding flips, as large differences.

    Returns:
        max |a - b| / max |b|, the larger of the two comparisons.

    Raises:
        ExportError: they differ.
        DivergedError: they are not finite.
    """
    x = torch.randn(CHECK_ROWS, sae.d_in, dtype=torch.float64, generator=generator("export check", sae.sae_id))
    pre, unscaled_pre, released_pre = x.new_empty(3, CHECK_ROWS, sae.d_sae)
    with sae.layout.reader(path) as file:
        for start, stop in sae.blocks():
            found = read_block(sae, file, start, stop)
            for name, tensor in sae.released(start, stop, DTYPES[cfg["dtype"]]).items():
                _require_equal(sae, name, found[name], tensor)
            pre[:, start:stop] = sae.block(start, stop).encode_with_hidden_pre(x * sae.scale)[1]
            unscaled = sae.unscaled_block(start, stop)
            unscaled_pre[:, start:stop] = unscaled.encode_with_hidden_pre(x)[1] * sae.layout.units(unscaled.W_dec)
            released_pre[:, start:stop] = _reader_s(cfg, sae.layout.restore(found), path).pre_activations(x)
        x_hat, released_x_hat = _reconstruct(sae, file, cfg, x, pre, released_pre)
    difference = max(_relative(released_pre, unscaled_pre), _relative(released_x_hat, x_hat))
    if not difference <= tolerance(cfg["dtype"]):  # NaN is no agreement
        raise ExportError(
            f"{sae.sae_id}: the released SAE differs from the sharded one by {difference:.1e} (relative), "
            f"more than the {tolerance(cfg['dtype']):.1e} that {cfg['dtype']} explains; nothing was released"
        )
    return difference


def _reader_s(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> SAE:
    """A block of the release as its readers have it, computing in float64."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    return build({**cfg, "d_sae": tensors["W_dec"].shape[0]}, wide, str(path))


def _reconstruct(
    sae: StoredSAE, file: Reader | PtReader, cfg: Mapping[str, Any], x: Tensor, pre: Tensor, released_pre: Tensor
) -> tuple[Tensor, Tensor]:
    """Both reconstructions ``[B, d_out]`` of ``x``, from the largest of ``pre [B, d_sae]`` in each row."""
    latents = pre.topk(min(CHECK_LATENTS, sae.d_sae)).indices
    acts = torch.zeros_like(pre).scatter_(1, latents, pre.gather(1, latents))
    released_acts = torch.zeros_like(pre).scatter_(1, latents, released_pre.gather(1, latents))
    trained = released = torch.zeros((), dtype=torch.float64)
    for start, stop in sae.blocks():
        reader = _reader_s(cfg, sae.layout.restore(read_block(sae, file, start, stop)), file.path)
        block = sae.block(start, stop)
        trained = trained + _decoded(block, x * sae.scale, acts[:, start:stop], first=start == 0)
        released = released + _decoded(reader, x, released_acts[:, start:stop], first=start == 0)
    return trained / sae.target_scale, released


def _decoded(block: TrainingSAE | SAE, x: Tensor, acts: Tensor, *, first: bool) -> Tensor:
    """What a block's ``acts [B, n]`` add to the reconstruction ``[B, d_out]``; the first block has the rest of it."""
    block.process_sae_in(x)  # decoding goes by these rows' statistics
    nothing = block.decode(torch.zeros_like(acts))
    added = block.decode(acts) - nothing
    return added + block.add_skip(nothing, x) if first else added


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def _require_equal(sae: StoredSAE, name: str, written: Tensor, expected: Tensor) -> None:
    if not expected.isfinite().all():
        raise DivergedError(f"{sae.sae_id}: {name} is not finite: its training has diverged; nothing was released")
    if not torch.equal(written, expected):
        raise _not_as_written(sae, name)


def _not_as_written(sae: StoredSAE, what: str) -> ExportError:
    return ExportError(f"{sae.sae_id}: {what} read back from the release is not what was written; nothing was released")
