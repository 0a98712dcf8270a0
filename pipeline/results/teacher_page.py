"""``cache/evaluate-sam.html``: teachers side by side, so that one sees whether SAM is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.results.pages import (
    COLOURS,
    GREY,
    Key,
    class_keys,
    example_panels,
    figure_uri,
    render,
    style_axes,
)

#: A caption, an image (S, S, 3) RGB, and (S, S) masks: its ``truth``, and each teacher's.
TeacherExample = tuple[str, NDArray[np.uint8], dict[str, NDArray[np.uint8]]]


def render_evaluation(
    teachers: dict[str, dict[str, Any]],
    examples: Sequence[TeacherExample],
    *,
    variant: str,
    configured: str,
) -> str:
    """Return the page as HTML text; the same input gives the same bytes.

    Args:
        teachers: by name what ``evaluate_teacher`` measured, or why it did not (``missing``).
        variant: of SAM.
        configured: the teacher that ``sam.prompt`` asks for.
    """
    measured = {name: row for name, row in teachers.items() if "missing" not in row}
    keys = [Key(name, COLOURS[list(teachers).index(name)]) for name in measured]
    return render(
        "evaluate_sam.html.j2",
        teachers=teachers,
        measured=list(measured),
        variant=variant,
        configured=configured,
        images=next(iter(measured.values()))["n"],
        reliability=figure_uri(_reliability(list(measured.values()), keys)),
        keys=keys,
        examples=[
            {"caption": caption} | example_panels(image, masks)
            for caption, image, masks in examples
        ],
        class_keys=class_keys(mask for _, _, masks in examples for mask in masks.values()),
    )


def _reliability(rows: Sequence[dict[str, Any]], keys: Sequence[Key]) -> Figure:
    """Draw accuracy over confidence on the left, each bin's share of the pixels on the right."""
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    style_axes(left, xlabel="confidence", ylabel="share of pixels that are right")
    style_axes(right, xlabel="confidence", ylabel="share of pixels (log scale)")
    right.set_yscale("log")
    left.plot([0, 1], [0, 1], color=GREY, lw=1.2)
    for row, key in zip(rows, keys, strict=True):
        bins = row["reliability"]
        pixels = np.array(bins["pixels"])
        filled = pixels > 0
        confidence, accuracy = (
            np.array(bins[name], np.float64)[filled] for name in ("confidence", "accuracy")
        )
        style = {"color": key.colour, "ls": key.dash, "lw": 1.6, "marker": "o", "ms": 3.5}
        left.plot(confidence, accuracy, **style)
        right.plot(confidence, (pixels / pixels.sum())[filled], **style)
    left.set(xlim=(0, 1.02), ylim=(0, 1.02))
    right.set_xlim(0, 1.02)
    return figure
