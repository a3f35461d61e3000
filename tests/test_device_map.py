"""A model that one rank spreads over its devices: here RAM and disk, through the same hooks as over several GPUs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PretrainedConfig

import runs
from scale_sae.activations.architecture import inspect_model
from scale_sae.activations.device_map import GIB, bytes_off_device, max_memory
from scale_sae.activations.source import ActivationSource
from scale_sae.config import ModelConfig
from scale_sae.errors import UserError

EMBEDDED = ModelConfig(dtype="float64")
CPU = (torch.device("cpu"),)


def tokens() -> Tensor:
    return torch.randint(4, 100, (3, 10), generator=torch.Generator().manual_seed(0))


def save(folder: Path, config: PretrainedConfig) -> ModelConfig:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return ModelConfig(name=str(folder), dtype="float32")  # which the experts' grouped products need


def both(model: ModelConfig, patterns: list[str], share: float) -> tuple[ActivationSource, ActivationSource]:
    """(the model as it is, the same with RAM for this share of its weights only: the rest is on disk)."""
    widths = inspect_model(model, patterns, parallel="device_map")
    whole = ActivationSource(model, widths)
    size = bytes_off_device(whole.model)[1]
    spread = ActivationSource(model, widths, spread={"cpu": int(share * size)})
    away, of = bytes_off_device(spread.model)
    assert of == size and 0.2 * size < away < size
    return whole, spread


MODELS: list[tuple[PretrainedConfig | None, str]] = [
    (None, "model.layers.*"),
    # Without a tensor-parallel plan.
    (GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=101), "transformer.h.*"),
    # Its experts are stored one by one and computed with as one tensor: weights that are no file's as they are.
    (
        MixtralConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        ),
        "model.layers.*",
    ),
]


@pytest.mark.parametrize(("config", "layers"), MODELS, ids=["embedded", "gpt2", "mixtral"])
def test_activations_are_bitwise_those_of_the_model_in_one_piece(
    config: PretrainedConfig | None, layers: str, tmp_path: Path
) -> None:
    model = EMBEDDED if config is None else save(tmp_path, config)
    whole, spread = both(model, [layers, f"{layers}:in", f"{layers}.mlp"], 0.7)
    for _ in range(2):  # what a forward that was cut short left behind must not show in the next
        expected, found = whole.capture(tokens()), spread.capture(tokens())
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(spread.logits(tokens()), whole.logits(tokens()))


def test_stops_after_the_last_hookpoint_and_reads_no_more_weights() -> None:
    _, spread = both(EMBEDDED, ["model.layers.2.mlp:in", "model.layers.0"], 0.6)
    called: list[str] = []
    for name in ("model.layers.2.self_attn", "model.layers.2.mlp", "model.layers.3"):
        spread.model.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: called.append(name))
    away = bytes_off_device(spread.model)
    spread.capture(tokens())
    assert called == ["model.layers.2.self_attn"]
    assert bytes_off_device(spread.model) == away


def test_what_is_replaced_is_seen_by_what_follows() -> None:
    whole, spread = both(EMBEDDED, ["model.layers.1", "model.layers.2:in"], 0.6)
    for hookpoint in ("model.layers.1", "model.layers.2:in"):
        found: list[Tensor] = []
        seen: list[Tensor] = []
        for source in (whole, spread):
            with source.replace(hookpoint, lambda x: x.flip(-1)):
                found.append(source.logits(tokens()))
            with source.observe(hookpoint, seen.append):
                source.logits(tokens())
        assert torch.equal(*found) and torch.equal(*seen)


def test_the_folder_of_offloaded_weights_goes_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = MODELS[2][0]
    assert config is not None
    _, spread = both(save(tmp_path / "model", config), ["model.layers.0"], 0.6)
    (folder,) = tmp_path.glob("scale_sae_offload_*")
    assert any(folder.iterdir())
    del spread
    assert not folder.exists()


def test_ram_is_shared_by_the_processes_of_a_machine_and_may_be_limited() -> None:
    assert max_memory(CPU, 0.25, 1) == {"cpu": GIB // 4}
    alone, four = (max_memory(CPU, None, processes)["cpu"] for processes in (1, 4))
    # Other programs take and give memory back between the two looks at what is free.
    assert 0.8 < 4 * four / alone < 1.25
    assert max_memory(CPU, 1e6, 4)["cpu"] < 1e6 * GIB


def test_a_model_that_does_not_say_what_must_stay_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path, GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=101))
    monkeypatch.setattr("transformers.GPT2PreTrainedModel._no_split_modules", None)
    with pytest.raises(UserError, match=r"device_map, but .* \(GPT2LMHeadModel\) does not say .*\.parallel: tp$"):
        inspect_model(model, ["transformer.h.0"], parallel="device_map")


# Of the 21.5 MiB that the embedded model has in float64, so that of the two layers that are captured one is on disk.
LIMIT_GIB = 0.0165


def test_a_run_is_bitwise_that_of_the_model_in_one_piece(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    states: list[dict[str, Tensor]] = []
    for lm in ({"dp": 2}, {"dp": 2, "parallel": "device_map", "max_memory_gib": LIMIT_GIB}):
        folder = tmp_path / str(len(states))
        folder.mkdir()
        topology: dict[str, Any] = {"lm": lm, "sae": {"tp": 2}}
        config = runs.tiny_config(folder, topology=topology)
        config["train"]["training_tokens"] = 16 * 128
        runs.forked_run(runs.write_config(folder, config), 4)
        states.append(runs.sae_state(folder / "run"))
    assert runs.largest_difference(*states) == 0
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and notes[0].endswith("fit on no device and are read from RAM or disk for every forward")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_activations_on_other_devices_come_to_that_of_the_rank() -> None:
    """The model on the first GPU, or on all, partly in RAM; the rank takes activations on the CPU."""
    widths = inspect_model(EMBEDDED, ["model.layers.*", "model.layers.*:in"], parallel="device_map")
    size = bytes_off_device(ActivationSource(EMBEDDED, widths).model)[1]
    gpus = range(torch.cuda.device_count())
    expected = ActivationSource(EMBEDDED, widths, "cuda:0").capture(tokens())
    for limit in (0.8 / len(gpus), 2):
        budget: dict[int | str, int] = {number: int(limit * size) for number in gpus}
        spread = ActivationSource(EMBEDDED, widths, "cpu", spread={**budget, "cpu": 2 * size})
        for name, values in spread.capture(tokens()).items():
            assert values.device == torch.device("cpu")
            assert torch.equal(values, expected[name].cpu())
        with spread.replace("model.layers.1", lambda x: x.clone()):
            assert spread.logits(tokens()).device == torch.device("cpu")
