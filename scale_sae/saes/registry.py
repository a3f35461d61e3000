"""The architectures that a config file can name, and the check of their options."""

import importlib
import inspect
import math
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from scale_sae.collectives import Shard
from scale_sae.errors import UserError, nearest
from scale_sae.saes.base import TrainingSAE
from scale_sae.saes.training_config import TrainingSAEConfig

Registered = tuple[type[TrainingSAE], type[TrainingSAEConfig]]

_CLASSES: dict[str, Registered] = {}


def register_sae_training_class(
    architecture: str, sae_class: type[TrainingSAE], sae_config_class: type[TrainingSAEConfig]
) -> None:
    """Make an architecture known by the name that config files use. UserError where the name is taken."""
    if _CLASSES.get(architecture, (sae_class, sae_config_class)) != (sae_class, sae_config_class):
        raise UserError(f"architecture {architecture!r} is already registered; register the class under another name")
    _CLASSES[architecture] = sae_class, sae_config_class


def training_class(architecture: str) -> type[TrainingSAE]:
    """The class of an architecture: a registered name, or ``package.module:Class``. UserError for an unknown one."""
    return lookup(architecture, "architecture")[0]


def config_class_of(sae_class: type[TrainingSAE]) -> type[TrainingSAEConfig]:
    """The config class that a class was registered with."""
    return next(config for sae, config in _CLASSES.values() if sae is sae_class)


def is_custom(architecture: str) -> bool:
    """Whether the class of an architecture is not one of this package's."""
    return not training_class(architecture).__module__.startswith("scale_sae.")


def training_config(
    architecture: str, d_in: int, options: dict[str, Any], key: str, entry_keys: Iterable[str] = ()
) -> Any:
    """The checked config of one SAE.

    Args:
        architecture: a registered name, or ``package.module:Class``.
        d_in: width of the SAE's hookpoint. It is no option, though ``options`` may repeat it.
        options: the entry's values, ``d_sae`` among them.
        key: where the entry stands in the config file, such as ``saes.0``, for error messages.
        entry_keys: what else an entry may hold; an unknown option may be one of these misspelt.

    Returns:
        An instance of the architecture's config class.

    Raises:
        UserError: unknown architecture; an option that is unknown, missing, of a wrong type or out of range.
    """
    config_class = lookup(architecture, f"{key}.architecture")[1]
    hints = get_type_hints(config_class)
    known = {field.name: field for field in fields(config_class)}
    values: dict[str, Any] = {**options, "d_in": d_in}
    if options.get("d_in", d_in) != d_in:
        raise UserError(f"{key}.d_in: {options['d_in']!r} must be {d_in}, the width of its hookpoint; leave it out")
    for name, value in values.items():
        if name not in known:
            valid = ", ".join(sorted(known.keys() - {"d_in"}))
            hint = _owners(name) or nearest(name, [*known, *entry_keys])
            raise UserError(f"{key}.{name}: not an option of {architecture}{hint}; its options are {valid}")
        if not _fits(value, hints[name]):
            raise UserError(f"{key}.{name}: {value!r} must be {_describe(hints[name])}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{key}.{name}: missing; {architecture} needs {_describe(hints[name])}")
    try:
        cfg = config_class(**values)
        problems = cfg.problems()
    except Exception as error:  # of a researcher's own checks
        kind = "" if isinstance(error, ValueError) else f"{config_class.__name__}: {type(error).__name__}: "
        raise UserError(f"{key}: {kind}{one_line(error)}") from error
    for name, problem in problems.items():
        raise UserError(f"{key}.{name}: {getattr(cfg, name)!r} {problem}")
    try:
        cfg.get_inference_config_class()  # now, and not after days of training
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    return cfg


def lookup(architecture: str, key: str) -> Registered:
    """The classes of an architecture, of one's own too. UserError, naming ``key``, for an unknown one."""
    if ":" in architecture and architecture not in _CLASSES:
        _CLASSES[architecture] = _load(architecture, key)
    if architecture not in _CLASSES:
        known = ", ".join(sorted(_CLASSES))
        raise UserError(
            f"{key}: unknown architecture {architecture!r}{nearest(architecture, _CLASSES)}; known are {known}, "
            "or package.module:Class for one of your own"
        )
    return _CLASSES[architecture]


def create(architecture: str, cfg: Any, shard: Shard, device: torch.device | str = "cpu") -> TrainingSAE:
    """This shard's part of an SAE, its weights 0. UserError where d_sae cannot be split evenly."""
    return training_class(architecture)(cfg, shard, device)


def _owners(option: str) -> str:
    """Which architectures have an option that another lacks, for its error message."""
    owners = [name for name, (_, config_class) in _CLASSES.items() if option in {f.name for f in fields(config_class)}]
    return f" (but of {', '.join(sorted(owners))})" if owners else ""


def _load(path: str, key: str) -> Registered:
    """The class that ``package.module:Class`` names, and its config class."""
    module_name, _, class_name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise UserError(f"{key}: {path!r} must be package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a researcher's module raises
        cure = "; put its folder on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(
            f"{key}: {module_name} cannot be imported: {type(error).__name__}: {one_line(error)}{cure}"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"{key}: {module_name} has no class {class_name!r}{nearest(class_name, classes)}")
    if not issubclass(found, TrainingSAE):
        theirs = any(base.__module__.startswith("sae_lens.") for base in found.__mro__)
        cure = "import its base from scale_sae instead of sae_lens" if theirs else "let it derive from one"
        raise UserError(f"{key}: {path} is no subclass of scale_sae.TrainingSAE; {cure}")
    if inspect.isabstract(found):
        raise UserError(f"{key}: {class_name} does not define {', '.join(sorted(found.__abstractmethods__))}")
    return found, _config_class(found, key)


def _config_class(sae_class: type[TrainingSAE], key: str) -> type[TrainingSAEConfig]:
    """The config class that a class was registered with, or that its annotation of ``cfg`` names."""
    name = sae_class.__name__
    registered = next((config for sae, config in _CLASSES.values() if sae is sae_class), None)
    try:
        found = registered or get_type_hints(sae_class).get("cfg")
        if isinstance(found, type):
            get_type_hints(found)
    except NameError as error:  # of what is imported for type checkers alone
        raise UserError(f"{key}: an annotation of {name} or its config cannot be read: {one_line(error)}") from error
    if not (
        isinstance(found, type)
        and issubclass(found, TrainingSAEConfig)
        and is_dataclass(found)
        and not inspect.isabstract(found)
    ):
        raise UserError(
            f"{key}: {name} does not say its config class; annotate it (cfg: MyConfig), a dataclass that derives "
            "from scale_sae.TrainingSAEConfig and defines architecture()"
        )
    # Without the decorator it still counts as a dataclass, but one with the fields of its base alone.
    if "__dataclass_params__" not in vars(found) and (new := inspect.get_annotations(found)):
        raise UserError(f"{key}: {found.__name__} has {', '.join(new)} but is no dataclass; decorate it: @dataclass")
    return found


def one_line(error: Exception) -> str:
    """The message of any exception without line breaks."""
    return " ".join(str(error).split())


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
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _describe(hint: Any) -> str:
    """A type in the words of a config file."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return " or ".join(str(option).lower() if option in (True, False) else str(option) for option in get_args(hint))
    if origin is list:
        return f"a list, each item {_describe(get_args(hint)[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    return words.get(hint, str(hint))
