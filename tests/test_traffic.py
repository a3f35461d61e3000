"""What crosses the links in a training step, counted at the collectives, against formulas written out here.

Bytes are those of one rank: of an all-gather all that it ends up with, of a reduce-scatter all that it begins with, of
an all-reduce twice its tensor (it is one after the other), of a message from rank to rank that message. W are the tp
ranks, P the dp ranks, so that a rank has B / P of a batch's rows and d_sae / W of the latents.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import test_trainer as stream
import torch
import torch.distributed as dist
from torch import Tensor

import runs
from harness import run_ranks
from scale_sae import config, topology, train
from scale_sae.activations.buffer import LaneBuffer
from scale_sae.activations.schedule import schedule
from scale_sae.activations.transport import HEADER_BYTES
from scale_sae.job_trainer import JobTrainer
from scale_sae.jobs import resolve
from scale_sae.topology import Topology
from scale_sae.trainer import Trainer


@dataclass(frozen=True)
class Message:
    """One call: ``step`` and ``job`` in which it was made (None: outside), bytes as above, elements of its tensors."""

    step: int | None
    job: str | None
    link: str
    call: str
    bytes: int
    elements: int


class Traffic:
    """Counts every call of every process group of this process, which must be one that ends with the test."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.links: dict[str, str] = {}
        self.step: int | None = None
        self.here = threading.local()
        counted: dict[str, tuple[str, Callable[..., int]]] = {
            "allreduce": ("all_reduce", lambda tensors, *rest: 2 * _bytes(tensors)),
            "allgather": ("all_gather", lambda outputs, own, *rest: _bytes(outputs)),
            "gather": ("gather", lambda outputs, own, *rest: _bytes(outputs) or _bytes(own)),
            "send": ("send", lambda tensors, *rest: _bytes(tensors)),
            "recv": ("recv", lambda tensors, *rest: _bytes(tensors)),
            "broadcast": ("broadcast", lambda tensors, *rest: _bytes(tensors)),
        }
        # Newer torch renames two.
        for name in ("all_gather_single", "_allgather_base"):
            counted[name] = ("all_gather", lambda output, own, *rest: _bytes(output))
        for name in ("reduce_scatter_single", "_reduce_scatter_base"):
            counted[name] = ("reduce_scatter", lambda output, whole, *rest: _bytes(whole))
        others = ("alltoall", "alltoall_base", "all_to_all_single", "scatter", "reduce", "reduce_scatter")
        coalesced = [name for name in dir(dist.ProcessGroup) if "coalesced" in name]
        for name, (call, count) in counted.items():
            if hasattr(dist.ProcessGroup, name):
                self._wrap(name, call, count)
        for name in (*others, *coalesced):
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, _refused(name))
        self._follow()

    def _wrap(self, name: str, call: str, count: Callable[..., int]) -> None:
        original = getattr(dist.ProcessGroup, name)

        def counted(group: dist.ProcessGroup, *args: Any, **keys: Any) -> Any:
            link = self.links.get(group.group_name, "control")
            elements = sum(tensor.numel() for tensor in _tensors(args[:1])) if args else 0
            elements = max([elements, *(tensor.numel() for tensor in _tensors(args[1:2]))])
            job = getattr(self.here, "job", None)
            self.messages.append(Message(self.step, job, link, call, count(*args), elements))
            return original(group, *args, **keys)

        setattr(dist.ProcessGroup, name, counted)

    def _follow(self) -> None:
        """Learns which group is which link, and in which step and job a call is made."""
        build, announce, step = topology.build, Trainer._announce, JobTrainer.step

        def built(*args: Any) -> Topology:
            place = build(*args)
            for handle, link in (
                (place.shard.group, "tp"),
                (place.shard.dp.group, "dp"),
                *((handle, "LM") for handle in place.data.values()),
                *((handle, "header") for handle in place.header.values()),
            ):
                if handle is not None:
                    self.links[handle.group_name] = link
            return place

        def announced(trainer: Trainer, stop: bool) -> Any:
            self.step = trainer.step
            return announce(trainer, stop)

        def stepped(job: JobTrainer, *args: Any) -> Any:
            self.here.job = job.spec.sae_id.rpartition("/")[2]
            try:
                return step(job, *args)
            finally:
                self.here.job = None

        topology.build, Trainer._announce, JobTrainer.step = built, announced, stepped  # type: ignore[assignment]


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def _bytes(value: object) -> int:
    return sum(tensor.nbytes for tensor in _tensors(value))


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **keys: Any) -> Any:
        raise AssertionError(f"{name} is not counted yet")

    return refuse


