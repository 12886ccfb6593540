"""A slow site, a full disk and a lying site, in one run of real processes on this machine."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fedvlm
import smallest
from fedvlm import config as configs
from fedvlm.deploy.nvflare.project import provision
from fedvlm.deploy.remote import Limits, Remote
from fedvlm.deploy.sitestore import SiteStore
from fedvlm.deploy.unanswered import Unanswered
from fedvlm.deploy.worker import Worker
from fedvlm.rounds import federate
from fedvlm.rounds.progress import Quiet
from fedvlm.store import files
from fedvlm.store import run as store
from loopback import begin, processes, said, serve

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")
pytestmark = [pytest.mark.slow, pytest.mark.waits("machines")]

FAULTY = Path(__file__).parent / "faulty"
SITES = ("north", "slow", "full", "liar")
HONEST = sorted(SITES[:-1])
ROUNDS, STOPPED, FULL = 7, 2, 3
"""The number of rounds, the round in which a worker stops, the round in which a disk is full."""
DEADLINE = 30
"""Seconds to train. Two deadlines are enough to open a run, even on a busy machine."""
DISK, MOST, LARGEST = 24, 2**20, 2**23
"""Size of the disk in MiB, of the largest upload in bytes, of the largest message in bytes."""
LIES = {
    1: ("rejected", "not finite"),
    2: ("missing", "no safetensors file"),
    3: ("rejected", "instead of float32"),
    4: ("missing", f"bytes are more than {MOST}"),
    5: ("rejected", "lacks"),
    6: ("missing", "its loss is nan"),
    7: ("missing", "broken off"),
}
"""Round -> fate of the liar's upload, and the reason. ``faulty/sitecustomize.py`` has the lies."""
SETTINGS = {
    "model": {"name": smallest.model()},
    "algorithm": {"name": "plora"},
    "train": {"rounds": ROUNDS, "local_steps": 2, "batch_size": 4, "lr": 5e-3, "average": "none"},
    "eval": {"every": 0, "max_rows": 3, "max_new_tokens": 3},
    "engine": {"clients": 1, "threads": 1},
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A separate disk, so that it can be filled."""
    folder = tmp_path_factory.mktemp("disk")
    options = ["-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)]
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("needs a disk that may be filled: mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Watch:
    """Collects the events, and looks at the site's state while its disk is full."""

    def __init__(self, state):
        self.events, self.state, self.found = [], state, None

    def tell(self, event):
        self.events.append(event)
        if (event["event"], event.get("site"), event.get("round")) == ("failed", "full", FULL):
            (kept,) = (SiteStore(folder) for folder in (self.state / "runs").iterdir())
            self.found = shutil.disk_usage(self.state).free, kept.rounds(), kept.version(FULL - 1)
            (self.state / "filler").unlink()

    def rounds(self, site, kind):
        """Round -> the event of this kind at a site."""
        return {e["round"]: e for e in self.events if (e.get("site"), e["event"]) == (site, kind)}


@pytest.fixture(scope="module")
def run(tmp_path_factory, disk):
    """The run of all four sites: its folder, and its events."""
    from fedvlm.deploy.nvflare.demo import loopback
    from fedvlm.deploy.nvflare.federation import Federation

    folder = tmp_path_factory.mktemp("faults")
    table = fedvlm.scenes(style="mixed", sites=len(SITES), rows=16).to_pandas()
    (folder / "data").mkdir()
    for number, name in enumerate(SITES):
        rows = table[table["site"] == f"site-{number}"]
        rows.to_parquet(folder / "data" / f"{name}.parquet", index=False)
    (folder / "sites").mkdir()
    (folder / "sites" / "full").symlink_to(disk)
    watch, home = Watch(folder / "sites" / "full"), folder / "federation"
    kits = provision(loopback(SITES), home)
    with processes(folder) as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVFLARE_STREAMING_MAX_BLOB_SIZE", str(LARGEST))
        serve(started, home)
        patch.delenv("NVFLARE_STREAMING_MAX_BLOB_SIZE")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTY), os.environ["PYTHONPATH"]]))
        for name in SITES:
            rows = folder / "data" / f"{name}.parquet"
            begin(started, name, kits[name], rows, folder / "sites" / name)
        limits = Limits(open_s=240, train_s=DEADLINE, score_s=120, max_bytes=MOST)
        settings = configs.load(SETTINGS, f"output={folder / 'run'}")
        Federation(home).run(settings, limits=limits, wait=240, tell=watch.tell)
    return folder, watch


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """The same run in this process without the liar. A site misses the same rounds as there."""
    folder, _ = run
    to, settings = tmp_path_factory.mktemp("alone"), configs.load(folder / "run" / "config.yaml")
    away = {(site, line["round"]) for line in lines(folder) for site in line.get("missing", ())}
    workers = {
        site: Worker(
            {
                "name": site,
                "data": str(folder / "data" / f"{site}.parquet"),
                "state": str(to / site),
                "policy": str(folder / "data" / "policy.yml"),
            }
        )
        for site in HONEST
    }

    def call(site, header, blob, limit):
        if header["do"] == "ping":
            return {}, b""
        if header["do"] == "train" and (site, header["round"]) in away:
            raise Unanswered("it is away")
        return workers[site].perform(json.loads(json.dumps(header)), blob)

    engine, kept = Remote(call, HONEST, Limits(at_once=1)), store.Store(to / "run")
    engine.open("alone", settings)
    settings = settings.model_copy(update={"output": str(kept.folder)})
    with kept.locked():
        federate.begin(settings, kept, {}, resume=False)
        federate.drive(settings, engine, engine.weights, kept, Quiet())
    return to


