"""What a site allows a run to ask of it, in the site's own file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from fedvlm import config as configs
from fedvlm.adaptation import Positive, Section
from fedvlm.algorithms import TABLE
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.sections import Config

SETTABLE = ("model", "data", "engine")
"""Sections of a run's configuration in which a site may have settings of its own."""


class Refused(FedVLMError):
    """A site does not take part in what it was asked; it says so to the server."""


class Policy(Section):
    """The site's file. What is left out is allowed, but for models: those are named."""

    models: dict[str, str] = Field(
        {"tiny": "tiny"},
        description="models that may be trained -> where they are here: a folder or a hub name",
    )
    algorithms: list[str] | None = Field(None, description="their names; empty: all")
    rounds: Positive | None = Field(None, description="most rounds of a run")
    bytes_per_round: Positive | None = Field(None, description="most bytes up, or down, a round")
    tell_rows: bool = Field(True, description="whether the server learns how many rows there are")
    set: dict[str, Any] = Field(
        {}, description="own settings, such as model.device: cuda or data.columns.answer: label"
    )

    def check(self, config: Config) -> None:
        """Refuses a run that asks for more.

        Raises:
            Refused: naming everything that is too much.
        """
        wrong = []
        name, rounds = config.algorithm.name, config.train.rounds
        if self.rounds is not None and rounds > self.rounds:
            wrong.append(f"{rounds} rounds (train.rounds), and at most {self.rounds} are allowed")
        if self.algorithms is not None and name not in self.algorithms:
            wrong.append(f"algorithm '{name}', and allowed are {', '.join(self.algorithms)}")
        if TABLE[name].pools:
            wrong.append(f"algorithm '{name}', which needs all sites' rows in one place")
        if config.model.name not in self.models:
            known = ", ".join(self.models) or "none"
            wrong.append(f"model '{config.model.name}', and allowed are {known}")
        if wrong:
            raise Refused("the site's policy refuses this run: it asks for " + "; for ".join(wrong))

    def check_bytes(self, size: int, way: str) -> None:
        """Refuses a message that is too large; ``way`` is up or down."""
        if self.bytes_per_round is not None and size > self.bytes_per_round:
            raise Refused(
                f"the site's policy refuses this run: {size} bytes {way} in a round, and at most "
                f"{self.bytes_per_round} are allowed (bytes_per_round)"
            )

    def localized(self, config: Config, data: str, folder: Path) -> Config:
        """A run's settings as they are here: own data, own paths, own device; one client.

        Args:
            config: what the server sent; no path in it is used.
            data: the site's rows.
            folder: where the run's state is kept.
        """
        tree = config.model_dump()
        tree["output"] = str(folder)
        tree["model"]["name"] = self.models[config.model.name]
        tree["data"] |= {"path": data, "split": "train"}
        tree["partition"] = {"kind": "iid", "clients": 1, "min_rows": 2, "splits": "alone"}
        tree["engine"] = {"name": tree["engine"]["name"], "clients": 1}
        tree["train"]["clients_per_round"] = None
        assignments = [f"{key}={yaml.safe_dump(value)}" for key, value in self.set.items()]
        return configs.load(tree, *assignments)


def read_policy(path: str | Path | None) -> Policy:
    """A site's policy; None is the default one.

    Raises:
        ConfigError: naming all that is wrong in the file.
    """
    if path is None:
        return Policy()
    try:
        policy = Policy.model_validate(yaml.safe_load(Path(path).read_text("utf-8")) or {})
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"the policy '{path}' cannot be read: {error}"]) from None
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError([f"policy '{path}': {text}" for text in problems]) from None
    odd = [key for key in policy.set if key.split(".")[0] not in SETTABLE]
    unknown = [name for name in policy.algorithms or () if name not in TABLE]
    problems = [f"set.{key}: a site sets {', '.join(SETTABLE)} only" for key in odd]
    problems += [f"algorithms: there is no '{name}'" for name in unknown]
    if problems:
        raise ConfigError([f"policy '{path}': {text}" for text in problems])
    return policy


def check_name(name: str) -> str:
    """A site's name, which is in its certificate.

    Raises:
        ConfigError: it is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", str(name)) or name == "server":
        raise ConfigError(
            [f"'{name}' is no name for a site: letters, digits, - and _, and not 'server'"]
        )
    return name
