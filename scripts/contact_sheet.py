"""Draws docs/images/scenes.png: one column a site, each picture with its question and answer.

python scripts/contact_sheet.py
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import datasets
import matplotlib
from PIL import Image, ImageDraw, ImageFont

from fedvlm.data.scenes import generic, scenes

FONT = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
TILE, TEXT, GAP = 128, 66, 12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/images/scenes.png")
    parser.add_argument("--style", default="mixed")
    parser.add_argument("--each", type=int, default=6, help="pictures per site")
    args = parser.parse_args()
    columns = {"generic": generic(args.each, seed=7)}
    data = scenes(sites=8, rows=120, style=args.style)
    for name in sorted(set(data["site"])):
        rows = [i for i, site in enumerate(data["site"]) if site == name]
        columns[f"{args.style}: {name}"] = data.select(rows[: args.each])
    sheet(columns).save(args.out, optimize=True)


def sheet(columns: dict[str, datasets.Dataset]) -> Image.Image:
    """Draws a column of pictures for each data set, with question and answer below each picture."""
    rows = max(map(len, columns.values()))
    size = (GAP + len(columns) * (TILE + GAP), 20 + rows * (TILE + TEXT))
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.truetype(FONT, 10)
    for c, (title, data) in enumerate(columns.items()):
        left = GAP + c * (TILE + GAP)
        pen.text((left, 3), title, "black", font)
        for r, row in enumerate(data):
            top = 20 + r * (TILE + TEXT)
            canvas.paste(row["image"].resize((TILE, TILE), Image.Resampling.NEAREST), (left, top))
            lines = (
                textwrap.wrap(row["question"], 24)[:3] + textwrap.wrap("> " + row["chosen"], 24)[:2]
            )
            for n, line in enumerate(lines[:5]):
                colour = "navy" if line.startswith("> ") else "black"
                pen.text((left, top + TILE + 1 + 12 * n), line, colour, font)
    return canvas


if __name__ == "__main__":
    main()
