"""Attack on pictures: search pixels, or image features, whose gradient matches the upload.

Gradient matching after DLG (Zhu et al., arXiv 1906.08935) and Geiping et al. (arXiv 2003.14053):
maximize the cosine of the imagined gradient and the observed change, and prefer smooth pictures.
The server knows the texts of the rows here: the worst case for the site. The search begins with
coarse pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from _inversion.simulate import Simulator, likeness
from fedvlm.tree import Tree

SMOOTH = 0.8  # weight of the total variation
RATE = 0.05  # of the search, in units of half the range of a pixel
COARSE = 4  # factor of the first search


def stacked(goals: Sequence[Tree]) -> Tree:
    """The changes of some sites as one tree ``[sites, ...]``."""
    return {n: torch.stack([goal[n] for goal in goals]) for n in goals[0]}


def pixels(
    simulator: Simulator,
    begin: Tree,
    rows: Sequence[int],
    goal: Mapping[str, Tensor],
    start: Tensor,
    steps: tuple[int, int],
    noisy: bool = False,
) -> Tensor:
    """Searches the pictures of some sites' rows; returns them ``[rows, 3, side, side]``.

    Args:
        simulator: computes gradients.
        begin: the model at the start of the round, as the server knows it.
        rows: the rows of all sites, equally many of each. Only their texts are used.
        goal: the changes downhill of the sites ``[sites, ...]``.
        start: a picture ``[3, side, side]``.
        steps: steps of the search with coarse and with fine pixels.
        noisy: see :func:`_inversion.simulate.likeness`. Under noise all factors are compared.
            Otherwise those of the image side are: this gives clearer pictures.
    """
    goal = {n: t for n, t in goal.items() if noisy or "text_model" not in n}
    side = start.shape[-1]
    names, sites = list(goal), len(next(iter(goal.values())))
    texts = simulator.batch(rows)
    guess = start.expand(len(rows), -1, -1, -1)
    for size, count in zip((side // COARSE, side), steps, strict=True):
        guess = F.interpolate(guess, size=(size, size), mode="bilinear").detach().requires_grad_()
        search = torch.optim.Adam([guess], lr=RATE, betas=(0.9, 0.99))
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(search, max(1, count))
        for _ in range(count):
            shown = F.interpolate(guess, size=(side, side), mode="bilinear")
            batch = {**texts, "pixel_values": shown[:, None]}
            found = simulator.gradients(begin, batch, sites, names, graph=True)
            far = (1 - likeness(found, goal, noisy)).sum() + SMOOTH * roughness(shown).sum()
            search.zero_grad()
            far.backward()
            search.step()
            slower.step()
            with torch.no_grad():
                guess.clamp_(-1, 1)
    return guess.detach()


def features(
    simulator: Simulator,
    begin: Tree,
    rows: Sequence[int],
    goal: Mapping[str, Tensor],
    start: Tensor,
    steps: int,
    noisy: bool = False,
) -> Tensor:
    """Searches the image features of rows, one of each site ``[rows, image tokens, width]``.

    The arguments are those of :func:`pixels`; ``start`` are features ``[image tokens, width]``. The
    search uses the factors of the language model, which reads the features.
    """
    goal = {n: t for n, t in goal.items() if "text_model" in n}
    texts = {k: v for k, v in simulator.batch(rows).items() if not k.startswith("pixel")}
    guess = start.repeat(len(rows), 1, 1).requires_grad_()
    search = torch.optim.Adam([guess], lr=0.1 * float(start.std()))
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(search, max(1, steps))
    for _ in range(steps):
        given = {"image": SimpleNamespace(pooler_output=list(guess))}
        batch = {**texts, "mm_encoder_outputs": given}
        found = simulator.gradients(begin, batch, len(rows), list(goal), graph=True)
        search.zero_grad()
        (1 - likeness(found, goal, noisy)).sum().backward()
        search.step()
        slower.step()
    return guess.detach()


def roughness(pictures: Tensor) -> Tensor:
    """The mean step between neighbouring pixels (total variation) ``[pictures]``."""
    padded = F.pad(pictures, (0, 1, 0, 1), mode="replicate")
    across = padded[..., :-1, 1:] - pictures
    down = padded[..., 1:, :-1] - pictures
    return (across.square() + down.square() + 1e-4).sum(1).sqrt().mean((1, 2))


def psnr(found: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB ``[pictures]``; pixels are in -1 to 1."""
    return -10 * ((found - true) / 2).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(found: Tensor, true: Tensor, window: int = 7) -> Tensor:
    """Structural similarity (Wang et al. 2004) ``[pictures]``, with square windows."""

    def local(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    x, y = (found + 1) / 2, (true + 1) / 2
    mx, my = local(x), local(y)
    vx, vy, both = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return score.flatten(1).mean(1)


def ranks(found: Tensor, true: Tensor, wrong: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """The place of each true one among wrong ones, by likeness to what was found.

    Args:
        found: pictures or features ``[n, ...]``.
        true: the same number of true ones.
        wrong: other ones ``[m, ...]``.

    Returns:
        The ranks, from 1; the cosine with the true one; the mean cosine with wrong ones. The mean
        of the wrong ones is subtracted first.
    """
    middle = wrong.flatten(1).mean(0)
    ours, right, others = (F.normalize(x.flatten(1) - middle, dim=1) for x in (found, true, wrong))
    near = (ours * right).sum(1)
    far = ours @ others.T  # [n, m]
    return [1 + int(k) for k in (far > near[:, None]).sum(1)], near, far.mean(1)
