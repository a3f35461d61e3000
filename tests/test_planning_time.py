"""How long a step takes by what machines are said to do, and by what is measured of them."""

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
from torch.utils.flop_counter import FlopCounterMode

import runs
from harness import run_ranks
from scale_sae import config, topology
from scale_sae.bench import Bench
from scale_sae.collectives import Ranks, Shard
from scale_sae.config import DataConfig, TrainConfig
from scale_sae.jobs import JobSpec
from scale_sae.planning import calibrate, work
from scale_sae.planning.flow import Flow
from scale_sae.planning.hardware import Hardware, Link, find, from_json, to_json
from scale_sae.planning.language_model import LMProfile, Op
from scale_sae.planning.shards import SAEShard
from scale_sae.planning.timing import Prediction, predict
from scale_sae.planning.workload import Workload
from scale_sae.saes import registry
from scale_sae.saes.base import TrainStepInput
from scale_sae.saes.topk import TopKTrainingSAEConfig
from test_planning_hardware import MACHINE

EXACT = 1e-9  # relative: sums of floats in another order


# ---- the work of an SAE ----------------------------------------------------------------------------------------------


def shard_of(d_in: int, d_sae: int, rows: int, tp: int = 1, **options: Any) -> SAEShard:
    """One rank's shard of a TopK SAE without dp."""
    cfg, train = TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, **options), TrainConfig(10**9, rows, lr=1e-3)
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


