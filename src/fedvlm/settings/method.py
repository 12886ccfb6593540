"""The sections ``lora`` and ``algorithm`` of a configuration, and what all sections share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Factors = Literal["A", "B", "AB", "none"]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(Section):
    """LoRA on the frozen model (Hu et al., arXiv 2106.09685), attached by PEFT."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ranks: dict[str, Positive] | None = Field(
        None,
        description="client pattern -> its rank, at most lora.rank, which the others have; the "
        "scaling is alpha over lora.rank for all",
    )
    spare: Positive | None = Field(
        None, description="ranks that are not trained (fedex, flora); empty: 4 times lora.rank"
    )
    rslora: bool = Field(False, description="scale by alpha/sqrt(rank), arXiv 2312.03732")
    target: str = Field(
        "all-linear",
        description="language, vision, projector, vision+language, all-linear, "
        "or a regular expression over module names",
    )

    @model_validator(mode="after")
    def _ranks_fit(self) -> LoraConfig:
        for pattern, rank in (self.ranks or {}).items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
            if rank > self.rank:
                raise ValueError(
                    f"ranks: '{pattern}' has rank {rank}, more than lora.rank={self.rank}, the "
                    "largest of all clients"
                )
        return self


class ServerConfig(Section):
    """An optimizer at the server, whose gradient is a round's change (arXiv 2003.00295)."""

    name: Literal["none", "avgm", "adagrad", "yogi", "adam"] = Field(
        "none", description="none: the mean itself; avgm: arXiv 1909.06335"
    )
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="its learning rate; empty: 1 for avgm, 0.01 for the others"
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="momentum; empty: 0 for adagrad, 0.9 for the others"
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="of yogi and adam")
    tau: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="adagrad, yogi, adam: how far the step adapts; smaller is more"
    )

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr or (1.0 if self.name == "avgm" else 0.01)

    @property
    def momentum(self) -> float:
        """The decay of the first moment."""
        if self.beta1 is not None:
            return self.beta1
        return 0.0 if self.name == "adagrad" else 0.9


class AlgorithmConfig(Section):
    """Which factors are shared, and how the server combines them."""

    name: str = Field("auto", description="a name from the table; 'share' for an own map")
    share: dict[str, Factors] | None = Field(
        None,
        description="own map: module pattern -> factors that are aggregated (A, B, AB, none); a "
        "pattern may be part:vision, part:projector, part:language, layer:0-3, joined by &",
    )
    server_lr: Annotated[float, Field(gt=0)] = Field(
        1.0, description="step of the server towards the clients' mean"
    )
    server: ServerConfig = ServerConfig()
    ft_steps: Positive = Field(
        20, description="steps of local tuning after the last round (auto, lora+ft, lora+es)"
    )
    ft_checks: Positive = Field(
        5,
        description="lora+es: validations during ft_steps; auto: points of it that are averaged",
    )
    prox_mu: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="pull to the download while training; empty: fedprox 0.01, ditto 0.1, else 0",
    )
    mix_a: Fraction = Field(0.5, description="mix, apfl: the mean's part in a client's A")
    mix_b: Fraction = Field(0.5, description="mix, apfl: the mean's part in a client's B")
    temperature: Annotated[float, Field(gt=0)] = Field(
        0.1, description="similar: of the softmax over cosines; smaller shares with fewer clients"
    )
    clusters: Positive = Field(2, description="clustered: number of groups of clients")

    @model_validator(mode="before")
    @classmethod
    def _share_names_itself(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("share") is not None and "name" not in given:
            return {**given, "name": "share"}
        return given

    @model_validator(mode="after")
    def _is_in_the_table(self) -> AlgorithmConfig:
        from fedvlm.algorithms.table import TABLE
        from fedvlm.layers import matcher

        if self.name not in TABLE:
            raise ValueError(
                f"algorithm.name '{self.name}' is unknown{_suggest(self.name, TABLE)}; "
                f"there are {', '.join(TABLE)}"
            )
        if (self.share is not None) != (self.name == "share"):
            raise ValueError(
                "an own map needs both algorithm.name=share and algorithm.share "
                f"(got name={self.name!r}, share={self.share!r})"
            )
        for pattern in self.share or {}:
            matcher(pattern)
        return self

    @property
    def mix(self) -> dict[str, float]:
        """The mean's part in a client's factors."""
        return {"A": self.mix_a, "B": self.mix_b}


def _suggest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f": did you mean '{close[0]}'?" if close else ""
