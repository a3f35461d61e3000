"""Two threads that take turns at a list of tasks: one computes while a message of the other is on its way.

Only one of them runs at any time, and it hands over only where a task pauses: between the start of a message and the
wait for it. So the order of all that happens follows from the tasks alone and is the same on every rank.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

_here = threading.local()  # of a thread at work: the turns that it takes, and which of the two it is


def others_wait() -> bool:
    """Whether this thread runs a task beside which another could run."""
    turns: _Turns | None = getattr(_here, "turns", None)
    return turns is not None and turns.others_wait(_here.number)


def pause() -> None:
    """Lets the other thread run until it pauses in turn or has nothing left. Nothing, where no other waits."""
    if others_wait():
        _here.turns.hand_over(_here.number)


class Interleaver:
    """Runs tasks, at most two of them begun at any time.

    The second thread is made when a task first pauses, and ends with this object: tasks that never pause run one after
    the other in the caller's.
    """

    def __init__(self, device: torch.device):
        """``device``: where the tasks compute; CUDA's current device is a thread's own."""
        self.second = ThreadPoolExecutor(1, "interleave", _enter, (device,))

    def run(self, tasks: Sequence[Callable[[], T]], expected: type[E]) -> list[T | E]:
        """What each task returned, or the ``expected`` exception that it raised, which ends that task alone.

        Any other exception is raised here, and what is under way is given up: it may be this rank's alone, so that the
        other ranks no longer make the same calls.
        """
        turns = _Turns(tasks, expected, self.second)
        turns.work(0)
        if turns.begun is not None:
            turns.begun.result()
        if turns.failure is not None:
            raise turns.failure
        return [turns.results[number] for number in range(len(tasks))]


class _GivenUp(BaseException):
    """Takes a paused task to its end after another has failed; no ``except Exception`` on its way may catch it."""


class _Turns(Generic[T, E]):
    """One run of tasks: what its two threads, 0 and 1, share."""

    def __init__(self, tasks: Sequence[Callable[[], T]], expected: type[E], second: ThreadPoolExecutor):
        self.left = deque(enumerate(tasks))
        self.expected = expected
        self.second = second
        self.grad_enabled = torch.is_grad_enabled()  # a thread's own; where a task pauses it may be off
        self.begun: Future[None] | None = None  # of thread 1
        self.at_work = [True, False]
        self.turn = (threading.Semaphore(0), threading.Semaphore(0))
        self.results: dict[int, T | E] = {}
        self.failure: BaseException | None = None

    def work(self, number: int) -> None:
        """Does one task after another until none is left, as thread ``number``."""
        _here.turns, _here.number = self, number
        try:
            while self.left and self.failure is None:
                index, task = self.left.popleft()
                try:
                    self.results[index] = task()
                except self.expected as error:
                    # The traceback would keep all that the task has computed.
                    self.results[index] = error.with_traceback(None)
        except BaseException as error:
            if self.failure is None:
                self.failure = error
        finally:
            del _here.turns, _here.number
            self.at_work[number] = False
            self.turn[1 - number].release()

    def others_wait(self, number: int) -> bool:
        return bool(self.at_work[1 - number] or self.left)

    def hand_over(self, number: int) -> None:
        other = 1 - number
        if self.at_work[other]:
            self.turn[other].release()
        else:
            self.at_work[other] = True
            self.begun = self.second.submit(_work_as_second, self)
        self.turn[number].acquire()
        if self.failure is not None:
            raise _GivenUp


def _work_as_second(turns: _Turns) -> None:
    with torch.set_grad_enabled(turns.grad_enabled):
        turns.work(1)


def _enter(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
