"""Secure aggregation: sites in one process, a server that may lie, and sites that may die."""

import numpy as np
import pytest

from fedvlm.privacy.blind.client import MASKED, OPENED
from fedvlm.privacy.blind.encoding import HEAD, Encoding, Overflow
from fedvlm.privacy.blind.identity import Identity
from fedvlm.privacy.blind.messages import Void, Withheld, threshold
from veiled import BOUND, CONTEXT, STEPS, Veiled, other

# -- the sum


@pytest.mark.parametrize("count", [3, 4, 5, 10])
def test_the_server_opens_the_weighted_mean(count):
    run = Veiled(count)
    found = run.mean(run.run())
    error = 2 * count * Encoding(count, BOUND).quantum / sum(run.weights.values())
    assert np.abs(found - run.plain(run.names)).max() < error


def test_rounding_has_no_bias():
    encoding, value = Encoding(10, BOUND), 0.3 * Encoding(10, BOUND).quantum
    numbers = encoding.encoded(np.full(100_000, value), 1.0)[HEAD:].view(np.int32)
    assert set(np.unique(numbers)) == {0, 1}
    assert numbers.mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("count", [3, 4, 7, 8, 10, 50, 64])
def test_the_sum_of_all_sites_largest_values_does_not_wrap(count):
    encoding = Encoding(count, BOUND)
    ends = np.array([BOUND, -BOUND])
    total = sum(encoding.encoded(ends, 1.0).astype(np.uint64) for _ in range(count))
    values, weight = encoding.decoded((total % 2**32).astype(np.uint32), count)
    assert values / weight == pytest.approx([BOUND, -BOUND], rel=1e-6)


@pytest.mark.parametrize("value", [4.1, -4.1, 1e300, np.inf, -np.inf, np.nan])
def test_a_value_beyond_the_bound_is_an_error(value):
    with pytest.raises(Overflow, match=r"is the largest|not finite"):
        Encoding(5, BOUND).encoded(np.array([0.0, value]), 1.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, 4.1, np.nan])
def test_a_weight_beyond_the_bound_is_an_error(weight):
    with pytest.raises(Overflow, match="a weight must be"):
        Encoding(5, BOUND).encoded(np.zeros(2), weight)


# -- sites that die


@pytest.mark.parametrize("step", STEPS)
def test_one_of_five_sites_may_die_in_any_step(step):
    run = Veiled(5)
    outcome = run.run({(step, "site-2")})
    uploaded = step in ("agree", "unmask")
    there = [n for n in run.names if n != "site-2" or uploaded]
    assert list(outcome[1]) == there
    assert run.mean(outcome) == pytest.approx(run.plain(there), abs=1e-6)


@pytest.mark.parametrize("step", STEPS)
def test_the_round_is_void_when_two_of_five_die(step):
    run = Veiled(5)
    dead = {(step, "site-1"), (step, "site-4")}
    if step == "advertise":  # three sites are a round of their own
        assert len(run.run(dead)[1]) == 3
        return
    with pytest.raises(Void, match=r"3 sites .*, and at least 4 must"):
        run.run(dead)


@pytest.mark.parametrize("step", STEPS[1:])
def test_three_sites_may_lose_none_and_ten_may_lose_three(step):
    with pytest.raises(Void):
        Veiled(3).run({(step, "site-0")})
    run = Veiled(10)
    outcome = run.run({(step, f"site-{k}") for k in (0, 4, 9)})
    assert run.mean(outcome) == pytest.approx(run.plain(outcome[1]), abs=1e-6)


def test_the_set_of_uploads_is_asked_for_only_where_a_site_has_dropped_out():
    whole, less = Veiled(5), Veiled(5)
    for step in STEPS[:3]:
        whole.step(step)
        less.step(step, {("mask", "site-4")})
    assert whole.collector.asks_agree() == {}
    assert less.collector.asks_agree().keys() == set(less.names) - {"site-4"}
    with pytest.raises(Void, match="0 sites have confirmed the set of uploads"):
        less.collector.asks_unmask()  # the signatures of the set of all are of no use


def test_sites_may_die_in_different_steps():
    run = Veiled(10)
    outcome = run.run({("share", "site-0"), ("mask", "site-4"), ("unmask", "site-9")})
    assert len(outcome[1]) == 8
    assert run.mean(outcome) == pytest.approx(run.plain(outcome[1]), abs=1e-6)


def test_more_than_two_thirds_must_stay():
    assert [threshold(n) for n in (3, 4, 5, 6, 9, 10, 50)] == [3, 3, 4, 5, 7, 7, 34]


# -- servers that lie


