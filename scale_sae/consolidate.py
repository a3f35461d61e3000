"""Makes a release of a run's newest intact checkpoint: ``python -m scale_sae.consolidate RUN_DIR --out DIR``.

Each SAE becomes one folder, ``DIR/<sae_id>/``, beside a model card, in SAELens's format or another library's. Every
file is read back and compared with the sharded SAE; ``DIR`` appears when all of them are equal, or not at all. SAEs are
read and written in blocks, so that memory does not grow with them.
"""

import inspect
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fire
import torch

from scale_sae import card, checkpoint, config
from scale_sae.card import CARD, EVAL, PLOT
from scale_sae.checkpoint import read_rows
from scale_sae.errors import UserError, nearest
from scale_sae.export import PASSES, RUNNER_CFG, SPARSITY, DivergedError, ExportError, Report, StoredSAE, export_sae
from scale_sae.formats import LAYOUTS
from scale_sae.hook_names import to_transformer_lens
from scale_sae.progress import progress_bar
from scale_sae.saes.inference import DTYPES as READABLE
from scale_sae.saes.inference import SAELENS_VERSION

DTYPES = {name: READABLE[name] for name in ("float32", "float64", "bfloat16")}
SAE_FILES = {SPARSITY, RUNNER_CFG, EVAL, PLOT} | {
    name for layout in LAYOUTS.values() for name in (layout.weights, layout.description)
}
OPTIONS = ("out", "step", "dtype", "format")


def main(
    run_dir: Any = None,
    *extra: Any,
    out: Any = None,
    step: Any = None,
    dtype: Any = None,
    format: Any = "saelens",
    **unknown: Any,
) -> None:
    """python -m scale_sae.consolidate RUN_DIR --out DIR [--step N] [--dtype D] [--format F]

    Writes the SAEs of a run's checkpoint as a release that SAELens loads.

    Args:
        run_dir: the run's output_dir.
        out: folder of the release; replaced if it is a release already.
        step: the checkpoint's step. Without it: the newest that is intact.
        dtype: float32, float64 or bfloat16. Without it: as trained.
        format: saelens, sparsify or dictionary_learning: the library whose files are written. Without it: saelens.
    """
    if unknown.keys() & {"help", "h"}:  # Fire hands them over, as it does every flag that is not declared
        print(inspect.getdoc(main))
        return
    try:
        _check_arguments(run_dir, extra, out, step, dtype, format, unknown)
        consolidate(Path(str(run_dir)), Path(str(out)), step, dtype, format)
    except (UserError, ExportError, OSError) as error:  # OSError: a full disk, or a folder that may not be written
        sys.exit(f"error: {error}")


def _check_arguments(
    run_dir: Any, extra: Sequence[Any], out: Any, step: Any, dtype: Any, layout: Any, unknown: Mapping[str, Any]
) -> None:
    for name, value in unknown.items():
        raise UserError(f"--{name} {value}: no such option{nearest(name, OPTIONS)}")
    if extra:
        raise UserError(f"{extra[0]}: the run's output_dir is the only argument; the release's folder goes after --out")
    if run_dir is None:
        raise UserError("RUN_DIR is missing: give the output_dir of a run")
    if out is None or isinstance(out, bool):
        raise UserError("--out is missing: give the folder of the release")
    if step is not None and type(step) is not int:
        raise UserError(f"--step {step}: must be the number of a step")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}{nearest(str(dtype), DTYPES)}")
    if layout not in LAYOUTS:
        raise UserError(f"--format {layout}: must be one of {', '.join(LAYOUTS)}{nearest(str(layout), LAYOUTS)}")


def consolidate(
    run_dir: Path, out: Path, step: int | None = None, dtype: str | None = None, layout: str = "saelens"
) -> list[Report]:
    """Writes the release and prints a line per SAE; arguments as for `main`.

    Raises:
        UserError: no intact checkpoint (of that step), ``out`` holds something else, or the layout cannot express one
            of the SAEs.
        ExportError: a written SAE is not equal to the sharded one.
    """
    if out.exists() and not is_release(out):
        raise UserError(f"--out {out}: exists and is not a release of scale_sae; remove it or choose another folder")
    folder = choose(run_dir, step)
    meta = checkpoint.read_meta(folder)
    aside = out.absolute().with_name(f".{out.absolute().name}.writing")
    if aside.exists():
        shutil.rmtree(aside)
    try:
        healthy = [job for job in meta["jobs"] if not has_diverged(folder, job)]
        diverged = [job["sae_id"] for job in meta["jobs"] if job not in healthy]
        # before anything is written: whether each can be expressed
        fields = [StoredSAE(folder, job, layout).layout.cfg for job in healthy]
        reports, released = [], []
        with progress_bar(PASSES * sum(job["d_sae"] for job in healthy), "Consolidating", "latents") as bar:
            for job, cfg in zip(healthy, fields, strict=True):
                about = metadata(folder, meta, job)
                name = checkpoint.folder_name(job["sae_id"])
                try:
                    report = export_sae(folder, job, aside / name, about, dtype, layout, bar.update)
                except DivergedError:  # at the last step before the checkpoint, which training had no time to notice
                    diverged.append(job["sae_id"])
                    shutil.rmtree(aside / name)
                    with suppress(OSError):  # the hookpoint's other SAEs are there
                        (aside / name).parent.rmdir()
                    continue
                reports.append(report)
                released.append(card.entry(name, {**cfg, "dtype": report.dtype, "metadata": about}))
        for sae_id in diverged:
            print(f"{sae_id}: has diverged during training and is not released", file=sys.stderr)
        if not reports:
            raise UserError(f"{run_dir}: every SAE has diverged; train again with a lower train.lr")
        for report in reports:
            print(
                f"{report.sae_id}: written as {report.dtype}, reloaded, equals the sharded SAE of step {meta['step']} "
                f"(largest relative difference {report.difference:.1e})"
            )
        text = card.text(released, layout=layout).encode()
        (aside / CARD).write_bytes(text)
        if (aside / CARD).read_bytes() != text:
            raise ExportError(f"{CARD} read back from the release is not what was written; nothing was released")
        _replace(out.absolute(), aside)
    finally:
        if aside.exists():
            shutil.rmtree(aside)
    print(f"released {len(reports)} SAEs in {out}")
    return reports


