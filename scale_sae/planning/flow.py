"""What one rank moves on one link."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal


@dataclass(frozen=True)
class Flow:
    """Equal calls of one operation.

    Attributes:
        link: which ranks it is among.
        what: what is moved.
        bytes: per call, on one rank: of an all-gather all that the rank ends up with, of a reduce-scatter all that it
            begins with, of an all-reduce twice its tensor, of a message itself.
        count: calls; per step, or per chunk in ``LMProfile.flows``.
        ranks: members of the group, or peers of a message.
        formula: what ``bytes`` was computed from.
    """

    link: Literal["tp", "dp", "LM tp", "LM to SAE"]
    what: str
    op: Literal["all_reduce", "all_gather", "reduce_scatter", "send", "recv"]
    bytes: int
    count: Fraction | int
    ranks: int
    formula: str
