"""What images and masks of a folder show, by site, before anything is trained on them."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger("samfed.data")

_NEARLY_FULL = 0.95  # of an image


class Seen(NamedTuple):
    """What reading an image, and its mask if it has one, showed."""

    site: str
    file: str  # the image's, relative to data.root
    foreground: float | None = None  # share of the image, 0..1; None without a mask
    decisions: tuple[str, ...] = ()  # what was decided to read the mask
    orientation: int = 1  # EXIF's, 1..8, of the image
    mask_orientation: int = 1


@dataclass(frozen=True)
class Survey:
    """What was seen of each image, by id."""

    seen: Mapping[str, Seen]

    def as_json(self) -> dict[str, Any]:
        """Return counts and foreground shares (0..1) by site, and how many masks were decided."""
        return {"sites": self._sites(), "mask_decisions": self._decisions()}

    def text(self) -> str:
        """Return a line for each site, and one on what masks were taken for."""
        lines = [f"{name}: {_in_words(site)}" for name, site in self._sites().items()]
        decided = [f"{count} {what}" for what, count in self._decisions().items()]
        return "\n".join(lines + ([f"masks: {', '.join(decided)}"] if decided else []))

    def warn(self, public: Collection[str]) -> None:
        """Name sites, or D_p (``public``), whose masks show nothing, and EXIF that may mislead."""
        for name, members in self._by_site().items():
            _warn_of_masks(f"site '{name}'", members)
        _warn_of_masks("the server's set", [self.seen[image_id] for image_id in public])
        with_mask = [each for each in self.seen.values() if each.foreground is not None]
        turned = [each for each in with_mask if each.orientation != each.mask_orientation]
        if turned:
            first = turned[0]
            log.warning(
                "%d images have another EXIF orientation than their masks (%s: %d, its mask: %d) "
                "at equal sizes: a mask drawn on the stored pixels is upside down or mirrored; "
                "look at one, and save such images upright and without orientation",
                len(turned),
                first.file,
                first.orientation,
                first.mask_orientation,
            )

    def _by_site(self) -> dict[str, list[Seen]]:
        sites = defaultdict[str, list[Seen]](list)
        for each in self.seen.values():
            sites[each.site].append(each)
        return dict(sorted(sites.items()))

    def _sites(self) -> dict[str, dict[str, Any]]:
        return {name: _summary(members) for name, members in self._by_site().items()}

    def _decisions(self) -> dict[str, int]:
        return dict(
            sorted(Counter(d for each in self.seen.values() for d in each.decisions).items())
        )


def _shares(members: Sequence[Seen]) -> list[float]:
    return [each.foreground for each in members if each.foreground is not None]


def _summary(members: Sequence[Seen]) -> dict[str, Any]:
    shares = _shares(members)
    median = float(np.median(shares)) if shares else None
    spread = {"median": median, "min": min(shares, default=None), "max": max(shares, default=None)}
    return {
        "images": len(members),
        "masks": len(shares),
        "foreground": spread if shares else None,
        "empty": sum(share == 0 for share in shares),
        "over_half": sum(share > 0.5 for share in shares),
    }


def _in_words(site: Mapping[str, Any]) -> str:
    counts = f"{site['images']} images, {site['masks']} masks"
    if site["foreground"] is None:
        return counts
    spread = site["foreground"]
    return (
        f"{counts}, foreground {spread['median']:.1%} (median; {spread['min']:.1%} to "
        f"{spread['max']:.1%}), {site['empty']} empty, {site['over_half']} over half of the image"
    )


def _warn_of_masks(whose: str, members: Sequence[Seen]) -> None:
    shares = _shares(members)
    if shares and not any(shares):
        log.warning(
            "%s: all %d masks are empty; look at one: is its foreground really 0?",
            whose,
            len(shares),
        )
    elif shares and min(shares) > _NEARLY_FULL:
        log.warning(
            "%s: all %d masks cover over %.0f %% of their images; look at one: are foreground and "
            "background swapped?",
            whose,
            len(shares),
            100 * _NEARLY_FULL,
        )
