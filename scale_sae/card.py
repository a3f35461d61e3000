"""The model card of a release: its README.md, made of what the folders of its SAEs hold, and the plots in it."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scale_sae.errors import UserError
from scale_sae.export import SPARSITY
from scale_sae.saes.inference import CFG_FILE, read_cfg
from scale_sae.tensorfile import Reader

CARD = "README.md"
EVAL = "eval.json"
PLOT = "density.png"
TAG = "scale_sae"  # by which a card tells a release of this package
LIBRARIES = {"saelens": "saelens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
NEVER = -9.99  # log10(share + 1e-10) of a latent that never fired is -10
PLOTS_SHOWN = 12  # in the card; all others are linked
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# Columns: title, where the figure stands in eval.json, how it is written.
FIGURES = {
    "explained variance": ("reconstruction_quality", "explained_variance", "{:.4f}"),
    "L0 (held out)": ("sparsity", "l0", "{:.1f}"),
    "CE with SAE": ("model_performance_preservation", "ce_loss_with_sae", "{:.4f}"),
    "CE without": ("model_performance_preservation", "ce_loss_without_sae", "{:.4f}"),
    "CE score": ("model_performance_preservation", "ce_loss_score", "{:.4f}"),
    "KL score": ("model_behavior_preservation", "kl_div_score", "{:.4f}"),
}


@dataclass(frozen=True)
class Entry:
    """One SAE of a release: its folder there, its cfg.json in SAELens's format, and its eval.json where it has one."""

    folder: str
    cfg: Mapping[str, Any]
    figures: Mapping[str, Any] = field(default_factory=dict)
    has_plot: bool = False

    @property
    def about(self) -> Mapping[str, Any]:
        """The metadata of its cfg.json."""
        return self.cfg["metadata"]


def entries(root: Path) -> list[Entry]:
    """The SAEs of a release in SAELens's format, by folder. UserError where a file cannot be read."""
    folders = sorted(path.parent for path in root.rglob(CFG_FILE))
    return [entry(folder, folder.relative_to(root).as_posix()) for folder in folders]


def entry(folder: Path, name: str) -> Entry:
    """The SAE of a folder, as ``name`` in a release."""
    return Entry(name, read_cfg(folder), figures(folder / EVAL), (folder / PLOT).is_file())


def figures(path: Path) -> dict[str, Any]:
    """The contents of an eval.json, by section; nothing where there is none. UserError where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path}: is no object of figures ({error}); run python -m scale_sae.evaluate again, or remove it"
        ) from None
    return found


def is_ours(text: str) -> bool:
    """Whether a README is a card of this module, which may be replaced, and not somebody's own words."""
    return text.startswith("---\n") and f"- {TAG}" in text.split("\n---", 1)[0].splitlines()


