"""Makes one HTML page of a run, to be looked at: ``python -m scale_sae.report RUN_DIR [--out FILE.html]``.

The page holds everything in itself: it opens from a file, without a network, and its figures are those of
``metrics.jsonl``. It can be made while the run goes on. How it looks is in ``report_page/``.
"""

import datetime
import html
import inspect
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import fire
import yaml

from scale_sae.card import figures
from scale_sae.checkpoint import folder_name
from scale_sae.errors import UserError, nearest
from scale_sae.metrics import DENSITY_BINS, DENSITY_HISTOGRAM

Record = dict[str, Any]

# Numbers that a page holds at most, some 20 MB: of longer runs with many SAEs it shows every n-th record.
NUMBERS = 1_000_000
FEWEST_POINTS = 100  # of one SAE, however many there are
# What a record says beside its metrics; the tokens are what details/n_training_samples repeats.
NO_METRICS = ("step", "tokens", "sae_id", "details/n_training_samples")


def main(run_dir: Any = None, *extra: Any, out: Any = None, **unknown: Any) -> None:
    """python -m scale_sae.report RUN_DIR [--out FILE.html]

    Makes an HTML page of a run: curves, tables, feature densities, where the time went. No network is needed to look
    at it. The run may still be going on.

    Args:
        run_dir: the run's output_dir, which holds metrics.jsonl.
        out: the page. Without it: RUN_DIR/report.html.
    """
    if unknown.keys() & {"help", "h"}:  # Fire hands them over, as it does every flag that is not declared
        print(inspect.getdoc(main))
        return
    try:
        _check_arguments(run_dir, extra, out, unknown)
        folder = Path(str(run_dir))
        path = folder / "report.html" if out is None else Path(str(out))
        report(folder, path)
    except (UserError, OSError) as error:  # OSError: a full disk, or a folder that may not be read or written
        sys.exit(f"error: {error}")
    print(f"written: {path.absolute().as_uri()}")


def _check_arguments(run_dir: Any, extra: Sequence[Any], out: Any, unknown: Mapping[str, Any]) -> None:
    for name, value in unknown.items():
        raise UserError(f"--{name} {value}: no such option{nearest(name, ('out',))}")
    if extra:
        raise UserError(f"{extra[0]}: the run's output_dir is the only argument; the page's name goes after --out")
    if run_dir is None:
        raise UserError("RUN_DIR is missing: give the output_dir of a run")
    if isinstance(out, bool):
        raise UserError("--out: give the name of the page, for example --out report.html")


def report(run_dir: Path, out: Path) -> None:
    """Writes the page of the run in ``run_dir`` as ``out``, whole or not at all.

    Raises:
        UserError: ``run_dir`` holds no metrics.
    """
    page = render(collect(run_dir))
    aside = out.with_name(f".{out.name}")
    aside.write_text(page, encoding="utf-8")
    aside.replace(out)


# ---- what the page is of ---------------------------------------------------------------------------------------------


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything that the page shows, in types that JSON holds; ``UserError`` if the folder has no metrics."""
    records, unreadable = read_records(run_dir / "metrics.jsonl")
    path = run_dir / "config.yaml"
    config = _read(path) if path.exists() else None
    by_sae: dict[str, list[Record]] = {}
    for record in records:
        by_sae.setdefault(str(record["sae_id"]), []).append(record)
    notes = [f"{unreadable} lines of metrics.jsonl cannot be read and are left out"] if unreadable else []
    names = {name for record in records for name in record}
    room = max(FEWEST_POINTS, NUMBERS // (len(by_sae) * len(names)))
    stride = math.ceil(max(len(part) for part in by_sae.values()) / room)
    if stride > 1:
        notes.append(f"one in {stride} records of metrics.jsonl is shown")
    written = datetime.datetime.fromtimestamp((run_dir / "metrics.jsonl").stat().st_mtime)
    return {
        "name": run_dir.resolve().name,
        "made": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "lastRecord": written.strftime("%Y-%m-%d %H:%M"),
        "config": config,
        "bins": DENSITY_BINS,
        "notes": notes,
        "saes": [{"id": sae_id, **_entry(sae_id, config), **_series(part, stride)} for sae_id, part in by_sae.items()],
        "release": released_figures(run_dir, list(by_sae)),
    }


def read_records(path: Path) -> tuple[list[Record], int]:
    """The records of ``metrics.jsonl``, one per SAE and step, and how many lines cannot be read.

    The last line of a run that goes on, or was killed, may be half a line; it is left out and not counted. Records of
    the same SAE and step (of training and of an evaluation) are one.
    """
    if not path.exists():
        raise UserError(f"{path.parent}: holds no {path.name}; give the output_dir of a run that has begun")
    found: dict[tuple[str, int], Record] = {}
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.endswith("\n"):
                continue
            try:
                record = json.loads(line)
                place = record["sae_id"], int(record["step"])
                _tokens(record)
                found.setdefault(place, {}).update(record)
            except (ValueError, KeyError, TypeError, OverflowError):  # the last: a step or tokens that are infinite
                unreadable += 1
    if not found:
        raise UserError(f"{path}: holds no record yet; wait for the run's first step")
    return sorted(found.values(), key=lambda record: record["step"]), unreadable


def _series(records: Sequence[Record], stride: int) -> dict[str, Any]:
    """The curves of one SAE: tokens and steps, one list per metric (None where a record lacks it), its histograms.

    Of the curves one in ``stride`` records is kept, and those that hold a metric which not all of them have. The
    ``last`` value of each metric is of the last record that holds it.
    """
    metrics = list(dict.fromkeys(name for record in records for name in record if name not in NO_METRICS))
    numbers = [name for name in metrics if not name.endswith(DENSITY_HISTOGRAM)]
    usual = set(records[len(records) // 2]).intersection(records[0])
    kept = [
        record
        for index, record in enumerate(records)
        if index % stride == 0 or index == len(records) - 1 or record.keys() - usual
    ]
    last = {name: value for record in records for name, value in record.items() if name in numbers}
    return {
        "steps": [record["step"] for record in kept],
        "tokens": [_tokens(record) for record in kept],
        "values": {name: [record.get(name) for record in kept] for name in numbers},
        "last": last,
        "seconds": _total_seconds(records),
        "densities": [
            {"step": record["step"], "tokens": _tokens(record), "name": name, "counts": value}
            for record in records
            for name, value in record.items()
            if name.endswith(DENSITY_HISTOGRAM)
        ],
    }


def _tokens(record: Record) -> int:
    """How many tokens were trained; `SAETrainer`'s records say it under one name alone."""
    names = ("tokens", "details/n_training_samples", "step")
    return next(int(record[name]) for name in names if name in record)


