"""The model card of a release: its README.md, made of what the folders of its SAEs hold, and the plots in it."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import quote

import yaml

from scale_sae.errors import UserError
from scale_sae.export import SPARSITY
from scale_sae.hook_names import names_of
from scale_sae.tensorfile import Reader

CARD = "README.md"
EVAL = "eval.json"
PLOT = "density.png"
TAG = "scale_sae"  # by which a card tells a release of this package
NEVER = -9.99  # log10(share + 1e-10) of a latent that never fired is -10
PLOTS_SHOWN = 12  # in the card; all others are linked
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# Columns of figures on held-out text: title, where the figure stands in eval.json, how it is written.
FIGURES = {
    "explained variance": ("reconstruction_quality", "explained_variance", "{:.4f}"),
    "PCA-k FVU": ("reconstruction_quality", "pca_fvu", "{:.4f}"),
    "L0": ("sparsity", "l0", "{:.2f}"),
    "L0 max": ("sparsity", "l0_max", "{:.0f}"),
    "dead": ("sparsity", "dead_fraction", "{:.1%}"),
    "CE": ("model_performance_preservation", "ce_loss_without_sae", "{:.4f}"),
    "CE with SAE": ("model_performance_preservation", "ce_loss_with_sae", "{:.4f}"),
    "CE zeroed": ("model_performance_preservation", "ce_loss_with_ablation", "{:.4f}"),
    "CE score": ("model_performance_preservation", "ce_loss_score", "{:.4f}"),
    "KL with SAE": ("model_behavior_preservation", "kl_div_with_sae", "{:.4f}"),
    "KL score": ("model_behavior_preservation", "kl_div_score", "{:.4f}"),
}
SHOWN = ("explained variance", "L0", "CE with SAE", "CE", "CE score", "KL score")  # in the card


@dataclass(frozen=True)
class Entry:
    """One SAE of a release.

    Attributes:
        folder: its folder there.
        cfg: its cfg.json in SAELens's format, without local paths.
        local: the dotted keys in ``cfg`` where they were.
        figures: its eval.json where it has one.
    """

    folder: str
    cfg: Mapping[str, Any]
    local: frozenset[str] = frozenset()
    figures: Mapping[str, Any] = field(default_factory=dict)
    has_plot: bool = False

    @property
    def about(self) -> Mapping[str, Any]:
        """The metadata of its cfg.json."""
        return self.cfg["metadata"]


def entry(name: str, cfg: Mapping[str, Any], figures: Mapping[str, Any] | None = None, has_plot: bool = False) -> Entry:
    """The SAE of a folder ``name``, from its cfg.json as it is."""
    local: set[str] = set()
    return Entry(name, without_local_paths(cfg, local), frozenset(local), figures or {}, has_plot)


def figures(path: Path) -> dict[str, Any]:
    """The contents of an eval.json, by section; nothing where there is none. UserError where it cannot be read."""
    return json_object(path, "run python -m scale_sae.evaluate again, or remove it") if path.is_file() else {}


def json_object(path: Path, cure: str = "get the file again") -> dict[str, Any]:
    """A JSON file's object. UserError, with the ``cure``, where it holds none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError(f"a {type(tree).__name__}")
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: is no JSON object ({error}); {cure}") from None
    return tree


def without_local_paths(tree: Any, cut: set[str], key: str = "") -> Any:
    """A copy of a config in which local paths are their last part: the rest tells of this machine, not of the SAE.

    Local are absolute paths, and relative ones that go up. Addresses lose the user and password that stand in them.
    The dotted keys where that was so are added to ``cut``.
    """
    if isinstance(tree, Mapping):
        return {name: without_local_paths(value, cut, f"{key}.{name}".lstrip(".")) for name, value in tree.items()}
    if isinstance(tree, list):
        return [without_local_paths(value, cut, f"{key}.{index}") for index, value in enumerate(tree)]
    if not isinstance(tree, str):
        return tree
    path = PureWindowsPath(tree)  # which takes / and \ for separators
    goes_up = ".." in path.parts and "://" not in tree
    if tree.startswith(("/", "~", "file:")) or path.is_absolute() or goes_up:
        public = path.name
    else:
        public = re.sub(r"://[^/\s]*@", "://", tree)
    if public != tree:
        cut.add(key)
    return public


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
    parts = [
        "---\n" + _front_matter(saes[0], layout) + "---\n",
        f"# Sparse autoencoders for {_plain(saes[0].about.get('model_name'))}\n",
        _introduction(saes),
        _table(saes),
        _together(together or {}),
        _training(saes),
        _plots(saes),
        "## Use\n",
        _USE[layout].format(load=_load(saes[0].folder, repo), folder=json.dumps(_here(saes[0].folder))),
        _made_by(saes[0], layout),
    ]
    return "\n".join(part for part in parts if part)


def _plain(value: Any) -> str:
    """A name that is nothing but text, also in a table and a code span: what Markdown would take for more is a ?."""
    return "-" if value in (None, "") else re.sub(r"[\x00-\x1f\x7f`|<>\[\]]", "?", str(value))


def _front_matter(sae: Entry, layout: str) -> str:
    matter: dict[str, Any] = {"library_name": layout, "tags": ["sparse-autoencoder", TAG]}
    if _on_hub(sae, "model_name"):
        matter["base_model"] = sae.about["model_name"]
    if _on_hub(sae, "dataset_path"):
        matter["datasets"] = [sae.about["dataset_path"]]
    return yaml.safe_dump(matter, sort_keys=False)


