"""Tables and plots of what ``benchmarks/quality.py train`` has measured.

What stands in the report above `MARK` is left as it is: it is written by hand.
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quality_subjects import Run

MARK = "<!-- What follows is written by `benchmarks/quality.py report`. -->"
FIGURES = {"L0": ("l0", "{:.2f}"), "silent": ("silent", "{:.3f}"), "dense": ("dense", "{:.3f}")}
FIGURES |= {"CE score": ("ce_score", "{:.4f}"), "seconds": ("seconds", "{:.0f}")}
FEWEST_SIZES = 3  # of dictionaries, for a power law
FEWEST_SIZES_OF_A_FLOOR = 5  # for one with a floor, which is a number more
COLOURS = {"ours": "C3", "sae_lens": "C0", "sparsify": "C1", "dictionary_learning": "C2"}


class Setting(NamedTuple):
    """What is equal for all that a table compares."""

    model: str
    hookpoint: str
    tokens: int
    batch: int
    d_sae: int
    k: int
    architecture: str


@dataclass(frozen=True)
class Result:
    """What one run gave."""

    run: Run
    lr: float
    figures: dict[str, float]
    where: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The runs of one subject with one learning rate, by seed; `kind` is default, tuned, both, or the one tried."""

    subject: str
    label: str
    kind: str
    lr: float
    results: Sequence[Result]

    def values(self, name: str) -> list[float]:
        return [result.figures[name] for result in self.results]

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values(name))

    def spread(self, name: str) -> float:
        """The standard deviation of a sample, NaN where there is one seed."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else math.nan


def gathered(folder: Path, kept: Path, runs: Sequence[Run], stream: Mapping[str, Any]) -> list[Result]:
    """What there is of ``runs``: made in ``folder``, or kept in ``kept``, to which what was made is added.

    ``kept`` holds a JSON object a line, so that the results of a work folder outlive it. All must be of the data and
    the buffer in ``stream``: others saw other rows, and are not to be compared.
    """
    lines = kept.read_text().splitlines() if kept.exists() else []
    trees = {Run(**tree["run"]).id: tree for tree in map(json.loads, lines)}
    for run in runs:
        path = folder / run.id / "result.json"
        if path.exists():
            trees[run.id] = json.loads(path.read_text())
    if not trees:
        return []
    others = [name for name, tree in trees.items() if tree["stream"] != stream]
    if others:
        sys.exit(f"{others[0]}: is of other data or another buffer; choose another --work, and --out away from {kept}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(json.dumps(trees[name]) + "\n" for name in sorted(trees)))
    found = [(run, trees[run.id]) for run in runs if run.id in trees]
    return [
        Result(run, tree["lr"], {**tree["figures"], "seconds": tree["seconds"]}, tree["where"]) for run, tree in found
    ]


def grouped(results: Iterable[Result], key: Callable[[Run], Any]) -> dict[Any, list[Result]]:
    groups = defaultdict(list)
    for result in results:
        groups[key(result.run)].append(result)
    return dict(groups)


def setting_of(run: Run) -> Setting:
    return Setting(*(getattr(run, name) for name in Setting._fields))


def rows_of(results: Sequence[Result]) -> list[Row]:
    """The rows of a setting's table: of each subject its default and the learning rate of the lowest FVU at seed 0."""
    rows = []
    for (subject, label), own in grouped(results, lambda run: (run.subject, run.label)).items():
        rates = grouped(own, lambda run: run.lr)
        tried = [result for result in own if result.run.seed == 0 and math.isfinite(result.figures["fvu"])]
        best = min(tried, key=lambda result: result.figures["fvu"]).run.lr if tried else None
        for rate in dict.fromkeys((None, best)):
            if rate in rates:
                kinds = ["default"] if rate is None else []
                if rate == best and len(tried) > 1:
                    kinds.append("tuned")
                rows.append(Row(subject, label, " and ".join(kinds) or "the one tried", rates[rate][0].lr, rates[rate]))
    return sorted(rows, key=lambda row: row.mean("fvu"))


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield f"| subject | learning rate | seeds | FVU | {' | '.join(FIGURES)} |"
    yield "|---" * (4 + len(FIGURES)) + "|"
    for row in rows:
        name = f"{row.subject} ({row.label})" if row.label else row.subject
        name = f"**{name}**" if row.subject == "ours" else name
        spread = "" if math.isnan(row.spread("fvu")) else f" ± {row.spread('fvu'):.4f}"
        cells = [name, f"{row.lr:.2g}, {row.kind}", str(len(row.results)), f"{row.mean('fvu'):.4f}{spread}"]
        cells += [form.format(row.mean(key)) for key, form in FIGURES.values()]
        yield f"| {' | '.join(cells)} |"


