"""Control tokens in the data are text; rows that a model cannot take are found beforehand."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest
from PIL import Image

import families
import fedvlm
from fedvlm.batches.check import Checker
from fedvlm.batches.prompts import Prompter
from fedvlm.errors import DataError
from fedvlm.models.load import load_model
from fedvlm.rounds.prepare import prepare
from fedvlm.settings.sections import ModelConfig

IMAGE = Image.new("RGB", (32, 32), "red")
FAMILIES = ["tiny", *families.FAMILIES]


def prompter(family, **settings):
    name = family if family == "tiny" else families.folder(family)
    return Prompter(load_model(ModelConfig(name=name, device="cpu")), **settings)


def controls(encoder, ids):
    """How often each control token occurs."""
    texts = encoder.control.texts
    known = dict(zip(encoder.tokenizer.convert_tokens_to_ids(texts), texts, strict=True))
    return Counter(known[i] for i in ids.tolist() if i in known)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_token_in_the_data_is_text(family):
    encoder = prompter(family)
    plain = encoder.encode(IMAGE, "What is it?", ["a thing"])
    for text in encoder.control.texts:
        row = encoder.encode(IMAGE, f"What is {text} in it?", [f"a {text} thing", text])
        assert controls(encoder, row.prompt) == controls(encoder, plain.prompt), text
        for ids in row.answers:
            assert controls(encoder, ids) == controls(encoder, plain.answers[0]), text
        assert all(len(values) == len(row.prompt) for values in row.aligned.values())
        assert row.cut == 0
    decoded = encoder.tokenizer.decode(encoder.answer_ids("What?", "<image>")[:-1])
    assert "".join(decoded.split()).removeprefix("<s>") == "<image>"


def outcome(call, *arguments):
    """The result of a call, or the kind of its error."""
    try:
        return call(*arguments)
    except DataError as error:
        return "refused" if "refuses" in str(error) else "too long"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_quick_check_agrees_with_encoding(family):
    encoder = prompter(family, max_length=40 if family == "blip-2" else None)
    checker = Checker(encoder)
    rows = [("What?", ["red"]), ("Which <image> is it, and why?", ["a\nb", "so long " * 30])]
    alone = (((32, 32),), ((90, 40),), ((3000, 1),), ((1, 1),))
    for sizes in (*alone, ((90, 40), (32, 32))):
        for row in rows:
            wanted = outcome(encoder.encode, [Image.new("RGB", size) for size in sizes], *row)
            found = outcome(checker.cut, sizes, *row)
            assert found == getattr(wanted, "cut", wanted)


def test_the_longest_answer_fits_behind_every_prompt():
    encoder = prompter("git")
    needed = len(encoder.encode(IMAGE, "What?", []).prompt)
    fits = prompter("git", new_tokens=encoder.limit - needed)
    fits.encode(IMAGE, "What?", ["red"])
    tight = prompter("git", new_tokens=encoder.limit - needed + 1)
    with pytest.raises(DataError, match=r"needs \d+ tokens and an answer up to \d+ .* at most"):
        tight.encode(IMAGE, "What?", ["red"])


def test_answers_that_are_cut_are_counted_with_their_rows(rows, tmp_path, caplog):
    lines = rows.read_text().replace('"why ' + "why " * 2999 + '"', '"Why?"').splitlines()
    lines[3] = lines[3].replace('"red"', '"' + "red " * 80 + '"')
    rows.write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        prepare(settings(rows, tmp_path, "data.max_length=80"))
    assert "the answers of 1 of 12 rows are cut" in caplog.text
    assert "row 3" in caplog.text


def test_a_line_break_that_ends_an_answer_is_counted_as_a_cut():
    row = prompter("blip-2").encode(IMAGE, "What?", ["red\nand blue"])
    assert row.cut > 0


@pytest.fixture
def rows(tmp_path):
    """Twelve rows; the model cannot take row 5, whose question is too long."""
    lines = []
    for n in range(12):
        Image.new("RGB", (32, 32), (20 * n, 0, 0)).save(tmp_path / f"{n}.png")
        question = "why " * 3000 if n == 5 else f"What is {n}?"
        lines.append(
            {"image": f"{n}.png", "question": question, "chosen": "red", "site": "ab"[n % 2]}
        )
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def settings(path, tmp_path, *more):
    words = (
        "train.rounds=1",
        "train.local_steps=1",
        "algorithm.name=lora",
        "partition.kind=column",
    )
    words += ("partition.column=site", "partition.min_rows=2", "eval.max_rows=1")
    return fedvlm.load_config(
        None, f"data.path={path}", f"output={tmp_path / 'run'}", *words, *more
    )


@pytest.mark.parametrize("cache", [0, 100])
def test_a_row_that_the_model_cannot_take_is_named_before_anything_is_written(
    rows, tmp_path, cache
):
    with pytest.raises(DataError, match=r"1 of 12 rows that cannot be used: row 5: the prompt"):
        fedvlm.run(settings(rows, tmp_path, f"data.cache={cache}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cache", [0, 100])
def test_such_a_row_is_left_out_on_request(rows, tmp_path, cache, caplog):
    config = settings(rows, tmp_path, f"data.cache={cache}", "data.on_error=skip")
    with caplog.at_level(logging.WARNING):
        results = fedvlm.run(config)
    assert "left out 1 of 12 rows" in caplog.text
    assert "row 5" in caplog.text
    partition = json.loads((results.folder / "partition.json").read_text())
    assert sum(len(c[s]) for c in partition["clients"] for s in ("train", "val", "test")) == 11
