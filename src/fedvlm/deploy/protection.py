"""A site's demands on differential privacy, and the runs that do not meet them.

The numbers hold for all runs on the same rows together; :mod:`fedvlm.deploy.account` adds them up.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from fedvlm.settings.method import Filled, Section
from fedvlm.settings.privacy import Above, PrivacyConfig
from fedvlm.settings.sections import Config

NONE = "training without differential privacy"
HOW = "set privacy.unit, privacy.epsilon and privacy.delta"


class Protection(Section):
    """The part of a site's policy about differential privacy."""

    dp_required: bool = Field(False, description="refuse runs without differential privacy")
    epsilon_max: Above | None = Field(
        None, description="largest epsilon of all runs on the same rows; needs delta_max"
    )
    delta_max: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="largest delta of a run, and the delta of epsilon_max"
    )
    dp_unit: Filled | None = Field(
        None,
        description="the protected unit at this site: row, or a column such as patient_id; it "
        "replaces the run's privacy.unit",
    )

    @model_validator(mode="after")
    def _epsilon_has_a_meaning(self) -> Protection:
        wrong = []
        if self.epsilon_max is not None and self.delta_max is None:
            wrong.append(
                f"epsilon_max={self.epsilon_max:g} needs delta_max, such as 1e-5: an epsilon has a "
                "meaning for one delta only"
            )
        if self.dp_unit == "client":
            wrong.append("dp_unit=client: the unit of a site is row, or a column of its rows")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def column(self) -> str | None:
        """The column whose equal values are one unit at this site; None where every row is one."""
        return None if self.dp_unit == "row" else self.dp_unit

    def privacy(self, config: Config) -> dict[str, Any]:
        """The section ``privacy`` of a run as it holds at this site, with the site's own unit."""
        own = config.privacy.model_dump()
        if config.privacy.local and self.dp_unit is not None:
            own["unit"] = self.dp_unit
            if self.dp_unit == "row":  # where the number of rows of a unit has no meaning
                own["unit_rows"] = PrivacyConfig().unit_rows
        return own


def unmet(policy: Protection, config: Config) -> list[str]:
    """The parts of a run that a site's demands on differential privacy do not allow."""
    asked = config.privacy
    if asked.unit == "client":
        return ["privacy.unit=client, which is for simulations: a site protects row, or a column"]
    if asked.unit is None:
        wrong = [f"{NONE}, which the site requires (dp_required): {HOW}"] * policy.dp_required
        for limit, name in ((policy.epsilon_max, "epsilon_max"), (policy.delta_max, "delta_max")):
            if limit is not None:
                letter = name.removesuffix("_max")
                wrong.append(
                    f"{NONE}, which bounds no {letter}, and the limit is {limit:g} ({name}): {HOW}"
                )
        return wrong[:1]
    return [
        f"{name} {value:g} (privacy.{name}), and the limit is {limit:g} ({name}_max)"
        for name, value, limit in (
            ("epsilon", asked.epsilon, policy.epsilon_max),
            ("delta", asked.delta, policy.delta_max),
        )
        if value is not None and limit is not None and value > limit
    ]
