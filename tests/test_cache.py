"""Activations on disk: a run from them is the run of the model that gave them; a wrong cache is told in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import runs
from harness import run_ranks
from scale_sae import cache_activations, checkpoint, consolidate, train
from scale_sae.activations import cache
from scale_sae.activations.cache import Cache, shard_path
from scale_sae.activations.source import ActivationSource
from scale_sae.activations.tokens import TextChunks, open_chunks
from scale_sae.activations.transport import Start
from scale_sae.config import RunConfig, load
from scale_sae.errors import UserError
from scale_sae.jobs import resolve

STEPS, BATCH = 12, 128
WIDTHS = {"model.layers.0": 256, "model.layers.1": 256}


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """Three chunks of 8 x 32 rows of two hookpoints in float64 (1 MiB each) are a shard: a tiny cache has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_BYTES", 3 * 2**20)
        yield


def config_in(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    short = {"training_tokens": STEPS * BATCH, "train_batch_size_tokens": BATCH, "lr": 1e-3}
    own: dict[str, Any] = {"train": short, "checkpoint": {"every_steps": 6, "keep": 5}}
    own["saes"] = [{"d_sae": 64, "k": 4, "dtype": "float64"}]
    return runs.write_config(folder, runs.tiny_config(folder, **own | changes))


def fill(config: Path, out: Path, world: int = 1, tp: int = 1) -> None:
    """Caches on ``world`` forked ranks."""
    run = load(config, {"topology.lm": {"tp": tp}})
    run_ranks(world, lambda rank, world: cache_activations.cache(run, out), init=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a run, ``config.yaml``, and what two copies of the model cached for it, ``cache``."""
    folder = tmp_path_factory.mktemp("cached")
    fill(config_in(folder), folder / "cache", world=2)
    return folder


def open_home(home: Path) -> tuple[Cache, RunConfig]:
    return Cache.open(home / "cache"), load(home / "config.yaml")


def from_cache(home: Path, tmp_path: Path, world: int, topology: dict[str, Any], **overrides: Any) -> list[Any]:
    changes = {"topology": {"lm": {"cache": str(home / "cache")}, **topology}, "output_dir": str(tmp_path / "run")}
    return runs.forked_run(home / "config.yaml", world, changes | overrides, record=True)


# ---- the promise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("live", "live_world", "cached", "world"),
    [
        ({"lm": "colocated", "sae": {"tp": 2}}, 2, {"sae": {"tp": 2}}, 2),
        pytest.param({"lm": "colocated", "sae": {"groups": 2}}, 2, {"sae": {"groups": 2}}, 2, marks=pytest.mark.slow),
        pytest.param({"lm": {"dp": 2}, "sae": {"tp": 2}}, 4, {"sae": {"tp": 2}}, 2, marks=pytest.mark.slow),
    ],
    ids=["tp=2", "groups=2", "LM dp=2, SAE tp=2"],
)
def test_a_run_from_the_cache_is_the_live_run_bit_for_bit(
    home: Path, tmp_path: Path, live: Any, live_world: int, cached: Any, world: int
) -> None:
    path = {"output_dir": str(tmp_path / "live")}
    rows = runs.forked_run(home / "config.yaml", live_world, {"topology": live, **path}, record=True)
    ours = from_cache(home, tmp_path, world, cached)
    for name in WIDTHS:
        assert torch.equal(runs.batches_of(ours, name), runs.batches_of(rows, name))
    a, b = runs.sae_state(tmp_path / "run"), runs.sae_state(tmp_path / "live")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    for name in ("run", "live"):
        consolidate.consolidate(tmp_path / name, tmp_path / f"release_{name}")
    compared = 0
    for file in (tmp_path / "release_live").rglob("*"):
        if file.suffix == ".safetensors" or file.name == "cfg.json":
            twin = tmp_path / "release_run" / file.relative_to(tmp_path / "release_live")
            assert twin.read_bytes() == file.read_bytes()
            compared += 1
    assert compared == 2 * 3
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["lm_forward_tokens"], summary["step"]) == (0, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "world"),
    [
        ({"sae": {"tp": 4}}, 4),
        ({"sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"}, 4),
        ({"sae": {"groups": 2, "tp": 2}}, 4),
    ],
    ids=["tp=4", "dp=2 tp=2", "groups=2 tp=2"],
)
def test_any_topology_reads_the_same_batches(home: Path, tmp_path: Path, topology: Any, world: int) -> None:
    rows = from_cache(home, tmp_path, world, topology)
    runs.forked_run(home / "config.yaml", 1, {"output_dir": str(tmp_path / "live")}, record=True)
    for name in WIDTHS:
        assert runs.batches_of(rows, name).shape == (STEPS, BATCH, 256)
    # As between live topologies: float64, sums in another order.
    assert runs.largest_difference(runs.sae_state(tmp_path / "run"), runs.sae_state(tmp_path / "live")) <= 1e-9


def test_a_run_goes_on_from_the_cache_and_back(home: Path, tmp_path: Path) -> None:
    """A live run's checkpoint is continued from the cache, and a cached run's by the model: the same SAEs, bitwise."""
    whole = {"output_dir": str(tmp_path / "live")}
    runs.forked_run(home / "config.yaml", 1, whole)
    middle = tmp_path / "live/checkpoints/step_00000006"
    from_cache(home, tmp_path, 1, {}, resume=str(middle))
    expected = runs.sae_state(tmp_path / "live")
    found = runs.sae_state(tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shutil.rmtree(tmp_path / "run")
    from_cache(home, tmp_path, 1, {})
    back = {"output_dir": str(tmp_path / "back"), "resume": str(tmp_path / "run/checkpoints/step_00000006")}
    runs.forked_run(home / "config.yaml", 1, back)
    found = runs.sae_state(tmp_path / "back")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    cursors = [
        checkpoint.read_meta(tmp_path / name / "checkpoints/step_00000006")["stream"] for name in ("run", "live")
    ]
    assert cursors[0] == cursors[1]


def test_no_model_is_loaded(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ActivationSource, "__init__", refuse)
    from_cache(home, tmp_path, 1, {}, **{"train.training_tokens": 2 * BATCH})


# ---- what the command writes -----------------------------------------------------------------------------------------


def test_the_shards_hold_the_rows_of_the_model(home: Path) -> None:
    """Against the model itself, chunk by chunk: every kept row once, in order, with the cursors of the text."""
    stored, config = open_home(home)
    source = ActivationSource(config.model, WIDTHS)
    shards = [load_file(shard_path(stored.folder, number)) for number in range(len(stored.shards))]
    assert len(shards) > 2 and all(shard.chunks == 3 for shard in stored.shards[:-1])
    counts, cursors = torch.cat([shard["counts"] for shard in shards]).tolist(), []
    for shard in shards:
        cursors += json.loads(bytes(shard["cursors"].tolist()))
    rows = {name: torch.cat([shard[f"rows/{name}"] for shard in shards]) for name in WIDTHS}
    first = 0
    for chunk, count, cursor in zip(open_chunks(config.data, config.model), counts, cursors, strict=False):
        assert count == int(chunk.keep.sum()) and cursor == chunk.cursor
        captured = source.capture(chunk.tokens)
        for name in WIDTHS:
            assert torch.equal(rows[name][first : first + count], captured[name][chunk.keep])
        first += count
    # The chunk in which the last row that the run needs lies is the last.
    assert first == stored.rows == len(rows["model.layers.0"]) and first - counts[-1] < STEPS * BATCH <= first


def test_it_goes_on_on_another_number_of_ranks(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are whole are kept, those that are lost or cut short are written again, byte for byte the same.

    The text of those that are kept is not read.
    """
    original = TextChunks._chunk

    def note(*arguments: Any) -> Any:
        with (tmp_path / "read").open("a") as file:
            file.write(".")
        return original(*arguments)

    monkeypatch.setattr(TextChunks, "_chunk", note)
    shutil.copytree(home / "cache", tmp_path / "cache")
    lost, kept, cut = (shard_path(tmp_path / "cache", number) for number in (0, 1, 2))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    fill(home / "config.yaml", tmp_path / "cache", world=3)
    assert kept.stat().st_mtime_ns == before
    for path in sorted((home / "cache").glob("*.*")):
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "cache").glob("shard_*.json"))
    shards = Cache.open(home / "cache").shards
    assert len(shards) == 3
    assert len((tmp_path / "read").read_text()) == 3 * (shards[0].chunks + shards[2].chunks)


