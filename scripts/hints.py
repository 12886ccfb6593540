"""Extra losses for the training of the tiny model: they give the place of each object.

The drawing of a scene is known, so the image side can learn from it directly. There are two hints:

- A temporary head predicts shape, colour, size and pattern from the patches of the vision encoder.
- Each image token on an object must be close to the words for the object's shape, colour, size and
  place, in the embeddings of the language model. Then the lookup of "circle" among the image tokens
  compares vectors that are alike already. Without this hint the model answered about a random
  object for minutes of training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import _tiny as tiny
from fedvlm.data import render

GRID = tiny.SIDE // tiny.PATCH
CELLS = GRID // tiny.SCALE
SIZES = ("large", "small")
COLOURS = tuple(render.COLOURS)
FIELDS = (render.SHAPES + render.LETTERS, COLOURS, SIZES, render.PATTERNS)
WORDS = (render.SHAPES, COLOURS, SIZES, ("top", "bottom"), ("left", "right"))
PATCH_CLASSES = [1 + len(names) for names in FIELDS]
IGNORED = -100


class Hints(nn.Module):
    """The head for patches, and the token ids of the words for image tokens."""

    def __init__(self, width: int, tokenizer):
        super().__init__()
        self.head = nn.Linear(width, sum(PATCH_CLASSES))
        self.words = [tokenizer.convert_tokens_to_ids([f"Ġ{w}" for w in names]) for names in WORDS]

    def forward(self, scenes, patches, tokens, embeddings) -> torch.Tensor:
        """The sum of both hints' cross-entropies.

        Args:
            scenes: scenes of the pictures.
            patches: output of the vision encoder, [pictures, 64, width].
            tokens: output of the connector, [pictures, 16, width].
            embeddings: embeddings of the language model, [vocabulary, width].
        """
        labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
        guesses = self.head(patches).split(PATCH_CLASSES, dim=-1)
        loss = sum(_entropy(guess, labels[..., i]) for i, guess in enumerate(guesses))
        places = torch.from_numpy(np.stack([cell_labels(scene) for scene in scenes]))
        for i, ids in enumerate(self.words):
            loss = loss + 0.5 * _entropy(tokens @ embeddings[ids].T, places[..., i])
        return loss


def _entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def patch_labels(scene: render.Scene) -> np.ndarray:
    """The classes of each image patch: [64, 4], one column for each of `FIELDS`; 0 is ground."""
    labels = np.zeros((GRID, GRID, len(FIELDS)), dtype=np.int64)
    for thing, distance in _distances(scene, GRID):
        labels[distance < max(thing.radius * 0.9, 5.7)] = [1 + c for c in _classes(thing)]
    return labels.reshape(GRID * GRID, -1)


def cell_labels(scene: render.Scene) -> np.ndarray:
    """The classes of each image token: [16, 5], shape, colour, size, row and column; or ignored."""
    labels = np.full((CELLS, CELLS, len(WORDS)), IGNORED, dtype=np.int64)
    for thing, distance in _distances(scene, CELLS):
        near = (distance < thing.radius * 0.9) | (distance == distance.min())
        if thing.shape in render.SHAPES:
            labels[near] = [*_classes(thing)[:3], thing.cell // 2, thing.cell % 2]
    return labels.reshape(CELLS * CELLS, -1)


def _classes(thing: render.Thing) -> list[int]:
    values = (thing.shape, thing.colour, thing.size, thing.texture)
    return [names.index(value) for names, value in zip(FIELDS, values, strict=True)]


def _distances(scene: render.Scene, grid: int):
    centres = (np.arange(grid) + 0.5) * tiny.SIDE / grid
    for thing in scene.things:
        yield thing, np.hypot(centres[None, :] - thing.x, centres[:, None] - thing.y)
