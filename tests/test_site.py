"""One client's side of a deployed run, and the engine that asks the sites."""

import json
import shutil

import pytest
import torch

import fedvlm
import smallest
from fedvlm import tree
from fedvlm.algorithms.base import NOBODY, Visit
from fedvlm.algorithms.table import build
from fedvlm.deploy.policy import Policy, Refused
from fedvlm.deploy.remote import Limits, Remote
from fedvlm.deploy.site import Site
from fedvlm.deploy.worker import Worker
from fedvlm.engines.base import Models
from fedvlm.engines.wire import Task
from fedvlm.errors import FedVLMError
from fedvlm.rounds import federate
from fedvlm.store import files
from fedvlm.store import run as store
from sites import FEW, SITES, Here, Keeping, config, deployed, opening, written


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a parquet file of each site's rows, and one of all rows."""
    folder = tmp_path_factory.mktemp("data")
    table = fedvlm.scenes(style="concept", sites=3, rows=16).to_pandas()
    table.to_parquet(folder / "all.parquet", index=False)
    for site in SITES:
        table[table["site"] == site].to_parquet(folder / f"{site}.parquet", index=False)
    return folder


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
    """The same run twice: in one process, and over three sites."""
    folder = tmp_path_factory.mktemp("runs")
    settings = config(data, f"output={folder / 'here'}")
    here = federate.run(settings)
    call, events = Here(data, folder / "state"), []
    call.slow["site-0"] = 0.05
    there = deployed(call, settings, folder / "there", events=events)
    return here, there, folder / "state", events, call


def check_scores(here, there):
    for model in ("untuned", "global", "personal", "personal_before"):
        assert there.table["models"][model]["clients"].keys() == dict.fromkeys(SITES).keys()
        for site in SITES:
            mine, theirs = (r.table["models"][model]["clients"][site] for r in (here, there))
            assert theirs == pytest.approx(mine, abs=1e-4)


def check_adapters(here, there, state):
    pairs = [(here.adapter(), there.adapter())]
    pairs += [(here.adapter(s), state / s / "runs/run-1/adapters/personal") for s in SITES]
    for mine, theirs in pairs:
        a, b = (files.load_tree(f / "adapter_model.safetensors") for f in (mine, theirs))
        assert a.keys() == b.keys()
        assert max((a[n] - b[n]).abs().max() for n in a) <= 1e-7


def test_sites_get_the_scores_of_one_process(both):
    here, there, *_ = both
    check_scores(here, there)


def test_sites_get_the_adapters_of_one_process(both):
    here, there, state, *_ = both
    check_adapters(here, there, state)


def test_sites_get_the_same_from_the_default_algorithm(data, tmp_path):
    own = "algorithm.name=auto", "train.finish_steps=2", "train.average=mean"
    settings = config(data, *own, "train.lr=0.02", f"output={tmp_path / 'here'}")
    here = federate.run(settings)
    there = deployed(Here(data, tmp_path / "state"), settings, tmp_path / "there")
    check_scores(here, there)
    check_adapters(here, there, tmp_path / "state")


def test_tensors_are_fetched_by_few_and_give_the_same_run(both, data, tmp_path):
    _, there, *_ = both
    call, begun = Keeping(data, tmp_path / "state"), []
    call.slow["site-0"] = 0.2  # the others finish first, and wait for their turn
    plain, now = call.__call__, set()

    def watched(site, header, blob, limit):
        if header["do"] == "fetch":
            now.add(site)
            begun.append((site, len(now)))
        try:
            return plain(site, header, blob, limit)
        finally:
            now.discard(site)

    results = deployed(watched, config(data), tmp_path / "run", held=1, at_once=3)
    assert not call.kept
    assert max(count for _, count in begun) == 1, "the server fetches as many as it may hold"
    adapter, *trained = [site for site, _ in begun]
    assert adapter == "site-0"
    assert trained == [*SITES, *SITES], "in the cohort's order"
    assert digest(results.adapter()) == digest(there.adapter())


def digest(folder):
    return tree.digest(files.load_tree(folder / "adapter_model.safetensors"))


