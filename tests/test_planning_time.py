"""What machines are said to do, what is measured of them, and how long a step takes by that."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import runs
from harness import run_ranks
from scale_sae import config, topology
from scale_sae.bench import Bench
from scale_sae.collectives import Ranks, Shard
from scale_sae.config import DataConfig, TrainConfig
from scale_sae.errors import UserError
from scale_sae.jobs import JobSpec
from scale_sae.planning import calibrate, work
from scale_sae.planning.hardware import DEVICES, GIB, Hardware, Link, find, from_json, ring, to_json
from scale_sae.planning.language_model import LMProfile, Op
from scale_sae.planning.shards import SAEShard
from scale_sae.planning.timing import Prediction, predict
from scale_sae.planning.workload import Workload
from scale_sae.saes import registry
from scale_sae.saes.topk import TopKTrainingSAEConfig

# Round numbers, so that what follows from them can be written out.
MACHINE = Hardware(
    name="made up",
    kind="cuda",
    memory=80 * GIB,
    runtime=GIB,
    reading=0,
    matrix={"float32": 1e12, "tf32": 8e12, "bfloat16": 16e12},
    bandwidth=1e11,
    gather=5e10,
    fresh=None,
    candidate=1e-9,
    overhead=0.0,
    intra=Link(1e10, 1e-6),
    inter=Link(1e9, 1e-5),
    at_once=None,
    sources=(),
)
EXACT = 1e-9  # relative: sums of floats in another order


# ---- hardware --------------------------------------------------------------------------------------------------------


def test_an_h200_does_what_was_measured_of_one() -> None:
    found = find("H200", {})
    assert found.matrix["bfloat16"] == pytest.approx(790e12, rel=0.01)  # TFLOP/s of an encoder's product
    assert found.bandwidth == pytest.approx(4.3e12, rel=0.01)  # bytes/s of Adam's pass
    for name, device in DEVICES.items():
        assert device.name == name and device.at_once is None and len(device.sources) == 3
        assert device.matrix["float32"] <= device.matrix["tf32"] < device.matrix["bfloat16"]
        assert device.inter.bandwidth < device.intra.bandwidth < device.bandwidth


def test_overrides_are_in_the_unit_of_their_name() -> None:
    keys = {"memory_gib": 96, "bfloat16_tflops": 700, "intra_gbps": 800, "inter_latency_us": 20, "at_once": 2}
    found = find("h100", keys)
    assert (found.memory, found.matrix["bfloat16"], found.at_once) == (96 * GIB, 700e12, 2)
    assert (found.intra.bandwidth, found.inter.latency) == (100e9, pytest.approx(20e-6))
    assert found.matrix["float32"] == DEVICES["h100"].matrix["float32"]
    assert found.sources[-1] == "Given: at_once = 2."


@pytest.mark.parametrize(
    ("device", "overrides", "words"),
    [
        ("h20", {}, ["--device", "'h20'", "h200", "--calibrate"]),
        ("cpu", {}, ["--device", "cpu", "--calibrate=cpu.json"]),
        ("h100", {"memory": 80}, ["--hardware.memory:", "80", "did you mean memory_gib"]),
        ("h100", {"inter_gbps": "fast"}, ["--hardware.inter_gbps", "'fast'", "number above 0"]),
        ("h100", {"inter_gbps": 0}, ["--hardware.inter_gbps", "0 is no number above 0"]),
        ("h100", {"at_once": True}, ["--hardware.at_once", "True"]),
    ],
)
def test_what_is_wrong_is_said_in_a_line(device: str, overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        find(device, overrides)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    for machine in (MACHINE, replace(MACHINE, kind="cpu", fresh=1e9, at_once=2, sources=("Measured.",))):
        path.write_text(json.dumps(to_json(machine)))
        assert find(str(path), {}) == machine
    for text in ("no JSON", "[]", "{}", json.dumps({**to_json(MACHINE), "kind": "tpu"})):
        path.write_text(text)
        with pytest.raises(UserError, match=r"machine\.json is no calibration .*; write one with accelerate launch"):
            find(str(path), {})
    with pytest.raises(ValueError, match="speed"):
        from_json({**to_json(MACHINE), "speed": 1})


# ---- links -----------------------------------------------------------------------------------------------------------


def sent_on_a_ring(op: str, numbers: int, ranks: int) -> tuple[int, float]:
    """(rounds, numbers that one rank sends) of a ring algorithm, by going round: each round every rank sends a part."""
    part, rounds, sent = numbers / ranks, 0, 0.0
    for phase in {"all_reduce": ("reduce", "gather"), "all_gather": ("gather",), "reduce_scatter": ("reduce",)}[op]:
        have = 1  # parts that are done on a rank, or summed over so many ranks
        while have < ranks:
            have, rounds, sent = have + 1, rounds + 1, sent + part
        assert phase and have == ranks
    return rounds, sent


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_ring_sends_what_it_is_charged_for(op: str, ranks: int) -> None:
    tensor = 840  # bytes
    rounds, sent = sent_on_a_ring(op, tensor, ranks)
    counted = 2 * tensor if op == "all_reduce" else tensor  # as `Flow` counts
    assert ring(op, ranks) == (rounds, pytest.approx(sent / counted))
    assert Link(100.0, 1.0).seconds(op, counted, ranks) == pytest.approx(rounds + sent / 100)


def test_the_link_behind_times_is_found() -> None:
    truth = Link(3e9, 2e-4)
    sizes = [("all_reduce", 2 * n) for n in (2**12, 2**16, 2**23)] + [("send", 2**12), ("all_gather", 2**20)]
    times = [(op, size, truth.seconds(op, size, 4)) for op, size in sizes]
    found = calibrate.fit(times, 4)
    # The condition of the problem times the rounding of float64.
    assert (found.bandwidth, found.latency) == (pytest.approx(3e9, rel=1e-6), pytest.approx(2e-4, rel=1e-6))
    # Noise that no latency explains, or no bandwidth: the other explains it all, and both stay positive.
    for odd in ([("send", 1000, 1.0), ("send", 10**6, 0.5)], [("send", 1000, 1e-9), ("send", 10**6, 1.0)]):
        link = calibrate.fit(odd, 2)
        assert link.bandwidth > 0 and link.latency > 0


# ---- the work of an SAE ----------------------------------------------------------------------------------------------


def shard_of(d_in: int, d_sae: int, rows: int, tp: int = 1, **options: Any) -> SAEShard:
    """One rank's shard of a TopK SAE without dp."""
    cfg, train = TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, **options), TrainConfig(10**9, rows)
    spec = JobSpec("x", "x", "x", 0, "topk", cfg, train, None)
    sae = registry.create("topk", cfg, Shard(tp - 1, tp, dp=Ranks()), "meta")
    return SAEShard(spec, sae, tp, 1, rows, rows, "local")


