"""A finished run, opened for use: its adapters by name, and its base model, loaded once."""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm import config as configs
from fedvlm.after.names import GLOBAL, UNTUNED, label, no_run
from fedvlm.algorithms.base import Algorithm
from fedvlm.algorithms.sharing import sharing
from fedvlm.algorithms.table import adapter_of, of_run
from fedvlm.engines.stages import parted
from fedvlm.errors import ConfigError, FedVLMError, shown
from fedvlm.rounds.results import Results
from fedvlm.rounds.schedule import standing
from fedvlm.settings.sections import Config
from fedvlm.store import files, sealed
from fedvlm.store import run as stores
from fedvlm.store.made import settings_of
from fedvlm.store.replanned import MADE
from fedvlm.tree import Tree, module, plain

if TYPE_CHECKING:
    import datasets
    from torch import Tensor

    from fedvlm.data.partition import Partition, Split
    from fedvlm.engines.reference import ReferenceEngine
    from fedvlm.models.load import Loaded

WEIGHTS = "adapter_model.safetensors"
ONBOARDED, SCORES = "onboarded", "scores.json"
SETTABLE = ("model", "data", "train", "eval", "engine")
ALONE = sharing({})


def open_run(folder: str | Path, *overrides: str, algorithm: Algorithm | None = None) -> Opened:
    """Opens a finished run; its base model is loaded at the first use.

    Args:
        folder: the run's folder, its setting ``output``.
        *overrides: changed settings, such as ``"model.device=cpu"``, in the sections model, data,
            train, eval and engine.
        algorithm: the object that the run was made with, if it was one; it is needed for clients
            that were not scored, and to onboard a site.

    Raises:
        FedVLMError: the folder holds no run, or an unfinished run.
        ConfigError: an override is wrong.
    """
    path = Path(folder)
    stores.check_whole(path)
    if not stores.is_run(path):
        raise FedVLMError(no_run(path))
    if not stores.is_done(path):
        raise FedVLMError(
            f"'{path}' holds an unfinished run; finish it first: fedvlm run --resume {path}"
        )
    fixed = [o for o in overrides if o.partition("=")[0].split(".")[0].strip() not in SETTABLE]
    if fixed:
        raise ConfigError(
            [
                f"'{o}' cannot change after training; only these sections can: "
                f"{', '.join(SETTABLE)}"
                for o in fixed
            ]
        )
    read = configs.load if algorithm is None else configs.own
    with settings_of(path):
        return Opened(path, read(path / stores.CONFIG, *overrides), algorithm)


