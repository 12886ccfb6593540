"""A finished run's models, ready for questions: many adapters on one base, in one pass."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedvlm.after.heldout import HeldOut
from fedvlm.after.inputs import from_images
from fedvlm.after.names import GLOBAL, UNTUNED, label
from fedvlm.after.opened import Opened, unseen
from fedvlm.data.pictures import Pictures
from fedvlm.errors import DataError, FedVLMError, shown
from fedvlm.tree import Tree

if TYPE_CHECKING:
    from fedvlm.batches.collate import Collator

WIDTH = 32  # models in a pass
FEATURES = 1 << 28  # bytes for the features of the present picture


@dataclass(frozen=True)
class Reply:
    """The answer of one model.

    Attributes:
        model: the name of the model.
        answer: its answer.
        confidence: the exponential of the mean log-probability of the answer's tokens.
    """

    model: str
    answer: str
    confidence: float


@dataclass(frozen=True)
class Replies:
    """The answers of several models to one question.

    Attributes:
        replies: one for each model.
        seconds: the time of the pass, or of the passes where there are many models.
    """

    replies: tuple[Reply, ...]
    seconds: float


class Asked:
    """The models of a run. All chosen models answer a question in one pass through one base.

    The adapters of the last chosen models stay in memory. Threads may share the object.

    Args:
        run: the run.
        width: most models in a pass.

    Attributes:
        models: the names of all models: the sites, then the global and the untuned model.
        alone: why the models answer one after another; empty where they share a pass.
    """

    def __init__(self, run: Opened, width: int = WIDTH):
        from fedvlm.engines.choice import routed
        from fedvlm.models.stack import Stack

        self.run = run
        self._clients = {label(name): name for name in (*run.clients, *run.onboarded)}
        self.models = (*self._clients, GLOBAL, UNTUNED)
        self._base = Opened(run.folder, run.config)  # a stack replaces its layers of LoRA
        self._model, self._initial = self._base.attached
        experts = routed(self._model)
        self.alone = (
            f"{len(experts)} of its layers with LoRA are experts, such as {experts[0]}"
            if experts
            else ""
        )
        self._width = 1 if experts else width
        self._stack = None if experts else Stack(self._model.eval())
        self._loaded: tuple[str, ...] = ()
        self._frozen: bool | None = None  # whether no adapter changes a picture's features
        self._lock = threading.Lock()

    def ask(self, image: Any, question: str, models: Sequence[str]) -> Replies:
        """Asks several models one question about a picture, or about several.

        Args:
            image: a path, encoded bytes, a PIL image, or a list of these.
            question: the question.
            models: the names of the models, see :attr:`models`.

        Raises:
            FedVLMError: the picture cannot be opened, the question is empty or too long, or there
                is no such model.
        """
        names = self.check(question, models)
        with self._lock:
            row = self._row(image, question)
            found: list[Reply] = []
            seconds = 0.0
            for start in range(0, len(names), self._width):
                self._load(names[start : start + self._width])
                began = time.monotonic()
                found += self._pass(row)
                seconds += time.monotonic() - began
        return Replies(tuple(found), seconds)

    def check(self, question: str, models: Sequence[str]) -> tuple[str, ...]:
        """The names of the models, each once.

        Raises:
            FedVLMError: the question is empty, no model is chosen, or there is no such model.
        """
        from_images([], question)
        names = tuple(dict.fromkeys(models))
        odd = [name for name in names if name not in self.models]
        if odd:
            raise FedVLMError(f"'{self.run.folder}' has no model {shown(odd[0])}")
        if not names:
            raise FedVLMError("no model is chosen; choose at least one")
        return names

    def held_out(self) -> HeldOut:
        """The rows that the run's sites have not trained on.

        Raises:
            FedVLMError: the rows are not here, or they are not those of the run.
        """
        with self._lock:
            return HeldOut(self.run, self._base.base)

    def _row(self, image: Any, question: str) -> Collator:
        """Batches of the one row."""
        data = self.run.config.data.model_copy(update={"on_error": "fail"})
        Pictures.of(data).open_all(image)  # its error is shorter than that of a list of images
        collator = self._base.collator(from_images([image], question, data))
        if bad := collator.check(0, unseen, unseen):
            raise DataError(bad[0])
        return collator

    def _load(self, names: tuple[str, ...]) -> None:
        """Puts adapters into the model, unless they are there."""
        if names == self._loaded:
            return
        trees = [self._tree(name) for name in names]
        for tree in trees:
            self._base.check_shapes(tree)
        self._loaded = ()
        if self._stack is None:
            self._base.write(trees[0])
        else:
            self._stack.load(trees, self._base.base.device)
            self._stack.activate(range(len(trees)))
        self._loaded = names

    def _tree(self, name: str) -> Tree:
        if name == UNTUNED:
            return self._initial
        clients = [self._clients[name]] if name != GLOBAL else []
        chosen = self.run.chosen(clients, global_=not clients, untuned=False, every=False)
        return chosen[name]

    def _pass(self, row: Collator) -> list[Reply]:
        """The answers of the loaded models."""
        from fedvlm.models.generate import rated

        names, tokens = self._loaded, self.run.config.eval.max_new_tokens
        prompts = row.prompts([0] * len(names))
        with self._given(row, len(names)):
            said = rated(self._model, prompts, row.tokenizer, tokens)
        return [Reply(name, *one) for name, one in zip(names, said, strict=True)]

    def _given(self, row: Collator, count: int) -> contextlib.AbstractContextManager[None]:
        """Describes a pass to the stack; the picture's features are computed once, if they can."""
        from fedvlm.models.frozen import ImageFeatures

        if self._stack is None:
            return contextlib.nullcontext()
        images = ImageFeatures(self._model, row.picture, FEATURES)
        if self._frozen is None:
            self._stack.activate([0])  # the trial is with one copy of the picture
            self._stack.batch(1, 1, lambda: True)
            self._frozen = images.usable(0)
            self._stack.activate(range(count))
        self._stack.batch(count, 1, lambda: True)  # the rows of a pass are copies of one row
        return images.given([0] * count) if self._frozen else contextlib.nullcontext()
