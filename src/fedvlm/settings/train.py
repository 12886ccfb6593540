"""The section ``train``: rounds, the clients' local optimizer, and the ending of a run."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedvlm.settings.method import Positive, Section, Whole


class TrainConfig(Section):
    """Rounds and the clients' local optimizer."""

    rounds: Positive = Field(20, description="rounds of local training and averaging")
    clients_per_round: Positive | None = Field(
        None, description="clients sampled for a round; empty: all clients"
    )
    local_steps: Positive | None = Field(
        None, description="optimizer steps a client and round; empty: 5"
    )
    local_epochs: Positive | None = Field(
        None, description="passes over a client's rows a round; empty: use local_steps"
    )
    finish_steps: Whole | None = Field(
        None,
        description="optimizer steps of local tuning after the last round, at every client; empty: "
        "20 with clients_per_round, else 0",
    )
    average: Literal["none", "mean", "ema"] = Field(
        "mean",
        description="a client's final model: a mean of its models over the rounds, where late "
        "rounds weigh more; their exponential moving average; or its last model (none)",
    )
    batch_size: Positive = Field(8, description="rows in a batch of the training")
    patience: Positive | None = Field(
        None,
        description="end the rounds after this many evaluations (eval.every) in a row without a "
        "lower mean validation loss of the personal models; the last models are kept, and the "
        "ending follows; empty: train all rounds",
    )
    sort_by_length: bool = Field(
        False, description="batches of rows of similar length: less padding, less mixed batches"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="of the local steps")
    lr: Annotated[float, Field(gt=0)] = Field(3e-3, description="learning rate")
    lr_a: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate of A; empty: lr"
    )
    lr_b: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate of B; empty: lr"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="decoupled weight decay of the local steps"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="largest gradient norm of a client; empty: no clipping"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="schedule of the learning rate over the rounds"
    )
    warmup_rounds: Whole = Field(0, description="rounds in which the learning rate rises")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError(
                "set local_steps or local_epochs, not both "
                f"(got local_steps={self.local_steps}, local_epochs={self.local_epochs})"
            )
        return self

    @property
    def tuning(self) -> int:
        """Optimizer steps of local tuning after the last round."""
        usual = 20 if self.clients_per_round else 0
        return usual if self.finish_steps is None else self.finish_steps

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each factor."""
        return {"A": self.lr_a or self.lr, "B": self.lr_b or self.lr}

    def steps(self, rows: int, final: bool = False) -> int:
        """Optimizer steps in one round of a client with ``rows`` training rows.

        Args:
            rows: number of training rows.
            final: whether it is the round of local tuning after the last round.
        """
        if final:
            return self.tuning
        if self.local_epochs is not None:
            return self.local_epochs * math.ceil(rows / self.batch_size)
        return self.local_steps or 5

    def rate_scale(self, round_: int, final: bool = False) -> float:
        """Multiplier of the learning rates in a round.

        Args:
            round_: the round, from 1.
            final: whether it is the round of local tuning after the last round.
        """
        if final or round_ > self.rounds:
            return 1.0
        if round_ <= self.warmup_rounds:
            return round_ / (self.warmup_rounds + 1)
        done = (round_ - 1 - self.warmup_rounds) / max(1, self.rounds - self.warmup_rounds)
        done = min(done, 1.0)
        if self.schedule == "linear":
            return 1.0 - done
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0
