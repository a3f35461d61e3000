"""SAEs that train in turns: the same results in the same order on all ranks, and messages that pass meanwhile."""

import gc
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_trainer as stream
import torch
import torch.distributed as dist
from torch import Tensor

import runs  # noqa: F401 (imports transformers before the ranks are forked, so that each need not)
from harness import run_ranks
from scale_sae import collectives
from scale_sae.collectives import NonFiniteError
from scale_sae.config import from_dict, to_dict
from scale_sae.errors import UserError
from scale_sae.interleave import Interleaver, pause
from scale_sae.job_trainer import JobTrainer
from scale_sae.saes import TrainStepInput
from scale_sae.saes.topk import TopKTrainingSAE
from scale_sae.trainer import Trainer

CPU = torch.device("cpu")


class Tasks:
    """Tasks that note what happens to them, each as (its number, how often it has paused)."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int | str]] = []
        self.threads: set[int] = set()

    def task(self, number: int, pauses: int, end: Exception | None = None) -> Callable[[], int]:
        def run() -> int:
            self.threads.add(threading.get_ident())
            try:
                for paused in range(pauses):
                    self.events.append((number, paused))
                    pause()
                self.events.append((number, pauses))
                if end is not None:
                    raise end
                return number
            finally:
                self.events.append((number, "end"))

        return run


def test_two_threads_take_turns_in_an_order_that_follows_from_the_tasks() -> None:
    tasks = Tasks()
    found = Interleaver(CPU).run([tasks.task(0, 1), tasks.task(1, 3), tasks.task(2, 1), tasks.task(3, 0)], ValueError)
    assert found == [0, 1, 2, 3]
    first = [(0, 0), (1, 0), (0, 1), (0, "end"), (2, 0), (1, 1)]  # whoever is done takes the next
    then = [(2, 1), (2, "end"), (3, 0), (3, "end"), (1, 2), (1, 3), (1, "end")]
    assert tasks.events == first + then
    assert len(tasks.threads) == 2


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
def test_at_most_two_tasks_are_under_way(count: int) -> None:
    tasks = Tasks()
    assert Interleaver(CPU).run([tasks.task(n, 3) for n in range(count)], ValueError) == list(range(count))
    under_way: set[int] = set()
    most = 0
    for number, event in tasks.events:
        under_way = under_way - {number} if event == "end" else under_way | {number}
        most = max(most, len(under_way))
    assert most == min(2, count)


def test_tasks_that_never_pause_run_here_one_by_one() -> None:
    tasks, before = Tasks(), threading.active_count()
    Interleaver(CPU).run([tasks.task(n, 0) for n in range(3)], ValueError)
    assert tasks.events == [(0, 0), (0, "end"), (1, 0), (1, "end"), (2, 0), (2, "end")]
    assert tasks.threads == {threading.get_ident()} and threading.active_count() == before
    pause()  # outside of any task


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_expected_exception_ends_its_task_alone(at: int) -> None:
    tasks, error = Tasks(), NonFiniteError("one")
    ends = [error if n == at else None for n in range(4)]
    found = Interleaver(CPU).run([tasks.task(n, 2, ends[n]) for n in range(4)], NonFiniteError)
    assert found == [error if n == at else n for n in range(4)]
    assert error.__traceback__ is None  # it would hold the tensors of the task's frames


@pytest.mark.parametrize("pauses", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 1])
def test_any_other_exception_is_raised_here_and_ends_all(at: int, pauses: int) -> None:
    tasks, error, interleaver = Tasks(), UserError("wrong"), Interleaver(CPU)
    work = [tasks.task(n, pauses if n == at else 4, error if n == at else None) for n in range(3)]
    with pytest.raises(UserError, match="wrong") as caught:
        interleaver.run(work, NonFiniteError)
    assert caught.value is error
    assert (2, 0) not in tasks.events  # nothing new is begun
    begun = {number for number, _ in tasks.events}
    assert all((number, "end") in tasks.events for number in begun)  # what was paused has been left
    # Nothing hangs: both threads are there for the next tasks.
    again = Tasks()
    assert interleaver.run([again.task(n, 2) for n in range(3)], NonFiniteError) == [0, 1, 2]
    assert len(again.threads) == 2


@pytest.mark.parametrize("grad", [True, False])
def test_the_second_thread_is_set_as_the_caller_is(grad: bool) -> None:
    def settings() -> tuple[object, ...]:
        return torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype(), threading.get_ident()

    def task() -> tuple[object, ...]:
        with torch.no_grad():
            pause()  # where a selection or an autograd function makes its calls
        return settings()

    def worker(rank: int, world: int) -> None:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        interleaver, seen = Interleaver(CPU), []
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                found: list[Any] = interleaver.run([task, task], ValueError)
                assert [part[:3] for part in found] == [settings()[:3]] * 2 == [(grad, 3, torch.float64)] * 2
                seen.append([part[3] for part in found])
        assert seen[0] == seen[1] == seen[2] and len(set(seen[0])) == 2  # made once
        before = threading.active_count()
        del interleaver
        gc.collect()
        for thread in threading.enumerate():
            if thread.name.startswith("interleave"):
                thread.join(10)
        assert threading.active_count() == before - 1

    run_ranks(1, worker, init=False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="the current device shows with two GPUs")
def test_the_second_thread_is_on_the_trainers_gpu() -> None:
    def task() -> int:
        pause()
        return torch.cuda.current_device()

    device = torch.device("cuda", 1)
    torch.cuda.set_device(device)
    assert Interleaver(device).run([task, task], ValueError) == [1, 1]


# ---- training --------------------------------------------------------------------------------------------------------

GRIDS: dict[str, dict[str, Any]] = {
    "tp=2": {"sae": {"tp": 2}},
    "dp=2, tp=2": {"sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"},
}
SAES: list[dict[str, Any]] = [
    {"name": "topk", "architecture": "topk", "k": 3, "dead_feature_window_tokens": 40},
    {"name": "diverging", "architecture": "topk", "k": 3, "lr": 1e300},
    {"name": "batchtopk", "architecture": "batchtopk", "k": 3.3, "dead_feature_window_tokens": 40},
    {"name": "jumprelu", "architecture": "jumprelu", "jumprelu_bandwidth": 0.4, "l0_coefficient": 0.3},
    {"name": "gated", "architecture": "gated", "l1_coefficient": 0.1},
]
N_ROWS = 6 * stream.BATCH  # of the steps, 0 and 5 log; latents may be dead from step 2 on


def one_by_one(self: Interleaver, tasks: list[Callable[[], Any]], expected: type[Exception]) -> list[Any]:
    found = []
    for task in tasks:
        try:
            found.append(task())
        except expected as error:
            found.append(error)
    return found


class Watch:
    """What the steps do: calls as (SAE, kind, elements, ranks), their beginnings and waits, and what is logged."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.calls: list[tuple[Any, ...]] = []
        self.events: list[tuple[str, Any, int]] = []
        self.metrics: list[tuple[str, dict[str, Any]]] = []
        step, reduce, gather, log = JobTrainer.step, dist.all_reduce, collectives._all_gather_flat, Trainer._log

        def stepped(job: JobTrainer, *args: Any) -> Any:
            self.here.job = job.spec.sae_id.rpartition("/")[2]
            try:
                return step(job, *args)
            finally:
                self.here.job = None

        def logged(trainer: Trainer, measured: Sequence[tuple[JobTrainer, dict[str, Any]]], writer: None) -> None:
            for job, found in measured:
                self.metrics.append(
                    (job.spec.sae_id, {name: torch.as_tensor(value).tolist() for name, value in found.items()})
                )
            log(trainer, measured, writer)

        def begun(call: Callable[..., Any], tensor: Tensor, *args: Any, **keys: Any) -> Any:
            number, job = len(self.calls), getattr(self.here, "job", None)
            self.calls.append((job, call.__name__, tensor.numel(), dist.get_process_group_ranks(keys["group"])))
            self.events.append(("begin", job, number))
            work = call(tensor, *args, **keys)
            return None if work is None else Work(work, lambda: self.events.append(("wait", job, number)))

        JobTrainer.step = stepped  # type: ignore[method-assign,assignment]
        Trainer._log = logged  # type: ignore[method-assign,assignment]
        dist.all_reduce = partial(begun, reduce)
        collectives._all_gather_flat = partial(begun, gather)