def test_what_is_personal_stays_at_the_site(both):
    _, there, *_, call = both
    assert not (there.folder / "personal").exists()
    assert not list(there.folder.glob("answers/*"))
    assert [p.name for p in (there.folder / "adapters").iterdir()] == ["global"]
    header = {"do": "train", "round": 2, "sampled": 1.0}
    _, blob = call("site-0", header, last_download(call), 9)
    assert {n.split(".")[-2] for n in torch_names(blob)} == {"lora_B"}, "A is personal"


def torch_names(blob):
    from safetensors.torch import load

    return load(blob)


def last_download(call, site="site-0", round_=2):
    """The state that the server sent to a site last."""
    site = call.workers[site].site
    known = site.store.version(round_ - 1)
    assert known
    return LAST[site.name]


LAST = {}


@pytest.fixture(autouse=True, scope="module")
def _remember():
    """Keeps the state that each site was sent last."""
    plain = Site.train

    def train(self, round_, down, sampled=1.0):
        from safetensors.torch import save

        LAST[self.name] = save(down)
        return plain(self, round_, down, sampled)

    Site.train = train
    yield
    Site.train = plain


def test_no_message_of_a_site_holds_personal_factors_images_or_text(both, data):
    import pandas as pd

    *_, call = both
    sent = b"".join(call.wire)
    rows = pd.read_parquet(data / "all.parquet")
    secret = [image["bytes"][100:164] for image in rows["image"]]
    secret += [text.encode() for text in rows["question"]]
    secret += [text.encode() for text in rows["chosen"] if len(text) > 6]
    for site in SITES:
        kept = call.workers[site].site.store
        for round_ in kept.rounds():
            version = kept.version(round_)
            mine = [tensor.numpy().tobytes() for tensor in version.trees["mine"].values()]
            secret += [tensor[:32] for tensor in mine]
            shared = [tensor.numpy().tobytes() for tensor in version.trees["upload"].values()]
            assert all(tensor[:32] in sent for tensor in shared), "the search finds sent tensors"
    assert len(secret) > 100
    assert not [piece for piece in secret if piece in sent]


def test_a_repeated_round_gives_the_saved_reply(both):
    *_, call = both
    site = call.workers["site-1"].site
    saved = site.store.version(2)
    down = torch_names(LAST["site-1"])
    site.engine.train = None  # training again would fail
    try:
        again = site.train(2, down)
    finally:
        del site.engine.train
    assert again.loss == saved.loss
    assert all(torch.equal(again.trees["upload"][n], t) for n, t in saved.trees["upload"].items())
    assert site.store.rounds() == [1, 2]


def test_an_old_round_is_refused(both):
    *_, call = both
    asked = {"do": "train", "round": 1, "sampled": 1.0}
    header, blob = call("site-1", asked, LAST["site-1"], 9)
    assert (header["error"], blob) == ("refused", b"")
    assert "round 1 is over" in header["message"]


def test_damaged_state_is_named_and_not_used(both, tmp_path):
    *_, state, _, _ = both
    kept = SiteCopy(state / "site-2" / "runs" / "run-1", tmp_path)
    path = tmp_path / "rounds" / "00002" / "mine.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(FedVLMError, match=r"personal state of round 2 .* is damaged"):
        kept.personal(["site-2"])
    shutil.rmtree(path.parent)
    assert kept.personal(["site-2"])[0], "the previous version is kept"


def SiteCopy(folder, to):
    from fedvlm.deploy.sitestore import SiteStore

    shutil.copytree(folder / "rounds", to / "rounds")
    return SiteStore(to)


