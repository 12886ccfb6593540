"""The sites of a federation as objects in this process, and a run over them."""

import json
import threading
import time

import yaml

import smallest
from fedvlm.config import load
from fedvlm.deploy.remote import Limits, Remote
from fedvlm.deploy.unanswered import Unanswered
from fedvlm.deploy.worker import Worker
from fedvlm.rounds import federate
from fedvlm.rounds.progress import Quiet
from fedvlm.store import run as store
from fedvlm.version import __version__

SITES = ("site-0", "site-1", "site-2")
SETTINGS = {
    "model": {"dtype": "float64"},  # in single precision AdamW amplifies rounding errors
    "partition": {"kind": "column", "column": "site", "splits": "alone", "min_rows": 2},
    "algorithm": {"name": "plora"},
    "train": {"rounds": 2, "local_steps": 2, "batch_size": 4, "average": "none"},
    "eval": {"every": 0, "max_rows": 3, "max_new_tokens": 2},
    "lora": {"rank": 2, "alpha": 4},
    "engine": {"threads": 1, "clients": 1},
}

FEW = {"train_rows": 1, "batch_rows": 1, "scored_rows": 1, "score_step": 0}
FEW["models"] = {name: name for name in ("tiny", smallest.model())}
"""A policy for runs on few rows, whose scores are compared exactly, with either small model."""


def opening(settings, run="r"):
    """The request of a server of this version to open a run with these settings."""
    return {"do": "open", "fedvlm": __version__, "run": run, "config": settings}


def written(path, **policy):
    """Writes a site's policy, :data:`FEW` with other settings, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(FEW | policy))
    return str(path)


def config(data, *overrides):
    words = f"data.path={data / 'all.parquet'}", f"model.name={smallest.model()}"
    return load(SETTINGS, *words, *overrides)


class Here:
    """The workers of all sites, in this process. The sites in ``down`` do not answer."""

    def __init__(self, data, state, policy=None, sites=SITES):
        policy = policy or written(state / "policy.yml")
        self.own = {s: {"name": s, "data": str(data / f"{s}.parquet")} for s in sites}
        self.own = {s: o | {"state": str(state / s), "policy": policy} for s, o in self.own.items()}
        self.workers = {s: Worker(own) for s, own in self.own.items()}
        self.down, self.slow, self.broken, self.asked = set(), {}, None, []
        self.wire = []  # all bytes that the sites have sent
        self.configs = []  # all configurations that the sites were sent

    def __call__(self, site, header, blob, limit):
        self.asked.append((site, header["do"], header.get("round")))
        time.sleep(self.slow.get(site, 0))
        if header["do"] == "ping" and site not in self.down:
            return {}, b""
        if header["do"] == self.broken:
            return {"error": "died", "message": "x"}, b""
        if site in self.down:
            raise Unanswered("it is away")
        header = json.loads(json.dumps(header))
        self.configs += [header["config"]] if "config" in header else []
        with LOCK:  # all workers share torch's global random state
            answer = self.workers[site].perform(header, blob)
        self.wire.append(json.dumps(answer[0]).encode() + answer[1])
        return answer


class Keeping(Here):
    """Sites that keep the tensors of an answer until the server fetches them, as over a network."""

    def __init__(self, *args):
        super().__init__(*args)
        self.kept = {}

    def __call__(self, site, header, blob, limit):
        if header["do"] == "fetch":
            time.sleep(0.02)
            return self.kept.pop(header["number"])
        answer = super().__call__(site, header, blob, limit)
        if not answer[1]:
            return answer
        number = f"{site} {header}"
        self.kept[number] = answer
        return {"kept": number}, b""


LOCK = threading.Lock()


def deployed(call, settings, folder, *, resume=None, events=None, sites=SITES, **limits):
    """A run over sites by the ordinary round loop."""
    tell = (events if events is not None else []).append
    engine = Remote(call, sites, Limits(**{"at_once": 2} | limits), tell)
    engine.open("run-1", settings)
    settings = settings.model_copy(update={"output": str(folder)})
    kept = store.Store(folder)
    with kept.locked():
        federate.begin(settings, kept, {}, resume=bool(resume))
        return federate.drive(settings, engine, engine.weights, kept, Quiet())