class Work:
    """A call under way, which tells when it is waited for."""

    def __init__(self, work: dist.Work, waits: Callable[[], None]):
        self.work, self.waits = work, waits

    def wait(self) -> None:
        self.waits()
        self.work.wait()

    def is_completed(self) -> bool:
        return self.work.is_completed()


def trained(grid: str, saes: list[dict[str, Any]], folder: Path, in_turns: bool) -> list[Any]:
    """Per rank: every tensor of every SAE by name; what was logged; the calls of the steps."""
    tree = to_dict(stream.config_of(folder, saes, N_ROWS, buffer=32))
    output = str(folder / f"run_{in_turns}")
    run = from_dict({**tree, "topology": {"lm": "colocated", **GRIDS[grid]}, "output_dir": output})

    def worker(rank: int, world: int) -> Any:
        torch.set_num_threads(1)
        if not in_turns:
            Interleaver.run = one_by_one  # type: ignore[method-assign,assignment]
        watch = Watch()

        def look(trainer: Trainer) -> Any:
            tensors = {
                f"{job.spec.sae_id}/{name}": tensor.clone()
                for job in trainer.jobs
                for name, tensor in (job.row_tensors() | job.replicated_tensors()).items()
            }
            calls = [call for call in watch.calls if call[0] is not None]
            return tensors, watch.metrics, calls

        return stream.train_here(run, stream.made_up_rows(N_ROWS), look, rank, world)

    return run_ranks(run.topology.world_size, worker, init=False)


