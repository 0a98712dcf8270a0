"""The agreement rules as filters: SAM and the client are wrong by known amounts.

    python benchmarks/agreement_noise.py [--json] [--figure FILE] [--quick]

The truth is the masks of the generated data set at 64 x 64; ``noise.py`` makes both sources from
it. Every rule of ``pipeline/federation/agreement.py`` filters what they say, as in a local update:
SAM's probabilities have the label store's eight bits, and the calibration is fitted on other images
that are corrupted alike.

Scores (``score``), pooled over images; w is 1 where a pixel has a weight, t its target's label, y
its truth:

    precision = sum w [t = y] / sum w           recall = sum w [t = y] / number of pixels
    foreground: precision over pixels with t > 0, recall over those with y > 0
    Dice = 2 P R / (P + R) of the foreground, so a dropped pixel counts as missed
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from noise import Errors, Field, Masks, predict
from PIL import Image
from torch import Tensor

from pipeline.config import AgreementConfig, Rule
from pipeline.data.folder import scan
from pipeline.data.images import resize_mask
from pipeline.data.synthetic import write_dataset
from pipeline.disk import write_bytes
from pipeline.federation.agreement import (
    Calibration,
    Sources,
    agree,
    spread,
)
from pipeline.federation.calibration import calibrate
from pipeline.results.colours import COLOURS
from pipeline.results.pages import style_axes

SEED = 0
SIZE_PX = 64
IMAGES_PER_SITE = 24  # of four sites: 8 for the calibration part, 16 unlabelled
DRAWS = 3  # the scores are means over independent corruptions of the same images

SOURCES = ("SAM", "client", "both")
RULES: tuple[Rule, ...] = (
    "adaptive", "consensus", "confident", "soft", "sam_only", "sam_soft", "client_only"
)  # fmt: skip
UNCALIBRATED = "uncalibrated"  # `adaptive` without its calibration
VARIANTS = (UNCALIBRATED,)  # of `adaptive`
COLUMNS = (*RULES, *VARIANTS)
# colour and dash of a line
STYLES: dict[str, tuple[str, Literal["solid", "dotted", "dashed"]]] = {
    **{rule: (COLOURS[i], "solid") for i, rule in enumerate(RULES)},
    UNCALIBRATED: (COLOURS[0], "dotted"),
}


@dataclass(frozen=True)
class Case:
    """How each source errs; ``calibrated``: how both do on the calibration part, None = alike."""

    sam: Errors
    client: Errors
    calibrated: Errors | None


@dataclass(frozen=True)
class Corruption:
    """A kind of error, its levels, and how the source that is left alone errs."""

    name: str
    unit: str
    levels: tuple[float, ...]
    errors: Callable[[float], Errors]
    other: Errors = field(default_factory=Errors)
    calibrated: Errors | None = None

    def case(self, level: float, source: str) -> Case:
        """Return how both err where ``source`` ("SAM", "client" or "both") errs at ``level``."""
        errors = self.errors(level)
        sam = self.other if source == "client" else errors
        client = self.other if source == "SAM" else errors
        return Case(sam, client, self.calibrated)


def mixed(strength: float, *, sharpness: float = 1.0) -> Errors:
    """All kinds but flips, which no network makes; strength 1 is a fair source, Dice about 0.8."""
    return Errors(
        shift=2 * strength,
        missed=0.08 * strength,
        invented=0.15 * strength,
        sharpness=sharpness,
    )


def sharpened(factor: float) -> Errors:
    """Return a fair source with k = ``factor``: too sure above 1, too modest below."""
    return mixed(1, sharpness=factor)


FAIR = mixed(1)
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 3.0)
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)
CORRUPTIONS = (
    Corruption("flipped pixels", "share", (0, 0.05, 0.1, 0.2, 0.3), lambda v: Errors(flips=v)),
    Corruption("shifted boundary", "px", (0, 1, 2, 4, 6), lambda v: Errors(shift=v)),
    Corruption("missed objects", "share of images", SHARES, lambda v: Errors(missed=v)),
    Corruption("invented objects", "share of images", SHARES, lambda v: Errors(invented=v)),
    Corruption("mix", "strength", STRENGTHS, mixed, FAIR),
    Corruption("mix, calibrated at 1", "strength", STRENGTHS, mixed, FAIR, FAIR),
    Corruption("confidence", "k", (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8), sharpened, FAIR),
)


@dataclass(frozen=True)
class Truth:
    """Masks of the unlabelled images and of the calibration part, and the latter's patients."""

    unlabelled: Masks
    calibration: Masks
    groups: tuple[str, ...]


