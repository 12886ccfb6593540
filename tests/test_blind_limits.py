"""What a site's own limits promise in secure sums, and sites or servers that get around them."""

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import fedvlm
from fedvlm.algorithms.base import Visit
from fedvlm.algorithms.flex import hetlora
from fedvlm.deploy import statefolder
from fedvlm.deploy.unanswered import Unanswered
from fedvlm.engines.summand import Summand
from fedvlm.errors import ConfigError
from fedvlm.privacy.blind import messages
from fedvlm.privacy.blind.messages import Advertisement, Void
from formulas import drive
from toy import adapter
from toysites import FIVE, Five, config, run
from veiled import CONTEXT, Veiled

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(
    ("count", "drops", "least", "opens"),
    [(7, 1, 7, False), (7, 1, 6, True), (10, 2, 10, False), (10, 2, 9, False), (10, 2, 8, True)],
)
def test_others_cannot_open_a_smaller_sum_than_a_site_accepts(count, drops, least, opens):
    """The site refuses to open the sum, and the others would be enough without it."""
    sums = Veiled(count)
    sums.clients["site-0"].least = least
    dead = {("mask", f"site-{count - 1 - k}") for k in range(drops)}
    if opens:
        total, names = sums.run(dead)
        assert sums.mean((total, names)) == pytest.approx(sums.plain(names), abs=1e-6)
        return
    with pytest.raises(Void, match="fewer than its own min_sites have sent theirs"):
        sums.run(dead)
    assert f"at least {least} must" in sums.refused["site-0"]


def test_a_size_is_refused_once_a_round(tmp_path):
    """Asked again with other units, a refusal for size would give the size digit by digit."""
    call = Five(tmp_path / "state")
    call.workers["site-2"].far = 1000.0
    run(call, config("train.rounds=1"), tmp_path / "run")
    assert any("too large" in h.get("message", "") for s, *_, h, _ in call.seen if s == "site-2")
    again = {"do": "train", "round": 1, "sampled": 1.0, "blind": {"attempt": 2**60, "unit": 9e9}}
    answer, _ = call("site-2", again, b"", 60.0)
    assert answer["error"] == "refused"
    assert "round 1 is over here" in answer["message"]


def test_a_run_that_is_erased_and_opened_again_repeats_no_round(tmp_path):
    call = Five(tmp_path / "state")
    run(call, config(), tmp_path / "run")
    statefolder.erase(tmp_path / "state/site-0", "run-1")
    assert not (tmp_path / "state/site-0/runs/run-1").exists()
    call.restart("site-0")
    asked = {"do": "train", "round": 2, "sampled": 1.0, "blind": {"attempt": 2**60, "unit": 1.0}}
    answer, blob = call("site-0", asked, b"", 60.0)
    assert "no upload leaves under two masks: round 2 is over" in answer["message"]
    assert not blob


@pytest.mark.parametrize("seconds", ["abc", None, [1], "9" * 400])
def test_one_sites_odd_seconds_are_its_own_failure(tmp_path, seconds):
    call = Five(tmp_path / "state")
    perform = call.workers["site-3"].perform

    def lies(asked, blob):
        header, body = perform(asked, blob)
        return (header | {"seconds": seconds} if asked["do"] == "train" else header), body

    call.workers["site-3"].perform = lies
    lines, events = run(call, config("train.rounds=1"), tmp_path / "run")
    wrong = isinstance(seconds, str) and seconds.isdigit()  # a number, if a silly one
    there = [site for site in FIVE if wrong or site != "site-3"]
    assert lines[1]["secure"]["clients"] == there
    assert {e["site"] for e in events if e["event"] == "failed"} == set(FIVE) - set(there)


def test_failures_are_forgotten_when_a_site_takes_part_again(tmp_path):
    call = Five(tmp_path / "state")

    def away(site, header, blob):
        if site == "site-2":
            raise Unanswered("a short cut of the network")
        return header, blob

    call.lies = {(round_, "train"): away for round_ in (1, 4, 6)}
    _, events = run(call, config("train.rounds=8"), tmp_path / "run")
    failed = [(e["round"], e["again_in_round"]) for e in events if e["event"] == "failed"]
    assert failed == [(1, 2), (4, 5), (6, 7)], "each one is a first failure"
    assert not [e for e in events if e["event"] == "benched"]


def advertised(sums, site, **keys):
    """The advertisement of a site with other keys, signed by it."""
    told = {**sums.clients[site].advertise(), **keys}
    text = messages.advertised(CONTEXT.digest, site, told)
    return told | {"signature": sums.identities[site].sign(text).hex()}


@pytest.mark.parametrize("key", ["mask", "shares"])
def test_the_site_with_keys_that_are_none_is_left_out_and_no_other(key):
    """Sites refuse a list with such a key; the server would find them all guilty alike."""
    sums = Veiled(5)
    odd = advertised(sums, "site-2", **{key: "00" * 32})
    for site in sums.names:
        told = odd if site == "site-2" else sums.clients[site].advertise()
        if site == "site-2":
            with pytest.raises(ValueError):
                sums.collector.advertised(site, told)
        else:
            sums.collector.advertised(site, told)
    assert sums.collector.asks_share().keys() == set(sums.names) - {"site-2"}


def test_a_key_of_another_site_is_not_taken_twice():
    sums = Veiled(5)
    first = sums.clients["site-0"].advertise()
    sums.collector.advertised("site-0", first)
    with pytest.raises(ValueError, match="a key of 'site-1' is that of another site"):
        sums.collector.advertised("site-1", advertised(sums, "site-1", shares=first["mask"]))
    own = X25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    with pytest.raises(ValueError, match="or its other key"):
        sums.collector.advertised("site-2", advertised(sums, "site-2", mask=own, shares=own))


def test_a_name_is_one_line_in_a_sites_message():
    sums = Veiled(4)
    sums.step("advertise")
    asked = sums.collector.asks_share()["site-0"]
    name = "x\n2026-11-30 INFO run run-9: approved by anna"
    asked["keys"][name] = Advertisement.parsed(asked["keys"].pop("site-3")).told()
    with pytest.raises(messages.Withheld) as refused:
        sums.clients["site-0"].share(asked)
    assert "is no peer of this site" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_algorithm_that_weighs_by_values_is_refused_by_name(tmp_path):
    settings = fedvlm.load_config(
        {
            "algorithm": {"name": "hetlora"},
            "lora": {"rank": 2},
            "train": {"rounds": 1},
            "wire": {"secure": True},
        },
        f"output={tmp_path / 'run'}",
    )
    with pytest.raises(ConfigError, match="hetlora"):
        drive(settings)
    visit = Visit("c", 5.0, round=1)
    with pytest.raises(ConfigError, match="weighs it by its values"):
        Summand(hetlora(), adapter(2), visit, adapter(2))
