"""Scores of generated text, and their mean and spread over the clients."""

from __future__ import annotations

import math
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

_ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True)
class Metric:
    """How a score is shown.

    Attributes:
        head: name in tables and figures.
        better: whether higher or lower values are better; None if neither is.
        share: the score is a share in [0, 1], shown in per cent.
        signed: the score may be below 0.
    """

    head: str
    better: Literal["higher", "lower"] | None = "higher"
    share: bool = True
    signed: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value that the score can have."""
        return -math.inf if self.signed else 0.0, 1.0 if self.share else math.inf


METRICS = {
    "exact_match": Metric("exact match"),
    "token_f1": Metric("token F1"),
    "rouge_l": Metric("ROUGE-L"),
    "bleu": Metric("BLEU"),
    "length": Metric("words", better=None, share=False),
    "reward_accuracy": Metric("reward accuracy"),
    "reward_margin": Metric("reward margin", share=False, signed=True),
    "loss": Metric("loss", better="lower", share=False),
}
"""All scores, in the order of the tables. The objective of a run decides which of them it has.

:func:`admit` adds the scores of a program.
"""

BUILT_IN = tuple(METRICS)
CHOICES = tuple(n for n in BUILT_IN if METRICS[n].share)
"""The scores that may be the main one, besides those of a program."""
NAME = r"[a-z][a-z0-9_]{0,39}(?<!_low)(?<!_high)"
"""The form of the names of a program's scores. ``X_low`` is an end of the interval of ``X``."""
TAKEN = frozenset(BUILT_IN) | {
    *("row", "group", "question", "reference", "prediction", "weight", "examples"),
    *("client", "model", "data", "site"),
}
"""Names that no score of a program may have: they name other values in the same tables."""


def admit(names: Iterable[str]) -> None:
    """Makes the scores of a program known, which are shares; a run's settings name them.

    Every reader of settings and results calls this, so that other programs show these scores too.
    """
    for name in names:
        METRICS.setdefault(name, Metric(name.replace("_", " ")))


def measured(objective: str) -> set[str]:
    """The names of a run's scores, for an objective (``sft`` or ``dpo``)."""
    return {n for n in BUILT_IN if objective == "dpo" or not n.startswith("reward_")}


def rounded(value: float, step: float) -> float:
    """The multiple of ``step`` that is nearest to a value; the value itself where ``step`` is 0."""
    if not step or not math.isfinite(value / step):
        return value
    return round(step * round(value / step), 12)


