"""Evaluates a release on held-out text: ``python -m scale_sae.evaluate DIR [--sae_id …] [--tokens N]``.

For each SAE: how well it reconstructs, how sparse it is, and what the language model loses when the reconstruction
takes the place of the activations. Writes ``eval.json`` beside the weights (SAELens's names) and prints a table.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import fire
import torch
import torch.nn.functional as F
from torch import Tensor

from scale_sae.activations.source import ActivationSource, inspect_model
from scale_sae.activations.tokens import held_out_contexts
from scale_sae.collectives import NonFiniteError
from scale_sae.config import RunConfig, from_dict
from scale_sae.errors import UserError, nearest
from scale_sae.saes.inference import SAE
from scale_sae.topology import pick_device
from scale_sae.trainer import weigh_rows

CONTEXTS_PER_BATCH = 16
ROWS_PER_PART = 1024


@dataclass(frozen=True)
class Batch:
    """Held-out contexts: ``tokens`` and ``keep`` are ``[n, context]``."""

    tokens: Tensor
    keep: Tensor


class Reconstruction:
    """Sums over rows, in float64, from which the reconstruction and sparsity figures of one SAE follow."""

    def __init__(self, sae: SAE):
        self.sae = sae
        d_in, d_sae, device = sae.cfg.d_in, sae.cfg.d_sae, sae.b_dec.device
        self.rows = 0
        self.sum = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.outer = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.l0_max = 0
        # ‖x - x̂‖², cosine, ‖x‖, ‖x̂‖, x·x̂, ‖x̂‖², L1 of the activations.
        self.totals = torch.zeros(7, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> Tensor:
        """Counts the rows ``x [n, d_in]`` and returns their reconstruction.

        Rows that training leaves out (not finite, or far above the usual norm) are not counted and stay as they are.
        """
        usable = weigh_rows(x)[1] > 0
        out = x.clone()
        # In parts: the dense activations of a wide SAE are large.
        out[usable] = torch.cat([self._add(part) for part in x[usable].split(ROWS_PER_PART)]).to(x.dtype)
        return out

    def _add(self, x: Tensor) -> Tensor:
        acts = self.sae.encode(x)
        x_hat = self.sae.decode(acts)
        wide, wide_hat = x.double(), x_hat.double()
        self.rows += len(x)
        self.sum += wide.sum(0)
        self.outer += wide.T @ wide
        active = acts > 0
        self.fired += active.sum(0)
        self.l0_max = max([self.l0_max, *active.sum(1).tolist()])
        self.totals += torch.stack(
            [
                (wide - wide_hat).square().sum(),
                F.cosine_similarity(wide, wide_hat).sum(),
                wide.norm(dim=1).sum(),
                wide_hat.norm(dim=1).sum(),
                (wide * wide_hat).sum(),
                wide_hat.square().sum(),
                acts.sum(dtype=torch.float64),
            ]
        )
        return x_hat

    def pca_fvu(self, components: int) -> float:
        """Variance that the first ``components`` principal components of these very rows leave unexplained."""
        mean = self.sum / self.rows
        variances = torch.linalg.eigvalsh(self.outer / self.rows - torch.outer(mean, mean)).clamp(min=0)
        return float(variances[: len(variances) - components].sum() / variances.sum())

    def figures(self) -> dict[str, dict[str, float]]:
        """SAELens's metrics, formulas and names (6.54, ``evals``), and a few of our own."""
        error, cosine, norm_in, norm_out, inner, square_out, l1 = (self.totals / self.rows).tolist()
        mean = self.sum / self.rows
        variance = float(self.outer.trace() / self.rows - mean.square().sum())
        figures = {
            "reconstruction_quality": {
                "explained_variance": 1 - error / variance,
                "mse": error,
                "cossim": cosine,
            },
            "shrinkage": {
                "l2_norm_in": norm_in,
                "l2_norm_out": norm_out,
                "l2_ratio": norm_out / norm_in,
                "relative_reconstruction_bias": square_out / inner if inner else math.nan,
            },
            "sparsity": {
                "l0": float(self.fired.sum()) / self.rows,
                "l0_max": float(self.l0_max),
                "l1": l1,
                "dead_fraction": float((self.fired == 0).double().mean()),
            },
            "token_stats": {"total_tokens_eval_reconstruction": float(self.rows)},
        }
        k = getattr(self.sae.cfg, "k", None)
        if k is not None and k < self.sae.cfg.d_in:
            figures["reconstruction_quality"]["pca_fvu"] = self.pca_fvu(k)
        return figures


