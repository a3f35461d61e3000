"""Notices a rank that was lost, says which, and ends every other: none hangs in a collective until its timeout.

Each rank has two threads of its own and its own connection to the launcher's store; its keys hold the restart count
and which session of the process it is, so that none reads what one before it left:

    alive/<rank>   a number that the rank raises every `BEAT` seconds, and ``done`` once it has ended well
    pulse          the same of rank 0, which alone reads all of ``alive/``; the others watch only this key
    who/<rank>     host, process id and role, for the line that names the rank and for the ranks beside it
    fault          the first rank that knows why the run ends; it alone says it, and all others end

Cost: three small requests per rank and beat, and one larger of rank 0: at 512 ranks about 500 requests a second to
one store. A rank whose process ends is noticed at once by those beside it, any other lost one after `SILENCE`.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from scale_sae import topology

BEAT = 3.0
# Ten beats: no work and no slow file system keeps a thread that only waits from its turn for so long.
SILENCE = 30.0
# How often a rank looks whether the processes beside it are there.
TICK = 0.2
END = "All other ranks end; the same command goes on from the newest checkpoint"
_sessions = itertools.count()


def role_of(plan: topology.Plan, rank: int) -> str:
    """What a rank does, in the words of the config: ``SAE rank 1 of group 0, tp 1``."""
    group, replica = plan.group_of(rank), plan.replica_of(rank)
    if group is not None:
        place = group.ranks.index(rank)
        dp = f"dp {place // group.tp}, " if group.dp > 1 else ""
        return f"SAE rank {place} of group {group.index}, {dp}tp {place % group.tp}"
    assert replica is not None
    return f"LM rank of replica {replica}, tp {plan.lm[replica].index(rank)}"


def is_lost_connection(error: Exception) -> bool:
    """Whether an error only says that a peer is gone. gloo's are RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


