"""One typed tree for a run. A file and ``key=value`` overrides go in; unknown keys are refused.

Every section is a frozen pydantic model. :func:`load` collects *all* mistakes before it raises, and
suggests the nearest valid name for an unknown key.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedvlm.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Factors = Literal["A", "B", "AB", "none"]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(Section):
    """Which column of the data plays which part. Defaults are RLAIF-V's names."""

    image: str = "image"
    question: str = "question"
    answer: str = "chosen"


class ScenesConfig(Section):
    """The bundled data set (used when ``data.path`` is not set)."""

    style: Literal["iid", "label", "covariate", "concept", "quantity", "mixed"] = Field(
        "mixed", description="how the sites differ"
    )
    strength: Fraction = Field(1.0, description="how much they differ, 0 to 1")
    sites: Positive = Field(8, description="number of sites")
    rows: Positive = Field(120, description="rows a site, on average")


class DataConfig(Section):
    """Where the rows come from and how each client's rows are split."""

    path: str | None = Field(
        None, description="parquet, JSONL, image folder, or a hub data set; empty: scenes"
    )
    split: str = Field("train", description="the split to read, where the source has several")
    columns: Columns = Columns()
    max_rows: Positive | None = Field(None, description="use a seeded sample of this many rows")
    on_error: Literal["fail", "skip"] = Field("fail", description="what a corrupt row does")
    val_fraction: Fraction = Field(0.1, description="share of a client's rows for validation")
    test_fraction: Fraction = Field(0.25, description="share of a client's rows for the test")
    scenes: ScenesConfig = ScenesConfig()


class PartitionConfig(Section):
    """How rows become clients."""

    kind: Literal["auto", "iid", "dirichlet", "shards", "column", "quantity"] = Field(
        "auto", description="auto: by site for scenes, iid for other data"
    )
    clients: Positive = Field(8, description="number of clients (kind=column: one per value)")
    column: str | None = Field(
        None, description="column: the clients; dirichlet, shards: the label"
    )
    alpha: Annotated[float, Field(gt=0)] = Field(0.3, description="Dirichlet concentration")
    shards: Positive = Field(2, description="shards a client (kind=shards)")
    exponent: Annotated[float, Field(ge=0)] = Field(1.2, description="power law (kind=quantity)")
    min_rows: Positive = Field(10, description="fewest rows that a client may have")

    @model_validator(mode="after")
    def _column_is_named(self) -> PartitionConfig:
        if self.kind == "column" and not self.column:
            raise ValueError("kind=column needs partition.column, the column that names the client")
        return self


class ModelConfig(Section):
    """The frozen vision-language model."""

    name: str = Field("tiny", description="bundled 'tiny', a hub name, or a local folder")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")


class LoraConfig(Section):
    """LoRA on the frozen model (Hu et al., arXiv 2106.09685), attached by PEFT."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = Field(False, description="scale by alpha/sqrt(rank), arXiv 2312.03732")
    target: str = Field(
        "all-linear",
        description="language, vision, projector, vision+language, all-linear, "
        "or a regular expression over module names",
    )


class AlgorithmConfig(Section):
    """Which factors are shared, and how the server combines them."""

    name: str = Field("plora", description="a name from the table; 'share' for an own map")
    share: dict[str, Factors] | None = Field(
        None, description="own map: module pattern -> factors that are aggregated (A, B, AB, none)"
    )
    server_lr: Annotated[float, Field(gt=0)] = Field(
        1.0, description="step of the server towards the clients' mean"
    )
    ft_steps: Positive = Field(
        20, description="steps of local tuning after the last round (lora+ft)"
    )

    @model_validator(mode="before")
    @classmethod
    def _share_names_itself(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("share") is not None and "name" not in given:
            return {**given, "name": "share"}
        return given

    @model_validator(mode="after")
    def _is_in_the_table(self) -> AlgorithmConfig:
        from fedvlm.algorithms import TABLE

        if self.name not in TABLE:
            raise ValueError(
                f"algorithm.name '{self.name}' is unknown{_suggest(self.name, TABLE)}; "
                f"there are {', '.join(TABLE)}"
            )
        if (self.share is not None) != (self.name == "share"):
            raise ValueError(
                "an own map needs both algorithm.name=share and algorithm.share "
                f"(got name={self.name!r}, share={self.share!r})"
            )
        for pattern in self.share or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
        return self


class TrainConfig(Section):
    """Rounds and the clients' local optimizer."""

    rounds: Positive = 20
    clients_per_round: Positive | None = Field(None, description="sampled cohort; empty: all")
    local_steps: Positive | None = Field(None, description="optimizer steps a round; empty: 5")
    local_epochs: Positive | None = Field(None, description="passes a round, instead of steps")
    batch_size: Positive = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-3
    lr_a: Annotated[float, Field(gt=0)] | None = Field(None, description="rate of A; empty: lr")
    lr_b: Annotated[float, Field(gt=0)] | None = Field(None, description="rate of B; empty: lr")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="per client")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate, over the rounds"
    )
    warmup_rounds: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError(
                "set local_steps or local_epochs, not both "
                f"(got local_steps={self.local_steps}, local_epochs={self.local_epochs})"
            )
        return self

    def steps(self, rows: int) -> int:
        """Optimizer steps in one round of a client with ``rows`` training rows."""
        if self.local_epochs is not None:
            return self.local_epochs * math.ceil(rows / self.batch_size)
        return self.local_steps or 5

    def rate_scale(self, round_: int) -> float:
        """Multiplier of the learning rates in round ``round_`` (1-based)."""
        if round_ > self.rounds:  # local tuning after the last round
            return 1.0
        if round_ <= self.warmup_rounds:
            return round_ / (self.warmup_rounds + 1)
        done = (round_ - 1 - self.warmup_rounds) / max(1, self.rounds - self.warmup_rounds)
        done = min(done, 1.0)
        if self.schedule == "linear":
            return 1.0 - done
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0


