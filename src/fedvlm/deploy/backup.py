"""Back up and restore a site's state, and a federation with the results of its runs.

Locks make a copy consistent: no run may be at work. A site may be connected meanwhile. The ledger
of differential privacy is copied last, so a backup never has less spent than its runs. A restored
ledger must not be older than the one that it replaces: see :func:`restore_site`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedvlm.deploy import archive, auditlog, statefolder
from fedvlm.deploy.auditlog import NONE, AuditLog
from fedvlm.deploy.spending import FOLDER, HEAD, LEDGER, Spending
from fedvlm.errors import FedVLMError, shown
from fedvlm.store import sealed
from fedvlm.store.files import only_one
from fedvlm.store.run import Store, is_run

SITE, FEDERATION, RESULTS = "site", "federation", "results"
SECRETS = ("keys", "identity.key")
KEPT = ("runs", "requests", auditlog.NAME, statefolder.SUMS)


def back_up_site(state: str | Path, target: str | Path, keys: bool = False) -> dict[str, Any]:
    """Copies a site's runs, requests, logs and ledger, without the caches of its rows.

    Args:
        state: the state folder.
        target: the file.
        keys: whether the site's private keys are copied too.

    Raises:
        FedVLMError: a run is at work, or something cannot be read or written.
    """
    root = Path(state).absolute()
    statefolder.remains(root)
    facts: dict[str, Any] = {"keys": keys, "ledger": NONE}
    logs = sorted(path.name for path in root.glob("site.log*"))

    def members() -> Iterator[tuple[str, Path]]:
        yield from archive.below(root, *KEPT, *logs, *(SECRETS if keys else ()))
        spending = Spending(root)
        if spending.begun:
            with spending.locked():
                facts["ledger"] = _last(root / FOLDER)
                yield from archive.below(root, FOLDER)

    with contextlib.ExitStack() as locks:
        for run in sorted((root / "runs").glob("*/")):
            locks.enter_context(_idle(run))
        return archive.write(Path(target), SITE, members(), facts)


def restore_site(
    source: str | Path, state: str | Path, confirm: Callable[[str], bool]
) -> dict[str, Any]:
    """Restores a site's state. The ledger never goes back in time without a person's word.

    A state that holds a ledger, and nothing else, keeps it if it has all lines of the backup's. It
    takes the backup's if that has all lines of its own. Else nobody knows what was spent. The same
    holds for the rounds of secure sums that are over: those of both stay over.

    Args:
        source: the backup.
        state: the folder; it must not hold anything but ``spending`` and ``blind``.
        confirm: asks a person whether to go on without a newer ledger.

    Returns:
        What the backup says about itself.

    Raises:
        FedVLMError: the folder holds other things, the backup is damaged, or the ledgers differ.
    """
    root = Path(state).absolute()
    _empty(root, FOLDER, statefolder.SUMS)
    if (root / FOLDER / HEAD).exists() and not (root / FOLDER / LEDGER).exists():
        raise FedVLMError(
            f"'{root / FOLDER}' is no whole ledger: {LEDGER} is missing. Move it away, and then "
            "that of the backup is used"
        )
    scratch = root.with_name(f"{root.name}.restoring")
    about = archive.unpack(Path(source), scratch, SITE)
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with only_one(root, f"'{root}' is in use by another fedvlm process: stop the site first"):
            here = (root / FOLDER / LEDGER).exists()
            older = here and not _newer(root / FOLDER, scratch / FOLDER)
            if not here and about["ledger"] not in ("", NONE):
                _ask(about, confirm)
            _join_sums(root / statefolder.SUMS, scratch / statefolder.SUMS, about, confirm)
            shutil.rmtree((root if older or not here else scratch) / FOLDER, ignore_errors=True)
            _move(scratch, root)
            statefolder.private(root)
            AuditLog(root / auditlog.NAME).note(
                "restored", backup=about["time"], ledger=about["ledger"]
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return about


def _ask(about: dict[str, Any], confirm: Callable[[str], bool]) -> None:
    question = (
        f"the ledger in this backup is of {about['time']}. If this site has trained under "
        "differential privacy since then, those rounds are missing, and every epsilon is too "
        "small. If the newer folder 'spending' exists, copy it into the state first. Restore "
        "without it?"
    )
    if not confirm(question):
        raise FedVLMError("nothing was restored: the ledger in the backup may be too old")


def _join_sums(
    here: Path, other: Path, about: dict[str, Any], confirm: Callable[[str], bool]
) -> None:
    """Leaves, in ``other``, the later round of both for each run; empties ``here``.

    Raises:
        FedVLMError: no such folder is here, and the person says no.
    """
    question = (
        f"the rounds of secure sums in this backup are those of {about['time']}. If this site has "
        "taken part in a sum since then, a server can ask for that round again, and the difference "
        "of both sums may be this site's upload. If the newer folder 'blind' exists, copy it into "
        "the state first. Restore without it?"
    )
    if not here.exists():
        if other.exists() and not confirm(question):
            raise FedVLMError("nothing was restored: the rounds in the backup may be too old")
        return
    other.mkdir(exist_ok=True, mode=0o700)
    for path in sorted(here.glob("*.json")):
        known = other / path.name
        if not known.exists() or sealed.read(known)["round"] < sealed.read(path)["round"]:
            shutil.copy2(path, known)
    shutil.rmtree(here)


def _newer(here: Path, other: Path) -> bool:
    """Whether the ledger that is here has all lines of another one.

    Raises:
        FedVLMError: it lacks some, and the other one lacks some too; or one is damaged.
    """
    if not (other / LEDGER).exists():
        return True
    mine, theirs = _last(here), _last(other)
    with contextlib.suppress(FedVLMError):
        auditlog.verify(here / LEDGER, theirs)
        return True
    with contextlib.suppress(FedVLMError):
        auditlog.verify(other / LEDGER, mine)
        return False
    raise FedVLMError(
        f"'{here}' and the backup have different ledgers of differential privacy, and neither has "
        "all lines of the other: nothing was restored. If the one in the state is not of this "
        "site, move it away"
    )


def _last(folder: Path) -> str:
    """The hash of a ledger's last line."""
    path = folder / LEDGER
    return auditlog.verify(path).last if path.exists() else NONE


