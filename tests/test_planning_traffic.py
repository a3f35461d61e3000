"""The planner's messages against those of real runs, counted at the collectives: equal, call by call."""

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import test_trainer as stream
import torch
from test_traffic import Message, Traffic
from torch import Tensor

import runs
from harness import run_ranks
from scale_sae import config, topology, train
from scale_sae.activations.buffer import LaneBuffer
from scale_sae.activations.schedule import schedule
from scale_sae.engine_settings import deepspeed_settings
from scale_sae.job_trainer import JobTrainer
from scale_sae.planning.traffic import Flow, flows
from scale_sae.planning.workload import Workload
from scale_sae.trainer import Trainer

BATCH, D_SAE, K = 64, 512, 4
MEASURED = 1  # of the steps 0, 1, 2: the only one that does not log
TRANSCODED = {"hookpoint_out": stream.OUT}
NESTED = {"architecture": "matryoshka_batchtopk", "k": K, "matryoshka_widths": [128, 256]}
TOPK_FAMILY: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": K},
    "plain": {"architecture": "topk", "k": K, "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": False},
    "no_aux": {"architecture": "topk", "k": K, "aux_loss_coefficient": 0.0},
    "abstopk": {"architecture": "abstopk", "k": K},
    "batchtopk": {"architecture": "batchtopk", "k": 2.5},
    "nested": NESTED,
    "nested_aux": {**NESTED, "use_matryoshka_aux_loss": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu_pre": {"architecture": "jumprelu", "pre_act_loss_coefficient": 0.1},
    "skip": {"architecture": "skip_transcoder", **TRANSCODED},
    "batch_skip": {"architecture": "batchtopk_skip_transcoder", "k": K, **TRANSCODED},
    "long_window": {"architecture": "topk", "k": K, "dead_feature_window_tokens": 10**6},
}
Calls = Mapping[tuple[str, str, int], Fraction | int]


def calls(found: list[Flow]) -> Calls:
    """(link, operation, bytes) → calls."""
    counts: dict[tuple[str, str, int], Fraction] = {}
    for flow in found:
        key = flow.link, flow.op, flow.bytes
        counts[key] = counts.get(key, Fraction(0)) + flow.count
    return counts


def config_of(
    folder: Path, saes: dict[str, dict[str, Any]], tp: int, dp: int, dtype: str, engine: str
) -> config.RunConfig:
    return config.from_dict(
        {
            "output_dir": str(folder / "run"),
            "model": {"dtype": dtype},
            "hookpoints": [stream.IN],
            "saes": [{"name": name, "d_sae": D_SAE, "dtype": dtype, **entry} for name, entry in saes.items()],
            "train": {
                "training_tokens": 3 * BATCH,
                "train_batch_size_tokens": BATCH,
                "dead_feature_window_tokens": 1,
            },
            "buffer": {"tokens": BATCH, "lanes": 8},
            "topology": {"lm": "colocated", "sae": {"tp": tp, "dp": dp}, "engine": engine},
        }
    )


def kill(job: JobTrainer, count: int) -> None:
    """Makes ``count`` latents dead, at equal distances, and no others."""
    chosen = torch.arange(count) * D_SAE // max(count, 1)
    own = chosen[(chosen >= job.sae.rows.start) & (chosen < job.sae.rows.stop)] - job.sae.rows.start
    job.tokens_since_fired.zero_()
    job.tokens_since_fired[own] = 10**9


def counted(run: config.RunConfig, dead: int) -> list[Calls]:
    """Every rank's calls in a step on made-up rows."""
    made = stream.made_up_rows(3 * BATCH)

    def worker(rank: int, world: int) -> Calls:
        traffic = Traffic()
        w = Workload.of(run)
        store = topology.connect(rank, world, "gloo")
        settings = deepspeed_settings(run.topology, {})
        place = topology.build(w.plan, rank, torch.device("cpu"), "gloo", store, settings)
        trainer = Trainer(run, w.specs, w.widths, schedule(run, stream.CHUNK), place, w.dtype)
        train_step = trainer._train_step

        def step(rows: Any, writer: None) -> None:
            for job in trainer.jobs:
                kill(job, dead)
            train_step(rows, writer)

        trainer._train_step = step  # type: ignore[method-assign,assignment]
        rows = {name: made[name].to(w.dtype) for name in trainer.buffer.rows}
        trainer.fit(stream.Rows(rows, trainer), lambda: False, None)
        assert not any(job.frozen for job in trainer.jobs)
        measured = [m for m in traffic.messages if m.step == MEASURED and m.link in ("tp", "dp")]
        return Counter((m.link, m.call, m.bytes) for m in measured)

    return run_ranks(run.topology.world_size, worker, init=False)


ALL = TOPK_FAMILY | OTHERS
# SAEs, tp, dp, dtype, engine, dead latents; k_aux is 128, half of d_in.
CASES = [
    (ALL, 2, 1, "float32", "local", 0),
    (OTHERS, 2, 2, "bfloat16", "fsdp2", 0),
    (TOPK_FAMILY, 2, 2, "float32", "fsdp2", 3),
    (TOPK_FAMILY, 2, 1, "float64", "local", 200),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (ALL, 4, 1, "float32", "local", 0),
            (ALL, 1, 4, "float32", "fsdp2", 0),
            (ALL, 2, 1, "float32", "fsdp2", 0),
            (ALL, 2, 1, "bfloat16", "local", 0),
            (TOPK_FAMILY, 1, 2, "float32", "fsdp2", 200),
            (TOPK_FAMILY, 2, 2, "bfloat16", "fsdp2", 0),
            (ALL, 2, 2, "float32", "deepspeed", 0),
        )
    ),
]


