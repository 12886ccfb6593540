"""The objects that a program hands over to a run besides its settings and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedvlm import config as configs
from fedvlm.algorithms.base import Algorithm, expected
from fedvlm.engines.functions import Function, checked
from fedvlm.errors import ConfigError, shown
from fedvlm.settings.sections import Config, ModelConfig

if TYPE_CHECKING:
    from fedvlm.models.load import Loaded


@dataclass(frozen=True)
class Objects:
    """The objects of a run. They cannot be written to its folder, which keeps their names.

    Attributes:
        algorithm: the algorithm; None: the configured one.
        functions: name -> metric, see :mod:`fedvlm.engines.functions`.
        model: the frozen model and its processor, see :mod:`fedvlm.models.handed`; None: that of
            ``model.name``.
        named: the settings of the section ``model`` that follow from the model.
    """

    algorithm: Algorithm | None = None
    functions: Mapping[str, Function] = field(default_factory=dict)
    model: tuple[Any, Any] | None = None
    named: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        algorithm: Algorithm | None,
        metrics: Mapping[str, Function] | None,
        model: tuple[Any, Any] | None,
    ) -> Objects:
        """The objects, checked.

        Raises:
            FedVLMError: one of them is something else.
        """
        if algorithm is not None:
            expected(algorithm)
        if model is None:
            return cls(algorithm, checked(metrics))
        from fedvlm.models import handed

        model = handed.checked(model)
        return cls(algorithm, checked(metrics), model, handed.named(model))

    def settings(self, source: configs.Source, *overrides: str) -> Config:
        """The settings of a run with these objects, whose names they get.

        Raises:
            ConfigError: the settings are wrong, or do not fit the objects.
        """
        listed = ", ".join(f"'{name}'" for name in self.functions)
        names = [f"eval.own=[{listed}]"] if listed else []
        config = self.read(source, *overrides, *names)
        if self.model is None:
            return config
        if "name" in config.model.model_fields_set and config.model.name != ModelConfig().name:
            raise ConfigError(
                [
                    f"model.name is '{config.model.name}', and a model was handed over too "
                    "(model=...): leave one of them out"
                ]
            )
        for key in ("quantization", "device_map", "shard"):
            if (value := getattr(config.model, key)) not in ("none", False):
                raise ConfigError(
                    [
                        f"model.{key}={shown(value, quotes=False)}: a model that is handed over "
                        "(model=...) stays as it is; leave this setting out, or set model.name"
                    ]
                )
        return config.model_copy(update={"model": config.model.model_copy(update=self.named)})

    def loaded(self, config: ModelConfig) -> Loaded:
        """The frozen model of the run."""
        from fedvlm.models import handed
        from fedvlm.models.load import load_model

        if self.model is None:
            return load_model(config)
        return handed.base(self.model, config)

    def read(self, source: configs.Source, *overrides: str) -> Config:
        """The settings of a run that has the names of its objects."""
        return (configs.own if self.algorithm else configs.load)(source, *overrides)

    def check(self, config: Config) -> None:
        """Refuses functions and a model other than those that the settings name.

        Raises:
            ConfigError: names those that are missing, or that the run did not begin with.
        """
        if self.model and self.named["name"] != config.model.name:
            raise ConfigError(
                [
                    f"model: the run began with '{config.model.name}', and the model that is "
                    "handed over now is another one; give the same model and processor"
                ]
            )
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
