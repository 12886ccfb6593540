"""Controls deployed runs on the server's machine: submit, follow, resume, status, abort."""

from __future__ import annotations

import contextlib
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.flare_api import NoConnection, Session, new_secure_session

from fedvlm import config as configs
from fedvlm.algorithms.checks import one_place
from fedvlm.algorithms.table import find, of_run
from fedvlm.deploy.digests import digest_of
from fedvlm.deploy.events import EVENTS, NewLines, output_of
from fedvlm.deploy.nvflare.away import AGAIN, LOST, Away, Dropped, held
from fedvlm.deploy.nvflare.processes import read_federation
from fedvlm.deploy.nvflare.project import ADMIN, Project, admitted, write_job
from fedvlm.deploy.nvflare.server import RENEW
from fedvlm.deploy.overview import HEARD, OVER
from fedvlm.deploy.remote import Limits, as_sent
from fedvlm.deploy.signature import sign
from fedvlm.errors import ConfigError, FedVLMError, brief
from fedvlm.rounds import robust, secure
from fedvlm.rounds.results import Results
from fedvlm.settings.sections import Config
from fedvlm.store import files
from fedvlm.store import run as stores
from fedvlm.store.made import settings_of
from fedvlm.store.run import SITES

Tell = Callable[[dict[str, Any]], None]

CONNECT = 20.0  # seconds to wait for the server's answer
ASKED = 5.0  # seconds between two requests for the job's status


