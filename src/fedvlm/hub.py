"""Names on the Hugging Face hub, and the reasons for which the hub does not deliver one.

A name is ``org/name`` or ``org/name@revision``. The revision is a branch, a tag or a commit. A
branch may move; a whole commit (40 hexadecimal digits) always means the same files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from fedvlm.errors import FedVLMError, brief

Kind = Literal["model", "data set"]


OF_FILES = frozenset(
    {".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".yaml", ".yml", ".zip", ".xlsx"}
    | {".xls", ".txt", ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".dcm"}
)
"""Ends of a mistyped path: such a text stays on this machine."""
FORM = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


class Undelivered(FedVLMError):
    """The hub does not deliver a name. At a site, the reason stays in the site's log."""


def is_name(text: str, *, organized: bool = True) -> bool:
    """Whether a text has the form of a name on the hub, and not that of a path on this machine.

    A path has the end of a file, or begins with a folder that is here; with a revision it is a
    name. So a mistyped path is not sent to the hub.

    Args:
        text: the text.
        organized: whether the name needs an organization; old models, such as ``gpt2``, have none.

    >>> is_name("org/name"), is_name("org/name@v1.0"), is_name("gpt2"), is_name("/org/name")
    (True, True, False, False)
    """
    repo, revision = split(text)
    if revision is not None and not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", revision):
        return False
    if revision is None and os.path.splitext(repo)[1].lower() in OF_FILES:
        return False
    if organized or "/" in repo:
        here = revision is None and os.path.isdir(repo.partition("/")[0])
        return not here and bool(re.fullmatch(FORM, repo, re.ASCII))
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", repo, re.ASCII))


NAMES = "such a name looks like org/name, or org/name@main where a folder 'org' is here"
"""The hint where a text is no name."""


def split(name: str) -> tuple[str, str | None]:
    """A name on the hub as repository and revision; no revision gives None.

    >>> split("org/name@v1.0")
    ('org/name', 'v1.0')
    """
    repo, at, revision = name.partition("@")
    return repo, revision if at else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit, which always means the same files."""
    return bool(re.fullmatch("[0-9a-f]{40}", revision or ""))


def place(source: str, local: bool) -> tuple[str, dict[str, Any]]:
    """A model's source as ``from_pretrained`` of transformers takes it: the name and keywords.

    Args:
        source: a folder, or a name on the hub.
        local: whether it is a folder.
    """
    repo, revision = (source, None) if local else split(source)
    return repo, {"local_files_only": local, "revision": revision or "main"}


@contextmanager
def asked(name: str, kind: Kind = "model", *, local: bool = False) -> Iterator[Exception | None]:
    """Asks the hub for a name first; without an answer, the clients use only their cache.

    The clients of the hub repeat every request several times, so that without a connection a load
    takes minutes, even of files in the cache.

    Args:
        name: the name on the hub.
        kind: what the name stands for.
        local: whether the name is a folder, about which the hub is not asked.

    Yields:
        The error of the question; None if the hub has the name, or must not be asked.
    """
    from huggingface_hub import HfApi, constants

    if local or constants.HF_HUB_OFFLINE or (kind == "data set" and _only_cached()):
        yield None
        return
    repo, revision = split(name)
    refusal: Exception | None = None
    try:
        api = HfApi()
        ask = api.model_info if kind == "model" else api.dataset_info
        ask(repo, revision=revision, timeout=10)
    except Exception as error:  # of httpx or httpx2, as the version of the hub's client is
        refusal = error
    silent = refusal is not None and not refuses(refusal)
    constants.HF_HUB_OFFLINE = silent
    try:
        with from_cache(silent) if kind == "data set" else nullcontext():
            yield refusal
    finally:
        constants.HF_HUB_OFFLINE = False


@contextmanager
def from_cache(only: bool = True) -> Iterator[None]:
    """Reads data sets of the hub from the cache only; ``only=False`` changes nothing."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or only
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _only_cached() -> bool:
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def check(setting: str, name: str, kind: Kind) -> None:
    """Asks the hub whether it would deliver a name.

    Args:
        setting: the setting of that name, for the message.
        name: the name.
        kind: what the name stands for.

    Raises:
        Undelivered: the hub answers that it would not. Without an answer, nothing is raised.
    """
    with asked(name, kind) as refusal:
        if refusal is not None and refuses(refusal):
            raise Undelivered(undelivered(setting, name, str(why_not(refusal, name, kind))))