@pytest.mark.parametrize(("saes", "tp", "dp", "dtype", "engine", "dead"), CASES)
def test_a_step_makes_the_calls_that_are_planned(
    saes: dict[str, dict[str, Any]], tp: int, dp: int, dtype: str, engine: str, dead: int, tmp_path: Path
) -> None:
    run = config_of(tmp_path, saes, tp, dp, dtype, engine)
    w = Workload.of(run)
    [role] = w.roles()
    planned = calls([flow for flow in flows(w, role, None, dead) if flow.link in ("tp", "dp")])
    for found in counted(run, dead):
        assert found == planned


def test_one_rank_moves_nothing(tmp_path: Path) -> None:
    w = Workload.of(config_of(tmp_path, ALL, 1, 1, "float32", "local"))
    [role] = w.roles()
    assert flows(w, role, None) == []


# ---- from the LM to the SAEs -----------------------------------------------------------------------------------------

CHUNK = 8 * 32  # rows of a chunk: all positions of its contexts count
RUNS: dict[str, dict[str, Any]] = {
    "dedicated, LM tp=2": {"lm": {"tp": 2}, "sae": {"tp": 2}},
    "dedicated, LM dp=2": {"lm": {"dp": 2}, "sae": {"tp": 2}},
    "dedicated, groups": {"lm": {"tp": 1}, "sae": {"groups": 2}},
    "colocated, groups": {"lm": "colocated", "sae": {"groups": 2, "tp": 2}},
    "colocated": {"lm": "colocated", "sae": {"dp": 2, "tp": 1}, "engine": "fsdp2"},
}


def whole_run(folder: Path, section: dict[str, Any]) -> tuple[Workload, list[tuple[list[Message], int]]]:
    """The run's workload, and every rank's (messages, chunks that it took into its buffer)."""
    tree = runs.tiny_config(
        folder,
        model={"name": "embedded", "dtype": "float32"},
        saes=[{"name": "small", "d_sae": 512, "k": 8}],
        train={"training_tokens": 12 * 128, "train_batch_size_tokens": 128},
        topology=section,
    )
    tree["data"]["exclude_special_tokens"] = False
    path = runs.write_config(folder, tree)
    w = Workload.of(config.load(str(path), {}))

    def worker(rank: int, world: int) -> tuple[list[Message], int]:
        traffic = Traffic()
        counts: list[int] = []
        insert = LaneBuffer.insert

        def inserted(buffer: LaneBuffer, chunk: dict[str, Tensor], count: int) -> None:
            counts.append(count)
            insert(buffer, chunk, count)

        LaneBuffer.insert = inserted  # type: ignore[method-assign,assignment]
        assert train.run(str(path), (), {}) == 0
        assert set(counts) <= {CHUNK}
        return traffic.messages, len(counts)

    return w, run_ranks(w.plan.world_size, worker, init=False, timeout=180)


def per_chunk(w: Workload, found: list[Flow]) -> Calls:
    """Calls on the way from the LM to the SAEs, for each chunk of the stream."""
    counts = calls([flow for flow in found if flow.link == "LM to SAE"])
    return {key: count / w.chunks_per_step for key, count in counts.items()}


QUICK = ("dedicated, LM tp=2", "colocated, groups")
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name not in QUICK)]


def times_of(w: Workload, rank: int, chunks: int) -> dict[str, Fraction | int]:
    """How often a rank makes, in a run of as many chunks, the calls of one chunk of the stream."""
    copies = len(w.plan.lm)
    replica = w.plan.replica_of(rank)
    if replica is None:
        return {"recv": chunks + copies}  # one message more of each copy says that it ends
    own = len(range(replica, chunks, copies))
    if w.plan.group_of(rank) is None:
        return {"send": (own + 1) * copies}
    return {"send": own * copies, "recv": (chunks - own) * Fraction(copies, copies - 1)}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_sends_what_is_planned(name: str, tmp_path: Path) -> None:
    w, ranks = whole_run(tmp_path, RUNS[name])
    assert w.rows_per_chunk == CHUNK and w.chunks_per_step == Fraction(128, CHUNK)
    chunks = ranks[0][1]
    assert chunks == w.chunks
    for role in w.roles():
        planned = flows(w, role, None)
        each, in_a_step = per_chunk(w, planned), calls([flow for flow in planned if flow.link in ("tp", "dp")])
        for rank in role.ranks:
            messages, times = ranks[rank][0], times_of(w, rank, chunks)
            moved = [m for m in messages if m.link in ("LM", "header") and m.call in ("send", "recv")]
            found = Counter(("LM to SAE", m.call, m.bytes) for m in moved)
            assert found == {key: count * times[key[1]] for key, count in each.items()}
            inside = [m for m in messages if m.step == MEASURED and m.link in ("tp", "dp")]
            assert Counter((m.link, m.call, m.bytes) for m in inside) == in_a_step
