"""Where settings come from: a YAML file, ``--set``, a command's options; errors name the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config, NetworkConfig
from pipeline.errors import ConfigError

#: Keys of earlier versions, and what they are called now.
RENAMED = {
    "agreement.floor": "agreement.min_threshold",
    "agreement.ceiling": "agreement.max_threshold",
    "agreement.warn_kept": "agreement.warn_coverage",
    "federate.start_steps": "federate.pretrain_steps",
}


def load_config(path: Path | None, overrides: tuple[str, ...] = ()) -> Config:
    """Read ``path`` (the defaults if None) and apply ``a.b=value`` overrides, values as YAML.

    Raises:
        ConfigError: the file is missing or no YAML mapping, or a key or value is wrong.
    """
    raw: Any = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; run in the project's folder or pass --params")
        raw = _yaml(path.read_bytes(), str(path), "sections of keys") or {}
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: found {type(raw).__name__}, expected sections of keys")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, source=str(path) if path is not None else "settings")


def _yaml(content: bytes | str, source: str, expected: str) -> Any:
    try:
        return yaml.safe_load(content)
    except Exception as error:  # PyYAML lets errors of int(), of dates and of its own escape
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place is not None else ""
        raise ConfigError(f"{source}: not valid YAML{line}; expected {expected}") from error


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
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        if first["type"] == "extra_forbidden":
            now = RENAMED.get(key)
            advice = f"it is now called {now}" if now else _known_keys(first["loc"])
            raise ConfigError(f"{source}: unknown key '{key}'; {advice}") from error
        value, message = first["input"], first["msg"].removeprefix("Value error, ")
        found = "" if isinstance(value, dict | BaseModel) else f"found {value!r}, "
        raise ConfigError(f"{source}: {key}: {found}{message[0].lower()}{message[1:]}") from error


def _known_keys(location: tuple[int | str, ...]) -> str:
    model: Any = Config
    for part in location[:-1]:
        # a number is a position in model.clients, the only list of sections
        model = NetworkConfig if isinstance(part, int) else model.model_fields[part].annotation
    return "expected one of " + ", ".join(model.model_fields)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected section.key=value, e.g. federate.rounds=5")
    section, value = raw, _yaml(text, f"--set {override}", "a value, e.g. 5 or [1, 2]")
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: '{part}' is a value, not a section")
    section[parts[-1]] = value