def undelivered(setting: str, name: str, why: str) -> str:
    """The message for a name that the hub does not deliver."""
    return f"{setting}: '{brief(name)}' does not load from the Hugging Face hub: {why}"


def refuses(error: BaseException) -> bool:
    """Whether an error is the hub's answer that it does not deliver a name to this token."""
    answers = [getattr(one, "response", None) for one in _chain(error)]
    return bool({getattr(answer, "status_code", None) for answer in answers} & {401, 403, 404})


def why_not(
    error: BaseException, name: str, kind: Kind = "model", refusal: Exception | None = None
) -> str | None:
    """The reason for an error of the hub's clients, and the remedy; None for another error.

    Args:
        error: the error, as it was raised by ``huggingface_hub``, transformers or datasets.
        name: the name on the hub.
        kind: what the name stands for.
        refusal: the answer of :func:`asked`, which is nearer to the cause.
    """
    if refusal is not None and why_not(error, name, kind):
        error = refusal
    from huggingface_hub import constants

    repo, revision = split(name)
    hub = constants.ENDPOINT
    page = f"{hub}/{'datasets/' if kind == 'data set' else ''}{brief(repo)}"
    options = "--repo-type dataset " if kind == "data set" else ""
    options += f"--revision {brief(revision)} " if revision else ""
    elsewhere = (
        f"or download it where there is a connection (hf download {brief(repo)} {options}"
        "--local-dir DIR), and give the folder instead of the name"
    )
    chain = list(_chain(error))
    text = "\n".join(map(str, chain))
    # By name: the hub's client raises errors of httpx or of httpx2, as its version is.
    kinds = {base.__name__ for one in chain for base in type(one).__mro__}
    if "Invalid credentials in Authorization header" in text:
        return (
            f"{hub} refuses the token ({_token()}): make a new one at {hub}/settings/tokens, or "
            "remove it if no token is needed"
        )
    if "GatedRepoError" in kinds or "is a gated dataset" in text:
        return (
            f"access to it is restricted: ask for access at {page}, and give a token of the "
            f"account that has access (hf auth login, or HF_TOKEN; now: {_token()})"
        )
    if "RevisionNotFoundError" in kinds:
        return f"it has no revision '{brief(revision)}': give a branch, a tag or a commit after '@'"
    if "RepositoryNotFoundError" in kinds or "doesn't exist on the Hub" in text:
        return (
            f"there is no {kind} '{brief(repo)}' at {hub}, or it is private: check the name, or "
            f"give a token that may read it (hf auth login, or HF_TOKEN; now: {_token()})"
        )
    missing = "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in text
    if missing and constants.HF_HUB_OFFLINE:
        return (
            "it is not in the local cache, or only a part of it, and HF_HUB_OFFLINE is set: load "
            f"it once without HF_HUB_OFFLINE, {elsewhere}"
        )
    broken = kinds & {"ReadError", "RemoteProtocolError"} or "Consistency check failed" in text
    if broken and error is not refusal:
        return "the download broke off: start again; the files that are complete are kept"
    if "RemoteEntryNotFoundError" in kinds:
        return None  # the hub has the name, and the caller names the file
    if missing or broken or kinds & {"ConnectError", "TimeoutException", "HfHubHTTPError"}:
        why = brief(chain[-1]) or type(chain[-1]).__name__
        return f"{hub} does not deliver it ({why}): start again later, {elsewhere}"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the errors from which it came."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _token() -> str:
    """The origin of the token that goes to the hub, in words; never the token."""
    from huggingface_hub import get_token

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"that of {name}"
    return "that of hf auth login" if get_token() else "none"