def lines(folder):
    return store.Store(folder / "run").lines()


def state(folder, site):
    """The folder of the run at a site."""
    (found,) = (folder / site / "runs").iterdir()
    return found


def test_the_run_is_finished_in_one_job_with_all_rounds(run):
    folder, watch = run
    assert [line["round"] for line in lines(folder)] == list(range(ROUNDS + 1))
    assert (folder / "run" / "table.json").exists()
    assert [e["event"] for e in watch.events if e["event"] in ("submitted", "again", "done")] == [
        "submitted",
        "done",
    ]
    assert all("north" in line["train_loss"] for line in lines(folder)[1:]), "north never misses"


def test_a_site_slower_than_the_deadline_is_left_out_and_takes_part_again(run):
    folder, watch = run
    failed = watch.rounds("slow", "failed")
    assert f"'train' took more than {DEADLINE} s at the site" in failed[STOPPED]["why"]
    assert "slow" in lines(folder)[STOPPED]["missing"]
    seconds = files.read_lines(folder / "run" / "timing.jsonl")[STOPPED]["seconds"]
    assert DEADLINE <= seconds < DEADLINE + 10, "the round waits no longer than the deadline"
    assert f"'train' took more than {DEADLINE} s: ended" in said(folder, "slow")
    again = [number for number in watch.rounds("slow", "trained") if number > STOPPED]
    assert len(again) >= 2
    assert again[-1] == ROUNDS
    assert said(folder, "slow").count("plora, 7 rounds") == 2, "another worker opened the run"


def test_a_site_with_a_full_disk_keeps_what_it_had_and_takes_part_again(run):
    folder, watch = run
    free, rounds, before = watch.found
    assert free == 0
    assert rounds == [FULL - 2, FULL - 1], "a failed write drops no earlier version"
    assert before.trees["mine"], "the version before is complete and has its hash"
    failed = watch.rounds("full", "failed")
    assert list(failed) == [FULL]
    assert "the site's disk is full, and round 3 is not kept" in failed[FULL]["why"]
    assert str(folder) not in failed[FULL]["why"]
    assert "the site's disk is full" in said(folder, "full")
    assert "full" in lines(folder)[FULL]["missing"]
    assert all("full" in line["train_loss"] for line in lines(folder)[1:] if line["round"] != FULL)
    kept = state(folder / "sites", "full") / "rounds"
    assert sorted(path.name for path in kept.iterdir()) == ["00006", "00007"]


@pytest.mark.parametrize("number", LIES)
def test_a_malformed_upload_is_refused_by_name(run, number):
    folder, watch = run
    how, why = LIES[number]
    line = lines(folder)[number]
    assert "liar" in line[how]
    assert "liar" not in line["train_loss"]
    event = watch.rounds("liar", "rejected" if how == "rejected" else "failed")[number]
    assert why in event["why"]
    assert not event.get("gone"), "the site still answers, so no new job is needed"
    if how == "rejected":
        assert line[how] == {"liar": event["why"]}


def test_malformed_scores_are_left_out_by_name(run):
    folder, watch = run
    assert watch.rounds("liar", "failed")[0]["why"] == "its scores are ['done']"
    for number in (0, ROUNDS):
        for model in ("personal", "global"):
            assert sorted(lines(folder)[number]["evaluation"][model]) == HONEST


def test_the_honest_sites_have_bit_for_bit_the_run_without_the_liar(run, alone):
    folder, _ = run
    theirs, mine = (store.Store(where / "run").server() for where in (folder, alone))
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in theirs.items())
    for there, here in zip(lines(folder), lines(alone), strict=True):
        assert there.get("train_loss") == here.get("train_loss")
        assert there["evaluation"] == here["evaluation"]
    for site in HONEST:
        one, other = (state(where, site) for where in (folder / "sites", alone))
        for path in ("adapters/personal/adapter_model.safetensors", "rounds/00007/reply.json"):
            assert (one / path).read_bytes() == (other / path).read_bytes(), (site, path)
