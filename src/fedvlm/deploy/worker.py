"""A site's worker process: holds the model and answers requests until the supervisor is gone."""

from __future__ import annotations

import logging
import os
import queue
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedvlm.deploy import logs
from fedvlm.deploy.frames import Closed, Message, receive, send
from fedvlm.deploy.lifetime import ends_with_parent
from fedvlm.deploy.recorded import audited_at_site
from fedvlm.errors import DataError, FedVLMError, shown
from fedvlm.hub import Undelivered
from fedvlm.tree import read
from fedvlm.version import __version__, minor

logger = logging.getLogger("fedvlm")

LOCKED = 60.0  # seconds to wait until another process of this site releases the state


class Worker:
    """Answers requests. The first one is ``open``, which loads data and model.

    Args:
        own: the site's ``name``, ``data``, ``state`` (folder) and ``policy`` (file or None).
    """

    def __init__(self, own: dict[str, Any]):
        self.own = own
        self.site: Any = None
        self.blind: Any = None  # the part in secure sums, where the run has them
        self._models: list[str] = []  # the places of the models in the policy
        self._lock: Any = None

    def perform(self, asked: dict[str, Any], blob: bytes) -> Message:
        """Returns the answer to one request; the audit log has both. Every error is an answer."""
        return audited_at_site(self.own, asked, blob, lambda: self._answer(asked, blob))

    def _answer(self, asked: dict[str, Any], blob: bytes) -> Message:
        from fedvlm.deploy.limits import Refused, Spent

        try:
            return self._perform(asked, blob)
        except Refused as error:
            logger.warning("refused: %s", error)
            answer = {"error": "refused", "message": self._hidden(str(error))}
            return answer | ({"spent": True} if isinstance(error, Spent) else {}), b""
        except Exception as error:
            # Details of the rows stay in the site's log. The server gets the kind of error only.
            if isinstance(error, FedVLMError):
                logger.error("'%s' failed: %s", asked.get("do"), error)
            else:
                logger.exception("'%s' failed", asked.get("do"))
            private = self.site is not None and self.site.private
            told = isinstance(error, FedVLMError)
            told = told and not isinstance(error, DataError | Undelivered)
            told = told and not private  # whatever depends on rows needs an accounting
            message = str(error) if told else f"{type(error).__name__}; see the site's log"
            return {"error": "failed", "message": self._hidden(message)}, b""

    def _hidden(self, message: str) -> str:
        """A message without the paths of this site."""
        places = [
            str(self.own[key]) for key in ("data", "state", "policy", "log") if key in self.own
        ]
        return hidden(message, places + self._models)

    def _perform(self, asked: dict[str, Any], blob: bytes) -> Message:
        from safetensors.torch import save

        from fedvlm.deploy.limits import scaled
        from fedvlm.metrics import rounded

        do, site = asked["do"], self.site
        logs.about(asked)
        if do == "open":
            return self._open(asked), b""
        if site is None:
            raise FedVLMError(f"'{do}' came before 'open': this worker has no run yet")
        if do == "adapter":
            about, tree = site.adapter_files()
            return {"peft": about}, save(tree)
        if do == "blind" and self.blind:
            return self.blind.step(asked)
        down = read(blob)
        if do == "train":
            began = time.perf_counter()
            if self.blind:
                self.blind.check(_round(asked), asked)
            done = site.train(_round(asked), down, _share(asked))
            took = time.perf_counter() - began
            step, exact = site.policy.score_step, site.policy.tell_rows and not site.private
            about = {"seconds": round(took, 3 if exact else -1)}
            if not site.private:
                about["loss"] = rounded(done.loss, scaled(step, done.loss))
            if done.round > site.config.train.rounds and not site.config.train.tuning:
                logger.info("end of training, %.1f s", took)
            else:
                logger.info("round %d: loss %.3f, %.1f s", done.round, done.loss, took)
            if self.blind:
                keys, _ = self.blind.begin(asked, blob, down, done)
                return {**keys, "seconds": about["seconds"]}, b""
            return about, save(done.trees["upload"]) if done.trees["upload"] else b""
        if do == "score":
            kind = _kind(asked, "global", "personal", "end")
            return {"scores": site.score(kind, _round(asked), down)}, b""
        if do == "answer":
            kind = _kind(asked, "global", "personal")
            site.answer(_name(asked, "untuned", "global", "personal"), kind, _round(asked), down)
        elif do == "export":
            kind = _kind(asked, "global", "personal")
            site.export(_name(asked, "global", "personal"), kind, _round(asked), down)
        else:
            raise FedVLMError(f"a site does not know the request '{do}'")
        return {}, b""

    def _open(self, asked: dict[str, Any]) -> dict[str, Any]:
        from fedvlm import config as configs
        from fedvlm.deploy import limits
        from fedvlm.deploy.approval import admit
        from fedvlm.deploy.policy import read_policy
        from fedvlm.deploy.site import Site
        from fedvlm.store.run import Store

        _check_version(asked.get("fedvlm"))
        run = _plain(asked["run"])
        if self.site is None:
            policy = read_policy(self.own.get("policy"))
            self._models = [allowed.path for allowed in policy.models.values()]
            config = configs.load(_settings(asked))
            policy.check(config)
            admit(self.own, policy, run, asked, config)
            folder = Path(self.own["state"]) / "runs" / run
            limits.check_runs(policy, folder)
            new = not folder.exists()
            lock = Store(folder).locked(LOCKED)  # an earlier worker may be ending
            lock.__enter__()
            try:
                own = self.own["name"], config, self.own["data"], folder, policy
                site = Site(*own, Path(self.own["state"]))
                self.blind = self._part(site, run, config)
                self.site = site
            except BaseException:
                if new:  # a run that never began leaves no folder
                    shutil.rmtree(folder, ignore_errors=True)
                lock.__exit__(None, None, None)
                raise
            self._lock = lock
            self.run = run
            logger.info(
                "run %s: %s, %d rounds, model %s; %s rows",
                run,
                config.algorithm.name,
                config.train.rounds,
                config.model.name,
                self.site.rows,
            )
        if run != self.run:
            raise FedVLMError(f"this worker has opened run '{self.run}' and cannot open '{run}'")
        self.site.ledger.begin(run, configs.load(_settings(asked)))
        return self.site.described()

    def _part(self, site: Any, run: str, config: Any) -> Any:
        """The site's part in secure sums; None for a run without them."""
        if not config.wire.secure:
            return None
        from fedvlm.deploy.blindsite import Part
        from fedvlm.deploy.limits import digest_of

        return Part(site, self.own["state"], run, digest_of(config))