def test_more_rows_are_added(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "cache", tmp_path / "cache")
    before = shard_path(tmp_path / "cache", 0).stat().st_mtime_ns
    longer = config_in(tmp_path / "longer", train={"training_tokens": 20 * BATCH, "train_batch_size_tokens": BATCH})
    longer.write_text(longer.read_text().replace(str(tmp_path / "longer/texts.jsonl"), str(home / "texts.jsonl")))
    fill(longer, tmp_path / "cache")
    fill(longer, tmp_path / "anew", world=2)
    for path in sorted((tmp_path / "anew").glob("*.*")):
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()
    assert shard_path(tmp_path / "cache", 0).stat().st_mtime_ns == before
    # And a shorter run finds all that it needs.
    fill(home / "config.yaml", tmp_path / "cache")
    assert Cache.open(tmp_path / "cache").rows >= 20 * BATCH


@pytest.mark.slow
def test_tensor_parallel_copies_in_bfloat16(home: Path, tmp_path: Path) -> None:
    """Rows are kept in the model's dtype; across tp ranks they differ by rounding, at 8 bits of fraction."""
    config = config_in(tmp_path, model={"name": "embedded", "dtype": "bfloat16"}, data=load_data(home))
    fill(config, tmp_path / "one")
    fill(config, tmp_path / "two", world=2, tp=2)
    for number in range(len(Cache.open(tmp_path / "one").shards)):
        one, two = (load_file(shard_path(tmp_path / name, number)) for name in ("one", "two"))
        assert torch.equal(one["counts"], two["counts"]) and torch.equal(one["cursors"], two["cursors"])
        for name in WIDTHS:
            a, b = one[f"rows/{name}"], two[f"rows/{name}"]
            assert a.dtype == torch.bfloat16
            # Two layers, each adding a handful of roundings of 2^-9 of the largest values to the residual stream.
            assert float((a.double() - b.double()).abs().max()) <= 2**-5 * float(a.double().abs().max())


