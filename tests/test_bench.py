"""What measures: `scale_sae.bench` against sizes written out here, `--profile_steps`, `benchmarks/peers.py`."""

import contextlib
import gzip
import io
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import record_function

import runs
from harness import run_ranks
from scale_sae import bench, profiling, train
from scale_sae.errors import UserError

BATCH, D_IN, D_SAE, K = 128, 256, 512, 8  # d_in is the embedded model's
MIB = 2**20


def config_of(folder: Path, **changes: Any) -> Path:
    saes = [{"name": "small", "d_sae": D_SAE, "k": K}, {"name": "dense", "architecture": "standard", "d_sae": D_SAE}]
    made = runs.tiny_config(
        folder,
        model={"name": "embedded", "dtype": "float32"},
        hookpoints=["model.layers.0"],
        saes=saes,
        train={"training_tokens": 40 * BATCH, "train_batch_size_tokens": BATCH},
        checkpoint={"every_steps": 10},
    )
    return runs.write_config(folder, made | changes)


# ---- memory and messages ---------------------------------------------------------------------------------------------


def test_peak_memory_is_what_tensors_have_at_once() -> None:
    before = torch.zeros(MIB)  # made before, so that it does not count
    with profiling.peak_memory(torch.device("cpu")) as whole:
        first = torch.ones(MIB, dtype=torch.uint8)
        second = torch.ones(4 * MIB, dtype=torch.uint8)
        del second
        third = torch.ones(2 * MIB, dtype=torch.uint8)
    assert whole.bytes == 5 * MIB
    del first, third

    weight = torch.ones(512, 512, requires_grad=True)
    with profiling.peak_memory(torch.device("cpu")) as later:
        held = torch.ones(MIB, dtype=torch.uint8)
        large = torch.ones(8 * MIB, dtype=torch.uint8)
        del large
        later.restart()
        weight.exp().sum().backward()
    # What was made before the restart counts while it is there; and the exponentials, which the backward pass needs
    # until it has made the gradient: 1 MiB each, beside a few numbers of 4 bytes.
    assert 3 * MIB <= later.bytes <= 3 * MIB + 4 * 4
    del held, before


def test_bytes_are_counted_at_the_collectives() -> None:
    def worker(rank: int, world: int) -> tuple[dict[str, int], int]:
        counted, other = dist.new_group([0, 1]), dist.new_group([0, 1])
        x, whole = torch.ones(10), torch.empty(20)
        with bench.counted_bytes({counted.group_name: "tp"}) as found:
            dist.all_reduce(x, group=counted)
            dist.all_gather_into_tensor(whole, x, group=counted)
            dist.all_reduce(x, group=other)
        before = sum(found.values())
        dist.all_reduce(x, group=counted)
        return dict(found), sum(found.values()) - before

    for found, after in run_ranks(2, worker):
        assert found == {"tp": 2 * 40 + 80}
        assert after == 0  # it has left the collectives as they were


# ---- the command -----------------------------------------------------------------------------------------------------


def run_bench(world: int, path: Path | None, *extra: object, **options: Any) -> list[tuple[int, str, str]]:
    """Every rank's (exit code, what it printed, what it said on stderr)."""
    options = {"steps": 2, "json_path": None, "overrides": {}} | options

    def worker(rank: int, world: int) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = bench.run(None if path is None else str(path), extra, **options)
        return code, out.getvalue(), err.getvalue()

    return run_ranks(world, worker, init=False)


