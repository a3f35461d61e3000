"""What a run writes about itself: how often latents fire, where the time goes, wandb, progress bars."""

import json
import multiprocessing
import os
import pty
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import AT_IN, BATCH, Rows, config_of, made_up_rows, train_here

import runs
from harness import run_ranks
from scale_sae import checkpoint, metrics, progress
from scale_sae.config import LoggingConfig
from scale_sae.errors import UserError
from scale_sae.metrics import (
    DENSITY_BINS,
    DENSITY_HISTOGRAM,
    MetricsWriter,
    Stopwatch,
    density_histogram,
    feature_density,
)
from scale_sae.snapshots import Snapshots

HISTOGRAM = f"plots/{DENSITY_HISTOGRAM}"
WINDOW, STEPS = 12, 30
# Steps that are logged: the first, every tenth, the ends of the windows and the last.
LOGGED = [1, 10, 12, 20, 24, 30]
DENSITIES = ["metrics/mean_log10_feature_sparsity", "sparsity/below_1e-5", "sparsity/below_1e-6", HISTOGRAM]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- how often latents fire ------------------------------------------------------------------------------------------


def by_formula(fired: np.ndarray, tokens: int) -> dict[str, Any]:
    """SAELens's formulas, in numpy; the bins as the documentation describes them."""
    share = fired / tokens
    log = np.log10(share + 1e-10)
    # The one place where a latent is above the last edge: it fires on every token, and 1e-10 comes on top.
    counts, _ = np.histogram(np.minimum(log, 0), bins=np.arange(-10, 0.125, 0.25))
    return {
        DENSITIES[0]: log.mean(),
        DENSITIES[1]: int((share < 1e-5).sum()),
        DENSITIES[2]: int((share < 1e-6).sum()),
        HISTOGRAM: counts.tolist(),
    }


def test_feature_density_of_given_counts() -> None:
    tokens = 10_000_000
    draw = np.random.default_rng(0)
    some = (10 ** draw.uniform(-7, 0, 500) * tokens).astype(np.int64)
    fired = np.concatenate([some, [0, 0, 0, 1, 5, 50, 10**6, tokens]])
    found = feature_density(torch.tensor(fired), torch.tensor(tokens))
    expected = by_formula(fired, tokens)
    assert found[HISTOGRAM].tolist() == expected[HISTOGRAM]
    assert found[HISTOGRAM][0] >= 3 and found[HISTOGRAM].sum() == len(fired)
    for name in DENSITIES[1:3]:
        assert int(found[name]) == expected[name]
    # Both in float64; only the order of the sum differs.
    assert float(found[DENSITIES[0]]) == pytest.approx(expected[DENSITIES[0]], rel=1e-13)


def test_a_latent_that_fires_on_every_token_is_in_the_last_bin_and_one_that_never_does_in_the_first() -> None:
    at_edge = 0.1 - 1e-10
    assert np.log10(at_edge + 1e-10) == -1.0
    counts = density_histogram(torch.tensor([0.0, 1.0, 1.0, at_edge, at_edge - 1e-12], dtype=torch.float64))
    assert len(counts) == len(DENSITY_BINS) - 1 == 40
    # A bin holds its lower edge.
    edge = DENSITY_BINS.index(-1.0)
    assert {i: int(n) for i, n in enumerate(counts) if n} == {0: 1, edge - 1: 1, edge: 1, 39: 2}


