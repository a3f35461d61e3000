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
from scale_sae.reconstruction import Reconstruction
from scale_sae.saes.inference import SAE
from scale_sae.topology import pick_device

CONTEXTS_PER_BATCH = 16


@dataclass(frozen=True)
class Batch:
    """Held-out contexts: ``tokens`` and ``keep`` are ``[n, context]``."""

    tokens: Tensor
    keep: Tensor


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


# From input and target rows to rows that take the target's place: [n, d_in], [n, d_out] -> [n, d_out].
Substitute = Callable[[Tensor, Tensor], Tensor]


def at_kept_positions(fn: Substitute, x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """``y [n, context, d_out]`` with ``fn`` of the rows of ``x`` and ``y`` where ``keep`` is set."""
    out, mask = y.clone(), keep.to(y.device)
    rows = y[mask]
    out[mask] = fn(rows if x is y else x[mask], rows).to(y.dtype)
    return out


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
    def evaluate(self, sae: SAE, hookpoint: str, target: str) -> dict[str, dict[str, float]]:
        """All figures of one SAE. The cross-entropy part is there for models that predict tokens.

        The ablation sets the kept positions to zero; excluded positions (special tokens) stay as they are throughout.

        Args:
            sae: what to evaluate.
            hookpoint: where its input is.
            target: where what it reconstructs is: ``hookpoint`` itself, but for transcoders.

        Raises:
            NonFiniteError: the SAE gave NaN or infinite values.
            UserError: a forward comes to the target before the input, or no activation there is finite.
        """
        reconstruction = Reconstruction(sae)
        with_sae = self._mean_loss(reconstruction.add, hookpoint, target)
        if not reconstruction.rows:
            places = " or ".join(dict.fromkeys((hookpoint, target)))
            raise UserError(f"all activations at {places} are NaN or infinite; try model.dtype: float32")
        figures = reconstruction.figures()
        with_ablation = self._mean_loss(lambda x, y: torch.zeros_like(y), hookpoint, target)
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
    def _mean_loss(self, fn: Substitute | None = None, hookpoint: str = "", target: str = "") -> float | None:
        """Nats per predicted token, with ``fn`` put in at ``target``; None for a model that predicts no tokens."""
        total, predictions = 0.0, 0
        for batch in self.data:
            tokens = batch.tokens.to(self.device)
            with contextlib.nullcontext() if fn is None else self._substituted(fn, hookpoint, target, batch.keep):
                if not self.source.model.can_generate():  # an encoder, a classifier: no next token to predict
                    self.source.forward(tokens)
                    continue
                logits = self.source.logits(tokens)
            loss, count = cross_entropy(logits, tokens)
            total += loss
            predictions += count
        return total / predictions if predictions else None

    @contextlib.contextmanager
    def _substituted(self, fn: Substitute, hookpoint: str, target: str, keep: Tensor) -> Iterator[None]:
        """While open, one forward goes on with ``fn``'s rows at the kept positions of ``target``."""
        inputs: list[Tensor] = []

        def replace(y: Tensor) -> Tensor:
            if hookpoint == target:
                return at_kept_positions(fn, y, y, keep)
            if not inputs:
                raise UserError(
                    f"reads {hookpoint}, which a forward reaches after {target}, where its output would go; it cannot "
                    "be evaluated"
                )
            return at_kept_positions(fn, inputs[0], y, keep)

        with contextlib.ExitStack() as stack:
            if hookpoint != target:
                stack.enter_context(self.source.observe(hookpoint, inputs.append))
            stack.enter_context(self.source.replace(target, replace))
            yield


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


def place_of(folder: Path) -> tuple[str, str]:
    """(hookpoint of a released SAE's input, hookpoint of what it reconstructs)."""
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    return metadata["hook_name"], metadata.get("hook_name_out") or metadata["hook_name"]


def run_config_text(folder: Path) -> str:
    """The config of the run that a released SAE is from, as JSON."""
    path = folder / "runner_cfg.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {path.name}; evaluate needs the config of the SAE's run, for its model and its held-out "
            "text, which releases of scale_sae have"
        )
    return path.read_text()


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
        runs.setdefault(run_config_text(folder), []).append(folder)
    results: dict[str, dict[str, dict[str, float]]] = {}
    problems: list[str] = []
    for text, members in runs.items():
        places = {folder: place_of(folder) for folder in members}
        config = from_dict(json.loads(text))
        if config.model.trust_remote_code and not trust_remote_code:
            # A release may be anybody's: what its config says is no consent.
            raise UserError(
                f"--trust_remote_code: the release asks to run code that comes with the model {config.model.name}; "
                "pass this flag if you trust it"
            )
        hookpoints = dict.fromkeys(hookpoint for place in places.values() for hookpoint in place)
        evaluator = Evaluator(config, list(hookpoints), tokens, device)
        for folder, place in places.items():
            name = folder.relative_to(root).as_posix()
            sae = SAE.load_from_disk(folder, device)
            try:
                figures = evaluator.evaluate(sae, *place)
            except NonFiniteError:
                problems.append(f"{name}: some activations are NaN or infinite, so there are no figures")
                continue
            except UserError as error:
                problems.append(f"{name}: {error}")
                continue
            (folder / "eval.json").write_text(json.dumps(figures, indent=1) + "\n")
            results[name] = figures
    if results:
        print(table(results))
    if problems:
        raise UserError("; ".join(problems))


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
