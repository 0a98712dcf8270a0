"""What samfed's pages share: figures, masks over images, numbers and templates.

A page is one file that asks for nothing from a network and needs no script. It is light or dark as
the reader's system is; a figure is then inverted, its legend with it. The same input gives
the same bytes. No text of the user enters a figure: legends are HTML, so names in any script, or
with ``$`` and ``<`` in them, are shown as they are.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from pipeline.results import colours
from pipeline.results.colours import GRID, HEAT, LABEL, SPINE, TRUTH
from pipeline.segmentation.palette import CLASS_COLOURS, class_colour

DECIMALS = {
    **dict.fromkeys(("dice", "iou", "nsd", "nsd_mm"), 3),
    **dict.fromkeys(("hd95", "assd", "hd95_defined", "assd_defined", "hd95_mm", "assd_mm"), 1),
}
PANEL_PX = 160  # of an example's picture: twelve examples stay below 2 MB

Mask = NDArray[np.uint8]  # (S, S) class indices, 0 = background


class Key(NamedTuple):
    """One entry of a legend."""

    label: str
    colour: str
    dash: str = "solid"
    area: bool = False  # a filled patch rather than a line


def render(template: str, **context: Any) -> str:
    """Return a template of this package as text; values are escaped if it is HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "drawn": figure_uri, "tex": _tex}
    environment.globals |= {"decimals": DECIMALS, "colours": colours}
    return environment.get_template(template).render(context).rstrip("\n")


def format_number(value: float | None, decimals: int) -> str:
    """Return ``value`` with so many decimals; a dash where there is none."""
    return f"{value:.{decimals}f}" if finite([value]) else "\N{EN DASH}"


def _tex(text: str) -> str:
    """Return ``text`` as LaTeX prints it."""
    words = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "|": "bar"}
    signs = dict[str, str | int | None]((each, f"\\{each}") for each in "&%$#_{}")
    signs |= {sign: f"\\text{word}{{}}" for sign, word in words.items()}
    return text.translate(str.maketrans(signs))


def finite(values: Iterable[float | None]) -> list[float]:
    """Return those of ``values`` that are there, and neither nan nor infinite."""
    return [value for value in values if value is not None and math.isfinite(value)]


def style_axes(axes: Axes, *, xlabel: str, ylabel: str) -> None:
    """Give axes the light grid that every figure has."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SPINE)
    axes.tick_params(colors=LABEL, labelsize=8)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, fontsize=8, color=LABEL)
    axes.set_ylabel(ylabel, fontsize=8, color=LABEL)


def figure_uri(figure: Figure) -> str:
    """Return the figure as a data URI, in 64 colours, which is four times smaller."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    return png_uri(Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE))


def png_bytes(picture: Image.Image) -> bytes:
    """Return the picture as PNG without metadata, which would differ between versions."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def png_uri(picture: Image.Image) -> str:
    """Return the picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")


def example_panels(
    image: NDArray[np.uint8],
    masks: Mapping[str, Mask | None],
    *,
    target: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Return an example's panels as data URIs; masks are overlays, so the image goes in once.

    Args:
        image: (S, S, 3) RGB.
        masks: (S, S) class indices by name; the outline of ``truth`` is drawn on all others.
        target: (S, S) 0..1.
    """
    side, truth = min(PANEL_PX, len(image)), masks.get("truth")
    heat = None if target is None else heat_map(np.rint(target * 255).astype(np.uint8), side)
    return {
        "image": png_uri(resized(image, side)),
        "target": None if heat is None else png_uri(heat),
        "overlays": {
            name: None if mask is None else png_uri(overlay(mask, truth, _fine(side)))
            for name, mask in masks.items()
        },
    }


def resized(image: NDArray[np.uint8], side: int) -> Image.Image:
    """Return (S, S) or (S, S, 3) values as a picture of ``side`` px."""
    return Image.fromarray(image).resize((side, side), Image.Resampling.BOX)


def heat_map(values: NDArray[np.uint8], side: int) -> Image.Image:
    """Return (S, S) values 0..255 as a picture of ``side`` px in viridis."""
    heat = resized(values, side)
    heat.putpalette(colormaps[HEAT](np.arange(256), bytes=True)[:, :3].tobytes())
    return heat


def overlay(mask: Mask, truth: Mask | None, side: int) -> Image.Image:
    """Return a transparent picture of ``side`` px: classes tinted and outlined, the truth a line.

    The truth, if it is another mask, is a thin white line on top.
    """
    labels, edge = _enlarge(mask, side, line_px=2)
    rgba = np.zeros((side, side, 4), dtype=np.uint8)
    for index in np.unique(labels[labels > 0]):
        rgba[labels == index] = (*class_colour(index), 70)
    rgba[edge, 3] = 255
    if truth is not None and truth is not mask:
        rgba[_enlarge(truth, side, line_px=1)[1]] = TRUTH
    return Image.fromarray(rgba)


def outline_uri(truth: Mask) -> str:
    """Return the outline of a true mask (s, s) as a transparent PNG, to lie over an overlay."""
    side = _fine(len(truth))
    rgba = np.zeros((side, side, 4), dtype=np.uint8)
    rgba[_enlarge(truth, side, line_px=1)[1]] = TRUTH
    return png_uri(Image.fromarray(rgba))


def prediction_uri(mask: Mask) -> str:
    """Return a mask (s, s) as a transparent PNG: classes tinted and outlined."""
    return png_uri(overlay(mask, None, _fine(len(mask))))


def _fine(side: int) -> int:
    """Return the side of an overlay: finer than the image, for thin lines."""
    return side * max(1, round(360 / side))


def photo_uri(image: NDArray[np.uint8]) -> str:
    """Return an image (s, s, 3) as a JPEG's data URI: a fifth of a PNG's size for photographs."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _enlarge(mask: Mask, side: int, *, line_px: int) -> tuple[Mask, NDArray[np.bool_]]:
    """Return the classes, and the foreground within ``line_px`` of another class; (side, side)."""
    labels = np.asarray(Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST))
    window = 2 * line_px + 1
    edge = maximum_filter(labels, window) != minimum_filter(labels, window)
    return labels, edge & (labels > 0)


def class_keys(masks: Iterable[Mask | None], names: Sequence[str] = ("foreground",)) -> list[Key]:
    """Return the legend of the classes that any of ``masks`` shows, by their names 1..K."""
    highest = max((int(mask.max()) for mask in masks if mask is not None), default=0)
    known = [*names, *(f"class {k}" for k in range(len(names) + 1, highest + 1))]
    pairs = zip(known[: max(highest, 1)], itertools.cycle(CLASS_COLOURS), strict=False)
    return [Key(name, colour, area=True) for name, colour in pairs]
