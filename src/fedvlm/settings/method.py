"""The sections ``lora`` and ``algorithm`` of a configuration, and the base of all sections."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedvlm import documents
from fedvlm.layers import searcher

LARGEST = 2**53  # of whole numbers: larger ones are no exact floats, and no length of anything
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Filled = Annotated[str, Field(min_length=1)]
Ratio = Annotated[float, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Factors = Literal["A", "B", "AB", "none"]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no NaN or infinity.

    A value has the type that was written: ``true`` is no number, and ``"1_000"`` is none either. A
    whole number is taken where a text is asked for, so that a column may be called 2024.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, given: Any, info: Any) -> Any:
        kinds = _kinds(cls, info.field_name)
        if type(given) is int and str in get_args(cls.model_fields[info.field_name].annotation):
            return str(given)
        return given if Any in kinds else _typed(given, kinds)


@cache
def _kinds(section: type[Section], name: str) -> frozenset[Any]:
    """The types and the literal values that a setting and what is inside it may have."""

    def flat(kind: Any) -> set[Any]:
        inside, outer = get_args(kind), get_origin(kind)
        if outer is Annotated:
            return flat(inside[0])
        if outer is dict:
            return {dict} | flat(inside[1])
        own = {list} if outer in (list, tuple) else set()
        return own.union(*map(flat, inside)) if inside else {kind}

    return frozenset(flat(section.model_fields[name].annotation))


def _typed(given: Any, kinds: frozenset[Any]) -> Any:
    """Refuses a truth value or a text where only a number is meant, which pydantic would take."""
    numeric = kinds & {int, float}
    if not numeric:
        return given
    if isinstance(given, dict):
        return {k: _typed(v, kinds - {dict}) for k, v in given.items()}
    if isinstance(given, list):
        return [_typed(v, kinds - {dict, list}) for v in given]
    if isinstance(given, bool) and bool not in kinds:
        raise ValueError("it must be a number, not a truth value")
    if isinstance(given, str) and not kinds & {str, bool, dict, list, given}:
        found = documents.number(given)
        if found is None:
            raise ValueError("it must be a number such as 8 or 1e-3, without leading zeros or '_'")
        return found
    return given


def check_pattern(pattern: str) -> None:
    """Refuses a text that is no regular expression.

    Raises:
        ValueError: with the reason.
    """
    searcher(pattern)


class LoraConfig(Section):
    """LoRA on the frozen model (Hu et al., arXiv 2106.09685), attached by PEFT."""

    rank: Positive = Field(8, description="rank of the factors A and B")
    alpha: Annotated[float, Field(gt=0)] = Field(
        16.0, description="the product B A is multiplied by alpha / rank"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the inputs of A that are dropped in training"
    )
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

    @property
    def spared(self) -> int:
        """The number of spare ranks, for an algorithm that has them."""
        return 4 * self.rank if self.spare is None else self.spare

    @field_validator("target")
    @classmethod
    def _target_can_be_read(cls, target: str) -> str:
        check_pattern(target)  # a preset is a regular expression too
        return target

    @model_validator(mode="after")
    def _ranks_fit(self) -> LoraConfig:
        for pattern, rank in (self.ranks or {}).items():
            check_pattern(pattern)
            if rank > self.rank:
                raise ValueError(
                    f"ranks: '{pattern}' has rank {rank}, more than lora.rank={self.rank}, the "
                    "largest of all clients"
                )
        return self


class AlgorithmConfig(Section):
    """The section ``algorithm``; a subclass adds the settings of one algorithm."""

    name: str = Field("auto", description="a name from the table, see 'fedvlm algorithms'")
