"""Models, data sets and adapters on the hub, through the real clients and a hub on loopback."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import ANY
from urllib.parse import unquote

import pytest
from huggingface_hub import ModelCard

import fedvlm
import smallest
from fedvlm.errors import FedVLMError
from fedvlm.hub import is_name, split
from fedvlm.models.load import locate
from hub import Hub
from hubclient import Client

pytestmark = pytest.mark.waits("hub")

NAMES = ("model.name=org/tiny", "data.path=org/rows")
SMALL = ("partition.kind=column", "partition.column=site", "partition.min_rows=4", "lora.rank=2")
SMALL += ("train.rounds=1", "train.local_steps=1", "train.batch_size=4", "train.average=none")
SMALL += ("eval.max_rows=2", "eval.max_new_tokens=2", "eval.every=0", "engine.threads=1")


ODD = "Süd/2 | `x` <b>"  # the name of a site


def parquet(rows: int) -> dict[str, bytes]:
    """The files of a data set of two sites."""
    table = fedvlm.scenes(sites=2, rows=rows).to_pandas()
    table["site"] = table["site"].replace("site-0", ODD)
    return {"data/train.parquet": table.to_parquet()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the clients' processes and caches."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(place):
    """A hub with a model and rows: open, private, and gated for all but one account."""
    model, rows = Path(smallest.model()), parquet(12)
    with Hub() as started:
        for kind, name, files in (("models", "tiny", model), ("datasets", "rows", rows)):
            started.add(kind, f"org/{name}", files)
            started.add(kind, f"org/secret-{name}", files, private=True)
            started.add(kind, f"org/gated-{name}", files, gated=True, members={"ada"})
        started.add("models", "org/empty", {"README.md": b"# Nothing\n"})
        yield started


@pytest.fixture(scope="module")
def online(hub, place):
    """A process that knows the hub."""
    with Client(hub.env(place / "home"), place) as client:
        yield client


@pytest.fixture(scope="module")
def run(online, place):
    """A run whose model and rows come from the hub."""
    assert online("run", "-q", *NAMES, *SMALL, "output=first") == (0, ANY, "")
    return place / "first"


def downloads(hub: Hub) -> list[tuple[str, str | None]]:
    """The last part of the path and the range of each download since the last call."""
    found = [(p.rpartition("/")[2], r) for m, p, r in hub.asked if m == "GET" and "/resolve/" in p]
    hub.asked.clear()
    return found


def test_a_run_by_names_downloads_once_and_then_works_offline(hub, online, run, place):
    assert {"model.safetensors", "train.parquet"} <= {name for name, _ in downloads(hub)}
    first = online.loads(*NAMES)
    assert downloads(hub) == []
    with Client({**hub.env(place / "home"), "HF_HUB_OFFLINE": "1"}, place) as offline:
        code, _, errors = offline("run", "-q", *NAMES, *SMALL, "output=second")
        assert (code, errors) == (0, "")
        for wrong in ("model.name=org/other", "data.path=org/other"):
            code, _, errors = offline("run", "-q", *NAMES, *SMALL, wrong)
            assert code == 2
            assert f"{wrong.replace('=', ': ' + chr(39))}' does not load" in errors
            assert "HF_HUB_OFFLINE is set" in errors
    assert hub.asked == []
    tables = [(place / name / "table.csv").read_bytes() for name in ("first", "second")]
    assert tables[0] == tables[1]
    hub.silent = True  # the network is gone, and nobody has set HF_HUB_OFFLINE
    try:
        assert online.loads(*NAMES) == first
        code, _, errors = online("run", *NAMES, *SMALL, "model.name=org/other")
    finally:
        hub.silent = False
    assert code == 2
    assert f"{hub.address} does not deliver it" in errors
    assert "hf download org/other --local-dir DIR" in errors


@pytest.mark.parametrize(
    ("wrong", "token", "said"),
    [
        ("{}wrong-{}", "", ["there is no {kind}", "check the name", "now: none"]),
        ("{}wrong-{}", "hf_reader", ["there is no {kind}", "now: that of HF_TOKEN"]),
        ("{}secret-{}", "", ["or it is private", "give a token", "hf auth login"]),
        ("{}secret-{}", "hf_none", ["refuses the token (that of HF_TOKEN)", "/settings/tokens"]),
        ("{}gated-{}", "", ["access to it is restricted: ask for access at http", "now: none"]),
        ("{}gated-{}", "hf_reader", ["access to it is restricted", "now: that of HF_TOKEN"]),
        ("{}{}@v2", "", ["it has no revision 'v2': give a branch, a tag or a commit"]),
    ],
)
@pytest.mark.parametrize("kind", ["model", "data set"])
def test_a_name_that_does_not_load_says_why_and_what_to_do(wrong, token, said, kind, online):
    setting, last = ("model.name", "tiny") if kind == "model" else ("data.path", "rows")
    name = wrong.format("org/", last)
    code, _, errors = online("run", *NAMES, *SMALL, f"{setting}={name}", token=token)
    assert (code, errors.count("error:"), "Traceback" in errors) == (2, 1, False)
    assert f"{setting}: '{name}' does not load from the Hugging Face hub" in errors
    for text in said:
        assert text.format(kind=kind) in errors
    assert token not in errors or not token


def test_a_repository_without_a_model_names_the_missing_file(online):
    code, _, errors = online("run", *NAMES, *SMALL, "model.name=org/empty")
    assert code == 2
    assert "'org/empty' does not load" in errors
    assert "config.json" in errors


def test_a_dry_run_names_a_wrong_name_and_downloads_no_rows(hub, online):
    hub.add("datasets", "org/fresh", hub.files("datasets", "org/rows"))
    for wrong in ("model.name=org/nobody", "data.path=org/nobody"):
        code, _, errors = online("run", "--dry-run", *NAMES, *SMALL, wrong)
        assert code == 2
        assert "there is no" in errors
    downloads(hub)
    code, text, _ = online("run", "--dry-run", NAMES[0], *SMALL, "data.path=org/fresh")
    assert code == 0
    assert "data.path 'org/fresh' is no file or folder here" in text
    assert "not in the local cache" in text
    assert downloads(hub) == []


def test_a_token_opens_what_is_private_and_what_is_gated(online):
    names = ("model.name=org/secret-tiny", "data.path=org/gated-rows")
    _, rows = online.loads(*names, token="hf_writer")
    assert rows == 24


def test_a_revision_stays_the_same_when_the_branch_moves(hub, place, online):
    for kind, name, files in (
        ("models", "org/moving", Path(smallest.model())),
        ("datasets", "org/moving", parquet(10)),
    ):
        hub.add(kind, name, files)
    fixed = [hub.repos[kind, "org/moving"].branches["main"] for kind in ("models", "datasets")]
    pinned = (f"model.name=org/moving@{fixed[0]}", f"data.path=org/moving@{fixed[1]}")
    before = online.loads(*pinned)
    newer = Path(smallest.model()), parquet(14)
    files = {p.name: p.read_bytes() for p in newer[0].iterdir()}
    files["config.json"] = files["config.json"].replace(b"{", b'{"note": 2,', 1)
    hub.add("models", "org/moving", files)
    hub.add("datasets", "org/moving", newer[1])
    main = online.loads("model.name=org/moving", "data.path=org/moving")
    assert main[0] != before[0]
    assert (before[1], main[1]) == (20, 28)
    assert online.loads("model.name=org/moving@main", "data.path=org/moving@main") == main
    assert online.loads(*pinned) == before
    hub.silent = True
    try:
        assert online.loads(*pinned) == before, "from the cache, which has the newer rows too"
    finally:
        hub.silent = False


def test_a_download_that_breaks_is_resumed_or_begun_again_by_a_second_start(hub, online):
    hub.add("models", "org/torn", hub.files("models", "org/tiny"))
    hub.add("datasets", "org/torn", hub.files("datasets", "org/rows"))
    names = ("model.name=org/torn", "data.path=org/torn")
    for setting, size in (("data.path: 'org/torn'", 100_000), ("model.name: 'org/torn'", 300_000)):
        hub.breaks = [(size, True)]
        code, _, errors = online("run", *names, *SMALL)
        assert (code, hub.breaks, "Traceback" in errors) == (2, [], False)
        assert f"{setting} does not load" in errors
        assert "the download broke off: start again" in errors
    online.code("import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 10_000")
    downloads(hub)
    hub.breaks = [(300_000, False)]
    online.loads(*names)
    assert hub.breaks == []
    found = downloads(hub)
    assert ("model.safetensors", "bytes=300000-") in found
    assert not [name for name, _ in found if name in ("train.parquet", "config.json")]


# Adapters go up


@pytest.mark.parametrize(
    ("words", "token", "said"),
    [
        (["org/new"], "", "there is no token for {}: log in with hf auth login, or set HF_TOKEN"),
        (["org/new"], "hf_none", "refuses the token (that of HF_TOKEN)"),
        (["org/new"], "hf_reader", "the token of 'ben' may only read: make one that may write"),
        (["other/new"], "hf_writer", "'ada' may not write there"),
        (["org/tiny"], "hf_writer", "'org/tiny' exists and is public"),
        (["org/secret-tiny", "--public"], "hf_writer", "'org/secret-tiny' exists and is private"),
        (["new"], "hf_writer", "'new' is no name of a repository"),
        (["org/new", "--revision", "a b"], "hf_writer", "'a b' is no name of a branch"),
        (["org/new", "--client", "nobody"], "hf_writer", "has no client 'nobody'"),
        (["org/new", "--set", "model.name={here}"], "hf_writer", "is a folder of this machine"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_goes_up(
    words, token, said, hub, online, run
):
    known, _ = dict(hub.repos), hub.asked.clear()
    words = [word.format(here=smallest.model()) for word in words]
    code, _, errors = online("push", run, *words, token=token)
    assert (code, errors.count("error:"), "Traceback" in errors) == (2, 1, False)
    assert said.format(hub.address) in errors
    assert not token or token not in errors
    assert hub.repos == known
    assert {method for method, path, _ in hub.asked if path != "/api/repos/create"} <= {"GET"}


def test_pushed_adapters_load_by_name_and_answer_as_the_run_does(hub, online, run, place):
    code, text, errors = online("push", run, "org/adapters", token="hf_writer")
    assert code == 0, errors
    repo = hub.repos["models", "org/adapters"]
    assert repo.private
    assert repo.titles == ["initial commit", "LoRA adapters by fedvlm: 3 models"]
    files = {p: c for p, c in hub.files("models", "org/adapters").items() if p != ".gitattributes"}
    three = ("adapter_config.json", "adapter_model.safetensors", "README.md")
    folders = {"Süd-2-x-b": ODD, "site-1": "site-1", "global": None}
    assert set(files) == {"README.md", *(f"{name}/{file}" for name in folders for file in three)}
    assert "to org/adapters (new, private), branch main, as ada:" in text
    for path, content in files.items():
        assert f"  {path}  {len(content):,} bytes\n" in text
    for secret in (str(place), smallest.model(), "hf_writer", "/home/", "/root/"):
        assert not [path for path, content in files.items() if secret.encode() in content]
    for name, client in folders.items():
        kept = run / "adapters" / ("global" if client is None else f"client-{name}")
        assert files[f"{name}/{three[1]}"] == (kept / three[1]).read_bytes()
    card = files["README.md"].decode()
    assert ModelCard(card).data.base_model == "org/tiny"
    links = re.findall(r"\]\(([^)]*)\)", card)
    assert {unquote(link) for link in links} == {f"{name}/README.md" for name in folders}
    assert r"| Süd\/2 \| \`x\` \<b\> |" in card

    fedvlm.scenes(sites=1, rows=4)[0]["image"].save(place / "photo.png")
    words = ("photo.png", "What is in the picture?")
    for name, client in folders.items():
        model = ("--client", client) if client else ("--global",)
        answer = online("predict", run, *words, *model)[1].strip()
        assert answer
        for where, more in (("README.md", [name]), (f"{name}/README.md", [])):
            (code,) = re.findall(r"```python\n(.*?)```", files[where].decode(), re.DOTALL)
            assert online.code(code, *more, *words, token="hf_writer").strip() == answer


def test_a_push_adds_one_commit_to_the_branch_that_it_names(hub, online, run):
    words = ("org/shown", "--public", "--global", "--revision", "v2")
    assert online("push", run, *words, token="hf_writer")[0] == 0
    repo = hub.repos["models", "org/shown"]
    assert not repo.private
    repo.commit({**hub.files("models", "org/shown", "v2"), "notes.txt": b"ours"}, "v2", "notes")
    code, text, _ = online("push", run, *words[:2], "-c", ODD, *words[3:], token="hf_writer")
    assert code == 0
    assert "to org/shown (existing, PUBLIC: everybody can read it), branch v2" in text
    ours = "LoRA adapters by fedvlm: 1 model"
    assert repo.titles[1:] == [ours, "notes", ours]
    assert set(hub.files("models", "org/shown")) == {".gitattributes"}
    both = hub.files("models", "org/shown", "v2")
    assert {"notes.txt", "global/README.md", "Süd-2-x-b/README.md"} <= set(both)
    assert (
        "'org/shown', subfolder='Süd-2-x-b', revision='v2'" in both["Süd-2-x-b/README.md"].decode()
    )


# Names


@pytest.mark.parametrize("name", ["org/name@", "org/a b", "../none", "a/b/c", "~x/y", "org/x@../y"])
def test_what_is_no_name_on_the_hub_is_no_folder_either(name):
    assert not is_name(name)
    with pytest.raises(FedVLMError, match="there is no model folder"):
        locate(name)


@pytest.mark.parametrize("name", ["org/name", "org/name@v1.0", "org/na.me@refs/pr/1", "gpt2@main"])
def test_a_name_may_have_a_revision(name):
    assert locate(name) == (name, False)
    assert "@".join(filter(None, split(name))) == name
