"""A site writes everything into its state folder, for its owner alone, and all can be erased."""

import json
import os
import stat
from pathlib import Path

import pytest
from filelock import FileLock

import fedvlm
from fedvlm.config import load
from fedvlm.deploy import statefolder
from fedvlm.deploy.downloads import write
from fedvlm.deploy.remote import as_sent
from fedvlm.deploy.supervisor import Supervisor
from fedvlm.errors import FedVLMError
from fedvlm.tree import read
from sites import opening
from test_cli import call

pytestmark = pytest.mark.waits("site")
RUN = {
    "algorithm": {"name": "plora"},
    "train": {"rounds": 20, "local_steps": 10, "batch_size": 8},  # more than the rows: encoded
    "eval": {"every": 0, "max_rows": 10, "max_new_tokens": 4},
    "lora": {"rank": 2},
    "engine": {"clients": 1, "threads": 1},
}


def everything(*roots):
    """The files in some folders, links left out."""
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path


def marks(table):
    """Texts, and pieces of the pictures, that occur in the rows only."""
    texts = [f"MRN-{n:06d}".encode() for n in range(len(table))]
    return texts, [image["bytes"][60:92] for image in table["image"]]


def holding(pieces, *roots):
    return [p for p in everything(*roots) if any(piece in p.read_bytes() for piece in pieces)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A site that has trained and answered, started by a user with the usual umask 022."""
    folder = tmp_path_factory.mktemp("site")
    home, temporary, state = folder / "home", folder / "tmp", folder / "state"
    for path in (home, temporary, state):
        path.mkdir(mode=0o755)  # as a package, or an administrator, would make it
    (state / "old.txt").write_text("of an earlier version")
    os.chmod(state / "old.txt", 0o644)
    table = fedvlm.scenes(style="concept", sites=1, rows=80).to_pandas()
    texts, pictures = marks(table)
    table["chosen"] = [f"{c} {t.decode()}" for c, t in zip(table["chosen"], texts, strict=True)]
    rows = folder / "rows.parquet"
    table.to_parquet(rows, index=False)
    policy = folder / "policy.yml"
    policy.write_text("set: {data.cache: 4096}")
    own = {"name": "site-0", "data": str(rows), "state": str(state), "policy": str(policy)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("TMPDIR", str(temporary))
        for name in ("HF_HOME", "HF_DATASETS_CACHE", "FEDVLM_CACHE", "XDG_CACHE_HOME"):
            patch.delenv(name, raising=False)
        before, site = os.umask(0o022), Supervisor(own | {"log": str(state / "site.log")})
        try:
            opened, _ = site.call(opening(as_sent(load(RUN))), limit=600.0)
            assert "adapter" in opened, opened
            _, adapter = site.call({"do": "adapter"}, limit=600.0)
            down = write({n: t for n, t in read(adapter).items() if "lora_B" in n})
            done, _ = site.call({"do": "train", "round": 1, "sampled": 1.0}, down, limit=600.0)
            assert "loss" in done, done
            personal = {"kind": "personal", "name": "personal", "round": 1}
            assert site.call({"do": "answer", **personal}, down, limit=600.0) == ({"id": 4}, b"")
        finally:
            site.stop()
            os.umask(before)
    return {"state": state, "outside": (home, temporary), "pieces": (texts, pictures), "rows": rows}


def test_rows_lie_in_the_state_folder_only_and_nobody_else_can_read_them(trained):
    texts, pictures = trained["pieces"]
    assert holding([*texts, *pictures], *trained["outside"]) == []
    assert list(everything(*trained["outside"])) == []
    kept = holding(texts, trained["state"])
    assert any("datasets" in p.parts or "fedvlm" in p.parts for p in kept), "the caches"
    assert any("answers" in p.parts for p in kept), "the reference answers"
    for path in (trained["state"], *trained["state"].rglob("*")):
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o077 or path.is_symlink(), path


def test_a_site_is_not_erased_while_it_runs_or_where_no_site_was(trained, tmp_path):
    with (
        FileLock(trained["state"] / ".lock", thread_local=False),
        pytest.raises(FedVLMError, match="stop the site first"),
    ):
        statefolder.erase(trained["state"])
    (tmp_path / "photos").mkdir()
    with pytest.raises(FedVLMError, match="is no site's state"):
        statefolder.erase(tmp_path)
    with pytest.raises(FedVLMError, match="no such run; it has r"):
        statefolder.erase(trained["state"], "../rows.parquet")
    assert (tmp_path / "photos").exists()
    assert trained["rows"].exists()


def test_after_erasing_a_run_and_then_the_site_no_row_is_left(trained, capsys, monkeypatch):
    state, (texts, pictures) = trained["state"], trained["pieces"]
    word = ("site", "erase", "--state", str(state))
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    code, out, errors = call(capsys, monkeypatch, *word)
    assert code == 2
    assert errors == "error: the question was not answered with yes; nothing was changed\n"
    assert str(state / "runs") in out, "it asks first, and names what it would remove"
    assert holding(texts, state)
    code, out, _ = call(capsys, monkeypatch, *word, "--run", "r", "--yes")
    assert code == 0
    assert f"removed {state / 'runs' / 'r'}" in out
    assert "An SSD may" in out
    assert holding([*texts, *pictures], state) == []
    assert (state / "site.log").exists()
    code, out, _ = call(capsys, monkeypatch, *word, "--yes")
    assert code == 0
    assert [p.name for p in state.iterdir()] in ([], [".lock"])
    assert trained["rows"].exists(), "the site's own file stays"


def test_the_digest_of_a_model_is_printed_for_the_policy(capsys, monkeypatch):
    from fedvlm.models.load import BUNDLED
    from fedvlm.models.pin import pin

    code, out, _ = call(capsys, monkeypatch, "site", "digest", str(BUNDLED["tiny"]))
    assert (code, out.split()) == (0, [pin(BUNDLED["tiny"]).digest])
    code, _, errors = call(capsys, monkeypatch, "site", "digest", str(Path(__file__).parent))
    assert code == 2
    assert "config.json" in errors


def test_the_processes_of_a_site_get_the_caches_of_its_state(tmp_path, monkeypatch):
    """NVFlare's processes inherit the same variables, in whose folders they may write."""
    from fedvlm.deploy.nvflare import processes

    given = {}
    monkeypatch.setattr(processes.joining, "joined", lambda *_: None)
    monkeypatch.setattr(processes.joining, "equip", lambda *_: "a")
    monkeypatch.setattr(processes, "_check_first", lambda *_: None)
    monkeypatch.setattr(processes, "check_certificate", lambda *_: "")
    monkeypatch.setattr(processes, "_keep", lambda *args, **_: given.update(args[2]))
    startup = tmp_path / "state" / "nvflare" / "startup"
    startup.mkdir(parents=True)
    target = {"servers": [{"service": {"target": "x:1"}}]}
    (startup / "fed_client.json").write_text(json.dumps(target))
    (tmp_path / "rows").touch()
    before = os.umask(0o022)
    try:
        processes.start_site(str(tmp_path / "rows"), tmp_path / "state", None, print)
        assert os.umask(0o022) == 0o077
    finally:
        os.umask(before)
    for name in statefolder.OURS:
        assert Path(given[name]).is_relative_to(tmp_path / "state" / "cache")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((startup / "fed_client.json").stat().st_mode) == 0o600
