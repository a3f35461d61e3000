"""A model whose parts run through torch.compile: which parts, and that its activations stay what they are."""

import copy
import os
from pathlib import Path

import pytest
import torch
from test_source import EMBEDDED, mesh_of, tokens
from torch import Tensor

from harness import run_ranks
from scale_sae.activations.architecture import build_architecture, inspect_model
from scale_sae.activations.compiled import compile_between
from scale_sae.activations.source import ActivationSource
from scale_sae.config import ModelConfig
from scale_sae.errors import UserError

# The model's norms are worked out in float32 in a float64 model too: a few roundings of 6e-8 in each layer.
TOLERANCE = 1e-6

LAYERS = [f"model.layers.{i}" for i in range(4)]


def compiled_parts(hookpoints: list[str]) -> list[str]:
    network = copy.deepcopy(build_architecture(EMBEDDED))
    compile_between(network, hookpoints)
    return [name for name, module in network.named_modules() if "forward" in vars(module)]


def test_the_largest_parts_without_a_hookpoint_inside_are_compiled() -> None:
    around = ["model.norm", "model.rotary_emb"]
    assert compiled_parts(["model.layers.1", "model.layers.3:in"]) == [*LAYERS, *around]
    assert compiled_parts(["model.embed_tokens"]) == [*LAYERS, *around]
    assert compiled_parts(["lm_head"]) == ["model"]
    inside = compiled_parts(["model.layers.2.mlp.act_fn", "model.layers.2.mlp"])
    of_layer = [f"model.layers.2.{part}" for part in ("self_attn", "input_layernorm", "post_attention_layernorm")]
    assert sorted(inside) == sorted([*LAYERS[:2], *of_layer, "model.layers.2.mlp.act_fn", LAYERS[3], *around])


def test_what_cannot_be_compiled_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here for want of a C++ compiler."""
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (str(tmp_path / "none"),))
    monkeypatch.setattr(inductor, "compile_threads", 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = ActivationSource(EMBEDDED, {"model.norm": 256})
    source.compile()
    with pytest.raises(UserError, match=r"^model.compile: true, but .*; set it to false$") as error:
        source.capture(tokens())
    assert "\n" not in str(error.value)


HOOKPOINTS = ["model.layers.0:in", "model.layers.1", "model.layers.2.mlp.act_fn", "model.layers.2.self_attn.o_proj:in"]


def both_ways(tp: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """On each of tp ranks, activations and logits of the model as it is and compiled."""

    def worker(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes, which would outlive the rank
        model = ModelConfig(dtype="float64")
        mesh = mesh_of([*range(tp)]) if tp > 1 else None
        source = ActivationSource(model, inspect_model(model, HOOKPOINTS, tp=tp), mesh=mesh)
        found = []
        for way in ("as it is", "compiled"):
            if way == "compiled":
                source.compile()
            states = source.capture(tokens())
            states |= {f"{name} of fewer": x for name, x in source.capture(tokens(contexts=2)).items()}
            with source.replace("model.layers.1", lambda x: x.flip(-1)):
                states["replaced"] = source.logits(tokens())
            found.append(states)
        return found[0], found[1]

    return run_ranks(tp, worker, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_activations_are_those_of_the_model_as_it_is(tp: int) -> None:
    results = both_ways(tp)
    for expected, actual in results:
        assert actual.keys() == expected.keys() and len(actual) == 2 * len(HOOKPOINTS) + 1
        for name, tensor in expected.items():
            assert (actual[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), name
        # Were all equal in every bit, nothing would have been compiled.
        assert any(not torch.equal(actual[name], tensor) for name, tensor in expected.items())
        assert all(torch.equal(actual[name], results[0][1][name]) for name in actual)