def lied(step, change, count=5, **settings):
    """Runs until the end or a void round; returns the run."""
    run = Veiled(count, **settings)
    run.lies[step] = change
    try:
        run.run()
    except (Void, ValueError):
        return run
    raise AssertionError("the round was opened")


def test_a_swapped_key_is_refused_by_all():
    mallory = Veiled(5)
    mallory.step("advertise")

    def swap(asked):
        for site, message in asked.items():
            if site != "site-1":
                message["keys"]["site-1"] = mallory.clients["site-1"]._own.told()
        return asked

    run = lied("share", swap)
    assert all("fingerprint" in run.refused[n] for n in run.names if n != "site-1")
    assert "other keys for this site" in run.refused["site-1"]


def test_a_swapped_mask_key_under_the_true_signature_is_refused():
    def swap(asked):
        for message in asked.values():
            message["keys"]["site-1"]["mask"] = "ab" * 32
        return asked

    run = lied("share", swap)
    assert all("not signed for this round" in run.refused[n] for n in run.names if n != "site-1")
    assert "other keys for this site" in run.refused["site-1"]


def test_an_operator_without_the_pinned_keys_is_refused():
    strangers = {f"site-{k}": Identity(f"site-{k}").fingerprint for k in range(5)}
    run = Veiled(5, pins={"site-0": strangers})
    run.step("advertise")
    run.step("share")
    assert "this site's policy has" in run.refused["site-0"]


def test_a_peer_that_is_not_pinned_is_refused():
    run = Veiled(5, pins={"site-0": {}})
    run.step("advertise")
    run.step("share")
    assert "is no peer of this site" in run.refused["site-0"]


@pytest.mark.parametrize(
    "view", [{"download": "e" * 32}, {"config": "e" * 64}, {"attempt": 2}, {"round": 4},
             {"run": "x"}, {"unit": 1.0}, {"sampled": 0.5}]
)  # fmt: skip
def test_a_site_with_another_view_of_the_round_is_left_out(view):
    run = Veiled(5, contexts={"site-3": other(**view)})
    with pytest.raises(ValueError, match="not signed for this round"):
        run.step("advertise")
    peer = Veiled(5)
    peer.step("advertise")
    keys = {n: peer.clients[n]._own.told() for n in peer.names}
    keys["site-3"] = run.clients["site-3"]._own.told()
    unpinned = Veiled(1, contexts={"site-0": CONTEXT}).clients["site-0"]
    unpinned.pins = None
    keys["site-0"] = unpinned.advertise()
    with pytest.raises(Withheld, match="'site-3' are not signed for this round"):
        unpinned.share({"keys": keys})


def test_differing_sets_of_uploads_are_refused():
    def differ(asked):
        asked["site-0"] = {"uploaded": [n for n in run.names if n != "site-1"]}
        return asked

    run = Veiled(5)
    run.lies["agree"] = differ
    with pytest.raises(ValueError, match="'site-0' has signed another set"):
        run.run()
    # A server that ignores this has no signatures that the sites accept.
    others = [n for n in run.names if n != "site-1"]
    asked = {n: {"uploaded": run.names} for n in others[1:]}
    signatures = {n: run.clients[n].agree(told)["signature"] for n, told in asked.items()}
    with pytest.raises(Withheld, match="has not confirmed the set"):
        run.clients["site-0"].unmask({"signatures": signatures})


def test_sites_that_were_told_of_different_peers_give_no_sum():
    """The server hides one site's shares from another site, and so their masks differ."""

    def hide(asked):
        asked["site-0"]["shares"].pop("site-4")
        return asked

    run = Veiled(5)
    run.lies["mask"] = hide
    with pytest.raises(ValueError, match="'site-0' has signed another set of uploads"):
        run.run()


def test_a_set_without_the_asked_site_is_refused():
    def drop(asked):
        return {n: {"uploaded": [m for m in run.names if m != n]} for n in run.names}

    run = Veiled(5)
    run.lies["agree"] = drop
    with pytest.raises(Void):
        run.run()
    assert all("has not uploaded" in why for why in run.refused.values())


@pytest.mark.parametrize("step", STEPS)
def test_each_step_is_answered_once(step):
    run = Veiled(5)
    for one in STEPS:
        run.step(one, {("mask", "site-4")})  # so that the set of uploads is asked for
        if one == step:
            break
    with pytest.raises(Withheld, match=r"the next step is to|its part is over"):
        run.answered(step, "site-0", {})


