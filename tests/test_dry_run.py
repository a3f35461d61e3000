"""A step of every kind of rank on tensors without values: it runs, and says what a cluster would find out later."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import test_traffic
import torch
from torch import Tensor, nn

import runs
from harness import run_ranks
from scale_sae import StandardTrainingSAE, StandardTrainingSAEConfig, config, topology
from scale_sae.activations.transport import Sender
from scale_sae.bench import Bench
from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.job_trainer import JobTrainer
from scale_sae.planning import dry_run as module
from scale_sae.planning.calls import Call, misunderstandings
from scale_sae.planning.dry_run import DryRun, dry_run
from scale_sae.planning.fake_tensors import META, Shapes, open_shapes
from scale_sae.planning.language_model import profile
from scale_sae.planning.memory import items
from scale_sae.planning.workload import Workload

D_SAE = 512


def workload(folder: Path, **changes: Any) -> Workload:
    return Workload.of(config.from_dict(runs.tiny_config(folder, **changes)))


def dried(folder: Path, **changes: Any) -> DryRun:
    return dry_run(workload(folder, **changes), lambda line: None)


# ---- every topology, engine and architecture runs --------------------------------------------------------------------

FSDP2 = {"sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"}
TOPOLOGIES = {
    **{name: section for name, (section, _) in runs.TOPOLOGIES.items()},
    "LM tp=2, SAE tp=4": {"lm": {"tp": 2}, "sae": {"tp": 4}},
    "fsdp2": {"lm": {"tp": 1}, **FSDP2},
    "deepspeed": {"lm": {"tp": 1}, **FSDP2, "engine": "deepspeed"},
    "colocated fsdp2": {"lm": "colocated", **FSDP2},
    "from a cache": {"lm": {"cache": "activations"}, "sae": {"tp": 2}},
    "device map": {"lm": {"parallel": "device_map"}, "sae": {"tp": 2}},
}
FLOAT32 = {"model": {"name": "embedded", "dtype": "float32"}, "saes": [{"d_sae": D_SAE, "k": 8}]}


SLOW = {
    "LM tp=2, SAE tp=2",
    "colocated tp=1",
    "colocated tp=2",
    "LM dp=2, SAE tp=1",
    "SAE tp=4",
    "groups=2",
    "colocated fsdp2",
}


def but(slow: set[str], names: Iterable[str]) -> list[Any]:
    """``names`` as parameters, of which some are slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


@pytest.mark.parametrize("name", but(SLOW, TOPOLOGIES))
def test_every_rank_of_a_topology_gets_through_its_step(name: str, tmp_path: Path) -> None:
    w = workload(tmp_path, topology=TOPOLOGIES[name], **FLOAT32)
    said: list[str] = []
    found = dry_run(w, said.append)
    assert found.problems == ()
    assert sum(run.stands_for for run in found.ranks) == w.plan.world_size
    assert len(said) == len(w.roles())
    assert all(run.peak > 0 for run in found.ranks)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk in bfloat16": {"architecture": "topk", "k": 8, "dtype": "bfloat16", "moments_dtype": "bfloat16"},
    "scaled": {"architecture": "topk", "k": 8, "normalize_activations": "expected_average_only_in"},
    "abstopk": {"architecture": "abstopk", "k": 8},
    "batchtopk": {"architecture": "batchtopk", "k": 8},
    "matryoshka": {"architecture": "matryoshka_batchtopk", "k": 8, "matryoshka_widths": [64, 200]},
    "standard": {"architecture": "standard", "l1_coefficient": 1.0},
    "gated": {"architecture": "gated", "l1_coefficient": 1.0},
    "jumprelu": {"architecture": "jumprelu", "l0_coefficient": 1.0},
    "transcoder": {"architecture": "transcoder", "hookpoint_out": "model.layers.1"},
}


