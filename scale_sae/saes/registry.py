"""The architectures that a config file can name, and the check of their options."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from scale_sae.collectives import Shard
from scale_sae.errors import UserError, nearest
from scale_sae.saes.base import TrainingSAE, TrainingSAEConfig

_CLASSES: dict[str, tuple[type[TrainingSAE], type[TrainingSAEConfig]]] = {}


def register_sae_training_class(
    architecture: str, sae_class: type[TrainingSAE], sae_config_class: type[TrainingSAEConfig]
) -> None:
    """Make an architecture known by the name that config files use. UserError where the name is taken."""
    if architecture in _CLASSES:
        raise UserError(f"architecture {architecture!r} is already registered; register the class under another name")
    _CLASSES[architecture] = sae_class, sae_config_class


def training_class(architecture: str) -> type[TrainingSAE]:
    """The class of a registered architecture; UserError for an unknown one."""
    return _lookup(architecture, "architecture")[0]


def training_config(
    architecture: str, d_in: int, options: dict[str, Any], key: str, entry_keys: Iterable[str] = ()
) -> Any:
    """The checked config of one SAE.

    Args:
        architecture: a registered name.
        d_in: width of the SAE's hookpoint. It is no option, though ``options`` may repeat it.
        options: the entry's values, ``d_sae`` among them.
        key: where the entry stands in the config file, such as ``saes.0``, for error messages.
        entry_keys: what else an entry may hold; an unknown option may be one of these misspelt.

    Returns:
        An instance of the architecture's config class.

    Raises:
        UserError: unknown architecture; an option that is unknown, missing, of a wrong type or out of range.
    """
    config_class = _lookup(architecture, f"{key}.architecture")[1]
    hints = get_type_hints(config_class)
    known = {field.name: field for field in fields(config_class)}
    values: dict[str, Any] = {**options, "d_in": d_in}
    for name, value in values.items():
        if name not in known:
            valid = ", ".join(sorted(known.keys() - {"d_in"}))
            hint = nearest(name, [*known, *entry_keys])
            raise UserError(f"{key}.{name}: not an option of {architecture}{hint}; its options are {valid}")
        if not _fits(value, hints[name]):
            raise UserError(f"{key}.{name}: {value!r} must be {_describe(hints[name])}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{key}.{name}: missing; {architecture} needs {_describe(hints[name])}")
    cfg = config_class(**values)
    for name, problem in cfg.problems().items():
        raise UserError(f"{key}.{name}: {getattr(cfg, name)!r} {problem}")
    return cfg


def create(cfg: TrainingSAEConfig, shard: Shard, device: torch.device | str = "cpu") -> TrainingSAE:
    """This shard's part of an SAE, all parameters 0. UserError where d_sae cannot be split evenly."""
    return training_class(cfg.architecture())(cfg, shard, device)


def _lookup(architecture: str, key: str) -> tuple[type[TrainingSAE], type[TrainingSAEConfig]]:
    if architecture not in _CLASSES:
        known = ", ".join(sorted(_CLASSES))
        raise UserError(
            f"{key}: unknown architecture {architecture!r}{nearest(architecture, _CLASSES)}; known are {known}"
        )
    return _CLASSES[architecture]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a config file is of a type: an int fits float, a bool fits neither."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _describe(hint: Any) -> str:
    """A type in the words of a config file."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return " or ".join(str(option) for option in get_args(hint))
    if origin is list:
        return f"a list, each item {_describe(get_args(hint)[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    return words.get(hint, str(hint))
