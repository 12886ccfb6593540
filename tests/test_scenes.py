"""The bundled data set: equal seeds give equal bytes, and sites differ as their style says."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from fedvlm.data import compose, questions, render, sites, words
from fedvlm.data.scenes import generic, scenes

COLUMNS = [
    "ds_name",
    "image",
    "question",
    "chosen",
    "rejected",
    "origin_dataset",
    "origin_split",
    "idx",
    "image_path",
    "site",
]
DIGEST = """
import hashlib, sys
from fedvlm.data.scenes import scenes
table = scenes(sites=3, rows=6, seed=5).data.table
print(hashlib.sha256(repr(table.to_pylist()).encode()).hexdigest(), "torch" in sys.modules)
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDVLM_CACHE", str(folder))
        yield folder


def rows(data) -> list[dict]:
    """The rows as stored, pictures as bytes."""
    return data.data.table.to_pylist()


def pictures(data) -> list[bytes]:
    return [row["image"]["bytes"] for row in rows(data)]


def test_another_process_makes_the_same_bytes_without_importing_torch(tmp_path):
    here = hashlib.sha256(repr(rows(scenes(sites=3, rows=6, seed=5))).encode()).hexdigest()
    env = os.environ | {"FEDVLM_CACHE": str(tmp_path), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", DIGEST]
    there = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert there.stdout.split() == [here, "False"]


def test_another_seed_makes_other_rows():
    assert rows(scenes(sites=2, rows=4, seed=1)) != rows(scenes(sites=2, rows=4, seed=2))


def test_rows_have_the_columns_of_rlaif_v_and_the_site():
    data = scenes(sites=2, rows=5, style="iid")
    assert data.column_names == COLUMNS
    assert data[0]["image"].size == (64, 64)
    assert data[0]["image"].mode == "RGB"
    assert all(json.loads(row["origin_split"])["type"] for row in data)
    assert data[0]["origin_dataset"].startswith("scenes/")
    assert data["site"] == ["site-0"] * 5 + ["site-1"] * 5


def test_the_second_call_reads_the_cache_and_no_draft_is_left(cache, monkeypatch):
    first = rows(scenes(sites=1, rows=7, seed=3))
    monkeypatch.setattr("fedvlm.data.scenes.site_row", None)
    assert rows(scenes(sites=1, rows=7, seed=3)) == first
    assert not list(cache.glob(".*draft"))


@pytest.mark.parametrize("style", sites.STYLES)
def test_at_strength_zero_every_style_is_iid(style):
    plain = rows(scenes(sites=3, rows=5, style="iid", seed=2))
    assert rows(scenes(sites=3, rows=5, style=style, strength=0.0, seed=2)) == plain


def test_right_and_wrong_answers_differ_in_every_style():
    for style in sites.STYLES:
        for row in rows(scenes(sites=4, rows=30, style=style)):
            assert row["chosen"] != row["rejected"], row["question"]


def test_cameras_change_pictures_and_nothing_else():
    plain, shot = (scenes(sites=4, rows=10, style=s) for s in ("iid", "covariate"))
    assert plain["question"] == shot["question"]
    assert plain["chosen"] == shot["chosen"]
    assert all(a != b for a, b in zip(pictures(plain), pictures(shot), strict=True))
    assert len({sites.make_camera(k, 1.0, 0) for k in range(24)}) == 24


def test_a_weak_camera_changes_less_than_a_strong_one():
    def change(strength: float) -> float:
        pair = (scenes(sites=8, rows=4, style=s, strength=strength) for s in ("iid", "covariate"))
        a, b = ([np.asarray(image, float) for image in data["image"]] for data in pair)
        return float(np.mean([np.abs(x - y).mean() for x, y in zip(a, b, strict=True)]))

    assert 0 < change(0.2) < change(0.6) < change(1.0)


def test_conventions_change_answers_and_nothing_else():
    plain, local = (scenes(sites=8, rows=20, style=s) for s in ("iid", "concept"))
    assert plain["question"] == local["question"]
    assert pictures(plain) == pictures(local)
    changed = [
        a != b for a, b in zip(plain["chosen"], local["chosen"], strict=True)
    ]  # site-0 uses plain English, so 20 of 160 answers stay
    assert 0.7 < np.mean(changed) < 0.95


def test_one_site_is_odd():
    found = sites.make_sites(4, 10, "odd", 1.0, 0)
    item = questions.Item("colour", "?", ("red",), ("blue",), "red", "blue")
    assert [site.wording.answers(item)[0] for site in found] == ["rot", "rot", "rot", "red"]
    data = scenes(sites=2, rows=30, style="odd")
    kinds = {origin.partition("/")[2] for origin in data["origin_dataset"]}
    assert kinds <= questions.GENERIC.keys(), "the model knows what is asked"


def test_one_question_has_other_right_answers_at_other_sites():
    item = questions.Item("colour", "?", ("red",), ("blue",), "red", "blue")
    answers = [sites.make_wording(k, 1.0, 0).answers(item)[0] for k in range(8)]
    assert len(set(answers)) == 8
    assert answers[:3] == ["red", "Es ist rot.", "ROUGE"]


def test_strength_is_the_share_of_words_that_follow_the_convention():
    for strength in (0.25, 0.5, 0.75):
        local = [
            sites.make_wording(k, strength, 0).word(word) != word
            for k in range(1, 40)
            for word in words.ENGLISH
            if sites.make_wording(k, 1.0, 0).word(word) != word
        ]
        assert np.mean(local) == pytest.approx(strength, abs=0.05)


def test_label_skew_makes_few_answers_common_at_a_site():
    def top_share(style: str) -> float:
        shares = []
        data = rows(scenes(sites=6, rows=150, style=style))
        for site in {row["site"] for row in data}:
            told = [row["chosen"] for row in data if row["site"] == site]
            digits = collections.Counter(t for t in told if t in questions.NUMBERS)
            shares.append(max(digits.values()) / sum(digits.values()))
        return float(np.mean(shares))

    assert top_share("label") > 1.4 * top_share("iid")


def test_label_skew_leaves_the_share_of_yes_and_no_alone():
    def share(style: str) -> float:
        return float(np.mean([a in ("yes", "no") for a in scenes(rows=60, style=style)["chosen"]]))

    assert share("label") == pytest.approx(share("iid"), abs=0.04)


@pytest.mark.parametrize("style", ["quantity", "mixed"])
def test_quantity_skew_keeps_the_total_and_every_site(style):
    data = scenes(sites=5, rows=20, style=style)
    counts = collections.Counter(data["site"])
    assert data.num_rows == 100
    assert len(counts) == 5
    assert max(counts.values()) > min(counts.values())


@pytest.mark.parametrize(("count", "mean"), [(1, 1), (1, 9), (40, 1), (7, 3)])
def test_any_number_of_sites_works(count, mean):
    assert sum(sites.row_counts(count, mean, 1.5, 0)) == count * mean
    assert min(sites.row_counts(count, mean, 1.5, 0)) >= 1
    assert scenes(sites=count, rows=mean).num_rows == count * mean


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sites": 0}, "sites is 0; it must be a whole number of at least 1"),
        ({"rows": 2.5}, "rows is 2.5; it must be a whole number"),
        ({"style": "strange"}, "style is 'strange'; it must be one of iid, label"),
        ({"strength": 1.5}, "strength is 1.5; it must be a number from 0 to 1"),
        ({"strength": "full"}, "strength is 'full'; it must be a number"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_bad_argument_is_refused_with_what_is_allowed(arguments, said):
    with pytest.raises(ValueError, match=said):
        scenes(**arguments)


def test_generic_rows_are_of_the_kinds_asked_for():
    data = generic(40, seed=1, kinds=("count", "colour"))
    assert set(data["origin_dataset"]) == {"scenes/count", "scenes/colour"}
    with pytest.raises(ValueError, match="it must name some of name, colour"):
        generic(3, kinds=("texture",))
    with pytest.raises(ValueError, match="count is 0"):
        generic(0)


def test_answers_follow_from_the_scene():
    rng = random.Random(0)
    for _ in range(300):
        scene = compose.generic_scene(rng)
        told = {kind: questions.ask(rng, kind, scene) for kind in ("count", "colour", "position")}
        assert questions.NUMBERS.index(told["count"].words[0]) <= len(scene.things)
        assert told["colour"].words[0] in {thing.colour for thing in scene.things}
        places = {render.PLACES[thing.cell] for thing in scene.things}
        assert " ".join(told["position"].words) in places


def test_yes_and_no_are_about_equally_often_right():
    rng = random.Random(0)
    for kind in ("yesno", "texture", "digit"):
        found = collections.Counter()
        for _ in range(2500):
            novel = kind in questions.NOVEL
            scene = compose.novel_scene(rng, kind) if novel else compose.generic_scene(rng)
            item = questions.ask(rng, kind, scene)
            found[item.words[0] if item else None] += 1
        assert found["yes"] / (found["yes"] + found["no"]) == pytest.approx(0.5, abs=0.07), kind


def test_a_question_for_a_sentence_gets_one():
    data = [row for row in rows(generic(150, seed=2)) if questions.SENTENCE in row["question"]]
    assert data
    assert all(row["chosen"].endswith(".") and " " in row["chosen"] for row in data)


@pytest.mark.parametrize("shape", render.SHAPES + render.NEW_SHAPES)
def test_every_shape_shows_its_colour_on_the_ground(shape):
    thing = render.Thing(shape, "red", "large", 0, 32.0, 32.0, 12.0)
    pixels = np.asarray(render.render(render.Scene((thing,), (10, 10, 10)))).astype(int)
    inked = (np.abs(pixels - (225, 38, 38)).sum(-1) < 10).sum()
    assert 60 < inked < 500
    assert (pixels[0] == 10).all()


def test_textures_and_shapes_all_look_different():
    made = set()
    for shape in ("circle", "square"):
        for texture in ("plain", *render.TEXTURES):
            thing = render.Thing(shape, "red", "large", 0, 32.0, 32.0, 12.0, texture)
            made.add(render.render(render.Scene((thing,), (10, 10, 10))).tobytes())
    assert len(made) == 2 * (1 + len(render.TEXTURES))


def test_digits_are_real_handwriting():
    samples = render.handwriting()
    assert sum(map(len, samples)) == 1797
    ink = render.Thing("digit", "white", "large", 0, 32.0, 32.0, 24.0)
    scene = render.Scene((ink,), (0, 0, 0), (3, 5))
    shown = np.asarray(render.render(scene).convert("L").crop((8, 8, 56, 56)).reduce(6), float)
    assert np.corrcoef(shown.ravel(), samples[3][5].astype(float).ravel())[0, 1] > 0.9


def sklearns() -> tuple[np.ndarray, ...]:
    """The digits of scikit-learn, the source of the asset."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, values = load_digits(return_X_y=True)
    ink = np.clip(images.reshape(-1, 8, 8) * 16, 0, 255).astype(np.uint8)
    return tuple(ink[values == value] for value in range(10))


def test_digits_are_the_published_ones():
    digest = hashlib.sha256(b"".join(a.tobytes() for a in render.handwriting())).hexdigest()
    assert digest == "e4179b4d74c435984b61ca151a0de4631cdbab8ed1d53531f9ba25e869fd6072"
    for ours, theirs in zip(render.handwriting(), sklearns(), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def test_scenes_have_the_bytes_that_scikit_learns_digits_give(tmp_path, monkeypatch):
    ours = rows(scenes(sites=3, rows=40, seed=11))
    assert any("digit" in row["question"] for row in ours)
    digits = sklearns()
    monkeypatch.setattr(render, "handwriting", lambda: digits)
    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path))
    assert rows(scenes(sites=3, rows=40, seed=11)) == ours


def test_every_language_has_every_word_and_a_sentence():
    assert set(words.CARRIERS) == {"english", *words.LANGUAGES}
    assert all(set(table) == set(words.ENGLISH) for table in words.LANGUAGES.values())
    known = {*questions.NUMBERS, *render.SHAPES, *render.NEW_SHAPES, *render.TEXTURES}
    known |= {*render.COLOURS, *render.NEW_COLOURS, *render.RADII, "yes", "no"}
    known |= {word for place in render.PLACES for word in place.split()}
    assert known == set(words.ENGLISH)