# ---- inside a group --------------------------------------------------------------------------------------------------

BATCH, D_IN, D_SAE, K = 512, 16, 2048, 4
K_AUX = 6
MEASURED = 1  # of the steps 0, 1, 2: the only one that does not log
DYING = {"dead_feature_window_tokens": 1, "k_aux": K_AUX}
SAES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": K},
    "few_dead": {"architecture": "topk", "k": K, **DYING},
    "many_dead": {"architecture": "topk", "k": K, **DYING},
    "batchtopk": {"architecture": "batchtopk", "k": K},
    "jumprelu": {"architecture": "jumprelu", "pre_act_loss_coefficient": 0.1},
}
DEAD = {"few_dead": 3, "many_dead": 12}  # latents that are made dead; more than K_AUX of them must be chosen from


@dataclass(frozen=True)
class Sizes:
    """B, d_in, d_sae, W, P, the bytes of a number (activations, parameters alike), dead latents."""

    batch: int
    d_in: int
    d_sae: int
    k: int
    tp: int
    dp: int
    itemsize: int
    dead: int = 0

    @property
    def rows(self) -> int:
        return self.batch // self.dp

    @property
    def latents(self) -> int:
        return self.d_sae // self.tp


Expected = Counter[tuple[str, str, int]]


def of_the_batch(s: Sizes) -> Expected:
    """Before the SAEs, per hookpoint: x over tp, and every row's norm (float32) over dp."""
    found = Expected()
    if s.tp > 1:
        found["tp", "all_gather", s.rows * s.d_in * s.itemsize] += 1
    if s.dp > 1:
        found["dp", "all_gather", s.batch * 4] += 1
    return found


