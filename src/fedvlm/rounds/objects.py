"""The objects that a program hands over to a run besides its settings and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedvlm import config as configs
from fedvlm.algorithms.base import Algorithm, expected
from fedvlm.engines.functions import Function, checked
from fedvlm.errors import ConfigError, shown
from fedvlm.settings.sections import Config


@dataclass(frozen=True)
class Objects:
    """The objects of a run. They cannot be written to its folder, which keeps their names.

    Attributes:
        algorithm: the algorithm; None: the configured one.
        functions: name -> metric, see :mod:`fedvlm.engines.functions`.
    """

    algorithm: Algorithm | None = None
    functions: Mapping[str, Function] = field(default_factory=dict)

    @classmethod
    def of(cls, algorithm: Algorithm | None, metrics: Mapping[str, Function] | None) -> Objects:
        """The objects, checked.

        Raises:
            FedVLMError: one of them is something else.
        """
        if algorithm is not None:
            expected(algorithm)
        return cls(algorithm, checked(metrics))

    def settings(self, source: configs.Source, *overrides: str) -> Config:
        """The settings of a run with these objects, whose names they get.

        Raises:
            ConfigError: the settings are wrong, or do not fit the objects.
        """
        names = [f"eval.own=[{', '.join(self.functions)}]"] if self.functions else []
        return self.read(source, *overrides, *names)

    def read(self, source: configs.Source, *overrides: str) -> Config:
        """The settings of a run that has the names of its objects."""
        return (configs.own if self.algorithm else configs.load)(source, *overrides)

    def check(self, config: Config) -> None:
        """Refuses functions other than those that the settings name.

        Raises:
            ConfigError: names those that are missing, or that the run did not begin with.
        """
        names, given = set(config.eval.own), set(self.functions)
        if missing := sorted(names - given):
            raise ConfigError(
                [
                    f"eval.own: this run has metrics of a Python program, {', '.join(missing)}; "
                    "give the same functions again: fedvlm.run or fedvlm.resume(..., "
                    f"metrics={{{shown(missing[0])}: function}})"
                ]
            )
        if more := sorted(given - names):
            raise ConfigError(
                [
                    f"metrics: this run began without {', '.join(more)}; a resumed run keeps its "
                    "metrics"
                ]
            )
