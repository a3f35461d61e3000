"""From YAML to frozen dataclasses, strictly: knows types and keys, and nothing of what the keys mean.

A dataclass whose YAML looks unlike its fields has ``from_yaml(value, key)`` and ``to_yaml()`` of its own.
"""

import dataclasses
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from scale_sae.errors import UserError, nearest

T = TypeVar("T")
# The numbers that YAML 1.1 takes for text: 2e-3 for want of a dot, 2.0e6 for want of a sign.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


class _Loader(yaml.SafeLoader):
    """Rejects a key that stands twice in one mapping, of which YAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def show(value: object) -> str:
    """``value`` on one line, shortened in the middle where it is long."""
    return _repr.repr(value)


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raises UserError ``key: value remedy`` unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}: {show(value)} {remedy}")


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{source}{place}: cannot be read as YAML: {problem}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file at ``path``. UserError where there is no such file or it holds something else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path}: cannot be read: {error}") from None
    tree = _parse(text, f"config file {path}")
    require(isinstance(tree, dict), f"config file {path}", tree, "is not a mapping of keys to values")
    # A YAML alias is one object in two places; an override of one of them must not change the other.
    plain: dict[str, Any] = to_plain(tree)
    return plain


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets ``key`` (``saes.0.k``: numbers index lists) in ``tree``, in place; text is read as YAML first.

    Mappings that are missing on the way are made; whether the key exists is for ``from_mapping`` to say.
    """
    value = to_plain(_parse(value, key) if isinstance(value, str) else value)
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if isinstance(node, list):
            require(part.isdecimal(), key, value, f"cannot be set: {above} is a list, which takes numbers, not {part}")
            require(int(part) < len(node), key, value, f"cannot be set: {above} has {len(node)} entries, from 0 on")
            place: Any = int(part)
        else:
            require(isinstance(node, dict), key, value, f"cannot be set: {above} is {show(node)}, which has no keys")
            place = part
        if depth == len(parts) - 1:
            node[place] = value
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]


def read_number(value: Any) -> Any:
    """The float that is meant by a text such as ``"2e-3"``; every other value as it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _fits(value: object, kind: Any) -> bool:
    """Whether ``value`` has the outer shape of the annotation ``kind``."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, arm) for arm in get_args(kind))
    if origin is tuple:
        return isinstance(value, list | tuple)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is float:
        number = read_number(value)
        return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return " or ".join(_describe(arm) for arm in get_args(kind))
    if origin is tuple:
        return "a list"
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    words = {
        int: "an integer (in digits)",
        float: "a number",
        bool: "true or false",
        str: "text (in quotes where it looks like something else)",
        NoneType: "null",
    }
    return words[kind]


def convert(value: Any, kind: Any, key: str) -> Any:
    """``value``, as YAML gave it, in the type of the annotation ``kind``.

    Knows bool, int, float, str, None, Literal of texts, ``tuple[T, ...]``, unions of these, dataclasses, and a
    dataclass or None. No value changes its type but int and number-like text to float, and list to tuple. UserError,
    naming ``key``, where it does not fit.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        own = getattr(kind, "from_yaml", None)
        return own(value, key) if own else from_mapping(kind, value, key)
    sections = [arm for arm in get_args(kind) if dataclasses.is_dataclass(arm)]
    if sections and get_origin(kind) is UnionType:  # a section or null
        return None if value is None else convert(value, sections[0], key)
    if not _fits(value, kind):
        hint = nearest(value, _words(kind)) if isinstance(value, str) else ""
        raise UserError(f"{key}: {show(value)} is not {_describe(kind)}{hint}")
    if get_origin(kind) in (Union, UnionType):
        kind = next(arm for arm in get_args(kind) if _fits(value, arm))
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        return tuple(convert(item, element, f"{key}.{index}") for index, item in enumerate(value))
    return float(read_number(value)) if kind is float else value


def _words(kind: Any) -> tuple[str, ...]:
    """The texts that a Literal, or a union that holds one, allows."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for arm in get_args(kind) for word in _words(arm))


def require_mapping(value: object, key: str, keys: Iterable[str]) -> None:
    """Raises UserError unless ``value`` is a mapping; ``keys`` are those that it may hold."""
    require(isinstance(value, Mapping), key, value, f"is not a mapping; its keys are {', '.join(keys)}")


def unknown_key(key: str, value: object, names: Iterable[str]) -> UserError:
    """The error for a key that does not exist, with the ``names`` that do, or those of them that are like it."""
    names = list(names)
    hint = nearest(key.rpartition(".")[2], names) or f" (known here: {', '.join(names)})"
    return UserError(f"{key}: unknown key, set to {show(value)}{hint}")


def from_mapping(cls: type[T], value: Any, key: str) -> T:
    """The dataclass ``cls`` with its fields from the mapping ``value``. ``key``: where the mapping stands, or ""."""
    hints = get_type_hints(cls)
    require_mapping(value, key, hints)
    prefix = f"{key}." if key else ""
    for name, item in value.items():
        if name not in hints:
            raise unknown_key(f"{prefix}{name}", item, hints)
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in value:
            raise UserError(f"{prefix}{item.name}: missing; it has no default")
    return cls(**{name: convert(item, hints[name], f"{prefix}{name}") for name, item in value.items()})


def to_plain(value: Any) -> Any:
    """``value`` in mappings, lists and scalars, all of them new: the inverse of ``convert``."""
    if dataclasses.is_dataclass(value):
        own = getattr(value, "to_yaml", None)
        if own:
            return own()
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def differences(a: Any, b: Any, key: str = "") -> list[str]:
    """What differs between two results of ``to_dict`` or ``identity``: lines such as ``train.lr: 0.0004 != 0.001``."""
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        prefix = f"{key}." if key else ""
        names = [*a, *(name for name in b if name not in a)]
        return [line for n in names for line in differences(a.get(n, _ABSENT), b.get(n, _ABSENT), f"{prefix}{n}")]
    return [] if a == b else [f"{key}: {show(a)} != {show(b)}"]


class _Absent:
    """Stands in ``differences`` for a key that one side lacks."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()
