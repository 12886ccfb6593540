"""The sections of a run's configuration: one tree of frozen pydantic models.

Every setting has its default and its range here. :mod:`fedvlm.config` reads and writes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from fedvlm.errors import shown
from fedvlm.settings.aggregate import AggregateConfig
from fedvlm.settings.method import AlgorithmConfig as AlgorithmConfig
from fedvlm.settings.method import Filled, Fraction, Positive, Ratio, Section, Whole
from fedvlm.settings.method import LoraConfig as LoraConfig
from fedvlm.settings.model import ModelConfig as ModelConfig
from fedvlm.settings.pictures import Formats, Window
from fedvlm.settings.privacy import PrivacyConfig
from fedvlm.settings.scoring import EvalConfig as EvalConfig
from fedvlm.settings.train import TrainConfig

_FORM = "a mapping of clients to row numbers, such as {north: [0, 1, 2], south: [3, 4, 5]}"


def checked(given: Any) -> dict[str, list[int]]:
    """The lists of row numbers, checked: whole numbers, each of which occurs once.

    Raises:
        ValueError: the lists are wrong; the message names the mistake.
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"lists is {_FORM}; got {shown(given)}")
    lists: dict[str, list[int]] = {}
    for client, rows in given.items():
        if not isinstance(rows, list | tuple) or not rows:
            raise ValueError(f"client {shown(client)} has {shown(rows)}; lists is {_FORM}")
        wrong = [row for row in rows if type(row) is not int or not 0 <= row < 2**53]
        if wrong:
            raise ValueError(
                f"client {shown(client)} lists {shown(wrong[0])}; row numbers are 0, 1, 2 …"
            )
        lists[str(client)] = list(rows)
    counts = Counter(row for rows in lists.values() for row in rows)
    twice = [row for row, count in counts.items() if count > 1]
    if twice:
        of = [client for client, rows in lists.items() if twice[0] in rows]
        raise ValueError(
            f"{len(twice)} rows are listed more than once, such as row {twice[0]} (by "
            f"{', '.join(of)}): a row belongs to one client"
        )
    return lists


class Columns(Section):
    """The names of the data's columns. The defaults are those of RLAIF-V."""

    image: Filled = Field("image", description="the picture, or a list: bytes, or paths of files")
    question: Filled = Field("question", description="the question about the picture")
    answer: Filled = Field("chosen", description="the answer to learn")
    rejected: Filled = Field("rejected", description="the worse answer, for objective.name=dpo")


class ScenesConfig(Section):
    """The bundled data set, used where ``data.path`` is empty."""

    style: Literal["iid", "label", "covariate", "concept", "quantity", "mixed", "odd"] = Field(
        "mixed", description="kind of the differences between sites"
    )
    strength: Fraction = Field(1.0, description="size of these differences, 0 to 1")
    sites: Positive = Field(8, description="number of sites")
    rows: Positive = Field(120, description="mean number of rows a site")


class DataConfig(Section):
    """The source of the rows, and the split of each client's rows."""

    path: Filled | None = Field(
        None,
        description="parquet, JSONL, image folder, or org/name[@revision]; empty: scenes",
    )
    split: str = Field("train", description="the split to read, of a source with several splits")
    columns: Columns = Columns()
    max_rows: Positive | None = Field(
        None, description="size of a seeded sample of the rows; empty: all rows"
    )
    max_length: Positive | None = Field(
        None, description="most tokens of prompt and answer together; empty: the model's limit"
    )
    cache: Whole = Field(
        4096,
        description="MiB on disk for encoded rows, shared with later runs; 0: no cache",
    )
    max_decoded: Positive = Field(
        256, description="most MiB of a row's decoded pictures (3 bytes a pixel); more: unusable"
    )
    max_images: Positive = Field(16, description="most pictures of a row; more: unusable row")
    max_pixels: Positive | None = Field(
        None, description="larger pictures are shrunk to this many pixels; empty: no limit"
    )
    formats: Formats | None = Field(
        None, description="formats that are opened, such as [PNG, JPEG, DICOM]; empty: all"
    )
    window: Window | None = Field(
        None,
        description="[low, high] of pictures of more than 8 bits, mapped to black and white; "
        "empty: by content",
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="fail: stop at a corrupt row; skip: leave the row out"
    )
    max_expansion: Positive = Field(
        50, description="limit on decoded parquet: 256 MiB and this many times the files' size"
    )
    val_fraction: Fraction = Field(0.1, description="share of a client's rows for validation")
    test_fraction: Fraction = Field(0.25, description="share of a client's rows for the test")
    split_seed: Whole | None = Field(
        None,
        description="seed of the sample of max_rows and of the split of a client's rows, so that "
        "the same rows stay held out in other runs; empty: the run's seed",
    )
    scenes: ScenesConfig = ScenesConfig()


