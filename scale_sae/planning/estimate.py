"""Memory, time and cost of a run on one topology: what the planner says of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from scale_sae.planning.hardware import Hardware
from scale_sae.planning.memory import Item, items
from scale_sae.planning.timing import Prediction, predict
from scale_sae.planning.workload import Role, Workload

if TYPE_CHECKING:
    from scale_sae.planning.language_model import LMProfile

# Of a device's memory that a plan may fill: allocators leave gaps between tensors.
USABLE = 0.92
# Of latents that a plan has room for while they are dead. SAEs that go well have fewer.
DEAD_SHARE = 0.2


@dataclass(frozen=True)
class Estimate:
    """What one topology of a run takes.

    Attributes:
        per_node: ranks of a node.
        profile: of the language model; None where none runs.
    """

    workload: Workload
    hardware: Hardware
    per_node: int
    profile: "LMProfile | None"

    @cached_property
    def memory(self) -> Mapping[Role, list[Item]]:
        """What a rank of each role holds, beside the process itself, with ``DEAD_SHARE`` of all latents dead."""
        return self.memory_with(self.dead(DEAD_SHARE))

    def dead(self, share: float) -> int:
        """A ``share`` of an SAE's latents, of the largest of those whose run is long enough for latents to be dead."""
        batch = self.workload.batch
        trains = [spec.train for spec in self.workload.specs]
        long = [train.training_tokens - batch > train.dead_feature_window_tokens for train in trains]
        sizes = [spec.cfg.d_sae for spec, is_long in zip(self.workload.specs, long, strict=True) if is_long]
        return math.ceil(share * max(sizes, default=0))

    def memory_with(self, dead: int) -> dict[Role, list[Item]]:
        """What a rank of each role holds while so many latents are dead: AuxK takes more the more there are."""
        w = self.workload
        return {
            role: [
                *items(w, role, self.profile if role.runs_lm else None, self.hardware.kind, dead),
                *communicators(w, role, self.hardware),
            ]
            for role in w.roles()
        }

    @cached_property
    def prediction(self) -> Prediction:
        """How long it takes while no latent is dead."""
        return self.prediction_with(0)

    def prediction_with(self, dead: int) -> Prediction:
        """How long it would take with so many dead latents in every step."""
        return predict(self.workload, self.hardware, self.profile, self.per_node, dead)

    def held(self, role: Role) -> int:
        """Bytes that a rank of the role takes, the process included."""
        return self.of_process(role) + sum(item.bytes for item in self.memory[role])

    def of_process(self, role: Role) -> int:
        """Bytes that a rank of the role takes without a tensor."""
        return self.hardware.runtime + (self.hardware.reading if role.runs_lm else 0)

    @property
    def fullest(self) -> tuple[Role, int]:
        """The role whose ranks hold most, and the bytes of the memory that they share: a GPU's, or a node's.

        Of a language model by ``device_map``, what does not fit on its GPUs is kept in RAM: its ranks do not count.
        """
        spread = self.workload.config.topology.lm.parallel == "device_map" and self.hardware.kind == "cuda"
        role = max((role for role in self.memory if role.kind != "LM" or not spread), key=self.held)
        if self.hardware.kind == "cuda":
            return role, self.held(role)
        held = {rank: self.held(role) for role in self.memory for rank in role.ranks}
        nodes = range(0, len(held), self.per_node)
        return role, max(sum(held[rank] for rank in sorted(held)[first : first + self.per_node]) for first in nodes)

    @property
    def fits(self) -> bool:
        """Whether every memory holds what is put into it."""
        return self.fullest[1] <= USABLE * self.hardware.memory

    @property
    def remedy(self) -> str:
        """The keys that make the fullest rank smaller."""
        role, _ = self.fullest
        largest = max(self.memory[role], key=lambda item: item.bytes)
        return f"most of it is {largest.what} ({gigabytes(largest.bytes)}): change {', '.join(largest.keys)}"


def communicators(w: Workload, role: Role, hardware: Hardware) -> list[Item]:
    """What NCCL's communicators of a rank of ``role`` take: each process group for tensors on devices has one."""
    plan, group, rank = w.plan, role.group, role.ranks[0]
    count = 0
    if group is not None:
        count += 1 + (plan.engine != "local")
    if plan.colocated:
        count += 1
    elif group is not None:
        count += len(plan.lm)
    else:
        count += 1 + len(plan.groups)
    taken = count * hardware.communicator
    text = f"{count} process groups of rank {rank} x {hardware.communicator} bytes, assumed"
    return [Item("communicators", taken, text, ("topology.lm.dp", "topology.sae.groups"))] if taken else []


def gigabytes(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
