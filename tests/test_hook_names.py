"""TransformerLens's names against TransformerLens: every translation is compared in numbers, on random tiny models."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge.sources.transformers import boot

from scale_sae.activations.architecture import attach
from scale_sae.embedded import MODEL_FOLDER
from scale_sae.errors import UserError
from scale_sae.hook_names import places, to_hf, to_transformer_lens

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 2,
}
GPT_SIZES: dict[str, Any] = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
STREAM = {"hook_resid_pre", "hook_resid_post"}
OUT = {"hook_attn_out", "hook_mlp_out", "attn.hook_z"}
MLP = {"mlp.hook_in", "mlp.hook_pre", "mlp.hook_post"}
GATED = MLP | {"mlp.hook_pre_linear"}
MID = {"hook_resid_mid"}
# model → class, config, and the names of a layer that must be translated both ways
MODELS: dict[str, tuple[str, Any, set[str]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}, STREAM | OUT | GATED | MID),
    "mistral": ("Mistral", {"num_key_value_heads": 2}, STREAM | OUT | GATED | MID),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}, STREAM | OUT | GATED | MID),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}, STREAM | OUT | GATED | MID),
    "gemma": ("Gemma", {"num_key_value_heads": 2, "head_dim": 8}, STREAM | OUT | GATED | MID),
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8}, STREAM | OUT | GATED | MID),
    "gemma3": ("Gemma3", {"num_key_value_heads": 2, "head_dim": 8}, STREAM | OUT | GATED | MID),
    "olmo2": ("Olmo2", {}, STREAM | OUT | GATED | MID),
    "phi": ("Phi", {}, STREAM | OUT | MLP),
    "gpt2": ("GPT2", None, STREAM | OUT | MLP | MID),
    "gptj": ("GPTJ", {"rotary_dim": 4}, STREAM | OUT | MLP),
    "gpt_neo": (
        "GPTNeo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        STREAM | OUT | MLP | MID,
    ),
    "gpt_neox": ("GPTNeoX", {}, STREAM | OUT | MLP),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, STREAM | OUT | (MLP - {"mlp.hook_in"})),
}


def make(name: str) -> torch.nn.Module:
    """A random model, also where initialisation would leave ones and zeros."""
    family, extra, _ = MODELS[name]
    sizes = GPT_SIZES if name in ("gpt2", "gptj") else SIZES
    if name == "gpt_neo":
        sizes = {key: value for key, value in SIZES.items() if key not in ("num_hidden_layers", "num_attention_heads")}
    kind = "Gemma3TextConfig" if name == "gemma3" else f"{family}Config"
    config = getattr(transformers, kind)(**sizes, **(extra or {}))
    config.architectures = [f"{family}LMHeadModel" if name == "gpt2" else f"{family}ForCausalLM"]
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(transformers, config.architectures[0])(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


IDS = torch.arange(4, 22).view(2, 9)


def module_names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]


@torch.no_grad()
def activations(model: torch.nn.Module) -> dict[str, Tensor]:
    """Hookpoint → activation, of every module's input and output that is a tensor of numbers."""
    found: dict[str, Tensor] = {}

    def note(hookpoint: str) -> Any:
        def see(x: Any) -> None:
            if isinstance(x, Tensor) and x.is_floating_point():
                found[hookpoint] = x.clone()

        return see

    handles = [attach(model, name + end, note(name + end)) for name in module_names(model) for end in ("", ":in")]
    model(IDS)
    for handle in handles:
        handle.remove()
    return found


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    # hook_z has the heads apart. The sums are the same but for their order: float32 rounding of values around 1 to 100.
    torch.testing.assert_close(ours.flatten(), theirs.flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_translation_names_the_same_activation(name: str) -> None:
    model = make(name)
    names, ours = module_names(model), activations(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_FOLDER)
    with torch.no_grad():
        theirs = boot(name, hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu").run_with_cache(IDS)[1]
    translated = {hookpoint: to_transformer_lens(hookpoint, names) for hookpoint in ours}
    for hookpoint, hook_name in translated.items():
        if hook_name is not None:
            assert_same(ours[hookpoint], theirs[hook_name])
    wanted = {f"blocks.{layer}.{part}" for layer in range(2) for part in MODELS[name][2]} | {"hook_embed"}
    for hook_name in wanted:
        assert_same(ours[to_hf(hook_name, names)], theirs[hook_name])
    # Of two names of one activation (OLMo 2 has no norm before the MLP) only one comes back.
    twice = {f"blocks.{layer}.hook_resid_mid" for layer in range(2)} if name == "olmo2" else set()
    assert wanted - twice <= {hook_name for hook_name in translated.values() if hook_name is not None}
    if "hook_resid_mid" not in MODELS[name][2]:
        with pytest.raises(UserError, match=r"no module of the model is known to give blocks.1.hook_resid_mid"):
            to_hf("blocks.1.hook_resid_mid", names)


def test_what_processing_of_weights_changes() -> None:
    """The docstring's list, in GPT-2: which activations TransformerLens's default processing moves away."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    model = make("gpt2")
    names, ours = module_names(model), activations(model)
    processing = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    names_of_all = [f"blocks.1.{part}" for part in MODELS["gpt2"][2] - {"mlp.hook_in"}] + ["hook_embed"]

    def changed(*wanted: str) -> set[str]:
        # A new one each time: processing writes into it.
        config = HookedTransformerConfig(
            n_layers=2, d_model=32, n_ctx=32, n_heads=4, d_head=8, d_mlp=128, d_vocab=260, act_fn="gelu_new",
            normalization_type="LN", eps=1e-5, device="cpu",
        )  # fmt: skip
        theirs = HookedTransformer(config)
        weights = {name: tensor.detach().clone() for name, tensor in convert_gpt2_weights(model, config).items()}
        theirs.load_and_process_state_dict(weights, **{name: name in wanted for name in processing})
        with torch.no_grad():
            cache = theirs.run_with_cache(IDS)[1]
        apart = {name: ours[to_hf(name, names)].flatten() - cache[name].flatten() for name in names_of_all}
        return {name for name, difference in apart.items() if difference.abs().max() > 1e-2}

    assert changed() == set()
    assert changed("fold_ln") == set()
    assert changed("fold_ln", "fold_value_biases") == {"blocks.1.attn.hook_z"}
    written = {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"}
    assert changed("center_writing_weights") == {f"blocks.1.{part}" for part in written} | {"hook_embed"}


def test_without_the_model_only_the_residual_stream() -> None:
    assert to_transformer_lens("model.layers.3") == "blocks.3.hook_resid_post"
    assert to_transformer_lens("transformer.h.11:in") == "blocks.11.hook_resid_pre"
    assert to_transformer_lens("gpt_neox.layers.0") == "blocks.0.hook_resid_post"
    # Gemma 2 normalises it before it counts, Llama does not; the others may be no decoders.
    for hookpoint in ("model.layers.3.mlp", "layers.3", "model.decoder.layers.0", "encoder.layer.0", "model.layers.*"):
        assert to_transformer_lens(hookpoint) is None


def test_a_model_without_a_head() -> None:
    model = make("llama").model
    assert isinstance(model, torch.nn.Module)
    names = module_names(model)
    assert to_hf("blocks.1.hook_mlp_out", names) == "layers.1.mlp"
    assert to_transformer_lens("layers.1.self_attn.o_proj:in", names) == "blocks.1.attn.hook_z"
    assert to_hf("hook_embed", names) == "embed_tokens"


def test_models_that_are_no_decoders_have_no_such_names() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for model in (
        transformers.BertModel(transformers.BertConfig(vocab_size=260, **small)),
        transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **small)),
    ):
        names = module_names(model)
        assert all(to_transformer_lens(name + end, names) is None for name in names for end in ("", ":in"))
        with pytest.raises(UserError, match=r"no module of the model is known to give blocks.1.hook_resid_post"):
            to_hf("blocks.1.hook_resid_post", names)


@pytest.mark.parametrize(
    ("hook_name", "words"),
    [
        ("blocks.2.hook_resid_post", "hook_name: blocks.2.hook_resid_post, but the model has the layers 0 to 1"),
        ("blocks.1.hook_resid_pots", "did you mean blocks.1.hook_resid_post"),
        ("blocks.1.ln2.hook_normalized", "no module of the model is known to give blocks.1.ln2.hook_normalized"),
        ("model.layer.1", "did you mean model.layers.1"),
        ("hook_pos_embed", "no module of the model is known to give hook_pos_embed"),
    ],
)
def test_names_that_the_model_does_not_have(hook_name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        to_hf(hook_name, module_names(make("llama")))
    assert "\n" not in str(error.value)


def test_places_of_a_released_sae() -> None:
    names = module_names(make("llama"))
    layer, mlp = "model.layers.1", "model.layers.1.mlp"
    assert places({"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": layer}, names) == (layer, layer)
    assert places({"hook_name": "blocks.1.hook_resid_post"}, names) == (layer, layer)
    assert places({"hook_name": layer, "hook_name_out": None}, names) == (layer, layer)
    assert places({"hook_name": f"{mlp}:in", "hook_name_out": mlp}, names) == (f"{mlp}:in", mlp)
    theirs = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    assert places(theirs, names) == (f"{mlp}:in", mlp)
    assert places(theirs | {"hf_hook_name": f"{mlp}:in", "hf_hook_name_out": layer}, names) == (f"{mlp}:in", layer)
    with pytest.raises(UserError, match="hook_name: missing in the SAE's metadata"):
        places({}, names)


def test_places_in_the_same_model_with_and_without_its_head() -> None:
    """Its layers have other names then; TransformerLens's name is the same."""
    with_head = make("llama")
    assert isinstance(with_head.model, torch.nn.Module)
    without = module_names(with_head.model)
    theirs = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    ours = {"hf_hook_name": "model.layers.1.mlp:in", "hf_hook_name_out": "model.layers.1.mlp"}
    assert places({**theirs, **ours}, without) == ("layers.1.mlp:in", "layers.1.mlp")
    bare = {name: value.removeprefix("model.") for name, value in ours.items()}
    assert places({**theirs, **bare}, module_names(with_head)) == ("model.layers.1.mlp:in", "model.layers.1.mlp")
    with pytest.raises(UserError, match=r"is known to give model\.layers\.9;"):
        places({"hook_name": "blocks.9.hook_resid_post", "hf_hook_name": "model.layers.9"}, without)