def tried(results: Sequence[Result]) -> str:
    """FVU by learning rate at seed 0, of all subjects that had several."""
    parts = []
    first = [result for result in results if result.run.seed == 0 and not result.run.label]
    for subject, own in grouped(first, lambda run: run.subject).items():
        if len(own) > 1:
            found = sorted((result.lr, result.figures["fvu"]) for result in own)
            parts.append(f"{subject} " + ", ".join(f"{lr:.2g}: {fvu:.4f}" for lr, fvu in found))
    return f"FVU by learning rate at seed 0: {'; '.join(parts)}." if parts else ""


def comparison(setting: Setting, rows: Sequence[Row]) -> str:
    """Ours with its defaults against the peer with the lowest FVU, tuned."""
    ours = next((row for row in rows if row.subject == "ours" and not row.label and "default" in row.kind), None)
    peer = next((row for row in rows if row.subject != "ours" and "tuned" in row.kind), None)
    if ours is None or peer is None:
        return ""
    fvu, silent, l0 = (ratio(ours.mean(name), peer.mean(name)) for name in ("fvu", "silent", "l0"))
    holds = fvu <= 1 and silent <= 0.5
    return (
        f"Ours / {peer.subject}, the best peer: FVU {fvu:.3f} (at most 1), silent {silent:.2f} (at most 0.5), "
        f"L0 {l0:.3f}: **{'holds' if holds else 'does not hold'}**. L0 of ours / k: {ours.mean('l0') / setting.k:.3f}."
    )


def ratio(a: float, b: float) -> float:
    """a / b; of nothing and nothing 0."""
    return a / b if b else (math.inf if a else 0.0)


def origin(results: Sequence[Result]) -> str:
    """When, with what and of which commit."""
    places = [result.where for result in results]
    dates = sorted({place["date"] for place in places})
    commits = {result.where["commit"] or "unknown" for result in results if result.run.subject == "ours"}
    versions = {f"{name} {version}" for place in places for name, version in place["versions"].items()}
    machines = {f"{place['processors']} CPU cores, Python {place['python']}" for place in places}
    gpus = {place["gpu"] for place in places if place["gpu"]}
    parts = [" to ".join(dict.fromkeys((dates[0], dates[-1])))]
    parts += [f"commit of ours {', '.join(sorted(commits))}"] if commits else []
    return "; ".join([*parts, *sorted(machines), *sorted(gpus), ", ".join(sorted(versions))]) + "."


# ---- dictionaries of several sizes -----------------------------------------------------------------------------------


class Size(NamedTuple):
    """A dictionary of ``d_sae`` latents; the figures are means over seeds."""

    d_sae: int
    fvu: float
    l0: float
    silent: float


class PowerLaw(NamedTuple):
    """FVU = floor + factor · d_sae ** exponent, the least squares of the logarithms of FVU − floor."""

    floor: float
    exponent: float
    factor: float
    r2: float
    sizes: list[Size]

    def at(self, d_sae: int) -> float:
        return float(self.floor + self.factor * d_sae**self.exponent)


def power_law(sizes: list[Size], floor: float = 0.0) -> PowerLaw:
    x, y = [math.log(size.d_sae) for size in sizes], [math.log(size.fvu - floor) for size in sizes]
    slope, intercept = statistics.linear_regression(x, y)
    return PowerLaw(floor, slope, math.exp(intercept), statistics.correlation(x, y) ** 2, sizes)


def with_floor(sizes: list[Size]) -> PowerLaw | None:
    """With the part of FVU that no size explains, as Gao et al. 2024 have it: of R² nearest to 1, to a thousandth.

    None of few sizes.
    """
    if len(sizes) < FEWEST_SIZES_OF_A_FLOOR:
        return None
    least = min(size.fvu for size in sizes)
    return max((power_law(sizes, least * part / 1000) for part in range(1000)), key=lambda law: law.r2)


def size_of(d_sae: int, results: Sequence[Result]) -> Size:
    means = (statistics.fmean(result.figures[name] for result in results) for name in ("fvu", "l0", "silent"))
    return Size(d_sae, *means)


def power_laws(results: Sequence[Result]) -> dict[Setting, PowerLaw]:
    """Of ours with its defaults, wherever there are dictionaries of several sizes; ``d_sae`` of the keys is 0."""
    own = [result for result in results if result.run.subject == "ours" and not result.run.label and not result.run.lr]
    found = {}
    for setting, some in grouped(own, lambda run: setting_of(run)._replace(d_sae=0)).items():
        sizes = grouped(some, lambda run: run.d_sae)
        if len(sizes) >= FEWEST_SIZES:
            found[setting] = power_law([size_of(*item) for item in sorted(sizes.items())])
    return found


# ---- plots -----------------------------------------------------------------------------------------------------------


