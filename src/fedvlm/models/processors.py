"""Loads a model's processor, without its video part if that part cannot be built.

Several families (SmolVLM, LLaVA-OneVision, Qwen-VL, InternVL) have processors that also read
videos. transformers builds the video part only with torchvision; SmolVLM's video part also needs
num2words. Pictures need neither package. If one is missing, the same processor class is loaded
without its video part. When saved, the processor names the original class and keeps the
checkpoint's video settings. The folder is thus a complete processor once torchvision is installed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedvlm import hub
from fedvlm.errors import FedVLMError, brief

logger = logging.getLogger("fedvlm")

VIDEO = "video_processor"
_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(source: str, local: bool) -> Any:
    """The processor of a folder or hub model, as ``AutoProcessor`` finds it.

    A processor without a chat template gets the tokenizer's, if that names the image.

    Raises:
        ValueError: there is no tokenizer or no image processor.
        Exception: as ``AutoProcessor`` does.
    """
    processor = _processor(source, local)
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ValueError(f"it has no {part.replace('_', ' ')}: its files are missing")
    choose_template(processor, source)
    return processor


def choose_template(processor: Any, source: str) -> None:
    """Gives a processor without a chat template the one of its tokenizer, if that fits.

    A template fits if a turn with one image gives exactly one image token. A template that is not
    used is named in a warning, so that nobody serves a model with prompts that it was not trained
    on.
    """
    own = getattr(processor, "chat_template", None)
    if own is not None:
        _check_template(processor, source)
    other = getattr(processor.tokenizer, "chat_template", None)
    if not other or other == own or str(other).strip() == str(own).strip():
        return
    why = _unfit(processor, other)
    if own and not why:
        logger.warning(
            "%s: the processor and the tokenizer have different chat templates; "
            "the processor's is used",
            brief(source),
        )
    elif not own and not why:
        processor.chat_template = other
    elif not own:
        logger.warning(
            "%s: the tokenizer's chat template is not used: %s. The prompt has the form for models "
            "without a template; a chat template of the processor would be used",
            brief(source),
            why,
        )


def _check_template(processor: Any, source: str) -> None:
    """Refuses a chat template that cannot be rendered.

    Raises:
        ValueError: it is no text, or fails for a question about an image.
    """
    turn = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        processor.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program, and may fail in any way
        why = brief(error) or type(error).__name__
        raise ValueError(f"its chat template fails: {why}") from error


def _unfit(processor: Any, template: Any) -> str:
    """Why a template does not fit a processor; empty if it fits."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template["default"] if isinstance(template, dict) else template,
            add_generation_prompt=True,
            tokenize=False,
        )
    except Exception as error:  # a template is a program, and may fail in any way
        return f"it does not take a turn with an image ({brief(error)})"
    names = (getattr(processor, n, None) for n in ("image_token", "boi_token"))
    tokens = {str(token) for token in names if token}
    if any(text.count(token) == 1 for token in tokens):
        return ""
    return f"for a turn with an image, it does not give one image token ({brief(sorted(tokens))})"


def _processor(source: str, local: bool) -> Any:
    from transformers import AutoProcessor

    base = processor_class(source, local)
    where, options = hub.place(source, local)
    if base is None or VIDEO not in base.get_attributes() or _can_read_videos(base):
        return AutoProcessor.from_pretrained(where, trust_remote_code=False, **options)
    with num2words_or_none(base):
        processor = image_only(base).from_pretrained(where, trust_remote_code=False, **options)
    processor._video_config = _video_config(source, local)
    return processor


def image_only(base: Any) -> Any:
    """A subclass of a processor class, with the same name but without the video part."""

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in base.get_attributes() if name != VIDEO]

    def arguments(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        found = super(image, cls)._get_arguments_from_pretrained(*args, **kwargs)  # type: ignore[misc]
        found.insert(base.get_attributes().index(VIDEO), None)
        return found

    def to_dict(self: Any) -> dict[str, Any]:
        written = super(image, self).to_dict()  # type: ignore[misc]
        if self._video_config is not None:
            written[VIDEO] = self._video_config
        return written

    image: Any = type(
        base.__name__,  # what save_pretrained writes as processor_class
        (base,),
        {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "__reduce__": lambda self: (_rebuild, (base,), self.__dict__),
            "get_attributes": classmethod(get_attributes),
            "_get_arguments_from_pretrained": classmethod(arguments),
            "to_dict": to_dict,
            VIDEO: _NoVideo(),
            "_video_config": None,
        },
    )
    return image


def processor_class(source: str, local: bool) -> Any:
    """The processor class that a checkpoint names, else the one of its configuration class."""
    import transformers

    names = [read_json(source, file, local).get("processor_class") for file in _FILES]
    for name in filter(None, names):
        return getattr(transformers, name, None)
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    where, options = hub.place(source, local)
    config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    return PROCESSOR_MAPPING.get(type(config), None)


class _NoVideo:
    """Replaces the video part; SmolVLM's chat template reads two of its settings."""

    num_frames = fps = merge_size = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise FedVLMError("this processor was loaded for pictures only; videos need torchvision")


def _rebuild(base: Any) -> Any:
    image = image_only(base)
    return image.__new__(image)


def _can_read_videos(base: Any) -> bool:
    from transformers.utils import is_torchvision_available

    return is_torchvision_available() and not _wants_words(base)


def _wants_words(base: Any) -> bool:
    """Whether the class's module uses num2words but num2words is not installed."""
    module = sys.modules[base.__module__]
    return hasattr(module, "num2words") and importlib.util.find_spec("num2words") is None


@contextmanager
def num2words_or_none(base: Any) -> Iterator[None]:
    """Lets SmolVLM's processor be built without num2words, which only videos need."""
    if not _wants_words(base):
        yield
        return
    module: Any = sys.modules[base.__module__]
    module.num2words = str
    try:
        yield
    finally:
        module.num2words = None


def _video_config(source: str, local: bool) -> dict[str, Any] | None:
    """A checkpoint's video settings, from the files in which transformers looks for them."""
    whole = read_json(source, "processor_config.json", local).get(VIDEO)
    files = ("video_preprocessor_config.json", "preprocessor_config.json")
    return whole or next(filter(None, (read_json(source, f, local) for f in files)), None)


def read_json(source: str, file: str, local: bool) -> dict[str, Any]:
    """A JSON object from a file of a folder or a hub model; empty without this file."""
    from transformers.utils import cached_file

    where, options = hub.place(source, local)
    found = cached_file(
        where,
        file,
        **options,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    document = {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"its {file} must hold a JSON object")
    return document
