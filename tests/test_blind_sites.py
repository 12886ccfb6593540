"""Secure aggregation between a server and five sites: sites that die, and servers that lie."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from fedvlm.config import load
from fedvlm.deploy import peers
from fedvlm.deploy.policy import Policy, Refused, read_policy
from fedvlm.deploy.unanswered import Unanswered
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.privacy.blind.identity import Identity
from fedvlm.store import files
from sites import deployed, written
from toysites import FIVE, Five, config, run

STEPS = ("train", "share", "mask", "agree", "unmask")

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same two rounds of five sites, with a secure sum and with single uploads."""
    folder = tmp_path_factory.mktemp("both")
    call, plain = Five(folder / "state"), Five(folder / "plain-state")
    lines, events = run(call, config(), folder / "secure")
    run(plain, load(config(), "wire.secure=false", "aggregate.kind=mean"), folder / "plain")
    return folder, call, plain, lines, events


def global_adapter(folder):
    return files.load_tree(folder / "adapters/global/adapter_model.safetensors")


def test_a_run_over_sites_has_the_plain_mean(both):
    folder, call, _, lines, events = both
    secure, plain = global_adapter(folder / "secure"), global_adapter(folder / "plain")
    assert max((secure[n] - t).abs().max() for n, t in plain.items()) < 1e-6
    assert [line["secure"]["clients"] for line in lines[1:]] == [list(FIVE)] * 2
    assert not call.refusals()
    assert [e["sites"] for e in events if e["event"] == "summed"] == [list(FIVE)] * 2


def test_no_message_holds_an_upload_or_a_loss_and_single_uploads_do(both):
    """The control: the same search finds the uploads of the run without secure aggregation."""
    folder, call, plain, *_ = both

    def uploads(state):
        for site in FIVE:
            for path in (state / site / "runs/run-1/rounds").glob("*/upload.safetensors"):
                yield from (t.numpy().tobytes() for t in files.load_tree(path).values())

    def found(pieces, wire):
        return sum(any(piece[:64] in message for message in wire) for piece in pieces)

    moved = [p for p in uploads(folder / "state") if any(p)]
    assert len(moved) > 10
    assert found(moved, call.wire) == 0
    moved = [p for p in uploads(folder / "plain-state") if any(p)]
    assert found(moved, plain.wire) == len(moved)
    losses = [h for _, _, step, h, _ in call.seen if step == "train" and "loss" in h]
    assert not losses


def test_masked_uploads_are_as_large_as_single_precision(both):
    _, call, plain, *_ = both
    blobs = {(s, r): b for s, r, step, _, b in call.seen if step == "mask"}
    single = {(s, r): b for s, r, step, _, b in plain.seen if step == "train"}
    numbers = sum(t.numel() for t in torch_tree(next(iter(single.values()))).values())
    assert len(blobs) == 10
    assert {len(b) for b in blobs.values()} == {4 * (numbers + 3)}  # count, weight, loss


def torch_tree(blob):
    from fedvlm.tree import read

    return read(blob)


# -- sites that die


@pytest.mark.parametrize("step", ["train", "share", "mask", "unmask"])
def test_a_site_may_be_killed_in_any_step(tmp_path, step):
    call = Five(tmp_path / "state")
    call.killed = {(1, step, "site-2")}
    lines, events = run(call, config(), tmp_path / "run")
    there = (
        list(FIVE) if step in ("train", "agree", "unmask") else [s for s in FIVE if s != "site-2"]
    )
    assert [line["secure"]["clients"] for line in lines[1:]] == [there, list(FIVE)]
    failed = [(e["round"], e["site"]) for e in events if e["event"] == "failed"]
    assert failed == ([] if step == "train" else [(1, "site-2")])


