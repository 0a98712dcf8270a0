"""What decides a result: settings by their marks, as a run's fingerprint and others take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pipeline.config import Config, Decides, NetworkConfig, Section
from pipeline.disk import file_sha256


def deciding_settings(
    config: Config, what: Literal["run", "first_model", "experiment"]
) -> dict[str, Any]:
    """Return the settings marked as deciding ``what``, JSON-ready, as ``section.key`` -> value.

    Networks are no part of a first model's settings: ``network_settings`` describes the one it has.
    Weights on disk count by their content for a run, and by their file's name for an experiment.
    """
    found: dict[str, Any] = {}
    for section, value in config:
        part, prefix = (value, f"{section}.") if isinstance(value, Section) else (config, "")
        for key in type(part).model_fields if prefix else [section]:
            if getattr(mark_of(type(part), key), what):
                found[prefix + key] = _plain(getattr(part, key), by_name=what == "experiment")
    return found


def network_settings(network: NetworkConfig, *, by_name: bool = False) -> dict[str, Any]:
    """Return what decides a network, JSON-ready; weights by content (or by their file's name)."""
    keys = NetworkConfig.model_fields
    return {key: _plain(getattr(network, key), by_name=by_name) for key in keys}


def _plain(value: Any, *, by_name: bool) -> Any:
    if isinstance(value, Path):
        return value.name if by_name or not value.is_file() else file_sha256(value)
    if isinstance(value, NetworkConfig):
        return network_settings(value, by_name=by_name)
    return [_plain(each, by_name=by_name) for each in value] if isinstance(value, tuple) else value


def mark_of(section: type[Section], key: str) -> Decides:
    """Return what a setting decides: the mark of its field, or else of its section."""
    marks = [m for m in section.model_fields[key].metadata if isinstance(m, Decides)]
    return marks[0] if marks else section.decides
