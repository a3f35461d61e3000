"""Moves the kept rows of each chunk from the LM ranks to the SAE ranks that host their lanes: each row once per group.

Before the rows of a chunk goes a header ``(chunk, first row, rows, end, cursor)`` on a CPU group, so that no rank reads
a device value to learn a size. Messages have a fixed size (the most rows that a chunk can have), so that a receiver
can post the next one before it knows what comes.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae.activations.buffer import rows_of_lanes
from scale_sae.activations.schedule import Schedule
from scale_sae.activations.source import ActivationSource
from scale_sae.activations.tokens import Chunk
from scale_sae.errors import UserError
from scale_sae.topology import Group, Topology

CURSOR_BYTES = 1 << 16
NUMBER_BYTES = 5 * 8
HEADER_BYTES = NUMBER_BYTES + CURSOR_BYTES
DIFFERENT_TEXT = "data.dataset: the LM ranks read different text; give all of them the same files and revision"


@dataclass(frozen=True)
class ReceivedChunk:
    """This rank's rows of one chunk. ``rows[h]`` may be longer than needed; ``cursor`` leads to the next chunk."""

    index: int
    first_row: int
    count: int
    rows: Mapping[str, Tensor]
    cursor: dict


@dataclass(frozen=True)
class Start:
    """Where a stream begins: its first chunk and the rows of the stream before it (both 0 for a new run)."""

    chunk: int
    rows: int