class Heartbeat:
    """Watches the other ranks while this one trains. Where there is no launcher's store, there is nobody to watch."""

    def __init__(self, rank: int, world_size: int, local_rank: int):
        self.rank = rank
        self.world_size = world_size
        # torch's launcher gives the processes of one machine consecutive ranks.
        first = rank - local_rank
        self.beside = set(range(first, first + topology.local_world_size())) - {rank}
        self.machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        self.pids: dict[int, int] = {}
        # key → its value when last read, and for how many beats it has been that
        self.seen: dict[str, tuple[bytes, int]] = {}
        self.beats = 0
        self.leaving = self.ending = False
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.threads: list[threading.Thread] = []
        if world_size == 1:
            return
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.where = f"{host}:{port}"
        base = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.name = f"rank {rank} of attempt {attempt}"
        session = next(_sessions)
        _attempt(base, attempt).set("session", str(session))
        self.store = _session(base, attempt, session)
        for other in range(world_size) if rank == 0 else ():
            self.store.compare_set(f"alive/{other}", "", "0")  # so that all can be read at once
        self.store.set(f"alive/{rank}", "1")
        self.introduce("starting up")
        for earlier in range(attempt) if self.machines > 1 else ():
            # Ranks of it that other machines still run must end too, or their launchers would never start the new ones.
            if self._ends_attempt(base, earlier):
                self._say(
                    f"error: the ranks on host {socket.gethostname()} were lost and have been started again. {END}"
                )
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._watch, self._guard)]
        for thread in self.threads:
            thread.start()

    # ---- for the main thread ----------------------------------------------------------------------------------------

    def introduce(self, role: str) -> None:
        """Tells the others what this rank does."""
        if self.world_size > 1:
            who = {"host": socket.gethostname(), "pid": os.getpid(), "role": role}
            self.store.set(f"who/{self.rank}", json.dumps(who))

    def report(self, message: str) -> None:
        """Prints why the run ends, unless another rank was first: its end is then the cause of this one's."""
        with self.lock:  # of this rank, too, one thread speaks, and none ends the process meanwhile
            if not self.ending and (not self.threads or self._is_first(self.store)):
                self._say(message)
            self.ending = True
        self._linger()

    def await_verdict(self) -> None:
        """Where a connection was lost: waits until some rank has said why; after a minute it returns all the same."""
        until = time.monotonic() + 2 * SILENCE
        try:
            while self.threads and time.monotonic() < until and not self.store.check(["fault"]):
                time.sleep(TICK)
        except dist.DistError:
            self._store_is_lost()

    def leave(self) -> None:
        """This rank has done its part: it is no longer missed. It still watches those that have not."""
        with self.lock:
            self.leaving = True
            if self.threads:
                self.store.set(f"alive/{self.rank}", "done")

    def stop(self) -> None:
        """Ends the threads."""
        self.leaving = True
        self.stopped.set()
        for thread in self.threads:
            thread.join(BEAT)

    # ---- the threads ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            while not self.stopped.is_set():
                self.beats += 1
                self._beat()
                self._look_beside()
        except dist.DistError:
            self._store_is_lost()

    def _beat(self) -> None:
        with self.lock:  # "done" is the last word
            if not self.leaving:
                self.store.set(f"alive/{self.rank}", str(self.beats))
        if self.rank == 0:
            self.store.set("pulse", str(self.beats))
            everyone = self.store.multi_get([f"alive/{rank}" for rank in range(self.world_size)])
            for rank, value in enumerate(everyone):
                if value not in (b"0", b"done") and self._is_silent(f"alive/{rank}", value):
                    self._is_lost(rank, f"gave no sign of life for {SILENCE:.0f} s")
        elif self.store.check(["pulse"]) and self._is_silent("pulse", self.store.get("pulse")):
            self._is_lost(0, f"gave no sign of life for {SILENCE:.0f} s")
        if self.store.check(["fault"]):
            # A main thread that knows it too is given the time to end by itself.
            if self.stopped.wait(BEAT):
                return  # from Python: the error is on its way to the caller, and the process goes on
            self._linger()
            if not self.stopped.is_set():
                self._end()

    def _is_silent(self, key: str, value: bytes) -> bool:
        """Counts beats, not seconds: the time of a job that was suspended as a whole is nobody's silence."""
        last, beats = self.seen.get(key, (b"", 0))
        self.seen[key] = (value, beats + 1 if value == last else 0)
        return self.seen[key][1] * BEAT >= SILENCE

    def _look_beside(self) -> None:
        """Waits for the next beat, with an eye on the processes on this machine."""
        for rank in self.beside - self.pids.keys():
            if self.store.check([f"who/{rank}"]):
                pid = json.loads(self.store.get(f"who/{rank}"))["pid"]
                if _is_running(pid):  # else it may have a process table of its own
                    self.pids[rank] = pid
        until = time.monotonic() + BEAT
        while time.monotonic() < until and not self.stopped.wait(TICK):
            for rank in [rank for rank, pid in self.pids.items() if not _is_running(pid)]:
                del self.pids[rank]
                if self.store.get(f"alive/{rank}") != b"done":
                    self._is_lost(rank, "its process has ended")

    def _guard(self) -> None:
        """Ends this process if the machine that holds the store is gone: the other thread then waits for it forever."""
        last, waited = 0, 0.0
        while not self.stopped.wait(TICK):
            waited = waited + TICK if self.beats == last else 0.0
            last = self.beats
            if waited > SILENCE + 2 * BEAT:
                self._store_is_lost()

    # ---- verdicts ---------------------------------------------------------------------------------------------------

    def _is_first(self, store: Store) -> bool:
        try:
            return bool(store.compare_set("fault", "", self.name).decode() == self.name)
        except dist.DistError:
            # Rank 0, which holds the store where no launcher does, has ended: it was not this rank that was first.
            return False

    def _ends_attempt(self, base: Store, attempt: int) -> bool:
        """Ends the ranks that are left of an attempt; whether this rank was the first to end its newest session."""
        of_attempt = _attempt(base, attempt)
        newest = int(of_attempt.get("session")) if of_attempt.check(["session"]) else 0
        # And the next one: a rank may be on its way there.
        first, _ = [self._is_first(_session(base, attempt, number)) for number in (newest, newest + 1)]
        return first

    def _say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def _is_lost(self, rank: int, why: str) -> None:
        who = json.loads(self.store.get(f"who/{rank}"))
        self.report(f"\nerror: lost rank {rank} (host {who['host']}, {who['role']}): {why}. {END}")
        self._end()

    def _store_is_lost(self) -> None:
        if self.leaving:
            return
        # Nobody can be asked who speaks: it is one that lives elsewhere, if there is an elsewhere.
        elsewhere = os.environ.get("GROUP_RANK") == "1" and os.environ.get("LOCAL_RANK") == "0"
        # Not for ever: another thread may hold the lock, and wait for the store.
        is_free = self.lock.acquire(timeout=BEAT)
        if is_free and not self.ending and (elsewhere if self.machines > 1 else self.rank == 1):
            self._say(f"\nerror: lost the launcher of rank 0, or its machine: the store at {self.where} is gone. {END}")
        self._end()

    def _linger(self) -> None:
        """Keeps the launcher that holds the store until the ranks on other machines have read that there is a fault."""
        if self.machines > 1 and os.environ.get("GROUP_RANK") == "0":
            time.sleep(2 * BEAT)

    def _end(self) -> None:
        # At once, and from here: the main thread may be in a collective that never returns.
        os._exit(1)


def _attempt(base: Store, attempt: int) -> Store:
    return PrefixStore(f"scale_sae/heartbeat/{attempt}", base)


def _session(base: Store, attempt: int, session: int) -> Store:
    return PrefixStore(f"scale_sae/heartbeat/{attempt}/{session}", base)


def _is_running(pid: int) -> bool:
    """Whether a process of this machine is there and has not ended; one that is merely stopped is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
