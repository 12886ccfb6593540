"""The table of algorithms: the only place where a name becomes an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedvlm.algorithms import mixing as mixes
from fedvlm.algorithms.auto import auto
from fedvlm.algorithms.base import NOBODY, Algorithm, Client, Phase, State, Term, Upload, Work
from fedvlm.algorithms.client_terms import proximal, scaffold
from fedvlm.algorithms.dual import fedalt, feddpa, pair
from fedvlm.algorithms.exact import exact
from fedvlm.algorithms.flex import flexlora, hetlora, ranked
from fedvlm.algorithms.server import optimized
from fedvlm.algorithms.sharing import IAT, alternating, sharing, stopped, tuned
from fedvlm.algorithms.similarity import clustered, similar
from fedvlm.engines.compress import compressed
from fedvlm.errors import ConfigError
from fedvlm.layers import matcher
from fedvlm.tree import module

if TYPE_CHECKING:
    from fedvlm.settings.sections import AlgorithmConfig, Config, LoraConfig, WireConfig

__all__ = [
    "NOBODY",
    "TABLE",
    "Algorithm",
    "Client",
    "Entry",
    "Phase",
    "State",
    "Term",
    "Upload",
    "Work",
    "build",
    "check_config",
    "check_share",
    "meaningful",
    "spare_ranks",
]


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        sends: what leaves a client.
        keeps: what is personal and stays.
        source: the paper.
        build: from the settings, and the adapter's, to the algorithm.
        settings: of ``algorithm`` (and ``lora.ranks``), those that mean something to it.
        spare: whether it needs ranks that no client trains.
        pools: whether all training rows are in one place; no federation.
        names: whether a question begins with its client's name.
        partial: why the rest of an upload may not be sent later (``wire.compress=topk``), if so.
        check: what is wrong with a run's settings for it, if anything is.
    """

    sends: str
    keeps: str
    source: str
    build: Callable[[AlgorithmConfig, LoraConfig], Algorithm]
    settings: tuple[str, ...] = ()
    spare: bool = False
    pools: bool = False
    names: bool = False
    partial: str = ""
    check: Callable[[Config], str] = lambda config: ""


OWN_START = "may begin a round at a client's own factors, not at what it was sent"
VALUES = "uploads factors, not steps from what a client was sent"
MEAN = ("server_lr", "server", "prox_mu", "lora.ranks")
"""What any algorithm takes that averages the factors themselves."""


def _mean(algorithm: Algorithm, c: AlgorithmConfig, mu: float | None = None) -> Algorithm:
    """With the server's optimizer and the clients' proximal term."""
    return proximal(optimized(algorithm, c.server), mu if c.prox_mu is None else c.prox_mu)


def _shares(share: dict[str, str], train: str = "AB") -> Callable[..., Algorithm]:
    return lambda c, lora: _mean(sharing(share, train=train, server_lr=c.server_lr), c)


def _even_rank(config: Config) -> str:
    rank = config.lora.rank
    return f"it halves the rank: lora.rank must be even, got {rank}" if rank % 2 else ""


def _plain_sgd(config: Config) -> str:
    if config.train.optimizer == "sgd":
        return ""
    return "it corrects steps of plain SGD: set train.optimizer=sgd, and a train.lr for it"


def _validation(config: Config) -> str:
    if config.data.val_fraction:
        return ""
    return (
        "it goes by the loss on validation rows: data.val_fraction must be above 0"
        " (or choose another algorithm: plora needs no validation rows)"
    )


def _own_part(config: Config) -> str:
    if max(config.algorithm.mix.values()) < 1:
        return ""
    return "it needs a model of its own: algorithm.mix_a and algorithm.mix_b must be below 1"


