"""Memory, time and cost of a run on one topology: what the planner says of it."""

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
        """What a rank of each role holds, beside the process itself, while AuxK takes most."""
        # More dead latents are chosen among, which takes no more than the choice.
        dead = max(self.workload.widths.values()) // 2 + 1
        return {
            role: items(self.workload, role, self.profile if role.runs_lm else None, self.hardware.kind, dead)
            for role in self.workload.roles()
        }

    @cached_property
    def prediction(self) -> Prediction:
        """How long it takes."""
        return predict(self.workload, self.hardware, self.profile, self.per_node)

    def held(self, role: Role) -> int:
        """Bytes that a rank of the role takes, the process included."""
        return self.of_process(role) + sum(item.bytes for item in self.memory[role])

    def of_process(self, role: Role) -> int:
        """Bytes that a rank of the role takes without a tensor."""
        return self.hardware.runtime + (self.hardware.reading if role.runs_lm else 0)

    @property
    def fullest(self) -> tuple[Role, int]:
        """The role whose ranks hold most, and the bytes of the memory that they share: a GPU's, or a node's."""
        role = max(self.memory, key=self.held)
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


def gigabytes(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
