"""TransformerLens's names of activations (``blocks.3.hook_resid_post``) and the hookpoints of transformers' modules.

Only names of equal activations are translated. They are equal where TransformerLens takes a model's weights as they are
(``from_pretrained_no_processing``, ``TransformerBridge``). Its processing of weights changes some of them:

- folded LayerNorms (``fold_ln``) change ``mlp.hook_in``, the input of the MLP;
- folded value biases (``fold_value_biases``) shift ``attn.hook_z`` in models whose values have a bias, such as GPT-2;
- centred writing weights (``center_writing_weights``, which SAELens turns off) take the mean over d_model off what is
  written to the residual stream, and so off all ``hook_resid_*``, ``hook_attn_out``, ``hook_mlp_out``, ``hook_embed``;
- a model that scales what its parts write (Granite) has the scaled values in ``hook_attn_out`` and ``hook_mlp_out``,
  which no module of it gives. This cannot be seen from the names of its modules.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from scale_sae.errors import UserError, nearest

INPUT = ":in"
# A model's list of layers → its token embedding.
_TREES = {
    "model.layers": "model.embed_tokens",
    "model.language_model.layers": "model.language_model.embed_tokens",
    "model.decoder.layers": "model.decoder.embed_tokens",
    "transformer.h": "transformer.wte",
    "gpt_neox.layers": "gpt_neox.embed_in",
    # the same without a head
    "layers": "embed_tokens",
    "decoder.layers": "decoder.embed_tokens",
    "h": "wte",
}
# Lists of layers that only decoders have: their residual stream needs no look at what a layer is made of.
_DECODERS = ("model.layers", "transformer.h", "gpt_neox.layers")
_RESIDUAL = {"hook_resid_pre": INPUT, "hook_resid_post": ""}
_GATED_MLP = {
    "mlp.hook_in": ".mlp:in",
    "mlp.hook_pre": ".mlp.gate_proj",
    "mlp.hook_pre_linear": ".mlp.up_proj",
    "mlp.hook_post": ".mlp.down_proj:in",
}
_LLAMA = _GATED_MLP | {
    "attn.hook_z": ".self_attn.o_proj:in",
    "hook_attn_out": ".self_attn",
    "hook_resid_mid": ".post_attention_layernorm:in",
    "hook_mlp_out": ".mlp",
}
_NORM_AFTER = {"hook_attn_out": ".post_attention_layernorm", "hook_mlp_out": ".post_feedforward_layernorm"}
_GPT = {"mlp.hook_in": ".mlp:in", "hook_attn_out": ".attn", "hook_mlp_out": ".mlp"}
# What a layer is made of (dropout and activation functions aside), and its parts under both names. The parts are those
# of all models with such layers; one model has some of them.
_FAMILIES: list[tuple[set[str], dict[str, str]]] = [
    # Llama, Mistral, Qwen, Gemma 1
    ({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}, _LLAMA),
    # Gemma 2 and 3
    (
        {"input_layernorm", "self_attn", "post_attention_layernorm", "pre_feedforward_layernorm", "mlp"}
        | {"post_feedforward_layernorm"},
        _LLAMA | _NORM_AFTER | {"hook_resid_mid": ".pre_feedforward_layernorm:in"},
    ),
    # OLMo 2: what enters the MLP is the residual stream itself, which no module before it has
    (
        {"self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm"},
        _LLAMA | _NORM_AFTER | {"hook_resid_mid": ".mlp:in"},
    ),
    # Phi 1 and 2, Cohere: attention and MLP in parallel
    (
        {"input_layernorm", "self_attn", "mlp"},
        _GATED_MLP | {"attn.hook_z": ".self_attn.o_proj:in", "hook_attn_out": ".self_attn", "hook_mlp_out": ".mlp"},
    ),
    (
        {"input_layernorm", "self_attn", "mlp"},
        {"attn.hook_z": ".self_attn.dense:in", "mlp.hook_pre": ".mlp.fc1", "mlp.hook_post": ".mlp.fc2:in"},
    ),
    # GPT-2
    (
        {"ln_1", "attn", "ln_2", "mlp"},
        _GPT
        | {"attn.hook_z": ".attn.c_proj:in", "hook_resid_mid": ".ln_2:in"}
        | {"mlp.hook_pre": ".mlp.c_fc", "mlp.hook_post": ".mlp.c_proj:in"},
    ),
    # GPT-Neo: as GPT-2, but for the attention
    ({"ln_1", "attn", "ln_2", "mlp"}, {"attn.hook_z": ".attn.attention.out_proj:in"}),
    # GPT-J
    (
        {"ln_1", "attn", "mlp"},
        _GPT | {"attn.hook_z": ".attn.out_proj:in", "mlp.hook_pre": ".mlp.fc_in", "mlp.hook_post": ".mlp.fc_out:in"},
    ),
    # GPT-NeoX, Pythia: attention and MLP in parallel, or not
    (
        {"input_layernorm", "attention", "post_attention_layernorm", "mlp"},
        {"attn.hook_z": ".attention.dense:in", "hook_attn_out": ".attention", "hook_mlp_out": ".mlp"}
        | {"mlp.hook_in": ".mlp:in", "mlp.hook_pre": ".mlp.dense_h_to_4h", "mlp.hook_post": ".mlp.dense_4h_to_h:in"},
    ),
    # OPT
    (
        {"self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"},
        {"attn.hook_z": ".self_attn.out_proj:in", "hook_attn_out": ".self_attn", "hook_mlp_out": ".fc2"}
        | {"mlp.hook_pre": ".fc1", "mlp.hook_post": ".fc2:in"},
    ),
]
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"(" + "|".join(map(re.escape, _TREES)) + r")\.(\d+)(\.[^:]+)?(:in)?")


def to_transformer_lens(hookpoint: str, module_names: Iterable[str] | None = None) -> str | None:
    """TransformerLens's name of the activation at a hookpoint, or None where it has none or none is known.

    Args:
        hookpoint: a module's name in transformers' model, with ``:in`` for its input.
        module_names: the names of all modules of the model. Without them only the residual stream is translated: the
            same module, such as ``model.layers.3.mlp``, gives what another model normalises before it counts.
    """
    layer = _LAYER.fullmatch(hookpoint)
    if module_names is None:
        if layer and layer[1] in _DECODERS and layer[3] is None:
            return f"blocks.{layer[2]}.{'hook_resid_pre' if layer[4] else 'hook_resid_post'}"
        return None
    names = set(module_names)
    found = _of_layer(layer[1], layer[2], names) if layer else _of_embedding(names)
    return next((name for name, place in found.items() if place == hookpoint), None)


def to_hf(hook_name: str, module_names: Iterable[str]) -> str:
    """The hookpoint of an activation that TransformerLens names; a hookpoint stays as it is.

    Args:
        hook_name: a name as ``blocks.3.hook_resid_post`` or ``hook_embed``, or a hookpoint.
        module_names: the names of all modules of the model.

    Raises:
        UserError: the model has no module that gives this activation.
    """
    names = set(module_names)
    if hook_name.removesuffix(INPUT) in names:
        return hook_name
    block = _BLOCK.fullmatch(hook_name)
    tree = _tree(names)
    if block and tree:
        if f"{tree}.{block[1]}" not in names:
            layers = sum(re.fullmatch(re.escape(tree) + r"\.\d+", name) is not None for name in names)
            raise UserError(f"hook_name: {hook_name}, but the model has the layers 0 to {layers - 1}")
        found = _of_layer(tree, block[1], names)
    else:
        found = _of_embedding(names)
    if hook_name in found:
        return found[hook_name]
    translated = block is not None or hook_name.startswith("hook_")
    known = list(found) if translated else sorted(names)
    cure = "give the name of a module, with :in for its input" + nearest(hook_name, known)
    raise UserError(f"hook_name: no module of the model is known to give {hook_name}; {cure}")


def names_of(metadata: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What the metadata of a cfg.json calls the activation that an SAE reads, and the one that a transcoder makes.

    Each has a hookpoint (``hf_hook_name``, ``hf_hook_name_out``) and a name in either form (``hook_name``,
    ``hook_name_out``), in this order; what is missing is left out. The second list is empty but for transcoders.
    """
    found = [[metadata.get(f"hf_{key}"), metadata.get(key)] for key in ("hook_name", "hook_name_out")]
    sources, targets = ([name for name in names if isinstance(name, str) and name] for names in found)
    return sources, targets


