"""One client cannot decide the global model: not by a number of rows, and not by its numbers."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import pytest
import torch

import fedvlm
from fedvlm.algorithms.base import Visit
from fedvlm.algorithms.similarity import similar
from fedvlm.cli.deploy import line as shown
from fedvlm.cli.live import describe
from fedvlm.config import load
from fedvlm.deploy.downloads import write
from fedvlm.deploy.remote import Remote
from fedvlm.deploy.weights import Limits
from fedvlm.engines.cohort import CohortEngine
from fedvlm.engines.wire import Forms, Reply, norm
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.rounds import federate, robust
from fedvlm.rounds.fold import Fold
from fedvlm.rounds.robust import HELD, MOST, Trimmed, shrunk
from fedvlm.rounds.schedule import Round
from fedvlm.settings.aggregate import AggregateConfig
from fedvlm.store import files
from fedvlm.tree import change, digest
from test_federate import Stop, bytes_of
from toy import FEDAVG, INITIAL, A, B, close

MEAN, NORM = AggregateConfig(kind="mean"), AggregateConfig()
TRIMMED = AggregateConfig(kind="trimmed")
FIVE = [f"c{k}" for k in range(5)]
HUGE = 10**12


def moved(seed, size=1.0):
    """The initial adapter with a random change of a given norm."""
    draw = torch.Generator().manual_seed(seed)
    step = {n: torch.randn(t.shape, generator=draw) for n, t in INITIAL.items()}
    return {n: INITIAL[n] + size / norm(step) * t for n, t in step.items()}


def folded(uploads, settings=None, weights=None, algorithm=FEDAVG):
    """The fold of a round, and the server's state after the round."""
    visits = {c: Visit(c, (weights or {}).get(c, 10.0), round=1) for c in uploads}
    forms = Forms(algorithm, INITIAL)
    fold = Fold(visits, dict.fromkeys(uploads, INITIAL), forms, settings)
    for client, upload in uploads.items():
        assert fold.add(Reply(client, upload, visits[client].weight, 1.0)), fold.rejected
    return fold, fold.update(algorithm.init(INITIAL), 1)


def honest(count=5, size=1.0):
    return {c: moved(k, size) for k, c in enumerate(FIVE[:count])}


# The number of rows


def opened(rows, limits=None, known=None):
    """The server's engine after sites with these numbers of training rows opened a run."""
    events = []

    def call(site, header, blob, limit):
        if header["do"] == "adapter":
            return {"peft": {}}, write(INITIAL)
        counts = {"train": rows[site], "val": 1, "test": 1}
        return {"adapter": digest(INITIAL), "rows": counts}, b""

    engine = Remote(call, list(rows), limits, events.append)
    engine.open("run-1", load({"algorithm": {"name": "lora"}}), known=known)
    return engine, {e["site"]: e for e in events if e["event"] in ("capped", "failed")}


def test_a_site_that_claims_a_huge_number_of_rows_counts_for_twice_the_median():
    engine, events = opened({"north": 500, "south": 700, "liar": HUGE})
    assert engine.weights == {"north": 500.0, "south": 700.0, "liar": 1400.0}
    assert events["liar"]["claimed"] == HUGE
    assert shown(events["liar"]) == (
        "  liar: counts as 1400 rows, not 1e+12 (max_weight of project.yml)"
    )


def test_a_site_that_claims_an_impossible_number_of_rows_is_left_out():
    engine, events = opened({"north": 500, "south": 700, "liar": 2**53 - 1})
    assert engine.weights == {"north": 500.0, "south": 700.0}
    assert str(2**53 - 1) in events["liar"]["why"]


def test_sites_of_similar_size_count_for_the_rows_that_they_have():
    rows = {"a": 300, "b": 500, "c": 599}
    engine, events = opened(rows)
    assert engine.weights == rows
    assert not events


def test_a_registered_site_counts_for_the_rows_that_the_operator_registered():
    limits = Limits(rows={"large": 3000, "liar": 600})
    engine, events = opened({"large": 2900, "small": 300, "other": 310, "liar": HUGE}, limits)
    assert engine.weights == {"large": 2900.0, "small": 300.0, "other": 310.0, "liar": 600.0}
    assert list(events) == ["liar"]
    assert shown(events["liar"]).endswith("counts as 600 rows, not 1e+12 (rows of project.yml)")


def test_a_resumed_run_weighs_its_sites_as_before_where_one_is_away():
    rows = {"a": 100, "b": 120, "c": 900}
    engine, _ = opened(rows)
    again, _ = opened({"a": 100, "c": 900}, known=engine.claimed)
    assert again.weights == engine.weights == {"a": 100.0, "b": 120.0, "c": 240.0}
    with pytest.raises(FedVLMError, match="the rows of c have changed"):
        opened(rows | {"c": 240}, known=engine.claimed)


