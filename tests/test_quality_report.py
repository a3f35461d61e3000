"""`benchmarks/quality_report.py`: laws found in figures that they made, what is compared with what, what is kept."""

import importlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import runs

WHERE = {"date": "2026-01-01", "commit": "abc", "python": "3", "processors": 2, "gpu": None, "versions": {"torch": "2"}}

STREAM = {"buffer": {"tokens": 1}}


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(runs.ROOT / "benchmarks"))
    return importlib.import_module("quality_report")


def run_of(reports: Any, **changes: Any) -> Any:
    fields = {"model": "m", "hookpoint": "h", "architecture": "topk", "d_sae": 64, "k": 8, "tokens": 100, "batch": 10}
    return reports.Run(**{**fields, "subject": "ours", **changes})


def result(reports: Any, fvu: float, silent: float, **changes: Any) -> Any:
    run = run_of(reports, **changes)
    figures = {"fvu": fvu, "l0": 8.0, "silent": silent, "dense": 0.0, "ce_score": 1.0, "seconds": 1.0}
    return reports.Result(run, run.lr or 1e-3, figures, WHERE)


def test_power_laws(reports: Any) -> None:
    def sizes(floor: float) -> list[Any]:
        return [reports.Size(2**i, floor + 3 * (2**i) ** -0.7, 8.0, 0.0) for i in range(10, 16)]

    law = reports.power_law(sizes(0))
    assert (law.exponent, law.factor, law.r2) == pytest.approx((-0.7, 3, 1))
    assert law.at(512) == pytest.approx(3 * 512**-0.7)
    bent = reports.with_floor(sizes(0.02))
    # The floor is looked for in steps of a thousandth of the least FVU.
    assert bent.floor == pytest.approx(0.02, abs=2e-5) and bent.exponent == pytest.approx(-0.7, rel=0.01)
    assert reports.with_floor(sizes(0.02)[:4]) is None


def test_rows_have_the_default_and_the_rate_that_is_best_at_seed_0(reports: Any) -> None:
    peer: dict[str, Any] = {"subject": "sae_lens"}
    results = [
        result(reports, 0.30, 0.1, **peer),
        result(reports, 0.20, 0.1, **peer, lr=2e-3),
        result(reports, 0.22, 0.3, **peer, lr=2e-3, seed=1),
        result(reports, 0.25, 0.1, **peer, lr=4e-3),
        result(reports, 0.01, 0.1, **peer, lr=4e-3, seed=1),  # not what the rate is chosen by
        result(reports, math.nan, 1.0, **peer, lr=8e-3),
    ]
    best, default = reports.rows_of(results)
    assert (best.lr, best.kind, best.mean("fvu"), best.mean("silent")) == pytest.approx((2e-3, "tuned", 0.21, 0.2))
    assert best.spread("fvu") == pytest.approx(0.02 / math.sqrt(2))  # of a sample of two
    assert (default.kind, default.mean("fvu")) == ("default", 0.30) and math.isnan(default.spread("fvu"))
    assert [row.kind for row in reports.rows_of(results[:1])] == ["default"]
    assert [row.kind for row in reports.rows_of(results[1:3])] == ["the one tried"]


@pytest.mark.parametrize(("fvu", "silent", "holds"), [(0.2, 0.1, True), (0.21, 0.1, False), (0.2, 0.11, False)])
def test_ours_is_compared_with_the_best_peer(reports: Any, fvu: float, silent: float, holds: bool) -> None:
    results = [result(reports, fvu, silent)]
    for subject, best in (("sae_lens", 0.3), ("dictionary_learning", 0.2)):
        results += [result(reports, best * times, 0.2, subject=subject, lr=rate) for times, rate in ((1, 1), (2, 2))]
    text = reports.comparison(reports.setting_of(results[0].run), reports.rows_of(results))
    assert text.startswith("Ours / dictionary_learning, the best peer: ")
    assert ("**holds**" in text) == holds and ("**does not hold**" in text) != holds


def test_results_outlive_the_work_folder(reports: Any, tmp_path: Path) -> None:
    """What is made anew takes the place of what was kept; what is no longer in the plan stays."""
    one, two = (run_of(reports, seed=seed) for seed in (0, 1))
    kept = tmp_path / "results" / "quality.jsonl"

    def made(run: Any, fvu: float) -> None:
        path = tmp_path / "work" / run.id / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        tree = {
            "run": asdict(run),
            "stream": STREAM,
            "lr": 1e-3,
            "seconds": 2.0,
            "figures": {"fvu": fvu},
            "where": WHERE,
        }
        path.write_text(json.dumps(tree))

    def gathered(folder: str, plan: list[Any], stream: Any = STREAM) -> list[float]:
        return [found.figures["fvu"] for found in reports.gathered(tmp_path / folder, kept, plan, stream)]

    made(one, 0.1)
    made(two, 0.2)
    assert gathered("work", [one, two]) == [0.1, 0.2]
    assert gathered("nothing", [two, one]) == [0.2, 0.1]
    made(one, 0.3)
    assert gathered("work", [one]) == [0.3]
    assert gathered("nothing", [one, two]) == [0.3, 0.2]
    for folder in ("work", "nothing"):
        with pytest.raises(SystemExit, match="is of other data or another buffer"):
            gathered(folder, [one], {"buffer": {"tokens": 2}})