def back_up_federation(
    folder: str | Path, results: Sequence[str | Path], target: str | Path, keys: bool = False
) -> dict[str, Any]:
    """Copies a federation, and the results of runs.

    Args:
        folder: the federation.
        results: folders of runs.
        target: the file.
        keys: whether the keys of the authority, the server and the operator are copied too.

    Raises:
        FedVLMError: a run is at work, or something cannot be read or written.
    """
    home = Path(folder).absolute()
    if not (home / "project.yml").is_file():
        raise FedVLMError(f"'{home}' holds no federation: it has no project.yml")
    runs = {Path(run).absolute().name: Path(run).absolute() for run in results}
    if len(runs) < len(results):
        raise FedVLMError("two of the runs have folders of the same name: back them up one by one")
    for run in runs.values():
        if not is_run(run):
            raise FedVLMError(f"'{run}' holds no run")

    def members() -> Iterator[tuple[str, Path]]:
        parts = ["project.yml", "admitted.json", "sites", "runs", "server/startup", "server/local"]
        for name, path in archive.below(home, *parts, *(("ca", "admin") if keys else ())):
            if keys or path.suffix != ".key":
                yield f"{FEDERATION}/{name}", path
        for run, place in runs.items():
            for name, path in archive.below(place.parent, run):
                yield f"{RESULTS}/{name}", path

    with contextlib.ExitStack() as locks:
        for run in runs.values():
            locks.enter_context(_idle(run))
        return archive.write(Path(target), FEDERATION, members(), {"keys": keys})


def restore_federation(
    source: str | Path, folder: str | Path, results: str | Path
) -> dict[str, Any]:
    """Restores a federation, and the results of runs.

    Args:
        source: the backup.
        folder: the federation; it must not hold anything.
        results: gets a folder for each run; none of them may exist.

    Raises:
        FedVLMError: something is in the way, or the backup is damaged.
    """
    home, place = Path(folder).absolute(), Path(results).absolute()
    _empty(home)
    scratch = home.with_name(f"{home.name}.restoring")
    about = archive.unpack(Path(source), scratch, FEDERATION)
    try:
        found = sorted((scratch / RESULTS).glob("*"))
        for run in found:
            if (place / run.name).exists():
                raise FedVLMError(f"'{place / run.name}' exists: choose another folder (--runs)")
        home.mkdir(parents=True, exist_ok=True)
        _move(scratch / FEDERATION, home)
        for run in found:
            place.mkdir(parents=True, exist_ok=True)
            shutil.move(run, place / run.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return about


@contextlib.contextmanager
def _idle(run: Path) -> Iterator[None]:
    """Holds a run's lock.

    Raises:
        FedVLMError: the run is at work.
    """
    lock = Store(run).locked()
    try:
        lock.__enter__()
    except FedVLMError:
        raise FedVLMError(
            f"run {shown(run.name)} is at work, so no copy of it would be whole: back up when it "
            "has ended, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _empty(folder: Path, *allowed: str) -> None:
    there = sorted(path.name for path in folder.glob("*")) if folder.exists() else []
    others = [name for name in there if name not in (*allowed, ".lock")]
    if others:
        raise FedVLMError(
            f"'{folder}' holds {shown(others[0])}: restore into a new folder, or move away what is "
            "there"
            + (f", except for {' and '.join(allowed)}, which a restore keeps" if allowed else "")
        )


def _move(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        shutil.move(path, target / path.name)
