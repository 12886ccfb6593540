"""Messages between server and clients: their checks, and their compression."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedvlm
from fedvlm import simulate
from fedvlm.algorithms.base import Sent, Train, Visit, step
from fedvlm.algorithms.sharing import alternating, sharing
from fedvlm.algorithms.table import TABLE, build
from fedvlm.config import load
from fedvlm.engines import group
from fedvlm.engines.cohort import CohortEngine
from fedvlm.engines.compress import compression
from fedvlm.engines.stages import joined, parted
from fedvlm.engines.wire import Forms, Reply, sent_up
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.planning.forecast import Spread, forecast
from fedvlm.rounds import federate
from fedvlm.rounds.fold import Fold
from fedvlm.settings.sections import LoraConfig, WireConfig
from fedvlm.store import files
from fedvlm.store import run as store
from fedvlm.tree import saved_bytes
from test_federate import Stop, bytes_of
from toy import FEDAVG, INITIAL, A, B, adapter, clients, close

KINDS = ("bf16", "int8", "topk")
SITE = Visit("site-0", 12.0, round=1)
PLORA = sharing({"": "B"})
RANKS = {"lora": LoraConfig(rank=4, ranks={"site-0": 2})}


def wire(compress, **settings):
    return WireConfig(compress=compress, **settings)


def feed(tree, seed=0):
    """A tree with noise added, like one after training."""
    g = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in tree.items()}


def message_of(algorithm, whole, visit=SITE, stages=()):
    """A client's download, its message, and its upload as the server decodes it."""
    down = algorithm.send(algorithm.init(whole), visit)
    clients_ = {visit.client: (visit.weight, lambda n, now: 0.1 * now)}
    like = simulate(algorithm, clients_, whole, stages=stages)
    like.round = visit.round - 1
    like.run()
    return down, like.messages[visit.client], like.uploads[visit.client]


def algorithms():
    for name, entry in TABLE.items():
        for kind in ("none", *KINDS):
            if not (kind == "topk" and entry.partial):
                yield pytest.param(name, kind, id=f"{name}-{kind}")


# The checks


@pytest.mark.parametrize(("name", "kind"), algorithms())
def test_what_an_algorithm_sends_is_taken_at_both_ends(name, kind):
    share = {"share": {"q_proj": "A"}} if name == "share" else {}
    config = TABLE[name].settings(name=name, **share)
    lora = RANKS.get(name, LoraConfig(rank=4))
    spare = 16 if TABLE[name].spare else 0
    whole = adapter(ranks=4 + spare, out=30, into=40)
    algorithm, stages = build(config, lora), compression(wire(kind))
    forms = Forms(algorithm, whole, stages, max_norm=100.0)
    for number in (1, 2):
        visit = replace(SITE, round=number)
        down, message, upload = message_of(algorithm, whole, visit, stages)
        forms.check_download(visit, down)
        found = forms.received(visit, down, message, 12)
        assert found.keys() == upload.keys()
        form = sent_up(algorithm, whole, visit, down, stages)
        assert saved_bytes(message) == saved_bytes(form)


def spoiled(message, change):
    """A message with its first tensor changed."""
    name = next(iter(message))
    return {**message, name: change(message[name])}


BAD = {
    "lacks .*lora_B": lambda m: {},
    "holds 'more' that": lambda m: {**m, "more": torch.zeros(1)},
    r"float32 \[4, 1\] instead of float32 \[4, 2\]": lambda m: spoiled(m, lambda t: t[:, :1]),
    "float64 .* instead of float32": lambda m: spoiled(m, lambda t: t.double()),
    "not finite": lambda m: spoiled(m, lambda t: t.log() * 0),
    r"norm of 28\.\d+, above wire\.max_norm=5": lambda m: spoiled(m, lambda t: 0 * t + 10),
}