@pytest.mark.parametrize("step", ["mask", "agree", "unmask"])
def test_a_void_round_is_followed_by_one_with_fresh_keys(tmp_path, step):
    """Two of five sites are killed; 'agree' is asked only where one has dropped out before."""
    call = Five(tmp_path / "state")
    first = "mask" if step == "agree" else step
    call.killed = {(1, first, "site-1"), (1, step, "site-2")}
    lines, events = run(call, config(), tmp_path / "run")
    assert "3 sites have" in lines[1]["secure"]["void"]
    assert lines[2]["secure"]["clients"] == list(FIVE)
    keys = [h["keys"]["mask"] for _, _, kind, h, _ in call.seen if kind == "train"]
    assert len(set(keys)) == len(keys) == 10
    assert [e["event"] for e in events if e["event"] in ("void", "summed")] == ["void", "summed"]


def test_a_round_whose_masked_upload_has_left_is_not_repeated_under_other_masks(tmp_path):
    """The server loses a round after the uploads, and resumes the run."""
    call, settings = Five(tmp_path / "state"), config()

    class Gone(BaseException):
        pass

    def die(site, header, blob):
        raise Gone

    call.lies[1, "unmask"] = die
    with pytest.raises(Gone):
        run(call, settings, tmp_path / "run")
    call.lies.clear()
    deployed(call, settings, tmp_path / "run", resume=True, sites=FIVE, at_once=5)
    lines = files.read_lines(tmp_path / "run/metrics.jsonl")
    assert "0 sites have sent their keys" in lines[1]["secure"]["void"]
    assert set(call.refusals(1)) == set(FIVE)
    assert all("no upload leaves under two masks" in m for m in call.refusals(1).values())
    assert lines[2]["secure"]["clients"] == list(FIVE)


def test_a_run_ends_when_three_rounds_in_a_row_are_void(tmp_path):
    call = Five(tmp_path / "state", min_sites=5)

    def away(site, header, blob):
        if site == "site-4":
            raise Unanswered("it is away")
        return header, blob

    call.lies = {(round_, "train"): away for round_ in range(1, 6)}
    tree = config("train.rounds=5")
    with pytest.raises(FedVLMError, match="3 rounds in a row had no secure sum"):
        run(call, tree, tmp_path / "run")


# -- servers that lie, and an operator in the middle


def attacked(tmp_path, lies, **policy):
    """A run of one round under a lie; returns the sites and the lines of metrics."""
    call = Five(tmp_path / "state", **policy)
    call.lies = {(1, step): lie for step, lie in lies.items()}
    lines, _ = run(call, config("train.rounds=1"), tmp_path / "run")
    return call, lines


def test_swapped_keys_are_refused(tmp_path):
    mallory = Identity("site-1").public.hex()

    def swap(site, header, blob):
        if site != "site-1":
            header["message"]["keys"]["site-1"]["identity"] = mallory
        return header, blob

    call, lines = attacked(tmp_path, {"share": swap})
    assert "void" in lines[1]["secure"]
    assert set(call.refusals()) == set(FIVE) - {"site-1"}
    assert all("has the fingerprint" in m for m in call.refusals().values())


def test_an_operator_without_the_pinned_keys_is_refused(tmp_path):
    """The operator plays four sites with keys of its own, and signs everything rightly."""
    from fedvlm.privacy.blind.client import Client
    from fedvlm.privacy.blind.messages import Context

    call = Five(tmp_path / "state")
    made = {}

    def note(site, header, blob):
        made.setdefault("asked", (header, blob))
        return header, blob

    def play(site, header, blob):
        context = call.workers["site-0"].blind._client.context
        assert isinstance(context, Context)
        for name in FIVE[1:]:
            told = Client(Identity(name), context).advertise()
            header["message"]["keys"][name] = told
        return header, blob

    call.lies = {(1, "train"): note, (1, "share"): play}
    lines, _ = run(call, config("train.rounds=1"), tmp_path / "run")
    assert "void" in lines[1]["secure"]
    assert "this site's policy has" in call.refusals()["site-0"]


