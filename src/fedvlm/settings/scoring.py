"""The section ``eval``: when clients are scored, on which rows, and by which metrics."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from fedvlm.errors import shown
from fedvlm.metrics import CHOICES, NAME, TAKEN
from fedvlm.settings.method import Positive, Section, Whole


def _own(name: str) -> str:
    if name in TAKEN or not re.fullmatch(NAME, name):
        raise ValueError(
            "a name has small letters, digits and _, at most 40, and is of no other column"
        )
    return name


Own = Annotated[str, AfterValidator(_own)]
"""The name of a program's own metric."""


class EvalConfig(Section):
    """When and how clients are scored."""

    every: Whole = Field(10, description="rounds between evaluations; 0: only at the end")
    clients: Positive | None = Field(
        None, description="most clients to score, the same clients every time; empty: all"
    )
    batch_size: Positive = Field(64, description="rows in a batch of the scoring")
    max_rows: Positive | None = Field(200, description="most held-out rows a client; empty: all")
    max_new_tokens: Positive = Field(24, description="most tokens of an answer of the model")
    split: Literal["test", "val"] = Field("test", description="val: to choose settings")
    metric: str | None = Field(
        None,
        description="main metric: exact_match, token_f1, rouge_l, bleu, reward_accuracy, or a name "
        "in own; empty: exact_match for sft, reward_accuracy for dpo",
    )
    own: tuple[Own, ...] = Field(
        (),
        max_length=16,
        description="names of a Python program's own metrics; fedvlm.run(metrics=...) sets it",
    )
    global_before: bool = Field(
        True, description="score the global model of the round before too, for the tables"
    )
    personal_before: bool = Field(
        True, description="score the personal models before the aggregation too, for the tables"
    )
    group_by: str = Field(
        "origin_dataset",
        description="column for tables of scores by its values, such as closed and open questions, "
        "over all rows and by client, where it exists",
    )

    @model_validator(mode="after")
    def _main_metric_is_known(self) -> EvalConfig:
        known = [*CHOICES, *self.own]
        if self.metric is not None and self.metric not in known:
            raise ValueError(
                f"metric={shown(self.metric)} is unknown; there are {', '.join(known)}. A Python "
                'program adds its own: fedvlm.run(..., metrics={"name": function})'
            )
        return self
