"""Exact match of the shipped tiny model, by greedy generation.

    python scripts/score_tiny.py --rows 200

Questions pass through the processor's chat template. Left-padded batches are decoded greedily. The
script prints scores on held-out generic scenes by kind, on the novel kinds, and on every style of
sites. The scores of kinds that the model was not trained on should be low.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch

from _tiny import TINY
from fedvlm.data.scenes import generic, scenes
from fedvlm.data.sites import STYLES

HELD_OUT = 20261123  # seed of generic rows; training draws its rows from another stream


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--rows", type=int, default=200, help="rows of every data set")
    parser.add_argument("--batch", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(args.model, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(args.model, local_files_only=True).eval()
    data = {"generic": generic(args.rows, seed=HELD_OUT)}
    for style in STYLES:
        made = scenes(sites=8, rows=-(-args.rows // 8), style=style)
        data[style] = made.select(range(args.rows))
    for name, rows in data.items():
        start = time.time()
        scores = score(model, processor, list(rows), args.batch)
        shown = "  ".join(f"{kind} {value:.2f}" for kind, value in scores.items())
        print(f"{name} ({time.time() - start:.0f} s): {shown}", flush=True)


def score(model, processor, rows: list[dict], batch: int) -> dict[str, float]:
    """Exact match over all rows, and by kind of question."""
    right, asked = defaultdict(int), defaultdict(int)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        for row, answer in zip(part, answers(model, processor, part), strict=True):
            for name in ("all", row["origin_dataset"].removeprefix("scenes/")):
                right[name] += answer == row["chosen"]
                asked[name] += 1
    return {name: right[name] / asked[name] for name in sorted(asked)}


@torch.no_grad()
def answers(model, processor, rows: list[dict]) -> list[str]:
    """Greedy answers to rows that have an `image` and a `question`."""
    texts = [prompt(processor, row["question"]) for row in rows]
    images = [[row["image"]] for row in rows]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=48)[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(ids, skip_special_tokens=True)


def prompt(processor, question: str) -> str:
    """The prompt of a picture and a question, in the chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turn = {"role": "user", "content": content}
    return processor.apply_chat_template([turn], add_generation_prompt=True)


if __name__ == "__main__":
    main()
