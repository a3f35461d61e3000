"""Several SAE groups on one pass of the language model: each gets its own hookpoints' activations, and no others."""

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

import runs
from harness import run_ranks
from scale_sae import train
from scale_sae.activations.source import ActivationSource

CONTEXT, CHUNK, BATCH, STEPS = 32, 8, 128, 12
# Of different widths, so that a message's shape says whose rows it carries.
RESIDUAL, INNER = 256, 640
RUN: dict[str, Any] = {
    "hookpoints": ["model.layers.0"],
    "saes": [
        # The dearest SAE is dealt out first, to group 0.
        {"name": "wide", "architecture": "gated", "d_sae": 512, "dtype": "float64"},
        {"name": "a", "d_sae": 256, "k": 8, "dtype": "float64", "hookpoints": ["model.layers.1.mlp.act_fn"]},
        {"name": "b", "d_sae": 256, "k": 4, "dtype": "float64", "hookpoints": ["model.layers.1.mlp.act_fn"]},
    ],
    "train": {"training_tokens": STEPS * BATCH, "train_batch_size_tokens": BATCH},
}
TOPOLOGIES: dict[str, tuple[dict[str, Any], int]] = {
    "two LM ranks": ({"lm": {"dp": 2}, "sae": {"groups": 2}}, 4),
    "colocated": ({"lm": "colocated", "sae": {"groups": 2}}, 2),
}


def recorded(config: Path, rank: int, world: int) -> dict[str, Any]:
    """Trains; what this rank was sent: (width, sender) → messages with rows, and the chunks that its LM ran."""
    received: Counter[tuple[int, int]] = Counter()
    chunks: list[bytes] = []
    exchange, capture = dist.batch_isend_irecv, ActivationSource.capture

    def exchanged(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            if operation.op is dist.irecv and operation.tensor.is_floating_point():
                received[operation.tensor.shape[1], operation.peer] += 1
        return exchange(operations)

    def captured(self: ActivationSource, inputs: Tensor) -> dict[str, Tensor]:
        chunks.append(inputs.numpy().tobytes())
        return capture(self, inputs)

    dist.batch_isend_irecv = exchanged  # type: ignore[assignment]
    ActivationSource.capture = captured  # type: ignore[method-assign]
    assert train.run(str(config), (), {}) == 0
    return {"received": received, "chunks": chunks}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_group_gets_its_own_hookpoints_from_every_pass(name: str, tmp_path: Path) -> None:
    topology, world = TOPOLOGIES[name]
    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path, **RUN, topology=topology))
    residual, inner, *language = run_ranks(world, functools.partial(recorded, path), timeout=180, init=False)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["step"] == STEPS
    chunks = [chunk for rank in (residual, inner, *language) for chunk in rank["chunks"]]
    # Every chunk is forwarded once, though two groups train on it.
    assert len(set(chunks)) == len(chunks) and summary["lm_forward_tokens"] == len(chunks) * CHUNK * CONTEXT
    # Nothing but its own hookpoint's rows reaches a group...
    assert {width for width, _ in residual["received"]} == {RESIDUAL}
    assert {width for width, _ in inner["received"]} == {INNER}
    # ... once for each chunk, though two SAEs of the second group train on them.
    if name == "colocated":  # of the chunks that the other rank forwarded
        others = [len(rank["chunks"]) for rank in (inner, residual)]
        assert [sum(rank["received"].values()) for rank in (residual, inner)] == others
    else:
        # Each LM rank's last message says that it ends.
        for rank in (residual, inner):
            assert sum(rank["received"].values()) == len(chunks) + len(language)
            assert {sender for _, sender in rank["received"]} == set(range(2, world))
        assert not residual["chunks"] and not inner["chunks"]
    assert not any(rank["received"] for rank in language)