def of_an_sae(architecture: str, s: Sizes) -> Expected:
    """What one SAE sends in a step that does not log, but for numbers that are few."""
    histograms = [2**15 + 1, *[2**16] * (s.itemsize // 2 - 1)]  # of 4 bytes; one carries a flag
    found = Expected()
    if s.tp > 1:
        reconstructions = 1 + (s.dead > 0)
        found["tp", "all_reduce", 2 * s.rows * s.d_in * s.itemsize * reconstructions] += 1
        if architecture == "topk":
            found["tp", "all_gather", s.tp * s.rows * s.k * s.itemsize] += 1
        if s.dead > K_AUX:
            found["tp", "all_gather", s.tp * s.rows * K_AUX * s.itemsize] += 1
        if architecture == "batchtopk":
            found.update(("tp", "all_reduce", 2 * 4 * bins) for bins in histograms)
            found["tp", "all_gather", s.tp * s.rows * 4] += 1  # ties of each row
        if architecture == "jumprelu":
            # A sum over the latents of each row, per penalty, in float32 at least.
            found["tp", "all_reduce", 2 * s.rows * max(4, s.itemsize)] += 2
    if s.dp > 1:
        # W_enc, W_dec and the vectors over latents; gradients are summed in float32 at least.
        wide = max(4, s.itemsize)
        divided = 2 + (architecture == "jumprelu" and s.itemsize == wide)
        numbers = s.latents * (2 * s.d_in + divided - 1)
        found["dp", "all_gather", numbers * s.itemsize] += 1
        found["dp", "reduce_scatter", numbers * wide] += 1
        if architecture == "jumprelu" and s.itemsize < wide:
            found["dp", "all_gather", s.dp * s.latents * wide] += 1  # thresholds stay whole, and so their gradient
        if architecture == "batchtopk":
            found.update(("dp", "all_reduce", 2 * 4 * bins) for bins in histograms)
        found["dp", "all_reduce", 2 * 8 * s.latents] += 1  # rows on which each latent fired
    return found


def assert_is(messages: list[Message], expected: Expected, s: Sizes, jobs: int = 1) -> None:
    """``messages`` are those expected, and what is left are b_dec's gradient and 8 numbers per job and link."""
    for link, ranks in (("tp", s.tp), ("dp", s.dp)):
        mine = [message for message in messages if message.link == link]
        found = Counter((message.link, message.call, message.bytes) for message in mine)
        wanted = Counter({key: n for key, n in expected.items() if key[0] == link})
        assert not wanted - found
        of_b_dec, of_a_number = (max(2, ranks) * size for size in (4 * s.d_in, 8))
        left = [size for (_, _, size), n in (found - wanted).items() for _ in range(n)]
        assert max(left, default=0) <= of_b_dec and sum(left) <= jobs * (of_b_dec + 8 * of_a_number)
    assert {message.link for message in messages} <= {"tp", "dp"}


def kill(job: JobTrainer) -> None:
    """Makes as many latents dead as ``DEAD`` says, spread over the shards, and no others."""
    count = DEAD.get(job.spec.sae_id.rpartition("/")[2], 0)
    chosen = torch.arange(count) * 169
    own = chosen[(chosen >= job.sae.rows.start) & (chosen < job.sae.rows.stop)] - job.sae.rows.start
    job.tokens_since_fired.zero_()
    job.tokens_since_fired[own] = 10**6


def measured(tp: int, dp: int, dtype: str, folder: Path) -> list[list[Message]]:
    """Every rank's messages in three steps of all of ``SAES`` at one hookpoint."""
    run = config.from_dict(
        {
            "output_dir": str(folder / "run"),
            "model": {"dtype": dtype},
            "hookpoints": [stream.IN],
            "saes": [{"name": name, "d_sae": D_SAE, "dtype": dtype, **entry} for name, entry in SAES.items()],
            "train": {"training_tokens": 3 * BATCH, "train_batch_size_tokens": BATCH},
            "buffer": {"tokens": BATCH, "lanes": 8},
            "topology": {
                "lm": "colocated",
                "sae": {"tp": tp, "dp": dp},
                "engine": "fsdp2" if dp > 1 else "local",
            },
        }
    )
    draw = torch.Generator().manual_seed(0)
    rows = {stream.IN: torch.randn(3 * BATCH, D_IN, generator=draw).to(getattr(torch, dtype))}

    def worker(rank: int, world: int) -> list[Message]:
        traffic = Traffic()
        store = topology.connect(rank, world, "gloo")
        _, specs = resolve(run)
        # A model so narrow that nothing else hides what is as large as batch times latents.
        specs = [replace(spec, cfg=replace(spec.cfg, d_in=D_IN)) for spec in specs]
        planned = topology.plan(run.topology, [spec.planned for spec in specs], run.buffer.lanes)
        place = topology.build(planned, rank, torch.device("cpu"), "gloo", store)
        trainer = Trainer(run, specs, {stream.IN: D_IN}, schedule(run, stream.CHUNK), place, getattr(torch, dtype))
        train_step = trainer._train_step

        def step(rows: Any, writer: None) -> None:
            for job in trainer.jobs:
                kill(job)
            train_step(rows, writer)

        trainer._train_step = step  # type: ignore[method-assign,assignment]
        trainer.fit(stream.Rows(rows, trainer), lambda: False, None)
        assert not any(job.frozen for job in trainer.jobs)
        return traffic.messages

    return run_ranks(run.topology.world_size, worker, init=False)


GRIDS = [(tp, dp, "float32") for dp in (1, 2) for tp in (1, 2, 4)] + [(2, 2, "bfloat16")]


@pytest.mark.parametrize(("tp", "dp", "dtype"), GRIDS)
def test_a_step_sends_what_the_table_says(tp: int, dp: int, dtype: str, tmp_path: Path) -> None:
    s = Sizes(BATCH, D_IN, D_SAE, K, tp, dp, getattr(torch, dtype).itemsize)
    for messages in measured(tp, dp, dtype, tmp_path):
        step = [message for message in messages if message.step == MEASURED]
        # Nothing is as large as the dense activations of this rank's rows and latents.
        assert all(message.elements < s.rows * s.latents for message in messages if message.link in ("tp", "dp"))
        others = [message for message in step if message.job is None]
        assert [m.bytes for m in others if m.link == "control"] == [2 * 8]  # whether anybody was asked to stop
        assert_is([m for m in others if m.link != "control"], of_the_batch(s), s)
        for name, entry in SAES.items():
            expected = of_an_sae(entry["architecture"], replace(s, dead=DEAD.get(name, 0)))
            assert_is([message for message in step if message.job == name], expected, s)


# ---- from the LM to the SAEs -----------------------------------------------------------------------------------------

WIDTH, LANES, CHUNK_ROWS = 256, 8, 8 * 32  # of the embedded model; contexts of a chunk times their positions
# name → (topology, ranks, of which hold SAEs, SAE groups)
RUNS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "dedicated, LM tp=2": ({"lm": {"tp": 2}, "sae": {"tp": 4}}, 6, 4, 1),
    "dedicated, LM dp=2": ({"lm": {"dp": 2}, "sae": {"dp": 2, "tp": 1}, "engine": "fsdp2"}, 4, 2, 1),
    "dedicated, groups": ({"lm": {"tp": 1}, "sae": {"groups": 2}}, 3, 2, 2),
    "colocated": ({"lm": "colocated", "sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"}, 4, 4, 1),
}


def whole_run(name: str, folder: Path) -> list[tuple[list[Message], list[int]]]:
    """Every rank's (messages, rows of each chunk that it took into its buffer)."""
    section, world, _, _ = RUNS[name]
    run = runs.tiny_config(
        folder,
        model={"name": "embedded", "dtype": "float32"},
        saes=[{"name": "small", "d_sae": 512, "k": 8}],
        train={"training_tokens": 12 * 128, "train_batch_size_tokens": 128},
        topology=section,
    )
    path = runs.write_config(folder, run)

    def worker(rank: int, world: int) -> tuple[list[Message], list[int]]:
        traffic = Traffic()
        counts: list[int] = []
        insert = LaneBuffer.insert

        def inserted(buffer: LaneBuffer, chunk: dict[str, Tensor], count: int) -> None:
            counts.append(count)
            insert(buffer, chunk, count)

        LaneBuffer.insert = inserted  # type: ignore[method-assign,assignment]
        assert train.run(str(path), (), {}) == 0
        return traffic.messages, counts

    return run_ranks(world, worker, init=False, timeout=180)


@pytest.mark.parametrize("name", RUNS)
def test_each_row_reaches_each_group_once(name: str, tmp_path: Path) -> None:
    section, world, n_sae, groups = RUNS[name]
    found = whole_run(name, tmp_path)
    counts = found[0][1]
    assert all(own == counts for _, own in found[:n_sae])
    assert len(counts) > 4 and sum(counts) >= 12 * 128
    assert sum(counts[:-1]) < 12 * 128 + CHUNK_ROWS * world  # no more than the run needs, but for a round
    hookpoints = 2 // groups  # each of the two is one group's
    a_row = WIDTH * 4 * hookpoints
    lanes = LANES // (n_sae // groups)  # of each SAE rank
    received, sent = [], []
    for messages, _ in found:
        received.append([m.bytes for m in messages if (m.link, m.call) == ("LM", "recv")])
        sent.append([m.bytes for m in messages if (m.link, m.call) == ("LM", "send")])
    if name.startswith("dedicated"):
        replicas = section["lm"].get("dp", 1)
        # A chunk's message has room for the most rows that a chunk can have; one more per replica says that it ends.
        a_message = CHUNK_ROWS // LANES * lanes * WIDTH * 4
        messages_each = (len(counts) + replicas) * hookpoints
        assert received[:n_sae] == [[a_message] * messages_each] * n_sae
        assert not any(received[n_sae:]) and not any(sent[:n_sae])
        # Of all senders together; the tp ranks of a replica share the receivers.
        assert sum(map(sum, sent)) == (len(counts) + replicas) * CHUNK_ROWS * a_row * groups
        share = n_sae // section["lm"].get("tp", 1)
        assert {len(s) % (share * hookpoints) for s in sent[n_sae:]} == {0}
        headers = [m for messages, _ in found for m in messages if m.link == "header" and m.call == "recv"]
        assert {m.bytes for m in headers} == {HEADER_BYTES}
        assert len(headers) == (len(counts) + replicas) * n_sae
    else:
        first = [0, *accumulate(counts)]
        for rank in range(world):
            block = range(rank * lanes, (rank + 1) * lanes)
            rows = [
                sum(i % LANES in block for i in range(first[c], first[c + 1]))
                for c in range(len(counts))
                if c % world != rank  # its own LM gives the others
            ]
            assert sum(received[rank]) == sum(rows) * a_row
            kept = sum(count for c, count in enumerate(counts) if c % world == rank)
            own = sum(
                i % LANES in block for c in range(rank, len(counts), world) for i in range(first[c], first[c + 1])
            )
            assert sum(sent[rank]) == (kept - own) * a_row
    for messages, _ in found:
        # Also while the run starts and ends: what passes is no more than a header.
        small = [m.bytes for m in messages if m.link == "control"]
        assert small and max(small) <= HEADER_BYTES
    check_steps(name, [messages for messages, _ in found[:n_sae]])


def check_steps(name: str, ranks: list[list[Message]]) -> None:
    """Inside a group a whole run sends what a step on made-up rows sends."""
    section, _, _, groups = RUNS[name]
    grid, jobs = section["sae"], 2 // groups
    s = Sizes(128, WIDTH, 512, 8, grid.get("tp", 1), grid.get("dp", 1), 4)
    expected = Counter({key: jobs * n for key, n in (of_the_batch(s) + of_an_sae("topk", s)).items()})
    for messages in ranks:
        for step in (1, 5):
            inside = [message for message in messages if message.step == step and message.link in ("tp", "dp")]
            assert_is(inside, expected, s, jobs)