def load_data(home: Path) -> dict[str, Any]:
    return {"dataset": str(home / "texts.jsonl"), "context_size": 32, "chunk_contexts": 8, "eval_fraction": 0.1}


def test_the_text_ends(home: Path, tmp_path: Path) -> None:
    """All rows are kept and the command says how many; a second one says so at once; training on them works."""
    runs.write_texts(tmp_path / "short.jsonl", files=1)
    config = config_in(tmp_path, data=load_data(home) | {"dataset": str(tmp_path / "short.jsonl"), "eval_fraction": 0})
    run = load(config, {"train.training_tokens": 10**6})
    rows = sum(int(chunk.keep.sum()) for chunk in open_chunks(run.data, run.model))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"data\.dataset: .* gave {rows} rows, .* needs 1000000; all are in"):
            cache_activations.cache(run, tmp_path / "cache")
    with pytest.raises(UserError, match=rf"its text has ended: set train\.training_tokens to at most {rows}"):
        Cache.open(tmp_path / "cache").needed(Start(0, 0), 10**6)
    overrides = {"topology.lm": {"cache": str(tmp_path / "cache")}, "train.training_tokens": rows}
    assert train.run(str(config), (), overrides) == 0


# ---- what may be wrong -----------------------------------------------------------------------------------------------

OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"model.dtype": "float32"}, r"model\.dtype: 'float64', but this run has 'float32'"),
    "auto_class": ({"model.auto_class": "AutoModel", "hookpoints": ["layers.0"]}, r"model\.auto_class: .*'AutoModel'"),
    "context size": ({"data.context_size": 16}, r"data\.context_size: 32, but this run has 16"),
    "chunks": ({"data.chunk_contexts": 4}, r"data\.chunk_contexts: 8, but this run has 4"),
    "held out": ({"data.eval_fraction": 0.2}, r"data\.eval_fraction: 0\.1, but this run has 0\.2"),
    "hookpoint": (
        {"hookpoints": ["model.layers.0", "model.layers.0.mlp"]},
        r"no activations of hookpoint model\.layers\.0\.mlp \(width 256\), but of model\.layers\.0, model\.layers\.1",
    ),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_cache_of_another_run(home: Path, name: str) -> None:
    stored, _ = open_home(home)
    overrides, message = OTHER_RUNS[name]
    other = load(home / "config.yaml", overrides)
    with pytest.raises(UserError, match=message) as error:
        stored.check(other, resolve(other)[0])
    assert str(error.value).startswith("topology.lm.cache: ") and "\n" not in str(error.value)


def test_a_model_whose_own_config_has_changed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, config = open_home(home)
    stored.check(config, WIDTHS)
    monkeypatch.setattr(cache.build_architecture(config.model).config, "rms_norm_eps", 0.5)
    with pytest.raises(UserError, match=r"was made with model\.config: '\w+', but this run has '\w+'"):
        stored.check(config, WIDTHS)


def drop_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def cut_shard(folder: Path) -> None:
    with shard_path(folder, 1).open("r+b") as file:
        file.truncate(1000)


def flip_bit(folder: Path) -> None:
    data = bytearray(shard_path(folder, 1).read_bytes())
    data[-1] ^= 1
    shard_path(folder, 1).write_bytes(data)


def drop_shard(folder: Path) -> None:
    shard_path(folder, 2).unlink()