def test_a_site_that_is_away_is_left_out_and_comes_back(data, tmp_path):
    call, events = Here(data, tmp_path / "state"), []
    settings = config(data)
    plain = Remote.train

    def train(self, tasks):
        call.down = {"site-1"} if tasks[0].round == 1 else set()
        yield from plain(self, tasks)

    Remote.train = train
    try:
        results = deployed(call, settings, tmp_path / "run", events=events)
    finally:
        Remote.train = plain
    lines = store.Store(results.folder).lines()
    assert [line.get("missing") for line in lines] == [None, ["site-1"], None]
    (failed,) = [e for e in events if e["event"] == "failed"]
    assert (failed["site"], failed["round"], failed["why"]) == ("site-1", 1, "it is away")
    asked = [what for site, *what in call.asked if site == "site-1"]
    again = asked.index(["train", 2])
    assert asked[again - 1] == ["ping", None], "the server pings the site before it lets it train"


def test_a_bad_upload_is_rejected_by_name_and_the_round_goes_on(data, tmp_path):
    from safetensors.torch import load, save

    call = Here(data, tmp_path / "state")
    plain = call.workers["site-2"].perform

    def poisoned(header, blob):
        about, sent = plain(header, blob)
        if header["do"] == "train" and header["round"] == 1:
            sent = save({name: tensor * float("nan") for name, tensor in load(sent).items()})
        return about, sent

    call.workers["site-2"].perform = poisoned
    results = deployed(call, config(data), tmp_path / "run")
    rejected = [line.get("rejected", {}) for line in store.Store(results.folder).lines()]
    assert [list(r) for r in rejected] == [[], ["site-2"], []]


NAN, HUGE = float("nan"), 10**400
MALFORMED = {
    ("open", "'adapter'"): lambda a, b: ({}, b""),
    ("open", "numbers of rows"): lambda a, b: (a | {"rows": a["rows"] | {"train": 10.5}}, b),
    ("open", "numbers of rows are"): lambda a, b: (a | {"rows": dict(a["rows"], train=HUGE)}, b),
    ("open", "'val'"): lambda a, b: (a | {"rows": {"train": 10**9}, "event": "done"}, b),
    ("train", "no safetensors file"): lambda a, b: (a, b"\x80\x04" + b[2:]),
    ("train", "'loss'"): lambda a, b: ({}, b),
    ("train", "int too large"): lambda a, b: (a | {"loss": HUGE}, b),
    ("train", "recursion"): lambda a, b: (json.loads("[" * 10**5), b),
    ("train", "could not convert"): lambda a, b: (a | {"seconds": "x" * 10**6}, b),
    ("train", "its loss is nan"): lambda a, b: (a | {"loss": NAN}, b),
    ("train", "bytes are more than 2000000"): lambda a, b: (a, b + bytes(2_000_000)),
    ("score", "its scores are"): lambda a, b: ({"scores": {"done": 1.0}}, b),
    ("score", "int too large"): lambda a, b: ({"scores": a["scores"] | {"loss": HUGE}}, b),
    ("score", "not finite"): lambda a, b: ({"scores": a["scores"] | {"loss": NAN}}, b),
}


@pytest.mark.parametrize(("do", "said"), MALFORMED)
def test_a_site_that_answers_malformed_is_left_out_by_name(do, said, both, data, monkeypatch):
    *_, call = both  # its sites answer round 1 again, with the saved reply
    plain, events = call.workers["site-2"].perform, []

    def perform(header, blob):
        answer = plain(header, blob)
        return MALFORMED[do, said](*answer) if header["do"] == do else answer

    monkeypatch.setattr(call.workers["site-2"], "perform", perform)
    engine = Remote(call, SITES, Limits(max_bytes=2_000_000), events.append)
    engine.open("run-1", config(data))
    down = engine.algorithm.send(engine.algorithm.init(engine.adapter), NOBODY)
    visits = {site: Visit(site, 1.0, round=1) for site in engine.sites}
    replies = list(engine.train([Task(visit, down) for visit in visits.values()]))
    scores = engine.score(Models("end", [(visits[reply.client], {}) for reply in replies]))
    (failed,) = [event for event in events if event["event"] == "failed"]
    assert failed["site"] == "site-2"
    assert said in failed["why"]
    assert [reply.client for reply in replies][:2] == list(scores)[:2] == ["site-0", "site-1"]
    assert ("site-2" in engine.sites) == (do != "open")
    assert not [event for event in events if event["event"] == "done"]


