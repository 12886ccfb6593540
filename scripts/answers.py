"""Draws the picture of the README: one question, and the answers of all models of a run.

    fedvlm run data.scenes.style=concept data.scenes.sites=3 data.scenes.rows=300 train.rounds=30 \\
        train.local_steps=10 train.lr=0.005 eval.every=0 eval.max_rows=24 lora.target=language \\
        output=runs/picture
    python scripts/answers.py runs/picture 559 docs/images/answers.png

The second argument is the number of a held-out row.
"""

from __future__ import annotations

import io
import sys

from matplotlib.figure import Figure
from PIL import Image

from fedvlm import open_run
from fedvlm.rounds.prepare import rows_of

NAMES = {"untuned": "before training", "global": "one model for all"}
INK, FAINT = "#1f2933", "#66737f"


def main(folder: str, row: int, path: str) -> None:
    run = open_run(folder)
    rows = rows_of(run.config).select([row])
    answers = run.answers(rows, run.chosen(global_=True, untuned=True, every=True))
    order = ["untuned", "global", *(name for name in answers if name not in NAMES)]
    figure = Figure((7.6, 2.4), dpi=200, facecolor="white")
    picture = figure.add_axes((0.02, 0.06, 0.28, 0.88))
    picture.imshow(Image.open(io.BytesIO(rows[0]["image"]["bytes"])))
    picture.set_axis_off()
    page = figure.add_axes((0.34, 0.0, 0.66, 1.0))
    page.set_axis_off()
    page.text(0, 0.88, rows[0]["question"], fontsize=12, color=INK, va="center", weight="bold")
    for place, name in enumerate(order):
        y = 0.70 - 0.145 * place
        own = name not in NAMES
        title = f"model of {name}" if own else NAMES[name]
        page.text(0, y, title, fontsize=10.5, color=FAINT, va="center")
        text = answers[name][0] or "(nothing)"
        weight = "bold" if own else "normal"
        page.text(0.36, y, text, fontsize=11.5, color=INK, va="center", weight=weight)
    for text in page.texts:
        text.set_parse_math(False)
    figure.savefig(path)
    print({name: answers[name][0] for name in order})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