def text(
    saes: Sequence[Entry], repo: str | None = None, layout: str = "saelens", together: Mapping[str, Any] | None = None
) -> str:
    """The card of a release.

    Args:
        saes: what it holds, at least one; the first tells the model and the text.
        repo: ``user/name`` on the hub, if it is for there.
        layout: the release's format, a name of ``formats.LAYOUTS``.
        together: the figures of all SAEs in place at once, by section.
    """
    about = saes[0].about
    model, dataset = str(about.get("model_name") or "-"), str(about.get("dataset_path") or "-")
    parts = [
        "---\n" + _front_matter(model, dataset, layout) + "---\n",
        f"# Sparse autoencoders for {model}\n",
        _introduction(saes, model, dataset),
        _table(saes),
        _together(together or {}),
        _training(saes),
        _plots(saes),
        "## Use\n",
        _USE[layout].format(load=_load(saes[0].folder, repo), folder=f"path/to/this/folder/{saes[0].folder}"),
        _made_by(saes[0], layout),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(model: str, dataset: str, layout: str) -> str:
    matter: dict[str, Any] = {"library_name": LIBRARIES[layout], "tags": ["sparse-autoencoder", TAG]}
    if _on_hub(model):
        matter["base_model"] = model
    if _on_hub(dataset):
        matter["datasets"] = [dataset]
    return yaml.safe_dump(matter, sort_keys=False)


def _on_hub(name: str) -> bool:
    """Whether a name may be one of the hub: not that of a folder here, nor of what comes with this package."""
    return name != "embedded" and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _introduction(saes: Sequence[Entry], model: str, dataset: str) -> str:
    about = saes[0].about
    tokens, steps = about.get("training_tokens"), about.get("training_steps")
    amount = f" {tokens:,} activations of" if isinstance(tokens, int) else ""
    length = f" ({steps:,} steps)" if isinstance(steps, int) else ""
    revision = f" at revision `{about['model_revision']}`" if about.get("model_revision") else ""
    return (
        f"Trained with scale_sae on{amount} `{model}`{revision} over `{dataset}`{length}, in contexts of "
        f"{about.get('context_size', '-')} tokens.\n"
    )


def _table(saes: Sequence[Entry]) -> str:
    shown = {name: where for name, where in FIGURES.items() if any(_figure(sae, where) != "-" for sae in saes)}
    titles = ["SAE", "hookpoint", "architecture", "d_in", "d_sae", "L0", "dead latents", *shown]
    rows = [titles, ["---"] * len(titles)]
    for sae in saes:
        about = sae.about
        kind = about.get("training_architecture") or sae.cfg["architecture"]
        l0 = about.get("l0")
        cells = [f"`{sae.folder}`", _places(about), kind, sae.cfg["d_in"], sae.cfg["d_sae"]]
        cells += [f"{l0:.1f}" if isinstance(l0, int | float) else "-", about.get("num_dead_features", "-")]
        rows.append([str(cell) for cell in cells] + [_figure(sae, where) for where in shown.values()])
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    note = "L0 and dead latents are those of the last tokens of the training stream; "
    note += "`runner_cfg.json` in each folder is the run's whole config"
    note += ", `eval.json` holds all figures on held-out text.\n" if shown else ".\n"
    return f"{lines}\n\n{note}"


def _together(figures: Mapping[str, Any]) -> str:
    sae = Entry("all", {}, figures)
    loss, clean, score = (_figure(sae, FIGURES[name]) for name in ("CE with SAE", "CE without", "CE score"))
    if loss == "-":
        return ""
    return f"With all SAEs in place at once the model's loss is {loss} (without: {clean}, score: {score}).\n"


def _training(saes: Sequence[Entry]) -> str:
    """What all SAEs were trained with alike."""
    told = [{**_options(sae.about), "dtype": sae.cfg.get("dtype")} for sae in saes]
    same = {key: value for key, value in told[0].items() if all(other.get(key) == value for other in told)}
    rows = [f"| {key} | `{json.dumps(value)}` |" for key, value in same.items() if value is not None]
    return "## Training\n\n| | |\n| --- | --- |\n" + "\n".join(rows) + "\n" if len(rows) > 1 else ""


def _options(about: Mapping[str, Any]) -> dict[str, Any]:
    names = ("context_size", "prepend_bos", "sequence_separator_token", "exclude_special_tokens", "seqpos_slice")
    options = about.get("training_options")
    return {name: about.get(name) for name in names} | (options if isinstance(options, dict) else {})


def _load(folder: str, repo: str | None) -> str:
    """The call that loads an SAE, from the hub or from here."""
    return f'from_pretrained("{repo}", "{folder}")' if repo else f'load_from_disk("path/to/this/folder/{folder}")'


def _places(about: Mapping[str, Any]) -> str:
    """The hookpoint, and the target of a transcoder."""
    source = about.get("hf_hook_name") or about.get("hook_name") or "-"
    target = about.get("hf_hook_name_out") or about.get("hook_name_out")
    return f"`{source}`" + (f" → `{target}`" if target else "")


def _figure(sae: Entry, where: tuple[str, str, str]) -> str:
    section, name, form = where
    found = sae.figures.get(section)
    value = found.get(name) if isinstance(found, dict) else None
    return form.format(value) if isinstance(value, int | float) else "-"


def _plots(saes: Sequence[Entry]) -> str:
    with_plot = [sae for sae in saes if sae.has_plot]
    if not with_plot:
        return ""
    lines = ["## Feature density\n", "On how large a share of the tokens each latent fires, as a histogram:\n"]
    for sae in with_plot[:PLOTS_SHOWN]:
        lines.append(f"![{sae.folder}]({_url(f'{sae.folder}/{PLOT}')})\n")
    rest = [f"[`{sae.folder}`]({_url(f'{sae.folder}/{PLOT}')})" for sae in with_plot[PLOTS_SHOWN:]]
    return "\n".join(lines) + ("\n" + ", ".join(rest) + "\n" if rest else "")


def _url(path: str) -> str:
    return path.removeprefix("./").replace(" ", "%20")


def _made_by(sae: Entry, layout: str) -> str:
    about = sae.about
    if about.get("training_library") != "scale_sae" or "training_steps" not in about:  # not made by consolidate
        return ""
    options = f" --step {about['training_steps']} --dtype {sae.cfg['dtype']}"
    options += "" if layout == "saelens" else f" --format {layout}"
    return (
        "## Made by\n\n```bash\n"
        "accelerate launch -m scale_sae.train --config runner_cfg.json\n"
        f"python -m scale_sae.consolidate RUN_DIR{options} --out release\n```\n"
    )


_USE = {
    "saelens": """Every folder is one SAE in SAELens's format, which both libraries read:

```python
from scale_sae import SAE  # or: from sae_lens import SAE

sae = SAE.{load}
feature_acts = sae.encode(activations)  # [..., d_in] -> [..., d_sae]
reconstruction = sae.decode(feature_acts)
```

In the place of the activations of a transformers model, at the hookpoint that its metadata names:

```python
from scale_sae.splice import splice

with splice(model, [sae]) as spliced:
    logits = model(input_ids).logits
feature_acts = spliced.feature_acts[sae.cfg.metadata["hf_hook_name"]]
```
""",
    "sparsify": """Every folder is one SAE in sparsify's format:

```python
from sparsify import Sae

sae = Sae.load_from_disk("{folder}")
top_acts, top_indices, _ = sae.encode(activations)
reconstruction = sae.decode(top_acts, top_indices)
```
""",
    "dictionary_learning": """Every folder is one SAE in dictionary_learning's format:

```python
from dictionary_learning.utils import load_dictionary

sae, config = load_dictionary("{folder}", device="cpu")
feature_acts = sae.encode(activations)
reconstruction = sae.decode(feature_acts)
```
""",
}


def plot_density(folder: Path, title: str) -> bytes | None:
    """The ``density.png`` of a folder's sparsity.safetensors; None where it has none.

    A histogram of the latents over the base-10 logarithm of the share of tokens on which they fire, with those that
    never fired in a bar of their own.
    """
    if not (folder / SPARSITY).is_file():
        return None
    with Reader(folder / SPARSITY) as file:
        if "sparsity" not in file.entries:
            raise UserError(f"{folder / SPARSITY}: has no tensor sparsity; get the file again")
        logs = file.tensor("sparsity").double().numpy()
    from matplotlib.figure import Figure  # slow to import

    fired = logs[logs > NEVER]
    figure = Figure(figsize=(5, 2.4), layout="constrained")
    axes = figure.subplots()
    low = min(-7.0, fired.min()) if len(fired) else -7.0
    axes.hist(fired, bins=60, range=(low, 0), color="#3b6ea5")
    axes.bar([low - 0.8], [len(logs) - len(fired)], width=0.25, color="#c44e52")
    axes.set_xticks([low - 0.8, *range(int(low), 1)], ["never", *map(str, range(int(low), 1))])
    axes.set_xlabel("log10 of the share of tokens on which a latent fires")
    axes.set_ylabel("latents")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})  # the same bytes every time
    return image.getvalue()
