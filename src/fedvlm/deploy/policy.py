"""What a site allows a run to ask of it, in the site's own file."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from fedvlm import config as configs
from fedvlm.algorithms.table import ALIASES, find, names
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.settings.method import Positive, Section
from fedvlm.settings.sections import Config

SETTABLE = ("model", "data", "engine")
"""Sections of a run's configuration in which a site may have settings of its own."""


class Refused(FedVLMError):
    """A site does not take part in what it was asked; it says so to the server."""


class Allowed(Section):
    """A model as it is at the site."""

    path: str = Field(description="where it is here: a folder, a hub name, or the bundled 'tiny'")
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="of its weights, which have to be a folder's; see weights_digest; empty: any",
    )


class Policy(Section):
    """The site's file. What is left out is allowed, but for models: those are named."""

    models: dict[str, Allowed] = Field(
        {"tiny": Allowed(path="tiny")},
        description="models that may be trained -> where they are here, and of which weights",
    )
    algorithms: list[str] | None = Field(None, description="their names; empty: all")
    rounds: Positive | None = Field(None, description="most rounds of a run")
    bytes_per_round: Positive | None = Field(None, description="most bytes up, or down, a round")
    dp_required: bool = Field(False, description="refuse runs without differential privacy")
    tell_rows: bool = Field(True, description="whether the server learns how many rows there are")
    set: dict[str, Any] = Field(
        {}, description="own settings, such as model.device: cuda or data.columns.answer: label"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _a_path_will_do(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {n: {"path": how} if isinstance(how, str) else how for n, how in given.items()}

    def check(self, config: Config) -> None:
        """Refuses a run that asks for more.

        Raises:
            Refused: naming everything that is too much.
        """
        wrong = []
        name, rounds = config.algorithm.name, config.train.rounds
        if self.rounds is not None and rounds > self.rounds:
            wrong.append(f"{rounds} rounds (train.rounds), and at most {self.rounds} are allowed")
        allowed = [ALIASES.get(one, one) for one in self.algorithms or ()]
        if self.algorithms is not None and name not in allowed:
            wrong.append(f"algorithm '{name}', and allowed are {', '.join(self.algorithms)}")
        if find(name).pools:
            wrong.append(f"algorithm '{name}', which needs all sites' rows in one place")
        if config.model.name not in self.models:
            known = ", ".join(self.models) or "none"
            wrong.append(f"model '{config.model.name}', and allowed are {known}")
        if self.dp_required:  # nothing of a run's settings can give it yet
            wrong.append(
                "training without differential privacy, which the site demands (dp_required), and "
                "which this version of fedvlm does not have"
            )
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

        Raises:
            Refused: the model's weights are not those that the policy names.
        """
        tree = config.model_dump()
        tree["output"] = str(folder)
        tree["model"]["name"] = self._path(config.model.name)
        tree["data"] |= {"path": data, "split": "train"}
        tree["partition"] = {"kind": "iid", "clients": 1, "min_rows": 2, "splits": "alone"}
        tree["engine"] = {"name": tree["engine"]["name"], "clients": 1}
        tree["train"]["clients_per_round"] = None
        assignments = [f"{key}={yaml.safe_dump(value)}" for key, value in self.set.items()]
        return configs.load(tree, *assignments)

    def _path(self, model: str) -> str:
        allowed = self.models[model]
        if allowed.sha256:
            found = weights_digest(allowed.path)
            if found != allowed.sha256:
                raise Refused(
                    f"the site's policy refuses this run: the SHA-256 of its weights of '{model}' "
                    f"is {found}, and {allowed.sha256} is allowed (models)"
                )
        return allowed.path


def weights_digest(folder: str | Path) -> str:
    """What a site's policy may name a model by; its settings and its processor do not count.

    Args:
        folder: the model's.

    Returns:
        The SHA-256 of its file ``*.safetensors``, as the hub shows it. Of several, that of what
        ``sha256sum *.safetensors`` prints there, file by file in the order of their names.

    Raises:
        Refused: it has no such files.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise Refused(
            "the site's policy refuses this run: it names the weights of a model by their SHA-256 "
            "(models), and where the model is, no folder has files *.safetensors"
        )
    sums = []
    for path in files:
        with open(path, "rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    lines = "".join(f"{s}  {path.name}\n" for s, path in zip(sums, files, strict=True))
    return sums[0] if len(sums) == 1 else hashlib.sha256(lines.encode()).hexdigest()


def read_policy(path: str | Path | None) -> Policy:
    """A site's policy; None is the default one.

    Raises:
        ConfigError: naming all that is wrong in the file.
    """
    if path is None:
        return Policy()
    policy = configs.read_file(path, Policy, "policy")
    odd = [key for key in policy.set if key.split(".")[0] not in SETTABLE]
    unknown = [name for name in policy.algorithms or () if name not in (*names(), *ALIASES)]
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