def test_two_ranks(tmp_path: Path) -> None:
    path = config_of(tmp_path)
    found = run_bench(2, path, json_path=str(tmp_path / "found.json"), overrides={"topology.sae.tp": 2})
    assert [code for code, _, _ in found] == [0, 0]
    assert found[1][1] == "" and "| whole step |" in found[0][1] and "| model.layers.0/dense |" in found[0][1]
    figures = json.loads((tmp_path / "found.json").read_text())
    step = figures["step"]
    small, dense = figures["saes"].values()
    assert step["floor"].keys() == small["floor"].keys() == {"GEMM", "selection", "Adam"}
    assert dense["floor"].keys() == {"GEMM", "Adam"}  # nothing is chosen
    assert all(one["seconds"] > 0 and min(one["floor"].values()) > 0 for one in (step, small, dense))
    # The choice: every row's K values of both ranks. The reconstruction: all-reduced. And numbers and d_in vectors.
    messages = 2 * BATCH * K * 4 + 2 * BATCH * D_IN * 4
    assert messages <= small["link_bytes"]["tp"] <= messages + 4 * D_IN * 4
    # The batch, whole on both ranks, and what each SAE sends.
    sent = BATCH * D_IN * 4 + small["link_bytes"]["tp"] + dense["link_bytes"]["tp"]
    assert sent <= step["link_bytes"]["tp"] <= sent + 8 * BATCH
    memory = figures["memory_bytes"]
    parameters = 2 * 4 * (2 * D_SAE // 2 * D_IN + D_SAE // 2 + D_IN)  # two SAEs in float32, half of each here
    # Counters of each latent are there too: rows that it did not fire on, rows that it did.
    assert parameters <= memory["parameters"] <= parameters + 2 * (2 * 8 * D_SAE // 2 + 8 * 8)
    assert 2 * parameters <= memory["adam"] <= 2 * parameters + 2 * 8 * 8  # and its counts of steps
    assert memory["peak"] == sum(memory.values()) - memory["peak"] and memory["rest"] > BATCH * D_IN * 4


@pytest.mark.parametrize(
    ("extra", "options", "said"),
    [
        ((), {"overrides": {"topology.sae.tp": 2}}, "topology.sae: needs 2 ranks but 1 were started; start it with: "),
        ((), {"overrides": {"saes.0.kk": 2}}, "saes.0.kk"),
        ((), {"overrides": {"topology.sae.groups": 2}}, "topology.sae.groups: 2, but groups exchange"),
        ((), {"steps": 0}, "--steps: 0 is no number of steps"),
        ((), {"json_path": "/no/such/folder/found.json"}, "--json: '/no/such/folder/found.json' is no file"),
        (("more",), {}, "'more' is no option"),
    ],
)
def test_what_is_wrong_is_one_line(extra: tuple[str, ...], options: dict[str, Any], said: str, tmp_path: Path) -> None:
    [(code, out, err)] = run_bench(1, config_of(tmp_path), *extra, **options)
    assert (code, out) == (1, "") and err.startswith(f"error: {said}") and err.count("\n") == 1


def test_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scale_sae.bench", "--config", str(config_of(tmp_path)), "--steps", "1"]
    done = subprocess.run(
        [*command, "--saes.0.k=4", "--json", str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        env=runs.environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "| model.layers.0/small |" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["batch"] == BATCH


# ---- timelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5:5", "5", "7:3", "a:b", "-1:2", "1:2:3", 5, True, ""])
def test_no_range_of_steps(text: object) -> None:
    with pytest.raises(UserError, match=r"^--profile_steps: .* 10:13$"):
        profiling.parse_steps(text, 100)


def test_ranges_of_steps() -> None:
    assert profiling.parse_steps("0:1", 1) == range(0, 1)
    assert profiling.parse_steps("3:200", 100) == range(3, 200)
    with pytest.raises(UserError, match=r"^--profile_steps: 100:101 begins behind the run's last step, 99"):
        profiling.parse_steps("100:101", 100)


def test_a_wrong_range_ends_the_run_before_the_model_is_there(tmp_path: Path) -> None:
    path = config_of(tmp_path, model={"name": "embedded", "dtype": "float32", "auto_class": "AutoModelForNothing"})

    def worker(rank: int, world: int) -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            return train.run(str(path), (), {}, "40:41"), said.getvalue()

    [(code, said)] = run_ranks(1, worker, init=False)
    assert code == 1 and said.startswith("error: --profile_steps: 40:41 begins behind") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def ranges(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Named range → (begin, end) of each time, in microseconds."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    found: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def test_a_launch_writes_the_timeline_of_every_rank(tmp_path: Path) -> None:
    path = config_of(tmp_path, topology={"lm": {"tp": 1}, "sae": {"tp": 1}})
    code, output = runs.finish(runs.launch(path, 2, "--profile_steps=8:12"))
    assert code == 0, output[-3000:]
    folder = tmp_path / "run/profile"
    assert sorted(file.name for file in folder.iterdir()) == ["rank0.json.gz", "rank1.json.gz"]
    of_saes, of_lm = ranges(folder / "rank0.json.gz"), ranges(folder / "rank1.json.gz")
    jobs = ["model.layers.0/small", "model.layers.0/dense"]
    for name in ("draw", "wait for the batch", *jobs):
        assert len(of_saes[name]) == 4
    assert len(of_saes["checkpoint"]) == 1  # after step 9
    assert of_saes["wait for chunk"]
    for part in ("forward", "backward", "optimizer"):
        assert len(of_saes[part]) == 4 * len(jobs)
        for begin, end in of_saes[part]:
            assert any(first <= begin and end <= last for job in jobs for first, last in of_saes[job])
    assert not of_saes.keys() & {"LM forward", "send"}
    # The LM is some 10 steps ahead, with those that the buffer holds: it still forwards and sends.
    assert of_lm["LM forward"] and of_lm["send"] and not of_lm.keys() & {*jobs, "draw"}


def test_a_recorder_takes_its_steps_and_all_threads(tmp_path: Path) -> None:
    def at(step: int) -> None:
        recorder.reach(step)
        thread = threading.Thread(target=work, args=(f"step {step}",))
        thread.start()
        thread.join()

    def work(name: str) -> None:
        with record_function(name):
            torch.ones(3).sum()

    recorder = profiling.Recorder(range(1, 3), tmp_path, 0, dist.HashStore())
    for step in range(4):
        at(step)
    recorder.end()
    found = ranges(tmp_path / "profile/rank0.json.gz")
    assert {name for name in found if name.startswith("step")} == {"step 1", "step 2"}

    # A run that goes on behind the steps records nothing, and LM ranks do not wait for it.
    store = dist.HashStore()
    recorder, of_lm = (profiling.Recorder(range(1, 3), tmp_path / "other", rank, store) for rank in (0, 1))
    for step in range(5, 8):
        at(step)
        of_lm.follow()
    recorder.end()
    of_lm.end()
    assert not (tmp_path / "other").exists()


# ---- the peers -------------------------------------------------------------------------------------------------------


def test_peers_takes_turns(tmp_path: Path) -> None:
    sizes = ["--sizes", "16x64", "--k", "4", "--batch", "32", "--threads", "1"]
    times = ["--rounds", "2", "--steps", "1", "--warmup", "1", "--architectures", "topk"]
    done = subprocess.run(
        [sys.executable, str(runs.ROOT / "benchmarks/peers.py"), *sizes, *times, "--subjects", "floor,ours"],
        capture_output=True,
        text=True,
        env=runs.environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *table, found = done.stdout.splitlines()
    assert [line.split("|")[2].strip() for line in table[2:]] == [
        "floor: GEMM",
        "floor: torch.topk",
        "floor: fused Adam",
        "floor: their sum",
        "ours",
    ]
    subjects = json.loads(found)["results"][0]["subjects"]
    assert subjects["ours"]["seconds"] > 0 and subjects["floor"]["seconds"] > 0
