"""The table of algorithms: the only place where a name becomes an algorithm.

Other packages add rows by the entry-point group ``fedvlm.algorithms``: name -> :class:`Entry`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from fedvlm.algorithms import checks
from fedvlm.algorithms.auto import auto
from fedvlm.algorithms.averaging import Averaging, ServerStep, averaging
from fedvlm.algorithms.base import Algorithm
from fedvlm.algorithms.branches import BranchesConfig, branches
from fedvlm.algorithms.client_terms import scaffold
from fedvlm.algorithms.dual import fedalt, feddpa, pair
from fedvlm.algorithms.ending import ended
from fedvlm.algorithms.entry import GROUP, HANDED_OVER, Entry, loaded
from fedvlm.algorithms.exact import exact
from fedvlm.algorithms.experts import ExpertsConfig, experts
from fedvlm.algorithms.flex import ProductConfig, flexlora, hetlora, ranked
from fedvlm.algorithms.mixing import DittoConfig, MixConfig, apfl, ditto, mixing
from fedvlm.algorithms.relevance import RelevanceConfig, relevance
from fedvlm.algorithms.residual import ResidualConfig, corrected
from fedvlm.algorithms.rotation import rotating
from fedvlm.algorithms.server import optimized
from fedvlm.algorithms.sharing import IAT, ShareConfig, alternating, sharing
from fedvlm.algorithms.similarity import ClusteredConfig, SimilarConfig, clustered, similar
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.settings.method import AlgorithmConfig, LoraConfig
from fedvlm.settings.sections import Config
from fedvlm.settings.train import TrainConfig
from fedvlm.tree import module

ALIASES = {"fedavg": "lora", "fedit": "lora"}
"""Other common names of algorithms."""

OWN = "own"
"""The name of an algorithm that was given as an object; ``own:LABEL`` in a comparison."""


def _shares(
    share: dict[str, str], train: str = "AB", mu: float | None = None
) -> Callable[..., Any]:
    def build(c: Averaging, lora: LoraConfig) -> Algorithm:
        return averaging(sharing(share, train=train, server_lr=c.server_lr), c, mu)

    return build


_fedavg = _shares({"": "AB"})

TABLE: dict[str, Entry] = {
    "auto": Entry(
        "A and B",
        "B",
        "ours, the start of B by validation",
        lambda c, lora: auto(server_lr=c.server_lr),
        ServerStep,
        ranks=True,
        partial=checks.OWN_START,
        unprotected=checks.BY_VALIDATION,
        check=checks.validation,
    ),
    "plora": Entry("B", "A", "FedVLM, arXiv 2507.17088", _shares({"": "B"}), Averaging, ranks=True),
    "lora": Entry(
        "A and B",
        "nothing",
        "FedIT, arXiv 2305.05644 (FedAvg of both factors)",
        _fedavg,
        Averaging,
        ranks=True,
    ),
    "fedsa": Entry(
        "A", "B", "FedSA-LoRA, arXiv 2410.01463", _shares({"": "A"}), Averaging, ranks=True
    ),
    "ffa": Entry(
        "B",
        "nothing (A is frozen)",
        "FFA-LoRA, arXiv 2403.12313",
        _shares({"": "B"}, "B"),
        Averaging,
        ranks=True,
    ),
    "fedalora": Entry(
        "B",
        "A",
        "Fed-ALoRA, arXiv 2509.25414 (for equal ranks: plora)",
        _shares({"": "B"}),
        Averaging,
        ranks=True,
    ),
    "rolora": Entry(
        "B in odd rounds, A in even ones",
        "nothing",
        "RoLoRA, arXiv 2502.01755",
        lambda c, lora: averaging(alternating(server_lr=c.server_lr), c),
        Averaging,
        ranks=True,
    ),
    "iat": Entry(
        "B of the image side, A of language",
        "the other factors",
        "IAT, arXiv 2606.08687 (for medical segmentation; its map, no regularizer)",
        _shares(IAT),
        Averaging,
        ranks=True,
    ),
    "share": Entry(
        "what algorithm.share names",
        "the rest",
        "a map of your own",
        lambda c, lora: averaging(sharing(c.share, server_lr=c.server_lr), c),
        ShareConfig,
        ranks=True,
        fits=checks.share_map,
    ),
    "local": Entry(
        "nothing",
        "A and B",
        "training alone, the baseline",
        lambda c, lora: sharing({}),
        ranks=True,
    ),
    "fedprox": Entry(
        "A and B",
        "nothing",
        "FedProx, arXiv 1812.06127",
        _shares({"": "AB"}, mu=0.01),
        Averaging,
        ranks=True,
    ),
    "scaffold": Entry(
        "A and B, and the change of its controls",
        "its controls",
        "SCAFFOLD, arXiv 1910.06378 (option II)",
        lambda c, lora: scaffold(server_lr=c.server_lr),
        ServerStep,
        ranks=True,
        unprotected=checks.CONTROLS,
        check=checks.plain_sgd,
    ),
    "mix": Entry(
        "A and B",
        "A and B",
        "interpolation, cf. APFL, arXiv 2003.13461",
        lambda c, lora: mixing(c.mix, server_lr=c.server_lr),
        MixConfig,
        ranks=True,
        partial=checks.OWN_START,
    ),
    "ditto": Entry(
        "A and B, shared model",
        "A and B, its own model",
        "Ditto, arXiv 2012.04221",
        lambda c, lora: ditto(c.prox_mu, server_lr=c.server_lr),
        DittoConfig,
        ranks=True,
    ),
    "apfl": Entry(
        "A and B, shared model",
        "A and B, its own model",
        "APFL, arXiv 2003.13461 (fixed mixture)",
        lambda c, lora: apfl(c.mix, server_lr=c.server_lr),
        MixConfig,
        ranks=True,
        check=checks.own_part,
    ),
    "fedex": Entry(
        "A and B",
        "nothing",
        "FedEx-LoRA, arXiv 2410.09432",
        lambda c, lora: exact(lora.rank, lora.spared),
        spare=True,
        partial=checks.VALUES,
    ),
    "flora": Entry(
        "A and B",
        "nothing",
        "FLoRA, arXiv 2409.05976",
        lambda c, lora: exact(lora.rank, lora.spared, restart=True),
        spare=True,
        partial=checks.VALUES,
    ),
    "flexlora": Entry(
        "A and B",
        "nothing",
        "FlexLoRA, arXiv 2402.11505",
        lambda c, lora: optimized(flexlora(), c.server),
        ProductConfig,
        ranks=True,
        partial="makes new factors every round, to which a rest of old factors cannot be added",
    ),
    "hetlora": Entry(
        "A and B",
        "nothing",
        "HetLoRA, arXiv 2401.06432 (without self-pruning)",
        lambda c, lora: optimized(hetlora(), c.server),
        ProductConfig,
        ranks=True,
    ),
    "lorafair": Entry(
        "A and B",
        "nothing",
        "LoRA-FAIR, arXiv 2411.14961 (by squared distance)",
        lambda c, lora: averaging(corrected(c.ridge, server_lr=c.server_lr), c),
        ResidualConfig,
        ranks=True,
    ),
    "fedrot": Entry(
        "A and B, turned to the download",
        "nothing",
        "FedRot-LoRA, arXiv 2602.23638 (full turns)",
        lambda c, lora: averaging(rotating(server_lr=c.server_lr), c),
        Averaging,
        ranks=True,
    ),
    "pair": Entry(
        "half of the ranks",
        "the other half",
        "a shared and an own adapter",
        lambda c, lora: pair(lora.rank, server_lr=c.server_lr),
        ServerStep,
        check=checks.even_rank,
    ),
    "feddpa": Entry(
        "half of the ranks",
        "the other half",
        "FedDPA-T, arXiv 2403.19211 (fixed weights: those by instance are no LoRA)",
        lambda c, lora: feddpa(lora.rank, server_lr=c.server_lr),
        ServerStep,
        check=checks.even_rank,
    ),
    "fedalt": Entry(
        "its half of the ranks",
        "its half of the ranks",
        "FedALT, arXiv 2503.11880 (without its mixer, which is no LoRA)",
        lambda c, lora: fedalt(lora.rank),
        partial=checks.OWN_START,
        check=checks.even_rank,
    ),
    "fedmosaic": Entry(
        "its half of the ranks",
        "its half of the ranks",
        "RELA of FedMosaic, arXiv 2506.11024 (no gate, no Co-LoRA)",
        lambda c, lora: relevance(lora.rank, c.temperature),
        RelevanceConfig,
        partial=checks.OWN_START,
        check=checks.even_rank,
    ),
    "similar": Entry(
        "A and B",
        "nothing",
        "own means, cf. FedAMP, arXiv 2007.03797",
        lambda c, lora: similar(c.temperature),
        SimilarConfig,
        ranks=True,
    ),
    "clustered": Entry(
        "A and B",
        "nothing",
        "groups' means, cf. clustered FL, arXiv 1910.01991",
        lambda c, lora: clustered(c.clusters),
        ClusteredConfig,
        ranks=True,
    ),
    "fedlease": Entry(
        "A and B",
        "nothing",
        "FedLEASE, arXiv 2509.15087 (its groups, without router)",
        lambda c, lora: experts(c.experts),
        ExpertsConfig,
        ranks=True,
    ),
    "fedtree": Entry(
        "A and B",
        "nothing",
        "FedTreeLoRA, arXiv 2603.13282 (its tree, without mixing)",
        lambda c, lora: branches(c.threshold, c.window),
        BranchesConfig,
        ranks=True,
    ),
    "centralized": Entry(
        "its rows: no federation",
        "nothing",
        "the upper reference, on all rows",
        lambda c, lora: sharing({"": "AB"}),
        pools=True,
    ),
    "centralized+name": Entry(
        "its rows: no federation",
        "nothing",
        "the same, client named in the prompt",
        lambda c, lora: sharing({"": "AB"}),
        pools=True,
        names=True,
    ),
}


def find(name: str) -> Entry:
    """The entry of a name, which may be an alias or an algorithm of an installed package.

    Raises:
        KeyError: the name is unknown.
        FedVLMError: an installed package's entry cannot be loaded.
    """
    name = ALIASES.get(name, name)
    if name in TABLE:
        return TABLE[name]
    if name.partition(":")[0] == OWN:
        return HANDED_OVER
    return _outside(name)


@cache
def _outside(name: str) -> Entry:
    (point,) = list(entry_points(group=GROUP, name=name))[:1] or (None,)
    if point is None:
        raise KeyError(name)
    return loaded(point)


def names() -> list[str]:
    """All names: the table's, then those of installed packages."""
    outside = {point.name for point in entry_points(group=GROUP)}
    hidden = {*TABLE, *ALIASES, *(name for name in outside if name.partition(":")[0] == OWN)}
    return [*TABLE, *sorted(outside - hidden)]