class Federation:
    """A provisioned federation, controlled from the server's machine.

    Args:
        folder: the federation that ``fedvlm deploy init`` has written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        self.project: Project = read_federation(self.folder)

    @property
    def sites(self) -> list[str]:
        """The project's sites that have an admitted key."""
        found = admitted(self.folder)["sites"]
        return [site for site in self.project.sites if site in found]

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Opens a connection to the server.

        Raises:
            FedVLMError: the server does not answer.
        """
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = new_secure_session(ADMIN, str(self.folder / "admin"), timeout=CONNECT)
        except Exception as error:
            address = f"{self.project.server.address}:{self.project.server.admin_port}"
            raise FedVLMError(
                f"the server at {address} does not answer ({error}); start it with 'fedvlm deploy "
                f"server -f {self.folder}'"
            ) from None
        try:
            yield found
        finally:
            with contextlib.suppress(Exception):
                found.close()

    def connected(self, session: Session) -> list[str]:
        """The sites that are connected now. NVFlare itself lists a lost site for ten minutes."""
        heard = session.get_system_info().client_info
        found = {c.name for c in heard if time.time() - (c.last_connect_time or 0) < HEARD}
        return [site for site in self.sites if site in found]

    def jobs(self, session: Session) -> list[dict[str, Any]]:
        """The jobs that wait or run. A killed server lists its jobs as running ever after."""
        found = [dict(job) for job in session.list_jobs()]
        working = session.get_system_info().job_info
        states = [(job, str(job.get("status"))) for job in found]
        return [j for j, s in states if held(j["job_id"], s, working) and not _ended(s)]

    def status(self) -> dict[str, Any]:
        """The connected sites, and the jobs that are waiting or running."""
        with self.session() as session:
            return {"sites": self.connected(session), "jobs": self.jobs(session)}

    def abort(self) -> list[str]:
        """Ends the waiting and running jobs. Finished rounds stay, and ``--resume`` continues."""
        found = []
        with self.session() as session:
            for job in (str(job["job_id"]) for job in self.jobs(session)):
                files.write_text(self._mark(job), "")
                try:
                    session.abort_job(job)
                    found.append(job)
                except Exception as error:
                    if "is not running" not in str(error):
                        raise FedVLMError(f"job {job} cannot be ended: {brief(error)}") from None
        return found

    def readmit(self) -> list[str]:
        """Ends the running jobs after their current round.

        NVFlare lets no site join a running job. The next job of the run has all sites that are
        connected when it begins.
        """
        with self.session() as session:
            found = [str(job["job_id"]) for job in self.jobs(session)]
        for path in self._submitted():
            if path.read_text() in found:
                files.write_text(path.with_name(RENEW), "")
        return found

    def run(
        self,
        config: Config,
        *,
        resume: bool = False,
        limits: Limits | None = None,
        wait: float = 60.0,
        tell: Tell = lambda event: None,
    ) -> Results:
        """Does a run over the connected sites, to its end.

        A job may end before the run does, for example because a site's process was killed. Then
        another job continues with the next round and the sites that are connected by then. A job
        also ends early, after a round, when a lost site is back.

        Args:
            config: the run's settings. ``output`` is a folder on this machine.
            resume: whether to continue the run in ``output``.
            limits: deadlines and sizes that the server enforces.
            wait: seconds to wait until all sites are connected. Later sites do not take part.
            tell: receives the events.

        Raises:
            FedVLMError: the run cannot begin, or cannot continue.
        """
        known = {"rows": self.project.rows, "max_weight": self.project.max_weight}
        limits = (limits or Limits()).model_copy(update=known)
        config = config.model_copy(update={"output": str(Path(config.output).absolute())})
        check(config, resume)
        robust.check(config, of_run(config), len(self.project.sites))
        secure.check(config, of_run(config), len(self.project.sites))
        if stores.is_done(config.output):
            return Results.read(config.output)
        with self.session() as session:
            self._clear(session, config, resume)
        failures, last, away, first = 0, _finished(config), Away(), True
        while not stores.is_done(config.output):
            with self.session() as session:
                sites = self._gathered(session, limits.min_sites, wait, first, tell)
                again = resume or begun(config.output)
                job, events = self._submit(session, config, sites, limits, again, tell)
                how = self._follow(session, job, events, config, away, tell)
            if stores.is_done(config.output):
                break
            first = False
            if self._mark(job).exists():
                raise FedVLMError(f"ended by 'fedvlm deploy abort'; {_how(config)}")
            done = _finished(config)
            failures, last = (failures + 1 if done == last else 1), done
            if failures >= AGAIN:
                raise FedVLMError(
                    f"{AGAIN} jobs ended without a finished round; '{events}' and "
                    f"'{self.folder / 'server' / 'nvflare.log'}' have the reason"
                )
            tell({"event": "again", "round": done, "early": how != "renewed"})
        return Results.read(config.output)

    def _clear(self, session: Session, config: Config, resume: bool) -> None:
        """Ends an earlier job of the run that continues.

        Raises:
            FedVLMError: another run is under way.
        """
        for job in (str(job["job_id"]) for job in self.jobs(session)):
            folder = next((p.parent for p in self._submitted() if p.read_text() == job), None)
            events = files.read_lines(folder / EVENTS) if folder else []
            if resume and folder and output_of(folder) == config.output:
                with contextlib.suppress(Exception):  # it may have ended
                    session.abort_job(job)
            elif not (events and events[-1]["event"] in OVER):  # else NVFlare is about to end it
                raise FedVLMError(
                    f"job {job} is under way; end it with 'fedvlm deploy abort', or wait"
                )

    def _submitted(self) -> Iterator[Path]:
        """Paths of the files with the ids of submitted jobs."""
        return (self.folder / "runs").glob("*/submitted")

    def _gathered(
        self, session: Session, least: int, wait: float, first: bool, tell: Tell
    ) -> list[str]:
        """Waits for all admitted sites, a later job for ``least``. Returns the connected ones."""
        until = time.monotonic() + wait
        found: list[str] = []
        while True:
            now, all_of = self.connected(session), len(self.sites)
            for site in now:
                if site not in found:
                    tell({"event": "connected", "site": site})
            found = now
            enough = len(found) >= (all_of if first else least)
            if time.monotonic() > until or enough:
                break
            time.sleep(1.0)
        if len(found) < least:
            admitted_now = self.sites
            missing = ", ".join(
                s if s in admitted_now else f"{s} (not admitted)"
                for s in self.project.sites
                if s not in found
            )
            raise FedVLMError(
                f"{len(found)} sites are connected after {wait:.0f} s, and at least {least} are "
                f"needed (--min-sites); missing: {missing}"
            )
        return found

    def _submit(
        self,
        session: Session,
        config: Config,
        sites: list[str],
        limits: Limits,
        resume: bool,
        tell: Tell,
    ) -> tuple[str, Path]:
        """Submits a job. Returns its id, and the path of the file with its events."""
        folder = self.folder / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        events = folder / EVENTS
        known = json.loads((Path(config.output) / SITES).read_text()) if resume else {}
        run = known.get("run") or uuid.uuid4().hex[:12]
        startup = self.folder / "admin" / "startup"
        key, certificate = ((startup / f"client.{end}").read_bytes() for end in ("key", "crt"))
        job = {
            "config": config.model_dump(),
            "limits": limits.model_dump(),
            "events": str(events),
            "resume": resume,
            "run": run,
            "operator": sign(run, digest_of(as_sent(config)), key, certificate),
        }
        files.write_text(folder / "job.json", json.dumps(job, indent=2))
        definition = write_job(folder / "job", folder / "job.json", sites, limits)
        number = str(session.submit_job(str(definition)))
        files.write_text(folder / "submitted", number)
        tell({"event": "submitted", "job": number, "sites": sites, "resume": resume})
        return number, events

    def _mark(self, job: str) -> Path:
        """Path of a file that exists when a person has ended the job."""
        return self.folder / "runs" / f"{job}.aborted"

    def _follow(
        self,
        session: Session,
        job: str,
        events: Path,
        config: Config,
        away: Away,
        tell: Tell,
    ) -> str:
        """Passes on a job's events until it has ended. Returns how it ended.

        Raises:
            FedVLMError: the server's process reports an error, or the server is gone.
        """
        new, status, dropped = NewLines(events), "", Dropped()
        asked = heard = time.monotonic()
        while True:
            for event in map(json.loads, new()):
                tell(event)
                away.note(event)
                if event["event"] == "error":
                    raise FedVLMError(event["why"])
                if event["event"] in OVER:
                    return str(event["event"])
            if _ended(status):
                tell({"event": "ended", "status": status})
                return status
            if time.monotonic() - asked > ASKED:
                asked = time.monotonic()
                try:
                    status = str(session.get_job_meta(job).get("status"))
                    system = session.get_system_info()
                    heard = time.monotonic()
                    if dropped(job, status, system.job_info):
                        status = "ABANDONED by a server that was started again"
                    elif away.since and away.back(system.client_info):
                        files.write_text(events.with_name(RENEW), "")
                except Exception as error:  # a busy server may answer too late, once
                    if not isinstance(error, NoConnection) or time.monotonic() - heard > LOST:
                        raise FedVLMError(f"the server is gone ({error}); {_how(config)}") from None
            else:
                time.sleep(0.2)


def begun(folder: str | Path) -> bool:
    """Whether a folder holds a deployed run, finished or not."""
    return stores.is_run(folder) and (Path(folder) / SITES).exists()


def check(config: Config, resume: bool) -> None:
    """Refuses a run that cannot be deployed.

    Args:
        config: the run's settings.
        resume: whether the run in ``output`` continues.

    Raises:
        ConfigError: the algorithm needs all rows in one place, or a setting needs more than sites
            send.
        FedVLMError: the folder is taken, or holds no run to resume.
    """
    if wrong := one_place(config, find(config.algorithm.name)):
        raise ConfigError(wrong)
    if resume and not begun(config.output):
        raise FedVLMError(f"'{config.output}' holds no deployed run to resume")
    if not resume:
        stores.check_fresh(config.output)


def saved(folder: str | Path) -> Config:
    """Reads the settings of the deployed run in a folder.

    Raises:
        FedVLMError: the folder holds no deployed run.
    """
    if not begun(folder):
        raise FedVLMError(f"'{folder}' holds no deployed run to resume")
    stores.check_whole(folder)
    with settings_of(folder):
        config = configs.load(Path(folder) / stores.CONFIG)
    return config.model_copy(update={"output": str(folder)})


def _how(config: Config) -> str:
    return f"go on with: fedvlm deploy run --resume {config.output}"


def _finished(config: Config) -> int | None:
    return stores.Store(config.output).finished()


def _ended(status: str) -> bool:
    return status.startswith(("FINISHED", "ABORTED", "FAILED", "ABANDONED"))