@pytest.mark.parametrize("said", BAD)
def test_a_bad_upload_is_refused_by_name_and_reason(said):
    down = PLORA.init(INITIAL)
    message = BAD[said](feed(down))
    with pytest.raises(FedVLMError, match=f"client 'site-0' .*{said}"):
        Forms(PLORA, INITIAL, max_norm=5.0).received(SITE, down, message, 12)


@pytest.mark.parametrize("weight", [0, -1, 12.5, math.nan, math.inf])
def test_a_client_counts_for_no_more_examples_than_it_registered(weight):
    down = PLORA.init(INITIAL)
    with pytest.raises(FedVLMError, match=r"'site-0' claims .* registered 12"):
        Forms(PLORA, INITIAL).received(SITE, down, feed(down), weight)


def test_the_norm_is_that_of_the_change_and_not_of_the_factors():
    down = {B: torch.full((4, 2), 100.0)}
    assert Forms(PLORA, INITIAL, max_norm=1.0).received(SITE, down, feed(down), 12)
    halved = Forms(PLORA, INITIAL, compression(wire("bf16")), max_norm=1.0)
    assert halved.received(SITE, down, {B: down[B].bfloat16() * 0}, 1)


def test_a_client_of_a_lower_rank_may_send_its_own_ranks_and_no_more():
    whole = adapter(ranks=4)
    algorithm = build(TABLE["lora"].settings(name="lora"), RANKS["lora"])
    small, large = (message_of(algorithm, whole, Visit(f"site-{k}", 12.0, round=1)) for k in (0, 1))
    forms = Forms(algorithm, whole)
    assert small[1][A].shape[0] == 2
    with pytest.raises(FedVLMError, match=r"float32 \[4, 5\] instead of float32 \[2, 5\]"):
        forms.received(SITE, small[0], large[1], 12)
    with pytest.raises(FedVLMError, match="'site-0' refuses the server's message"):
        forms.check_download(SITE, large[0])


def test_rolora_may_send_b_in_odd_rounds_and_a_in_even_ones():
    odd, even = (replace(SITE, round=n) for n in (1, 2))
    forms, message = Forms(alternating(), INITIAL), message_of(alternating(), INITIAL, odd)[1]
    assert forms.received(odd, INITIAL, message, 12).keys() == {B}
    with pytest.raises(FedVLMError, match=r"lacks .*lora_A"):
        forms.received(even, INITIAL, message, 12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t * math.nan, "values in .*lora_B.* not finite"),
        (lambda t: t[:1], "instead of"),
        (lambda t: t.int(), "int32 .* instead of float32"),
    ],
)
def test_a_client_refuses_a_download_that_its_algorithm_does_not_send(change, said):
    down = spoiled(PLORA.init(INITIAL), change)
    with pytest.raises(FedVLMError, match=f"'site-0' refuses the server's message: it .*{said}"):
        Forms(PLORA, INITIAL).check_download(SITE, down)


def fold_of(replies, algorithm=PLORA):
    known = {c: Visit(c, 12.0, round=1) for c in replies}
    state = algorithm.init(INITIAL)
    fold = Fold(known, dict.fromkeys(replies, state), Forms(algorithm, INITIAL))
    for client, upload in replies.items():
        fold.add(Reply(client, upload, 12, 1.0))
    return fold, state


def test_a_round_goes_on_without_the_upload_that_is_bad():
    good = {c: feed(PLORA.init(INITIAL), seed) for seed, c in enumerate(("a", "b"))}
    fold, state = fold_of({"a": good["a"], "bad": {B: good["a"][B] * math.nan}, "b": good["b"]})
    assert list(fold.losses) == ["a", "b"]
    assert list(fold.rejected) == ["bad"]
    assert close(fold.update(state, 1), {B: (good["a"][B] + good["b"][B]) / 2})
    assert fold.bytes_up["bad"] == fold.bytes_up["a"] > 0