def _on_hub(sae: Entry, key: str) -> bool:
    """Whether a name may be one of the hub: not what is left of a path, nor a folder here, nor in this package."""
    name = sae.about.get(key)
    if not isinstance(name, str) or name == "embedded" or f"metadata.{key}" in sae.local:
        return False
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _introduction(saes: Sequence[Entry]) -> str:
    about = saes[0].about
    tokens, steps = about.get("training_tokens"), about.get("training_steps")
    amount = f" {tokens:,} activations of" if isinstance(tokens, int) else ""
    length = f" ({steps:,} steps)" if isinstance(steps, int) else ""
    revision = f" at revision `{_plain(about['model_revision'])}`" if about.get("model_revision") else ""
    return (
        f"Trained with scale_sae on{amount} `{_plain(about.get('model_name'))}`{revision} over "
        f"`{_plain(about.get('dataset_path'))}`{length}, in contexts of {_plain(about.get('context_size'))} tokens.\n"
    )


def _table(saes: Sequence[Entry]) -> str:
    shown = [name for name in SHOWN if any(_figure(sae, name) != "-" for sae in saes)]
    titles = ["SAE", "hookpoint", "architecture", "d_in", "d_sae", "L0 (training)", "dead latents", *shown]
    rows = [titles, ["---"] * len(titles)]
    for sae in saes:
        about = sae.about
        kind = about.get("training_architecture") or sae.cfg["architecture"]
        l0 = about.get("l0")
        cells = [f"`{_plain(sae.folder)}`", _places(about), *map(_plain, (kind, sae.cfg["d_in"], sae.cfg["d_sae"]))]
        cells += [f"{l0:.1f}" if isinstance(l0, int | float) else "-", _plain(about.get("num_dead_features"))]
        rows.append(cells + [_figure(sae, name) for name in shown])
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    note = "L0 (training) and dead latents are those of the last tokens of the training stream; "
    note += "`runner_cfg.json` in each folder is the run's whole config"
    note += ", `eval.json` holds all figures on held-out text.\n" if shown else ".\n"
    return f"{lines}\n\n{note}"


def _together(figures: Mapping[str, Any]) -> str:
    sae = Entry("all", {}, figures=figures)
    loss, clean, score = (_figure(sae, name) for name in ("CE with SAE", "CE", "CE score"))
    if loss == "-":
        return ""
    return f"With all SAEs in place at once the model's loss is {loss} (without: {clean}, score: {score}).\n"


def _training(saes: Sequence[Entry]) -> str:
    """What all SAEs were trained with alike."""
    told = [{**_options(sae.about), "dtype": sae.cfg.get("dtype")} for sae in saes]
    same = {key: value for key, value in told[0].items() if all(other.get(key) == value for other in told)}
    rows = [f"| {_plain(key)} | `{_value(value)}` |" for key, value in same.items() if value is not None]
    return "## Training\n\n| | |\n| --- | --- |\n" + "\n".join(rows) + "\n" if len(rows) > 1 else ""


def _value(value: Any) -> str:
    """An option's value as in a config; a string that would end the code span or the table's cell is cut there."""
    return re.split(r"[`|]", json.dumps(value))[0]


def _options(about: Mapping[str, Any]) -> dict[str, Any]:
    names = ("context_size", "prepend_bos", "sequence_separator_token", "exclude_special_tokens", "seqpos_slice")
    options = about.get("training_options")
    return {name: about.get(name) for name in names} | (options if isinstance(options, dict) else {})


def _load(folder: str, repo: str | None) -> str:
    """The call that loads an SAE, from the hub or from here."""
    if repo is None:
        return f"load_from_disk({json.dumps(_here(folder))})"
    return f'from_pretrained("{repo}", {json.dumps(folder)})'


def _here(folder: str) -> str:
    return f"path/to/this/folder/{folder}"


def _places(about: Mapping[str, Any]) -> str:
    """The hookpoint, and the target of a transcoder."""
    sources, targets = names_of(about)
    return " → ".join(f"`{_plain(names[0])}`" for names in (sources or ["-"], targets) if names)


def _figure(sae: Entry, title: str) -> str:
    section, name, form = FIGURES[title]
    found = sae.figures.get(section)
    value = found.get(name) if isinstance(found, dict) else None
    return form.format(value) if isinstance(value, int | float) else "-"


def _plots(saes: Sequence[Entry]) -> str:
    with_plot = [sae for sae in saes if sae.has_plot]
    if not with_plot:
        return ""
    lines = ["## Feature density\n", "On how large a share of the tokens each latent fires, as a histogram:\n"]
    for sae in with_plot[:PLOTS_SHOWN]:
        lines.append(f"![{_plain(sae.folder)}]({_url(f'{sae.folder}/{PLOT}')})\n")
    rest = [f"[`{_plain(sae.folder)}`]({_url(f'{sae.folder}/{PLOT}')})" for sae in with_plot[PLOTS_SHOWN:]]
    return "\n".join(lines) + ("\n" + ", ".join(rest) + "\n" if rest else "")


def _url(path: str) -> str:
    return quote(path.removeprefix("./"), safe="/:")


def _made_by(sae: Entry, layout: str) -> str:
    about = sae.about
    if about.get("training_library") != "scale_sae" or "training_steps" not in about:  # not made by consolidate
        return ""
    options = f" --step {_plain(about['training_steps'])} --dtype {_plain(sae.cfg.get('dtype'))}"
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

sae = Sae.load_from_disk({folder})
top_acts, top_indices, _ = sae.encode(activations)
reconstruction = sae.decode(top_acts, top_indices)
```
""",
    "dictionary_learning": """Every folder is one SAE in dictionary_learning's format:

```python
from dictionary_learning.utils import load_dictionary

sae, config = load_dictionary({folder}, device="cpu")
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