class OfShape(TorchDispatchMode):
    """Reads and writes of tensors ``[rows, columns]``, or with a column more, beside matrix products."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.shapes, self.passes = ((rows, columns), (rows, columns + 1)), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        # Neither reads what it is given: new tensors like another; nor the whole: entries read or written by number.
        few = ("new_empty", "empty_like", "scatter_", "gather")
        if is_view or "mm" in func.__name__ or func.__name__.startswith(few):
            return out
        given = args[1:] if func.__name__.startswith(("new_zeros", "copy_")) else args
        found = sum(tuple(t.shape) in self.shapes for t in tree_leaves((given, out)) if isinstance(t, Tensor))
        self.passes += found * (2 if func.__name__.startswith("index_select") else 1)  # it reads as much as it writes
        return out


@pytest.mark.parametrize("chosen", [False, True])
def test_auxk_computes_and_moves_what_it_is_taken_for(chosen: bool) -> None:
    rows, dead = 256, 96
    s = shard_of(32 if chosen else 256, 512, rows, k=8)  # k_aux 16 or 128
    sae: Any = registry.create("topk", s.spec.cfg, Shard(), "cpu")
    x = torch.randn(rows, s.d_in, generator=torch.Generator().manual_seed(0))

    def step(dead: int) -> None:
        mask = torch.arange(512) < dead
        step_input = TrainStepInput(
            sae_in=x,
            target=x,
            coefficients={},
            dead_neuron_mask=mask,
            num_dead=dead,
            n_training_steps=0,
            is_logging_step=False,
        )
        sae.training_forward_pass(step_input).loss.backward()

    flops, calls = [], []
    for count in (0, dead):
        with FlopCounterMode(display=False) as counter:
            step(count)
        with Counted(2**40) as counted:
            step(count)
        flops.append(counter.get_total_flops())
        calls.append(counted.calls)
    with OfShape(rows, dead) as passes:
        step(dead)
    scores_of_dead = (x @ sae.W_enc.detach() * sae.W_dec.detach().norm(dim=1))[:, :dead].contiguous()
    with OfShape(rows, dead) as choosing:
        if chosen:
            selection = sae.aux_selection()
            selection.add(scores_of_dead)
            selection.choose()
    found = [one for one in work.of_an_sae(s, "cpu", dead=dead) if one.what.startswith("AuxK")]
    scores, products = found
    # b_dec's gradient is a product too, of one row.
    assert products.flops == pytest.approx(flops[1] - flops[0], rel=1 / rows)
    assert products.flops == 2 * rows * dead * (3 * s.d_out + s.d_in)
    assert scores.candidates == (rows * 16 if chosen else 0)
    beside = scores.streamed / (rows * dead * 4) - (work.SCORE_PASSES["cpu"] if chosen else 0)
    assert beside == passes.passes - choosing.passes
    # Which operations torch makes of a call changes with its version: 25 %.
    assert sum(one.calls for one in found) == pytest.approx(calls[1] - calls[0], rel=0.25)


def test_without_dead_latents_there_is_no_auxk() -> None:
    s = shard_of(64, 512, 256, 2, k=8)
    assert [*work.of_an_sae(s, "cuda", dead=0)] == [*work.of_an_sae(s, "cuda")]
    parts = {
        dead: [one for one in work.of_an_sae(s, "cuda", 3, dead) if "AuxK" in one.what] for dead in (0, 1, 40, 100)
    }
    assert not parts[0]
    # Half of them on each of two shards; 32 of each row may be chosen on either.
    assert [one.flops for one in parts[1]] == [0, 2 * 256 * 1 * 4 * 64]
    assert [one.candidates for one in parts[40]] == [256 * 20, 0]  # of all 40 dead ones 32 are chosen
    assert [(one.candidates, one.flops, one.times) for one in parts[100]] == [
        (256 * 32, 0, 3),
        (0, 2 * 256 * 50 * 4 * 64, 3),
    ]
    w = workload(DEDICATED)
    never, some = (predict(w, MACHINE, LM, 8, dead) for dead in (0, 1000))
    assert never == predict(w, MACHINE, LM, 8) and not any("AuxK" in part.what for part in never.parts["SAE rank 0"])
    assert seconds(some, "AuxK: products") == pytest.approx(2 * 2048 * 1000 * 4 * 256 / 1e12)
    assert some.sides["SAE"] > never.sides["SAE"] and some.sides["LM"] == never.sides["LM"]
    assert some.startup_seconds == never.startup_seconds
    two = workload({"lm": "colocated", "sae": {"tp": 2}})
    assert seconds(predict(two, MACHINE, LM, 8, 1000), "tp: recon") > seconds(predict(two, MACHINE, LM, 8), "tp: recon")


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


def test_the_slowest_link_of_a_role_sets_its_pace() -> None:
    """Ranks are numbered through: where their number is no multiple of a node's, some groups lie across two nodes."""
    gathered = Flow("LM tp", "sums", "all_gather", 10**6, 1, 4, "")
    profile = replace(LM, flows=(gathered,))
    # Copies of the model on ranks 2-5 and 6-9: the second has two ranks on each of two nodes.
    w = workload({"lm": {"tp": 4, "dp": 2}, "sae": {"tp": 2}})
    for per_node, link in ((10, MACHINE.intra), (8, Link(2e9, 1e-5)), (9, Link(1e9, 1e-5))):
        expected = link.seconds("all_gather", 10**6, 4) / 4  # a quarter of a chunk for each step
        assert seconds(predict(w, MACHINE, profile, per_node), "LM tp", "LM") == pytest.approx(expected)
    # Of eight copies on ranks 2-33 two lie across nodes of seven with one rank on one of them, one with two on each.
    many = workload({"lm": {"tp": 4, "dp": 8}, "sae": {"tp": 2}})
    one_card = Link(1e9, 1e-5).seconds("all_gather", 10**6, 4) / 16
    assert seconds(predict(many, MACHINE, profile, 7), "LM tp", "LM") == pytest.approx(one_card)
    # Groups of ranks 0-3 and 4-7.
    w = workload({"lm": "colocated", "sae": {"tp": 4, "groups": 2}}, saes=2)
    within, across = (seconds(predict(w, MACHINE, LM, per_node), "tp: reconstruction") for per_node in (8, 6))
    message = 2 * 2048 * 256 * 4
    assert within == pytest.approx(MACHINE.intra.seconds("all_reduce", message, 4))
    assert across == pytest.approx(Link(2e9, 1e-5).seconds("all_reduce", message, 4))
    # Where they train different SAEs, each has its own pace.
    first, second = w.specs
    cfg: Any = second.cfg
    unlike = replace(w, specs=(first, replace(second, cfg=replace(cfg, k=16))))
    found = predict(unlike, MACHINE, LM, 6)
    assert sorted(seconds(found, "tp: reconstruction", role) for role in found.parts) == pytest.approx([within, across])
    # dp 2 x tp 2 on nodes of three: of tp ranks 2-3 lie on two nodes, of dp ranks 1 and 3.
    w = workload({"lm": "colocated", "sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"})
    found = predict(w, MACHINE, LM, 3)
    assert seconds(found, "tp: best of each row") == pytest.approx(1e-5 + 2 * 1024 * 8 * 4 / 2 / 1e9)
    assert seconds(found, "dp: gradients") == pytest.approx(1e-5 + (2 * 256 * 1024 + 1024) * 4 / 2 / 1e9)
    # Of two copies on ranks 2 and 3 one is on the SAEs' node.
    w = workload({"lm": {"dp": 2}, "sae": {"tp": 2}})
    near, far = (predict(w, MACHINE, LM, per_node) for per_node in (4, 3))
    for role in ("SAE", "LM"):
        assert 9 < seconds(far, "LM to SAE", role) / seconds(near, "LM to SAE", role) <= 10  # inter / intra


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