def test_a_large_topk_step_takes_what_its_floor_takes() -> None:
    """The performance model: one encoder product, one pass over the optimizer state, a few ms of codes."""
    s = shard_of(4096, 131072, 8192, k=64, dtype="bfloat16")
    found = {one.what: one for one in work.of_an_sae(s, "cuda")}
    parameters = 2 * 4096 * 131072
    assert found["encoder product"].flops == 2 * 8192 * 4096 * 131072
    # float32 weight and two moments, read and written, and the bfloat16 copy.
    assert found["Adam"].streamed == parameters * 26
    h200 = find("h200", {})
    assert found["encoder product"].flops / h200.matrix["bfloat16"] == pytest.approx(11e-3, rel=0.05)
    assert found["Adam"].streamed / h200.bandwidth == pytest.approx(26 / 24 * 6e-3, rel=0.05)
    # Decoder, its transposed product and both gradients: 4 rows of d numbers per code.
    codes = found["products with codes"].gathered + found["gradient norm"].gathered
    assert codes == 4 * 8192 * 64 * 4096 * 2
    # Scores are read once and written once with scale and bias; the norms read W_dec.
    assert found["selection"].streamed == 2 * 8192 * 131072 * 2 + 4096 * 131072 * 2


def test_a_shard_has_its_share_of_the_work() -> None:
    whole, half = ({one.what: one for one in work.of_an_sae(shard_of(64, 4096, 256, tp, k=8), "cpu")} for tp in (1, 2))
    for what in ("encoder product", "Adam"):
        assert whole[what].flops == 2 * half[what].flops and whole[what].streamed >= half[what].streamed
    assert whole["gradient norm"].gathered == 2 * half["gradient norm"].gathered
    # Each shard offers k candidates of every row, since one of them may have all of the best.
    assert whole["selection"].candidates == half["selection"].candidates == 256 * 8