def places(metadata: Mapping[str, Any], module_names: Iterable[str]) -> tuple[str, str]:
    """Where a released SAE belongs: the hookpoint that it reads, and that of what it reconstructs.

    They are the same but for transcoders. Of the names that the metadata has, see ``names_of``, the first that the
    model has counts: with and without its head, the same model has other modules.

    Raises:
        UserError: the metadata names no place, or none that the model has.
    """
    names = set(module_names)
    sources, targets = names_of(metadata)
    if not sources:
        raise UserError("hook_name: missing in the SAE's metadata; it must say which activation the SAE is for")
    return _first_known(sources, names), _first_known(targets or sources, names)


def _first_known(candidates: list[str], names: set[str]) -> str:
    """The hookpoint of the first name that the model has. UserError, about the first one, where it has none."""
    problems = []
    for name in candidates:
        try:
            return to_hf(name, names)
        except UserError as error:
            problems.append(error)
    raise problems[0]


def _tree(names: set[str]) -> str | None:
    return next((tree for tree in _TREES if f"{tree}.0" in names), None)


def _of_embedding(names: set[str]) -> dict[str, str]:
    tree = _tree(names)
    return {"hook_embed": _TREES[tree]} if tree and _TREES[tree] in names else {}


def _of_layer(tree: str, index: str, names: set[str]) -> dict[str, str]:
    """TransformerLens's names → hookpoints, of all that is known of one layer."""
    layer = f"{tree}.{index}"
    inside = {name.removeprefix(f"{layer}.") for name in names if name.startswith(f"{layer}.")}
    parts = {name for name in inside if "." not in name and "dropout" not in name and "activation" not in name}
    families = [family for made_of, family in _FAMILIES if made_of == parts]
    if not families and tree not in _DECODERS:
        return {}
    existing = {
        name: place
        for family in (_RESIDUAL, *families)
        for name, place in family.items()
        if place in _RESIDUAL.values() or place[1:].removesuffix(INPUT) in inside
    }
    return {f"blocks.{index}.{name}": layer + place for name, place in existing.items()}