@pytest.mark.parametrize("engine", but({"fsdp2"}, ["local", "fsdp2"]))
def test_every_architecture_gets_through_its_step(engine: str, tmp_path: Path) -> None:
    saes = [{"name": name.replace(" ", "_"), "d_sae": D_SAE, **entry} for name, entry in ARCHITECTURES.items()]
    grid = {"tp": 2} if engine == "local" else {"dp": 2, "tp": 2}
    found = dried(
        tmp_path,
        model={"name": "embedded", "dtype": "float32"},
        hookpoints=["model.layers.0"],
        saes=saes,
        topology={"lm": {"tp": 2}, "sae": grid, "engine": engine},
    )
    assert found.problems == ()
    # All places of a shard, since prefixes differ; of the language model both ranks.
    assert [run.role for run in found.ranks] == ["SAE"] * (2 * grid.get("dp", 1)) + ["LM"] * 2


# ---- what it notes is what a run does --------------------------------------------------------------------------------

# Of a call's tensors: bytes as test_traffic counts them.
BYTES: dict[str, tuple[str, Callable[[list[int]], int]]] = {
    "allreduce": ("all_reduce", lambda sizes: 2 * sizes[0]),
    "all_gather_single": ("all_gather", lambda sizes: sizes[0]),
    "allgather_base": ("all_gather", lambda sizes: sizes[0]),
    "reduce_scatter_single": ("reduce_scatter", lambda sizes: sizes[1]),
    "reduce_scatter_base": ("reduce_scatter", lambda sizes: sizes[1]),
}


def calls_of(w: Workload, rank: int) -> list[Call]:
    role = next(role for role in w.roles() if rank in role.ranks)
    _, calls, problem = module._run_rank(w, role, rank, 1)
    assert problem is None, problem
    return calls


def sizes(call: Call) -> list[int]:
    return [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in call.tensors]


@pytest.mark.parametrize("name", but(test_traffic.RUNS.keys() - {"dedicated, groups"}, test_traffic.RUNS))
def test_calls_are_those_of_a_real_run(name: str, tmp_path: Path) -> None:
    section, _, n_sae, _ = test_traffic.RUNS[name]
    real = test_traffic.whole_run(name, tmp_path)
    saes = [{"name": "small", "d_sae": 512, "k": 8}]
    train = {"training_tokens": 12 * 128, "train_batch_size_tokens": 128}
    w = workload(tmp_path, model=FLOAT32["model"], saes=saes, train=train, topology=section)
    for rank in range(n_sae):
        messages = [m for m in real[rank][0] if m.step == 0]
        calls = calls_of(w, rank)
        for link in ("tp", "dp"):
            expected = Counter((m.call, m.bytes) for m in messages if m.link == link)
            found = Counter((BYTES[call.op][0], BYTES[call.op][1](sizes(call))) for call in calls if call.link == link)
            assert found == expected
    for rank, (messages, counts) in enumerate(real):
        moved = {(call.op, sizes(call)[0]) for call in calls_of(w, rank) if call.link == "LM to SAE"}
        if section["lm"] != "colocated":  # where each has as many bytes as its chunk gives rows
            assert moved == {(m.call, m.bytes) for m in messages if m.link == "LM"}
        assert moved or not counts


def test_calls_of_the_model_are_those_of_its_profile(tmp_path: Path) -> None:
    w = workload(tmp_path, topology={"lm": {"tp": 2}, "sae": {"tp": 1}}, **FLOAT32)
    expected: Counter[str] = Counter()
    for flow in profile(w.config, w.widths).flows:
        expected[flow.op] += int(flow.count)
    for rank in w.plan.lm[0]:
        calls = [call for call in calls_of(w, rank) if call.link == "LM tp"]
        assert Counter(call.op for call in calls) == expected
    assert expected.total() > 0


