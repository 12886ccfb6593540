"""NVFlare's own processes at the server and at a site, kept running in the foreground."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fedvlm.deploy import logs, monitor
from fedvlm.deploy.auditlog import at_site
from fedvlm.deploy.lifetime import ends_with_parent
from fedvlm.deploy.nvflare import ending, joining, keys
from fedvlm.deploy.nvflare.names import REFUSED
from fedvlm.deploy.nvflare.project import (
    CLOSED,
    PROJECT,
    UNADMITTED,
    Project,
    check_certificate,
    place,
    read_project,
)
from fedvlm.deploy.policy import read_policy
from fedvlm.deploy.statefolder import private
from fedvlm.errors import FedVLMError
from fedvlm.store.files import only_one

QUICK = 30.0  # seconds; a process that ends sooner has failed to start
DAY = 86400.0  # seconds
MOST = 5  # number of such failures in a row that ends the command
SITE = "FEDVLM_SITE"
"""The environment variable with the site's settings from ``fedvlm site start``, as JSON."""
LOG = "site.log"
ERROR = "error: "  # begins the message of a command that failed
RETURNING = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
"""Settings of glibc's allocator: the server's processes return the memory of large messages.

Processes that train are faster without them. Other systems' allocators ignore them.
"""
TAKEN = "'{}' is in use by another fedvlm process"
MARK = "FEDVLM_PROCESSES_OF"
"""The environment variable with the folder of a command's NVFlare files.

By it a command's processes are found, whoever started them, and they find their keys.
"""
NOTED = {
    "Successfully registered client": "connected to the server",
    "target_unreachable": "the server cannot be reached, or does not admit this site's key "
    "('fedvlm deploy fingerprints' at the server lists the admitted keys); trying again",
    "CERTIFICATE_VERIFY_FAILED": "server and site are not of the same federation, or a certificate "
    "has expired: 'fedvlm site renew' at the site, or 'fedvlm deploy renew' at the server",
}
"""Part of a line in NVFlare's log -> its meaning for a person, printed when it changes."""
WARNED = {
    "requires identity": "refused: the certificate is another site's",
    UNADMITTED: "refused a key that is not admitted, or is revoked; nvflare.log has its name",
    CLOSED: "closed the connection of a revoked key; nvflare.log has its name",
    REFUSED: "refused a message whose sender may not send it; nvflare.log has more",
}
"""The same for lines that others can cause at will. Each is printed once."""
LARGEST = 2**30 + 2**24
"""Bytes. NVFlare refuses a larger message before it receives it; its own limit is 4 GiB."""
UNHEARD = (
    f"not connected after {QUICK:.0f} s; still trying. Is the server running, its port open, and "
    "this site's key admitted? The server's lines say whom it refuses"
)


def serve(folder: Path, say: Callable[[str], None], metrics: str | None = None) -> None:
    """Runs the server of a federation until it is stopped.

    Args:
        folder: the federation that ``fedvlm deploy init`` has written.
        say: prints a line for a person.
        metrics: ``PORT`` or ``ADDRESS:PORT`` at which Prometheus may ask; None: nowhere.
    """
    project = read_federation(folder)
    server = (folder / "server").absolute()
    place(folder)
    keys.place_secret(server / "startup" / "server.key")
    command = _command("server.server_train", server, "fed_server.json")
    check_certificate(server / "startup" / "server.crt")
    names = ", ".join(project.sites)
    say(f"server of '{project.name}' on port {project.server.port}; its sites: {names}")
    with only_one(server, TAKEN.format(server)):
        if metrics:
            _publish(monitor.ServerNumbers(folder.absolute(), project.sites), metrics, say)
        environment, log = {**RETURNING, **os.environ}, server / "nvflare.log"

        def warned() -> None:
            for warning in ending.warnings(folder, project):
                say(warning)

        _keep(command, server, environment, log, say, daily=warned)


def start_site(data: str, state: Path, policy: str | None, say: Callable[[str], None]) -> None:
    """Takes part in runs with one site's rows, until it is stopped.

    Args:
        data: the site's rows.
        state: folder with the site's key, and for its personal state, its logs and NVFlare's files.
        policy: file with the site's policy: the limits on what the server may ask.
        say: prints a line for a person.

    Raises:
        FedVLMError: data, policy or state cannot be used, or the site is not admitted; for rows, as
            ``fedvlm site check``.
    """
    allowed = read_policy(policy)
    if allowed.metrics:
        monitor.place(allowed.metrics)
    if not Path(data).exists():
        raise FedVLMError(f"--data '{data}': there is no such file or folder")
    state = state.absolute()
    joining.joined(state)
    caches = private(state)  # before anything is written there
    with only_one(state, TAKEN.format(state)):
        workspace = state / "nvflare"
        name = joining.equip(state, workspace)
        certificate = workspace / "startup" / "client.crt"
        remedy = joining.RENEWED.format(state)
        check_certificate(certificate, remedy)
        own = {
            "name": name,
            "data": str(Path(data).absolute()),
            "state": str(state),
            "policy": str(Path(policy).absolute()) if policy else None,
            "log": str(state / LOG),
            "root": str(workspace / "startup" / "rootCA.pem"),
        }
        environment = {**os.environ, **caches, SITE: json.dumps(own)}
        rules = ["--policy", policy] if policy else []
        _check_first([data, "--state", str(state), *rules], environment, say)
        at_site(own).note("started")
        if allowed.metrics:
            _publish(monitor.SiteNumbers(state), allowed.metrics, say)
        command = _command("client.client_train", workspace, "fed_client.json", f"uid={name}")
        target = json.loads((workspace / "startup" / "fed_client.json").read_text())
        say(f"site '{name}', connecting to {target['servers'][0]['service']['target']}")
        log = state / "nvflare.log"

        def warned() -> None:
            for warning in ending.warnings_at_site(certificate, name, remedy):
                logs.warn(state / LOG, warning)  # which is printed, like all lines of this log

        shown = state / LOG
        _keep(command, workspace, environment, log, say, shown=shown, silence=UNHEARD, daily=warned)


