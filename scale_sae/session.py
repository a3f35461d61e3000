"""The ranks of a command, or of a call from Python: they meet, do their work and part.

As a command (`run_command`), what a user can put right is one line of one rank, and an exit code. From Python
(`joined`), it is an exception on every rank; afterwards the process group is gone and another session may begin.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import Store

from scale_sae import topology
from scale_sae.collectives import AgreedError, agree
from scale_sae.errors import UserError
from scale_sae.heartbeat import Heartbeat, is_lost_connection

__all__ = ["AgreedError", "Session", "Stop", "agree", "end_process", "joined", "run_command"]


class Stop:
    """Whether this process was asked to stop, by SIGTERM. Only a main thread can hear signals."""

    def __init__(self) -> None:
        self.signalled = False
        self.hears = threading.current_thread() is threading.main_thread()
        if self.hears:
            self.before = signal.signal(signal.SIGTERM, self._heed)

    def _heed(self, number: int, frame: object) -> None:
        self.signalled = True

    def release(self) -> None:
        """What was done at SIGTERM before is done again."""
        if self.hears:
            signal.signal(signal.SIGTERM, self.before)


class Session:
    """One rank among those that work together. ``store`` is there after `connect`.

    ``before`` begins error messages: a new line, once the main process may be in the middle of a progress bar's.
    """

    store: Store

    def __init__(self) -> None:
        self.rank, self.world_size, self.local_rank = topology.world_from_environment()
        # Cluster schedulers send SIGTERM to every process; the handler is there before anything slow begins.
        self.stop = Stop()
        # Without it cuBLAS may add in another order from run to run; it must be set before CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.backend = topology.pick_backend()
        # Before any input is read: a launcher ends every rank once one has failed, also one that is not yet up to say
        # why.
        self._base = topology.open_store(self.rank, self.world_size)
        self.pulse = Heartbeat(self.rank, self.world_size, self.local_rank)
        self.before = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        """Prints a line on the main process."""
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def connect(self) -> None:
        """Makes the default process group."""
        self.store = topology.connect(self.rank, self.world_size, self.backend, self._base)

    def part(self) -> None:
        """Returns when every rank has done its part."""
        self.pulse.leave()
        dist.all_reduce(torch.zeros(1))
        self.pulse.stop()

    def report(self, error: Exception) -> None:
        """Says why the work ends, unless another rank was first."""
        if isinstance(error, UserError):
            self.pulse.report(f"{self.before}error: {error}")
            return
        if is_lost_connection(error):
            self.pulse.await_verdict()
        self.pulse.report(f"{self.before}error on rank {self.rank}:\n{traceback.format_exc()}")


def run_command(work: Callable[[Session], None]) -> int:
    """Does ``work`` on every rank; returns this rank's exit code. What a user can put right is one line of one rank."""
    session = Session()
    try:
        session.connect()
        work(session)
        session.part()
    except Exception as error:
        session.report(error)
        return 1
    dist.destroy_process_group()
    return 0


def end_process(code: int) -> NoReturn:
    """Ends a command's process at once: after a fault, other ranks' connections hang on it, and its threads wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def joined() -> Iterator[Session]:
    """The session of a call from Python. What goes wrong on one rank alone ends the others, as in a command.

    Raises:
        UserError: there is a process group already.
    """
    if dist.is_initialized():
        raise UserError(
            "torch.distributed: the process group exists already; let scale_sae make it: remove what made it "
            "(init_process_group, Accelerator) or call torch.distributed.destroy_process_group() first"
        )
    session = Session()
    try:
        session.connect()
        yield session
        session.part()
    except AgreedError:
        session.pulse.leave()
        raise
    except Exception as error:
        if session.world_size > 1:
            session.report(error)
        raise
    finally:
        session.pulse.stop()
        session.stop.release()
        if dist.is_initialized():
            dist.destroy_process_group()