# Tensors on which the smaller ones (counters, scalars, a kernel's blocks of 4 MiB) weigh little.
LARGE = {
    "model": FLOAT32["model"],
    "hookpoints": ["model.layers.1"],
    "train": {"training_tokens": 10**6, "train_batch_size_tokens": 2048},
    "buffer": {"tokens": 8192, "lanes": 8},
}
GRIDS: dict[str, dict[str, Any]] = {
    "tp=1": {"sae": {"tp": 1}},
    "tp=2": {"sae": {"tp": 2}},
    "fsdp2": {"sae": {"tp": 2, "dp": 2}, "engine": "fsdp2"},
}


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("name", but({"tp=1", "fsdp2"}, GRIDS))
def test_peak_is_that_of_a_real_step(name: str, architecture: str, tmp_path: Path) -> None:
    changes = {**LARGE, "saes": [{"architecture": architecture, "d_sae": 8192, "k": 16}]}
    random = config.from_dict(runs.tiny_config(tmp_path, topology={"lm": "colocated", **GRIDS[name]}, **changes))

    def worker(rank: int, world: int) -> int:
        store = topology.connect(rank, world, "gloo")
        return Bench(random, rank, torch.device("cpu"), "gloo", store).peak

    w = workload(tmp_path, topology={"lm": {"cache": "activations"}, **GRIDS[name]}, **changes)
    # Chunks of a batch, as a benchmark has them.
    w = replace(w, schedule=replace(w.schedule, chunk_rows=w.batch))
    found = dry_run(w, lambda line: None)
    assert found.problems == ()
    real = run_ranks(w.plan.world_size, worker, init=False)
    for run in found.ranks:
        # On a CPU a kernel's blocks come on top, and small results are rounded up: 4 MiB of 60 to 150. How many of a
        # whole batch's entries BatchTopK looks at on one dp rank depends on their values.
        tolerance = 0.15 if (name, architecture) == ("fsdp2", "batchtopk") else 0.05
        assert run.peak == pytest.approx(real[run.rank], rel=tolerance)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_peak_is_what_the_estimate_says(architecture: str, tmp_path: Path) -> None:
    changes = {**LARGE, "hookpoints": ["model.layers.*"]}
    saes = [{"architecture": architecture, "d_sae": 8192, "k": 16}]
    w = workload(tmp_path, saes=saes, topology={"lm": {"tp": 2}, "sae": {"tp": 2}}, **changes)
    found = dry_run(w, lambda line: None)
    for role in w.roles():
        lm = profile(w.config, w.widths) if role.runs_lm else None
        estimate = sum(item.bytes for item in items(w, role, lm, "cuda"))
        (run,) = [run for run in found.ranks if run.rank == role.ranks[0]]
        # Formulas for the large tensors, against all of them; two SAEs in turns are not both at their fullest.
        assert run.peak == pytest.approx(estimate, rel=0.15)


def test_lanes_that_a_chunk_does_not_fill_evenly(tmp_path: Path) -> None:
    # 7 contexts of 31 tokens give 217 rows for 8 lanes, so that the two of dp rank 1 may get another number than those
    # of dp rank 0, which is run for it.
    data = {**runs.tiny_config(tmp_path)["data"], "chunk_contexts": 7}
    section = {"lm": "colocated", "sae": {"dp": 4, "tp": 1}, "engine": "fsdp2"}
    w = workload(tmp_path, data=data, topology=section, **FLOAT32)
    assert w.rows_per_chunk % w.config.buffer.lanes != 0
    found = dry_run(w, lambda line: None)
    assert found.problems == () and [run.rank for run in found.ranks] == [0, 3]


@pytest.mark.parametrize("engine", ["local", "fsdp2"])
def test_an_sae_that_starts_from_a_released_one_whose_inputs_were_scaled(engine: str, tmp_path: Path) -> None:
    entry = {"d_sae": D_SAE, "k": 8, "normalize_activations": "expected_average_only_in", "init_from": "release:id"}
    grid = {"tp": 2} if engine == "local" else {"dp": 2, "tp": 1}
    section = {"lm": {"tp": 1}, "sae": grid, "engine": engine}
    assert dried(tmp_path, model=FLOAT32["model"], saes=[entry], topology=section).problems == ()


