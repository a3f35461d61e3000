"""Reads, checks, writes and compares configs. What the keys mean stands in ``config_schema``.

Every wrong key or value is a ``UserError``: one line with the dotted key, the value and what would be right.
"""

import dataclasses
import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

from scale_sae import recipes
from scale_sae.config_parsing import differences, from_mapping, read_yaml, require, set_dotted, show, to_plain
from scale_sae.config_schema import (
    NOT_IDENTITY,
    BufferConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    InitFrom,
    LMTopology,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    SAEEntry,
    SAETopology,
    TopologyConfig,
    TrainConfig,
)
from scale_sae.errors import UserError

__all__ = [
    "NOT_IDENTITY",
    "BufferConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "InitFrom",
    "LMTopology",
    "LoggingConfig",
    "ModelConfig",
    "RunConfig",
    "SAEEntry",
    "SAETopology",
    "TopologyConfig",
    "TrainConfig",
    "differences",
    "from_dict",
    "from_saved",
    "identity",
    "load",
    "to_dict",
    "validate",
]

_ALIASES = {"logging.wandb": "logging.log_to_wandb"}


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The checked config in the YAML file at ``path``, with ``overrides`` put in, in their order.

    Args:
        path: the YAML file.
        overrides: dotted keys to values: leaves (``train.lr``, ``saes.0.k``) or whole subtrees (``topology.lm``), which
            they replace. A value that is text is read as YAML.

    Raises:
        UserError: one line with the key, the value and what would be right.
    """
    tree = read_yaml(path)
    _resolve_aliases(tree)
    for key, value in (overrides or {}).items():
        set_dotted(tree, _ALIASES.get(key, key), value)
        _resolve_aliases(tree)
    for key, value in (overrides or {}).items():
        _check_reaches(tree, key, value)
    return from_dict(tree)


def _check_reaches(tree: Mapping[str, Any], key: str, value: Any) -> None:
    """UserError for a key of `train` that no SAE would take, as with the config of a run's folder."""
    section, _, name = key.partition(".")
    entries = tree.get("saes")
    if section == "train" and isinstance(entries, list) and entries:
        own = all(isinstance(entry, dict) and name in entry for entry in entries)
        require(not own, key, value, f"changes nothing, since every entry of saes has its own; set saes.0.{name}")


def from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """The checked config in ``tree``, with what it leaves out filled in by its recipes. UserError as for ``load``.

    What ``to_dict`` returned leaves nothing out and gives an equal config.
    """
    config = recipes.fill(from_saved(tree), tree.get("train", {}))
    validate(config)
    return config


