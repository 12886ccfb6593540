"""Scores agree with values worked out by hand, and with the rouge-score library."""

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvlm.metrics import (
    METRICS,
    _words,
    bleu,
    exact_match,
    rouge_l,
    score_texts,
    summarize,
    token_f1,
)
from work import lines


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("It is red.", "It is red.", 1.0),
        ("  It  is\nred. ", "It is red.", 1.0),
        ("it is red.", "It is red.", 0.0),
        ("It is red", "It is red.", 0.0),
        ("", "", 1.0),
        ("", "red", 0.0),
        ("cafe\u0301", "caf\u00e9", 1.0),
    ],
)
def test_exact_match_ignores_only_white_space(prediction, reference, score):
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("It is RED!", "it is red", 1.0),
        ("The red box", "a red box", 1.0),
        ("red box", "red ball", 0.5),
        # shared: it, is, red = 3 of 4 and 3 tokens: 2 * 3 / 7
        ("it is bright red", "it is red", 6 / 7),
        # bags: "red" counts once, 2 * 1 / (3 + 1)
        ("red red red", "red", 0.5),
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("red", "", 0.0),
        ("", "", 1.0),
        ("Rosé, bitte!", "rosé", 2 / 3),
        ("rose", "rosé", 0.0),
        ("GRÖSSER", "grösser", 1.0),
        ("Größer.", "größer", 1.0),
        ("“größer”", "größer", 1.0),
        ("赤い。", "赤い", 1.0),
        ("A", "A", 1.0),
        ("A", "B", 0.0),
        ("a", "the", 0.0),
        ("A", "", 0.0),
    ],
)
def test_f1_matches_hand_computed_values(prediction, reference, score):
    assert token_f1(prediction, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("the red box", "the red box", 1.0),
        # longest common subsequence: the, red = 2; precision 2/3, recall 2/4
        ("the red ball", "the big red box", 4 / 7),
        ("red the", "the red", 0.5),
        ("Größer als rosé", "größer als rosé", 1.0),
        ("ros", "rosé", 0.0),
        ("", "red", 0.0),
        ("red", "", 0.0),
        ("", "", 1.0),
        ("!", "?", 1.0),
    ],
)
def test_rouge_l_matches_hand_computed_values(prediction, reference, score):
    assert rouge_l(prediction, reference) == pytest.approx(score)


ascii_text = st.text(st.sampled_from("aAbB c0,.-_'\n"), max_size=30)


@settings(max_examples=100, deadline=None)
@given(ascii_text, ascii_text)
def test_rouge_l_is_the_librarys_on_ascii(prediction, reference):
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    if prediction.strip(",.-_' \n") or reference.strip(",.-_' \n"):
        assert rouge_l(prediction, reference) == pytest.approx(theirs)


class Words:
    """A tokenizer for rouge-score that gives the same words as ours."""

    def tokenize(self, text):
        return _words(text)


few = st.lists(
    st.sampled_from(["a", "b", "rosé", "größe", "слон", "हिन्दी", "赤", "7"]), max_size=40
)
any_words = st.lists(st.text(max_size=4), max_size=20)


@settings(max_examples=300, deadline=None)
@given(few | any_words, few | any_words)
def test_rouge_l_is_the_librarys_on_the_same_words(prediction, reference):
    from rouge_score.rouge_scorer import RougeScorer

    prediction, reference = " ".join(prediction), " ".join(reference)
    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=Words())
    theirs = scorer.score(reference, prediction)["rougeL"].fmeasure
    empty = not _words(prediction) and not _words(reference)
    assert rouge_l(prediction, reference) == pytest.approx(1.0 if empty else theirs, abs=1e-9)


def test_rouge_l_of_long_texts_fills_no_table_in_python():
    draw = random.Random(0)
    one, other = (" ".join(str(draw.randrange(50)) for _ in range(20_000)) for _ in range(2))
    assert 0.1 < rouge_l(one, other) < 0.9
    lines(rouge_l, one, other, most=500_000)  # the table has 400 million cells


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_scores_are_finite_symmetric_and_between_zero_and_one(one, other):
    (scores,) = score_texts([one], [other])
    shares = [name for name, metric in METRICS.items() if metric.share and name in scores]
    assert all(0.0 <= scores[name] <= 1.0 for name in shares)
    (back,), (same,) = score_texts([other], [one]), score_texts([one], [one])
    for name in ("exact_match", "token_f1", "rouge_l"):
        assert back[name] == pytest.approx(scores[name])
    assert [same[name] for name in shares] == pytest.approx([1.0] * len(shares))


def test_every_pair_gets_every_score_in_order():
    scores = score_texts(["Red.", "blue"], ["Red.", "Red."])
    assert scores == [
        {"exact_match": 1.0, "token_f1": 1.0, "rouge_l": 1.0, "bleu": 1.0, "length": 1.0},
        {"exact_match": 0.0, "token_f1": 0.0, "rouge_l": 0.0, "bleu": 0.0, "length": 1.0},
    ]
    assert score_texts([], []) == []


def test_bleu_is_sacrebleus_of_the_sentence():
    from sacrebleu import sentence_bleu

    ours = bleu("a man rides a brown horse", "The man rides the brown horse on a beach.")
    theirs = sentence_bleu(
        "a man rides a brown horse", ["The man rides the brown horse on a beach."]
    )
    assert 0.05 < ours < 0.5
    assert ours == pytest.approx(theirs.score / 100)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        score_texts(["a"], ["a", "b"])


def test_the_summary_weighs_clients_equally():
    summary = summarize({"a": 0.0, "b": 0.5, "c": 1.0, "d": 0.5})
    assert summary == {"mean": 0.5, "std": pytest.approx(np.sqrt(0.125)), "worst10": 0.0}
    assert summarize({"a": 0.3}) == {"mean": 0.3, "std": 0.0, "worst10": 0.3}


def test_worst10_is_the_mean_of_the_worst_tenth():
    twenty = {f"client-{i}": i / 20 for i in range(20)}
    assert summarize(twenty)["worst10"] == pytest.approx((0 + 1) / 2 / 20)
    assert summarize(twenty, "lower")["worst10"] == pytest.approx(18.5 / 20)


def test_where_nothing_is_better_there_is_no_worst_tenth():
    assert summarize({"a": 1.0, "b": 3.0}, None) == {"mean": 2.0, "std": 1.0}


def test_no_clients_is_an_error():
    with pytest.raises(ValueError, match="no clients"):
        summarize({})


def test_the_import_does_not_wait_for_sacrebleu():
    code = "import sys, fedvlm.metrics; print('sacrebleu' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
