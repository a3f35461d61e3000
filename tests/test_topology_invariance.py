"""The promise that everything serves: topology never changes the result."""

import json
from pathlib import Path

import pytest
import torch

import runs
from scale_sae.activations.tokens import open_chunks
from scale_sae.config import load

HOOKPOINTS = ("model.layers.0", "model.layers.1")
REFERENCE = "colocated tp=1"
# float64 over 60 steps: a changed summation order gives about 1e-14, across LM tp the activations differ by 1e-15.
# One wrong row in one batch, or one latent selected otherwise, shows at 1e-4 and more.
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return train(tmp_path_factory.mktemp("reference"), REFERENCE)


def train(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(every tensor of the final checkpoint, the batches per hookpoint) of a run under the named topology."""
    topology, world = runs.TOPOLOGIES[name]
    config = runs.write_config(folder, runs.tiny_config(folder, topology=topology))
    drawn = runs.forked_run(config, world, record=True)
    return runs.sae_state(folder / "run"), {name: runs.batches_of(drawn, name) for name in HOOKPOINTS}


@pytest.mark.parametrize("name", [name for name in runs.TOPOLOGIES if name != REFERENCE])
def test_topology_never_changes_the_result(
    name: str,
    tmp_path: Path,
    reference: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    state, batches = train(tmp_path, name)
    difference = runs.largest_difference(state, reference[0])
    print(f"{name}: largest difference of any tensor {difference:.1e}")
    assert difference <= TOLERANCE
    lm_tp = runs.TOPOLOGIES[name][0]["lm"].get("tp", 1) if name.startswith("LM") else 1
    for hookpoint in HOOKPOINTS:
        ours, theirs = batches[hookpoint], reference[1][hookpoint]
        assert ours.shape == (60, 128, 256)
        if lm_tp == 1:
            assert torch.equal(ours, theirs)
        else:
            # The same rows in the same order: another row would differ by the size of an activation.
            assert float((ours - theirs).abs().max()) <= 1e-12

    check_token_count(tmp_path)


def check_token_count(folder: Path) -> None:
    """The LM ran the chunks that the run needs, each once: counted here by packing the text anew."""
    config = load(folder / "config.yaml")
    needed = config.train.training_tokens
    tokens = rows = last_chunk = 0
    for chunk in open_chunks(config.data, config.model):
        tokens, rows, last_chunk = tokens + chunk.tokens.numel(), rows + int(chunk.keep.sum()), int(chunk.keep.sum())
        if rows >= needed:
            break
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["lm_forward_tokens"] == tokens
    assert summary["lm_rows_kept"] == rows == summary["rows_trained"] + summary["rows_in_buffer"]
    assert summary["rows_in_buffer"] < last_chunk


def test_the_run_is_worth_comparing(reference: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """The reference trained for real: dead latents took part, and the encoder has left its tied start."""
    state, _ = reference
    dead = state["model.layers.1/wide/tokens_since_fired"] > 1000
    assert int(dead.sum()) > 128  # more than AuxK's k of d_in / 2, so that it selects
    assert not torch.equal(state["model.layers.0/small/W_enc_rows"], state["model.layers.0/small/W_dec"])