def test_a_download_that_differs_for_one_site_is_refused(tmp_path):
    from fedvlm.deploy.downloads import write
    from fedvlm.tree import read

    def differ(site, header, blob):
        if site != "site-3":
            return header, blob
        return header, write({n: t + 1e-3 for n, t in read(blob).items()})

    call, lines = attacked(tmp_path, {"train": differ})
    assert lines[1]["secure"]["clients"] == [s for s in FIVE if s != "site-3"]
    # The server left it out. A server that passes its keys on is refused by its peers.
    call = Five(tmp_path / "again")

    def passed(site, header, blob):
        keys = {s: h["keys"] for s, _, step, h, _ in call.seen if step == "train"}
        header["message"]["keys"]["site-3"] = keys["site-3"]
        return header, blob

    call.lies = {(1, "train"): differ, (1, "share"): passed}
    lines, _ = run(call, config("train.rounds=1"), tmp_path / "run-2")
    assert "void" in lines[1]["secure"]
    assert call.refusals().keys() == set(FIVE) - {"site-3"}
    assert {
        m for m in call.refusals().values() if "are not signed for this round" not in m
    } == set()


def test_another_share_of_the_cohort_for_one_site_leaves_it_out(tmp_path):
    def differ(site, header, blob):
        header["sampled"] = 0.5 if site == "site-3" else header["sampled"]
        return header, blob

    _, lines = attacked(tmp_path, {"train": differ})
    assert lines[1]["secure"]["clients"] == [s for s in FIVE if s != "site-3"]


def test_sets_of_uploads_that_differ_are_refused(tmp_path):
    def differ(site, header, blob):
        if site == "site-0":
            header["message"]["uploaded"] = [*FIVE[:3], "site-4"]
        return header, blob

    call = Five(tmp_path / "state")
    call.killed, call.lies = {(1, "mask", "site-4")}, {(1, "agree"): differ}
    lines, _ = run(call, config("train.rounds=1"), tmp_path / "run")
    assert "3 sites have confirmed" in lines[1]["secure"]["void"]


def test_both_shares_of_a_site_are_never_given(tmp_path):
    call, _ = attacked(tmp_path, {})
    client = call.workers["site-0"].blind._client.context
    about = {"do": "blind", "round": 1, "attempt": client.attempt}
    for step, message in (
        ("agree", {"uploaded": list(FIVE[:4])}),
        ("unmask", {"signatures": {}}),
        ("mask", {"shares": {}}),
        ("share", {"keys": {}}),
    ):
        answer, blob = call("site-0", {**about, "step": step, "message": message}, b"", 60)
        assert answer["error"] == "refused", step
        assert not blob


def test_a_replayed_round_is_refused(tmp_path):
    """A server repeats the requests of a round, word by word."""
    call = Five(tmp_path / "state")
    asked = []

    def note(site, header, blob):
        asked.append((site, copy.deepcopy(header), blob))
        return header, blob

    call.lies = {(1, step): note for step in STEPS}
    run(call, config("train.rounds=1"), tmp_path / "run")
    recorded, call.lies = list(asked), {}
    for site, header, blob in recorded:
        answer, upload = call(site, header, blob, 60)
        assert answer["error"] == "refused", (header["do"], answer)
        assert not upload


def test_a_request_for_a_single_upload_is_refused(tmp_path):
    def single(site, header, blob):
        header.pop("blind")
        return header, blob

    call, lines = attacked(tmp_path, {"train": single})
    assert "void" in lines[1]["secure"]
    assert all("no single upload is sent" in m for m in call.refusals().values())


def test_a_site_that_sends_garbage_makes_the_round_void(tmp_path, monkeypatch):
    call = Five(tmp_path / "state")
    perform = call.workers["site-1"].perform

    def garbage(asked, blob):
        header, upload = perform(asked, blob)
        if asked.get("step") == "mask":
            upload = np.random.default_rng(0).bytes(len(upload))
        return header, upload

    monkeypatch.setattr(call.workers["site-1"], "perform", garbage)
    lines, _ = run(call, config("train.rounds=1"), tmp_path / "run")
    assert "numbers without meaning" in lines[1]["secure"]["void"]