TABLE: dict[str, Entry] = {
    "auto": Entry(
        "A and B",
        "A and B",
        "ours, the start by validation",
        lambda c, lora: auto(c.ft_steps, c.ft_checks, server_lr=c.server_lr),
        ("ft_steps", "ft_checks", "server_lr", "lora.ranks"),
        partial=OWN_START,
        check=_validation,
    ),
    "plora": Entry("B", "A", "FedVLM, arXiv 2507.17088", _shares({"": "B"}), MEAN),
    "lora": Entry(
        "A and B",
        "nothing",
        "FedIT, arXiv 2305.05644 (FedAvg of both factors)",
        _shares({"": "AB"}),
        MEAN,
    ),
    "fedsa": Entry("A", "B", "FedSA-LoRA, arXiv 2410.01463", _shares({"": "A"}), MEAN),
    "ffa": Entry(
        "B", "nothing (A is frozen)", "FFA-LoRA, arXiv 2403.12313", _shares({"": "B"}, "B"), MEAN
    ),
    "fedalora": Entry(
        "B", "A", "Fed-ALoRA, arXiv 2509.25414 (for equal ranks: plora)", _shares({"": "B"}), MEAN
    ),
    "rolora": Entry(
        "B in odd rounds, A in even ones",
        "nothing",
        "RoLoRA, arXiv 2502.01755",
        lambda c, lora: _mean(alternating(server_lr=c.server_lr), c),
        MEAN,
    ),
    "iat": Entry(
        "B of the image side, A of language",
        "the other factors",
        "IAT, arXiv 2606.08687 (its map, without its regularizer)",
        _shares(IAT),
        MEAN,
    ),
    "share": Entry(
        "what algorithm.share says",
        "the rest",
        "own map of factors",
        lambda c, lora: _mean(sharing(c.share or {}, server_lr=c.server_lr), c),
        ("share", *MEAN),
    ),
    "local": Entry(
        "nothing",
        "A and B",
        "training alone, the baseline",
        lambda c, lora: sharing({}),
        ("lora.ranks",),
    ),
    "lora+ft": Entry(
        "A and B",
        "A and B, tuned after the last round",
        "FedAvg + local tuning, arXiv 2108.07313",
        lambda c, lora: tuned(_mean(sharing({"": "AB"}, server_lr=c.server_lr), c), c.ft_steps),
        ("ft_steps", *MEAN),
    ),
    "lora+es": Entry(
        "A and B",
        "A and B, tuned until validation rises",
        "FedAvg + local tuning, arXiv 2108.07313, stopped early",
        lambda c, lora: stopped(
            _mean(sharing({"": "AB"}, server_lr=c.server_lr), c), c.ft_steps, c.ft_checks
        ),
        ("ft_steps", "ft_checks", *MEAN),
        check=_validation,
    ),
    "fedprox": Entry(
        "A and B",
        "nothing",
        "FedProx, arXiv 1812.06127",
        lambda c, lora: _mean(sharing({"": "AB"}, server_lr=c.server_lr), c, mu=0.01),
        MEAN,
    ),
    "scaffold": Entry(
        "A and B, and the change of its controls",
        "its controls",
        "SCAFFOLD, arXiv 1910.06378 (option II)",
        lambda c, lora: scaffold(server_lr=c.server_lr),
        ("server_lr", "lora.ranks"),
        check=_plain_sgd,
    ),
    "mix": Entry(
        "A and B",
        "A and B",
        "interpolation, cf. APFL, arXiv 2003.13461",
        lambda c, lora: mixes.mixing(c.mix, server_lr=c.server_lr),
        ("mix_a", "mix_b", "server_lr", "lora.ranks"),
        partial=OWN_START,
    ),
    "ditto": Entry(
        "A and B, shared model",
        "A and B, its own model",
        "Ditto, arXiv 2012.04221",
        lambda c, lora: mixes.ditto(0.1 if c.prox_mu is None else c.prox_mu, server_lr=c.server_lr),
        ("prox_mu", "server_lr", "lora.ranks"),
    ),
    "apfl": Entry(
        "A and B, shared model",
        "A and B, its own model",
        "APFL, arXiv 2003.13461 (fixed mixture)",
        lambda c, lora: mixes.apfl(c.mix, server_lr=c.server_lr),
        ("mix_a", "mix_b", "server_lr", "lora.ranks"),
        check=_own_part,
    ),
    "fedex": Entry(
        "A and B",
        "nothing",
        "FedEx-LoRA, arXiv 2410.09432",
        lambda c, lora: exact(lora.rank, spare_ranks("fedex", lora)),
        ("lora.spare",),
        spare=True,
        partial=VALUES,
    ),
    "flora": Entry(
        "A and B",
        "nothing",
        "FLoRA, arXiv 2409.05976",
        lambda c, lora: exact(lora.rank, spare_ranks("flora", lora), restart=True),
        ("lora.spare",),
        spare=True,
        partial=VALUES,
    ),
    "flexlora": Entry(
        "A and B",
        "nothing",
        "FlexLoRA, arXiv 2402.11505",
        lambda c, lora: flexlora(),
        ("lora.ranks",),
        partial="factorizes anew every round, so that a rest has no ranks to be added to",
    ),
    "hetlora": Entry(
        "A and B",
        "nothing",
        "HetLoRA, arXiv 2401.06432 (without self-pruning)",
        lambda c, lora: hetlora(),
        ("lora.ranks",),
    ),
    "pair": Entry(
        "half of the ranks",
        "the other half",
        "a shared and an own adapter",
        lambda c, lora: pair(lora.rank, server_lr=c.server_lr),
        ("server_lr",),
        check=_even_rank,
    ),
    "feddpa": Entry(
        "half of the ranks",
        "the other half",
        "FedDPA-T, arXiv 2403.19211 (fixed weights)",
        lambda c, lora: feddpa(lora.rank, server_lr=c.server_lr),
        ("server_lr",),
        check=_even_rank,
    ),
    "fedalt": Entry(
        "its half of the ranks",
        "its half of the ranks",
        "FedALT, arXiv 2503.11880 (without its mixer)",
        lambda c, lora: fedalt(lora.rank),
        partial=OWN_START,
        check=_even_rank,
    ),
    "similar": Entry(
        "A and B",
        "nothing",
        "own means, cf. FedAMP, arXiv 2007.03797",
        lambda c, lora: similar(c.temperature),
        ("temperature", "lora.ranks"),
    ),
    "clustered": Entry(
        "A and B",
        "nothing",
        "groups' means, cf. clustered FL, arXiv 1910.01991",
        lambda c, lora: clustered(c.clusters),
        ("clusters", "lora.ranks"),
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


def build(
    config: AlgorithmConfig, lora: LoraConfig | None = None, wire: WireConfig | None = None
) -> Algorithm:
    """The algorithm that a config names.

    Args:
        config: the section ``algorithm``.
        lora: the adapter's; None: its defaults.
        wire: how uploads travel; None: as they are, as they do where nothing is federated.
    """
    from fedvlm.settings.sections import LoraConfig

    lora, entry = lora or LoraConfig(), TABLE[config.name]
    one = ranked(entry.build(config, lora), lora.ranks, lora.rank)
    return one if wire is None or entry.pools else compressed(one, wire)


def spare_ranks(name: str, lora: LoraConfig) -> int:
    """Ranks of the adapter that no client trains."""
    if not TABLE[name].spare:
        return 0
    return 4 * lora.rank if lora.spare is None else lora.spare


SETTINGS = ("server", "ft_checks", "prox_mu", "mix_a", "mix_b", "clusters", "temperature")
"""Those that are refused where they mean nothing; the older ones are ignored there."""


def meaningful(name: str, settings: dict[str, object]) -> dict[str, object]:
    """Settings of ``algorithm`` for another name: those that mean nothing to it are left out."""
    known = {*TABLE[name].settings, "server_lr", "ft_steps"}
    return {k: v for k, v in settings.items() if k in known} | {"name": name}


def check_config(config: Config) -> list[str]:
    """What is wrong with an algorithm's settings, and with the run's for this algorithm."""
    from fedvlm.settings.sections import AlgorithmConfig

    given, lora = config.algorithm, config.lora
    entry, default = TABLE[given.name], AlgorithmConfig()
    wrong = [
        f"algorithm.{name} has no meaning for algorithm.name={given.name}; leave it out"
        for name in SETTINGS
        if name not in entry.settings and getattr(given, name) != getattr(default, name)
    ]
    wrong += [
        f"lora.{name} has no meaning for algorithm.name={given.name}; leave it out"
        for name in ("ranks", "spare")
        if f"lora.{name}" not in entry.settings and getattr(lora, name) is not None
    ]
    if given.server.name != "none" and given.server_lr != 1.0:
        wrong.append(
            f"algorithm.server_lr={given.server_lr:g} is the step of a plain mean; with "
            f"algorithm.server.name={given.server.name} set algorithm.server.lr"
        )
    if entry.partial and config.wire.compress == "topk":
        wrong.append(
            "wire.compress=topk sends the rest of an upload later, and algorithm.name="
            f"{given.name} {entry.partial}: set wire.compress=int8"
        )
    if reason := entry.check(config):
        wrong.append(f"algorithm.name={given.name}: {reason}")
    return wrong


def check_share(config: AlgorithmConfig, adapter: Iterable[str]) -> None:
    """Refuses a share map with a pattern that no adapted module has.

    Raises:
        ConfigError: naming the patterns, and some of the modules that exist.
    """
    modules = sorted({module(name) for name in adapter})
    dead = [p for p in config.share or {} if not any(map(matcher(p), modules))]
    if dead:
        shown = ", ".join(modules[:4])
        raise ConfigError(
            [
                f"algorithm.share: the pattern '{p}' matches none of the {len(modules)} adapted "
                f"modules, such as {shown}"
                for p in dead
            ]
        )
