"""A site's policy: the limits of a run at the site, in the site's own file."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from fedvlm import config as configs
from fedvlm import hub
from fedvlm.algorithms.table import ALIASES, find, names
from fedvlm.deploy import limits, peers
from fedvlm.deploy.limits import Refused as Refused
from fedvlm.deploy.protection import Protection, unmet
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.models.pin import allow
from fedvlm.settings.method import Section
from fedvlm.settings.sections import Config, EvalConfig

logger = logging.getLogger("fedvlm")

SETTABLE = ("model", "data", "engine", "eval")
"""Sections of a run's configuration in which a site may set its own values. The section ``data``
never comes from the server: what a site does not set has fedvlm's default."""
HERE = {"device": "auto", "device_map": "none", "device_memory": None, "shard": False}
"""The place of the model at a site, which the server does not choose either."""


class Allowed(Section):
    """An allowed model, and its place at the site."""

    path: str = Field(description="place at the site: a folder, a hub name, or the bundled 'tiny'")
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="digest of the model's folder, from 'fedvlm site digest FOLDER'; empty: any",
    )


class Policy(limits.Budgets, Protection, peers.Peers):
    """The site's file: what the server may ask of this site. A missing setting has its default."""

    models: dict[str, Allowed] = Field(
        {"tiny": Allowed(path="tiny")},
        description="names of allowed models -> their place at the site, and their weights",
    )
    algorithms: list[str] | None = Field(
        None, description="names of allowed algorithms; empty: all"
    )
    approval: bool = Field(False, description="a person accepts each run: fedvlm site requests")
    metrics: str = Field(
        "", description="ADDRESS:PORT at which this site's own Prometheus may ask; empty: nowhere"
    )
    set: dict[str, Any] = Field(
        {},
        description="the site's settings, such as model.device: cuda or data.columns.answer: label",
    )

    @field_validator("models", mode="before")
    @classmethod
    def _a_path_will_do(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {n: {"path": how} if isinstance(how, str) else how for n, how in given.items()}

    @field_validator("metrics", mode="before")
    @classmethod
    def _a_number_will_do(cls, given: Any) -> Any:
        return str(given) if type(given) is int else given

    def check(self, config: Config) -> None:
        """Refuses a run that the policy does not allow.

        Raises:
            Refused: names everything that is not allowed.
        """
        wrong = []
        name = config.algorithm.name
        allowed = [ALIASES.get(one, one) for one in self.algorithms or ()]
        if self.algorithms is not None and name not in allowed:
            wrong.append(f"algorithm '{name}', but the site allows {', '.join(self.algorithms)}")
        if find(name).pools:
            wrong.append(f"algorithm '{name}', which needs all sites' rows in one place")
        if config.model.name not in self.models:
            known = ", ".join(self.models) or "none"
            wrong.append(f"model '{config.model.name}', but the site allows {known}")
        wrong += unmet(self, config)
        wrong += peers.unsafe(self, config)
        if config.privacy.canaries:
            wrong.append("canaries (privacy.canaries), which only a simulated run may have")
        wrong += limits.exceeded(self, self._own(config, None, "here", config.model.name))
        if wrong:
            raise Refused("the site's policy refuses this run: it asks for " + "; for ".join(wrong))

    def localized(self, config: Config, data: str, folder: Path) -> Config:
        """A run's settings for this site: the site's data, paths and device, and one client.

        Args:
            config: the settings from the server; no path in them is used, and nothing of ``data``.
            data: path of the site's rows.
            folder: folder of the run's state.

        Raises:
            Refused: the model's folder differs from the one in the policy.
        """
        return self._own(config, data, str(folder), self._path(config.model.name))

    def _own(self, config: Config, data: str | None, output: str, model: str) -> Config:
        """The settings as they hold at this site; see :meth:`localized`."""
        tree = config.model_dump()
        tree["output"] = output
        tree["model"] |= {"name": model, **HERE}
        tree["data"] = {"path": data, "split_seed": 0}
        tree["privacy"] = self.privacy(config)
        tree["eval"]["group_by"] = EvalConfig().group_by
        tree["partition"] = {"kind": "iid", "clients": 1, "min_rows": 2, "splits": "alone"}
        tree["engine"] = {"name": tree["engine"]["name"], "clients": 1}
        tree["train"] |= {"clients_per_round": None, "finish_steps": config.train.tuning}
        return configs.load(
            tree, *(f"{key}={json.dumps(value)}" for key, value in self.set.items())
        )

    def _path(self, model: str) -> str:
        from fedvlm.models.load import BUNDLED

        allowed = self.models[model]
        if allowed.sha256:
            try:
                allow(allowed.path, allowed.sha256)
            except FedVLMError as error:
                why = f"its model '{model}' is not the one in the policy (models): {error}"
                raise Refused(f"the site's policy refuses this run: {why}") from None
        elif (
            allowed.path not in BUNDLED
            and not Path(allowed.path).is_dir()
            and not hub.is_commit(hub.split(allowed.path)[1])
        ):
            logger.warning(
                "the policy allows '%s' by a name on the hub: whoever controls that repository "
                "chooses its weights; a folder with a sha256 fixes them (fedvlm site digest), and "
                "so does a commit (org/name@COMMIT) if you trust the hub",
                model,
            )
        return allowed.path


def read_policy(path: str | Path | None) -> Policy:
    """Reads a site's policy; None gives the default policy.

    Raises:
        ConfigError: lists all mistakes in the file.
    """
    if path is None:
        return Policy()
    policy = configs.read_file(path, Policy, "policy")
    odd = [key for key in policy.set if key.split(".")[0] not in SETTABLE]
    unknown = [name for name in policy.algorithms or () if name not in (*names(), *ALIASES)]
    problems = peers.problems(policy)
    problems += [f"set.{key}: a site sets {', '.join(SETTABLE)} only" for key in odd]
    problems += [f"algorithms: there is no '{name}'" for name in unknown]
    if problems:
        raise ConfigError([f"policy '{path}': {text}" for text in problems])
    return policy


def check_name(name: str) -> str:
    """Checks the name of a site, which is in its certificate.

    Raises:
        ConfigError: the name is invalid.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", str(name)) or name == "server":
        raise ConfigError(
            [f"'{name}' is no name for a site: use letters, digits, - and _, but not 'server'"]
        )
    return name
