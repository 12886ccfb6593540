"""The functions of vqa_rad.yaml: the prompt of the training, and the scores of fedvlm."""

from __future__ import annotations

from typing import Any

from fedvlm.metrics import exact_match, token_f1


def pictures(row: dict[str, Any]) -> list[Any]:
    """The pictures of a row."""
    return [row["image"].convert("RGB")]


def question(row: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The question as it was trained, without a request for short answers."""
    return row["question"]


def scores(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The scores of an answer."""
    answer = results[0]
    return {
        "exact_match": exact_match(answer, row["answer"]),
        "token_f1": token_f1(answer, row["answer"]),
    }
