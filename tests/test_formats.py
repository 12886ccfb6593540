"""What an earlier version has written is read, or refused by the name of that version.

``tests/formats`` has a file for each version whose runs must go on: see ``keptfiles.py``. If the
test with them fails after a change, runs of that version would be lost. Either read the old form
too; or raise ``READS`` in ``version.py``, remove the file and say so in the changelog. A change
that an older version would misread also raises ``FORMAT`` and adds the file of the new version.
"""

import json

import pytest
import torch

pytest.importorskip("cryptography", reason="needs fedvlm[privacy]")

import fedvlm
import keptfiles
from fedvlm import version
from fedvlm.config import load
from fedvlm.deploy import archive
from fedvlm.deploy.auditlog import AuditLog, verify
from fedvlm.deploy.ledger import Ledger
from fedvlm.deploy.limits import Refused
from fedvlm.deploy.worker import Worker
from fedvlm.errors import FedVLMError
from fedvlm.store import sealed
from fedvlm.store.run import check_whole
from test_spending import charges

LATER = {"fedvlm": "0.9.1", "format": version.FORMAT + 1}
REFUSED = r"written by fedvlm 0\.9\.1 .* this is fedvlm .* pip install 'fedvlm==0\.9\.1'"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of the run, as this version does it in one go."""
    folder = tmp_path_factory.mktemp("whole")
    keptfiles.begin(folder)
    return keptfiles.end(folder)


KEPT = sorted(keptfiles.KEPT.glob("*.json"))


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_a_run_of_an_earlier_version_goes_on(kept, whole, tmp_path):
    folder = keptfiles.unpacked(kept.read_text(), tmp_path)
    check_whole(folder / "run")
    about = archive.unpack(folder / "backup.tar", folder / "restored", "site")
    assert "spending/ledger.jsonl" in about["files"]
    assert [charge.round for charge in charges(folder / "site-5")] == [1]
    assert verify(folder / "site-0" / "audit.jsonl").lines > 4
    keptfiles.resume(folder)
    for found, wanted in zip(keptfiles.end(folder), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_present_version_has_its_file():
    assert KEPT, "python tests/keptfiles.py"
    assert all(path.stat().st_size < 100_000 for path in KEPT)


def later(path, content):
    """Writes a sealed file as a later version would."""
    path.write_text(json.dumps({**content, "seal": sealed._seal(content)}))


def test_a_file_of_a_later_version_is_refused_by_the_name_of_that_version(tmp_path):
    path = tmp_path / "run.json"
    sealed.write(path, {"run": "r"})
    assert sealed.read(path) == {"run": "r"}
    assert json.loads(path.read_text())["written_by"]["fedvlm"] == fedvlm.__version__
    later(path, {"run": "r", "written_by": LATER})
    with pytest.raises(FedVLMError, match=REFUSED):
        sealed.read(path)
    for odd in ({"fedvlm": "0.9.1"}, {"fedvlm": "0.9.1", "format": True}, 7, None):
        later(path, {"run": "r", "written_by": odd})
        with pytest.raises(FedVLMError, match="was written by fedvlm"):
            sealed.read(path)
    later(path, {"run": "r"})
    assert sealed.read(path) == {"run": "r"}, "written before files had a format"


def test_a_log_and_a_backup_of_a_later_version_are_refused(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl", site="north")
    with monkeypatch.context() as future:
        for module in ("fedvlm.deploy.auditlog", "fedvlm.version"):
            future.setattr(f"{module}.FORMAT", LATER["format"])
            future.setattr(f"{module}.__version__", "0.9.1")
        log.note("started")
        archive.write(tmp_path / "b.tar", "site", archive.below(tmp_path, "audit.jsonl"), {})
    with pytest.raises(FedVLMError, match=REFUSED):
        verify(log.path)
    before = log.path.read_bytes()
    with pytest.raises(FedVLMError, match=REFUSED):
        log.note("started")
    assert log.path.read_bytes() == before
    with pytest.raises(FedVLMError, match=REFUSED):
        archive.unpack(tmp_path / "b.tar", tmp_path / "scratch", "site")
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("server", ["0.1.0", "0.3.0", "1.2.0", "0.2", None, 7])
def test_a_site_refuses_a_server_of_another_minor_version_by_name(server, tmp_path, caplog):
    worker = Worker({"name": "north", "data": "rows.parquet", "state": str(tmp_path)})
    answer, _ = worker.perform({"do": "open", "fedvlm": server, "run": "r", "config": {}}, b"")
    assert answer["error"] == "refused"
    named = f"the server has fedvlm {server}," if version.minor(server) else "no known version"
    assert named in answer["message"]
    assert fedvlm.__version__ not in answer["message"], "the site does not tell its version"
    assert f"this site has fedvlm {fedvlm.__version__}" in caplog.text


def test_versions_that_differ_in_the_last_number_work_together(tmp_path):
    worker = Worker({"name": "north", "data": "rows.parquet", "state": str(tmp_path)})
    other = f"{version.minor(fedvlm.__version__)}.99"
    answer, _ = worker.perform({"do": "open", "fedvlm": other, "run": "r", "config": 7}, b"")
    assert "the settings of a run must be a mapping" in answer["message"]


def test_a_site_reads_the_settings_of_an_earlier_version_with_the_defaults_of_now(tmp_path):
    config = load({"lora": {"rank": 2}})
    Ledger(tmp_path).begin(tmp_path.name, config)
    known = sealed.read(tmp_path / "run.json")
    del known["settings"]["lora"]["dropout"]  # as if it came later
    known["config"] = "0" * 64
    sealed.write(tmp_path / "run.json", known)
    Ledger(tmp_path).begin(tmp_path.name, config)
    sealed.write(tmp_path / "run.json", known | {"fedvlm": "0.1.7"})
    Ledger(tmp_path).begin(tmp_path.name, config)
    with pytest.raises(Refused, match="began at this site with other settings"):
        Ledger(tmp_path).begin(tmp_path.name, load({"lora": {"rank": 3}}))
    known["settings"]["lora"]["gone"] = 1
    sealed.write(tmp_path / "run.json", known | {"fedvlm": "0.1.7"})
    with pytest.raises(Refused, match=r"began at this site under fedvlm 0\.1, .* finish it with"):
        Ledger(tmp_path).begin(tmp_path.name, config)


def test_a_run_with_settings_of_another_version_names_that_version(tmp_path):
    sealed.write(tmp_path / "checkpoint.json", {"round": None, "files": {}})
    (tmp_path / "config.yaml").write_text("lora: {gone: 1}\n")
    about = tmp_path / "environment.json"
    about.write_text(json.dumps({"packages": {"fedvlm": "0.3.4"}}))
    with pytest.raises(FedVLMError, match=r"by fedvlm 0\.3\.4, .* 'fedvlm==0\.3\.\*'[^~]*gone"):
        fedvlm.resume(tmp_path)
    about.write_text(json.dumps({"packages": {"fedvlm": fedvlm.__version__}}))
    with pytest.raises(fedvlm.ConfigError):
        fedvlm.resume(tmp_path)