class PartitionConfig(Section):
    """The partition of the rows into clients."""

    kind: Literal["auto", "iid", "dirichlet", "shards", "column", "quantity", "explicit"] = Field(
        "auto", description="auto: by column if it is set, by site for scenes, else iid"
    )
    clients: Positive = Field(
        8, description="number of clients (kind=column: one per value; explicit: one per list)"
    )
    column: str | None = Field(
        None, description="kind=column: the client of a row; dirichlet, shards: its label"
    )
    clusters: Annotated[int, Field(ge=2)] | None = Field(
        None, description="number of clusters of answers, as labels; empty: use column"
    )
    lists: dict[str, list[int]] | str | None = Field(
        None, description="kind=explicit: client -> row numbers, or a JSON or YAML file with this"
    )
    alpha: Annotated[float, Field(gt=0)] = Field(0.3, description="Dirichlet concentration")
    shards: Positive = Field(2, description="shards a client (kind=shards)")
    exponent: Annotated[float, Field(ge=0)] = Field(
        1.2, description="exponent of the power law (kind=quantity)"
    )
    min_rows: Positive = Field(10, description="fewest rows of a client")
    splits: Literal["together", "alone"] = Field(
        "together",
        description="alone: train, val and test of a client depend on its own rows only, like at a "
        "site of fedvlm deploy",
    )

    @field_validator("lists", mode="before")
    @classmethod
    def _rows_are_listed_once(cls, given: Any) -> Any:
        return given if given is None or isinstance(given, str) else checked(given)

    @model_validator(mode="after")
    def _settings_agree(self) -> PartitionConfig:
        wrong = []
        if self.kind == "column" and not self.column:
            wrong.append("kind=column needs partition.column, the column with the clients' names")
        if self.kind == "explicit" and not self.lists:
            wrong.append("kind=explicit needs partition.lists, the row numbers of each client")
        if self.lists is not None and self.kind != "explicit":
            wrong.append(f"partition.lists needs kind=explicit (got kind={self.kind})")
        if self.clusters and self.column:
            wrong.append(
                "set partition.column or partition.clusters, not both "
                f"(got column={self.column}, clusters={self.clusters})"
            )
        elif self.clusters and self.kind in ("auto", "column"):
            wrong.append(
                "partition.clusters labels the rows of kind=dirichlet, shards, iid, quantity or "
                f"explicit (got kind={self.kind})"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class ObjectiveConfig(Section):
    """The training objective: the answers, or the preference of answers to rejected answers."""

    name: Literal["sft", "dpo"] = Field(
        "sft", description="sft: cross-entropy on the answers; dpo: direct preference optimization"
    )
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid", description="loss of dpo; ipo: arXiv 2310.12036"
    )
    beta: Annotated[float, Field(gt=0)] = Field(
        0.1, description="dpo: weight of the reference, which is the model without adapter"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="dpo, sigmoid: assumed share of reversed preferences"
    )

    @model_validator(mode="after")
    def _smoothing_has_a_meaning(self) -> ObjectiveConfig:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} has no meaning for loss=ipo: "
                "set it to 0, or loss=sigmoid"
            )
        return self


