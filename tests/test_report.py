"""The page of a run: its figures are those of ``metrics.jsonl``, and it needs nothing but itself."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
from scale_sae import report
from scale_sae.errors import UserError
from scale_sae.metrics import DENSITY_BINS, DENSITY_HISTOGRAM

SAES = ["model.layers.0/small", "model.layers.0/wide", "model.layers.1.mlp:in/small"]
HISTOGRAM = f"plots/{DENSITY_HISTOGRAM}"
EVIL = '</script><img src=x onerror=alert("1")>&amp;{{data}} '
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def made_up_records(steps: int = 40) -> list[dict[str, Any]]:
    """Numbers of many digits, some not finite; the second SAE diverges, and every tenth step is an evaluation's."""
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        for index, sae_id in enumerate(SAES):
            if index == 1 and step > steps // 2:
                continue
            record: dict[str, Any] = {
                "step": step,
                "tokens": step * 128,
                "sae_id": sae_id,
                "losses/overall_loss": math.exp(-step / 7) * (index + 1 / 3),
                "metrics/explained_variance": math.nan if step == 5 else 1 - 1 / (step + index / 7),
                "metrics/l0": 7 + math.sin(step),
                "sparsity/dead_features": 3 * step + index,
                "perf/tokens_per_second": 1000 / 3 + step,
                "perf/seconds_training": 0.1 * step,
                "perf/seconds_other": 1e-7,
            }
            if step == 3:
                record["details/grad_norm"] = math.inf
            if step % 10 == 0:
                record[HISTOGRAM] = [step + bin for bin in range(len(DENSITY_BINS) - 1)]
            records.append(record)
            if step % 10 == 0:
                named = ("step", "tokens", "sae_id")
                records.append({**{k: record[k] for k in named}, "shrinkage/l2_ratio": 1 - 1 / step})
    return records


def save_run(run_dir: Path, records: list[dict[str, Any]], config: dict[str, Any] | None = None, end: str = "") -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    if config is not None:
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir


CONFIG: dict[str, Any] = {
    "hookpoints": ["model.layers.*"],
    "saes": [
        {"name": "small", "architecture": "topk", "d_sae": 512},
        {"name": "wide", "architecture": "jumprelu", "d_sae": 1024},
        {"name": "small", "architecture": "gated", "d_sae": 64, "hookpoints": ["model.layers.*.mlp:in"]},
    ],
    "model": {"name": EVIL, "dtype": "float32"},
    "data": {"dataset": EVIL},
    "logging": {"run_name": EVIL},
    "train": {"training_tokens": 100 * 128, "train_batch_size_tokens": 128},
}


def page_of(run_dir: Path) -> str:
    report.report(run_dir, run_dir / "report.html")
    return (run_dir / "report.html").read_text()


def data_of(page: str) -> dict[str, Any]:
    """What the page holds, as a browser reads it: up to the first end of a script."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)

    def no_such_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found: dict[str, Any] = json.loads(text, parse_constant=no_such_constant)
    return found


def plain(value: Any) -> Any:
    """A number as the page holds it: JSON has none that are not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def test_the_numbers_are_those_of_the_metrics(tmp_path: Path) -> None:
    records = made_up_records()
    data = data_of(page_of(save_run(tmp_path / "run", records, CONFIG)))
    assert [sae["id"] for sae in data["saes"]] == SAES and data["bins"] == list(DENSITY_BINS)
    seen = 0
    for sae in data["saes"]:
        mine = [record for record in records if record["sae_id"] == sae["id"]]
        places = {step: i for i, step in enumerate(sae["steps"])}
        assert sae["steps"] == sorted({record["step"] for record in mine})
        for record in mine:
            place = places[record["step"]]
            assert sae["tokens"][place] == record["tokens"]
            for name, value in record.items():
                if name == HISTOGRAM:
                    (shown,) = [density for density in sae["densities"] if density["step"] == record["step"]]
                    assert (shown["tokens"], shown["counts"]) == (record["tokens"], value)
                elif name not in ("step", "tokens", "sae_id"):
                    assert sae["values"][name][place] == plain(value), name
                    seen += 1
        for name in ("metrics/l0", "shrinkage/l2_ratio"):
            assert sae["last"][name] == [record[name] for record in mine if name in record][-1]
        # A sum of few numbers in float64, in another order.
        spent = sum(record.get("perf/seconds_training", 0) for record in mine)
        assert sae["seconds"]["training"] == pytest.approx(spent, rel=1e-12)
    assert seen == 100 * 7 + 3 + 10