def test_half_as_wide_moments_are_half_as_much_to_move() -> None:
    s = shard_of(64, 4096, 256, k=8)
    narrow = replace(s, spec=replace(s.spec, train=replace(s.spec.train, moments_dtype="bfloat16")))
    adam = [next(one for one in work.of_an_sae(each, "cuda") if one.what == "Adam") for each in (s, narrow)]
    assert [one.streamed for one in adam] == [2 * 64 * 4096 * 24, 2 * 64 * 4096 * 16]


class Counted(TorchDispatchMode):
    """Operations, and reads and writes of large tensors, in units of ``unit`` bytes, beside matrix products."""

    def __init__(self, unit: int):
        super().__init__()
        self.unit, self.calls, self.passes, self.new = unit, 0, 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return out  # a view
        taken, given = ([t for t in tree_leaves(each) if isinstance(t, Tensor)] for each in ((args, kwargs), out))
        held = {t.untyped_storage().data_ptr() for t in taken}
        large = [t for t in taken + given if t.nbytes >= self.unit / 4]
        if "mm" not in func.__name__:
            self.passes += sum(t.nbytes for t in large) / self.unit
        new = [t for t in given if t.nbytes >= self.unit / 4 and t.untyped_storage().data_ptr() not in held]
        self.new += sum(t.nbytes for t in new) / self.unit
        return out


def bench_of(architecture: str, d_sae: int, batch: int, folder: Path, **options: Any) -> Bench:
    run = config.from_dict(
        {
            "output_dir": str(folder),
            "model": {"name": "embedded"},
            "hookpoints": ["model.layers.1"],
            "saes": [{"architecture": architecture, "d_sae": d_sae, **options}],
            "topology": {"lm": "colocated"},
            "train": {"training_tokens": 10**12, "train_batch_size_tokens": batch},
            "buffer": {"tokens": batch, "lanes": 8},
            "logging": {"log_every_steps": 10**9},
        }
    )
    return Bench(run, 0, torch.device("cpu"), "gloo", topology.connect(0, 1, "gloo"))


@pytest.fixture
def alone() -> Any:
    yield
    torch.distributed.destroy_process_group()


def test_the_operations_of_a_step_are_as_many_as_they_are_taken_for(tmp_path: Path, alone: None) -> None:
    bench = bench_of("topk", 512, 512, tmp_path, k=8)
    job = bench.trainer.jobs[0]
    bench.step_alone(job)
    with Counted(2**40) as codes:
        bench.step_alone(job)
    with Counted(2**40) as whole:
        bench.whole_step()
    s = SAEShard(job.spec, job.sae, 1, 1, 512, 512, "local")
    # Which operations torch makes of a call changes with its version: 15 %.
    assert sum(one.calls for one in work.of_an_sae(s, "cpu")) == pytest.approx(codes.calls, rel=0.15)
    beside = work.STEP_OPS + work.LANE_OPS * 8
    assert beside == pytest.approx(whole.calls - codes.calls, rel=0.15)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_dense_activations_are_passed_over_as_often_as_they_are_taken_for(
    architecture: str, tmp_path: Path, alone: None
) -> None:
    bench = bench_of(architecture, 2048, 2048, tmp_path)
    job = bench.trainer.jobs[0]
    with Counted(2048 * 2048 * 4) as found:
        bench.step_alone(job)
    passes, new = work.DENSE_PASSES[architecture]
    # Where nearly all entries count, as in a new SAE. Bools of all entries are large, rows and parameters are not.
    # Which operations torch makes of a call changes with its version: 15 %.
    assert found.passes == pytest.approx(passes, rel=0.15)
    assert found.new == pytest.approx(new, rel=0.15)
    s = SAEShard(job.spec, job.sae, 1, 1, 2048, 2048, "local")
    assert sum(one.calls for one in work.of_an_sae(s, "cpu")) == pytest.approx(found.calls, rel=0.25)


