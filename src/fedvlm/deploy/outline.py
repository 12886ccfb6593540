"""What a run would send from a site, and what would stay there, in words.

The algorithm itself makes the messages, from an adapter that has shapes and no values. Rows and
weights are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fedvlm.algorithms.dry import rehearse
from fedvlm.algorithms.ending import HEAD
from fedvlm.algorithms.table import find, of_run
from fedvlm.engines.compress import compression
from fedvlm.engines.stages import packed
from fedvlm.layers import part
from fedvlm.metrics import METRICS, measured
from fedvlm.planning import footprint
from fedvlm.rounds.schedule import Round, plan
from fedvlm.settings.sections import Config
from fedvlm.tree import factor, module, saved_bytes

PARTS = ("vision", "projector", "language")
NUMBERS = 12  # numbers of rounds that a line names


@dataclass
class Shape:
    """Rounds with messages of the same names and sizes.

    Attributes:
        names: the names of the tensors that are sent.
        up: bytes of the upload.
        down: bytes of the download.
        rounds: their numbers.
    """

    names: tuple[str, ...]
    up: int
    down: int
    rounds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Outline:
    """The two lists that a person reads before a decision."""

    sent: tuple[str, ...]
    stays: tuple[str, ...]


def outline(config: Config, site: str, tell_rows: bool) -> Outline:
    """Describes a run at a site. At most the model's configuration is read.

    Args:
        config: the run's settings at the site.
        site: the name of the site.
        tell_rows: whether the server learns numbers of rows.

    Raises:
        FedVLMError: the run is impossible with this model.
    """
    algorithm = of_run(config)
    rounds = list(plan(config, algorithm, (site,)))
    shapes, trained, kept = _messages(config, site, rounds)
    private = config.privacy.local
    shared = {name for shape in shapes for name in shape.names}
    own = {**trained, **{name: None for name in kept if not name.startswith(HEAD)}}
    personal = [name for name in own if name not in shared]
    sent = [
        *(_of_shape(shape) for shape in shapes if shape.names),
        *(_protected(config) if private else _measured(config, rounds)),
        "once: the initial adapter and its settings, a function of the model and the run's seed",
    ]
    if not any(shape.names for shape in shapes):
        sent[0:0] = ["no factor"]
    if tell_rows and not private:
        sent.append("the numbers of training, validation and test rows")
    sent.append("messages about refused and failed requests")
    stays = ["pictures, questions and answers, and the models' answers to held-out rows"]
    if private:
        stays.append("scores of held-out rows, training losses and the numbers of rows")
    stays.append(f"personal: {factors(personal)}" if personal else "no factor is personal")
    if also := [name for name in kept if name in shared]:
        stays.append(f"the site's own {factors(also)}, of which a form is sent as above")
    if any(name.startswith(HEAD) for name in kept):
        stays.append("the average of the site's models over the rounds, and its tuned model")
    return Outline(tuple(sent), tuple(stays))


def _losses(secure: bool) -> list[str]:
    """The messages after a round of training beside the upload."""
    if not secure:
        return [
            "after each round of training: the mean training loss, and the seconds that it took"
        ]
    return [
        "with secure aggregation: the factors and the mean training loss leave the site under "
        "masks, and the server opens their sum over at least three sites (min_sites)",
        "after each round of training: the seconds that it took",
    ]


def _messages(
    config: Config, site: str, rounds: Sequence[Round]
) -> tuple[list[Shape], dict[str, None], list[str]]:
    """The messages of all rounds by their form, and the names of trained and of kept tensors."""
    from fedvlm.models import load, lora

    algorithm = of_run(config)
    bare = load.load_shapes(config.model)
    model = lora.attach(bare, config.lora.model_copy(update={"spare": None}), config.seed)
    adapter = footprint.shapes(model, config)
    stages = () if find(config.algorithm.name).pools else compression(config.wire)
    state = algorithm.init(adapter)
    shapes: dict[tuple[object, ...], Shape] = {}
    trained: dict[str, None] = {}
    kept: dict[str, None] = {}
    for round_ in rounds:
        visit = round_.visits({site: 1.0})[site]
        down = algorithm.send(state, visit)
        found = rehearse(algorithm, adapter, visit, down, 1)
        message, _ = packed(stages, found.sent.up, down, {}, visit)
        shape = Shape(tuple(found.sent.up), saved_bytes(message), saved_bytes(down))
        key = shape.names, shape.up, shape.down
        shapes.setdefault(key, shape).rounds.append(round_.number)
        for stretch in found.stretches:
            trained |= dict.fromkeys(name for name in adapter if stretch.trains(name))
        kept |= dict.fromkeys(found.sent.keep)
    return list(shapes.values()), trained, list(kept)


def _of_shape(shape: Shape) -> str:
    count = len(shape.rounds)
    which = "each round" if count == 1 else f"each of {count} rounds"
    return (
        f"in {which} ({_numbers(shape.rounds)}): {factors(shape.names)}; {size(shape.up)} up and "
        f"{size(shape.down)} down, {size(shape.up * count)} up in all"
    )


def _numbers(rounds: Sequence[int]) -> str:
    """Numbers of rounds; a range where they follow one another."""
    first, last = rounds[0], rounds[-1]
    if len(rounds) == 1:
        return f"round {first}"
    if last - first == len(rounds) - 1:
        return f"rounds {first} to {last}"
    if len(rounds) <= NUMBERS:
        return "rounds " + ", ".join(map(str, rounds))
    return f"rounds {', '.join(map(str, rounds[:NUMBERS]))} and others up to {last}"


def factors(names: Iterable[str]) -> str:
    """Names of tensors as words: which factors of how many modules in which parts of the model."""
    return "; ".join(_factors(list(names))) or "nothing"


def _factors(names: Sequence[str]) -> Iterator[str]:
    plain: dict[str, Counter[str]] = {}
    others: Counter[str] = Counter()
    for name in names:
        head = name.split("/", 1)[0] if "/" in name else ""
        try:
            found = factor(name)
        except ValueError:
            others[head or name] += 1
            continue
        beside = f" (as '{head}')" if head else ""
        plain.setdefault(f"{found}{beside}", Counter())[part(module(name.split("/")[-1]))] += 1
    alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for kind in sorted(plain):
        where = tuple((p, plain[kind][p]) for p in PARTS if plain[kind][p])
        alike.setdefault(where, []).append(kind)
    for where, letters in alike.items():
        count, listed = sum(n for _, n in where), ", ".join(f"{n} {p}" for p, n in where)
        head = "factors" if len(letters) > 1 else "factor"
        yield f"{head} {' and '.join(letters)} of {count} modules ({listed})"
    for head, count in sorted(others.items()):
        yield f"'{head}', {count} tensor{'s' * (count > 1)} beside the factors"


def _measured(config: Config, rounds: Sequence[Round]) -> Iterator[str]:
    """The numbers that a run without differential privacy sends."""
    yield from _losses(config.wire.secure)
    times = sum(round_.evaluate for round_ in rounds)
    names = [name for name in METRICS if name in measured(config.objective.name)]
    rows = f"at most {config.eval.max_rows}" if config.eval.max_rows else "all"
    yield (
        f"mean scores ({', '.join(names)}) of the models on {rows} held-out rows "
        f"({config.eval.split}): before training and {times} more times"
    )


def _protected(config: Config) -> Iterator[str]:
    """What differential privacy does to the factors that are sent."""
    asked = config.privacy
    yield (
        f"the factors are trained under differential privacy: unit '{asked.unit}', epsilon "
        f"{asked.epsilon:g} at delta {asked.delta:g} for the whole run"
    )
    if config.wire.secure:
        yield (
            "with secure aggregation: the factors leave the site under masks, and the server opens "
            "their sum over at least three sites (min_sites)"
        )
    yield "after each round of training: the seconds that it took, to ten seconds"


def size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