def test_what_is_known_of_an_sae_is_the_entry_that_its_hookpoint_matches(tmp_path: Path) -> None:
    data = data_of(page_of(save_run(tmp_path / "run", made_up_records(), CONFIG)))
    known = [(sae["hookpoint"], sae["name"], sae["architecture"], sae["d_sae"]) for sae in data["saes"]]
    assert known == [
        ("model.layers.0", "small", "topk", 512),
        ("model.layers.0", "wide", "jumprelu", 1024),
        ("model.layers.1.mlp:in", "small", "gated", 64),
    ]


def test_the_page_needs_nothing_else_and_shows_names_as_text(tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / 'a "run" <b>', made_up_records(), CONFIG)
    page = page_of(run_dir)
    data = data_of(page)
    assert data["config"]["model"]["name"] == data["config"]["logging"]["run_name"] == EVIL
    assert "<title>a &quot;run&quot; &lt;b&gt; · scale_sae</title>" in page
    own = page.replace(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0], "")
    assert EVIL.strip() not in page and "onerror" not in own
    # The browser may not load anything, and is not asked to. Nothing is read as HTML or run as a script.
    assert "default-src 'none'" in own
    for mark in ("http:", "https:", "//cdn", "src=", "href=", "url(", "@import", "innerHTML", "eval(", "fetch("):
        assert mark not in own, mark
    # Three scripts and their ends: the data, the charts, the page.
    assert page.count("<script") == page.count("</script") == 3


def test_a_run_that_goes_on_and_damaged_lines(tmp_path: Path) -> None:
    records = made_up_records(12)
    whole = data_of(page_of(save_run(tmp_path / "whole", records, CONFIG)))
    half = data_of(page_of(save_run(tmp_path / "half", records, CONFIG, end='{"step": 13, "tok')))
    assert half["saes"] == whole["saes"] and half["notes"] == []
    infinite = ['{"step": Infinity, "sae_id": "a", "tokens": 1}', '{"step": 1, "sae_id": "a", "tokens": -Infinity}']
    end = "\n".join(['{"step"', "[]", '{"a": 1}', *infinite, ""])
    damaged = data_of(page_of(save_run(tmp_path / "damaged", records, CONFIG, end=end)))
    assert damaged["saes"] == whole["saes"]
    assert damaged["notes"] == ["5 lines of metrics.jsonl cannot be read and are left out"]


def test_long_runs_are_thinned_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "NUMBERS", 600)
    monkeypatch.setattr(report, "FEWEST_POINTS", 5)
    records = made_up_records(98)
    data = data_of(page_of(save_run(tmp_path / "run", records)))
    names = {name for record in records for name in record}
    room = 600 // (3 * len(names))
    stride = math.ceil(98 / room)
    assert data["notes"] == [f"one in {stride} records of metrics.jsonl is shown"]
    steps = set(data["saes"][0]["steps"])
    assert 98 not in range(1, 99, stride)
    # One in a stride, the first and the last, and those that hold more than the others.
    assert steps == {*range(1, 99, stride), 98, 3, *range(10, 99, 10)}
    assert len(data["saes"][0]["densities"]) == 9
    seconds = sum(0.1 * step for step in range(1, 99))
    assert data["saes"][0]["seconds"]["training"] == pytest.approx(seconds, rel=1e-12)


def test_figures_of_an_evaluated_release(tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "run", made_up_records(3), CONFIG)
    folder = run_dir / "release/model.layers.1.mlp.in/small"
    folder.mkdir(parents=True)
    tree = {"sparsity": {"l0": 31.5, "density": [1, 2]}, "reconstruction_quality": {"mse": math.nan}, "sae": "a name"}
    (folder / "eval.json").write_text(json.dumps(tree))
    data = data_of(page_of(run_dir))
    assert data["release"] == {SAES[2]: {"sparsity/l0": 31.5, "reconstruction_quality/mse": "nan"}}