def batches(config: RunConfig, tokens: int) -> list[Batch]:
    """The first ``tokens`` held-out tokens in whole contexts, or all of them if there are fewer."""
    wanted = max(1, tokens // config.data.context_size)
    contexts = list(islice(held_out_contexts(config.data, config.model), wanted))
    if not contexts:
        raise UserError(
            f"data.eval_fraction: {config.data.eval_fraction} of {config.data.dataset} holds no whole context of "
            f"{config.data.context_size} tokens; evaluate a run with a larger eval_fraction"
        )

    def split() -> Iterator[Batch]:
        for start in range(0, len(contexts), CONTEXTS_PER_BATCH):
            part = contexts[start : start + CONTEXTS_PER_BATCH]
            yield Batch(torch.stack([tokens for tokens, _ in part]), torch.stack([keep for _, keep in part]))

    return list(split())


def at_kept_positions(fn: Callable[[Tensor], Tensor], keep: Tensor) -> Callable[[Tensor], Tensor]:
    """Applies ``fn`` (rows to rows) where ``keep`` is set; other positions pass through as they are."""

    def replace(x: Tensor) -> Tensor:
        out = x.clone()
        mask = keep.to(x.device)
        out[mask] = fn(x[mask]).to(x.dtype)
        return out

    return replace


def cross_entropy(logits: Tensor, tokens: Tensor) -> tuple[float, int]:
    """Summed next-token loss in nats and the number of predictions."""
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(logits.device), reduction="sum"
    )
    return float(losses), tokens[:, 1:].numel()


class Evaluator:
    """A language model and the held-out text of one run's config, to evaluate SAEs at any of ``hookpoints``."""

    def __init__(self, config: RunConfig, hookpoints: list[str], tokens: int, device: torch.device):
        self.device = device
        self.data = batches(config, tokens)
        self.source = ActivationSource(config.model, inspect_model(config.model, hookpoints), device)
        self.clean_loss = self._mean_loss()

    @torch.no_grad()
    def evaluate(self, sae: SAE, hookpoint: str) -> dict[str, dict[str, float]]:
        """All figures of one SAE. The cross-entropy part is there for models that predict tokens.

        The ablation sets the kept positions to zero; excluded positions (special tokens) stay as they are throughout.
        """
        reconstruction = Reconstruction(sae)
        with_sae = self._mean_loss(hookpoint, reconstruction.add)
        with_ablation = self._mean_loss(hookpoint, torch.zeros_like)
        figures = reconstruction.figures()
        if self.clean_loss is not None and with_sae is not None and with_ablation is not None:
            lost = with_ablation - self.clean_loss
            figures["model_performance_preservation"] = {
                "ce_loss_score": (with_ablation - with_sae) / lost if lost else math.nan,
                "ce_loss_with_ablation": with_ablation,
                "ce_loss_with_sae": with_sae,
                "ce_loss_without_sae": self.clean_loss,
            }
        return figures

    @torch.no_grad()
    def _mean_loss(self, hookpoint: str | None = None, fn: Callable[[Tensor], Tensor] | None = None) -> float | None:
        """Nats per predicted token, with ``fn`` put in at ``hookpoint``; None for a model that predicts no tokens."""
        total, predictions = 0.0, 0
        for batch in self.data:
            tokens = batch.tokens.to(self.device)
            with contextlib.ExitStack() as stack:
                if hookpoint is not None and fn is not None:
                    stack.enter_context(self.source.replace(hookpoint, at_kept_positions(fn, batch.keep)))
                if not self.source.model.can_generate():  # an encoder, a classifier: no next token to predict
                    self.source.forward(tokens)
                    continue
                logits = self.source.logits(tokens)
            loss, count = cross_entropy(logits, tokens)
            total += loss
            predictions += count
        return total / predictions if predictions else None


