"""README's picture: the examples of a finished run, as its report shows them.

    python tools/demo_picture.py cache/demo/cache/runs/sam_fed docs/demo.png

Two of the server's images, whose truth is known, and one of each client.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.federation.runs import RunFolder
from pipeline.results.pages import heat_map, overlay, png_bytes

SIDE, GAP, HEAD = 128, 6, 18  # px
COLUMNS = ("Image", "Truth", "SAM", "Client", "Target")
SERVERS = 2  # of the server's images; a client shows one


def draw(run: Path) -> bytes:
    """Return the picture as PNG: a row for each example; what is not known stays white."""
    examples = RunFolder(run).examples()
    servers = [each for each in examples if each.truth is not None][:SERVERS]
    shown = servers + [each for each in examples if each.truth is None]
    size = (len(COLUMNS) * (SIDE + GAP), HEAD + len(shown) * (SIDE + HEAD))
    sheet = Image.new("RGB", size, "white")
    text, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, title in enumerate(COLUMNS):
        middle = column * (SIDE + GAP) + SIDE // 2
        text.text((middle, 2), title, fill="black", font=font, anchor="ma")
    for row, each in enumerate(shown):
        top = HEAD + row * (SIDE + HEAD)
        text.text((0, top + 2), each.caption, fill="dimgrey", font=font)
        plain = Image.fromarray(each.image).resize((SIDE, SIDE), Image.Resampling.BOX)
        sheet.paste(plain, (0, top + HEAD))
        for column, mask in enumerate((each.truth, each.sam, each.prediction), start=1):
            if mask is not None:
                above = overlay(mask, each.truth, 4 * SIDE).resize((SIDE, SIDE))
                panel = Image.alpha_composite(plain.convert("RGBA"), above)
                sheet.paste(panel.convert("RGB"), (column * (SIDE + GAP), top + HEAD))
        if each.target is not None:
            heat = heat_map(np.rint(each.target * 255).astype(np.uint8), each.target.shape[0])
            heat = heat.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(heat, (4 * (SIDE + GAP), top + HEAD))
    return png_bytes(sheet.quantize(128))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    chosen.out.write_bytes(draw(chosen.run))