class WireConfig(Section):
    """The compression of uploads, the server's limit on them, and secure aggregation."""

    compress: Literal["none", "bf16", "int8", "topk"] = Field(
        "none", description="compression of uploads; int8 and topk send the rest in later rounds"
    )
    topk: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="share of an upload's elements that is sent (compress=topk)"
    )
    max_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="largest norm of an upload's change, else it is rejected; empty: any"
    )
    secure: bool = Field(
        False, description="secure aggregation: the server gets the sum of the uploads, and no more"
    )
    bound: Ratio = Field(
        4.0, description="secure: largest weighted change of a number, else the site gives up"
    )

    @model_validator(mode="after")
    def _settings_of_a_sum_have_a_meaning(self) -> WireConfig:
        if self.secure and self.compress != "none":
            raise ValueError(
                f"secure needs compress=none (got {self.compress}): a masked upload has 32 random "
                "bits a number, which nothing can compress"
            )
        if not self.secure and self.bound != 4.0:
            raise ValueError(
                f"bound={self.bound:g} has no meaning without secure aggregation: leave it out, or "
                "set secure=true"
            )
        return self

    @model_validator(mode="after")
    def _share_has_a_meaning(self) -> WireConfig:
        if self.compress != "topk" and self.topk != 0.1:
            raise ValueError(
                f"topk={self.topk:g} has no meaning for compress={self.compress}: leave it out, or "
                "set compress=topk"
            )
        return self


class EngineConfig(Section):
    """How a cohort is trained."""

    name: Literal["cohort", "reference"] = Field(
        "cohort", description="cohort: many clients in a pass; reference: one after another"
    )
    memory: Positive | Literal["auto"] = Field(
        "auto",
        description="MiB for the clients of a pass, which sets their number; auto: half of the "
        "machine's memory, or four fifths of the GPU's less the model",
    )
    clients: Positive | None = Field(None, description="clients in a pass; empty: from memory")
    micro_batch: Positive | None = Field(
        None, description="rows of a client computed at a time; empty: the whole batch"
    )
    cache: Whole = Field(
        1024, description="MiB for image features that LoRA does not change; 0: no cache"
    )
    cache_disk: Whole = Field(8192, description="MiB on disk for image features that exceed cache")
    threads: Positive | None = Field(
        None,
        description="torch threads; empty: 1 for models under 10 M parameters, else all cores",
    )


class Config(Section):
    """The whole configuration of a run; ``fedvlm run --print-config`` prints it with defaults."""

    output: Filled = Field("runs/run", description="folder of this run")
    seed: Whole = Field(0, description="of the partition, the batches and the initial adapter")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    lora: LoraConfig = LoraConfig()
    algorithm: SerializeAsAny[AlgorithmConfig] = AlgorithmConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    wire: WireConfig = WireConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    aggregate: AggregateConfig = AggregateConfig()
    eval: EvalConfig = EvalConfig()
    engine: EngineConfig = EngineConfig()
    report_to: tuple[Literal["trackio", "wandb", "mlflow", "tensorboard"], ...] = Field(
        (), description="experiment trackers that get the scores by round: trackio, wandb, …"
    )

    @model_validator(mode="before")
    @classmethod
    def _a_sum_has_a_plain_mean(cls, given: Any) -> Any:
        """Secure aggregation has ``aggregate.kind=mean``, unless another kind is asked for."""
        wire, how = (given.get(name) for name in ("wire", "aggregate"))
        secure = wire.get("secure") if isinstance(wire, Mapping) else getattr(wire, "secure", False)
        if secure in (True, "true") and (how is None or isinstance(how, dict)):
            return {**given, "aggregate": {"kind": "mean", **(how or {})}}
        return given

    @model_validator(mode="after")
    def _a_sum_is_not_made_robust(self) -> Config:
        if self.wire.secure and self.aggregate.kind != "mean":
            raise ValueError(
                f"aggregate.kind={self.aggregate.kind} compares single uploads, and wire.secure "
                "shows the server their sum only: set aggregate.kind=mean, or wire.secure=false"
            )
        return self

    @model_validator(mode="after")
    def _fractions_leave_rows(self) -> Config:
        held_out = self.data.val_fraction + self.data.test_fraction
        if held_out >= 1.0:
            raise ValueError(
                f"data.val_fraction + data.test_fraction is {held_out:g}: no rows are left to train"
            )
        return self

    @model_validator(mode="after")
    def _metric_is_measured(self) -> Config:
        if self.eval.metric == "reward_accuracy" and self.objective.name != "dpo":
            raise ValueError(
                "eval.metric=reward_accuracy compares answers with rejected ones: it needs "
                f"objective.name=dpo (got {self.objective.name})"
            )
        return self

    @property
    def metric(self) -> str:
        """The main metric."""
        chosen = {"sft": "exact_match", "dpo": "reward_accuracy"}[self.objective.name]
        return self.eval.metric or chosen