def _check_version(server: Any) -> None:
    """Refuses a server of another minor version: its messages may mean something else.

    The server is not told which version the site has.

    Raises:
        Refused: the versions differ in more than their last number.
    """
    from fedvlm.deploy.limits import Refused

    if minor(server) == minor(__version__):
        return
    has = f"fedvlm {shown(server, 20, quotes=False)}" if minor(server) else "no known version"
    logger.error("the server has %s, and this site has fedvlm %s", has, __version__)
    raise Refused(
        f"the server has {has}, and this site has another minor version of fedvlm: the first two "
        "numbers must be equal at the server and all sites. The site's log has its version"
    )


def _settings(asked: dict[str, Any]) -> dict[str, Any]:
    """The run's settings. A text would be the path of a file at this site."""
    if not isinstance(asked.get("config"), dict):
        raise FedVLMError("the settings of a run must be a mapping")
    return asked["config"]


def _round(asked: dict[str, Any]) -> int:
    if type(asked.get("round")) is not int:
        raise FedVLMError(f"a round is a whole number, got {asked.get('round')!r:.60}")
    return asked["round"]


def _share(asked: dict[str, Any]) -> float:
    if type(asked.get("sampled")) not in (int, float):
        raise FedVLMError(f"a cohort's share is a number, got {asked.get('sampled')!r:.60}")
    return float(asked["sampled"])


def _kind(asked: dict[str, Any], *kinds: Any) -> Any:
    if not isinstance(asked.get("kind"), str) or asked["kind"] not in kinds:
        raise FedVLMError(f"a model is one of {', '.join(kinds)}, got {asked.get('kind')!r:.60}")
    return asked["kind"]


def _name(asked: dict[str, Any], *names: str) -> str:
    name = asked.get("name")
    if not isinstance(name, str) or name not in names:
        raise FedVLMError(f"a model's name is one of {', '.join(names)}, got {shown(name)}")
    return name


def _plain(name: Any) -> str:
    """Returns the name of a file, and refuses a path."""
    if not isinstance(name, str) or not 0 < len(name) <= 200:
        raise FedVLMError(f"{shown(name)} is no file name of 1 to 200 characters")
    if set(name) - _ALLOWED or name.startswith("."):
        raise FedVLMError(f"{name!r:.60} is no file name of letters, digits, '-', '_' and '.'")
    return name


def hidden(message: str, places: Sequence[str] = ()) -> str:
    """A message without paths: neither known places nor anything that looks like a path.

    >>> hidden("'/srv/rows/a b.parquet' is damaged; see ~/notes and models/m", ["models/m"])
    "'(a path of this site)' is damaged; see (a path of this site) and (a path of this site)"
    """
    for place in sorted(filter(None, places), key=len, reverse=True):
        if len(Path(place).parts) > 1:
            message = re.sub(rf"{re.escape(place)}[^\s'\"]*", HIDDEN, message)
    message = re.sub(r"(['\"])(?:~|[A-Za-z]:)?[/\\][^'\"]+\1", rf"\1{HIDDEN}\1", message)
    return re.sub(r"(?<![\w.)])(?:~[\w.-]*|[A-Za-z]:)?[/\\][^\s'\"(),;]+", HIDDEN, message)


HIDDEN = "(a path of this site)"
_ALLOWED = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def serve(sock: socket.socket, worker: Worker) -> None:
    """Answers requests until the other end closes. Then the process ends at once."""
    ends_with_parent()
    waiting: queue.Queue[Message] = queue.Queue()

    def read() -> None:
        try:
            while True:
                waiting.put(receive(sock))
        except Closed:
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        header, blob = waiting.get()
        answer = worker.perform(header, blob)
        send(sock, {"id": header.get("id"), **answer[0]}, answer[1])


def main() -> None:
    """``python -m fedvlm.deploy.worker FD JSON``: only the supervisor starts this."""
    import json

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fedvlm.deploy.statefolder import private

    own = json.loads(sys.argv[2])
    os.environ.update(private(own["state"]))  # before a library reads them
    logs.log_to(own.get("log"))
    serve(socket.socket(fileno=int(sys.argv[1])), Worker(own))


if __name__ == "__main__":
    main()