def test_a_liar_about_rows_and_values_does_not_make_the_global_model_its_own():
    engine, _ = opened({"north": 500, "south": 700, "west": 600, "east": 650, "liar": HUGE})
    weights = {c: v.weight for c, v in Round(1, engine.sites).visits(engine.weights).items()}
    liar = {n: torch.full_like(t, 666.0) for n, t in INITIAL.items()}
    uploads = dict(zip(engine.sites, honest().values(), strict=True)) | {"liar": liar}
    fold, state = folded(uploads, weights=weights)
    assert norm(change(INITIAL, state)) < 1.0, "no further than an honest client goes"
    assert list(fold.bounded) == ["liar"]


def test_a_project_registers_rows_of_its_own_sites_only(tmp_path):
    pytest.importorskip("nvflare")
    from fedvlm.deploy.nvflare.project import read_project

    path = tmp_path / "project.yml"
    text = "server: {address: h}\nsites: [north, south]\nmax_weight: 3\nrows: {%s: 3000}\n"
    path.write_text(text % "north")
    assert (read_project(path).rows, read_project(path).max_weight) == ({"north": 3000}, 3.0)
    path.write_text(text % "nroth")
    with pytest.raises(ConfigError, match="'nroth' is no site of this project"):
        read_project(path)


# Bounded norms


def test_honest_clients_have_bit_for_bit_the_plain_mean_by_default():
    uploads = {c: moved(k, 1.0 + 0.1 * k) for k, c in enumerate(FIVE)}
    fold, state = folded(uploads)
    _, plain = folded(uploads, MEAN)
    assert not fold.bounded
    assert all(torch.equal(tensor, plain[name]) for name, tensor in state.items())


@pytest.mark.parametrize("times", [-10.0, 10.0, 1000.0])
def test_a_liar_moves_the_mean_by_one_and_a_half_honest_changes_at_most(times):
    good, scaled = honest(), moved(4, times)
    fold, state = folded(good | {"c4": scaled})
    assert list(fold.bounded) == ["c4"]
    assert fold.bounded["c4"]["norm"] == pytest.approx(abs(times), rel=1e-3)
    assert fold.bounded["c4"]["bound"] == pytest.approx(1.5, rel=1e-3)
    _, expected = folded(good | {"c4": moved(4, math.copysign(1.5, times))}, MEAN)
    assert close(state, expected, atol=1e-4)
    if times == 1000.0:
        _, plain = folded(good | {"c4": scaled}, MEAN)
        assert norm(change(INITIAL, plain)) > 100, "the plain mean is the liar's"


@pytest.mark.parametrize("place", range(5))
def test_the_place_of_a_liar_in_the_cohort_does_not_matter(place):
    uploads = honest() | {FIVE[place]: moved(9, 50.0)}
    fold, state = folded(uploads)
    assert list(fold.bounded) == [FIVE[place]]
    _, expected = folded(uploads | {FIVE[place]: moved(9, 1.5)}, MEAN)
    assert close(state, expected, atol=1e-4)


def test_a_liar_with_a_tiny_change_does_not_stop_the_others():
    fold, _ = folded(honest(4) | {"c4": INITIAL})
    assert not fold.bounded


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_clients_are_never_shrunk(count):
    uploads = dict(list((honest() | {"c0": moved(0, 50.0)}).items())[:count])
    fold, state = folded(uploads)
    _, plain = folded(uploads, MEAN)
    assert not fold.bounded
    assert all(torch.equal(tensor, plain[name]) for name, tensor in state.items())


def test_tensors_that_were_not_downloaded_are_shrunk_whole_and_whole_numbers_stay():
    up = {A: INITIAL[A] + 2.0, "own": torch.full((3,), 8.0), "count": torch.tensor(5)}
    found = shrunk({A: INITIAL[A]}, up, 0.25)
    assert torch.allclose(found[A], INITIAL[A] + 0.5)
    assert found["own"].tolist() == [2.0] * 3
    assert found["count"].item() == 5


def test_an_algorithm_without_a_mean_is_bounded_too():
    fold, state = folded(honest() | {"c4": moved(4, 1000.0)}, algorithm=similar(0.1))
    assert list(fold.bounded) == ["c4"]
    kept = {n: state[f"upload/{n}/c4"] for n in INITIAL}
    assert norm(change(INITIAL, kept)) == pytest.approx(1.5, rel=1e-3)


def test_the_server_holds_a_limited_number_of_uploads_whatever_the_cohort():
    names = [f"c{k:02d}" for k in range(3 * HELD)]
    visits = {c: Visit(c, 10.0, round=1) for c in names}
    fold = Fold(visits, dict.fromkeys(names, INITIAL), Forms(FEDAVG, INITIAL))
    alive, most = weakref.WeakSet(), 0
    for k, client in enumerate(names):
        upload = moved(k, 100.0 if client == names[-1] else 1.0)
        alive.add(upload[A])
        assert fold.add(Reply(client, upload, 10.0, 1.0))
        del upload
        most = max(most, len(alive))
    assert most <= HELD + 1
    assert list(fold.bounded) == [names[-1]], "also after the held ones"


