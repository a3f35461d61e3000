"""What a run needs beside the memory of its devices: disk for checkpoints and the release, and the RAM of its nodes."""

from collections.abc import Iterator

from scale_sae.planning.shards import SAEShard, numbers
from scale_sae.planning.workload import Workload


def _shards(w: Workload) -> Iterator[SAEShard]:
    for group in w.plan.groups:
        for spec in w.jobs_of(group):
            yield SAEShard.of(w, spec, group)


def checkpoint_bytes(w: Workload) -> int:
    """Of one checkpoint: weights and moments of all matrices, and the buffer of each hookpoint where it is saved.

    What a latent has beside its rows of weights (biases, thresholds, counters) is left out.
    """
    total = 0
    for s in _shards(w):
        moment = 2 if s.spec.train.moments_dtype == "bfloat16" else s.wide
        total += s.tp * numbers(s.matrices) * (s.wide + 2 * moment)
    if w.config.checkpoint.buffer == "save":
        total += w.schedule.buffer * sum(w.widths.values()) * w.dtype.itemsize
    return total


def release_bytes(w: Workload) -> int:
    """Of the release of all SAEs, in the type that each computes in."""
    return sum(s.tp * numbers(s.matrices) * s.itemsize for s in _shards(w))


def copies_on_a_node(w: Workload, per_node: int) -> int:
    """RAM that the SAE ranks of a node need, each for a copy of its part, from the first checkpoint on."""
    ranks = len(w.plan.sae_ranks)
    return checkpoint_bytes(w) // ranks * min(per_node, ranks)