# ---- a whole step ----------------------------------------------------------------------------------------------------

LM = LMProfile(1, 0, 0, 0, 0, ((Op(10**10, 10**6), 3), (Op(0, 10**9), 2)), ())
OF_A_CHUNK = 3 * 10e-3 + 2 * 10e-3  # seconds on MACHINE: arithmetic of the first kind, memory of the second


def workload(section: dict[str, Any], saes: int = 1, dtype: str = "float32", **changes: Any) -> Workload:
    run = {
        "output_dir": "run",
        "model": {"name": "embedded"},
        "data": {"context_size": 128, "chunk_contexts": 32, "exclude_special_tokens": False},
        "hookpoints": ["model.layers.1"],
        "saes": [{"name": f"s{i}", "architecture": "topk", "d_sae": 2048, "k": 8, "dtype": dtype} for i in range(saes)],
        "topology": section,
        "train": {"training_tokens": 2048 * 100, "train_batch_size_tokens": 2048},
        "buffer": {"tokens": 16384, "lanes": 8},
        **changes,
    }
    return Workload.of(config.from_dict(run))


def seconds(found: Prediction, what: str, role: str = "SAE") -> float:
    """Of the parts of the first such role whose name holds ``what``."""
    parts = next(parts for name, parts in found.parts.items() if name.startswith(role))
    chosen = [part.seconds for part in parts if what in part.what]
    assert chosen, [part.what for part in parts]
    return sum(chosen)


DEDICATED = {"lm": {"tp": 1}, "sae": {"tp": 1}}


def test_sides_work_beside_each_other_and_the_slower_one_counts() -> None:
    found = predict(workload(DEDICATED), MACHINE, LM, 8)
    assert seconds(found, "language model", "LM") == pytest.approx(OF_A_CHUNK / 2)  # half a chunk for each step
    assert found.sides["LM"] > found.sides["SAE"] and found.step_seconds == found.sides["LM"]
    assert f"{(found.sides['LM'] - found.sides['SAE']) * 1e3:.1f} ms" in found.waits and "lm.dp" in found.waits
    assert found.tokens_per_second == pytest.approx(2048 / found.step_seconds)
    assert found.total_seconds == pytest.approx(found.startup_seconds + 100 * found.step_seconds)
    for name, parts in found.parts.items():
        assert sum(part.seconds for part in parts) == pytest.approx(found.sides[name.split()[0]], rel=EXACT)
    # With copies enough, the model waits for the SAEs.
    many = predict(workload({"lm": {"dp": 64}, "sae": {"tp": 1}}), MACHINE, LM, 8)
    assert seconds(many, "language model", "LM") == pytest.approx(OF_A_CHUNK / 2 / 64)
    assert many.step_seconds == many.sides["SAE"] == pytest.approx(found.sides["SAE"])
    assert many.waits.startswith("ranks of the language model wait")


def test_a_colocated_rank_does_one_after_the_other() -> None:
    apart = predict(workload(DEDICATED), MACHINE, LM, 8)
    found = predict(workload({"lm": "colocated", "sae": {"tp": 1}}), MACHINE, LM, 8)
    assert found.sides.keys() == {"SAE"}
    both = [part for parts in apart.parts.values() for part in parts if not part.link_bytes and part.seconds > 0]
    assert found.step_seconds == pytest.approx(sum(part.seconds for part in both))


def test_the_buffer_is_filled_by_the_model_alone() -> None:
    found = predict(workload(DEDICATED), MACHINE, LM, 8)
    chunks = 16384 // 4096  # before the first draw
    forward = chunks * OF_A_CHUNK
    assert forward < found.startup_seconds < 1.1 * forward  # packing and sending come on top
    twice = predict(workload({"lm": {"dp": 2}, "sae": {"tp": 1}}), MACHINE, LM, 8)
    assert twice.startup_seconds == pytest.approx(found.startup_seconds / 2, rel=EXACT)
    cached = replace(workload(DEDICATED).config.topology.lm, cache="somewhere", tp=1, dp=1)
    assert cached.cache and predict(workload(DEDICATED), MACHINE, None, 8).startup_seconds == 0