def pack_header(chunk: int, first_row: int, count: int, end: bool, cursor: dict) -> Tensor:
    """uint8 [HEADER_BYTES]: five int64, then the cursor as JSON."""
    text = json.dumps(cursor).encode()
    assert len(text) <= CURSOR_BYTES, f"a text cursor of {len(text)} bytes is larger than its message"
    header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    header[:NUMBER_BYTES] = torch.tensor([chunk, first_row, count, int(end), len(text)]).view(torch.uint8)
    header[NUMBER_BYTES : NUMBER_BYTES + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return header


def unpack_header(header: Tensor) -> tuple[int, int, int, bool, dict]:
    """The arguments of ``pack_header``."""
    chunk, first_row, count, end, length = header[:NUMBER_BYTES].view(torch.int64).tolist()
    cursor = json.loads(header[NUMBER_BYTES : NUMBER_BYTES + length].numpy().tobytes())
    return chunk, first_row, count, bool(end), cursor


def kept_rows(source: ActivationSource, chunk: Chunk, device: torch.device) -> dict[str, Tensor]:
    """The LM's activations at the kept positions of a chunk, in stream order: ``[rows, width]`` per hookpoint."""
    captured = source.capture(chunk.tokens.to(device))
    keep = chunk.keep.flatten().to(device)
    # One after the other: of all hookpoints of a large model they are most of its memory, and need not be there twice.
    return {name: captured.pop(name).flatten(0, 1)[keep] for name in list(captured)}


class Sender:
    """An LM rank's side of a dedicated run."""

    def __init__(self, topology: Topology, widths: Mapping[str, int], schedule: Schedule, dtype: torch.dtype):
        self.topology = topology
        self.widths = widths
        self.schedule = schedule
        self.dtype = dtype
        replica = topology.plan.replica_of(topology.rank)
        assert replica is not None
        self.replica = replica
        # Two chunks in flight: one on its way while the LM computes the next.
        self.in_flight: deque[tuple[list[dist.Work], list[Tensor]]] = deque()
        self.rows_sent = 0

    def send(self, chunk: int, start: int, count: int, rows: Mapping[str, Tensor], cursor: dict) -> None:
        """Sends a chunk whose ``count`` rows begin at row ``start`` of the stream."""
        if len(self.in_flight) == 2:
            self._wait_oldest()
        self.rows_sent += count
        self._post(pack_header(chunk, start, count, False, cursor), start, count, rows)

    def close(self) -> None:
        """Says that this replica sends no more, and waits until everything has left."""
        empty = {name: torch.empty(0, width, dtype=self.dtype) for name, width in self.widths.items()}
        self._post(pack_header(0, 0, 0, True, {}), 0, 0, empty)
        while self.in_flight:
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        works, _ = self.in_flight.popleft()
        for work in works:
            work.wait()

    def _post(self, header: Tensor, start: int, count: int, rows: Mapping[str, Tensor]) -> None:
        works: list[dist.Work] = []
        buffers = [header]
        for group in self.topology.plan.groups:
            key = (self.replica, group.index)
            headers, payloads = [], []
            for rank in self.topology.plan.receivers(self.topology.rank, group):
                headers.append(dist.P2POp(dist.isend, header, rank, self.topology.header[key]))
                for name in group.hookpoints:
                    payload = self._payload(group, rank, start, count, rows[name])
                    buffers.append(payload)
                    payloads.append(dist.P2POp(dist.isend, payload, rank, self.topology.data[key]))
            if headers:
                works += dist.batch_isend_irecv(headers)
                works += dist.batch_isend_irecv(payloads)
        self.in_flight.append((works, buffers))

    def _payload(self, group: Group, rank: int, start: int, count: int, rows: Tensor) -> Tensor:
        lanes = self.topology.plan.lane_block(group, rank)
        index = rows_of_lanes(start, count, lanes, self.schedule.lanes).to(rows.device)
        payload = torch.zeros(
            self.schedule.most_rows(len(lanes)), rows.shape[1], dtype=self.dtype, device=self.topology.wire
        )
        if count:
            payload[: len(index)] = rows[index].to(payload)
        return payload


def own_chunks(
    chunks: Iterator[Chunk], replica: int, replicas: int, schedule: Schedule, start: Start
) -> Iterator[tuple[Chunk, int]]:
    """The chunks that LM replica ``replica`` forwards, each with the number of rows of the stream before it."""
    rows = start.rows
    while rows < schedule.rows_needed:
        chunk = next(chunks, None)
        if chunk is None:
            return
        if chunk.index % replicas == replica:
            yield chunk, rows
        rows += int(chunk.keep.sum())


def produce(
    topology: Topology,
    source: ActivationSource,
    sender: Sender,
    schedule: Schedule,
    start: Start,
    chunks: Iterator[Chunk],
    stop_asked: Callable[[], bool],
    sent: Callable[[int], None] = lambda first_row: None,
) -> None:
    """A dedicated LM rank's whole run: forwards and sends its replica's chunks until the run has its rows, the text
    ends, or a stop is asked for.

    Only the replica's first rank reads text; its tensor-parallel peers get the tokens from it. ``sent`` is called after
    each chunk with the number of its first row in the stream.
    """
    ranks = topology.plan.lm[sender.replica]
    reads = topology.rank == ranks[0]
    mine = own_chunks(chunks, sender.replica, len(topology.plan.lm), schedule, start)
    while True:
        item: list[tuple[Chunk, int] | None] = [None]
        # Every rank asks, since any may have got the signal; what the reading one says counts.
        stop = stop_asked()
        if reads and not stop:
            item = [next(mine, None)]
        dist.broadcast_object_list(item, ranks[0], group=topology.lm_control)
        if item[0] is None:
            break
        chunk, first_row = item[0]
        count = int(chunk.keep.sum())
        sender.send(chunk.index, first_row, count, kept_rows(source, chunk, topology.device), chunk.cursor)
        sent(first_row)
    sender.close()


class Receiver:
    """An SAE rank's side of a dedicated run: one message per replica is posted ahead, always."""

    def __init__(
        self, topology: Topology, widths: Mapping[str, int], schedule: Schedule, dtype: torch.dtype, start: Start
    ):
        assert topology.group is not None
        self.topology = topology
        self.group = topology.group
        self.widths = widths
        self.most_rows = schedule.most_rows(len(topology.plan.lane_block(self.group, topology.rank)))
        self.dtype = dtype
        self.next_index = start.chunk
        self.next_row = start.rows
        self.posted: dict[int, tuple[list[dist.Work], Tensor, dict[str, Tensor]]] = {}
        self.open = set(range(len(topology.plan.lm)))
        for replica in sorted(self.open):
            self._post(replica)

    def next_chunk(self) -> ReceivedChunk | None:
        """Waits for the next chunk of the stream; None once the text has ended."""
        replica = self.next_index % len(self.topology.plan.lm)
        if replica not in self.open:
            return None
        received = self._take(replica)
        if received is None:
            return None
        if (received.index, received.first_row) != (self.next_index, self.next_row):
            raise UserError(DIFFERENT_TEXT)
        self.next_index += 1
        self.next_row += received.count
        self._post(replica)
        return received

    def close(self) -> None:
        """Takes and drops what is still sent, until every replica has said that it ends."""
        for replica in sorted(self.open):
            while self._take(replica) is not None:
                self._post(replica)

    def _post(self, replica: int) -> None:
        key = (replica, self.group.index)
        sender = self.topology.plan.sender(replica, self.group, self.topology.rank)
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        rows = {
            name: torch.empty(self.most_rows, self.widths[name], dtype=self.dtype, device=self.topology.wire)
            for name in self.group.hookpoints
        }
        works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, header, sender, self.topology.header[key])])
        works += dist.batch_isend_irecv(
            [dist.P2POp(dist.irecv, rows[name], sender, self.topology.data[key]) for name in self.group.hookpoints]
        )
        self.posted[replica] = works, header, rows

    def _take(self, replica: int) -> ReceivedChunk | None:
        works, header, rows = self.posted.pop(replica)
        for work in works:
            work.wait()
        chunk, first_row, count, end, cursor = unpack_header(header)
        if end:
            self.open.discard(replica)
            return None
        return ReceivedChunk(chunk, first_row, count, rows, cursor)