def test_of_several_releases_the_newest_figures_are_shown(tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "run", made_up_records(3), CONFIG)
    for age, name in enumerate([".new.replaced", "new", "older"]):
        path = run_dir / name / "model.layers.0/small/eval.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"sparsity": {"l0": age}}))
        os.utime(path, (10**9 - age, 10**9 - age))
    assert data_of(page_of(run_dir))["release"] == {SAES[0]: {"sparsity/l0": 1}}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.yaml", "is damaged; restore it, or remove it and make the page without it"),
        ("release/model.layers.0/small/eval.json", r"is no JSON object \(.*\); run .* again, or remove it"),
    ],
)
@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_damaged_file_beside_the_metrics_is_one_line(tmp_path: Path, name: str, words: str, text: str) -> None:
    run_dir = save_run(tmp_path / "run", made_up_records(2))
    (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (run_dir / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"^[^\n]*{words}$"):
        report.collect(run_dir)


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = save_run(tmp_path / "run", made_up_records(2))
    empty = save_run(tmp_path / "empty", [])
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((), {}, "RUN_DIR is missing"),
        ((run_dir, "more"), {}, "more: the run's output_dir is the only argument"),
        ((run_dir,), {"outt": "a"}, "--outt a: no such option (did you mean out?)"),
        ((run_dir,), {"out": True}, "--out: give the name of the page"),
        ((tmp_path / "none",), {}, "holds no metrics.jsonl; give the output_dir of a run"),
        ((empty,), {}, "holds no record yet"),
        ((run_dir,), {"out": tmp_path / "no/such/folder.html"}, "No such file"),
    ]
    for arguments, keys, part in cases:
        with pytest.raises(SystemExit) as caught:
            report.main(*arguments, **keys)
        line = str(caught.value.code)
        assert line.startswith("error: ") and part in line and "\n" not in line
    with pytest.raises(UserError):
        report.report(empty, tmp_path / "page.html")
    assert not list(tmp_path.glob("*.html")) + list(tmp_path.glob(".*.html"))


def test_the_command_on_a_run_that_was_trained(tmp_path: Path) -> None:
    config = runs.tiny_config(tmp_path)
    config["train"] |= {"training_tokens": 20 * 128, "feature_sampling_window": 10}
    runs.forked_run(runs.write_config(tmp_path, config), 1)
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "scale_sae.report", str(tmp_path / "run"), f"--out={page}"]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and page.as_uri() in done.stdout
    data = data_of(page.read_text())
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [len(sae["densities"]) for sae in data["saes"]] == [2] * 4
    for record in records:
        (sae,) = [sae for sae in data["saes"] if sae["id"] == record["sae_id"]]
        place = sae["steps"].index(record["step"])
        numbers = {name: value for name, value in record.items() if "/" in name and name != HISTOGRAM}
        numbers.pop("details/n_training_samples")
        assert {name: sae["values"][name][place] for name in numbers} == numbers


# Uses everything on the page that can be used, twice; the second time undoes some of the first.
USE_IT_ALL = """
<script>
for (const round of [0, 1]) {
  for (const search of document.querySelectorAll("[type=search]")) {
    search.value = ["no such SAE", "Small 0"][round];
    search.dispatchEvent(new Event("input"));
  }
  for (const slider of document.querySelectorAll("[type=range]")) {
    slider.value = slider.max * round;
    slider.dispatchEvent(new Event("input"));
  }
  for (const one of document.querySelectorAll("button, th, summary")) {
    one.click();
    one.dispatchEvent(new MouseEvent("dblclick"));
  }
  for (const one of document.querySelectorAll("canvas, tr, .cell, .chip")) {
    const box = one.getBoundingClientRect();
    const at = { clientX: box.left + box.width * 0.6, clientY: box.top + box.height * 0.4, bubbles: true };
    for (const kind of ["pointerenter", "pointermove", "pointerleave"]) one.dispatchEvent(new PointerEvent(kind, at));
  }
  dispatchEvent(new Event("scroll"));
}
for (const search of document.querySelectorAll("[type=search]")) {
  [...document.querySelectorAll("button")].find((one) => one.textContent === "show all").click();
}
document.title = "all used";
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("records", [made_up_records(), made_up_records()[:1], made_up_records()[-1:]])
@pytest.mark.parametrize("config", [CONFIG, None])
def test_a_browser_opens_it_without_a_complaint(
    tmp_path: Path, records: list[dict[str, Any]], config: dict[str, Any] | None
) -> None:
    run_dir = save_run(tmp_path / "run", records, config)
    page = page_of(run_dir)
    assert page.count("</body>") == 1
    (run_dir / "report.html").write_text(page.replace("</body>", USE_IT_ALL))
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'browser'} --enable-logging=stderr "
        "--virtual-time-budget=2000 --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), (run_dir / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    dom = done.stdout
    assert "<title>all used" in dom and "<footer" in dom  # the last thing that is put in
    shown = sorted({record["sae_id"] for record in records})
    if config is not None:
        assert "<h1>&lt;/script&gt;&lt;img" in dom and "<img" not in dom
    if len(shown) == 1:
        return
    # The table's cells name the exact values; those that are not finite have no place on an axis.
    last = {record["sae_id"]: record for record in records if "metrics/l0" in record}
    for record in last.values():
        assert f'title="{record["metrics/l0"]}"' in dom