def load_truth(images_per_site: int) -> Truth:
    """Draw masks, a third of each site's for the calibration part; no patient is in both."""
    chosen: dict[bool, list[Masks]] = {True: [], False: []}
    groups: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "data"
        write_dataset(root, images_per_site=images_per_site, size_px=SIZE_PX, seed=SEED)
        records = scan(root).images
        for site in sorted({record.site for record in records.values()}):
            own: list[str] = []
            for record in (r for r in records.values() if r.site == site):
                calibrates = len(own) < images_per_site // 3 or record.group in own
                assert record.mask is not None  # the generator draws one for every image
                with Image.open(root / record.mask) as picture:
                    mask = resize_mask(np.asarray(picture), SIZE_PX)
                chosen[calibrates].append(mask > 0)
                if calibrates:
                    own.append(record.group)
            groups += own
    return Truth(np.stack(chosen[False]), np.stack(chosen[True]), tuple(groups))


class Draw:
    """The predictions of one draw; each (source, errors) is predicted once."""

    def __init__(self, truth: Truth, number: int) -> None:
        self.truth, self.number = truth, number
        self._predicted: dict[tuple[int, Errors, bool], Field] = {}

    def _predict(self, source: int, errors: Errors, calibration: bool) -> Field:
        key = (source, errors, calibration)
        if key not in self._predicted:
            rng = np.random.default_rng([SEED, self.number, source, calibration])
            masks = self.truth.calibration if calibration else self.truth.unlabelled
            self._predicted[key] = predict(masks, errors, rng)
        return self._predicted[key]

    def sources(self, sam: Errors, client: Errors, *, calibration: bool = False) -> Sources:
        """Return both sources; SAM's probabilities have the label store's eight bits."""
        foreground = self._predict(0, sam, calibration)
        label = foreground > 0.5
        stored = np.rint(255 * np.where(label, foreground, 1 - foreground)).astype(np.uint8)
        predicted = torch.from_numpy(self._predict(1, client, calibration))
        return Sources(
            spread(torch.from_numpy(label).long(), torch.from_numpy(stored).float() / 255, 2),
            torch.stack([1 - predicted, predicted], dim=1),
        )


def score(target: Tensor, weight: Tensor, truth: Tensor) -> dict[str, float]:
    """Return precision, recall and Dice of weighted pseudo-labels; formulas as above.

    Args:
        target: (N, S, S) int64. weight: (N, S, S) float32 in 0..1. truth: (N, S, S) int64.

    ``coverage`` is the share of pixels with a weight, ``dice_kept`` the Dice with each of their
    weights taken as 1. The precision of nothing is 1: none of it is wrong.
    """
    weight, kept = weight.double(), (weight > 0).double()
    right, kept_right = weight * (target == truth), kept * (target == truth)
    found, object_ = target > 0, truth > 0

    def share(part: Tensor, whole: Tensor | int) -> float:
        return float(part / whole) if whole > 0 else 1.0

    def dice(right: Tensor, weight: Tensor) -> float:
        return share(2 * right[object_].sum(), weight[found].sum() + object_.sum())

    return {
        "precision": share(right.sum(), weight.sum()),
        "recall": share(right.sum(), truth.numel()),
        "foreground_precision": share(right[found].sum(), weight[found].sum()),
        "foreground_recall": share(right[object_].sum(), object_.sum()),
        "dice": dice(right, weight),
        "dice_kept": dice(kept_right, kept),
        "coverage": float(kept.mean()),
    }


def measure(draw: Draw, case: Case) -> dict[str, dict[str, float]]:
    """Return the scores of every column, and what the calibration found, of one draw."""
    truth = torch.from_numpy(draw.truth.unlabelled).long()
    sources = draw.sources(case.sam, case.client)
    sam, client = case.calibrated or case.sam, case.calibrated or case.client
    fitted = calibrate(
        draw.sources(sam, client, calibration=True),
        torch.from_numpy(draw.truth.calibration).long(),
        groups=draw.truth.groups,
        config=AgreementConfig(),
    )
    configs: dict[str, AgreementConfig] = {rule: AgreementConfig(rule=rule) for rule in RULES}
    configs[UNCALIBRATED] = AgreementConfig()
    scores = {}
    for column, config in configs.items():
        result = agree(
            sources,
            config=config,
            calibration=Calibration() if column == UNCALIBRATED else fitted,
        )
        # an image's weight says how much it counts in training, not which of its pixels are kept
        scores[column] = score(result.label, (result.weight > 0).float(), truth)
    scores["adaptive"] |= fitted.numbers()
    return scores