def from_saved(tree: Mapping[str, Any]) -> RunConfig:
    """The checked config of a run that was made, from what ``to_dict`` then returned. UserError as for ``load``.

    Nothing is filled in: the version that made the run may have had other recipes, or none.
    """
    for name, value in tree.items():
        inner = [key for key in _section_keys() if key.endswith(f".{name}")]
        if inner and name not in get_type_hints(RunConfig):
            raise UserError(f"{name}: unknown key, set to {show(value)} (did you mean {', '.join(inner)}?)")
    config = from_mapping(RunConfig, tree, "")
    validate(config)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Every key with its value, in types that YAML and JSON hold; ``from_dict`` gives an equal config back."""
    plain: dict[str, Any] = to_plain(config)
    return plain


def identity(config: RunConfig) -> dict[str, Any]:
    """What makes a run the run it is: ``to_dict`` without ``NOT_IDENTITY``. A resume must not change it."""
    return {name: value for name, value in to_dict(config).items() if name not in NOT_IDENTITY}


def _section_keys() -> list[str]:
    """The dotted keys of all sections: ``model.name`` and so on."""
    sections = {name: kind for name, kind in get_type_hints(RunConfig).items() if dataclasses.is_dataclass(kind)}
    return [f"{name}.{key}" for name, kind in sections.items() for key in get_type_hints(kind)]


def _resolve_aliases(tree: dict[str, Any]) -> None:
    """Renames the keys in ``_ALIASES``, in place."""
    for alias, key in _ALIASES.items():
        section, _, old = alias.partition(".")
        values = tree.get(section)
        if isinstance(values, dict) and old in values:
            new = key.partition(".")[2]
            require(new not in values, alias, values[old], f"is given twice; {key} is the same key")
            values[new] = values.pop(old)


def validate(config: RunConfig) -> None:
    """Checks what the types leave open and needs no model. Raises UserError at the first thing wrong."""
    _check_positive(config)
    _check_data(config.data)
    _check_topology(config)
    _check_saes(config)
    _check_train("train", config.train)
    for index, entry in enumerate(config.saes):
        _check_train(f"saes.{index}", config.train_of(entry))
    interval = config.evaluation.every_steps
    require(interval is None or interval > 0, "evaluation.every_steps", interval, "must be above 0, or null for none")
    keep_every, every = config.checkpoint.keep_every, config.checkpoint.every_steps
    remedy = f"must be a multiple of checkpoint.every_steps ({every}), or null"
    require(
        keep_every is None or (keep_every > 0 and keep_every % every == 0), "checkpoint.keep_every", keep_every, remedy
    )


_POSITIVE = {
    "data": ("context_size", "chunk_contexts"),
    "topology": ("sae.groups", "sae.dp", "sae.tp", "lm.tp", "lm.dp", "pre_activation_mib"),
    "train": ("training_tokens", "train_batch_size_tokens"),
    "buffer": ("tokens", "lanes"),
    "checkpoint": ("every_steps", "keep"),
    "evaluation": ("tokens",),
    "logging": ("log_every_steps",),
}


def _check_positive(config: RunConfig) -> None:
    for key in (f"{section}.{name}" for section, names in _POSITIVE.items() for name in names):
        value = attrgetter(key)(config)
        require(value > 0, key, value, "must be above 0")


def _check_data(data: DataConfig) -> None:
    require(0 <= data.eval_fraction < 1, "data.eval_fraction", data.eval_fraction, "must be at least 0 and below 1")
    if data.prepend_bos:
        require(data.context_size > 1, "data.context_size", data.context_size, "must be above 1: BOS takes one")
    if isinstance(data.exclude_special_tokens, tuple):
        for index, token in enumerate(data.exclude_special_tokens):
            require(token >= 0, f"data.exclude_special_tokens.{index}", token, "is no token id; it must be at least 0")
    arguments = list(data.seqpos_slice)
    remedy = "must be the one to three arguments of Python's slice, with a step above 0"
    is_slice = 1 <= len(arguments) <= 3 and all(step is None or step > 0 for step in arguments[2:])
    require(is_slice, "data.seqpos_slice", arguments, remedy)
    kept = range(data.context_size)[slice(*arguments)]
    remedy = f"leaves no position of a context of {data.context_size} tokens"
    require(len(kept) > 0, "data.seqpos_slice", arguments, remedy)


def _check_device_map(lm: LMTopology) -> None:
    """The keys of ``topology.lm`` that spread the model over the devices of one rank."""
    if lm.parallel == "device_map":
        remedy = f"spreads the model over the devices of one rank; set topology.lm.tp: 1 (it is {lm.tp})"
        require(lm.tp == 1, "topology.lm.parallel", lm.parallel, remedy)
        remedy = "needs LM ranks of their own, not topology.lm: colocated"
        require(not lm.colocated, "topology.lm.parallel", lm.parallel, remedy)
    for name in ("devices_per_rank", "max_memory_gib"):
        value = getattr(lm, name)
        if value is not None:
            remedy = "is for topology.lm.parallel: device_map"
            require(lm.parallel == "device_map", f"topology.lm.{name}", value, remedy)
            require(value > 0, f"topology.lm.{name}", value, "must be above 0")


def _check_cache(lm: LMTopology) -> None:
    """A run from cached activations has no ranks for the model, so nothing can be said of them."""
    if lm.cache is None:
        return
    default = LMTopology()
    for name in ("tp", "dp", "parallel"):
        value, remedy = getattr(lm, name), "is of ranks that run the model; with topology.lm.cache there are none"
        require(value == getattr(default, name), f"topology.lm.{name}", value, remedy)
    require(lm.cache != "", "topology.lm.cache", lm.cache, "names no folder; leave it out to run the model")


def _check_topology(config: RunConfig) -> None:
    topology, buffer = config.topology, config.buffer
    _check_cache(topology.lm)
    _check_device_map(topology.lm)
    if topology.lm.parallel == "device_map":
        remedy = "does not go with topology.lm.parallel: device_map; set it to false"
        require(not config.model.compile, "model.compile", config.model.compile, remedy)
    if topology.engine == "local":
        remedy = "needs topology.engine: fsdp2 or deepspeed; local is for 1"
        require(topology.sae.dp == 1, "topology.sae.dp", topology.sae.dp, remedy)
    shards = topology.sae.dp * topology.sae.tp
    remedy = f"must be a multiple of topology.sae.dp x topology.sae.tp ({shards})"
    require(buffer.lanes % shards == 0, "buffer.lanes", buffer.lanes, remedy)
    batch = config.train.train_batch_size_tokens
    remedy = f"must be a multiple of buffer.lanes ({buffer.lanes})"
    require(batch % buffer.lanes == 0, "train.train_batch_size_tokens", batch, remedy)
    require(buffer.tokens % buffer.lanes == 0, "buffer.tokens", buffer.tokens, remedy)
    remedy = f"must be at least train.train_batch_size_tokens ({batch})"
    require(buffer.tokens >= batch, "buffer.tokens", buffer.tokens, remedy)


def _check_train(key: str, train: TrainConfig) -> None:
    """Checks settings that hold for the run (``key`` "train") or for one SAE ("saes.0")."""
    require(train.lr is None or train.lr > 0, f"{key}.lr", train.lr, "must be above 0, or null")
    for name in (
        *("n_restart_cycles", "max_grad_norm", "adam_eps"),
        *("dead_feature_window_tokens", "feature_sampling_window"),
    ):
        require(getattr(train, name) > 0, f"{key}.{name}", getattr(train, name), "must be above 0")
    for name in ("lr_warm_up_steps", "lr_decay_steps"):
        require(getattr(train, name) >= 0, f"{key}.{name}", getattr(train, name), "must be at least 0")
    for name in ("adam_beta1", "adam_beta2"):
        require(0 <= getattr(train, name) < 1, f"{key}.{name}", getattr(train, name), "must be at least 0 and below 1")
    require(train.lr_end is None or train.lr_end >= 0, f"{key}.lr_end", train.lr_end, "must be at least 0, or null")
    steps = train.training_tokens // train.train_batch_size_tokens
    remedy = f"is less than one batch (train_batch_size_tokens is {train.train_batch_size_tokens})"
    require(steps > 0, f"{key}.training_tokens", train.training_tokens, remedy)
    remedy = f"and lr_warm_up_steps {train.lr_warm_up_steps} are more than the {steps} steps of the run"
    main_steps = steps - train.lr_warm_up_steps - train.lr_decay_steps
    require(main_steps >= 0, f"{key}.lr_decay_steps", train.lr_decay_steps, remedy)
    if train.lr_scheduler_name == "cosineannealingwarmrestarts":
        remedy = f"is more than the {main_steps} steps between warm-up and decay"
        require(train.n_restart_cycles <= main_steps, f"{key}.n_restart_cycles", train.n_restart_cycles, remedy)


# Names and hookpoints become folders.
_PATH_PART = re.compile(r"[A-Za-z0-9_*][A-Za-z0-9._*:-]*")


def _check_path_part(key: str, text: str) -> None:
    safe = bool(_PATH_PART.fullmatch(text)) and ".." not in text
    remedy = "must be of letters, digits and . _ * : - without .. and begin with a letter, digit, _ or *"
    require(safe, key, text, remedy)


def _check_hookpoints(key: str, patterns: tuple[str, ...]) -> None:
    for index, pattern in enumerate(patterns):
        _check_path_part(f"{key}.{index}", pattern)
        colon_is_suffix = ":" not in pattern.removesuffix(":in")
        require(colon_is_suffix, f"{key}.{index}", pattern, "is not a module name, alone or with :in after it")
        require(pattern not in patterns[:index], f"{key}.{index}", pattern, "is given twice")


def _check_targets(key: str, targets: tuple[str, ...], patterns: tuple[str, ...]) -> None:
    remedy = f"must be one hookpoint, or a list with one for each of the {len(patterns)} hookpoints"
    require(len(targets) == len(patterns), key, list(targets), remedy)
    for target, pattern in zip(targets, patterns, strict=True):
        _check_path_part(key, target)
        remedy = f"has more * than {pattern}, whose * say what they stand for"
        require(target.count("*") <= pattern.count("*"), key, target, remedy)


def _check_saes(config: RunConfig) -> None:
    require(len(config.saes) > 0, "saes", [], "holds no SAE")
    _check_hookpoints("hookpoints", config.hookpoints)
    divisor = "topology.sae.tp" if config.topology.sae.dp == 1 else "topology.sae.dp x topology.sae.tp"
    shards = config.topology.sae.dp * config.topology.sae.tp
    users: dict[str, list[tuple[int, SAEEntry]]] = {}
    for index, entry in enumerate(config.saes):
        if entry.name is not None:
            _check_path_part(f"saes.{index}.name", entry.name)
        if entry.hookpoints is not None:
            _check_hookpoints(f"saes.{index}.hookpoints", entry.hookpoints)
        if entry.hookpoint_out is not None:
            _check_targets(f"saes.{index}.hookpoint_out", config.targets_of(entry), config.hookpoints_of(entry))
        remedy = f"must be a multiple of {divisor} ({shards})"
        require(entry.d_sae % shards == 0, f"saes.{index}.d_sae", entry.d_sae, remedy)
        key = "hookpoints" if entry.hookpoints is None else f"saes.{index}.hookpoints"
        require(len(config.hookpoints_of(entry)) > 0, key, [], f"leaves saes.{index} without a hookpoint")
        for pattern in config.hookpoints_of(entry):
            users.setdefault(pattern, []).append((index, entry))
    for pattern, entries in users.items():
        _check_sae_ids(pattern, entries)


def _check_sae_ids(pattern: str, entries: list[tuple[int, SAEEntry]]) -> None:
    """An unnamed SAE's folder is the hookpoint's, so it cannot stand beside named ones, whose folders are inside."""
    if len(entries) == 1:
        return
    names: set[str] = set()
    for index, entry in entries:
        remedy = f"is no name of its own; {pattern} has {len(entries)} SAEs and each needs one"
        require(entry.name is not None and entry.name not in names, f"saes.{index}.name", entry.name, remedy)
        names.add(str(entry.name))