# Trimmed means


def test_each_element_lacks_its_largest_and_its_smallest_value():
    values = [[1.0, 9.0], [2.0, -50.0], [3.0, 7.0], [400.0, 8.0], [-5.0, 6.0]]
    folded_ = Trimmed(0.2)
    for row in values:
        folded_.add({B: torch.tensor(row)}, 3.0)
    assert folded_.tree()[B].tolist() == [2.0, 7.0]


def test_the_values_that_stay_are_weighted_by_examples():
    folded_ = Trimmed(0.2)
    for value, weight in ((0.0, 1e9), (1.0, 1.0), (2.0, 3.0), (9.0, 1e9)):
        folded_.add({B: torch.tensor([value])}, weight)
    assert folded_.tree()[B].item() == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("count", "cut"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (10, 2)]
)
def test_the_number_of_trimmed_values_is_rounded_up(count, cut):
    folded_ = Trimmed(0.2)
    for value in range(count):
        folded_.add({B: torch.tensor([2.0**value])}, 1.0)
    kept = [2.0**value for value in range(cut, count - cut)]
    assert folded_.tree()[B].item() == pytest.approx(sum(kept) / len(kept))


@pytest.mark.parametrize("times", [-10.0, 1000.0])
def test_a_trimmed_mean_stays_among_the_honest_values(times):
    good = honest(4)
    _, state = folded(good | {"c4": moved(4, times)}, TRIMMED)
    for name, tensor in state.items():
        values = torch.stack([upload[name] for upload in good.values()])
        assert (tensor >= values.min(0).values - 1e-6).all()
        assert (tensor <= values.max(0).values + 1e-6).all()


def settings(*words):
    return load({"aggregate": {"kind": "trimmed"}, "algorithm": {"name": "lora"}}, *words)


def test_a_trimmed_mean_that_cannot_be_made_is_refused_by_name():
    robust.check(settings(), FEDAVG, 5)
    with pytest.raises(ConfigError, match=r"server of algorithm\.name=similar has no mean"):
        robust.check(settings("algorithm.name=similar"), similar(0.1), 5)
    with pytest.raises(ConfigError, match="at least 3 clients in a round, but there are 2"):
        robust.check(settings("train.clients_per_round=2"), FEDAVG, 5)
    with pytest.raises(ConfigError, match=f"at most {MOST} clients, but there are {MOST + 1}"):
        robust.check(settings(), FEDAVG, MOST + 1)
    robust.check(settings(f"train.clients_per_round={MOST}"), FEDAVG, MOST + 1)


@pytest.mark.parametrize(
    "words",
    [
        ("aggregate.trim=0.1",),
        ("aggregate.kind=mean", "aggregate.bound=2"),
        ("aggregate.bound=0.5",),
    ],
)
def test_settings_of_the_mean_that_mean_nothing_are_refused(words):
    with pytest.raises(ConfigError, match=r"aggregate"):
        load({}, *words)


# Whole runs


def test_a_run_that_cannot_trim_writes_nothing(small, tmp_path):
    small |= {"algorithm": {"name": "clustered"}, "aggregate": {"kind": "trimmed"}}
    with pytest.raises(ConfigError, match="clustered has no mean"):
        fedvlm.run(small)
    assert not fedvlm.store.run.is_run(tmp_path / "run")


def test_a_run_with_a_liar_names_it_and_resumes_to_the_same_bytes(small, tmp_path, monkeypatch):
    train = CohortEngine.train

    def lying(engine, tasks):
        for reply in train(engine, tasks):
            if reply.client == "site-1":
                step = change(tasks[0].down, reply.upload)
                up = {n: tasks[0].down[n] - 100 * t for n, t in step.items()}
                reply = replace(reply, upload=up)
            yield reply

    monkeypatch.setattr(CohortEngine, "train", lying)
    small["eval"] |= {"every": 0, "max_rows": 1, "max_new_tokens": 1}
    whole = fedvlm.run(small, f"output={tmp_path / 'whole'}")
    with pytest.raises(KeyboardInterrupt):
        federate.run(small, f"output={tmp_path / 'stopped'}", progress=Stop(2))
    federate.resume(tmp_path / "stopped")
    assert bytes_of(tmp_path / "stopped") == bytes_of(whole.folder)
    lines = files.read_lines(whole.folder / "metrics.jsonl")[1:]
    assert [list(line["bounded"]) for line in lines] == [["site-1"]] * 2
    assert all(how["norm"] > 10 * how["bound"] for how in (n["bounded"]["site-1"] for n in lines))
    assert "shrunk: site-1" in describe(lines[0], load(small))
    event = {"event": "bounded", "site": "site-1", "round": 1, "norm": 99.0, "bound": 1.5}
    assert shown(event).startswith("  site-1: round 1, change shrunk from norm 99 to 1.5")