class Opened:
    """A finished run.

    Attributes:
        folder: the folder of the run.
        config: the settings of the run, with the overrides.
        results: the scores of the run.
        clients: the names of the scored clients, in order: all clients, unless ``eval.clients`` is
            smaller. :attr:`partition` has the other clients.
    """

    def __init__(self, folder: Path, config: Config, algorithm: Algorithm | None = None):
        self._algorithm = algorithm
        self.folder = folder
        self.config = config
        self.results = Results.read(folder)
        self.clients: tuple[str, ...] = tuple(self.results.table["folders"])

    @cached_property
    def onboarded(self) -> dict[str, Path]:
        """Site that joined after training -> its folder."""
        found = sorted((self.folder / ONBOARDED).glob(f"[!.]*/{SCORES}"))  # .NAME.tmp: unfinished
        return {sealed.read(p)["site"]: p.parent for p in found}

    @property
    def deployed(self) -> bool:
        """Whether the clients were sites; the rows and their partition are there, not here."""
        return not (self.folder / "partition.json").exists()

    @cached_property
    def partition(self) -> Partition:
        """The partition of the run's rows into clients and splits."""
        from fedvlm.data.partition import Partition

        found = Partition.read(self.folder)
        assert found is not None, "a deployed run has no partition here"
        return found

    @cached_property
    def algorithm(self) -> Algorithm:
        """The run's algorithm.

        Raises:
            FedVLMError: the algorithm was an object, and :func:`open_run` did not get it.
        """
        return of_run(self.config, self._algorithm)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all clients. A deployed run knows those of the scored clients."""
        return self.clients if self.deployed else self.partition.clients

    @property
    def inputs(self) -> tuple[str, ...]:
        """The paths that the run reads, which no output may overwrite."""
        settings = self.config
        lists = settings.partition.lists
        paths = (settings.data.path, settings.model.name, lists if isinstance(lists, str) else None)
        return tuple(filter(None, paths))

    # -- models by name

    def adapter_folder(self, client: str | None) -> Path:
        """The PEFT folder of a client or an onboarded site; None: of the global model.

        Raises:
            FedVLMError: there is no such client; the message suggests the nearest name.
        """
        if client is None or client in self.clients:
            found = self.results.adapter(client)
            name = str(found.relative_to(self.folder))
            known = {n: d for n, d in self.results.files.items() if n.startswith(f"{name}/")}
            if known:
                sealed.check(self.folder, known)
                return found
            return self._made(client, found)  # it could not be written at the end of the run
        if client in self.onboarded:
            sealed.check(found := self.onboarded[client], sealed.read(found / SCORES)["files"])
            return found
        if client in self.partition.splits:
            return self._made(client, self.folder / "adapters" / f"client-{self._slugs[client]}")
        names = [*self.clients, *self.onboarded]
        close = difflib.get_close_matches(str(client), names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        raise FedVLMError(f"'{self.folder}' has no client '{client}'{hint} There are {shown}")

    def _made(self, client: str | None, folder: Path) -> Path:
        """The folder of an adapter that the run did not write; it is made at the first request."""
        from fedvlm.models.lora import save_adapter

        if (folder / MADE).exists():
            sealed.check(folder, sealed.read(folder / MADE)["files"])
            return folder
        if client and self.deployed:
            raise FedVLMError(
                f"a file of the run is missing: there is no '{folder / WEIGHTS}'; the model of "
                f"client '{client}' stays at its site"
            )
        algorithm, store = self.algorithm, stores.Store(self.folder)
        visit = standing(self.config, algorithm).visit(client or "")
        mine = parted(store.personal([client])[0])[0] if client else {}
        tree = algorithm.model(self.initial, algorithm.send(store.server(), visit), mine)
        taken = f"another process makes the adapter in '{folder}'; try again later"
        try:
            folder.parent.mkdir(exist_ok=True)
            with files.only_one(folder.parent, taken, patience=60.0):
                if not (folder / MADE).exists():  # no other process has made it meanwhile
                    shutil.rmtree(folder, ignore_errors=True)  # half written
                    save_adapter(self.write(tree), tree, folder)
                    names = [path.name for path in folder.glob("adapter_*")]
                    sealed.write(folder / MADE, {"files": sealed.digests(folder, names)})
        except OSError as error:
            raise FedVLMError(
                f"the adapter of {f'client {shown(client)}' if client else 'the global model'} "
                f"cannot be kept in '{folder}': {error.strerror or error}; the run writes an "
                "adapter at the first request"
            ) from error
        return folder

    @cached_property
    def _slugs(self) -> dict[str, str]:
        return files.slugs(self.partition.clients)

    def chosen(
        self, clients: Iterable[str] = (), *, global_: bool, untuned: bool, every: bool
    ) -> dict[str, Tree]:
        """The adapters of the chosen models, by the names of their columns.

        Args:
            clients: names of clients and onboarded sites.
            global_: whether to add the global model.
            untuned: whether to add the base model without training.
            every: whether to add all clients, the global and the untuned model.
        """
        names = list(dict.fromkeys(clients))
        if every:
            names += [c for c in (*self.clients, *self.onboarded) if c not in names]
        folders = {label(name): self.adapter_folder(name) for name in names}
        if global_ or every:
            folders[GLOBAL] = self.adapter_folder(None)
        trees = {name: files.load_tree(folder / WEIGHTS) for name, folder in folders.items()}
        return {**trees, UNTUNED: self.initial} if untuned or every else trees

    @property
    def initial(self) -> Tree:
        """The common initial adapter, with which the model equals the base model."""
        return self.attached[1]

    # -- the base model

    @cached_property
    def base(self) -> Loaded:
        """The base model with its processor; LoRA is attached to it when an adapter is needed."""
        from fedvlm.models.load import load_model, set_threads

        loaded = load_model(self.config.model)
        set_threads(loaded.model, self.config.engine.threads)
        return loaded

    @cached_property
    def attached(self) -> tuple[Any, Tree]:
        """The model with LoRA on the layers of the run, and the initial adapter."""
        from fedvlm.models import lora

        modules = {module(name) for name in self._factors()}
        self._check_fit(modules - {name for name, _ in self.base.model.named_modules()})
        # Exactly these layers: a run may have left out some layers of lora.target.
        exact = f"^({'|'.join(map(re.escape, sorted(modules)))})$"
        config = adapter_of(self.config).model_copy(update={"target": exact})
        model = lora.attach(self.base.model, config, self.config.seed)
        return model, lora.read(lora.handles(model))

    def _factors(self) -> Iterable[str]:
        """The names of the factors of the run."""
        folder = self.results.adapter()
        if f"adapters/{folder.name}/{WEIGHTS}" in self.results.files:
            return files.load_tree(self.adapter_folder(None) / WEIGHTS)
        store = stores.Store(self.folder)  # the run could not write its adapters
        kept = store.personal(self.clients)
        return set().union(plain(store.server()), *(plain(parted(tree)[0]) for tree in kept))

    def write(self, tree: Tree) -> Any:
        """Puts an adapter into the model; returns the PEFT model, ready to answer.

        Raises:
            FedVLMError: the adapter was made for other layers.
        """
        from fedvlm.models import lora

        self.check_shapes(tree)
        lora.write(lora.handles(self.attached[0]), tree)
        return self.attached[0].eval()

    def check_shapes(self, tree: Tree) -> None:
        """Refuses an adapter that was made for other layers."""
        odd = self.initial.keys() ^ tree.keys()
        self._check_fit(odd or {n for n, p in self.initial.items() if p.shape != tree[n].shape})

    def _check_fit(self, odd: Iterable[str]) -> None:
        names = sorted(odd)
        if names:
            raise FedVLMError(
                f"the adapters in '{self.folder}' do not fit the model '{self.config.model.name}': "
                f"{len(names)} layers or factors differ, such as {names[0]}; use the model and the "
                "version of transformers of the run (environment.json)"
            )

    def engine(
        self,
        rows: Any,
        splits: Mapping[str, Split],
        config: Config,
        folder: Path,
        algorithm: Algorithm | None = None,
    ) -> ReferenceEngine:
        """An engine for rows other than those of the run.

        Args:
            rows: rows with ``image``, ``question`` and ``answer``.
            splits: client -> its positions in ``rows``.
            config: the settings for training and scoring.
            folder: folder for personal states, other than the run's folder.
            algorithm: the algorithm for training; None: the engine does not train.
        """
        from fedvlm.data.partition import Partition
        from fedvlm.engines.reference import ReferenceEngine  # its PEFT layers stay in place

        model = self.write(self.initial)  # an engine reads its initial adapter from the model
        names = tuple(splits)
        partition = Partition("iid", "answer", names, dict(splits), {}, ())
        store = stores.Store(folder)
        trains = algorithm or ALONE
        return ReferenceEngine(model, self.collator(rows), partition, config, store, trains)

    def collator(self, rows: Any) -> Any:
        """Batches of rows that the model can take.

        Raises:
            DataError: the model cannot take some rows; :meth:`usable` leaves such rows out.
        """
        from fedvlm.batches.collate import Collator
        from fedvlm.data.pictures import Pictures

        return Collator(
            rows,
            self.base,
            max_length=self.config.data.max_length,
            new_tokens=self.config.eval.max_new_tokens,
            pairs=self.pairs and "rejected" in rows.column_names,
            pictures=Pictures.of(self.config.data),
        )

    def usable(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows that the model can take.

        Raises:
            DataError: the model cannot take some rows, and ``data.on_error`` is not ``skip``.
        """
        from fedvlm.data.unusable import without

        bad = self.collator(rows).check(0, unseen, unseen)
        return without(rows, bad, "the source", self.config.data.on_error)

    @property
    def pairs(self) -> bool:
        """Whether the run learnt preferences; then new rows need rejected answers."""
        from fedvlm.batches import objectives

        return objectives.build(self.config.objective).pairs

    # -- uses

    def answers(self, rows: datasets.Dataset, models: Mapping[str, Tree]) -> dict[str, list[str]]:
        """Model -> its answers to all rows."""
        from fedvlm.models.generate import greedy

        collator, settings = self.collator(rows), self.config.eval
        found: dict[str, list[str]] = {}
        for name, tree in models.items():
            model, texts = self.write(tree), []
            for start in range(0, len(rows), settings.batch_size):
                batch = range(start, min(start + settings.batch_size, len(rows)))
                prompts = collator.prompts(batch)
                texts += greedy(model, prompts, collator.tokenizer, settings.max_new_tokens)
            found[name] = texts
        return found

    def probe(self, tree: Tree | None) -> Tensor:
        """Logits of a fixed row (a noise image and a question), on the CPU; None: no adapter."""
        import numpy as np
        import torch
        from PIL import Image

        from fedvlm.after.inputs import from_images

        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        rows = from_images([Image.fromarray(noise)], "What is in the picture?")
        rows = rows.add_column("answer", ["a lamp"])
        model = self.base.model.eval() if tree is None else self.write(tree)
        with torch.no_grad():
            return model(**self.collator(rows).training([0])).logits.float().cpu()

    def predict(self, image: Any, question: str, *, client: str | None = None) -> str:
        """The answer of one model to a question about images; see :func:`fedvlm.predict`."""
        from fedvlm.after.inputs import from_images

        models = self.chosen([] if client is None else [client], **_only(client))
        (texts,) = self.answers(from_images([image], question, self.config.data), models).values()
        return texts[0]


def unseen(done: int, rows: int) -> None:
    """Progress that nobody sees."""


def _only(client: str | None) -> dict[str, bool]:
    return {"global_": client is None, "untuned": False, "every": False}