def test_an_overflow_leaves_the_site_out_and_never_wraps(tmp_path):
    call = Five(tmp_path / "state")
    for site in ("site-1", "site-2"):
        call.workers[site].far = 1000.0
    lines, events = run(call, config("train.rounds=1"), tmp_path / "run")
    assert "3 sites have uploaded" in lines[1]["secure"]["void"]
    why = {e["site"]: e["why"] for e in events if e["event"] == "failed"}
    assert why.keys() == {"site-1", "site-2"}
    assert all("4 is the largest (wire.bound): raise wire.bound" in one for one in why.values())
    call = Five(tmp_path / "again")
    for site in FIVE:
        call.workers[site].far = 1000.0
    with pytest.raises(FedVLMError, match="0 of 5 sites are left in round 1"):
        run(call, config("train.rounds=1"), tmp_path / "all")


def test_what_the_server_writes_holds_no_upload(both):
    """Checkpoints, logs and metrics of the server, with the plain run's sites as the control."""
    folder, *_ = both
    pieces = []
    for path in (folder / "state").glob("*/runs/run-1/rounds/*/upload.safetensors"):
        pieces += [t.numpy().tobytes()[:64] for t in files.load_tree(path).values() if t.any()]
    written_ = [p.read_bytes() for p in (folder / "secure").rglob("*") if p.is_file()]
    assert len(pieces) > 10
    assert not any(piece in text for piece in pieces for text in written_)
    at_sites = [p.read_bytes() for p in (folder / "state").rglob("upload.safetensors")]
    assert all(any(piece in text for text in at_sites) for piece in pieces)


# -- the policy and the key of a site


def test_a_site_may_require_secure_aggregation():
    policy = Policy(secure_required=True, peers={"b": "a" * 64})
    with pytest.raises(Refused, match="the site requires secure aggregation"):
        policy.check(load({"algorithm": {"name": "lora"}}))


def test_a_site_that_requires_it_needs_peers(tmp_path):
    path = written(tmp_path / "policy.yml", secure_required=True)
    with pytest.raises(ConfigError, match="secure_required: without peers"):
        read_policy(path)


def test_a_policy_takes_fingerprints_as_they_are_printed(tmp_path):
    mark = "0123 4567 89ab cdef " * 4
    path = written(tmp_path / "policy.yml", peers={"b": mark, "c": mark.upper()})
    assert read_policy(path).peers == {"b": "0123456789abcdef" * 4, "c": "0123456789abcdef" * 4}
    path = written(tmp_path / "policy.yml", peers={"b": "abc"})
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        read_policy(path)


def test_a_site_refuses_a_sum_of_fewer_sites_than_its_policy_wants(tmp_path):
    call, lines = attacked(tmp_path, {}, min_sites=5)
    assert lines[1]["secure"]["clients"] == list(FIVE)

    def four(site, header, blob):
        header["message"]["keys"].pop("site-4", None)
        return header, blob

    call, lines = attacked(tmp_path / "again", {"share": four}, min_sites=5)
    assert all("at least 5 must" in m for s, m in call.refusals().items() if s != "site-4")


def test_no_policy_allows_a_sum_of_two():
    with pytest.raises(ValueError, match="min_sites"):
        Policy(min_sites=2)


def test_the_key_of_a_site_is_made_once_and_for_its_owner_alone(tmp_path):
    first = peers.identity(tmp_path / "state", "north")
    assert peers.identity(tmp_path / "state", "north").fingerprint == first.fingerprint
    assert (tmp_path / "state" / peers.FILE).stat().st_mode & 0o077 == 0
    assert [p.name for p in (tmp_path / "state").iterdir()] == [peers.FILE]
    (tmp_path / "state" / peers.FILE).write_bytes(b"abc")
    with pytest.raises(FedVLMError, match="is damaged: it has 3 bytes"):
        peers.identity(tmp_path / "state", "north")