def mean_scores(drawn: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return means over the draws; ``dice_range`` is how far the draws' Dice lie apart."""
    means = {}
    for column in COLUMNS:
        names = drawn[0][column]
        means[column] = {n: float(np.mean([one[column][n] for one in drawn])) for n in names}
        dice = [one[column]["dice"] for one in drawn]
        means[column]["dice_range"] = max(dice) - min(dice)
    return means


def measure_all(*, quick: bool) -> list[dict[str, Any]]:
    """Return a row for each corruption, level and source, with the scores of every column.

    ``quick``: a third of the images, one draw, the first and the last level.
    """
    truth = load_truth(IMAGES_PER_SITE // 3 if quick else IMAGES_PER_SITE)
    draws = [Draw(truth, number) for number in range(1 if quick else DRAWS)]
    rows = []
    known: dict[Case, dict[str, dict[str, float]]] = {}  # levels of 0 and 1 come several times
    for corruption in CORRUPTIONS:
        for level in corruption.levels[:: len(corruption.levels) - 1 if quick else 1]:
            for source in SOURCES:
                case = corruption.case(level, source)
                if case not in known:
                    known[case] = mean_scores([measure(draw, case) for draw in draws])
                row = {"corruption": corruption.name, "level": level, "unit": corruption.unit}
                rows.append({**row, "source": source, "scores": known[case]})
    return rows


# --------------------------------------------------------------------------- output


def table(rows: Iterable[dict[str, Any]], cell: Callable[[dict[str, float]], str]) -> str:
    """Return a Markdown table; ``cell`` writes one column's scores."""
    heads = ("corruption", "level", "wrong", *(f"`{rule}`" for rule in RULES), *VARIANTS)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [cell(row["scores"][column]) for column in COLUMNS]
        place = (f"{row['corruption']} ({row['unit']})", f"{row['level']:g}", row["source"])
        lines.append("| " + " | ".join((*place, *cells)) + " |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """Return a table by column: mean Dice, the mean of each corruption, the largest shortfall.

    A shortfall is from the best of ``RULES`` in that row, which nobody knows beforehand.
    """
    names = list(dict.fromkeys(row["corruption"] for row in rows))
    heads = ("rule", "mean", *names, "largest shortfall")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for column in COLUMNS:
        of = {name: [r for r in rows if r["corruption"] == name] for name in names}
        means = [np.mean([r["scores"][column]["dice"] for r in of[name]]) for name in names]
        short = max(
            max(r["scores"][rule]["dice"] for rule in RULES) - r["scores"][column]["dice"]
            for r in rows
        )
        cells = [f"{value:.3f}" for value in (np.mean(means), *means, short)]
        name = column if column in VARIANTS else f"`{column}`"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dice_cell(scores: dict[str, float]) -> str:
    return f"{scores['dice']:.3f}"


def precision_recall_cell(scores: dict[str, float]) -> str:
    return f"{scores['foreground_precision']:.2f} / {scores['foreground_recall']:.2f}"


def draw_figure(rows: list[dict[str, Any]]) -> bytes:
    """Draw Dice over level as a PNG: a row of panels by corruption, a column by source.

    What falls below 0.3 leaves its panel, so that the rest can be told apart.
    """
    figure = Figure(figsize=(8.4, 1.55 * len(CORRUPTIONS) + 0.6), layout="constrained")
    panels = figure.subplots(len(CORRUPTIONS), len(SOURCES), sharey="row", squeeze=False)
    for across, corruption in zip(panels, CORRUPTIONS, strict=True):
        for axes, source in zip(across, SOURCES, strict=True):
            own = [r for r in rows if (r["corruption"], r["source"]) == (corruption.name, source)]
            _draw_panel(axes, own)
            style_axes(axes, xlabel=corruption.unit, ylabel="Dice" if source == "SAM" else "")
            axes.set_title(f"{corruption.name}: {source}", fontsize=8, loc="left")
        across[0].set_ylim(bottom=max(0.3, across[0].get_ylim()[0]), top=1.02)
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            linestyle=dash,
            label=column if column in RULES else f"adaptive, {column}",
        )
        for column, (colour, dash) in STYLES.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    picture = Image.open(buffer).convert("RGB").quantize(64)  # few colours: half the bytes
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _draw_panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    levels = [row["level"] for row in rows]
    for column in reversed(COLUMNS):  # `adaptive` on top
        colour, dash = STYLES[column]
        values = [row["scores"][column]["dice"] for row in rows]
        width = 2.2 if column == "adaptive" else 1.2
        axes.plot(levels, values, color=colour, linestyle=dash, linewidth=width)
    if levels[0] > 0:
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [str(Fraction(level)) for level in levels])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="every score, for machines")
    parser.add_argument("--figure", type=Path, help="write the small multiples to this PNG")
    parser.add_argument("--quick", action="store_true", help="few images and levels, one draw")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measure_all(quick=options.quick)
    if options.figure is not None:
        write_bytes(options.figure, draw_figure(rows))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("Foreground Dice of the kept labels\n")
    print(table(rows, dice_cell))
    print("\nForeground precision / recall\n")
    print(table(rows, precision_recall_cell))
    print("\nMean Dice, each corruption counting alike\n")
    print(summary(rows))


if __name__ == "__main__":
    main()
