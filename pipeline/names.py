"""Names in the settings, of folders, sites, files, encoders: what may be one, and what to do."""

from __future__ import annotations

import re

from pipeline.disk import is_folder_name, is_site_name


def folder_name(name: str) -> str:
    """Return the name of a folder.

    Raises:
        ValueError: no folder can have it.
    """
    if not is_folder_name(name):
        raise ValueError("expected the name of a folder: no slash, not empty, no leading dot")
    return name


def site_name(name: str) -> str:
    """Return the name of a site.

    Raises:
        ValueError: no site can have it.
    """
    if not is_site_name(name):
        raise ValueError(
            "expected the name of a site: no slash or colon, no leading dot, no space around it, "
            "and not 'server'"
        )
    return name


def encoder_name(name: str) -> str:
    """Return the name of an encoder.

    Raises:
        ValueError: it could be timm's way to a folder or to a server (``tu-hf-hub:...``), where
            nothing is ever looked for: a site takes this name from the run's server.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError("expected the name of an encoder: letters, digits and _ . - alone")
    return name


def different_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names that no file system takes for one.

    Raises:
        ValueError: two are one, or differ in case alone.
    """
    spellings = [name.casefold() for name in names]
    twice = [name for name in names if spellings.count(name.casefold()) > 1]
    if twice:
        raise ValueError(
            f"expected each site once, but {', '.join(twice)} are one name, or differ in case alone"
        )
    return names


def check_mask_pattern(pattern: str) -> str:
    """Return a pattern of masks' file names that has one meaning.

    Raises:
        ValueError: it has no {id}, or no image's ending.
    """
    if not re.fullmatch(r"[^/\\{}*]*\{id\}[^/\\{}*]*\.(\*|png|jpe?g|tiff?|bmp|gif)", pattern):
        raise ValueError(
            "expected a file name with {id} and an image ending, e.g. {id}_mask.png or {id}.*"
        )
    return pattern