class EvalConfig(Section):
    """When and how every client is scored."""

    every: Annotated[int, Field(ge=0)] = Field(10, description="rounds between; 0: only at the end")
    batch_size: Positive = 64
    max_rows: Positive | None = Field(200, description="at most this many held-out rows a client")
    max_new_tokens: Positive = 24
    split: Literal["test", "val"] = Field("test", description="val: for choosing settings")


class EngineConfig(Section):
    """How a cohort is trained."""

    name: Literal["reference"] = "reference"
    threads: Positive | None = Field(
        None,
        description="torch threads; empty: 1 for models under 10 M parameters, else all cores",
    )


class Config(Section):
    """A run, whole. ``fedvlm run --print-config`` prints it with the defaults."""

    output: str = Field("runs/run", description="folder of this run")
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    lora: LoraConfig = LoraConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _fractions_leave_rows(self) -> Config:
        held_out = self.data.val_fraction + self.data.test_fraction
        if held_out >= 1.0:
            raise ValueError(
                f"data.val_fraction + data.test_fraction is {held_out:g}: nothing is left to train"
            )
        return self


def load(source: str | Path | dict[str, Any] | Config | None = None, *overrides: str) -> Config:
    """Builds the configuration from a YAML file or a dict, and ``key=value`` overrides.

    Args:
        source: path of a YAML file, a nested dict, a :class:`Config`, or None for the defaults.
        *overrides: dotted assignments such as ``train.rounds=20``; values are YAML.

    Raises:
        ConfigError: listing every unknown key, wrong type and impossible value at once.
    """
    problems: list[str] = []
    tree = _read(source)
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq or not key.strip():
            problems.append(f"'{text}' is not of the form key=value, such as train.rounds=20")
            continue
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        if isinstance(parsed, str) and (number := _number(parsed)) is not None:
            parsed = number
        problems.extend(_assign(tree, key.strip(), parsed))
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems.extend(_describe(e, tree) for e in error.errors())
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config


def dump(config: Config) -> str:
    """The configuration as YAML, defaults included; :func:`load` reads it back unchanged."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _read(source: str | Path | dict[str, Any] | Config | None) -> dict[str, Any]:
    if source is None:
        return {}
    if isinstance(source, Config):
        return source.model_dump()
    if isinstance(source, dict):
        return yaml.safe_load(yaml.safe_dump(source)) or {}
    path = Path(source)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot read the configuration file '{path}': {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"'{path}' is not valid YAML: {error}"]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"'{path}' must hold a mapping of sections, got {type(tree).__name__}"])
    return _numbers(tree)


def _number(text: str) -> float | None:
    """YAML 1.1 reads 3e-4 as a string; people mean the number."""
    try:
        return float(text) if "e" in text.lower() and text[:1] in "+-.0123456789" else None
    except ValueError:
        return None


def _numbers(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _numbers(v) for k, v in tree.items()}
    if isinstance(tree, str) and (number := _number(tree)) is not None:
        return number
    return tree


def _assign(tree: dict[str, Any], key: str, value: Any) -> list[str]:
    node = tree
    *parents, leaf = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            return [f"'{key}': '{part}' holds the value {child!r}, it has no keys of its own"]
        node = child
    node[leaf] = value
    return []


def _describe(error: Any, tree: dict[str, Any]) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key '{where}'" + _nearest(where)
    message = error["msg"].removeprefix("Value error, ")
    if not where or isinstance(error["input"], BaseModel | dict):
        return f"{where}: {message}" if where else message
    return f"{where}: {message} (got {error['input']!r})"


def _nearest(where: str) -> str:
    keys = list(_keys(Config))
    close = difflib.get_close_matches(where, keys, n=1, cutoff=0.6)
    leaf = where.rpartition(".")[2]
    by_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    if not close and not by_leaf:
        leaves = {k.rpartition(".")[2]: k for k in keys}
        by_leaf = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
    best = by_leaf or close
    return (
        f": did you mean '{best[0]}'?"
        if best
        else f"; the sections are {', '.join(Config.model_fields)}"
    )


def _suggest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f": did you mean '{close[0]}'?" if close else ""


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