def test_a_mixture_of_experts_in_float32(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    MixtralConfig(
        vocab_size=304,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(tmp_path / "mixtral")
    found = dried(
        tmp_path,
        model={"name": str(tmp_path / "mixtral"), "dtype": "float32"},
        hookpoints=["model.layers.1"],
        saes=FLOAT32["saes"],
        topology={"lm": {"tp": 1}, "sae": {"tp": 2}},
    )
    assert found.problems == ()


def test_positions_of_which_only_the_bos_is_kept(tmp_path: Path) -> None:
    data = {**runs.tiny_config(tmp_path)["data"], "seqpos_slice": [0, 1]}
    with pytest.raises(UserError, match=r"^data\.seqpos_slice: \[0, 1\] keeps only the BOS.*exclude_special_tokens"):
        workload(tmp_path, data=data)
    assert workload(tmp_path, data={**data, "exclude_special_tokens": False}).rows_per_chunk == data["chunk_contexts"]


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_a_line_for_each_role(tmp_path: Path) -> None:
    said: list[str] = []
    found = dry_run(workload(tmp_path, topology={"lm": {"tp": 1, "dp": 3}, "sae": {"tp": 2}}, **FLOAT32), said.append)
    sizes = [f"{max(run.peak for run in found.ranks if run.role == role) / 2**20:.1f} MiB" for role in ("SAE", "LM")]
    assert [line.rpartition(", ")[0] for line in said] == [
        f"SAE ranks 0-1: run, {sizes[0]} at most",
        f"LM ranks 2-4: 1 of them run for all, {sizes[1]} at most",
    ]


@pytest.mark.parametrize(("parallel", "where"), [("tp", " (node 1)"), ("device_map", "")])
def test_nodes_are_named_where_a_rank_has_one_gpu(
    parallel: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sender, "send", fail)
    w = workload(tmp_path, topology={"lm": {"parallel": parallel}, "sae": {"tp": 2}}, **FLOAT32)
    (problem,) = dry_run(w, lambda line: None, gpus_per_node=2).problems
    assert problem.startswith(f"LM rank 2{where}: ValueError at ")


def fail(*args: Any) -> None:
    raise ValueError("a first line\nand a second")


# ---- what it finds ---------------------------------------------------------------------------------------------------


@dataclass
class OwnConfig(StandardTrainingSAEConfig):
    pass


class Prefixed(StandardTrainingSAE):
    """Keeps all latents but as many as a shard has. Wrong for one that keeps none: the remainder of 0 is 0."""

    cfg: OwnConfig

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts, hidden_pre = super().encode_with_hidden_pre(x)
        inner = self.shard.prefix(self.cfg.d_sae - self.n_local)
        return acts * nn.functional.pad(acts[:, inner], (0, -inner.stop % self.n_local)), hidden_pre


def test_a_class_that_fails_on_one_shard(tmp_path: Path) -> None:
    found = dried(
        tmp_path,
        model=FLOAT32["model"],
        saes=[{"d_sae": D_SAE, "architecture": f"{__name__}:Prefixed"}],
        topology={"lm": {"tp": 1}, "sae": {"tp": 4, "groups": 2}},
    )
    # Of shards of 128 latents the fourth has none: that of rank 3 and, in the other group, of rank 7.
    (problem,) = found.problems
    assert problem.startswith("SAE rank 3 and 1 more: RuntimeError at ")
    assert f"{Path(__file__).name}:" in problem and "torch.Size([128, 0])" in problem


def short_payload(sender: Sender, *args: Any, payload: Any = Sender._payload) -> Tensor:
    rows = payload(sender, *args)
    return rows[:-1] if args[1] == 1 else rows  # to rank 1


def test_a_message_of_another_size_than_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sender, "_payload", short_payload)
    w = workload(tmp_path, topology={"lm": {"tp": 1, "dp": 2}, "sae": {"tp": 4}}, **FLOAT32)
    found = dry_run(w, lambda line: None, gpus_per_node=4)
    # Of the 64 rows of each quarter of the 8 lanes one is missing.
    assert found.problems == (
        "rank 1 (node 0) would hang with rank 4 (node 1): message 1 (LM to SAE) is recv of [64, 256] float32 from rank "
        "4 here, and send of [63, 256] float32 to rank 1 there",
        "rank 4 (node 1) would hang with rank 1 (node 0): message 1 (LM to SAE) is send of [63, 256] float32 to rank 1 "
        "here, and recv of [64, 256] float32 from rank 4 there",
    )


def one_more(place: Shard, *args: Any, sum_in_order: Any = Shard.sum_in_order) -> Tensor:
    if place.size > 1 and place.rank == 2:
        place.all_reduce(args[0])
    return sum_in_order(place, *args)  # type: ignore[no-any-return]


def test_a_collective_that_one_shard_makes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shard, "sum_in_order", one_more)
    found = dried(tmp_path, topology={"lm": {"tp": 1}, "sae": {"tp": 4}}, **FLOAT32)
    (problem,) = found.problems
    assert problem.startswith("rank 2 would hang with rank 0: call ") and "(tp)" in problem


