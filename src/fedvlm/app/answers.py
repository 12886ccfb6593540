"""Answers of several models as HTML. All texts of data and models are shown as written."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence

from fedvlm.after.asked import Replies, Reply
from fedvlm.errors import FedVLMError
from fedvlm.metrics import score_texts

CONFIDENCE = (
    "Confidence: the geometric mean of the probabilities that a model gave to the tokens of its "
    "answer. It is not the probability that the answer is right."
)
ANSWER = ("model", "answer", "confidence")  # columns of a file
_SIGNS = {ord(c): f"&#{ord(c)};" for c in "${}`\\"}  # the page's templates would read them


def text(given: str) -> str:
    """A text in HTML, as written."""
    return f"<bdi>{html.escape(given).translate(_SIGNS)}</bdi>"


def note(words: str) -> str:
    """A remark to the person at the page."""
    return f'<p class="note">{text(words)}</p>'


def problem(error: FedVLMError | str) -> str:
    """A mistake in the input, and what to do."""
    return f'<p class="problem" role="alert"><b>Not possible:</b> {text(str(error))}</p>'


def marks(answers: Sequence[str]) -> list[str]:
    """A letter for each answer; equal answers have equal letters, and A is the most frequent.

    Without different answers, there are no letters: all are empty.
    """
    kinds = [answer for answer, _ in Counter(answers).most_common()]
    if len(kinds) < 2:
        return [""] * len(answers)
    letters = {a: chr(65 + n) if n < 26 else str(n + 1) for n, a in enumerate(kinds)}
    return [letters[answer] for answer in answers]


def answers(replies: Replies, reference: str | None = None, alone: bool = False) -> str:
    """The answers to one question, one model a row.

    Args:
        replies: the answers.
        reference: the answer in the data, if the question is a row of the data.
        alone: whether the models answered one after another.
    """
    said = [reply.answer for reply in replies.replies]
    how = "one model after another" if alone else "all models together"
    rows = "".join(
        f'<tr><th scope="row">{text(one.model)}</th><td>{_answer(one, mark, reference)}</td>'
        f"<td>{_confidence(one.confidence)}</td></tr>"
        for one, mark in zip(replies.replies, marks(said), strict=True)
    )
    given = "" if reference is None else f"<p>Answer in the data: <b>{text(reference)}</b></p>"
    return (
        f'<section class="answers" aria-live="polite"><p><b>{_agreement(said)}</b> '
        f"{replies.seconds:.2f} s, {how}.</p>{given}<table><thead><tr><th>Model</th>"
        f"<th>Answer</th><th>Confidence</th></tr></thead><tbody>{rows}</tbody></table>"
        f"{note(CONFIDENCE)}</section>"
    )


def batch(found: Mapping[str, Replies | FedVLMError], models: Sequence[str]) -> str:
    """The answers to one question about several pictures, one picture a row."""
    heads = "".join(f'<th scope="col">{text(model)}</th>' for model in models)
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th>{_cells(one, len(models))}</tr>'
        for name, one in found.items()
    )
    done = [one for one in found.values() if isinstance(one, Replies)]
    seconds = sum(one.seconds for one in done)
    return (
        f'<section class="answers" aria-live="polite"><p><b>{len(done)} of {len(found)} pictures '
        f'answered.</b> {seconds:.2f} s.</p><div class="wide" tabindex="0"><table><thead><tr>'
        f"<th>Picture</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"{note(CONFIDENCE)}</section>"
    )


def table(
    found: Mapping[str, Replies | FedVLMError], question: str
) -> list[dict[str, str | float | None]]:
    """The same as rows of a file: one for each picture and model, or with the problem."""
    rows: list[dict[str, str | float | None]] = []
    for name, one in found.items():
        asked = {"picture": name, "question": question}
        if isinstance(one, FedVLMError):
            rows.append({**asked, **dict.fromkeys(ANSWER), "problem": str(one)})
            continue
        rows += [
            {
                **asked,
                "model": reply.model,
                "answer": reply.answer,
                "confidence": round(reply.confidence, 6),
                "problem": None,
            }
            for reply in one.replies
        ]
    return rows


def _agreement(said: Sequence[str]) -> str:
    kinds, models = len(set(said)), len(said)
    if models == 1:
        return "1 model answered."
    if kinds == 1:
        return f"All {models} models give the same answer."
    return f"{kinds} different answers from {models} models; equal answers have the same letter."


def _cells(one: Replies | FedVLMError, models: int) -> str:
    if isinstance(one, FedVLMError):
        return f'<td colspan="{models}"><b>Not possible:</b> {text(str(one))}</td>'
    letters = marks([reply.answer for reply in one.replies])
    return "".join(
        f"<td>{_answer(reply, mark)} <small>{percent(reply.confidence)}</small></td>"
        for reply, mark in zip(one.replies, letters, strict=True)
    )


def _answer(reply: Reply, mark: str, reference: str | None = None) -> str:
    badge = f'<span class="mark mark-{mark}">{mark}</span> ' if mark else ""
    said = text(reply.answer) if reply.answer else "<i>an empty answer</i>"
    right = ""
    if reference is not None and score_texts([reply.answer], [reference])[0]["exact_match"] == 1:
        right = ' <span class="right">✓ as in the data</span>'
    return f'{badge}<span class="said">{said}</span>{right}'


def _confidence(value: float) -> str:
    width = max(0.0, min(1.0, value)) * 100
    return f'{percent(value)}<span class="bar"><span style="width:{width:.0f}%"></span></span>'


def percent(value: float) -> str:
    """A share in percent; what rounds to 100 and is less stays below."""
    return "> 99 %" if 0.995 <= value < 1 else f"{100 * value:.0f} %"