def _total_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Where the time went, over all records: also those that the page does not hold."""
    prefix = "perf/seconds_"
    parts = dict.fromkeys(name for record in records for name in record if name.startswith(prefix))
    return {name.removeprefix(prefix): math.fsum(record.get(name, 0.0) for record in records) for name in parts}


def _entry(sae_id: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Hookpoint and name of an SAE, and what the config says of it."""
    hookpoint, _, name = sae_id.partition("/")
    found = {"hookpoint": hookpoint, "name": name}
    for entry in (config or {}).get("saes") or []:
        patterns = entry.get("hookpoints") or (config or {}).get("hookpoints") or []
        if (entry.get("name") or "") == name and any(_matches(pattern, hookpoint) for pattern in patterns):
            return found | {"architecture": entry.get("architecture"), "d_sae": entry.get("d_sae")}
    return found


def _matches(pattern: str, hookpoint: str) -> bool:
    """Whether the pattern of a config, whose * is a part between dots, is of this hookpoint."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]*"), hookpoint) is not None


def released_figures(run_dir: Path, sae_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What ``scale_sae.evaluate`` found of releases inside the run's folder, by SAE; flat names, ``section/name``.

    Of several releases the figures that were written last count. Hidden folders hold what is being written or replaced.
    """
    found: dict[str, dict[str, Any]] = {}
    paths = [path for path in run_dir.glob("*/**/eval.json") if "/." not in f"/{path.relative_to(run_dir)}"]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        for sae_id in sae_ids:
            if path.parent.as_posix().endswith("/" + folder_name(sae_id)):
                found[sae_id] = _flat(figures(path))
    return found


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``{section: {name: number}}`` as ``{section/name: number}``, without what is no number."""
    leaves = {
        f"{section}/{name}": value
        for section, part in tree.items()
        if isinstance(part, Mapping)
        for name, value in part.items()
    }
    return {name: value for name, value in leaves.items() if isinstance(value, int | float)}


def _read(path: Path) -> dict[str, Any]:
    """What the YAML file holds, ``UserError`` if that is no mapping."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is damaged; restore it, or remove it and make the page without it")
    return tree


# ---- the page --------------------------------------------------------------------------------------------------------


def render(content: Mapping[str, Any]) -> str:
    """The page that shows ``content``, as ``collect`` returns it."""
    folder = files("scale_sae") / "report_page"
    parts = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.css", "charts.js", "page.js")}
    page = (folder / "page.html").read_text(encoding="utf-8")
    values = {"title": html.escape(str(content["name"])), "data": to_json(content), **parts}
    # In one pass: what is put in may itself hold the marks.
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: values[match[1]], page)


def to_json(content: Any) -> str:
    """JSON that may stand in an HTML page: numbers as Python writes them, those that are not finite as strings."""
    return json.dumps(_finite(content), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


if __name__ == "__main__":
    fire.Fire(main)