def _publish(source: Any, where: str, say: Callable[[str], None]) -> None:
    """Lets Prometheus ask for numbers, and prints where."""
    host, port = monitor.publish(source, where)
    say(f"metrics for Prometheus: http://{f'[{host}]' if ':' in host else host}:{port}/metrics")


def _check_first(words: list[str], environment: dict[str, str], say: Callable[[str], None]) -> None:
    """Runs ``fedvlm site check``. Its memory is free again when this command keeps running.

    Its lines may go to the journal of the machine, so they have no answers.

    Raises:
        FedVLMError: the check found problems; lists all of them.
    """
    command = [sys.executable, "-m", "fedvlm", "site", "check", "--no-answers", *words]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        preexec_fn=ends_with_parent,
    )
    for line in done.stdout.splitlines():
        say(line)
    if done.returncode:
        raise FedVLMError(done.stderr[max(0, done.stderr.find(ERROR)) :].removeprefix(ERROR))


def read_federation(folder: Path) -> Project:
    """Reads the project of a federation that ``fedvlm deploy init`` has written.

    Raises:
        FedVLMError: the folder holds no federation.
    """
    if not (folder / PROJECT).exists() or not (folder / "server").exists():
        raise FedVLMError(
            f"'{folder}' holds no federation; make one with 'fedvlm deploy init project.yml'"
        )
    return read_project(folder / PROJECT)


def _command(module: str, workspace: Path, start: str, *more: str) -> list[str]:
    """The command that starts NVFlare behind the guard."""
    command = [sys.executable, "-u", "-m", "fedvlm.deploy.nvflare.guard", module]
    settings = ["secure_train=true", *more, "org=fedvlm", "config_folder=config"]
    return [*command, "-m", str(workspace), "-s", start, "--set", *settings]


def _keep(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    log: Path,
    say: Callable[[str], None],
    *,
    shown: Path | None = None,
    silence: str = "",
    daily: Callable[[], None] = lambda: None,
) -> None:
    """Runs a command until this process is asked to end. Starts it again whenever it ends.

    Args:
        command: the command.
        folder: its working directory.
        environment: its environment variables.
        log: file that gets its output.
        say: prints a line for a person.
        shown: file whose new lines are printed too.
        silence: printed when the log has had no line of ``NOTED`` for ``QUICK`` seconds.
        daily: called at the beginning, and then once a day.
    """
    if paths := environment.get("PYTHONPATH"):  # the command has another working directory
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("MALLOC_ARENA_MAX", "4")
    environment.setdefault("NVFLARE_STREAMING_MAX_BLOB_SIZE", str(LARGEST))
    mark = environment[MARK] = str(folder)
    _end_all(mark)  # what a killed command has left
    before = signal.signal(signal.SIGTERM, _interrupt)
    failures, due = 0, 0.0
    try:
        with logs.tail(shown) as lines:
            meaning = Meaning()
            noise: deque[str] = deque(maxlen=1000)
            while failures < MOST:
                began = time.monotonic()
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=ends_with_parent,
                )
                assert process.stdout is not None
                logs.pipe(process.stdout, log, noise)
                try:
                    while process.poll() is None:
                        time.sleep(0.3)
                        if time.monotonic() > due:
                            daily()
                            due = time.monotonic() + DAY
                        for line in lines():
                            say(logs.readable(line))
                        while noise:
                            for text in meaning.of(noise.popleft()):
                                say(text)
                        if shown:
                            logs.rotate(shown)
                        if silence and not meaning.last and time.monotonic() - began > QUICK:
                            meaning.last = silence
                            say(silence)
                finally:
                    _end(process, mark)
                failures = failures + 1 if time.monotonic() - began < QUICK else 0
                say(f"NVFlare ended (exit code {process.returncode}); starting it again, see {log}")
                time.sleep(min(30, 2**failures))
    except KeyboardInterrupt:
        say("stopped")
        return
    finally:
        signal.signal(signal.SIGTERM, before)
    raise FedVLMError(f"NVFlare ended {MOST} times within {QUICK:.0f} s of its start; see '{log}'")


class Meaning:
    """What lines of NVFlare's log mean for a person; see :data:`NOTED` and :data:`WARNED`.

    Attributes:
        last: the last text of ``NOTED``, empty without one.
    """

    def __init__(self) -> None:
        self.last = ""
        self._left = dict(WARNED)

    def of(self, line: str) -> list[str]:
        """Returns the texts for a line; most lines have none."""
        texts = [self._left.pop(part) for part in list(self._left) if part in line]
        found = next((text for part, text in NOTED.items() if part in line), "")
        if found and found != self.last:
            self.last = found
            texts.append(found)
        return texts


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ends a process, and all that were started under it."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    _end_all(mark)


def _end_all(mark: str) -> None:
    """Kills all processes of a command except this one, found by the mark in their environment.

    NVFlare starts some of them in other sessions, and some outlive their parent. The caller holds
    the folder's lock, so no other command has started a process with this mark.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # has ended, or is another user's
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                process.kill()
