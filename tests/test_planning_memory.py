"""The planner's memory against that of real steps: tensors that are there exactly, peaks within a tenth."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from harness import run_ranks
from scale_sae import bench, config, topology
from scale_sae.activations.transport import Receiver, Sender, Start
from scale_sae.job_trainer import JobTrainer
from scale_sae.kernels import plain
from scale_sae.planning import step_memory
from scale_sae.planning.language_model import LMProfile
from scale_sae.planning.memory import Item, items
from scale_sae.planning.traffic import flows
from scale_sae.planning.workload import Role, Workload
from scale_sae.profiling import peak_memory

MIB = 2**20
CPU = torch.device("cpu")


def config_of(
    folder: Path, saes: list[dict[str, Any]], batch: int, dtype: str = "float32", mib: int = 4, **sections: Any
) -> config.RunConfig:
    """A colocated run at a hookpoint of width 256; ``mib`` of pre-activations at once."""
    grid = {"lm": "colocated", "sae": {"tp": 1}, "pre_activation_mib": mib}
    return config.from_dict(
        {
            "output_dir": str(folder / "run"),
            "recipe": "saelens",
            "model": {"dtype": dtype},
            "hookpoints": ["model.layers.0"],
            "saes": [{"name": f"sae{i}", "dtype": dtype, **entry} for i, entry in enumerate(saes)],
            "train": {"training_tokens": 10**12, "train_batch_size_tokens": batch, **sections.get("train", {})},
            "logging": {"log_every_steps": 10**12},
            "buffer": {"tokens": batch, "lanes": 8},
            "topology": grid | sections.get("topology", {}),
        }
    )


def by_name(found: list[Item]) -> dict[str, int]:
    return {item.what: item.bytes for item in found}


def planned(run: config.RunConfig, dead: int = 0) -> dict[str, int]:
    """What one of the ranks holds, which are alike; with chunks of a batch, as `bench` makes them."""
    w = Workload.of(run)
    sizes = replace(w.schedule, chunk_rows=w.batch)
    w = replace(w, schedule=sizes, rows_per_chunk=w.batch)
    [role] = w.roles()
    return by_name(items(w, role, None, "cpu", dead))


# ---- the step --------------------------------------------------------------------------------------------------------


def state(job: JobTrainer) -> tuple[int, int]:
    """Bytes of an SAE's parameters, masters included, and of its moments."""
    tensors = [*job.engine.parameters.values(), *job.sae.parameters()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    moments = [of[name] for of in job.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return sum(storages.values()), sum(tensor.nbytes for tensor in moments)


def kill(job: JobTrainer, count: int) -> None:
    """Makes ``count`` latents dead, at equal distances, and no others."""
    d_sae = job.spec.cfg.d_sae
    chosen = torch.arange(count) * d_sae // max(count, 1)
    own = chosen[(chosen >= job.sae.rows.start) & (chosen < job.sae.rows.stop)] - job.sae.rows.start
    job.tokens_since_fired.zero_()
    job.tokens_since_fired[own] = 10**9


def measured(run: config.RunConfig, dead: int) -> dict[str, int]:
    """Rank 0's bytes: the peak of a whole step without the stream's own rows, and what is there between steps."""

    def worker(rank: int, world: int) -> dict[str, int]:
        store = topology.connect(rank, world, "gloo")
        with peak_memory(CPU) as memory:
            trainer, stream = bench.trainer_of(run, rank, CPU, "gloo", store)
            for rows in stream.rows.values():
                rows[0] *= 1000  # left out, so that the others are copied
            trainer.interleaver.run = bench._one_by_one  # type: ignore[method-assign]
            for _ in range(2):
                trainer.advance(stream)
            memory.restart()
            for job in trainer.jobs:
                kill(job, dead)
            trainer.advance(stream)
        given = sum(rows.nbytes for rows in stream.rows.values())
        parameters, moments = (sum(parts) for parts in zip(*map(state, trainer.jobs), strict=True))
        return {
            "peak": memory.bytes - given,
            "buffer": sum(rows.nbytes for rows in trainer.buffer.rows.values()),
            "SAE parameters": parameters,
            "optimizer state": moments,
        }

    return run_ranks(run.topology.world_size, worker, init=False)[0]


TOPK = {"architecture": "topk", "d_sae": 4096, "k": 16}
BATCH = {"architecture": "batchtopk", "d_sae": 4096, "k": 16}
NESTED = {**BATCH, "architecture": "matryoshka_batchtopk", "matryoshka_widths": [256, 1024]}
DENSE = {"d_sae": 2048}
FSDP2 = {"sae": {"dp": 2}, "engine": "fsdp2"}
SOON_DEAD = {"train": {"dead_feature_window_tokens": 1}}
# name → (SAEs, batch, other settings). The peak is in the backward pass, but for the names that say another phase.
QUICK: dict[str, tuple[list[dict[str, Any]], int, dict[str, Any]]] = {
    "topk": ([TOPK], 4096, {}),
    "topk in bfloat16, update": ([TOPK], 1024, {"dtype": "bfloat16", "train": {"moments_dtype": "bfloat16"}}),
    "two topk": ([TOPK, {**TOPK, "d_sae": 2048}], 4096, {}),
    "standard": ([{"architecture": "standard", **DENSE}], 2048, {}),
    "topk, tp=2": ([TOPK], 4096, {"topology": {"sae": {"tp": 2}}}),
    "topk, fsdp2, reduce-scatter": ([{**TOPK, "d_sae": 8192}], 512, {"topology": FSDP2}),
}
SLOW: dict[str, tuple[list[dict[str, Any]], int, dict[str, Any]]] = {
    "batchtopk, selection": ([{**BATCH, "k": 64}], 4096, {"mib": 16}),
    "topk, selection": ([{**TOPK, "d_sae": 16384, "k": 64}], 2048, {"mib": 128}),
    "topk, few dead": ([TOPK], 4096, SOON_DEAD),
    "topk, many dead": ([TOPK], 4096, SOON_DEAD),
    "batchtopk, tp=2, many dead": ([BATCH], 2048, SOON_DEAD | {"topology": {"sae": {"tp": 2}}}),
    "topk, update": ([{**TOPK, "d_sae": 8192, "k": 128}], 2048, {}),
    "topk in bfloat16": ([TOPK], 4096, {"dtype": "bfloat16"}),
    "batchtopk": ([BATCH], 4096, {}),
    "matryoshka": ([NESTED], 4096, {}),
    "gated": ([{"architecture": "gated", **DENSE}], 2048, {}),
    "jumprelu": ([{"architecture": "jumprelu", **DENSE}], 2048, {}),
    "standard in bfloat16": ([{"architecture": "standard", **DENSE}], 2048, {"dtype": "bfloat16"}),
    "gated in bfloat16": ([{"architecture": "gated", **DENSE}], 2048, {"dtype": "bfloat16"}),
    "jumprelu in bfloat16": ([{"architecture": "jumprelu", **DENSE}], 2048, {"dtype": "bfloat16"}),
    "batchtopk, tp=2": ([BATCH], 4096, {"topology": {"sae": {"tp": 2}}}),
    "standard, tp=2": ([{"architecture": "standard", "d_sae": 4096}], 1024, {"topology": {"sae": {"tp": 2}}}),
    "topk, fsdp2": ([{**TOPK, "d_sae": 2048}], 8192, {"topology": FSDP2}),
    "topk, fsdp2, one rank": ([TOPK], 2048, {"topology": {"engine": "fsdp2"}}),
    "jumprelu, fsdp2, bfloat16": (
        [{"architecture": "jumprelu", **DENSE}],
        2048,
        {"dtype": "bfloat16", "topology": FSDP2},
    ),
    "topk, deepspeed": ([TOPK], 2048, {"topology": {"sae": {"dp": 2}, "engine": "deepspeed"}}),
}
CASES = QUICK | SLOW
# Nothing in these is a bound; what is left out are numbers of a row or a latent, some 0.2 %.
EXACT = ("topk", "two topk", "topk in bfloat16, update", "topk, update", "topk in bfloat16", "batchtopk", "matryoshka")
# All others: what the planner promises; the last is tight, since other phases come near to its own.
TOLERANCES = dict.fromkeys(EXACT, 0.01) | {"topk, fsdp2, reduce-scatter": 0.05}
DEAD = {"topk, few dead": 100, "topk, many dead": 2000, "batchtopk, tp=2, many dead": 1000}


def freed_late(run: config.RunConfig) -> int:
    """A message: gloo's threads may free their copy of one while the step goes on."""
    w = Workload.of(run)
    [role] = w.roles()
    return max((flow.bytes for flow in flows(w, role, None) if flow.link in ("tp", "dp")), default=0)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_step_holds_what_is_planned(name: str, tmp_path: Path) -> None:
    saes, batch, settings = CASES[name]
    run = config_of(tmp_path, saes, batch, **settings)
    dead = DEAD.get(name, 0)
    plan, found = planned(run, dead), measured(run, dead)
    for what in ("buffer", "SAE parameters", "optimizer state"):
        assert plan[what] == found[what], what
    # The stream of `bench` is no transport, and a bench writes no checkpoint.
    total = sum(plan.values()) - sum(plan.get(what, 0) for what in ("transport", "checkpoint", "allocator"))
    print(f"{name}: planned {total / MIB:.1f} MiB, found {found['peak'] / MIB:.1f} MiB")
    tolerance = TOLERANCES.get(name, 0.1)
    assert (1 - tolerance) * total <= found["peak"] <= (1 + tolerance) * total + freed_late(run)


def test_rows_of_a_gradient_at_once_are_those_of_the_kernel() -> None:
    assert step_memory.BLOCK_BYTES == plain._BLOCK_BYTES


def test_two_saes_take_turns_only_where_a_step_waits(tmp_path: Path) -> None:
    found = {}
    for n in (1, 2):
        for tp in (1, 2):
            run = config_of(tmp_path, [TOPK] * n, 4096, topology={"sae": {"tp": tp}})
            found[n, tp] = planned(run)
    for what in ("reconstructions", "codes", "pre-activations"):
        assert found[2, 1][what] == found[1, 1][what]
        assert found[2, 2][what] == 2 * found[1, 2][what]


# ---- on the way from the LM ------------------------------------------------------------------------------------------


def dedicated(folder: Path) -> Workload:
    """3 SAE ranks of 3 groups with two hookpoints, 2 LM ranks."""
    run = config_of(folder, [{**TOPK, "d_sae": 64}], 32, topology={"lm": {"tp": 2}, "sae": {"tp": 2}})
    return Workload.of(replace(run, hookpoints=("model.layers.0", "model.layers.1")))


def test_messages_under_way_take_what_is_planned(tmp_path: Path) -> None:
    w = dedicated(tmp_path)
    rows = {name: torch.ones(w.schedule.chunk_rows, width) for name, width in w.widths.items()}

    def worker(rank: int, world: int) -> int:
        store = topology.connect(rank, world, "gloo")
        place = topology.build(w.plan, rank, CPU, "gloo", store)
        if place.group is None:
            sender = Sender(place, w.widths, w.schedule, w.dtype)
            for chunk in range(2):
                sender.send(chunk, chunk * w.schedule.chunk_rows, w.schedule.chunk_rows, rows, {})
            payloads = [tensor for _, tensors in sender.in_flight for tensor in tensors[1:]]
            sender.close()
            return sum(tensor.nbytes for tensor in payloads)
        receiver = Receiver(place, w.widths, w.schedule, w.dtype, Start(0, 0))
        held = sum(t.nbytes for _, _, tensors in receiver.posted.values() for t in tensors.values())
        assert receiver.next_chunk() is not None
        receiver.close()
        return held

    found = run_ranks(w.plan.world_size, worker, init=False)
    of_roles = {role.kind: by_name(items(w, role, None, "cpu"))["transport"] for role in w.roles()}
    assert found == [of_roles["SAE"]] * 2 + [of_roles["LM"]] * 2


PROFILE = LMProfile(tp=1, weights=7 * MIB, weights_whole=7 * MIB, peak=900 * MIB, captured=5 * MIB, ops=(), flows=())


def test_ranks_of_a_dedicated_language_model(tmp_path: Path) -> None:
    w = dedicated(tmp_path)
    role = w.roles()[-1]
    found = by_name(items(w, role, PROFILE, "cuda"))
    assert list(found) == ["LM weights", "LM activations", "transport"]
    assert found["LM weights"] == 7 * MIB and found["LM activations"] == 900 * MIB


def colocated(folder: Path, peak: int) -> tuple[Workload, Role, LMProfile]:
    w = Workload.of(config_of(folder, [TOPK], 4096))
    return w, w.roles()[0], replace(PROFILE, peak=peak)


def test_in_a_colocated_run_the_fuller_of_model_and_step_counts(tmp_path: Path) -> None:
    model = by_name(items(*colocated(tmp_path, 900 * MIB), "cuda"))
    step = by_name(items(*colocated(tmp_path, MIB), "cuda"))
    assert model["LM activations"] == 900 * MIB and not model.keys() & {"reconstructions", "codes"}
    assert step["reconstructions"] == 6 * 4096 * 256 * 4 and "LM activations" not in step
    # A GPU keeps no memory for pre-activations, and checkpoints are written from the CPU's.
    assert not step.keys() & {"pre-activations", "checkpoint"}


def test_on_a_cpu_both_count_and_as_much_stays_freed(tmp_path: Path) -> None:
    w, role, lm = colocated(tmp_path, 900 * MIB)
    found, step = (by_name(items(w, role, profile, "cpu")) for profile in (lm, None))
    assert found["LM activations"] == 900 * MIB and found["reconstructions"] == step["reconstructions"]
    assert found["allocator"] == step["allocator"] + 900 * MIB
    assert step["allocator"] >= step["reconstructions"] + step["codes"]


def test_a_cached_run_has_no_language_model(tmp_path: Path) -> None:
    run = config_of(tmp_path, [TOPK], 4096, topology={"lm": {"cache": "somewhere"}, "sae": {"tp": 1}})
    w = Workload.of(run)
    found = by_name(items(w, w.roles()[0], None, "cuda"))
    assert not found.keys() & {"LM weights", "LM activations", "transport"}


def test_items_have_one_name_each_and_say_how_to_change_them(tmp_path: Path) -> None:
    w = Workload.of(config_of(tmp_path, [TOPK, TOPK], 4096, topology={"sae": {"tp": 2}}))
    found = items(w, w.roles()[0], PROFILE, "cpu")
    assert len({item.what for item in found}) == len(found)
    assert all(item.bytes > 0 and item.formula and item.keys for item in found)
    assert [item.what for item in found] == [name for name in ORDER if name in by_name(found)]


ORDER = (
    *("LM weights", "LM activations", "SAE parameters", "gradients", "optimizer state", "codes", "reconstructions"),
    *("pre-activations", "batch", "buffer", "transport", "checkpoint", "counters and rest", "allocator"),
)
