"""Where settings come from: a YAML file, ``--set``, a command's options; errors name the source."""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config import Config
from pipeline.errors import ConfigError

#: Keys of earlier versions, and what they are called now.
RENAMED = {
    "agreement.warn_kept": "agreement.warn_coverage",
    "federate.start_steps": "federate.pretrain_steps",
}
_SOFT = "soft agreement has no thresholds: an image's weight is the square of its expected Dice"
_KD = "the received model's prediction is a part of the target, so a KL term to it brings nothing"
#: Keys of earlier versions that are gone, and what does their work now.
REMOVED = {
    "agreement.floor": _SOFT,
    "agreement.ceiling": _SOFT,
    "agreement.min_threshold": _SOFT,
    "agreement.max_threshold": _SOFT,
    "agreement.momentum": _SOFT,
    "federate.kd_weight": _KD,
    "federate.kd_temperature": _KD,
    "agreement.foreground_prior": "a bias of SAM's labels is fitted on D_p's calibration part",
}
_NULLS = ("", "~", "null")

Key = tuple[str, ...]
SomeSection = TypeVar("SomeSection", bound=BaseModel)


def load_config(
    path: Path | None, overrides: tuple[str, ...] = (), *, folder: Path | None = None
) -> Config:
    """Read ``path`` (the defaults if None) and apply ``a.b=value`` overrides.

    An override's value is YAML, but for keys that hold text or a path: they take it as it stands.

    Args:
        folder: what relative paths in the file, and the default ones, refer to; the file's own
            folder if None. Those of overrides always refer to the current folder.

    Raises:
        ConfigError: the file is missing or no YAML mapping, or a key or value is wrong.
    """
    raw: Any = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; run in the project's folder or pass --params")
        raw = _yaml(path.read_bytes(), str(path), "sections of keys")
        raw = {} if raw is None else raw  # an empty file
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: found {type(raw).__name__}, expected sections of keys")
        raw = _anchored(Config, raw, path.parent if folder is None else folder)
    keys = tuple(_apply(raw, override) for override in overrides)
    return _validated(raw, str(path) if path is not None else "settings", keys)


def with_settings(config: Config, source: str, **sections: dict[str, Any]) -> Config:
    """Return ``config`` with other values in some sections, validated as by ``parse_config``.

    A value that is None leaves what is there.
    """
    raw = config.model_dump()
    for section, values in sections.items():
        raw[section] |= {key: value for key, value in values.items() if value is not None}
    return parse_config(raw, source=source)


def parse_config(raw: dict[str, Any], *, source: str) -> Config:
    """Validate a nested mapping; ``source`` names it in the error."""
    return _validated(raw, source, ())


def _validated(raw: dict[str, Any], source: str, overridden: tuple[Key, ...]) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        location = tuple(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        source = _blamed(source, location, overridden, unknown=unknown)
        key = ".".join(location) or "(top level)"
        if unknown:
            raise ConfigError(f"{source}: unknown key '{key}'{_advice(location)}") from error
        at = "" if source == f"--set {key}" else f"{key}: "
        given = isinstance(first["input"], dict | BaseModel)  # a section, which says much more
        found = "" if given else f"found {first['input']!r}, "
        expected = _expected(first, _plain_types(_type_of(location)))
        raise ConfigError(f"{source}: {at}{found}{expected}") from error


#: What a value should have been, by the type of pydantic's error and with what it knows.
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list, e.g. [{value}]",
    "model_type": "keys and their values",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "multiple_of": "a multiple of {multiple_of}",
}


def _expected(error: ErrorDetails, kinds: tuple[Any, ...]) -> str:
    """Return what was expected instead of a value that may be one of these types."""
    value, known = error["input"], error.get("ctx", {})
    if error["type"] not in _EXPECTED:  # one of our own checks
        message = error["msg"].removeprefix("Value error, ")
        return message[0].lower() + message[1:]
    text = _EXPECTED[error["type"]].format(value=value, **known)
    quotes = error["type"] in ("string_type", "path_type") and isinstance(value, int | float)
    or_null = " or null" if type(None) in kinds else ""
    return f"expected {text}{or_null}{'; write it in quotes' if quotes else ''}"


def _blamed(source: str, location: Key, overridden: tuple[Key, ...], *, unknown: bool) -> str:
    """Return what an error names: the ``--set`` that gave this key, or what else was read."""
    above = [given for given in overridden if given[: len(location)] == location]
    exact = [given for given in overridden if location[: len(given)] == given]
    if exact or (unknown and above):
        return f"--set {'.'.join((exact or above)[-1])}"
    return f"{source} with --set" if above else source


# --------------------------------------------------------------------------- keys