def spoil_index(folder: Path) -> None:
    (folder / "index.json").write_text("{")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unfinished": (drop_index, r"is not finished \(0 shards so far\); the command that began it goes on"),
    "truncated": (cut_shard, r"shard_00001\.safetensors has 1000 bytes instead of \d+; remove the file and run"),
    "damaged": (flip_bit, r"shard_00001\.safetensors is damaged .*; remove the file and run the same"),
    "missing": (drop_shard, r"shard_00002\.safetensors is missing; remove the file and run the same"),
    "index": (spoil_index, r"index\.json cannot be read .*; cache anew"),
    "no cache": (shutil.rmtree, r"holds no cached activations; write them with scale_sae\.cache_activations"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_cache(home: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 1, before the run's folder holds anything."""
    shutil.copytree(home / "cache", tmp_path / "cache")
    damage, message = DAMAGE[name]
    damage(tmp_path / "cache")
    overrides = {"topology.lm": {"cache": str(tmp_path / "cache")}, "output_dir": str(tmp_path / "run")}
    assert train.run(str(home / "config.yaml"), (), overrides) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and re.search(r"error: topology\.lm\.cache: .*" + message, lines[0])
    assert not (tmp_path / "run/config.yaml").exists()
    torch.distributed.destroy_process_group()


def test_json_that_says_something_else(home: Path, tmp_path: Path) -> None:
    """Files that can be read and hold the wrong things."""
    index, about = (json.loads((home / "cache" / name).read_text()) for name in ("index.json", "contents.json"))
    first = index["shards"][0]
    wrong: list[tuple[str, Any, str]] = [
        ("index.json", {"rows": 1}, r"index\.json is damaged at text_ended"),
        ("index.json", {"text_ended": False}, r"index\.json is damaged at shards"),
        ("index.json", index | {"shards": [{"chunks": 1}]}, r"index\.json is damaged \(no entry of a shard: {'chunks'"),
        ("index.json", index | {"shards": [first | {"rows": "1"}]}, r"index\.json is damaged \(no entry"),
        ("index.json", index | {"shards": [3]}, r"index\.json is damaged \(no entry of a shard: 3\)"),
        ("contents.json", {"format": 2}, r"has format 2, this program reads 1"),
        ("contents.json", about | {"hookpoints": []}, r"contents\.json is damaged at hookpoints"),
    ]
    for name, value, message in wrong:
        for file in ("index.json", "contents.json"):
            shutil.copy(home / "cache" / file, tmp_path / file)
        (tmp_path / name).write_text(json.dumps(value))
        with pytest.raises(UserError, match=message + ".*cache anew into another folder"):
            Cache.open(tmp_path)


def test_too_few_rows(home: Path) -> None:
    stored, _ = open_home(home)
    assert stored.needed(Start(0, 0), stored.rows) == range(len(stored.shards))
    assert stored.needed(Start(0, 0), 100) == range(1)
    with pytest.raises(
        UserError, match=rf"gives this run {stored.rows} rows .*needs {stored.rows + 1}; cache more into"
    ):
        stored.needed(Start(0, 0), stored.rows + 1)
    # A run that left 50 rows behind with its buffer needs as many more (checkpoint.buffer: refill).
    counts = cache.read_counts(shard_path(stored.folder, 1))
    place = Start(4, stored.shards[1].first_row + counts[0] - 50)
    assert stored.needed(place, stored.rows - 50) == range(1, len(stored.shards))
    with pytest.raises(UserError, match=rf"gives this run {stored.rows - 50} rows \(it holds {stored.rows}\)"):
        stored.needed(place, stored.rows)


def test_keys_that_contradict_each_other(home: Path) -> None:
    for key, value in (("tp", 2), ("dp", 2), ("parallel", "device_map")):
        with pytest.raises(UserError, match=rf"topology\.lm\.{key}: .* with topology\.lm\.cache there are none"):
            load(home / "config.yaml", {"topology.lm": {"cache": "x", key: value}})


def test_the_command_refuses(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(home / "config.yaml")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(UserError, match=r"--out: .*/full holds thesis\.tex and no cache; choose another folder"):
        cache_activations.cache(run, tmp_path / "full")
    other = load(home / "config.yaml", {"data.context_size": 16})
    with pytest.raises(UserError, match=r"another config \(data\.context_size: 32 != 16.*\); choose another folder"):
        cache_activations.cache(other, home / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"needs 0\.0 GiB more for 1536 rows of 4096 bytes, .* free; make room"):
        cache_activations.cache(run, tmp_path / "new")


def test_ranks_that_do_not_divide_into_copies(home: Path, tmp_path: Path) -> None:
    run = load(home / "config.yaml", {"topology.lm": {"tp": 2}})

    def worker(rank: int, world: int) -> str:
        with pytest.raises(UserError) as error:
            cache_activations.cache(run, tmp_path / "cache")
        return str(error.value)

    for said in run_ranks(3, worker, init=False):
        assert said.startswith("topology.lm.tp: 2 ranks for each copy of the model, but 3 were started")


def test_a_stop_keeps_what_is_whole(home: Path, tmp_path: Path) -> None:
    """SIGTERM to one of two copies stops both between chunks; the same call then writes what is missing."""
    run = load(home / "config.yaml")

    def worker(rank: int, world: int) -> tuple[bool, bool]:
        original, calls = cache_activations.kept_rows, []

        def kept_rows(*arguments: Any) -> dict[str, torch.Tensor]:
            calls.append(1)
            if rank == 0 and len(calls) == 2:  # of three chunks of its first shard
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_activations, "kept_rows", kept_rows)
            first = cache_activations.cache(run, tmp_path / "cache")
        assert not shard_path(tmp_path / "cache", 0).exists()
        return first, cache_activations.cache(run, tmp_path / "cache")

    results = run_ranks(2, worker, init=False)
    assert results == [(False, True)] * 2
    for path in sorted((home / "cache").glob("*.*")):
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_commands_under_a_launcher(tmp_path: Path) -> None:
    """accelerate launch of both commands, as the documentation has them."""
    config, out = config_in(tmp_path), tmp_path / "cache"
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(runs.ROOT / "launch/cpu.yaml")]
    start += ["--num_processes", "2", "-m"]
    for rest in (
        ["scale_sae.cache_activations", "--config", str(config), "--out", str(out)],
        ["scale_sae.train", "--config", str(config), f"--topology={{lm: {{cache: {out}}}, sae: {{tp: 2}}}}"],
    ):
        done = subprocess.run(
            [*start, *rest], env=runs.environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["step"] == STEPS
