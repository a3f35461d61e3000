"""Capturing activations: against transformers' own hidden states, and split over ranks against whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
)

from harness import run_ranks
from scale_sae.activations.architecture import (
    fill_pattern,
    image_positions,
    input_name,
    inspect_model,
    kept_positions,
)
from scale_sae.activations.source import ActivationSource
from scale_sae.config import DataConfig, ModelConfig
from scale_sae.errors import UserError

EMBEDDED = ModelConfig(dtype="float64")
SMALL: dict[str, Any] = {
    "vocab_size": 101,  # not divisible by any number of ranks
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VIT = ViTConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)


def tokens(contexts: int = 3, context: int = 10) -> Tensor:
    return torch.randint(4, 100, (contexts, context), generator=torch.Generator().manual_seed(0))


def save(folder: Path, config: PretrainedConfig, auto: Any, **keys: Any) -> ModelConfig:
    """A small random model, saved to ``folder`` (biases too, which transformers starts at zero)."""
    torch.manual_seed(0)
    network = auto.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    network.save_pretrained(folder)
    return ModelConfig(name=str(folder), auto_class=auto.__name__, dtype="float64", **keys)


def source(model: ModelConfig, patterns: list[str]) -> ActivationSource:
    return ActivationSource(model, inspect_model(model, patterns))


class TestInspection:
    def test_widths_in_model_order(self) -> None:
        patterns = [
            "model.layers.*.mlp.act_fn",
            "model.layers.1.self_attn.o_proj:in",
            "model.layers.*",
            "model.layers.1:in",
        ]
        found = inspect_model(EMBEDDED, patterns)
        assert list(found.items()) == [
            ("model.layers.0", 256),
            ("model.layers.0.mlp.act_fn", 640),
            ("model.layers.1:in", 256),
            ("model.layers.1", 256),
            ("model.layers.1.self_attn.o_proj:in", 256),
            ("model.layers.1.mlp.act_fn", 640),
            ("model.layers.2", 256),
            ("model.layers.2.mlp.act_fn", 640),
            ("model.layers.3", 256),
            ("model.layers.3.mlp.act_fn", 640),
        ]

    def test_attention_input_passed_by_keyword(self) -> None:
        assert inspect_model(EMBEDDED, ["model.layers.2.self_attn:in"]) == {"model.layers.2.self_attn:in": 256}

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("model.layer.1", r"model\.layer\.1 matches no module.*did you mean model\.layers\.1"),
            ("model.rotary_*", r"model\.rotary_emb gives a tensor \[1, 7, 32\]"),
            ("layers.*", r"layers\.\* matches no module"),
            ("model.layers.*:out", "matches no module"),
            ("model.layers", "called 0 times"),
            ("model", "gives no tensor"),
        ],
    )
    def test_wrong_hookpoint(self, pattern: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            inspect_model(EMBEDDED, ["model.norm", pattern])
        assert "\n" not in str(error.value)

    def test_module_called_more_than_once(self, tmp_path: Path) -> None:
        config = AlbertConfig(**SMALL, embedding_size=16)
        model = save(tmp_path, config, AutoModel)
        with pytest.raises(UserError, match="called 2 times"):
            inspect_model(model, ["encoder.albert_layer_groups.0.albert_layers.0"])

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (ModelConfig(name="/no/such/folder"), "model.name: /no/such/folder"),
            (ModelConfig(name="no-such-org/no-such-model"), "model.name: no-such-org/no-such-model"),
            (ModelConfig(auto_class="AutoModelForCausalLm"), "model.auto_class: .*did you mean AutoModelForCausalLM"),
            (ModelConfig(auto_class="AutoModelForImageClassification"), "model.auto_class: .* cannot load embedded"),
        ],
    )
    def test_wrong_model(self, model: ModelConfig, message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            inspect_model(model, ["model.layers.*"])
        assert "\n" not in str(error.value)

    def test_model_that_needs_more_than_tokens(self, tmp_path: Path) -> None:
        T5Config(vocab_size=101, d_model=32, d_ff=48, num_layers=2, num_heads=4).save_pretrained(tmp_path)
        with pytest.raises(UserError, match="does not run on input_ids alone"):
            inspect_model(ModelConfig(name=str(tmp_path), auto_class="AutoModel"), ["encoder.block.*"])

    def test_kept_positions(self) -> None:
        assert kept_positions(EMBEDDED, DataConfig(context_size=16)) == 16
        assert kept_positions(EMBEDDED, DataConfig(context_size=16, seqpos_slice=(1, -2))) == 13


class TestCapture:
    def test_equals_hidden_states(self) -> None:
        captured = source(EMBEDDED, ["model.layers.*", "model.layers.*:in", "model.norm"])
        x = tokens()
        found = captured.capture(x)
        # The last of transformers' hidden states is that after the norm.
        states = captured.model(x, output_hidden_states=True).hidden_states
        for layer in range(4):
            assert torch.equal(found[f"model.layers.{layer}:in"], states[layer])
        for layer in range(3):
            assert torch.equal(found[f"model.layers.{layer}"], states[layer + 1])
        assert torch.equal(found["model.norm"], states[4])

    def test_stops_after_the_last_hookpoint(self) -> None:
        captured = source(EMBEDDED, ["model.layers.1.mlp:in", "model.layers.0"])
        called: list[str] = []
        for name in ("model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.2"):
            captured.model.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: called.append(name))
        captured.capture(tokens(3, 10))
        assert called == ["model.layers.1.self_attn"]
        captured.capture(tokens(2, 5))
        assert captured.forward_tokens == 40

    def test_dtype(self) -> None:
        captured = source(ModelConfig(dtype="bfloat16"), ["model.layers.0"])
        assert captured.capture(tokens())["model.layers.0"].dtype == torch.bfloat16

    def test_output_that_is_changed_in_place_later(self, tmp_path: Path) -> None:
        config = FalconConfig(vocab_size=101, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        captured = source(save(tmp_path, config, AutoModelForCausalLM), ["transformer.h.0.mlp", "transformer.h.0"])
        seen: list[Tensor] = []
        captured.model.transformer.h[0].mlp.register_forward_hook(lambda m, a, output: seen.append(output.clone()))
        assert torch.equal(captured.capture(tokens())["transformer.h.0.mlp"], seen[0])

    def test_weights_without_safetensors(self, tmp_path: Path) -> None:
        model = save(tmp_path, GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=101), AutoModelForCausalLM)
        torch.save({}, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"model.name: .*safetensors"):
            source(model, ["transformer.h.0"])

    def test_encoder(self, tmp_path: Path) -> None:
        captured = source(save(tmp_path, BertConfig(**SMALL), AutoModel), ["encoder.layer.*"])
        states = captured.model(tokens(), output_hidden_states=True).hidden_states
        found = captured.capture(tokens())
        assert torch.equal(found["encoder.layer.0"], states[1])
        assert torch.equal(found["encoder.layer.1"], states[2])

    def test_sequence_classifier(self, tmp_path: Path) -> None:
        model = save(tmp_path, BertConfig(**SMALL, num_labels=3), AutoModelForSequenceClassification)
        captured = source(model, ["bert.encoder.layer.1"])
        states = captured.model(tokens(), output_hidden_states=True).hidden_states
        assert torch.equal(captured.capture(tokens())["bert.encoder.layer.1"], states[2])
        with pytest.raises(UserError, match="classifier gives a tensor"):
            inspect_model(model, ["classifier"])

    def test_image_model(self, tmp_path: Path) -> None:
        model = save(tmp_path, VIT, AutoModel)
        assert input_name(model) == "pixel_values"
        assert image_positions(model) == 5  # four patches and the class token
        captured = source(model, ["layers.*"])
        pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        states = captured.model(pixels.double(), output_hidden_states=True).hidden_states
        found = captured.capture(pixels)
        assert torch.equal(found["layers.0"], states[1])
        assert captured.forward_tokens == 10
        with pytest.raises(UserError, match=r"patch_embeddings gives a tensor \[3, 4, 32\], not .*\[3, 5, width\]"):
            inspect_model(model, ["embeddings.patch_embeddings"])


class TestReplace:
    def test_identity_changes_nothing(self) -> None:
        changed = source(EMBEDDED, ["model.layers.1", "model.layers.2.mlp:in"])
        plain = changed.model(tokens()).logits
        for hookpoint in changed.hookpoints:
            with changed.replace(hookpoint, lambda x: x.clone()):
                assert torch.equal(changed.logits(tokens()), plain)

    @pytest.mark.parametrize(
        ("hookpoint", "follower"),
        [
            ("model.layers.1", "model.layers.2"),
            ("model.layers.2:in", "model.layers.2.input_layernorm"),
            ("model.layers.2.self_attn:in", "model.layers.2.self_attn.q_proj"),
        ],
    )
    def test_what_follows_sees_the_replacement(self, hookpoint: str, follower: str) -> None:
        changed = source(EMBEDDED, [hookpoint])
        plain = changed.logits(tokens())
        new = torch.rand(3, 10, 256, dtype=torch.float64)
        seen = []
        handle = changed.model.get_submodule(follower).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with changed.replace(hookpoint, lambda x: new):
            changed.logits(tokens())
        handle.remove()
        assert torch.equal(seen[0], new)
        assert torch.equal(changed.logits(tokens()), plain)

    def test_tuple_outputs_keep_their_other_elements(self) -> None:
        changed = source(EMBEDDED, ["model.layers.1.self_attn"])
        with changed.replace("model.layers.1.self_attn", torch.zeros_like):
            found = changed.logits(tokens())
        with torch.no_grad():
            changed.model.model.layers[1].self_attn.o_proj.weight.zero_()
        assert torch.equal(found, changed.logits(tokens()))


# Split over ranks, sums are taken in another order: about 1e-15 of the largest value after four layers.
TOLERANCE = 1e-12

HOOKPOINTS = [
    "model.embed_tokens",
    "model.layers.*",
    "model.layers.*.self_attn.q_proj",
    "model.layers.*.self_attn.o_proj:in",
    "model.layers.*.mlp.act_fn",
    "model.layers.*.mlp.down_proj:in",
    "lm_head",
]


def mesh_of(ranks: list[int]) -> DeviceMesh:
    """A mesh of a part of the world; every rank of the world calls this."""
    group = dist.new_group(ranks)
    return DeviceMesh.from_group(group, "cpu") if dist.get_rank() in ranks else None  # type: ignore[return-value]


def captured_by_ranks(world: int, ranks: list[int], model: ModelConfig, widths: dict[str, int]) -> list[Any]:
    def worker(rank: int, world: int) -> dict[str, Tensor] | None:
        mesh = mesh_of(ranks)
        if rank not in ranks:
            return None
        split = ActivationSource(model, widths, mesh=mesh)
        found = split.capture(tokens()) | {"logits": split.logits(tokens())}
        for hookpoint in [name for name in widths if name.endswith((":in", "act", "act_fn", "activation_fn"))]:
            with split.replace(hookpoint, lambda x: x.flip(-1)):
                found[f"{hookpoint} replaced"] = split.logits(tokens())
        return found

    return [result for result in run_ranks(world, worker) if result is not None]


def assert_as_whole(results: list[Any], model: ModelConfig, widths: dict[str, int]) -> None:
    whole = ActivationSource(model, widths)
    wanted = whole.capture(tokens()) | {"logits": whole.logits(tokens())}
    for result in results:
        for name in [name for name in result if name.endswith(" replaced")]:
            with whole.replace(name.removesuffix(" replaced"), lambda x: x.flip(-1)):
                wanted[name] = whole.logits(tokens())
        assert result.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert type(result[name]) is Tensor
            assert result[name].shape == tensor.shape, name
            assert (result[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), name


class TestTensorParallel:
    @pytest.mark.parametrize(("world", "ranks"), [(3, [1, 2]), (5, [0, 1, 2, 3])])
    def test_part_of_the_world_equals_one_rank(self, world: int, ranks: list[int]) -> None:
        widths = inspect_model(EMBEDDED, HOOKPOINTS, tp=len(ranks))
        results = captured_by_ranks(world, ranks, EMBEDDED, widths)
        assert len(results) == len(ranks)
        for result in results[1:]:
            for name, tensor in result.items():
                assert torch.equal(tensor, results[0][name]), name
        assert_as_whole(results, EMBEDDED, widths)

    @pytest.mark.parametrize(
        ("config", "pattern"),
        [
            (Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8), "model.layers.*"),
            (Phi3Config(**SMALL, num_key_value_heads=2), "model.layers.*"),
            (GPTNeoXConfig(**SMALL), "gpt_neox.layers.*"),
        ],
        ids=lambda value: getattr(value, "model_type", ""),
    )
    def test_plans_of_other_models(self, tmp_path: Path, config: PretrainedConfig, pattern: str) -> None:
        model = save(tmp_path, config, AutoModelForCausalLM)
        act = {"qwen3": "mlp.act_fn", "phi3": "mlp.activation_fn", "gpt_neox": "mlp.act"}[config.model_type]
        widths = inspect_model(model, [pattern, f"{pattern}.mlp", f"{pattern}.{act}"], tp=2)
        assert_as_whole(captured_by_ranks(3, [0, 2], model, widths), model, widths)

    def test_each_rank_keeps_only_its_shard(self) -> None:
        def worker(rank: int, world: int) -> int:
            split = ActivationSource(EMBEDDED, {"model.layers.0": 256}, mesh=mesh_of([0, 1, 2, 3]))
            locals_ = [getattr(p, "_local_tensor", p.data) for p in split.model.parameters()]
            return sum(local.untyped_storage().nbytes() for local in locals_)

        whole = sum(p.nbytes for p in ActivationSource(EMBEDDED, {"model.layers.0": 256}).model.parameters())
        # Norms are on every rank, and the tied embedding is cut twice: as embedding and as head.
        assert max(run_ranks(4, worker)) < 1.1 * whole / 4

    @pytest.mark.parametrize(
        ("tp", "message"),
        [
            (3, r"tp: 3 does not divide num_attention_heads of embedded \(LlamaForCausalLM\), 8; use a divisor of 4"),
            (
                8,
                r"tp: 8 does not divide num_key_value_heads of embedded .*, 4; use .* or set topology.lm.tp: 1, and ",
            ),
        ],
    )
    def test_sizes_that_do_not_divide(self, tp: int, message: str) -> None:
        with pytest.raises(UserError, match=message):
            inspect_model(EMBEDDED, ["model.layers.0"], tp=tp)

    def test_intermediate_size_that_does_not_divide(self, tmp_path: Path) -> None:
        Qwen3Config(**SMALL | {"intermediate_size": 49}, num_key_value_heads=2, head_dim=8).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"does not divide the size of model.layers.0.mlp.gate_proj .*, 49"):
            inspect_model(ModelConfig(name=str(tmp_path)), ["model.layers.0"], tp=2)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (GPT2Config(n_embd=32, n_layer=1, n_head=2), r"\(GPT2LMHeadModel\) has no tensor-parallel plan"),
            (
                MixtralConfig(**SMALL, num_key_value_heads=2),
                r"\(MixtralForCausalLM\) splits model.layers.0.mlp.experts.* by .*, which is not supported",
            ),
        ],
    )
    def test_model_that_cannot_be_split(self, tmp_path: Path, config: PretrainedConfig, message: str) -> None:
        config.save_pretrained(tmp_path)
        remedy = "; set topology.lm.tp: 1, and topology.lm.parallel: device_map if one GPU cannot hold the model"
        with pytest.raises(UserError, match=f"topology.lm.tp: 2.*{message}{remedy}$") as error:
            inspect_model(ModelConfig(name=str(tmp_path)), ["lm_head"], tp=2)
        assert "\n" not in str(error.value)
        # The way out is one: the same model is taken as it is told to be.
        assert inspect_model(ModelConfig(name=str(tmp_path)), ["lm_head"], parallel="device_map")

    def test_heads_that_no_number_of_ranks_divides(self, tmp_path: Path) -> None:
        Qwen3Config(**SMALL | {"num_attention_heads": 3}, num_key_value_heads=1, head_dim=8).save_pretrained(tmp_path)
        with pytest.raises(
            UserError, match=r"heads of .* \(Qwen3ForCausalLM\), 3; set topology.lm.tp: 1, and .*device_map"
        ):
            inspect_model(ModelConfig(name=str(tmp_path)), ["model.layers.0"], tp=2)

    def test_activation_that_cannot_be_gathered_is_refused_by_name(self) -> None:
        def worker(rank: int, world: int) -> str:
            # A width that no gathering of two equal parts gives.
            split = ActivationSource(EMBEDDED, {"model.layers.0.mlp.act_fn": 641}, mesh=mesh_of([0, 1]))
            with pytest.raises(UserError) as error:
                split.capture(tokens())
            return str(error.value)

        for message in run_ranks(2, worker):
            assert "model.layers.0.mlp.act_fn has 320 of 641 columns" in message


@pytest.mark.parametrize(
    ("targets", "patterns", "name", "expected"),
    [
        (["l.*.mlp"], ["l.*.mlp:in"], "l.12.mlp:in", "l.12.mlp"),
        (["l.*"], ["l.*.attn.*"], "l.3.attn.q", "l.3"),
        (["*.l.*.out"], ["*.l.*"], "enc.l.7", "enc.l.7.out"),
        (["norm"], ["l.*"], "l.3", "norm"),
        (["a*"], ["l.x*"], "l.x", "a"),  # a star may stand for nothing
        (["first", "second.*"], ["l.1", "l.*"], "l.1", "first"),
        (["first", "second.*"], ["l.1", "l.*"], "l.2", "second.2"),
        (["a.*"], ["l+.*"], "l+.2", "a.2"),  # only the star is special
    ],
)
def test_fill_pattern(targets: list[str], patterns: list[str], name: str, expected: str) -> None:
    assert fill_pattern(targets, patterns, name) == expected