def test_a_round_without_a_usable_upload_is_an_error():
    fold, state = fold_of({"a": {}, "b": {A: INITIAL[A]}})
    with pytest.raises(FedVLMError, match="all 2 uploads of this round were rejected") as caught:
        fold.update(state, 1)
    assert all(f"client '{c}' lacks" in str(caught.value) for c in "ab")


# Compression


def test_eight_bits_are_off_by_half_a_step_of_their_row_at_most():
    down = {A: torch.zeros(2, 50), B: torch.zeros(40, 2)}
    step = {n: torch.randn(t.shape, generator=torch.manual_seed(1)) for n, t in down.items()}
    step[A][1] = 0
    (stage,) = compression(wire("int8"))
    message, rest = stage.pack(step, down, {}, SITE)
    assert [message[n].dtype for n in (A, B)] == [torch.int8] * 2
    assert message["scales"].shape == (2 + 2,), "one scale for each rank of A and of B"
    found = stage.open(message, down)
    for name, most in ((A, step[A].abs().amax(1)[:, None]), (B, step[B].abs().amax(0))):
        assert ((found[name] - step[name]).abs() <= most / 254 * 1.001).all()
        assert torch.allclose(found[name] + rest[name], step[name])
    assert not found[A][1].any()


def test_topk_sends_the_largest_elements_of_the_whole_upload():
    down = feed({A: torch.zeros(2, 50), B: torch.zeros(40, 2)})
    end = feed(down, seed=1)
    (stage,) = compression(wire("topk", topk=0.1))
    message, _ = stage.pack(end, down, {}, SITE)
    found = stage.open(message, down)
    steps = torch.cat([(end[n] - down[n]).flatten() for n in (A, B)])
    got = torch.cat([(found[n] - down[n]).flatten() for n in (A, B)])
    assert len(message["values"]) == 18 == int((got.abs() > 1e-6).sum())
    assert got.abs().max() == pytest.approx(steps.abs().max().item(), rel=1e-4)
    assert torch.allclose(got[got != 0], steps[got != 0], atol=1e-6)
    assert steps[got == 0].abs().max() <= message["values"].abs().min()


@pytest.mark.parametrize("where", [[0, 0], [1, 0], [-1, 2], [0, 8]])
def test_indices_that_no_client_would_send_are_refused(where):
    stages = compression(wire("topk", topk=0.25))
    down, message, _ = message_of(PLORA, INITIAL, stages=stages)
    message["indices"] = torch.tensor(where, dtype=torch.int32)
    with pytest.raises(FedVLMError, match="'site-0' has indices"):
        Forms(PLORA, INITIAL, stages).received(SITE, down, message, 12)


def wavy(name, now):
    """A gradient with a different value for each element."""
    return torch.cos(7 * now + torch.arange(now.numel()).view(now.shape))