def test_densities_are_logged_at_the_end_of_windows_alike_on_every_topology(tmp_path: Path) -> None:
    topologies: dict[str, tuple[dict[str, Any], int]] = {
        "one": ({"lm": "colocated", "sae": {"tp": 1}}, 1),
        "tp": ({"lm": "colocated", "sae": {"tp": 2}}, 2),
        "dp": ({"lm": "colocated", "sae": {"dp": 2}, "engine": "fsdp2"}, 2),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (topology, world) in topologies.items():
        folder = tmp_path / name
        folder.mkdir()
        config = runs.tiny_config(folder, topology=topology)
        config["train"] |= {"training_tokens": STEPS * 128, "feature_sampling_window": WINDOW}
        runs.forked_run(runs.write_config(folder, config), world)
        found[name] = read(folder / "run/metrics.jsonl")
    records = found["one"]
    assert [record["step"] for record in records[::4]] == LOGGED  # four SAEs
    for record in records:
        ends = record["step"] in (WINDOW, 2 * WINDOW, STEPS)
        assert [name in record for name in DENSITIES] == [ends] * 4
    for name in ("tp", "dp"):
        for ours, theirs in zip(records, found[name], strict=True):
            # Counts of the same float64 run; the mean is computed on all of the counts by every shard.
            assert [ours.get(key) for key in DENSITIES] == [theirs.get(key) for key in DENSITIES]
    # What a checkpoint holds of the last window (6 steps of it) gives the same figures.
    newest = checkpoint.complete(tmp_path / "one/run")[0]
    for record in records[-4:]:
        folder = checkpoint.sae_folder(newest, record["sae_id"])
        fired = checkpoint.read_rows(folder, "fired_count", 0, checkpoint.total_rows(folder)).numpy()
        scalar = {"window_tokens": torch.zeros((), dtype=torch.int64)}
        checkpoint.load_replicated(folder, scalar)
        assert int(scalar["window_tokens"]) <= (STEPS - 2 * WINDOW) * 128
        expected = by_formula(fired, int(scalar["window_tokens"]))
        assert record[HISTOGRAM] == expected[HISTOGRAM] and sum(record[HISTOGRAM]) == len(fired)
        assert record[DENSITIES[0]] == pytest.approx(expected[DENSITIES[0]], rel=1e-13)
        assert [record[key] for key in DENSITIES[1:3]] == [expected[key] for key in DENSITIES[1:3]]


# ---- where the time goes ---------------------------------------------------------------------------------------------


def test_every_moment_counts_to_one_part() -> None:
    watch = Stopwatch()
    before = time.monotonic()
    watch.lap()
    began = time.monotonic()
    with watch.during("training"):
        time.sleep(0.03)
        with watch.during("logging"):
            time.sleep(0.05)
        time.sleep(0.01)
    ended = time.monotonic()
    seconds = watch.lap()
    after = time.monotonic()
    assert set(seconds) == {f"perf/seconds_{part}" for part in Stopwatch.PARTS}
    # A sleep is never shorter than asked for.
    assert seconds["perf/seconds_training"] >= 0.04 and seconds["perf/seconds_logging"] >= 0.05
    # The laps' own readings of the clock lie between ours; 1e-9 is for the rounding of the sums.
    assert ended - began - 1e-9 <= sum(seconds.values()) <= after - before + 1e-9
    again = sum(watch.lap().values())
    assert again <= time.monotonic() - ended + 1e-9  # begun anew


def test_the_times_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow chunks and slow checkpoints are found under their names, and nothing is counted twice."""
    n, pause = 8 * BATCH, 0.02
    run = config_of(tmp_path, [AT_IN], n)
    next_chunk, save = Rows.next_chunk, Snapshots.save
    calls = []

    def slow_chunk(self: Rows) -> Any:
        time.sleep(pause)
        calls.append("chunk")
        return next_chunk(self)

    def slow_save(self: Snapshots, *position: Any) -> None:
        time.sleep(3 * pause)
        save(self, *position)

    monkeypatch.setattr(Rows, "next_chunk", slow_chunk)
    monkeypatch.setattr(Snapshots, "save", slow_save)
    settings = {"checkpoint.every_steps": 4, "logging.log_every_steps": 2}
    run = _changed(run, settings)
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(MetricsWriter, "write", lambda self, step, records: written.extend(records))

    def worker(rank: int, world: int) -> Any:
        began = time.monotonic()
        train_here(run, made_up_rows(n), lambda trainer: None, rank, world, writer=_writer(run, tmp_path))
        return written, calls, time.monotonic() - began

    ((records, chunks, whole),) = run_ranks(1, worker, init=False)
    assert [record["step"] for record in records] == [1, 2, 4, 6, 8]
    sums = {part: sum(record[f"perf/seconds_{part}"] for record in records) for part in Stopwatch.PARTS}
    assert sums["activations"] >= len(chunks) * pause
    # The one after step 4; the last one comes after the last record.
    assert 3 * pause <= sums["checkpoint"] == records[3]["perf/seconds_checkpoint"]
    assert sums["training"] > 0 and sums["evaluation"] == 0
    assert sum(sums.values()) <= whole
    for record in records:
        steps = 2 if record["step"] > 2 else 1
        seconds = sum(record[f"perf/seconds_{part}"] for part in Stopwatch.PARTS)
        # The same sum, in float64.
        assert steps * BATCH / record["perf/tokens_per_second"] == pytest.approx(seconds, rel=1e-12)


def _changed(run: Any, values: dict[str, Any]) -> Any:
    from scale_sae.config import from_dict, to_dict
    from scale_sae.config_parsing import set_dotted

    tree = to_dict(run)
    for key, value in values.items():
        set_dotted(tree, key, value)
    return from_dict(tree)


def _writer(run: Any, folder: Path) -> MetricsWriter:
    return MetricsWriter(folder, run.logging, 8, BATCH, 0, {})


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def worker(rank: int, world: int) -> str:
        with (
            pytest.raises(UserError) as caught,
            MetricsWriter(tmp_path / "run", LoggingConfig(), 1, 1, 0, {}) as writer,
        ):
            assert writer.file is not None
            writer.file.close()
            writer.file = Path("/dev/full").open("a")  # noqa: SIM115 (closed by the writer)
            writer.write(1, [{"step": 1, "sae_id": "a"}])
        return str(caught.value)

    (tmp_path / "run").mkdir()
    (line,) = run_ranks(1, worker, init=False)
    assert line == "output_dir: /dev/full cannot be written: No space left on device; make room"


# ---- wandb -----------------------------------------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[Any]:
    """What an offline run has written for ``wandb sync``: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values_of(record: Any) -> dict[str, str]:
    """What a record of the history holds: names to JSON."""
    return {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def test_wandb_has_the_histograms_the_checkpoints_and_one_run_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    logging = {
        "log_to_wandb": True,
        "wandb_project": "a project",
        "wandb_entity": "a team",
        "run_name": "a name",
        "log_weights_to_wandb": True,
    }
    config = runs.tiny_config(tmp_path, logging=logging, checkpoint={"every_steps": 5, "keep": 1})
    config["train"] |= {"training_tokens": 12 * 128, "feature_sampling_window": 10}
    path = runs.write_config(tmp_path, config)
    runs.forked_run(path, 1)
    runs.forked_run(path, 1, {"train.training_tokens": 20 * 128})
    run_id = (tmp_path / "run/wandb_id").read_text()
    launches = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    logged: list[dict[str, str]] = []
    artifacts, begun = [], []
    for record in (record for launch in launches for record in wandb_records(launch)):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            begun.append((record.run.run_id, record.run.display_name, record.run.entity, record.run.project))
        elif kind == "history":
            logged.append(values_of(record))
        elif kind == "artifact":
            names = {entry.path for entry in record.artifact.manifest.contents}
            artifacts.append((record.artifact.name, [a for a in record.artifact.aliases if a != "latest"], names))
    assert begun == [(run_id, "a name", "a team", "a project")] * 2
    lines = read(tmp_path / "run/metrics.jsonl")
    assert [int(row["_step"]) for row in logged] == [1, 10, 12, 20]
    for line in lines:
        (row,) = [row for row in logged if int(row["_step"]) == line["step"]]
        assert json.loads(row["tokens"]) == line["tokens"]
        for name, value in line.items():
            key = f"{line['sae_id']}/{name}"
            if name == HISTOGRAM:
                assert json.loads(row[f"{key}/values"]) == value
                assert json.loads(row[f"{key}/bins"]) == list(DENSITY_BINS)
            elif name not in ("step", "tokens", "sae_id"):
                assert json.loads(row[key]) == value, name
    # Each checkpoint was given whole, though only the newest stays. That of step 12 is the last of the first launch.
    assert [step for _, (step,), _ in artifacts] == [f"step_{step:08d}" for step in (5, 10, 12, 15, 20)]
    (last,) = checkpoint.complete(tmp_path / "run")
    there = {file.relative_to(last).as_posix() for file in last.rglob("*") if file.is_file()}
    assert artifacts[-1] == (f"{run_id}-checkpoint", [last.name], there)
    assert all(checkpoint.MARKER in names for _, _, names in artifacts)


def test_wandb_that_does_not_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in ~/.netrc
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))

    def worker(rank: int, world: int) -> str:
        with pytest.raises(UserError) as caught:
            MetricsWriter(tmp_path, LoggingConfig(log_to_wandb=True), 1, 1, 0, {})
        return str(caught.value)

    (line,) = run_ranks(1, worker, init=False)
    assert line.startswith("logging.log_to_wandb: true, but wandb does not begin (") and "\n" not in line
    assert "wandb login" in line and "WANDB_MODE=offline" in line