def panels(n: int) -> tuple[Any, list[Any]]:
    """A figure and its ``n`` axes."""
    from matplotlib.figure import Figure

    columns = math.ceil(math.sqrt(n))
    lines = math.ceil(n / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[n:]:
        unused.remove()
    return figure, axes[:n]


def plot_l0(tables: dict[Setting, list[Row]], path: Path) -> bool:
    """FVU against L0, tuned peers and ours with its defaults; False where no setting has several subjects."""
    curves: dict[Setting, dict[str, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for setting, rows in tables.items():
        if len({row.subject for row in rows}) > 1:
            for row in rows:
                if not row.label and ("default" if row.subject == "ours" else "tuned") in row.kind:
                    spread = row.spread("fvu")
                    point = row.mean("l0"), row.mean("fvu"), 0.0 if math.isnan(spread) else spread
                    curves[setting._replace(k=0)][row.subject].append(point)
    if not curves:
        return False
    figure, axes = panels(len(curves))
    for ax, (setting, subjects) in zip(axes, curves.items(), strict=True):
        for subject, points in subjects.items():
            l0, fvu, spreads = zip(*sorted(points), strict=True)
            ax.errorbar(l0, fvu, spreads, color=COLOURS[subject], marker="o", markersize=4, capsize=2, label=subject)
        ax.set(title=f"{setting.architecture}, {setting.model} {setting.hookpoint}", xlabel="L0", ylabel="FVU")
        ax.title.set_fontsize(9)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    return True


def plot_scaling(laws: dict[Setting, PowerLaw], path: Path) -> None:
    """FVU against d_sae, with the power laws."""
    figure, (ax,) = panels(1)
    for number, (setting, law) in enumerate(laws.items()):
        sizes, fvu = [size.d_sae for size in law.sizes], [size.fvu for size in law.sizes]
        name = f"{setting.architecture}, k {setting.k}, {setting.model}: {law.exponent:.3f}"
        ax.plot(sizes, fvu, "o", color=f"C{number}", markersize=4)
        ax.plot(sizes, [law.at(size) for size in sizes], color=f"C{number}", label=name)
        if bent := with_floor(law.sizes):
            ax.plot(sizes, [bent.at(size) for size in sizes], color=f"C{number}", linestyle="dotted")
    ax.set(xscale="log", yscale="log", xlabel="d_sae", ylabel="FVU")
    ticks = sorted({size.d_sae for law in laws.values() for size in law.sizes})
    ax.set_xticks(ticks, [str(size) for size in ticks])
    ax.set_xticks([], minor=True)
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=90)


# ---- the report ------------------------------------------------------------------------------------------------------


def report(folder: Path, runs: Sequence[Run], stream: Mapping[str, Any], out: Path) -> None:
    """Writes ``out``, its plots and, as ``.jsonl``, its results: of ``runs`` what `gathered` finds."""
    results = gathered(folder, out.with_suffix(".jsonl"), runs, stream)
    if not results:
        sys.exit(f"{folder} holds no results of the plan")
    lines = [MARK, "", origin(results)]
    if len(results) < len(runs):
        lines.append(f"{len(runs) - len(results)} of the plan's {len(runs)} runs are not made yet.")
    tables = {setting: rows_of(some) for setting, some in grouped(results, setting_of).items()}
    plot = out.with_suffix(".png")
    if plot_l0(tables, plot):
        lines += ["", f"![FVU against L0]({plot.name})"]
    laws = power_laws(results)
    for setting, some in grouped(results, setting_of).items():
        if not tables[setting] or (len(tables[setting]) == 1 and setting._replace(d_sae=0) in laws):
            continue  # no rate at seed 0 yet; ours alone, at one of the sizes of a law
        lines += [
            "",
            f"## {setting.model}, {setting.hookpoint}, {setting.architecture}, k {setting.k}, d_sae {setting.d_sae}",
        ]
        lines += ["", f"{setting.tokens} tokens in batches of {setting.batch}.", "", *table(tables[setting])]
        for text in (comparison(setting, tables[setting]), tried(some)):
            lines += ["", text] if text else []
    if laws:
        plot = out.with_name(f"{out.stem}_scaling.png")
        plot_scaling(laws, plot)
        lines += ["", "## FVU against d_sae", "", f"![FVU against d_sae]({plot.name})"]
        lines += [line for setting, law in laws.items() for line in law_lines(setting, law)]
    above = out.read_text().partition(MARK)[0] if out.exists() else "# Quality\n\n"
    out.write_text(above + "\n".join(lines) + "\n")


def law_lines(setting: Setting, law: PowerLaw) -> Iterator[str]:
    yield ""
    yield (
        f"{setting.model}, {setting.hookpoint}, {setting.architecture}, k {setting.k}, {setting.tokens} tokens: "
        f"FVU ∝ d_sae^{law.exponent:.3f}, R² {law.r2:.4f}."
    )
    if bent := with_floor(law.sizes):
        yield (
            f"With a part that no size explains, dotted: FVU = {bent.floor:.4f} + {bent.factor:.3g} · "
            f"d_sae^{bent.exponent:.3f}, R² {bent.r2:.4f}."
        )
    yield from ("", "| d_sae | FVU | of the law | L0 | silent |", "|---" * 5 + "|")
    for size in law.sizes:
        cells = [f"{size.d_sae}", f"{size.fvu:.4f}", f"{law.at(size.d_sae):.4f}", f"{size.l0:.2f}"]
        yield f"| {' | '.join([*cells, f'{size.silent:.3f}'])} |"
