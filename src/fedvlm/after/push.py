"""push_to_hub(): the adapters of a run in one repository of the Hugging Face hub, a folder each.

Only adapters and model cards go up: no row, no answer, no log, no path of this machine.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fedvlm import hub
from fedvlm.after import card, export, loading
from fedvlm.after.opened import WEIGHTS, Opened, open_run
from fedvlm.errors import FedVLMError, brief, counted, visible
from fedvlm.models.folder import ADAPTER
from fedvlm.rounds.results import of_all
from fedvlm.store import files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"


@dataclass(frozen=True)
class Push:
    """What goes up, and where.

    Attributes:
        repo: the name of the repository.
        branch: the branch.
        public: whether everybody can read the repository.
        new: whether the repository does not exist yet.
        account: the account of the token.
        files: path in the repository -> bytes of the file.
    """

    repo: str
    branch: str
    public: bool
    new: bool
    account: str
    files: Mapping[str, int]


def push_to_hub(
    folder: str | Path,
    repo: str,
    *overrides: str,
    clients: tuple[str, ...] = (),
    global_: bool = False,
    public: bool = False,
    revision: str | None = None,
    tell: Callable[[Push], None] = lambda push: None,
) -> str:
    """Pushes the adapters of a finished run to the hub: one commit, a folder for each model.

    A folder holds what :func:`fedvlm.export` writes, and ``PeftModel.from_pretrained(base, repo,
    subfolder=...)`` loads it. The token is that of ``HF_TOKEN`` or ``hf auth login``. It is checked
    before anything is sent. Other files of the repository stay as they are.

    Args:
        folder: the run's folder.
        repo: the repository, ``org/name``; it is made if it is new.
        *overrides: settings that differ from the run's, such as ``"model.name=org/base"``.
        clients: clients and sites that joined after training.
        global_: push the global model. Without ``clients`` and ``global_``, all models are pushed
            whose adapters are here.
        public: whether everybody can read a new repository; an existing one must be as you say.
        revision: the branch, made from the main one if it is new; None means the main one.
        tell: gets what will go up, before anything does.

    Returns:
        The address of the commit.

    Raises:
        FedVLMError: a name is wrong, the base model is a folder of this machine, the token is
            missing or refused, or the repository is public and ``public`` is False.
    """
    _check_names(repo, revision)
    run = open_run(folder, *overrides)
    chosen = _chosen(run, clients, global_)
    base = _base(run)
    with _api(repo) as (api, account):
        new = _is_new(api, repo, public)
        with tempfile.TemporaryDirectory() as scratch, files.disk_errors():
            written = _write(run, chosen, base, loading.At(repo, "", revision), Path(scratch))
            sizes = {path: file.stat().st_size for path, file in written.items()}
            tell(Push(repo, revision or "main", public, new, account, sizes))
            return _send(api, repo, revision, written, private=not public, new=new)


def _check_names(repo: str, revision: str | None) -> None:
    if not hub.is_name(repo) or hub.split(repo)[1] is not None:
        raise FedVLMError(
            f"'{brief(repo)}' is no name of a repository: give one such as org/name, of letters, "
            "digits, '-', '_' and '.'; a branch goes into --revision"
        )
    if revision is not None and (not hub.is_name(f"{repo}@{revision}") or hub.is_commit(revision)):
        raise FedVLMError(f"--revision: '{brief(revision)}' is no name of a branch")


def _chosen(run: Opened, clients: tuple[str, ...], global_: bool) -> list[str | None]:
    """The models that go up; None stands for the global model."""
    chosen: list[str | None] = [*dict.fromkeys(clients)]
    if not chosen and not global_:
        here = () if run.deployed else run.clients  # the sites of a deployed run keep theirs
        chosen, global_ = [*here, *run.onboarded], True
    chosen += [None] if global_ else []
    for client in chosen:
        run.adapter_folder(client)
    return chosen


def _base(run: Opened) -> str:
    from fedvlm.models.load import BUNDLED

    name = run.config.model.name
    if name in BUNDLED:
        return name
    base = export.base_name(name)
    if Path(base).is_absolute():
        raise FedVLMError(
            f"the base model of the run is a folder of this machine ('{brief(base)}'), where "
            "nobody else finds it: give its name on the hub with --set model.name=org/name"
        )
    return base


# The repository


@contextmanager
def _api(repo: str) -> Iterator[tuple[HfApi, str]]:
    """The client of the hub, and the name of the account; errors become messages."""
    from huggingface_hub import HfApi, constants, get_token

    from fedvlm.data.sources import quiet

    if constants.HF_HUB_OFFLINE:
        raise FedVLMError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it")
    if get_token() is None:
        raise FedVLMError(
            f"there is no token for {constants.ENDPOINT}: log in with hf auth login, or set "
            f"HF_TOKEN; the token must be allowed to write to '{repo}'"
        )
    account = "the token's account"
    try:
        with quiet():
            api = HfApi()
            about = api.whoami()
            account = str(about.get("name"))
            role = (about.get("auth") or {}).get("accessToken", {}).get("role")
            if role == "read":
                raise FedVLMError(
                    f"the token of '{brief(account)}' may only read: make one that may write to "
                    f"'{repo}' at {constants.ENDPOINT}/settings/tokens"
                )
            yield api, account
    except FedVLMError:
        raise
    except Exception as error:  # of huggingface_hub, httpx or httpx2
        known = hub.why_not(error, repo)
        if known is None and not isinstance(error, OSError | ValueError):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = known if status == 401 else f"{constants.ENDPOINT} does not take it: {brief(error)}"
        if status == 403:
            why = f"'{brief(account)}' may not write there: {brief(error)}"
        raise FedVLMError(f"nothing was committed to '{repo}': {why}") from error


def _is_new(api: HfApi, repo: str, public: bool) -> bool:
    """Whether a repository is new.

    Raises:
        FedVLMError: it exists, and is public or private against the wish.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        private = api.model_info(repo, timeout=10).private
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return True
    if not private and not public:
        raise FedVLMError(
            f"'{repo}' exists and is public, so that everybody could read the adapters: choose "
            "another name, make the repository private, or add --public"
        )
    if private and public:
        raise FedVLMError(
            f"'{repo}' exists and is private: leave out --public, or change it on its page first"
        )
    return False


