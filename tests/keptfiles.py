"""A run in the middle, with its five sites, in one text file: what a later version has to read.

``python tests/keptfiles.py`` writes ``tests/formats/VERSION.json`` (with PYTHONPATH=src:tests).
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import tempfile
from pathlib import Path

from fedvlm.config import load
from fedvlm.deploy import backup
from fedvlm.deploy.remote import Limits, Remote
from fedvlm.rounds import federate
from fedvlm.rounds.progress import Progress
from fedvlm.store import files
from fedvlm.store.run import Store
from fedvlm.version import __version__
from test_spending import opened
from toysites import FIVE, Five, config

KEPT = Path(__file__).with_name("formats")
SETTINGS = "algorithm.name=plora", "train.rounds=4", "model.dtype=float64"
LEFT_OUT = {"policy.yml", "timing.jsonl", ".lock"}


class Stopped(Exception):
    """The end of a run after a round."""


class After(Progress):
    def __init__(self, last):
        self.last = last

    def round(self, line, seconds):
        if line["round"] == self.last:
            raise Stopped


def begin(folder, last=None):
    """Runs until a round, or to the end."""
    settings = config(*SETTINGS, f"output={folder / 'run'}")
    go_on(folder, settings, last, resume=False)


def resume(folder):
    """Goes on with the settings in the run's folder."""
    settings = load(folder / "run" / "config.yaml")
    settings = settings.model_copy(update={"output": str(folder / "run")})
    go_on(folder, settings, None, resume=True)


def go_on(folder, settings, last, resume):
    engine = Remote(Five(folder, min_sites=3), FIVE, Limits(at_once=5))
    engine.open("run-1", settings)
    store = Store(settings.output)
    with store.locked():
        federate.begin(settings, store, {}, resume=resume)
        federate.drive(settings, engine, engine.weights, store, After(last))


def end(folder):
    """The server's state and the sites' personal states after the last round."""
    newest = (max((folder / s / "runs/run-1/rounds").iterdir()) for s in FIVE)
    states = [files.load_tree(path / "mine.safetensors") for path in newest]
    return [Store(folder / "run").server(), *states]


def packed(folder) -> str:
    """The files of a folder as JSON: texts as lines, others in base64."""
    found = {}
    for path in sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not (p.name in LEFT_OUT or p.suffix == ".reserve")
    ):
        content = path.read_bytes()
        try:
            kept = content.decode().splitlines(keepends=True)
        except UnicodeDecodeError:
            kept = base64.b64encode(content).decode()
        found[path.relative_to(folder).as_posix()] = kept
    return json.dumps(found, indent=1) + "\n"


def unpacked(text: str, folder: Path) -> Path:
    for name, kept in json.loads(text).items():
        content = "".join(kept).encode() if isinstance(kept, list) else base64.b64decode(kept)
        files.write_bytes(folder / name, content)
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        with contextlib.suppress(Stopped):
            begin(home, last=2)
        opened(home / "site-5", "run2").spend(1, "download")
        backup.back_up_site(home / "site-5", home / "backup.tar")
        for first in home.glob("*/runs/run-1/rounds/00001"):
            shutil.rmtree(first)
        for log in home.glob("site-[1-4]/audit.jsonl"):
            log.unlink()
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{__version__}.json").write_text(packed(home))