def test_a_group_of_one_node_uses_its_links_and_others_the_network() -> None:
    section = {"lm": "colocated", "sae": {"tp": 8}}
    what = "tp: reconstruction"
    message = 2 * 2048 * 256 * 4  # all-reduce of [B, d_in]

    def expected(bandwidth: float, latency: float) -> Any:
        return pytest.approx(14 * latency + 7 / 8 * message / bandwidth)

    assert seconds(predict(workload(section), MACHINE, LM, 8), what) == expected(1e10, 1e-6)
    # Four ranks of each of two nodes: four network cards, still slower than the inner link.
    assert seconds(predict(workload(section), MACHINE, LM, 4), what) == expected(4 * 1e9, 1e-5)
    # One rank per node: its own card.
    assert seconds(predict(workload(section), MACHINE, LM, 1), what) == expected(1e9, 1e-5)
    # Cards that are faster together than the inner link do not make that faster.
    fast = replace(MACHINE, inter=Link(9e9, 1e-5))
    assert seconds(predict(workload(section), fast, LM, 4), what) == expected(1e10, 1e-5)


def test_dp_ranks_are_a_stride_apart() -> None:
    """Of dp 2 x tp 2 on nodes of two ranks, tp stays in a node and dp crosses."""
    found = predict(workload({"lm": "colocated", "sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"}), MACHINE, LM, 2)
    parameters = 2 * 256 * 1024 + 1024  # W_enc, W_dec and b_enc of a shard
    assert seconds(found, "dp: gradients") == pytest.approx(1e-5 + parameters * 4 / 2 / 1e9)
    assert seconds(found, "tp: best of each row") == pytest.approx(1e-6 + 2 * 1024 * 8 * 4 / 2 / 1e10)


def test_messages_of_one_sae_pass_while_another_computes() -> None:
    section = {"lm": {"tp": 1}, "sae": {"tp": 2}}
    one, two = (predict(workload(section, saes), MACHINE, LM, 8) for saes in (1, 2))
    batch = seconds(one, "tp: batch") + seconds(one, "LM to SAE")
    assert -seconds(one, "while others compute") == pytest.approx(batch)  # alone, its own messages are waited for
    sent = sum(seconds(two, part.what) for part in two.parts["SAE ranks 0-1"] if part.what.startswith("tp: ")) - batch
    assert sent > 0
    assert -seconds(two, "while others compute") > 1.5 * batch  # half of those of two SAEs beside
    # On a CPU the cores that compute carry the messages too.
    cpu = predict(workload(section, 2), replace(MACHINE, kind="cpu", fresh=1e10), LM, 8)
    assert not any(part.seconds < 0 for parts in cpu.parts.values() for part in parts)


def test_ranks_that_share_cores_share_their_time() -> None:
    cpu = replace(MACHINE, kind="cpu", fresh=1e10)
    w = workload({"lm": {"dp": 2}, "sae": {"tp": 2}})
    free = predict(w, replace(cpu, at_once=4), LM, 4)
    tight = predict(w, replace(cpu, at_once=1), LM, 4)
    computing = {name: sum(part.seconds for part in parts if not part.link_bytes) for name, parts in free.parts.items()}
    assert tight.step_seconds >= 2 * sum(computing.values())  # two ranks of either kind on one core
    assert free.step_seconds == max(free.sides.values()) and tight.sides == free.sides
    assert "share 1 places" in tight.waits


def test_tf32_and_the_dtype_set_the_rate() -> None:
    section = {"lm": "colocated", "sae": {"tp": 1}}
    slow = seconds(predict(workload(section), MACHINE, LM, 8), "encoder product")
    assert slow == pytest.approx(2 * 2048 * 256 * 2048 / 1e12)
    allowed = {"training_tokens": 2048 * 100, "train_batch_size_tokens": 2048, "allow_tf32": True}
    assert seconds(predict(workload(section, train=allowed), MACHINE, LM, 8), "encoder product") < slow / 2
    half = predict(workload(section, dtype="bfloat16"), MACHINE, LM, 8)
    assert seconds(half, "encoder product") < slow / 2


