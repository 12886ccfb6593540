"""Messages between server and clients: their checks, and their compression."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedvlm
from fedvlm.algorithms.sharing import alternating, sharing
from fedvlm.algorithms.table import TABLE, Client, Work, build
from fedvlm.config import load
from fedvlm.engines import group
from fedvlm.engines.cohort import CohortEngine
from fedvlm.engines.compress import UNSENT, compressed
from fedvlm.engines.wire import Forms, Reply, sent_up
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.planning.forecast import Spread, forecast
from fedvlm.rounds import federate
from fedvlm.rounds.fold import Fold
from fedvlm.settings.sections import AlgorithmConfig, LoraConfig, WireConfig
from fedvlm.store import files
from fedvlm.store import run as store
from fedvlm.tree import part, saved_bytes
from test_federate import Stop, bytes_of
from toy import FEDAVG, INITIAL, A, B, Federation, adapter, clients, close

KINDS = ("bf16", "int8", "topk")
SITE = Client("site-0", 12.0)
PLORA = sharing({"": "B"})
RANKS = {"lora": LoraConfig(rank=4, ranks={"site-0": 2})}


def wire(compress, **settings):
    return WireConfig(compress=compress, **settings)


def feed(tree, seed=0):
    """A tree with noise added, like one after training."""
    g = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in tree.items()}


def work(down, end):
    """The work of a client that starts from ``down`` and ends at ``end``."""
    return Work(down, {}, (end,), ({"A": 1.0, "B": 1.0},), {**end, **down})


def message_of(algorithm, whole, client=SITE):
    """The download of a client, its message and its upload."""
    down = algorithm.download(algorithm.init(whole), client)
    like = Federation(algorithm, {client.name: (client.weight, lambda n, now: 0.1 * now)}, whole)
    like.run()
    return down, like.messages[client.name], like.uploads[client.name]


def algorithms():
    for name, entry in TABLE.items():
        for kind in ("none", *KINDS):
            if not (kind == "topk" and entry.partial):
                yield pytest.param(name, kind, id=f"{name}-{kind}")


# The checks


@pytest.mark.parametrize(("name", "kind"), algorithms())
def test_what_an_algorithm_sends_is_taken_at_both_ends(name, kind):
    config = AlgorithmConfig(name=name, **({"share": {"q_proj": "A"}} if name == "share" else {}))
    lora = RANKS.get(name, LoraConfig(rank=4))
    spare = 16 if TABLE[name].spare else 0
    whole = adapter(ranks=4 + spare, out=30, into=40)
    algorithm = build(config, lora, wire(kind))
    for number in (1, 2):
        one, forms = algorithm.at(number), Forms(whole, max_norm=100.0)
        down, message, upload = message_of(one, whole)
        forms.check_download(one, SITE.name, down)
        found = forms.received(one, SITE, down, message, 12)
        assert found.keys() == upload.keys()
        assert saved_bytes(message) == saved_bytes(sent_up(one, whole, down))


def spoiled(message, change):
    """A message with its first tensor changed."""
    name = next(iter(message))
    return {**message, name: change(message[name])}


BAD = {
    "lacks .*lora_B": lambda m: {},
    "holds 'more' that": lambda m: {**m, "more": torch.zeros(1)},
    r"float32 \[4, 1\], which must be float32 \[4, 2\]": lambda m: spoiled(m, lambda t: t[:, :1]),
    "float64 .* must be float32": lambda m: spoiled(m, lambda t: t.double()),
    "not finite": lambda m: spoiled(m, lambda t: t.log() * 0),
    r"norm of 28\.\d+, above wire\.max_norm=5": lambda m: spoiled(m, lambda t: 0 * t + 10),
}


@pytest.mark.parametrize("said", BAD)
def test_a_bad_upload_is_refused_by_name_and_reason(said):
    down = PLORA.init(INITIAL)
    message = BAD[said](feed(down))
    with pytest.raises(FedVLMError, match=f"client 'site-0' .*{said}"):
        Forms(INITIAL, max_norm=5.0).received(PLORA, SITE, down, message, 12)


@pytest.mark.parametrize("weight", [0, -1, 12.5, math.nan, math.inf])
def test_a_client_counts_for_no_more_examples_than_it_registered(weight):
    down = PLORA.init(INITIAL)
    with pytest.raises(FedVLMError, match=r"'site-0' claims .* it registered 12"):
        Forms(INITIAL).received(PLORA, SITE, down, feed(down), weight)


def test_the_norm_is_that_of_the_change_and_not_of_the_factors():
    down = {B: torch.full((4, 2), 100.0)}
    forms = Forms(INITIAL, max_norm=1.0)
    assert forms.received(PLORA, SITE, down, feed(down), 12)
    assert forms.received(
        compressed(PLORA, wire("bf16")), SITE, down, {B: down[B].bfloat16() * 0}, 1
    )


def test_a_client_of_a_lower_rank_may_send_its_own_ranks_and_no_more():
    whole = adapter(ranks=4)
    algorithm = build(AlgorithmConfig(name="lora"), RANKS["lora"])
    small, large = (message_of(algorithm, whole, Client(f"site-{k}", 12.0)) for k in (0, 1))
    forms = Forms(whole)
    assert small[1][A].shape[0] == 2
    with pytest.raises(FedVLMError, match=r"float32 \[4, 5\], which must be float32 \[2, 5\]"):
        forms.received(algorithm, SITE, small[0], large[1], 12)
    with pytest.raises(FedVLMError, match="'site-0' refuses what the server sent"):
        forms.check_download(algorithm, "site-0", large[0])


def test_rolora_may_send_b_in_odd_rounds_and_a_in_even_ones():
    odd, even = (alternating().at(n) for n in (1, 2))
    with pytest.raises(FedVLMError, match=r"lacks .*lora_A"):
        Forms(INITIAL).received(even, SITE, INITIAL, message_of(odd, INITIAL)[1], 12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t * math.nan, "values in .*lora_B.* not finite"),
        (lambda t: t[:1], "which must be"),
        (lambda t: t.int(), "int32 .* must be float32"),
    ],
)
def test_a_client_refuses_a_download_that_its_algorithm_does_not_send(change, said):
    down = spoiled(PLORA.init(INITIAL), change)
    with pytest.raises(FedVLMError, match=f"'site-0' refuses what the server sent: it .*{said}"):
        Forms(INITIAL).check_download(PLORA, "site-0", down)


def fold_of(replies, algorithm=PLORA):
    known = {c: Client(c, 12.0) for c in replies}
    state = algorithm.init(INITIAL)
    fold = Fold(algorithm, known, dict.fromkeys(replies, state), Forms(INITIAL))
    for client, upload in replies.items():
        fold.add(Reply(client, upload, 12, 1.0))
    return fold, state


def test_a_round_goes_on_without_the_upload_that_is_bad():
    good = {c: feed(PLORA.init(INITIAL), seed) for seed, c in enumerate(("a", "b"))}
    fold, state = fold_of({"a": good["a"], "bad": {B: good["a"][B] * math.nan}, "b": good["b"]})
    assert list(fold.losses) == ["a", "b"]
    assert list(fold.rejected) == ["bad"]
    assert close(fold.update(state), {B: (good["a"][B] + good["b"][B]) / 2})
    assert fold.bytes_up["bad"] == fold.bytes_up["a"] > 0


def test_a_round_without_a_usable_upload_is_an_error():
    fold, state = fold_of({"a": {}, "b": {A: INITIAL[A]}})
    with pytest.raises(FedVLMError, match="none of the 2 uploads") as caught:
        fold.update(state)
    assert all(f"client '{c}' lacks" in str(caught.value) for c in "ab")


# Compression


def test_eight_bits_are_off_by_half_a_step_of_their_row_at_most():
    down = {A: torch.zeros(2, 50), B: torch.zeros(40, 2)}
    step = {n: torch.randn(t.shape, generator=torch.manual_seed(1)) for n, t in down.items()}
    step[A][1] = 0
    one = compressed(FEDAVG, wire("int8"))
    message, mine = one.finish(work(down, step))
    assert [message[n].dtype for n in (A, B)] == [torch.int8] * 2
    assert message["scales"].shape == (2 + 2,), "a scale for every rank of A and of B"
    found = one.decode(message, down)
    for name, most in ((A, step[A].abs().amax(1)[:, None]), (B, step[B].abs().amax(0))):
        assert ((found[name] - step[name]).abs() <= most / 254 * 1.001).all()
        assert torch.allclose(found[name] + part(mine, UNSENT)[name], step[name])
    assert not found[A][1].any()


def test_topk_sends_the_largest_elements_of_the_whole_upload():
    down = feed({A: torch.zeros(2, 50), B: torch.zeros(40, 2)})
    end = feed(down, seed=1)
    one = compressed(FEDAVG, wire("topk", topk=0.1))
    message, _ = one.finish(work(down, end))
    found = one.decode(message, down)
    steps = torch.cat([(end[n] - down[n]).flatten() for n in (A, B)])
    got = torch.cat([(found[n] - down[n]).flatten() for n in (A, B)])
    assert len(message["values"]) == 18 == int((got.abs() > 1e-6).sum())
    assert got.abs().max() == pytest.approx(steps.abs().max().item(), rel=1e-4)
    assert torch.allclose(got[got != 0], steps[got != 0], atol=1e-6)
    assert steps[got == 0].abs().max() <= message["values"].abs().min()


@pytest.mark.parametrize("where", [[0, 0], [1, 0], [-1, 2], [0, 8]])
def test_indices_that_no_client_would_send_are_refused(where):
    one = compressed(PLORA, wire("topk", topk=0.25))
    down, message, _ = message_of(one, INITIAL)
    message["indices"] = torch.tensor(where, dtype=torch.int32)
    with pytest.raises(FedVLMError, match="'site-0' has indices"):
        Forms(INITIAL).received(one, SITE, down, message, 12)


def wavy(name, now):
    """A gradient that is different everywhere."""
    return torch.cos(7 * now + torch.arange(now.numel()).view(now.shape))


@pytest.mark.parametrize("kind", ["int8", "topk"])
@pytest.mark.parametrize(
    "algorithm", [FEDAVG, PLORA, alternating()], ids=["lora", "plora", "rolora"]
)
def test_what_was_not_sent_is_sent_later(algorithm, kind):
    """Sum of the received uploads, plus the unsent rest, is the sum of the intended uploads."""
    whole = adapter(ranks=2, out=9, into=11)
    one = compressed(algorithm, wire(kind, **({"topk": 0.05} if kind == "topk" else {})))
    run = Federation(one, {"c": (1.0, wavy)}, whole)
    meant = {n: torch.zeros_like(t) for n, t in whole.items()}
    got = {n: torch.zeros_like(t) for n, t in whole.items()}
    for _ in range(6):
        run.run()
        for name, upload in run.uploads["c"].items():
            meant[name] += run.works["c"].end[name]
            got[name] += upload
    rest = part(run.kept["c"], UNSENT)
    assert all(t.abs().max() > 0 for t in rest.values())
    for name, left in rest.items():
        assert torch.allclose(got[name] + left, meant[name], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_whose_uploads_are_compressed_learn_the_same(kind):
    share = {"topk": 0.3} if kind == "topk" else {}
    plain, short = FEDAVG, compressed(FEDAVG, wire(kind, **share))
    ends = [Federation(one, clients(), INITIAL, steps=3).run(60).model() for one in (plain, short)]
    off = max((ends[1][n] - t).abs().max().item() for n, t in ends[0].items())
    moved = max((INITIAL[n] - t).abs().max().item() for n, t in ends[0].items())
    assert off < {"bf16": 0.003, "int8": 0.001, "topk": 0.1}[kind] * moved


@pytest.mark.parametrize("name", ["scaffold", "ditto", "apfl", "fedprox", "feddpa", "plora"])
def test_the_algorithm_does_not_see_what_was_not_sent(name):
    """When every element is sent, the rest is zero and no algorithm changes."""
    config = AlgorithmConfig(name=name)
    whole, lora = adapter(ranks=4), LoraConfig(rank=4)
    plain, all_sent = (build(config, lora, w) for w in (None, wire("topk", topk=1.0)))
    runs = [Federation(one, clients_of(whole), whole).run(3) for one in (plain, all_sent)]
    assert close(runs[1].state, runs[0].state)
    for client, kept in runs[0].kept.items():
        own = {n: t for n, t in runs[1].kept[client].items() if not n.startswith(UNSENT)}
        assert own.keys() == kept.keys()
        assert close(own, kept)


def clients_of(whole):
    return {f"c{k}": (1.0 + k, lambda n, now, k=k: now - k) for k in range(2)}


def test_a_message_crosses_processes_as_it_is():
    _, message, _ = message_of(compressed(FEDAVG, wire("topk")), INITIAL)
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


# Whole runs


@pytest.fixture
def quick(small):
    """Three rounds of two of three sites."""
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
    assert all(part(tree, UNSENT) for tree in kept)
    opened = fedvlm.open_run(whole.folder)
    other = next(c for c in opened.partition.clients if c not in opened.clients)
    assert opened.adapter_folder(other).exists(), "a client that was not scored has a model too"


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

    def spoilt(engine, algorithm, tasks):
        for reply in train(engine, algorithm, tasks):
            broken = {n: t * math.nan for n, t in reply.upload.items()}
            ill = reply.client in bad[tasks[0].round]
            yield replace(reply, upload=broken) if ill else reply

    monkeypatch.setattr(CohortEngine, "train", spoilt)
    quick["train"] |= {"rounds": 3, "clients_per_round": None}
    with pytest.raises(FedVLMError, match="none of the 3 uploads"):
        fedvlm.run(quick)
    first, second = files.read_lines(Path(quick["output"]) / "metrics.jsonl")[1:]
    assert first["rejected"].keys() == {"site-0", "site-1"}
    assert first["train_loss"].keys() == {"site-2"}
    assert "not finite" in first["rejected"]["site-0"]
    assert "rejected" not in second
