"""The section ``privacy`` of a configuration: differential privacy, and canaries for an audit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fedvlm.settings.method import Filled, Positive, Section, Whole

Above = Annotated[float, Field(gt=0)]


class PrivacyConfig(Section):
    """Differential privacy (DP) of training. It is off while ``unit`` is empty.

    Neighbouring data sets differ by one unit that is added or removed.
    """

    unit: Filled | None = Field(
        None,
        description="the protected unit: row, client (simulation only), or a column such as "
        "patient_id whose equal values are one unit; empty: no differential privacy",
    )
    epsilon: Above | None = Field(None, description="the budget of a run, for every client")
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="probability that the bound epsilon fails; below 1 / number of units"
    )
    clip: Above = Field(
        1.0, description="largest norm of a unit's gradient, or of a client's change (unit=client)"
    )
    noise: Above | None = Field(
        None,
        description="standard deviation of the noise over clip; empty: the smallest that keeps "
        "the budget. If it is too small for all rounds, the run ends before the budget is exceeded",
    )
    unit_rows: Positive = Field(
        4, description="most rows of a unit in a step, drawn anew each time (unit is a column)"
    )
    canaries: Whole = Field(
        0, description="training rows with wrong answers, for 'fedvlm audit': half are trained on"
    )

    @model_validator(mode="after")
    def _settings_have_a_meaning(self) -> PrivacyConfig:
        wrong = []
        if self.unit is None:
            fields = type(self).model_fields
            wrong = [
                f"{name}={getattr(self, name):g} has no meaning without a unit: set privacy.unit "
                f"(row, client or a column), or leave {name} out"
                for name in ("epsilon", "delta", "clip", "noise", "unit_rows")
                if getattr(self, name) != fields[name].default
            ]
        else:
            wrong += [
                f"unit={self.unit} needs {name}, {why}"
                for name, why in (
                    ("epsilon", "the budget, such as privacy.epsilon=3"),
                    ("delta", "such as privacy.delta=1e-5, below 1 / number of units"),
                )
                if getattr(self, name) is None
            ]
        if self.unit_rows != 4 and self.unit in ("row", "client"):
            wrong.append(f"unit_rows={self.unit_rows} has no meaning for unit={self.unit}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def local(self) -> bool:
        """Whether clients train with DP-SGD: the unit is a row or a group of rows."""
        return self.unit not in (None, "client")

    @property
    def column(self) -> str | None:
        """The column whose equal values are one unit; None where there is none."""
        return None if self.unit in (None, "row", "client") else self.unit