def test_no_site_is_an_error_and_the_round_does_not_count(data, tmp_path):
    call = Here(data, tmp_path / "state")
    call.broken = "train"
    with pytest.raises(FedVLMError, match="0 of 3 sites finished round 1"):
        deployed(call, config(data, "eval.every=0"), tmp_path / "run")
    assert store.Store(tmp_path / "run").finished() == 0


def test_a_full_disk_loses_nothing_and_the_round_can_be_done_again(data, tmp_path, monkeypatch):
    call = Here(data, tmp_path / "state", sites=("site-0",))
    opened = opening(config(data).model_dump())
    assert "error" not in call("site-0", opened, b"", 9)[0]
    site = call.workers["site-0"].site
    state = site.algorithm.init(site.engine.adapter)
    down = site.algorithm.send(state, NOBODY)
    first = site.train(1, down)
    plain = files.save_tree

    def full(path, tree):
        if path.name == "mine.safetensors":
            raise OSError(28, "No space left on device")
        plain(path, tree)

    monkeypatch.setattr(files, "save_tree", full)
    with pytest.raises(FedVLMError, match="disk is full, and round 2 is not kept") as error:
        site.train(2, down)
    assert str(tmp_path) not in str(error.value), "the server gets this text"
    assert [path.name for path in (site.store.folder / "rounds").iterdir()] == ["00001"]
    monkeypatch.setattr(files, "save_tree", plain)
    assert site.store.rounds() == [1]
    kept = site.store.personal(["site-0"])[0]
    assert all(torch.equal(kept[n], t) for n, t in first.trees["mine"].items())
    assert site.train(2, down).round == 2
    assert site.store.rounds() == [1, 2]


def test_a_site_refuses_what_its_policy_does_not_allow(data, tmp_path):
    policy = Policy(**FEW | {"rounds": 1, "algorithms": ["lora"], "models": {"other": "x"}})
    with pytest.raises(Refused) as error:
        policy.check(config(data))
    for part in ("2 rounds", "algorithm 'plora'", f"model '{smallest.model()}'"):
        assert part in str(error.value)
    file = written(tmp_path / "policy.yml", bytes_per_round=100)
    own = {"name": "site-0", "data": str(data / "site-0.parquet"), "state": str(tmp_path / "s")}
    worker = Worker(own | {"policy": file})
    opened, _ = worker.perform(opening(config(data).model_dump()), b"")
    assert opened["rows"]["train"] > 0
    algorithm = build(config(data).algorithm)
    down = algorithm.send(algorithm.init(worker.site.engine.adapter), NOBODY)
    from safetensors.torch import save

    refused, _ = worker.perform({"do": "train", "round": 1, "sampled": 1.0}, save(down))
    assert refused["error"] == "refused"
    assert "the limit is 100 (bytes_per_round)" in refused["message"]


def test_a_site_may_keep_its_row_count_to_itself(data, tmp_path):
    settings = config(data)
    policy = Policy(**FEW, tell_rows=False)
    site = Site("s", settings, str(data / "site-0.parquet"), tmp_path / "run", policy)
    assert "rows" not in site.described()
    assert "examples" not in site.score("global", 0, site.algorithm.init(site.engine.adapter))


def test_a_download_to_be_scored_is_checked_as_one_to_be_trained(both):
    from safetensors.torch import load, save

    *_, call = both
    down = load(LAST["site-1"])
    name = next(iter(down))
    for do in ("score", "answer", "export"):
        header = {"do": do, "kind": "personal", "round": 1, "name": "personal"}
        assert "error" not in call("site-1", header, save(down), 9)[0]
        for wrong in (down | {name: down[name] * NAN}, {n: down[n] for n in down if n != name}):
            refused, _ = call("site-1", header, save(wrong), 9)
            assert "'site-1' refuses the server's message" in refused["message"]


def test_the_server_tells_the_sites_none_of_its_paths(both, data):
    *_, call = both
    assert call.configs
    for told in call.configs:
        assert str(data.parent) not in json.dumps(told)
