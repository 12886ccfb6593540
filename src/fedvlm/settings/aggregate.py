"""The section ``aggregate`` of a configuration: one result from the uploads of a round."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedvlm.settings.method import Ratio, Section


class AggregateConfig(Section):
    """The server's mean of the uploads, and its bound on what one client can do to the mean."""

    kind: Literal["norm", "mean", "trimmed"] = Field(
        "norm",
        description="norm: shrink changes far larger than the round's median; mean: take them as "
        "they are; trimmed: leave out the largest and smallest values of each element",
    )
    bound: Ratio = Field(
        1.5, description="kind=norm: largest norm of a change, in medians of the round's norms"
    )
    trim: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.2, description="kind=trimmed: share of the clients left out at each end"
    )

    @model_validator(mode="after")
    def _settings_have_a_meaning(self) -> AggregateConfig:
        fields = type(self).model_fields
        for name, kind in (("bound", "norm"), ("trim", "trimmed")):
            value = getattr(self, name)
            if self.kind != kind and value != fields[name].default:
                raise ValueError(
                    f"{name}={value:g} has no meaning for kind={self.kind}: leave it out, or set "
                    f"kind={kind}"
                )
        return self