@pytest.mark.parametrize("kind", ["int8", "topk"])
@pytest.mark.parametrize(
    "algorithm", [FEDAVG, PLORA, alternating()], ids=["lora", "plora", "rolora"]
)
def test_what_was_not_sent_is_sent_later(algorithm, kind):
    """Sum of the received uploads, plus the unsent rest, is the sum of the intended uploads."""
    whole = adapter(ranks=2, out=9, into=11)
    stages = compression(wire(kind, **({"topk": 0.05} if kind == "topk" else {})))
    run = simulate(algorithm, {"c": (1.0, wavy)}, whole, stages=stages)
    meant = {n: torch.zeros_like(t) for n, t in whole.items()}
    got = {n: torch.zeros_like(t) for n, t in whole.items()}
    for _ in range(6):
        run.run()
        for name, upload in run.uploads["c"].items():
            meant[name] += run.ends["c"][-1][name]
            got[name] += upload
    rest = run.memory["c"]["compress"]
    assert all(t.abs().max() > 0 for t in rest.values())
    for name, left in rest.items():
        assert torch.allclose(got[name] + left, meant[name], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_whose_uploads_are_compressed_learn_the_same(kind):
    share = {"topk": 0.3} if kind == "topk" else {}
    ways = (), compression(wire(kind, **share))
    ends = [
        simulate(FEDAVG, clients(), INITIAL, 60, steps=3, stages=stages).model() for stages in ways
    ]
    off = max((ends[1][n] - t).abs().max().item() for n, t in ends[0].items())
    moved = max((INITIAL[n] - t).abs().max().item() for n, t in ends[0].items())
    assert off < {"bf16": 0.003, "int8": 0.001, "topk": 0.1}[kind] * moved


@pytest.mark.parametrize("name", ["scaffold", "ditto", "apfl", "fedprox", "feddpa", "plora"])
def test_the_algorithm_does_not_see_what_was_not_sent(name):
    """When every element is sent, the rest is zero and no algorithm changes."""
    whole, algorithm = adapter(ranks=4), build(TABLE[name].settings(name=name), LoraConfig(rank=4))
    ways = (), compression(wire("topk", topk=1.0))
    runs = [simulate(algorithm, clients_of(whole), whole, 3, stages=stages) for stages in ways]
    assert close(runs[1].state, runs[0].state)
    for client, kept in runs[0].kept.items():
        assert runs[1].memory[client]["compress"]
        assert runs[1].kept[client].keys() == kept.keys()
        assert close(runs[1].kept[client], kept)


@pytest.mark.parametrize("kind", ["int8", "topk"])
@pytest.mark.parametrize("name", [n for n in TABLE if n != "share" and not TABLE[n].partial])
def test_no_algorithm_sees_the_memory_of_a_stage(name, kind):
    """No name of the wire is in the trees that an algorithm receives or asks to be scored."""
    whole, algorithm = adapter(ranks=4), build(TABLE[name].settings(name=name), LoraConfig(rank=4))
    if TABLE[name].spare:
        whole = adapter(ranks=20)
    seen = []

    def work(local):
        seen.append({*local.mine, *local.begin, *local.down})
        program = algorithm.work(local)
        ask = step(program)
        while not isinstance(ask, Sent):
            seen.extend(set(t) for t in ([ask.begin] if isinstance(ask, Train) else ask.trees))
            ask = step(program, (yield ask))
        return ask

    looked = replace(algorithm, work=work)
    stages = compression(wire(kind))
    run = simulate(looked, clients_of(whole), whole, 3, stages=stages).finish()
    assert len(seen) >= 3 * 2 * 2
    assert not [n for names in seen for n in names if n.startswith(("wire", "compress", "unsent"))]
    assert all(not n.startswith("wire") for kept in run.kept.values() for n in kept)


def test_what_a_client_stores_parts_into_its_algorithms_and_the_stages_own():
    keep, memory = {"own/x": torch.ones(2), A: INITIAL[A]}, {"compress": {A: torch.zeros(2, 5)}}
    mine, found = parted(joined(keep, memory))
    assert mine.keys() == keep.keys()
    assert found["compress"].keys() == {A}
    assert parted(joined(keep, {})) == (keep, {})
    with pytest.raises(ValueError, match=r"may not keep 'wire\.compress/x'"):
        joined({"wire.compress/x": torch.ones(1)}, {})


def clients_of(whole):
    return {f"c{k}": (1.0 + k, lambda n, now, k=k: now - k) for k in range(2)}


def test_a_message_crosses_processes_as_it_is():
    _, message, _ = message_of(FEDAVG, INITIAL, stages=compression(wire("topk")))
    found = group.unpack(*group.pack(message))
    assert all(torch.equal(found[n], t) for n, t in message.items())
    assert all(found[n].dtype == t.dtype for n, t in message.items())


@pytest.mark.parametrize("name", [n for n, entry in TABLE.items() if entry.partial])
def test_uploads_whose_rest_means_nothing_later_are_not_sent_in_part(name):
    with pytest.raises(ConfigError, match=rf"topk sends the rest.*{name}"):
        load(None, f"algorithm.name={name}", "wire.compress=topk")
    load(None, f"algorithm.name={name}", "wire.compress=int8")


@pytest.mark.parametrize(
    "words",
    [("wire.topk=0.5",), ("wire.compress=topk", "wire.topk=0"), ("wire.max_norm=0",)],
)
def test_settings_of_the_wire_that_mean_nothing_are_refused(words):
    with pytest.raises(ConfigError, match=r"wire"):
        load(None, "algorithm.name=lora", *words)


@pytest.fixture
def quick(small):
    """Three rounds with two of three sites each."""
    small["data"]["scenes"] |= {"rows": 12}
    small["train"] |= {"rounds": 3, "local_steps": 1, "clients_per_round": 2}
    small["eval"] |= {"every": 0, "max_rows": 1, "max_new_tokens": 1, "clients": 1}
    return small


def test_a_run_resumes_to_the_same_bytes_and_sends_what_was_planned(quick, tmp_path):
    quick |= {"algorithm": {"name": "rolora"}, "wire": {"compress": "topk"}}
    quick["lora"] |= {"ranks": {"site-1": 1}}
    whole = fedvlm.run(quick, f"output={tmp_path / 'whole'}")
    with pytest.raises(KeyboardInterrupt):
        federate.run(quick, f"output={tmp_path / 'stopped'}", progress=Stop(3))
    federate.resume(tmp_path / "stopped")
    assert bytes_of(tmp_path / "stopped") == bytes_of(whole.folder)
    lines = files.read_lines(whole.folder / "metrics.jsonl")[1:]
    plan = forecast(load(quick))
    for way in ("up", "down"):
        real = [n for line in lines for n in line[f"bytes_{way}"].values()]
        assert (plan.sent[way], plan.all_sent[way]) == (Spread.of(real), sum(real))
    kept = store.Store(whole.folder).personal(["site-0", "site-1", "site-2"])
    assert all(parted(tree)[1]["compress"] for tree in kept)
    opened = fedvlm.open_run(whole.folder)
    other = next(c for c in opened.partition.clients if c not in opened.clients)
    assert opened.adapter_folder(other).exists(), "a client without scores has a model, too"


def test_both_engines_send_the_same(quick, tmp_path):
    quick |= {"algorithm": {"name": "lora"}, "wire": {"compress": "topk"}}
    quick["train"] |= {"rounds": 2, "optimizer": "sgd", "lr": 0.1}
    states = [
        store.Store(fedvlm.run(quick, f"output={tmp_path / n}", f"engine.name={n}").folder).server()
        for n in ("reference", "cohort")
    ]
    assert close(*states, atol=1e-4)


def test_a_run_names_who_was_rejected_and_stops_where_all_are(quick, monkeypatch):
    train = CohortEngine.train
    bad = {1: {"site-0", "site-1"}, 2: set(), 3: {"site-0", "site-1", "site-2"}}

    def spoilt(engine, tasks):
        for reply in train(engine, tasks):
            broken = {n: t * math.nan for n, t in reply.upload.items()}
            ill = reply.client in bad[tasks[0].round]
            yield replace(reply, upload=broken) if ill else reply

    monkeypatch.setattr(CohortEngine, "train", spoilt)
    quick["train"] |= {"rounds": 3, "clients_per_round": None}
    with pytest.raises(FedVLMError, match="all 3 uploads of this round were rejected"):
        fedvlm.run(quick)
    first, second = files.read_lines(Path(quick["output"]) / "metrics.jsonl")[1:]
    assert first["rejected"].keys() == {"site-0", "site-1"}
    assert "rejected" not in second
    assert first["train_loss"].keys() == {"site-2"}
    assert "not finite" in first["rejected"]["site-0"]
