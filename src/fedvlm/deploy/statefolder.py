"""A site's state folder: all that fedvlm writes at a site, for its owner alone, and its removal.

runs/RUN/                 personal state, adapters, answers and reference answers of a run
spending/                 the ledger of differential privacy over all runs
cache/                    copies of rows: texts, pictures, tokens and pixels
nvflare/  *.log           NVFlare's workspace, and logs
identity.key              the site's long-lived key for secure aggregation
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fedvlm.errors import FedVLMError, shown
from fedvlm.store.files import only_one, sync

RUNS, CACHE = "runs", "cache"
OURS = {"HF_DATASETS_CACHE": "datasets", "FEDVLM_CACHE": "fedvlm", "TMPDIR": "tmp"}
"""Environment variables -> folders in ``cache/``. Libraries would write rows elsewhere."""
SUMS = "blind"  # the rounds of secure sums that are over
KNOWN = (RUNS, CACHE, "spending", SUMS, "nvflare", "site.log", "nvflare.log")
TAKEN = "'{}' is in use by another fedvlm process: stop the site first, then erase"


def private(state: str | Path) -> dict[str, str]:
    """Makes the state folder its owner's alone, and this process write files for its owner alone.

    Args:
        state: the folder; made if there is none.

    Returns:
        The environment variables of every process that reads rows, see :data:`OURS`.

    Raises:
        FedVLMError: the folder cannot be made, or belongs to another user.
    """
    os.umask(0o077)
    root = Path(state).absolute()
    found = {name: root / CACHE / folder for name, folder in OURS.items()}
    try:
        for folder in found.values():
            folder.mkdir(parents=True, exist_ok=True)
        _tighten(root)
    except OSError as error:
        raise FedVLMError(
            f"--state '{root}' cannot be made this user's alone: {error.strerror}"
        ) from None
    return {name: str(folder) for name, folder in found.items()}


def _tighten(root: Path) -> None:
    """Takes all rights of other users away from a folder and from everything in it."""
    os.chmod(root, 0o700)  # first: from now on nobody else can reach what is inside
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                mode = os.stat(path).st_mode & 0o7777
                if mode & 0o077:
                    os.chmod(path, mode & 0o7700)


def remains(state: str | Path, run: str | None = None) -> list[Path]:
    """What :func:`erase` would remove.

    Args:
        state: the state folder.
        run: a run's name; None: everything.

    Raises:
        FedVLMError: the folder is no site's state, or has no such run.
    """
    root = Path(state).absolute()
    if not root.is_dir() or not any(os.path.lexists(root / name) for name in KNOWN):
        raise FedVLMError(
            f"--state '{root}' is no site's state: it holds none of {', '.join(KNOWN)}"
        )
    if run is None:
        return sorted(path for path in root.iterdir() if path.name != ".lock")
    known = sorted(path.name for path in (root / RUNS).glob("*"))
    if run not in known:
        listed = ", ".join(known) or "none"
        raise FedVLMError(f"--run {shown(run)}: the site has no such run; it has {listed}")
    return [path for path in (root / RUNS / run, root / CACHE) if os.path.lexists(path)]


def erase(state: str | Path, run: str | None = None) -> list[tuple[Path, int]]:
    """Removes a run, or everything. The caches go with any run: they hold the rows of all.

    With a run stay what the site has spent (``spending``) and which rounds of secure sums are over
    (``blind``): a server that opens the run again gets no second answer to them.

    Args:
        state: the state folder.
        run: a run's name; None: everything, the site's key and its logs included.

    Returns:
        What was removed, with its size in bytes.

    Raises:
        FedVLMError: see :func:`remains`; or the site runs; or something cannot be removed.
    """
    root = Path(state).absolute()
    remains(root, run)
    with only_one(root, TAKEN.format(root)):
        found = [(path, _size(path)) for path in remains(root, run)]
        for path, _ in found:
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                raise FedVLMError(
                    f"'{error.filename or path}' cannot be removed ({error.strerror}); what came "
                    "before it is gone. Remove the cause and erase again"
                ) from None
            sync(path.parent)
    return found


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; links count nothing."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(p.lstat().st_size for p in files if p.is_file() and not p.is_symlink())
