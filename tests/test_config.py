"""The strict loader: what a user may write, what is refused, and the one line that says so."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml

from scale_sae import config, recipes, train
from scale_sae.config import RunConfig
from scale_sae.errors import UserError

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
MINIMAL: dict[str, Any] = {"hookpoints": ["model.layers.1"], "saes": [{"d_sae": 2048, "k": 32}]}
ON_4_SHARDS = {"sae": {"tp": 4}}


def from_text(folder: Path, text: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text)
    return config.load(path, overrides or {})


def with_changes(folder: Path, overrides: dict[str, Any]) -> RunConfig:
    return from_text(folder, yaml.safe_dump(MINIMAL), overrides)


def error_of(folder: Path, text: str, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        from_text(folder, text, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_quickstart_is_the_contract() -> None:
    run = config.load(QUICKSTART, {})
    assert run.hookpoints == ("model.layers.1", "model.layers.3")
    (entry,) = run.saes
    assert (entry.name, entry.architecture, entry.d_sae, entry.options["k"]) == ("k32", "topk", 2048, 32)
    assert run.topology == config.TopologyConfig(config.LMTopology(tp=2, dp=1), config.SAETopology(1, 1, 2), "local")
    assert run.topology.world_size == 4
    # The example spells defaults out; all but what suits a short run on so small a text must be as if it were left out.
    defaults = RunConfig(run.hookpoints, run.saes, topology=run.topology)
    changed = [line.partition(":")[0] for line in config.differences(config.to_dict(run), config.to_dict(defaults))]
    evaluated = ["evaluation.every_steps", "evaluation.tokens"]
    assert sorted(changed) == ["buffer.tokens", *evaluated, "train.training_tokens"]
    # What its comment says that the recipe fills in is what it does.
    comment = QUICKSTART.read_text().partition("recipe: default")[0]
    for name in (entry.train.keys() | entry.options.keys()) - {"d_sae", "k"}:
        assert re.search(rf"\b{name}\b", comment), name


def test_minimal_config_gets_every_default(tmp_path: Path) -> None:
    run = with_changes(tmp_path, {})
    left_out = RunConfig(("model.layers.1",), (config.SAEEntry(options={"d_sae": 2048, "k": 32}),))
    assert run == recipes.fill(left_out, ())  # what these give: test_recipes
    assert (run.seed, run.resume, run.train.lr, run.data.seqpos_slice) == (0, "auto", None, (None,))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.lr", "2e-3", 2e-3),  # YAML 1.1 takes it for text
        ("train.lr", 1, 1.0),
        ("train.lr_end", "null", None),
        ("train.training_tokens", "4_000_000", 4_000_000),
        ("data.prepend_bos", "false", False),
        ("data.sequence_separator_token", "null", None),
        ("data.sequence_separator_token", "eos", "eos"),
        ("data.exclude_special_tokens", "[0, 2]", (0, 2)),
        ("data.exclude_special_tokens", "false", False),
        ("data.seqpos_slice", "[1, null]", (1, None)),
        ("data.seqpos_slice", [-8, None, 2], (-8, None, 2)),
        ("data.dataset_name", "en", "en"),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("model.compile", "true", True),
        ("train.moments_dtype", "bfloat16", "bfloat16"),
        ("train.allow_tf32", "true", True),
        ("topology.pre_activation_mib", "64", 64),
        ("logging.wandb", "true", True),
        ("logging.log_to_wandb", True, True),
    ],
)
def test_values_that_are_accepted(tmp_path: Path, key: str, value: Any, expected: Any) -> None:
    section, _, name = key.replace("logging.wandb", "logging.log_to_wandb").partition(".")
    found = getattr(getattr(with_changes(tmp_path, {key: value}), section), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        # Wrong keys: the dotted key, the value, and the known keys that are like it.
        ("train.lrr", "0.1", ["train.lrr", "0.1", "did you mean lr"]),
        ("trian", "{lr: 0.1}", ["trian", "did you mean train"]),
        ("lr", "0.1", ["lr: unknown key", "0.1", "did you mean train.lr?"]),
        ("topology.sae.shards", "2", ["topology.sae.shards", "groups, dp, tp"]),
        ("topology.lm.colocated", "true", ["topology.lm.colocated", "topology.lm: colocated"]),
        # Wrong types.
        ("seed", "true", ["seed: True", "integer"]),
        ("seed", "1.0", ["seed: 1.0", "integer"]),
        ("train.training_tokens", "2e6", ["train.training_tokens: '2e6'", "integer"]),
        ("train.lr", "true", ["train.lr: True", "number"]),
        ("train.lr", "fast", ["train.lr: 'fast'", "number"]),
        ("train.lr", ".inf", ["train.lr: inf", "number"]),
        ("train.adam_eps", "null", ["train.adam_eps: None", "number"]),
        ("data.streaming", "1", ["data.streaming: 1", "true or false"]),
        ("model.revision", "1234", ["model.revision: 1234", "text", "quotes"]),
        ("hookpoints", "model.layers.1", ["hookpoints: 'model.layers.1'", "list"]),
        ("hookpoints.0", "1", ["hookpoints.0: 1", "text"]),
        ("data.seqpos_slice", "[0, a]", ["data.seqpos_slice.1: 'a'", "integer"]),
        ("train", "fast", ["train: 'fast'", "mapping", "training_tokens"]),
        ("saes.0", "32", ["saes.0: 32", "mapping"]),
        ("topology.lm", "colocate", ["topology.lm: 'colocate'", "nor colocated"]),
        (
            "topology.lm",
            "{parallel: device_map, tp: 2}",
            ["topology.lm.parallel: 'device_map'", "set topology.lm.tp: 1"],
        ),
        ("topology.lm", "{colocated: true, parallel: device_map}", ["topology.lm.colocated", "topology.lm: colocated"]),
        ("topology.lm.parallel", "pp", ["topology.lm.parallel: 'pp'", "tp, device_map"]),
        ("topology.lm.devices_per_rank", "2", ["topology.lm.devices_per_rank: 2", "parallel: device_map"]),
        ("topology.lm.max_memory_gib", "8", ["topology.lm.max_memory_gib: 8.0", "parallel: device_map"]),
        ("topology.lm", "{parallel: device_map, devices_per_rank: 0}", ["devices_per_rank: 0", "above 0"]),
        ("topology.lm", "{parallel: device_map, max_memory_gib: -1}", ["max_memory_gib: -1.0", "above 0"]),
        # Not one of the names.
        ("model.dtype", "bf16", ["model.dtype: 'bf16'", "bfloat16", "float64"]),
        ("model.dtype", "float23", ["did you mean float32"]),
        ("model.compile", "default", ["model.compile: 'default'", "true or false"]),
        ("train.moments_dtype", "float16", ["train.moments_dtype: 'float16'", "float32, bfloat16"]),
        ("saes.0.moments_dtype", "int8", ["saes.0.moments_dtype: 'int8'", "float32, bfloat16"]),
        ("train.allow_tf32", "1", ["train.allow_tf32: 1", "true or false"]),
        ("saes.0.allow_tf32", "true", ["saes.0.allow_tf32: True", "the same for all SAEs; set train.allow_tf32"]),
        ("topology.pre_activation_mib", "0", ["topology.pre_activation_mib: 0", "above 0"]),
        ("train.lr_scheduler_name", "linear", ["train.lr_scheduler_name: 'linear'", "cosineannealing"]),
        ("data.sequence_separator_token", "pad", ["data.sequence_separator_token: 'pad'", "bos, eos", "null"]),
        # Out of range.
        ("data.context_size", "1", ["data.context_size: 1", "BOS"]),
        ("data.chunk_contexts", "0", ["data.chunk_contexts: 0", "above 0"]),
        ("data.eval_fraction", "1", ["data.eval_fraction: 1.0", "below 1"]),
        ("data.exclude_special_tokens", "[-1]", ["data.exclude_special_tokens.0: -1"]),
        ("data.seqpos_slice", "[]", ["data.seqpos_slice: []", "slice"]),
        ("data.seqpos_slice", "[0, 4, 0]", ["data.seqpos_slice: [0, 4, 0]", "step above 0"]),
        ("data.seqpos_slice", "[null, null, -1]", ["data.seqpos_slice: [None, None, -1]", "step above 0"]),
        ("data.seqpos_slice", "[128, null]", ["data.seqpos_slice: [128, None]", "128 tokens"]),
        ("train.lr", "0", ["train.lr: 0.0", "above 0"]),
        ("train.lr_end", "-0.1", ["train.lr_end: -0.1", "null"]),
        ("train.adam_beta2", "1", ["train.adam_beta2: 1.0", "below 1"]),
        ("train.lr_warm_up_steps", "-1", ["train.lr_warm_up_steps: -1"]),
        ("train.lr_decay_steps", "977", ["train.lr_decay_steps: 977", "976 steps"]),
        ("train.training_tokens", "2047", ["train.training_tokens: 2047", "2048"]),
        ("train.train_batch_size_tokens", "2000", ["train.train_batch_size_tokens: 2000", "buffer.lanes (64)"]),
        ("buffer.tokens", "65537", ["buffer.tokens: 65537", "buffer.lanes (64)"]),
        ("buffer.tokens", "1984", ["buffer.tokens: 1984", "train.train_batch_size_tokens (2048)"]),
        ("buffer.lanes", "1", ["buffer.lanes: 1", "topology.sae.tp (4)"]),
        ("topology.sae.tp", "0", ["topology.sae.tp: 0", "above 0"]),
        ("checkpoint.keep", "0", ["checkpoint.keep: 0", "above 0"]),
        ("logging.log_every_steps", "0", ["logging.log_every_steps: 0", "above 0"]),
        ("topology.sae.dp", "2", ["topology.sae.dp: 2", "topology.engine: fsdp2"]),
        ("topology", "{sae: {dp: 3, tp: 2}, engine: fsdp2}", ["buffer.lanes: 64", "sae.dp x topology.sae.tp (6)"]),
        # Planned, and not there yet.
        ("checkpoint.keep_every", "250", ["checkpoint.keep_every: 250", "multiple of checkpoint.every_steps (200)"]),
        ("checkpoint.keep_every", "0", ["checkpoint.keep_every: 0", "null"]),
        # SAEs.
        ("saes", "[]", ["saes: []"]),
        ("saes.0", "{k: 32}", ["saes.0.d_sae", "missing"]),
        ("saes.0.d_sae", "2048.0", ["saes.0.d_sae: 2048.0", "integer"]),
        ("saes.0.d_sae", "0", ["saes.0.d_sae: 0", "above 0"]),
        ("saes.0.d_sae", "2046", ["saes.0.d_sae: 2046", "topology.sae.tp (4)"]),
        ("saes.0.k", "0", ["saes.0.k: 0", "at most d_sae"]),
        ("saes.0.k", "2049", ["saes.0.k: 2049", "at most d_sae"]),
        ("saes.0.k", "many", ["saes.0.k: 'many'", "integer"]),
        ("saes.0.lr", "-1", ["saes.0.lr: -1.0", "above 0"]),
        ("saes.0.lr_scheduler_name", "linear", ["saes.0.lr_scheduler_name: 'linear'"]),
        ("saes.0.training_tokens", "4096", ["saes.0.training_tokens: 4096", "train.training_tokens"]),
        ("saes.0.train", "{lr: 0.1}", ["saes.0.train", "beside d_sae"]),
        ("saes.0.name", "a/b", ["saes.0.name: 'a/b'"]),
        ("saes.0.name", "..", ["saes.0.name: '..'"]),
        ("saes.0.name", "a..b", ["saes.0.name: 'a..b'", "without .."]),
        ("saes.0.name", "''", ["saes.0.name: ''"]),
        ("hookpoints", "[]", ["hookpoints: []", "saes.0"]),
        ("hookpoints.0", "../model", ["hookpoints.0: '../model'"]),
        ("hookpoints.0", "model.layers.1:out", ["hookpoints.0: 'model.layers.1:out'", ":in"]),
        ("hookpoints", "[model.norm, model.norm]", ["hookpoints.1: 'model.norm'", "twice"]),
        ("saes.0.hookpoints", "[a, /b]", ["saes.0.hookpoints.1: '/b'"]),
        ("saes.0.hookpoints", "[]", ["saes.0.hookpoints: []"]),
        ("saes.0.hookpoint_out", "3", ["saes.0.hookpoint_out: 3", "text"]),
        ("saes.0.hookpoint_out", "../mlp", ["saes.0.hookpoint_out: '../mlp'", "letters, digits"]),
        ("saes.0.hookpoint_out", "model.layers.*.mlp", ["saes.0.hookpoint_out", "more * than model.layers.1,"]),
        ("saes.0.hookpoint_out", "[a, b]", ["saes.0.hookpoint_out: ['a', 'b']", "one for each of the 1 hookpoints"]),
        ("saes.0.hookpoint_out", "[]", ["saes.0.hookpoint_out: []", "one for each of the 1 hookpoints"]),
        ("saes.0.init_from", "3", ["saes.0.init_from: 3", "release, sae_id, revision"]),
        ("saes.0.init_from", "[a]", ["saes.0.init_from: ['a']", "release, sae_id, revision"]),
        ("saes.0.init_from", "':layers.1'", ["saes.0.init_from: ':layers.1'", "user/repo:sae_id"]),
        ("saes.0.init_from", "''", ["saes.0.init_from: ''", "names no release"]),
        ("saes.0.init_from", "{sae_id: a}", ["saes.0.init_from.release: missing"]),
        ("saes.0.init_from", "{release: a, sae: b}", ["saes.0.init_from.sae", "did you mean sae_id"]),
        ("saes.0.init_from", "{release: 1}", ["saes.0.init_from.release: 1", "text"]),
        # Overrides that reach nothing.
        ("saes.1.k", "32", ["saes.1.k", "32", "saes has 1 entries"]),
        ("saes.first.k", "32", ["saes.first.k", "saes is a list"]),
        ("output_dir.name", "a", ["output_dir.name", "has no keys"]),
        ("train.lr", "[", ["train.lr", "YAML"]),
        ("model.revision", "2024-13-45", ["model.revision", "YAML"]),
    ],
)
def test_wrong_values_name_key_value_and_remedy(tmp_path: Path, key: str, value: str, parts: list[str]) -> None:
    tree = {**MINIMAL, "topology": ON_4_SHARDS, "output_dir": "runs/a"}
    message = error_of(tmp_path, yaml.safe_dump(tree), {key: value})
    for part in parts:
        assert part in message


def test_latents_are_divided_over_dp_and_tp(tmp_path: Path) -> None:
    topology = {"topology.sae": "{dp: 2, tp: 4}", "topology.engine": "fsdp2"}
    assert with_changes(tmp_path, topology).topology.sae.dp == 2
    message = error_of(tmp_path, yaml.safe_dump(MINIMAL), {**topology, "saes.0.d_sae": "2052"})
    assert "saes.0.d_sae: 2052" in message and "topology.sae.dp x topology.sae.tp (8)" in message


def test_restart_cycles_must_fit_between_warm_up_and_decay(tmp_path: Path) -> None:
    run = {"train.lr_scheduler_name": "cosineannealingwarmrestarts", "train.lr_decay_steps": 970}
    run["train.lr_warm_up_steps"] = 0
    assert with_changes(tmp_path, {**run, "train.n_restart_cycles": 6}).train.n_restart_cycles == 6
    message = error_of(tmp_path, yaml.safe_dump(MINIMAL), {**run, "train.n_restart_cycles": 7})
    assert "train.n_restart_cycles: 7 is more than the 6 steps" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("saes: [{d_sae: 8}]", "hookpoints: missing"),
        ("hookpoints: [a]", "saes: missing"),
        ("- a\n- b\n", "mapping"),
        ("", "mapping"),
        ("seed: 1\nseed: 2\n", "line 2, column 1: cannot be read as YAML: the key seed is given twice"),
        ("seed: [1,\nhookpoints: {", "line"),
        ("hookpoints: [a]\nsaes: [{d_sae: 8}]\nlogging: {wandb: true, log_to_wandb: false}", "logging.wandb: True"),
        ("hookpoints: [a]\nsaes: [{d_sae: 8}]\n1: 2\n", "1: unknown key"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, part: str) -> None:
    assert part in error_of(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "image.yaml"):
        with pytest.raises(UserError, match=f"^config file {re.escape(str(path))}: cannot be read: .+"):
            config.load(path, {})


def leaves(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for name, item in value.items() for leaf in leaves(item, f"{key}.{name}" if key else name)]
    if isinstance(value, list) and value:
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, f"{key}.{index}")]
    return [key]


def test_overrides_reach_every_leaf_and_subtree_of_a_resolved_config(tmp_path: Path) -> None:
    """Each is set to a value that no type accepts; the error must name exactly that key, not a parent of it."""
    resolved = config.to_dict(with_changes(tmp_path, {"saes.0.lr": 0.1, "saes.0.hookpoints": "[model.norm]"}))
    # Options are for the class of the SAE to check, when the model is known.
    keys = [key for key in leaves(resolved) if key.removeprefix("saes.0.") not in recipes.OPTIONS]
    parents = {key[:at] for key in keys for at, letter in enumerate(key) if letter == "."}
    assert len(keys) > 50
    assert {"train", "saes", "saes.0", "topology.lm", "hookpoints"} <= parents
    nothing = {"no": ["type", "has this"]}
    for key in [*keys, *parents]:
        message = error_of(tmp_path, yaml.safe_dump(resolved), {key: copy.deepcopy(nothing)})
        assert re.match(rf"{re.escape(key)}(\.no|\.d_sae)?: ", message), message


def test_overrides_of_subtrees_replace_them_and_keep_order(tmp_path: Path) -> None:
    run = with_changes(
        tmp_path,
        {
            "saes": "[{name: a, d_sae: 64, k: 4}, {name: b, d_sae: 64, k: 8}]",
            "saes.1.k": 16,
            "saes.0": {"name": "c", "d_sae": 128},
            "hookpoints": "[model.layers.2]",
            "topology.sae.tp": "4",
            "topology.lm": "colocated",
        },
    )
    found = [(entry.name, entry.options["d_sae"], entry.options.get("k")) for entry in run.saes]
    assert found == [("c", 128, None), ("b", 64, 16)]
    assert run.hookpoints == ("model.layers.2",)
    assert run.topology.lm == config.LMTopology(tp=1, dp=4, colocated=True)
    back = from_text(tmp_path, yaml.safe_dump(config.to_dict(run)), {"topology.lm": {"tp": 2}})
    assert back.topology.lm == config.LMTopology(tp=2)


def test_an_override_does_not_leak_through_a_yaml_alias_or_into_the_caller(tmp_path: Path) -> None:
    text = "hookpoints: [a]\nbuffer: {}\nsaes:\n- &first {d_sae: 8, k: 2}\n- *first\n"
    saes = from_text(tmp_path, text, {"saes.1.k": 4, "saes.0.name": "a", "saes.1.name": "b"}).saes
    assert [entry.options["k"] for entry in saes] == [2, 4]
    mine = [{"d_sae": 8, "k": 2}]
    from_text(tmp_path, text, {"saes": mine, "saes.0.k": 4})
    assert mine == [{"d_sae": 8, "k": 2}]


def test_both_names_of_a_key_reach_it(tmp_path: Path) -> None:
    for text in ("{wandb: false}", "{log_to_wandb: false}"):
        for change in ({"logging.wandb": True}, {"logging.log_to_wandb": True}, {"logging": {"wandb": True}}):
            run = from_text(tmp_path, f"{yaml.safe_dump(MINIMAL)}\nlogging: {text}\n", change)
            assert run.logging.log_to_wandb


def test_a_spread_model_has_ranks_of_its_own(tmp_path: Path) -> None:
    spread = {"topology": {"lm": {"parallel": "device_map", "max_memory_gib": 20}}}
    text = yaml.safe_dump({**MINIMAL, **spread})
    run = from_text(tmp_path, text)
    assert run.topology.lm == config.LMTopology(parallel="device_map", max_memory_gib=20.0)
    assert from_text(tmp_path, yaml.safe_dump(config.to_dict(run))) == run
    assert from_text(tmp_path, text, {"topology.lm": "colocated"}).topology.lm.parallel == "tp"
    message = error_of(tmp_path, text, {"model.compile": True})
    assert message.startswith("model.compile: True does not go with topology.lm.parallel: device_map")
    message = error_of(
        tmp_path, yaml.safe_dump({**MINIMAL, "topology": {"lm": "colocated"}}), {"topology.lm.parallel": "device_map"}
    )
    assert message.startswith("topology.lm.parallel: 'device_map'") and "topology.lm is 'colocated'" in message
    colocated = config.TopologyConfig(config.LMTopology(colocated=True, parallel="device_map"))
    with pytest.raises(UserError, match=r"parallel: 'device_map' needs LM ranks of their own, not .*colocated$"):
        config.validate(dataclasses.replace(run, topology=colocated))


def test_world_size(tmp_path: Path) -> None:
    dedicated = {"topology": {"lm": {"tp": 2, "dp": 3}, "sae": {"groups": 2, "tp": 4}}}
    run = from_text(tmp_path, yaml.safe_dump({**MINIMAL, **dedicated}))
    assert (run.topology.world_size, run.topology.sae_ranks) == (2 * 3 + 2 * 4, 8)
    run = from_text(tmp_path, yaml.safe_dump({**MINIMAL, **dedicated}), {"topology.lm": "colocated"})
    assert (run.topology.world_size, run.topology.lm.tp, run.topology.lm.dp) == (8, 1, 8)


def test_an_sae_has_its_own_training_keys_and_hookpoints(tmp_path: Path) -> None:
    run = with_changes(
        tmp_path,
        {"saes": "[{name: a, d_sae: 64, k: 4}, {name: b, d_sae: 64, lr: 1e-3, aux: 5e-2, hookpoints: [model.*:in]}]"},
    )
    a, b = run.saes
    assert (b.train["lr"], b.options["aux"]) == (1e-3, 5e-2)
    assert run.train_of(a) == dataclasses.replace(run.train, **a.train)
    assert run.train_of(b) == dataclasses.replace(run.train_of(a), lr=1e-3)
    assert with_changes(tmp_path, {"saes.0.moments_dtype": "bfloat16"}).saes[0].train["moments_dtype"] == "bfloat16"
    assert (run.hookpoints_of(a), run.hookpoints_of(b)) == (("model.layers.1",), ("model.*:in",))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("runs/release/layers.1", config.InitFrom("runs/release/layers.1")),
        ("user/repo:layers.1/k32", config.InitFrom("user/repo", "layers.1/k32")),
        ("user/repo:layers.1:in/k32", config.InitFrom("user/repo", "layers.1:in/k32")),
        ("'user/repo:'", config.InitFrom("user/repo")),
        ({"release": "user/repo"}, config.InitFrom("user/repo")),
        ({"release": "C:/a", "sae_id": "b", "revision": "main"}, config.InitFrom("C:/a", "b", "main")),
        (None, None),
    ],
)
def test_a_release_to_start_from(tmp_path: Path, value: Any, expected: config.InitFrom | None) -> None:
    run = with_changes(tmp_path, {"saes.0.init_from": copy.deepcopy(value)})
    assert run.saes[0].init_from == expected
    again = config.from_dict(json.loads(json.dumps(config.to_dict(run))))
    assert again == run
    # A later launch may not start from something else.
    other = with_changes(tmp_path, {"saes.0.init_from": "elsewhere"})
    assert config.differences(config.identity(run), config.identity(other)) != []


def test_targets_of_transcoders(tmp_path: Path) -> None:
    run = with_changes(tmp_path, {"hookpoints": "['a.*.b.*', 'c.*']", "saes.0.hookpoint_out": "x.*"})
    assert run.targets_of(run.saes[0]) == ("x.*", "x.*")
    run = with_changes(tmp_path, {"hookpoints": "[a, 'c.*']", "saes.0.hookpoint_out": "[b:in, 'x.*']"})
    assert run.targets_of(run.saes[0]) == ("b:in", "x.*")
    assert config.from_dict(json.loads(json.dumps(config.to_dict(run)))) == run
    run = with_changes(tmp_path, {"saes.0.hookpoints": "['c.*']", "saes.0.hookpoint_out": "x.*"})
    assert run.targets_of(run.saes[0]) == ("x.*",)
    assert with_changes(tmp_path, {}).targets_of(run.saes[0].__class__(options={"d_sae": 8})) == ()


@pytest.mark.parametrize("names", [(None, None), ("a", "a"), ("a", None), (None, "a")])
def test_saes_of_one_hookpoint_need_names_of_their_own(tmp_path: Path, names: tuple[str | None, str | None]) -> None:
    saes = [{"name": name, "d_sae": 8} for name in names]
    message = error_of(tmp_path, yaml.safe_dump({**MINIMAL, "saes": saes}))
    assert re.match(r"saes\.[01]\.name: .*model\.layers\.1 has 2 SAEs", message)
    saes[1]["hookpoints"] = ["model.norm"]  # type: ignore[assignment]
    assert len(from_text(tmp_path, yaml.safe_dump({**MINIMAL, "saes": saes})).saes) == 2


def full_config(folder: Path) -> RunConfig:
    changes = {
        "saes": "[{name: a, d_sae: 64, k: 4, lr: 1e-5}, {name: '32', d_sae: 64, hookpoints: ['*.mlp:in']}]",
        "model.revision": "'12e45'",  # as a number: 12 * 10^45
        "data.exclude_special_tokens": "[1]",
        "data.seqpos_slice": "[1, null]",
        "train.lr_end": "1e-7",
        "topology.lm": "colocated",
    }
    return with_changes(folder, changes)


def test_resolved_config_loads_back_equal(tmp_path: Path) -> None:
    run = full_config(tmp_path)
    tree = config.to_dict(run)
    assert from_text(tmp_path, yaml.safe_dump(tree)) == run
    assert config.from_dict(json.loads(json.dumps(tree))) == run
    assert tree["topology"]["lm"] == "colocated"
    filled = recipes.TRAIN_KEYS | recipes.OPTIONS
    assert {name: value for name, value in tree["saes"][0].items() if name == "lr" or name not in filled} == {
        "name": "a",
        "architecture": "topk",
        "recipe": None,
        "hookpoints": None,
        "hookpoint_out": None,
        "init_from": None,
        "lr": 1e-5,
        "d_sae": 64,
        "k": 4,
    }
    assert list(tree) == list(get_type_hints(RunConfig))


def test_identity_and_differences(tmp_path: Path) -> None:
    run = full_config(tmp_path)
    tree = config.to_dict(run)
    elsewhere = {
        "topology": {"lm": {"tp": 4}, "sae": {"tp": 4}, "pre_activation_mib": 64},
        "checkpoint.every_steps": 7,
        "logging.wandb": True,
        "resume": "never",
        "output_dir": "elsewhere",
    }
    moved = from_text(tmp_path, yaml.safe_dump(tree), elsewhere)
    assert config.identity(moved) == config.identity(run)
    assert config.differences(config.to_dict(moved), tree) == [
        "output_dir: 'elsewhere' != 'runs/quickstart'",
        "resume: 'never' != 'auto'",
        "topology.lm: {'cache': None, 'devices_per_rank': None, 'dp': 1, 'max_memory_gib': None, ...} != 'colocated'",
        "topology.sae.tp: 4 != 1",
        "topology.pre_activation_mib: 64 != 512",
        "checkpoint.every_steps: 7 != 200",
        "logging.log_to_wandb: True != False",
    ]
    other = from_text(tmp_path, yaml.safe_dump(tree), {"train.max_grad_norm": 0.5, "saes.0.k": 8, "saes.1.lr": 0.5})
    assert config.differences(config.identity(run), config.identity(other)) == [
        "saes.0.k: 4 != 8",
        f"saes.1.lr: {run.saes[1].train['lr']} != 0.5",
        "train.max_grad_norm: 1.0 != 0.5",
    ]


def test_help_names_every_leaf(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(help=True)
    printed = capsys.readouterr().out
    for words in (
        "--config C.yaml",
        "--train.lr=null   by the recipe",
        "--buffer.lanes=64",
        "--checkpoint.keep=2",
        "--topology.sae.tp=1",
    ):
        assert words in printed


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_either_way(allowed: bool) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        train.set_tf32(allowed)
        # Both of torch's ways of reading it, which raises where they have been mixed.
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
