"""The runs of a comparison: the settings of each algorithm and seed, checked before any starts."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvlm import config as configs
from fedvlm.algorithms.base import Algorithm
from fedvlm.algorithms.table import ALIASES, OWN, find, names, taken
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.settings.sections import Config

MOST = 10_000  # seeds or jobs of a comparison
Compared = str | tuple[str, Algorithm]


def planned(
    algorithms: Sequence[Compared],
    config: configs.Source = None,
    *overrides: str,
    seeds: int = 1,
    jobs: int = 1,
) -> dict[str, Config]:
    """The runs of a comparison: name -> settings; see :func:`compare`.

    Raises:
        ConfigError: lists the mistakes of all runs.
    """
    tree, problems = configs.read(config, *overrides)
    problems += configs.absent(tree)
    tree["algorithm"] = configs.chosen(tree.get("algorithm"))
    for one in algorithms:
        if not isinstance(one, str) and not _is_pair(one):
            raise ConfigError(
                [f"an algorithm is a name, or (label, fedvlm.Algorithm); got {one!r:.80}"]
            )
    objects = dict(a for a in algorithms if not isinstance(a, str))
    labels = [ALIASES.get(a, a) if isinstance(a, str) else a[0] for a in algorithms]
    if twice := sorted({label for label in objects if labels.count(label) > 1}):
        problems.append(f"the label '{twice[0]}' stands for two algorithms; give each its own")
    return _runs(tree, list(dict.fromkeys(labels)), objects, seeds, jobs, problems)


def _is_pair(one: Any) -> bool:
    pair = isinstance(one, tuple) and len(one) == 2
    return pair and isinstance(one[0], str) and isinstance(one[1], Algorithm)


def _runs(
    tree: dict[str, Any],
    labels: Sequence[str],
    objects: Mapping[str, Algorithm],
    seeds: int,
    jobs: int,
    problems: list[str],
) -> dict[str, Config]:
    if not 1 <= seeds <= MOST or not 1 <= jobs <= MOST:
        problems.append(f"seeds and jobs must be 1 to {MOST}, got {seeds} and {jobs}")
        seeds = 1
    if not labels:
        problems.append(f"no algorithm is named; there are {', '.join(names())}")
    if objects and jobs > 1:
        problems.append(
            f"jobs={jobs}: {', '.join(objects)} is an object, which cannot go to another process; "
            "set jobs=1, or install it as an entry point of the group 'fedvlm.algorithms'"
        )
    for label in objects:
        if not re.fullmatch(r"[\w.+-]+", label) or label in names():
            problems.append(
                f"'{label}' is no label for an object: use letters, digits and . + - _, and no "
                "name of a known algorithm"
            )
    problems += _nobodys(tree, [x for x in labels if x not in objects])
    first, runs = tree.get("seed") or 0, {}
    for seed in range(first, first + seeds) if type(first) is int else [first]:
        for label in labels:
            own = _settings(tree, label, label in objects)
            own |= {"seed": seed, "output": _folder(tree, label, seed)}
            if jobs > 1 and isinstance(own.setdefault("engine", {}), dict):
                own["engine"]["threads"] = 1
            try:
                runs[f"{label} seed {seed}"] = configs.checked(own)
            except ConfigError as error:
                problems.extend(p for p in error.problems if p not in problems)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return runs


def _folder(tree: dict[str, Any], label: str, seed: Any) -> Any:
    output = tree.get("output") or Config().output
    if type(output) not in (str, int):
        return output  # the check of the settings reports this
    return str(Path(str(output)) / f"{label}-seed-{seed}")


def _settings(tree: dict[str, Any], label: str, is_object: bool) -> dict[str, Any]:
    """The settings for one algorithm, without settings of other algorithms."""
    own = copy.deepcopy(tree)
    given = own.get("algorithm")
    try:
        entry = find(f"{OWN}:{label}" if is_object else label)
    except (KeyError, FedVLMError):  # the check of the settings reports this
        return own | {"algorithm": {"name": label}}
    if is_object:
        own["algorithm"] = {"name": f"{OWN}:{label}"}
    elif given is None or isinstance(given, dict):
        own["algorithm"] = taken(label, given or {})
    if isinstance(own.get("lora"), dict):
        meant = {"ranks": entry.ranks, "spare": entry.spare}
        own["lora"] = {k: v for k, v in own["lora"].items() if meant.get(k, True)}
    return own


def _nobodys(tree: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    """Problems: settings that no compared algorithm has."""
    known, entries = {"name"}, []
    for label in labels:
        with contextlib.suppress(KeyError, FedVLMError):
            entries.append(find(label))
    for entry in entries:
        known |= entry.settings.model_fields.keys()
    given, lora = (tree.get(key) for key in ("algorithm", "lora"))
    idle = [f"algorithm.{k}" for k in given if k not in known] if isinstance(given, dict) else []
    takers = {"ranks": any(e.ranks for e in entries), "spare": any(e.spare for e in entries)}
    if isinstance(lora, dict):
        idle += [f"lora.{k}" for k, taken_ in takers.items() if lora.get(k) and not taken_]
    return [f"{key}: none of {', '.join(labels) or 'the objects'} has this setting" for key in idle]
