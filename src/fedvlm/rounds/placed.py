"""The devices of a run's frozen model, and the processes of the run."""

from __future__ import annotations

from fedvlm.errors import ConfigError, shown
from fedvlm.processes import size
from fedvlm.settings.sections import Config


def check(config: Config) -> None:
    """Refuses a place of the frozen model that the processes of this run cannot share.

    Raises:
        ConfigError: ``model.device_map`` is for one process, and there are several.
    """
    places = config.model.device_map
    if places != "none" and size() > 1:
        raise ConfigError(
            [
                f"model.device_map={shown(places, quotes=False)} spreads the model over the "
                f"devices of one process, but {size()} were started: start one, without torchrun"
            ]
        )
