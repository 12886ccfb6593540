"""The sections ``lora`` and ``algorithm`` of a configuration, and the base of all sections."""

from __future__ import annotations

import re
from typing import Annotated, Literal

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
        description="pattern of client names -> rank, at most lora.rank; empty: lora.rank for all "
        "clients; all clients are scaled by alpha / lora.rank",
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


class AlgorithmConfig(Section):
    """The section ``algorithm``; a subclass adds the settings of one algorithm."""

    name: str = Field("auto", description="a name from the table, see 'fedvlm algorithms'")