def test_a_plan_of_the_model_that_leaves_out_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = workload(tmp_path, topology={"lm": {"tp": 2}, "sae": {"tp": 1}}, **FLOAT32)
    forget_down_proj(monkeypatch)
    found = dry_run(w, lambda line: None)
    (problem,) = found.problems
    assert problem.startswith("LM rank 1 and 1 more: RuntimeError at ") and "modeling_llama" in problem


def forget_down_proj(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a model's plan for tensor parallelism said nothing of the second matrix of its MLPs."""
    from scale_sae.activations import tensor_parallel

    styles = tensor_parallel.parallel_styles

    def fewer(*args: Any) -> dict[str, Any]:
        return {name: style for name, style in styles(*args).items() if not name.endswith("down_proj")}

    monkeypatch.setattr(tensor_parallel, "parallel_styles", fewer)


def test_one_line_for_each_kind_of_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JobTrainer, "step", fail)
    found = dried(tmp_path, topology={"lm": {"tp": 1}, "sae": {"tp": 2}}, **FLOAT32)
    (problem,) = found.problems
    assert problem.startswith("SAE rank 0 and 1 more: ValueError at ") and problem.endswith("in fail: a first line")


# ---- its parts -------------------------------------------------------------------------------------------------------


def call(op: str = "allreduce", n: int = 1, peer: int | None = None, link: str = "tp") -> Call:
    return Call(link, (0, 1, 2), op, (((n,), torch.float32),), peer)


def test_what_ranks_misunderstand() -> None:
    same = {rank: rank for rank in range(3)}

    def told(*calls: list[Call]) -> list[str]:
        return misunderstandings(dict(enumerate(calls)), same, str)

    assert told([call()], [call()], [call()]) == []
    assert told([call(), call(n=2)], [call(), call(n=2)], [call()]) == [
        "2 would hang with 0: call 2 of their group (tp) is nothing there, and allreduce of [2] float32 here"
    ]
    assert told([call()], [], [call()]) == [
        "1 would hang with 0: call 1 of their group (tp) is nothing there, and allreduce of [1] float32 here"
    ]
    # Those of a group that a rank is no member of are not its own.
    assert told([call(link="dp")], [call(link="dp")], [call(link="dp")], [call(), call()]) == []
    assert told([call("send", 1, peer=1)], [call("recv", 1, peer=0)]) == []
    assert len(told([call("send", 2, peer=1)], [call("recv", 1, peer=0)])) == 2
    assert len(told([call("send", 1, peer=1)], [])) == 1
    assert len(told([call("send", 1, peer=1)] * 2, [call("recv", 1, peer=0)])) == 2
    # One side is a chunk ahead.
    ahead = [call("recv", 1, 0, "header"), call("recv", 1, 0)] * 2
    assert told([call("send", 1, 1, "header"), call("send", 1, 1)], ahead) == []
    assert len(told([call("send", 1, 1, "header")] + 2 * [call("send", 1, 1)], ahead)) == 2