@pytest.mark.parametrize(("grid", "count"), [("tp=2", 5), ("tp=2", 1), ("dp=2, tp=2", 5)])
def test_results_are_those_of_one_sae_after_the_other(grid: str, count: int, tmp_path: Path) -> None:
    """Of five SAEs one is frozen on the way, so that an even number is left."""
    saes = SAES[:count]
    ours, expected = (trained(grid, saes, tmp_path, in_turns) for in_turns in (True, False))
    for (tensors, metrics, calls), (their_tensors, their_metrics, their_calls) in zip(ours, expected, strict=True):
        assert tensors.keys() == their_tensors.keys()
        assert [
            name for name in tensors if not torch.equal(tensors[name].nan_to_num(), their_tensors[name].nan_to_num())
        ] == []
        # As text, since NaN is not itself.
        assert repr(metrics) == repr(their_metrics) and len(metrics) == (9 if count == 5 else 2)
        assert count == 1 or tensors[f"{stream.IN}/diverging/frozen"]
        assert sorted(map(repr, calls)) == sorted(map(repr, their_calls))
        assert (calls == their_calls) is (count == 1)  # else the order is another
    # The order is the same on all ranks: each group's members, and so their messages, match.
    for _, _, calls in ours[1:]:
        assert [call[:3] for call in calls] == [call[:3] for call in ours[0][2]]


def test_a_user_error_in_one_sae_ends_the_run_on_every_rank(tmp_path: Path) -> None:
    run = stream.config_of(tmp_path, [{"name": f"s{n}", "architecture": "topk", "k": 3} for n in range(3)], N_ROWS, 2)

    def worker(rank: int, world: int) -> Any:
        select = TopKTrainingSAE._select

        def fails(self: TopKTrainingSAE, *args: Any) -> Any:
            found = select(self, *args)
            if "s1" in str(getattr(threading.current_thread(), "sae", "")):
                raise UserError("k: of no use")
            return found

        step = JobTrainer.step

        def stepped(job: JobTrainer, *args: Any) -> Any:
            threading.current_thread().sae = job.spec.sae_id if args[3] == 4 else ""  # type: ignore[attr-defined]
            return step(job, *args)

        TopKTrainingSAE._select = fails  # type: ignore[method-assign,assignment]
        JobTrainer.step = stepped  # type: ignore[method-assign,assignment]
        seen: list[Trainer] = []
        with pytest.raises(UserError, match="of no use"):
            stream.train_here(run, stream.made_up_rows(N_ROWS), seen.append, rank, world)
        dist.barrier()  # all are here, and free to go
        left = [thread for thread in threading.enumerate() if thread.name.startswith("interleave")]
        return len(left)

    assert run_ranks(2, worker, init=False) == [1, 1]  # the idle one, not more


def test_an_sae_computes_while_the_message_of_another_passes(tmp_path: Path) -> None:
    saes = [{"name": f"s{n}", "architecture": "topk", "k": 3} for n in range(4)]
    run = stream.config_of(tmp_path, saes, 3 * stream.BATCH, 2)

    def worker(rank: int, world: int) -> list[tuple[str, Any, int]]:
        watch = Watch()
        encode = TopKTrainingSAE._score_blocks

        def computes(self: TopKTrainingSAE, x: Tensor) -> Any:
            watch.events.append(("encode", watch.here.job, -1))
            return encode(self, x)

        forward = TopKTrainingSAE.training_forward_pass

        def passes(self: TopKTrainingSAE, step_input: TrainStepInput) -> Any:
            if step_input.n_training_steps == 1 and watch.here.job == "s0":
                watch.events.clear()
            if step_input.n_training_steps == 2 and watch.here.job == "s0":
                raise UserError("enough")
            return forward(self, step_input)

        TopKTrainingSAE._score_blocks = computes  # type: ignore[method-assign,assignment]
        TopKTrainingSAE.training_forward_pass = passes  # type: ignore[method-assign]
        with pytest.raises(UserError, match="enough"):
            stream.train_here(run, stream.made_up_rows(3 * stream.BATCH), lambda trainer: None, rank, world)
        return [event for event in watch.events if event[1] is not None]

    for events in run_ranks(2, worker, init=False):
        # The first SAE's values for the selection leave, the second encodes, then the first one's are waited for.
        begin = next(event for event in events if event[0] == "begin")
        encoded = events.index(("encode", "s1", -1))
        assert begin[1] == "s0"
        assert events.index(begin) < encoded < events.index(("wait", *begin[1:]))
        # So it is with most messages: some other SAE does something before they are waited for.
        begun = [event for event in events if event[0] == "begin"]
        passed = 0
        for event in begun:
            if ("wait", *event[1:]) in events:
                between = events[events.index(event) : events.index(("wait", *event[1:]))]
                passed += any(other[1] != event[1] for other in between)
        assert passed >= 0.8 * len(begun)
