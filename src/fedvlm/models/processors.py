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
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedvlm.errors import FedVLMError

VIDEO = "video_processor"
_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(source: str, local: bool) -> Any:
    """The processor of a folder or hub model, as ``AutoProcessor`` finds it.

    Raises:
        OSError, ValueError, ImportError, KeyError: as ``AutoProcessor`` does.
    """
    from transformers import AutoProcessor

    base = processor_class(source, local)
    if base is None or VIDEO not in base.get_attributes() or _can_read_videos(base):
        return AutoProcessor.from_pretrained(
            source, local_files_only=local, trust_remote_code=False
        )
    with num2words_or_none(base):
        processor = image_only(base).from_pretrained(source, local_files_only=local)
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

    names = [_read(source, file, local).get("processor_class") for file in _FILES]
    for name in filter(None, names):
        return getattr(transformers, name, None)
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
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
    whole = _read(source, "processor_config.json", local).get(VIDEO)
    files = ("video_preprocessor_config.json", "preprocessor_config.json")
    return whole or next(filter(None, (_read(source, f, local) for f in files)), None)


def _read(source: str, file: str, local: bool) -> dict[str, Any]:
    from transformers.utils import cached_file

    found = cached_file(
        source,
        file,
        local_files_only=local,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
