"""The command `scale_sae.plan`: what it prints adds up, what it refuses it names, what it offers a run would take."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
from scale_sae import plan

Planned = Callable[..., tuple[int, str, str]]


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Planned:
    """Plans the tiny run with overrides and options; (exit code, output, errors)."""
    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path))

    def call(**options: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            plan.main(str(path), **{"device": "h100", **options})
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return call


UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


def step_ms(output: str) -> float:
    found = re.search(r"^step: ([0-9.]+) ms", output, re.MULTILINE)
    assert found
    return float(found[1])


def test_memory_adds_up(planned: Planned) -> None:
    code, output, _ = planned(**{"topology.lm": "{tp: 1}", "topology.sae.tp": 2})
    assert code == 0
    for role in ("SAE ranks 0-1", "LM rank 2"):
        head, _, rest = output.partition(f"\n{role}: ")[2].partition(" each\n")
        rows = [line.split("|")[2].strip() for line in rest.split("\n\n")[0].splitlines()[2:]]
        assert len(rows) > 3
        # Each is rounded to a tenth of its unit.
        assert in_bytes(head) == pytest.approx(sum(map(in_bytes, rows)), rel=0.02)


def test_cost_follows_from_time(planned: Planned) -> None:
    _, output, _ = planned(price=2.5, **{"topology.sae.tp": 2, "train.training_tokens": 10**12})
    line = next(line for line in output.splitlines() if line.startswith("run: "))
    hours, gpu_hours, dollars = (
        float(re.search(pattern, line)[1].replace(",", ""))  # type: ignore[index]
        for pattern in (r" in ([0-9.,]+) h ", r"([0-9.,]+) GPU-hours", r"([0-9,]+) dollars")
    )
    assert gpu_hours == pytest.approx(2 * hours, rel=1e-3)
    assert dollars == pytest.approx(2.5 * gpu_hours, rel=1e-3)
    assert hours == pytest.approx(step_ms(output) / 3.6e6 * 1e12 / 128, rel=0.1)  # the step is rounded to 0.1 ms


def test_what_does_not_fit_fails_and_names_a_key_that_helps(planned: Planned) -> None:
    wide = {"saes.0.d_sae": 2**20, "saes.0.k": 8}
    tight = {"hardware.memory_gib": 20, **wide}
    code, output, _ = planned(**tight)
    assert code == 1
    verdict = next(line for line in output.splitlines() if "DOES NOT FIT" in line)
    assert "saes.0.d_sae" in verdict or "topology.sae.tp" in verdict
    code, output, _ = planned(**tight, **{"topology.sae.tp": 8})
    assert code == 0 and "It fits" in output


def test_what_the_search_prints_is_a_plan(planned: Planned) -> None:
    code, output, _ = planned(search=True, gpus=4)
    assert code == 0
    last = output.strip().splitlines()[-1]
    options = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(last) if word.startswith("--"))
    assert set(options) == {"topology.lm", "topology.sae", "topology.engine"}
    code, again, _ = planned(**options)
    assert code == 0
    first = next(line for line in output.splitlines() if line.startswith("| ") and "SAE groups" in line)
    assert f"{step_ms(again):.1f}" == first.split("|")[3].strip()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such device": ({"device": "h10"}, "--device: 'h10'"),
    "no device": ({"device": None}, "--device: name what the ranks run on"),
    "a processor": ({"device": "cpu"}, "--calibrate"),
    "no such file": ({"device": "machine.json"}, "machine.json"),
    "no such figure": ({"hardware.memory": 3}, "hardware.memory"),
    "a figure that is none": ({"hardware.memory_gib": "much"}, "hardware.memory_gib: 'much'"),
    "no such key": ({"train.learning_rate": 3}, "train.learning_rate"),
    "gpus": ({"gpus": 0}, "--gpus: 0"),
    "gpus per node": ({"gpus_per_node": "many"}, "--gpus_per_node: 'many'"),
    "price": ({"price": "cheap"}, "--price: 'cheap'"),
    "too few gpus": ({"search": True, "gpus": 1, "saes.0.d_sae": 2**24, "saes.0.k": 8}, "--gpus: 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_one_line(name: str, planned: Planned) -> None:
    options, expected = WRONG[name]
    code, _, errors = planned(**options)
    assert code == 1
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert expected in errors