def release_folders(root: Path, sae_id: str | None) -> list[Path]:
    """The folders of the release's SAEs, or of the one asked for."""
    folders = sorted(path.parent for path in root.rglob("cfg.json"))
    if not folders:
        raise UserError(
            f"{root}: holds no released SAE; make one with python -m scale_sae.consolidate RUN_DIR --out {root}"
        )
    if sae_id is None:
        return folders
    names = {folder.relative_to(root).as_posix(): folder for folder in folders}
    if sae_id not in names:
        raise UserError(f"--sae_id: {root} has no {sae_id!r}{nearest(sae_id, names)}; it has {', '.join(names)}")
    return [names[sae_id]]


TABLE = {
    "explained variance": ("reconstruction_quality", "explained_variance", "{:.4f}"),
    "PCA-k FVU": ("reconstruction_quality", "pca_fvu", "{:.4f}"),
    "L0": ("sparsity", "l0", "{:.2f}"),
    "L0 max": ("sparsity", "l0_max", "{:.0f}"),
    "dead": ("sparsity", "dead_fraction", "{:.1%}"),
    "CE": ("model_performance_preservation", "ce_loss_without_sae", "{:.4f}"),
    "CE with SAE": ("model_performance_preservation", "ce_loss_with_sae", "{:.4f}"),
    "CE zeroed": ("model_performance_preservation", "ce_loss_with_ablation", "{:.4f}"),
    "CE score": ("model_performance_preservation", "ce_loss_score", "{:.4f}"),
}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as text columns; FVU stands beside that of PCA with k components, which a good SAE halves."""
    rows = [["SAE", "FVU", *TABLE]]
    for sae_id, figures in results.items():
        row = [sae_id, f"{1 - figures['reconstruction_quality']['explained_variance']:.4f}"]
        for section, name, form in TABLE.values():
            value = figures.get(section, {}).get(name)
            row.append("-" if value is None else form.format(value))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def run(
    release: object,
    extra: tuple[object, ...],
    sae_id: str | None,
    tokens: object,
    unknown: dict[str, Any],
    trust_remote_code: bool = False,
) -> None:
    if extra or unknown:
        word = extra[0] if extra else f"--{next(iter(unknown))}"
        raise UserError(f"{word}: no argument of evaluate; it takes DIR, --sae_id, --tokens, --trust_remote_code")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise UserError(f"--tokens: {tokens!r} must be a positive integer")
    root = Path(str(release))
    folders = release_folders(root, sae_id)
    device, _ = pick_device(0)
    # The SAEs of one run share its model and text.
    runs: dict[str, list[Path]] = {}
    for folder in folders:
        runs.setdefault((folder / "runner_cfg.json").read_text(), []).append(folder)
    results: dict[str, dict[str, dict[str, float]]] = {}
    not_finite: list[str] = []
    for text, members in runs.items():
        hook_of = {f: json.loads((f / "cfg.json").read_text())["metadata"]["hook_name"] for f in members}
        config = from_dict(json.loads(text))
        if config.model.trust_remote_code and not trust_remote_code:
            # A release may be anybody's: what its config says is no consent.
            raise UserError(
                f"--trust_remote_code: the release asks to run code that comes with the model {config.model.name}; "
                "pass this flag if you trust it"
            )
        evaluator = Evaluator(config, list(dict.fromkeys(hook_of.values())), tokens, device)
        for folder, hookpoint in hook_of.items():
            try:
                figures = evaluator.evaluate(SAE.load_from_disk(folder, device), hookpoint)
            except NonFiniteError:
                not_finite.append(folder.relative_to(root).as_posix())
                continue
            (folder / "eval.json").write_text(json.dumps(figures, indent=1) + "\n")
            results[folder.relative_to(root).as_posix()] = figures
    print(table(results))
    if not_finite:
        raise UserError(f"{', '.join(not_finite)}: some activations are NaN or infinite, so there are no figures")


def main(
    release: str,
    *extra: object,
    sae_id: str | None = None,
    tokens: int = 65536,
    trust_remote_code: bool = False,
    **unknown: Any,
) -> None:
    """Evaluates the SAEs of a release on text that was held out of their training.

    Args:
        release: the folder that scale_sae.consolidate wrote.
        sae_id: one SAE's folder in it; all of them if not given.
        tokens: held-out tokens to evaluate on, at most.
        trust_remote_code: run code that comes with the model, if the release asks for it.
    """
    try:
        run(release, extra, sae_id, tokens, unknown, trust_remote_code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    fire.Fire(main)