# ---- measuring -------------------------------------------------------------------------------------------------------


def calibrated(world: int, per_node: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Hardware | None]:
    """What real ranks measure, on little data."""
    for name, small in {
        "ROUNDS": 2,
        "PRODUCTS": {"cpu": ((256, 64, 512),)},
        "DTYPES": {"cpu": ("float32", "bfloat16")},
        "PASS_BYTES": {"cpu": 2**22},
        "GATHER": {"cpu": (256, 64, 8)},
        "SELECTION": {"cpu": (64, 512, 4)},
        "MESSAGES": {"cpu": (2**12, 2**20)},
        "TEXT": DataConfig(dataset=str(runs.write_texts(tmp_path / "texts.jsonl"))),
    }.items():
        monkeypatch.setattr(calibrate, name, small)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))

    def worker(rank: int, world: int) -> Hardware | None:
        store = topology.connect(rank, world, "gloo")
        return calibrate.measure(SimpleNamespace(rank=rank, world_size=world, local_rank=rank % per_node, store=store))

    return run_ranks(world, worker, init=False)


@pytest.mark.parametrize(("world", "per_node"), [(1, 1), (2, 2), (4, 2)])
def test_a_machine_is_measured_by_its_ranks(
    world: int, per_node: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, *others = calibrated(world, per_node, monkeypatch, tmp_path)
    assert found is not None and others == [None] * (world - 1)
    assert from_json(json.loads(json.dumps(to_json(found)))) == found
    assert found.kind == "cpu" and found.at_once is not None and found.at_once >= 1
    assert 50 * 2**20 < found.runtime + found.reading < found.memory  # torch alone is more
    figures = [found.bandwidth, found.gather, found.fresh or 0, found.candidate, found.overhead]
    figures += [*found.matrix.values(), found.intra.bandwidth, found.inter.bandwidth]
    assert all(math.isfinite(value) and value > 0 for value in figures)
    # Between what no core is slower and none is faster than, whatever else runs.
    assert 1e8 < found.matrix["float32"] < 1e13 and 1e7 < found.bandwidth < 1e13
    assert 1e-7 < found.overhead < 1e-2
    said = " ".join(found.sources)
    assert f"{world} ranks, {per_node} per node" in said
    assert ("One rank" in said) == (world == 1)
    # Two nodes have a link of their own between them.
    assert ("One node" in said) == (world == 2) and (found.inter == found.intra) == (world < 4)
    assert predict(workload(DEDICATED), found, LM, per_node).step_seconds > 0


@pytest.mark.slow
def test_what_is_predicted_happens(tmp_path: Path) -> None:
    """A whole step of real ranks takes what is measured of the same ranks; `benchmarks/planner.py` looks closer."""
    run = config.from_dict(
        {
            **runs.tiny_config(tmp_path),
            "model": {"name": "embedded"},
            "saes": [{"architecture": "topk", "d_sae": 4096, "k": 32}],
            "hookpoints": ["model.layers.1"],
            "topology": {"lm": "colocated", "sae": {"tp": 2}},
            "train": {"training_tokens": 10**12, "train_batch_size_tokens": 2048},
            "buffer": {"tokens": 4096},
            "logging": {"log_every_steps": 10**9},
        }
    )

    def worker(rank: int, world: int) -> tuple[Hardware | None, float]:
        store = topology.connect(rank, world, "gloo")
        session = SimpleNamespace(rank=rank, world_size=world, local_rank=rank, store=store)
        hardware = calibrate.measure(session)
        bench = Bench(run, rank, torch.device("cpu"), "gloo", torch.distributed.PrefixStore("bench", store))
        return hardware, sorted(bench._seconds(bench.whole_step) for _ in range(8))[4]

    (hardware, measured), _ = run_ranks(2, worker, init=False)
    assert hardware is not None
    found = predict(Workload.of(run), hardware, None, 2)
    # Other processes come and go between the two: a factor of two.
    assert measured / 2 < found.step_seconds < measured * 2