def _send(
    api: HfApi,
    repo: str,
    revision: str | None,
    written: Mapping[str, Path],
    *,
    private: bool,
    new: bool,
) -> str:
    """Makes the repository and the branch if they are new, and commits the files."""
    from huggingface_hub import CommitOperationAdd

    if new:
        api.create_repo(repo, private=private)
        if private and not api.model_info(repo, timeout=10).private:
            raise FedVLMError(
                f"the hub has made '{repo}' public, although it was asked for a private one; "
                "nothing else was pushed"
            )
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    added = [CommitOperationAdd(path, str(file)) for path, file in written.items()]
    title = f"LoRA adapters by fedvlm: {counted(len(written) // 3, 'model')}"
    done: Any = api.create_commit(repo, added, commit_message=title, revision=revision)
    return str(done.commit_url)


# The files


def _write(
    run: Opened, chosen: list[str | None], base: str, at: loading.At, scratch: Path
) -> dict[str, Path]:
    """Writes what goes up; returns path in the repository -> file."""
    folders = {client: export.folder_name(run, client) for client in chosen}
    for client, name in folders.items():
        place = at._replace(folder=name)
        export.write_export(run, client, False, scratch / name, place)
    text = _card(run, folders, base, at)
    (scratch / CARD).write_text(text, encoding="utf-8")
    names = [f"{folder}/{n}" for folder in folders.values() for n in (ADAPTER, WEIGHTS, CARD)]
    return {name: scratch / name for name in (CARD, *names)}


def _card(run: Opened, folders: Mapping[str | None, str], base: str, at: loading.At) -> str:
    """The card of the repository, with a link to each folder."""
    from fedvlm.models.load import BUNDLED

    bundled = base in BUNDLED
    trees = files.load_tree(run.adapter_folder(next(iter(folders))) / WEIGHTS)
    facts = {
        "base model": card.code(base),
        **card.training(run.config, trees),
        "clients": of_all(run.clients, run.names),
    }
    rows = [
        f"| {'the global model' if client is None else _cell(client)} | [{_cell(name)}]"
        f"({quote(name)}/{CARD}) |"
        for client, name in folders.items()
    ]
    left = [*card.what_left(run, None), card.NO_ROWS]
    if any(client is not None for client in folders):
        left.append(
            "The folder of a client holds its whole adapter, with the factors that stayed with "
            "the client. Every reader of this repository can read them."
        )
    guarantee = card.guarantee(run.results.table)
    code = loading.filled(loading.of_adapter(base, bundled, at), run.config)
    parts = [
        card.front_matter(None if bundled else base, merged=False),
        f"# LoRA adapters by fedvlm: {counted(len(folders), 'model')}\n",
        "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())]),
        "\n## Models\n\nEach folder is an adapter in PEFT's format, with a card and its scores.\n",
        "\n".join(["| model | folder |", "| --- | --- |", *rows]),
        "\n## What left the sites\n\n" + "\n".join(f"- {line}" for line in left) + "\n",
        *(["## Differential privacy\n\n" + "\n".join(f"- {line}" for line in guarantee) + "\n"]
          if guarantee else []),
        f"## How to load it\n\n{code}\n",
        card.LICENCE,
    ]  # fmt: skip
    return "\n".join(parts)


def _cell(name: str) -> str:
    """A name as text in a table of Markdown; nothing in it is syntax."""
    return re.sub(r"([^\w\s.])", r"\\\1", visible(name))