def build(
    config: AlgorithmConfig, lora: LoraConfig | None = None, train: TrainConfig | None = None
) -> Algorithm:
    """The configured algorithm.

    Args:
        config: the section ``algorithm``. A plain :class:`AlgorithmConfig` stands for the defaults
            of its algorithm.
        lora: the section ``lora``; None: its defaults.
        train: the section ``train``, with the ending of the run; None: without an ending.

    Raises:
        FedVLMError: the run was started with an object, which the configuration does not hold.
    """
    lora, entry = lora or LoraConfig(), find(config.name)
    settings = config if isinstance(config, entry.settings) else entry.settings(name=config.name)
    built = entry.build(settings, lora)
    if not isinstance(built, Algorithm):
        raise FedVLMError(
            f"algorithm '{config.name}': build(settings, lora) of its entry returns a "
            f"fedvlm.Algorithm, got {built!r:.80}"
        )
    if train:  # the steps of local tuning are among the rounds' steps where all rows are pooled
        finish = 0 if entry.pools else train.tuning
        built = ended(built, train.model_copy(update={"finish_steps": finish}))
    return ranked(built, lora.ranks, lora.rank)


def of_run(config: Config, given: Algorithm | None = None) -> Algorithm:
    """The algorithm of a run, with the run's ending.

    Args:
        config: the configuration of the run.
        given: the algorithm as an object; None: the configured algorithm.
    """
    train = config.train
    return ended(given, train) if given else build(config.algorithm, config.lora, train)


def taken(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``algorithm`` for another name, with those of ``settings`` that it has."""
    known = find(name).settings.model_fields
    return {k: v for k, v in settings.items() if k in known} | {"name": name}


def spare_ranks(name: str, lora: LoraConfig) -> int:
    """The number of ranks of the adapter that no client trains."""
    return lora.spared if find(name).spare else 0


def adapter_of(config: Any) -> LoraConfig:
    """The section ``lora`` of a run's configuration, with the algorithm's spare ranks."""
    spare = spare_ranks(config.algorithm.name, config.lora)
    return config.lora.model_copy(update={"spare": spare or None})


def check_fit(config: AlgorithmConfig, adapter: Iterable[str]) -> None:
    """Refuses settings that do not fit the adapted modules.

    Raises:
        ConfigError: names these settings, and some of the adapted modules.
    """
    problems = find(config.name).fits(config, sorted({module(name) for name in adapter}))
    if problems:
        raise ConfigError(problems)
