"""The attacks of benchmarks/inversion.py succeed without protection, and fail under noise.

The first half is the control: an attack that never succeeds would show nothing about the noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from _inversion import pictures, words
from _inversion.lab import Lab
from _inversion.lineup import Lineup
from _inversion.simulate import downhill
from _inversion.uploads import Case, Source
from fedvlm.tree import factor

LOUD = 1.77  # noise over the clipping norm: about epsilon 3 for 500 rows, 32 a step, 400 steps


@pytest.fixture(scope="module")
def lab():
    """Four sites with a row each."""
    return Lab(Source(rows=4, others=120))


def test_texts_are_read_from_an_adapter_of_high_rank(lab):
    found = words.mean([lab.words.attack(one, "text") for one in lab.uploads(Case(rank=64))])
    assert found["recall"] > 0.9
    assert found["precision"] > 0.9


def test_texts_are_not_read_under_noise(lab):
    uploads = lab.uploads(Case(rank=64, noise=LOUD))
    found = words.mean([lab.words.attack(one, "text") for one in uploads])
    assert found["recall"] == 0
    assert found["best"] < found["frequent"]


def test_questions_do_not_fit_an_adapter_of_low_rank_but_answers_do(lab):
    uploads = lab.uploads(Case("plora"))
    text, answer = (
        words.mean([lab.words.attack(one, part) for one in uploads]) for part in ("text", "answer")
    )
    assert text["recall"] == 0
    assert answer["best"] > 2 * answer["frequent"]


def test_pictures_are_picked_out_of_a_line_up_without_noise_only(lab):
    cases = [Case("plora"), Case("plora", noise=0.0), Case("plora", noise=20.0)]
    uploads = [lab.uploads(case) for case in cases]
    begin = uploads[0][0].begin
    names = [n for n in begin if factor(n) == "B"]
    candidates = Lineup(lab.simulator, begin, names, lab.known[:30], lab.rows)
    places = [
        candidates.ranks(
            row, "picture", [downhill(sites[k].moved) for sites in uploads], [False, False, True]
        )
        for k, row in enumerate(lab.rows)
    ]
    plain, clipped, noisy = zip(*places, strict=True)
    assert plain == clipped == (1, 1, 1, 1)
    assert sum(noisy) / len(noisy) > 5  # a guess has 15 on average


def test_image_features_are_found_without_noise_only(lab):
    simulator = lab.simulator
    true, wrong = (simulator.features(simulator.pictures(r)) for r in (lab.rows, lab.known[:99]))

    def places(case: Case) -> list[int]:
        sites = lab.uploads(case)
        goal = pictures.stacked([downhill(site.moved) for site in sites])
        found = pictures.features(
            simulator, sites[0].begin, lab.rows, goal, wrong.mean(0), 15, bool(case.noise)
        )
        return pictures.ranks(found, true, wrong)[0]

    assert max(places(Case("plora"))) <= 5  # of 100
    assert sum(places(Case("plora", noise=LOUD))) / len(lab.rows) > 15


def test_a_site_without_protection_sends_what_a_step_of_the_simulation_gives(lab):
    site = lab.uploads(Case("plora"))[0]
    goal = downhill(site.moved)
    found = lab.simulator.of_rows(site.begin, [int(site.rows[0])], list(goal))
    ours = torch.cat([found[n][0].flatten() for n in goal])
    theirs = torch.cat([goal[n].flatten() for n in goal])
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9999