def test_answers_for_values_that_do_not_exist() -> None:
    with open_shapes(Shapes()) as shapes:
        x = torch.zeros(6, 4, device=META)
        assert 6 / x.sum().item() == 6 and (x > 0).sum().item() == 0
        assert x.isfinite().all() and not x.isnan().any() and not (~(x == x).all()).item()
        assert x.norm().isfinite() and not x.norm().isnan() and torch.allclose(x, x + 1)
        assert x[:, (x > 0).any(0)].shape == (6, 4)  # a mask, whose entries are more than one
        assert x[(x > 0).any().expand(6)].shape == (6, 4)
        assert x.to("cpu").device.type == "cpu"
        assert (x > 0).nonzero().shape == (24, 2)
        host = torch.tensor([True, False, True, True, False, False])
        assert x[host.to(META)].shape == (3, 4)  # as many as there are
        shapes.most = 2
        assert x[x[:, 0] > 0].shape == (2, 4) and x.masked_select(x > 0).shape == (2,)
        x[x > 0] = 1
    assert not hasattr(torch, "meta")


def test_attention_makes_no_matrix_where_a_gpu_makes_none() -> None:
    with open_shapes(Shapes()) as shapes:
        q = torch.zeros(2, 4, 512, 16, dtype=torch.bfloat16, device=META)
        attended = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert attended.shape == q.shape and shapes.peak == 2 * q.nbytes


def test_bytes_are_those_that_live_at_once() -> None:
    with open_shapes(Shapes()) as shapes:
        x = torch.zeros(1000, device=META)
        view = x[10:]
        assert (shapes.held, shapes.peak) == (4000, 4000)
        y = view.double()
        del x, view
        assert (shapes.held, shapes.peak) == (990 * 8, 4000 + 990 * 8)
        y.untyped_storage().resize_(0)  # as fully_shard frees parameters
        assert shapes.held == 0
        with shapes.elsewhere():
            z = torch.zeros(50, device=META)
        assert shapes.held == 0
        _ = z * 1
        assert shapes.peak == 4000 + 990 * 8


# ---- a model of 70 billion parameters on 512 GPUs --------------------------------------------------------------------


def llama_70b(folder: Path, architecture: dict[str, Any]) -> Workload:
    """The 80 layers of Llama 3.1 70B, an SAE of 2²⁰ latents on each."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder / "llama")
    return workload(
        folder,
        model={"name": str(folder / "llama"), "dtype": "bfloat16"},
        data={"dataset": "unread", "context_size": 1024, "chunk_contexts": 4},
        hookpoints=["model.layers.*"],
        saes=[{"d_sae": 2**20, "dtype": "bfloat16", "moments_dtype": "bfloat16", **architecture}],
        train={"training_tokens": 10**9, "train_batch_size_tokens": 8192},
        buffer={"tokens": 2**19, "lanes": 64},
        topology={"lm": {"tp": 8, "dp": 10}, "sae": {"groups": 27, "tp": 16}},
    )


@pytest.mark.slow
def test_llama_70b_on_512_ranks(tmp_path: Path) -> None:
    w = llama_70b(tmp_path, {"k": 128})
    begun = time.process_time()
    found = dry_run(w, print, gpus_per_node=8)
    assert time.process_time() - begun < 300
    assert found.problems == ()
    # 26 groups of three SAEs and one of two, and the copies of the model.
    assert sum(run.stands_for for run in found.ranks) == 512 and len(found.ranks) == 16 + 16 + 8


@pytest.mark.slow
def test_errors_of_three_kinds_on_512_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = llama_70b(tmp_path, {"architecture": f"{__name__}:Prefixed"})
    forget_down_proj(monkeypatch)
    monkeypatch.setattr(Shard, "sum_in_order", one_more)
    # The last shard of the groups of three SAEs and of that of two; all copies of the model; one shard of both kinds.
    expected = (
        "SAE rank 15 (node 1) and 25 more: RuntimeError at ",
        "SAE rank 431 (node 53): RuntimeError at ",
        "LM rank 432 (node 54) and 79 more: RuntimeError at ",
        "rank 2 (node 0) would hang with rank 0 (node 0): call ",
        "rank 418 (node 52) would hang with rank 416 (node 52): call ",
    )
    problems = dry_run(w, print, gpus_per_node=8).problems
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True)), problems