def test_wandb_has_the_logs_of_a_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a run that fails ends at once, by ``os._exit``, as this one does."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(metrics, "_summary", lambda records: {})

    def worker() -> None:
        with (
            pytest.raises(UserError),
            MetricsWriter(tmp_path, LoggingConfig(log_to_wandb=True), 9, 1, 0, {}) as writer,
        ):
            writer.write(7, [{"step": 7, "tokens": 7, "sae_id": "a", "losses/overall_loss": 0.5}])
            raise UserError("train.lr: every SAE has diverged")
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=worker)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = {record.WhichOneof("record_type"): record for record in wandb_records(path)}
    assert values_of(found["history"])["_step"] == "7"
    assert found["exit"].exit.exit_code == 1


# ---- progress bars ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars of this very process start no thread: later tests fork it."""
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)


def test_a_bar_in_a_log_file_writes_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    bar = progress.progress_bar(3, "counting", "SAE", unit_scale=False)
    for _ in range(3):
        bar.update()
    bar.close()
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert all(line.startswith("counting:") for line in lines)
    assert "0/3" in lines[0] and "3/3" in lines[-1] and 2 <= len(lines) <= 6


def test_a_bar_in_a_log_file_is_rare(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress.progress_bar(40, "counting")
    for _ in range(40):
        time.sleep(0.01)
        bar.update()
    bar.close()
    assert len(capsys.readouterr().err.splitlines()) == 2  # the first and the last state


def test_a_bar_on_a_terminal_stays_on_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        bar = progress.progress_bar(3, "counting")
        bar.update(3)
        bar.close()
        terminal.flush()
        shown = ""
        while "\n" not in shown:  # a read gives what is there
            shown += os.read(ours, 65536).decode()
    os.close(ours)
    assert shown.count("\r") > shown.count("\n") == 1 and "counting: 100%" in shown