def test_both_shares_of_a_site_are_never_given():
    run = Veiled(5)
    for step in STEPS:
        run.step(step)
    for site in run.names:
        given = run.clients[site]
        with pytest.raises(Withheld):
            given.agree({"uploaded": [n for n in run.names if n != "site-1"]})
        with pytest.raises(Withheld):
            given.unmask({"signatures": {}})


def test_a_refusal_is_final():
    run = Veiled(5)
    run.step("advertise")
    asked = run.collector.asks_share()["site-0"]
    with pytest.raises(Withheld, match="must have"):
        run.clients["site-0"].share({"keys": asked["keys"], "more": 1})
    with pytest.raises(Withheld, match="its part is over"):
        run.clients["site-0"].share(asked)


def test_fewer_signatures_than_the_threshold_are_refused():
    def few(asked):
        for message in asked.values():
            message["signatures"] = dict(list(message["signatures"].items())[:3])
        return asked

    run = lied("unmask", few)
    assert all("3 sites have confirmed" in why for why in run.refused.values())


def test_a_site_may_want_more_sites_in_the_sum():
    run = Veiled(5, least=6)
    run.step("advertise")
    run.step("share")
    assert all("5 sites have keys, and at least 6 must" in why for why in run.refused.values())


def test_a_site_accepts_no_sum_of_two():
    run = Veiled(3, least=1)
    run.step("advertise")
    asked = run.collector.asks_share()["site-0"]
    asked["keys"].pop("site-2")
    with pytest.raises(Withheld, match="2 sites have keys, and at least 3 must"):
        run.clients["site-0"].share(asked)


def test_shares_from_another_round_are_refused():
    earlier = Veiled(5)
    earlier.step("advertise")
    earlier.step("share")
    recorded = earlier.collector.asks_mask()["site-0"]

    def replay(asked):
        asked["site-0"] = recorded
        return asked

    run = Veiled(5)
    run.lies["mask"] = replay
    run.run()
    assert "not for this site, round and attempt" in run.refused["site-0"]


def test_facts_are_recorded_before_the_answer():
    facts = []
    run = Veiled(5, record=lambda site, fact: facts.append((site, fact)))
    for step in STEPS:
        known = len(facts)
        run.step(step)
        fact = {"mask": MASKED, "unmask": OPENED}.get(step)
        assert facts[known:] == [(n, fact) for n in run.names if fact]


def test_nothing_leaves_a_site_that_cannot_record():
    def full(site, fact):
        raise OSError("no space left on device")

    run = Veiled(5, record=full)
    run.step("advertise")
    run.step("share")
    with pytest.raises(OSError, match="no space"):
        run.step("mask")
    assert not run.blobs


@pytest.mark.parametrize(
    "asked", [None, [], {}, {"keys": None}, {"keys": []}, {"keys": {"a": 1}}, {"keys": {1: {}}},
              {"keys": {str(k): {} for k in range(100)}}]
)  # fmt: skip
def test_messages_of_another_form_are_refused(asked):
    run = Veiled(5)
    run.step("advertise")
    with pytest.raises(Withheld):
        run.clients["site-0"].share(asked)


# -- sites that lie


def test_garbage_in_place_of_an_upload_is_found():
    run = Veiled(5)
    for step in STEPS[:2]:
        run.step(step)
    garbage = np.random.default_rng(0).bytes(4 * run.collector.size)
    take = run.collector.masked
    run.collector.masked = lambda site, told, blob: take(
        site, told, garbage if site == "site-2" else blob
    )
    for step in STEPS[2:]:
        run.step(step)
    with pytest.raises(ValueError, match="numbers without meaning"):
        run.mean(run.collector.opened())


def test_a_wrong_share_is_found_and_left_out():
    run = Veiled(5)
    for step in STEPS:
        run.step(step)
    (first, *_) = run.collector._seeds["site-3"]
    run.collector._seeds["site-3"][first] = bytes(32)
    outcome = run.collector.opened()
    assert run.mean(outcome) == pytest.approx(run.plain(run.names), abs=1e-6)
    (odd,) = run.collector.odd
    assert "of 'site-3' that 'site-0' sent is wrong: one of the two made it so" in odd


def test_too_many_wrong_shares_make_the_round_void():
    run = Veiled(5)
    for step in STEPS:
        run.step(step)
    for number in (1, 2):
        run.collector._seeds["site-3"][number] = bytes(32)
    with pytest.raises(Void, match="do not give what it advertised"):
        run.collector.opened()


def test_a_masked_upload_of_another_size_is_refused():
    run = Veiled(5)
    run.step("advertise")
    run.step("share")
    run.collector.asks_mask()
    with pytest.raises(ValueError, match="808 bytes here, got 3"):
        run.collector.masked("site-0", {}, b"abc")
