"""What each rank says to others, noted instead of sent, and whether the ranks would understand each other."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae.planning.fake_tensors import replaced
from scale_sae.topology import Topology

HEADER = "header"  # the link of what goes before each chunk of a dedicated run
COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier"),
    *("allgather", "allgather_into_tensor_coalesced", "_allgather_base", "all_gather_single"),
    *("reduce_scatter", "reduce_scatter_tensor_coalesced", "_reduce_scatter_base", "reduce_scatter_single"),
    *("alltoall", "alltoall_base", "all_to_all_single"),
)


@dataclass(frozen=True)
class Call:
    """One collective, or one message.

    Attributes:
        link: what its process group is for.
        ranks: the members of the group.
        op: its name; "send" or "recv" of a message.
        tensors: shape and dtype of each.
        peer: the other rank of a message.
    """

    link: str
    ranks: tuple[int, ...]
    op: str
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    peer: int | None = None

    def __str__(self) -> str:
        sizes = ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in self.tensors)
        toward = {"send": f" to rank {self.peer}", "recv": f" from rank {self.peer}"}.get(self.op, "")
        return f"{self.op}{f' of {sizes}' if sizes else ''}{toward}"


class Done:
    """A collective that is over."""

    def wait(self, *timeout: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class Calls:
    """Notes what one rank calls, in order."""

    def __init__(self, place: Topology):
        self.found: list[Call] = []
        pairs = [
            ("control", place.control),
            ("SAE control", place.sae_control),
            ("checkpoint control", place.checkpoint_control),
            ("LM control", place.lm_control),
            ("tp", place.shard.group),
            ("dp", place.shard.dp.group),
            ("LM tp", None if place.lm_mesh is None else place.lm_mesh.get_group()),
            *(("LM to SAE", group) for group in place.data.values()),
            *((HEADER, group) for group in place.header.values()),
        ]
        self.groups: dict[str, tuple[str, tuple[int, ...]]] = {
            group.group_name: (link, tuple(dist.get_process_group_ranks(group)))
            for link, group in pairs
            if group is not None
        }

    def note(self, op: str, tensors: Sequence[Tensor], group: str, peer: int | None = None) -> None:
        """``group``: the name of a process group."""
        if group not in self.groups:
            handle = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
            self.groups[group] = "a group of its own", tuple(dist.get_process_group_ranks(handle))
        link, ranks = self.groups[group]
        sizes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        self.found.append(Call(link, ranks, op, sizes, peer))

    @contextmanager
    def instead(self, received: Callable[[Tensor, int], None]) -> Iterator[None]:
        """Inside, calls are noted and not made; ``received(tensor, peer)`` fills what comes from another rank."""

        def name_of(group: dist.ProcessGroup | None) -> str:
            return (dist.group.WORLD if group is None else group).group_name  # type: ignore[union-attr]

        def collective(op: str) -> Callable[..., Done]:
            def call(group: dist.ProcessGroup, *args: Any, **keys: Any) -> Done:
                self.note(op, [x for arg in args[:2] for x in _tensors(arg)], group.group_name)
                return Done()

            return call

        def messages(ops: Sequence[dist.P2POp]) -> list[Done]:
            for op in ops:
                is_send = op.op is dist.isend
                assert op.peer is not None
                self.note("send" if is_send else "recv", [op.tensor], name_of(op.group), op.peer)
                if not is_send:
                    received(op.tensor, op.peer)
            return [Done()]

        def gather_objects(objects: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
            self.note("all_gather_object", [], name_of(group))
            objects[:] = [own] * len(objects)

        with ExitStack() as stack:
            for name in COLLECTIVES:
                if hasattr(dist.ProcessGroup, name):
                    stack.enter_context(replaced(dist.ProcessGroup, name, collective(name.strip("_"))))
            stack.enter_context(replaced(dist, "batch_isend_irecv", messages))
            stack.enter_context(replaced(dist, "all_gather_object", gather_objects))
            yield


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


# ---- whether they fit ------------------------------------------------------------------------------------------------


def misunderstandings(
    found: Mapping[int, Sequence[Call]], model_of: Mapping[int, int], name: Callable[[int], str]
) -> list[str]:
    """One line for each process group whose members call differently, and each pair of ranks whose messages differ.

    Args:
        found: rank → what it called; of ranks that ran to their end.
        model_of: every rank → the one that was run in its place.
        name: of a rank, for the lines.
    """
    groups: dict[tuple[str, tuple[int, ...]], dict[int, list[Call]]] = {}
    for rank, calls in found.items():
        for call in calls:
            if call.peer is None:
                members = groups.setdefault((call.link, call.ranks), {})
                members.setdefault(rank, []).append(call)
    problems = []
    for (link, ranks), by_rank in groups.items():
        # A member that calls nothing is one whose call the others wait for.
        members = {rank: by_rank.get(rank, []) for rank in found if rank in ranks}
        problems += _collectives_differ(link, members, name)
    return problems + _messages_differ(found, model_of, name)


def _collectives_differ(link: str, members: Mapping[int, Sequence[Call]], name: Callable[[int], str]) -> list[str]:
    """At most one line: the first member that calls other than most of them do."""
    most = Counter(tuple(calls) for calls in members.values()).most_common(1)[0][0]
    usual = next(rank for rank, calls in members.items() if tuple(calls) == most)
    odd = [rank for rank, calls in members.items() if tuple(calls) != most]
    if not odd:
        return []
    own = members[odd[0]]
    place = next((i for i, (a, b) in enumerate(zip(own, most, strict=False)) if a != b), min(len(own), len(most)))
    said = [str(calls[place]) if place < len(calls) else "nothing" for calls in (own, most)]
    others = f" (and {len(odd) - 1} more ranks)" if len(odd) > 1 else ""
    return [
        f"{name(odd[0])}{others} would hang with {name(usual)}: call {place + 1} of their group ({link}) is "
        f"{said[0]} there, and {said[1]} here"
    ]


def _messages_differ(
    found: Mapping[int, Sequence[Call]], model_of: Mapping[int, int], name: Callable[[int], str]
) -> list[str]:
    """A line for each rank that was run whose messages to another, or from it, are not what the other expects.

    Where the other was not run, its model speaks for it, if messages are of a fixed size, as those are that follow a
    header. Without one (a colocated run) they are as long as the rows that a chunk has for the lanes of the receiver,
    and the model may have other chunks and other lanes.
    """
    pairs: dict[tuple[int, str, int], dict[str, list[Call]]] = {}
    for rank, calls in found.items():
        for call in calls:
            if call.peer is not None:
                pairs.setdefault((rank, call.op, call.peer), {}).setdefault(call.link, []).append(call)
    problems: dict[int, str] = {}
    for (rank, op, peer), own in pairs.items():
        model = model_of[peer]
        if model not in found or model == rank or (peer != model and HEADER not in own):
            continue
        theirs = pairs.get((model, "recv" if op == "send" else "send", rank), {})
        if difference := _difference(own, theirs):
            problems.setdefault(rank, f"{name(rank)} would hang with {name(peer)}: {difference}")
    return list(problems.values())


def _difference(own: Mapping[str, Sequence[Call]], theirs: Mapping[str, Sequence[Call]]) -> str | None:
    """What differs between what one rank sends and the other receives, by link."""
    for link, calls in own.items():
        others = theirs.get(link, [])
        for place, (one, other) in enumerate(zip(calls, others, strict=False)):
            if one.tensors != other.tensors:
                return f"message {place + 1} ({link}) is {one} here, and {other} there"
        # One side may be some chunks ahead, each of which has one header.
        counts = [len(some.get(HEADER, "1")) for some in (own, theirs)]
        if len(calls) * counts[1] != len(others) * counts[0]:
            return f"{calls[-1]} ({link}) is one of {len(calls)} here, and of {len(others)} there"
    return None