def score_texts(predictions: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """Scores every prediction against its reference; all but ``length`` are between 0 and 1.

    * ``exact_match``: the texts are equal, case and punctuation included, after white space is
      stripped and collapsed. Case and punctuation count because sites differ in them.
    * ``token_f1``: overlap of tokens that are normalised as in SQuAD (Rajpurkar et al., arXiv
      1606.05250): lower case, no punctuation of any script, and no English articles unless nothing
      else is left.
    * ``rouge_l``: F-measure of the longest common subsequence of words (Lin 2004), as the
      ``rouge-score`` library computes it without stemming. Words are runs of letters and digits of
      any script; the library's own tokenizer drops letters such as é.
    * ``bleu``: BLEU of the single answer (Papineni et al. 2002), by the ``sacrebleu`` library with
      its tokenizer ``13a``, over the n-grams that a short answer has (``effective_order``).
    * ``length``: number of words in the prediction.

    Texts are compared in Unicode normal form C. In ``token_f1``, ``rouge_l`` and ``bleu``, two
    texts without tokens score 1, and a text without tokens scores 0 against a text with tokens.

    Returns:
        One ``{"exact_match", "token_f1", "rouge_l", "bleu", "length"}`` for each pair, in order.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"one prediction for each reference: got {len(predictions)} predictions and "
            f"{len(references)} references"
        )
    return [
        {
            "exact_match": exact_match(prediction, reference),
            "token_f1": token_f1(prediction, reference),
            "rouge_l": rouge_l(prediction, reference),
            "bleu": bleu(prediction, reference),
            "length": float(len(_words(prediction))),
        }
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if the texts are equal up to white space, else 0.0."""
    return float(_collapse(prediction) == _collapse(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the two bags of normalised tokens, as in SQuAD."""
    ours, theirs = _tokens(prediction), _tokens(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * shared / (len(ours) + len(theirs))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of ROUGE-L."""
    ours, theirs = _words(prediction), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = _longest_common(ours, theirs)
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence of words.

    The usual table is computed one row at a time (Hyyrö 2004, "Bit-parallel LCS-length computation
    revisited"). A row is an integer. Its bit ``i`` is 0 where the entries ``i`` and ``i + 1`` of
    the row differ, which is by 1.
    """
    places: dict[str, int] = {}  # word -> the bits of its positions in `one`
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    row = full = (1 << len(one)) - 1
    for word in other:
        found = row & places.get(word, 0)
        row = (row + found | row - found) & full
    return len(one) - row.bit_count()


def bleu(prediction: str, reference: str) -> float:
    """Sentence BLEU, between 0 and 1."""
    if not _words(prediction) or not _words(reference):
        return float(_words(prediction) == _words(reference))
    prediction, reference = (unicodedata.normalize("NFC", t) for t in (prediction, reference))
    return min(1.0, _bleu().sentence_score(prediction, [reference]).score / 100)


def average(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean scores of some answers. Losses are weighted by ``weight``, as in training.

    Args:
        answers: one or more answers from an engine. Each has scores under the names of ``METRICS``,
            and ``weight``.

    Returns:
        The means, and ``examples``, the number of answers.
    """
    names = [name for name in METRICS if name in answers[0] and name != "loss"]
    means = {name: sum(a[name] for a in answers) / len(answers) for name in names}
    weight = sum(a["weight"] for a in answers)
    loss = sum(a["loss"] * a["weight"] for a in answers) / weight
    return {**means, "loss": loss, "examples": len(answers)}


def summarize(
    values: Mapping[str, float], better: Literal["higher", "lower"] | None = "higher"
) -> dict[str, float]:
    """Mean and spread of one score over the clients.

    Args:
        values: client -> its score.
        better: ``lower`` for losses, where the worst clients have the highest values; None if no
            value is better than another.

    Returns:
        ``mean`` (every client has the same weight), ``std`` (of the population) and, unless
        ``better`` is None, ``worst10``. This is the mean of the worst tenth of the clients; their
        number is rounded down, to at least one.
    """
    import numpy as np  # 90 ms, which a look at the settings does without

    if not values:
        raise ValueError("there are no clients to summarize")
    scores = np.fromiter((float(v) for v in values.values()), dtype=np.float64, count=len(values))
    summary = {"mean": float(scores.mean()), "std": float(scores.std())}
    if better is not None:
        sign = 1.0 if better == "higher" else -1.0
        worst_first = np.sort(sign * scores)
        summary["worst10"] = sign * float(worst_first[: max(1, len(scores) // 10)].mean())
    return summary


def _collapse(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _tokens(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", text).lower()
    tokens = "".join(c for c in text if not _is_punctuation(c)).split()
    return [t for t in tokens if t not in _ARTICLES] or tokens


@cache
def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", text).lower()
    return "".join(c if _is_word(c) else " " for c in text).split()


@cache
def _is_word(char: str) -> bool:
    """Whether a character is a letter, a digit, or a mark on a letter as in Devanagari."""
    return char.isalnum() or unicodedata.category(char).startswith("M")


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean over seeds; NaN for fewer than two seeds."""
    n = len(values)
    if n < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def number(metric: str, value: float | None) -> str:
    """Formats a score for tables; None becomes an empty text."""
    if value is None:
        return ""
    if METRICS[metric].share:
        return _percent(value)
    return f"{value:.1f}" if metric == "length" else f"{value:.3f}"


def size(count: float) -> str:
    """Bytes in a fitting unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
