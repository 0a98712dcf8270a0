"""Doubts about labels and updates: one line for each kind, which names all whom it is about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config import Config

LOOK = "look at SAM's labels there with `samfed cache show`"


@dataclass(frozen=True)
class Doubt:
    """A reason to look at something before it is trusted."""

    what: str  # what was found, without its numbers: it tells the kinds apart
    of: Mapping[str, str]  # the number that was found, by owner
    advice: str

    @property
    def text(self) -> str:
        """The doubt as one line."""
        names = ", ".join(f"{owner} ({number})" for owner, number in self.of.items())
        return f"{self.what}: {names}; {self.advice}"


def untold(doubts: Iterable[Doubt], told: Sequence[str]) -> list[str]:
    """Return the lines of what no earlier line told: each kind of doubt once for an owner.

    Args:
        told: earlier lines, of which other ones do not matter.
    """
    found = []
    for doubt in doubts:
        earlier = [line for line in told if line.startswith(doubt.what)]
        new = {
            owner: number
            for owner, number in doubt.of.items()
            # what comes before tells "b" from the end of "site b"
            if not any(f"{start}{owner} (" in line for line in earlier for start in (": ", ", "))
        }
        if new:
            found.append(replace(doubt, of=new).text)
    return found


def below(value: float) -> str:
    """Show a value that is below a limit with two digits, rounded down: 0.696 is not 0.70."""
    return f"{math.floor(value * 100 + 1e-9) / 100:.2f}"


def contradictions(flip_dice: Mapping[str, float | None], config: Config) -> list[Doubt]:
    """Doubt SAM where its labels of mirrored images are not those of the images.

    Mirror images say nothing against a teacher that was trained without any (``augment.flips``).

    Args:
        flip_dice: the mean Dice of both labels by owner, 0..1, None where nobody measured it.
    """
    limit = config.precompute.warn_consistency
    found = {
        owner: below(dice) for owner, dice in flip_dice.items() if dice is not None and dice < limit
    }
    if not found or config.augment.flips == "none":
        return []
    what = (
        "SAM contradicts itself: its labels of mirrored images match those of the images with a "
        f"Dice below precompute.warn_consistency {limit:g}"
    )
    return [Doubt(what, found, LOOK)]