class ColocatedExchange:
    """A colocated run's stream: every rank forwards one chunk of a round, then all exchange rows.

    Rounds happen when an SAE step needs rows, at the same step on every rank. Every rank reads the tokens of the whole
    round and so knows all row counts before any forward: no header travels, no chunk past the end is computed.
    """

    def __init__(
        self,
        topology: Topology,
        widths: Mapping[str, int],
        schedule: Schedule,
        dtype: torch.dtype,
        start: Start,
        chunks: Iterator[Chunk],
        source: ActivationSource,
    ):
        assert topology.group is not None
        self.topology = topology
        self.group = topology.group
        self.widths = widths
        self.schedule = schedule
        self.dtype = dtype
        self.chunks = chunks
        self.source = source
        self.world = len(topology.plan.sae_ranks)
        self.next_round = start.chunk
        self.rows_before = start.rows
        self.ready: deque[ReceivedChunk] = deque()
        # Rows that this rank's own copy of the LM gave.
        self.rows_sent = 0

    def next_chunk(self) -> ReceivedChunk | None:
        """The next chunk of the stream; None once the text has ended."""
        if not self.ready:
            self._round()
        return self.ready.popleft() if self.ready else None

    def close(self) -> None:
        """Nothing is in flight between rounds."""

    def _round(self) -> None:
        """Reads the next chunks, at most one per rank, forwards this rank's own, and exchanges rows."""
        starts: list[int] = []
        chunks: list[Chunk] = []
        while len(chunks) < self.world and self.rows_before < self.schedule.rows_needed:
            chunk = next(self.chunks, None)
            if chunk is None:
                break
            starts.append(self.rows_before)
            chunks.append(chunk)
            self.rows_before += int(chunk.keep.sum())
        self._check_same(chunks)
        counts = [int(chunk.keep.sum()) for chunk in chunks]
        owners = [self.topology.plan.sae_ranks[chunk.index % self.world] for chunk in chunks]
        incoming = {
            i: {
                name: torch.empty(
                    self._share(self.group, self.topology.rank, starts[i], counts[i]).numel(),
                    self.widths[name],
                    dtype=self.dtype,
                    device=self.topology.wire,
                )
                for name in self.group.hookpoints
            }
            for i in range(len(chunks))
        }
        operations = [
            dist.P2POp(dist.irecv, incoming[i][name], owners[i], self.topology.data[0, 0])
            for i in range(len(chunks))
            if owners[i] != self.topology.rank
            for name in self.group.hookpoints
            if incoming[i][name].numel()
        ]
        for i, chunk in enumerate(chunks):
            if owners[i] == self.topology.rank:
                operations += self._outgoing(chunk, starts[i], incoming[i])
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for i, chunk in enumerate(chunks):
            self.ready.append(ReceivedChunk(chunk.index, starts[i], counts[i], incoming[i], chunk.cursor))

    def _check_same(self, chunks: Sequence[Chunk]) -> None:
        """``UserError`` on every rank unless all have read the same round: sizes would not match otherwise."""
        digest = hashlib.blake2b()
        for chunk in chunks:
            digest.update(chunk.tokens.numpy().tobytes())
        digests: list[str] = [""] * self.world
        dist.all_gather_object(digests, digest.hexdigest(), group=self.topology.header[0, 0])
        if len(set(digests)) > 1:
            raise UserError(DIFFERENT_TEXT)

    def _share(self, group: Group, rank: int, start: int, count: int) -> Tensor:
        return rows_of_lanes(start, count, self.topology.plan.lane_block(group, rank), self.schedule.lanes)

    def _outgoing(self, chunk: Chunk, start: int, own: dict[str, Tensor]) -> list[dist.P2POp]:
        """Forwards this rank's chunk; its own rows go to ``own``, the others' into the returned sends."""
        rows = kept_rows(self.source, chunk, self.topology.device)
        self.rows_sent += int(chunk.keep.sum())
        operations = []
        for group in self.topology.plan.groups:
            for rank in group.ranks:
                index = self._share(group, rank, start, int(chunk.keep.sum())).to(self.topology.device)
                for name in group.hookpoints:
                    payload = rows[name][index].to(self.topology.wire, self.dtype)
                    if rank == self.topology.rank:
                        own[name].copy_(payload)
                    elif payload.numel():
                        operations.append(dist.P2POp(dist.isend, payload, rank, self.topology.data[0, 0]))
        return operations