def choose(run_dir: Path, step: int | None) -> Path:
    """The checkpoint of ``step``, or the newest, that is intact; says which newer ones are damaged."""
    found = checkpoint.complete(run_dir)
    if not found:
        raise UserError(f"{run_dir}: holds no complete checkpoint; give the output_dir of a run that has saved one")
    candidates = [folder for folder in found if step is None or checkpoint.step_of(folder) == step]
    if not candidates:
        steps = ", ".join(str(checkpoint.step_of(folder)) for folder in found)
        raise UserError(f"--step {step}: {run_dir} has no complete checkpoint of that step; it has {steps}")
    for folder in candidates:
        problems = checkpoint.verify(folder)
        if not problems:
            return folder
        print(f"checkpoint {folder.name} is damaged and is left out: {problems[0]}", file=sys.stderr)
    raise UserError(f"{run_dir}: no intact checkpoint{'' if step is None else f' of step {step}'}; restore one")


def is_release(folder: Path) -> bool:
    """Whether ``folder`` may be replaced: empty, or only files that a release has, with this command's model card."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    if not folder.is_dir() or not files:
        return folder.is_dir()
    known = all(path.name in SAE_FILES or path == Path(CARD) for path in files)
    return known and (folder / CARD).exists() and card.is_ours((folder / CARD).read_text(errors="replace"))


def _replace(out: Path, aside: Path) -> None:
    """Puts ``aside`` in the place of ``out``."""
    old = out.with_name(f".{out.name}.replaced")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    aside.rename(out)
    if old.exists():
        shutil.rmtree(old)


def metadata(folder: Path, meta: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """SAELens's metadata of one SAE, and where it comes from."""
    run = config.from_saved(meta["config"])
    train = run.train_of(run.saes[job["entry"]])
    places = [job["hookpoint"], *([job["target"]] if job["target"] != job["hookpoint"] else [])]
    translated = [to_transformer_lens(place) for place in places]
    names = places if None in translated else translated  # all of one library
    statistics = firing_statistics(folder, job, train.dead_feature_window_tokens)
    return {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "training_library": "scale_sae",
        "training_architecture": job["architecture"],
        "training_steps": meta["step"],
        "training_tokens": meta["tokens"],
        "training_options": {"seed": run.seed, **asdict(train)},
        "released_with": {"scale_sae": _version(), "torch": str(torch.__version__)},
        "model_name": run.model.name,
        "model_revision": run.model.revision,
        "model_class_name": run.model.auto_class,
        "model_from_pretrained_kwargs": {},
        **dict(zip(("hook_name", "hook_name_out"), names, strict=False)),  # TransformerLens's, where it has them
        **dict(zip(("hf_hook_name", "hf_hook_name_out"), places, strict=False)),  # transformers'
        "hook_head_index": None,
        "neuronpedia_id": None,
        "dataset_path": run.data.dataset,
        "context_size": run.data.context_size,
        "seqpos_slice": run.data.seqpos_slice,
        "prepend_bos": run.data.prepend_bos,
        "exclude_special_tokens": run.data.exclude_special_tokens,
        "sequence_separator_token": run.data.sequence_separator_token,
        "disable_concat_sequences": False,
        **statistics,
    }


def _version() -> str | None:
    """This package's version; None where it runs without having been installed."""
    try:
        return version("scale_sae")
    except PackageNotFoundError:
        return None


def has_diverged(folder: Path, job: Mapping[str, Any]) -> bool:
    """Whether training froze the SAE, its values no longer finite, or left out most of its updates for that reason."""
    found = {"frozen": torch.zeros((), dtype=torch.bool), "skipped": torch.zeros((), dtype=torch.int64)}
    checkpoint.load_replicated(checkpoint.sae_folder(folder, job["sae_id"]), found)
    return bool(found["frozen"]) or int(found["skipped"]) > checkpoint.step_of(folder) / 2


def firing_statistics(folder: Path, job: Mapping[str, Any], dead_window: int) -> dict[str, float | int | None]:
    """Mean l0 over the present sparsity window (None before the first step), and how many latents are dead now."""
    sae = checkpoint.sae_folder(folder, job["sae_id"])
    window = {"window_tokens": torch.zeros((), dtype=torch.int64)}
    checkpoint.load_replicated(sae, window)
    tokens = int(window["window_tokens"])
    fired = read_rows(sae, "fired_count", 0, job["d_sae"]).sum().item()
    dead = read_rows(sae, "tokens_since_fired", 0, job["d_sae"]) > dead_window
    return {"l0": fired / tokens if tokens else None, "num_dead_features": int(dead.sum())}


if __name__ == "__main__":
    fire.Fire(main)