def _plain_types(annotation: Any) -> tuple[Any, ...]:
    """Return what a value may be: of ``Annotated[X, ...]`` and ``X | None``, ``X`` comes first."""
    if get_origin(annotation) is Annotated:
        return _plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for each in get_args(annotation) for kind in _plain_types(each))
    return (annotation,)


def _fields(kind: Any) -> dict[str, Any]:
    """Return the types of a section's keys; nothing for a value."""
    return {key: field.annotation for key, field in getattr(kind, "model_fields", {}).items()}


def _type_of(key: Key) -> Any:
    """Return the annotation of a setting or section; None for an unknown one."""
    kind: Any = Config
    for part in key:
        kind = _plain_types(kind)[0]
        # a part below a list of sections is a position
        kind = get_args(kind)[0] if get_origin(kind) is tuple else _fields(kind).get(part)
    return kind


def _all_keys(kind: Any = Config, prefix: str = "") -> Iterator[str]:
    for key, inner in _fields(kind).items():
        yield from _all_keys(inner, f"{prefix}{key}.") if _fields(inner) else [prefix + key]


def _advice(location: Key) -> str:
    """Return what to write instead of an unknown key: its new name, or the nearest, and all."""
    key = ".".join(location)
    if key in RENAMED:
        return f"; it is now called {RENAMED[key]}"
    if key in REMOVED:
        return f"; it was removed: {REMOVED[key]}"
    known = list(_fields(_type_of(location[:-1])))
    near = [(*location[:-1], each) for each in difflib.get_close_matches(location[-1], known, 1)]
    elsewhere = [each for each in _all_keys() if each.split(".")[-1] == location[-1]]
    nearest = next(iter([".".join(each) for each in near] + elsewhere), None)
    return (f" (nearest: {nearest})" if nearest else "") + "; expected one of " + ", ".join(known)


def _apply(raw: dict[str, Any], override: str) -> Key:
    """Set in ``raw`` what an override says, and return its key."""
    name, equals, text = override.partition("=")
    parts = tuple(name.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected section.key=value, e.g. federate.rounds=5")
    section = raw
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: '{part}' is a value, not a section")
    section[parts[-1]] = _value(parts, text, override)
    return parts


def _value(key: Key, text: str, override: str) -> Any:
    """Return an override's value: text as it stands where the key holds text, else YAML."""
    kinds = _plain_types(_type_of(key))
    if type(None) in kinds and text.strip().lower() in _NULLS:
        return None
    if any(kind in (str, Path) or _is_words(kind) for kind in kinds):
        return text
    return _yaml(text, f"--set {override}", "a value, e.g. 5 or [1, 2]")


def _is_words(kind: Any) -> bool:
    """Return whether a value is one of several words, not of several numbers."""
    return get_origin(kind) is Literal and isinstance(get_args(kind)[0], str)


def _anchored(annotation: Any, raw: Any, folder: Path) -> Any:
    """Return settings of this kind with ``folder`` before relative paths, default ones too."""
    kind = _plain_types(annotation)[0]
    if kind is Path and isinstance(raw, str | Path):
        return os.path.normpath(folder / raw)
    if get_origin(kind) is tuple and isinstance(raw, list):
        return [_anchored(get_args(kind)[0], each, folder) for each in raw]
    if _fields(kind) and isinstance(raw, dict | BaseModel):
        given = raw if isinstance(raw, dict) else {}
        return given | {
            key: _anchored(field.annotation, given.get(key, field.default), folder)
            for key, field in kind.model_fields.items()
        }
    return raw


# --------------------------------------------------------------------------- YAML


class _GivenTwiceError(Exception):
    """A mapping has one key twice; the message says where."""


class _Loader(yaml.SafeLoader):
    """YAML without dates, which no setting is, and without mappings in which the last key wins."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (as in PyYAML's classes)
        first: [each for each in resolvers if each[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping, unless it has a key twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                first = lines[name]
                raise _GivenTwiceError(f"'{key.value}' is given at line {first} and at line {line}")
            lines[name] = line
        return node


def _yaml(content: bytes | str, source: str, expected: str) -> Any:
    try:
        return yaml.load(content, _Loader)
    except _GivenTwiceError as error:
        raise ConfigError(f"{source}: {error}; keep one of them") from error
    except Exception as error:  # PyYAML lets errors of int(), of dates and of its own escape
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place is not None else ""
        raise ConfigError(f"{source}: not valid YAML{line}; expected {expected}") from error


def absolute(section: SomeSection) -> SomeSection:
    """Return settings whose paths hold in any working directory."""
    values = {name: _absolute(value) for name, value in section}
    return section.model_copy(update=values)


def _absolute(value: Any) -> Any:
    if isinstance(value, Path):
        return value.resolve()
    if isinstance(value, BaseModel):
        return absolute(value)
    return tuple(map(_absolute, value)) if isinstance(value, tuple) else value
