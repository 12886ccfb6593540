"""The code on a model card that loads a model and answers a question."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fedvlm import hub
from fedvlm.settings.sections import Config


class At(NamedTuple):
    """A place on the hub: a repository, a folder in it, and a revision.

    Attributes:
        repo: the name of the repository.
        folder: the folder; empty for a card of several folders.
        revision: the branch; None: the main one.
    """

    repo: str
    folder: str
    revision: str | None


def parted(base: str) -> tuple[str, str | None]:
    """The name of a base model, and its revision; a folder has none."""
    return (base, None) if Path(base).is_absolute() else hub.split(base)


def of_adapter(base: str, bundled: bool, at: At | None = None) -> str:
    """Code that needs only PEFT and transformers, and for the bundled model its folder.

    Args:
        base: the base model.
        bundled: whether the base model comes with fedvlm.
        at: the place of the adapter on the hub; None: the reader names it.
    """
    local = Path(base).is_absolute()
    notes = [
        "Save this as `ask.py`, and run `python ask.py ADAPTER PICTURE QUESTION`. `ADAPTER` is the "
        "path of this folder, or its name on the hub."
    ]
    if at is not None:
        notes = ["" if at.folder else "Put the name of a folder of this repository for `FOLDER`."]
    if bundled and not local:
        notes.append("The base model is the one bundled with fedvlm.")
    elif bundled:
        notes.append(
            "The base model is the one bundled with fedvlm; its folder on a machine is printed by "
            "`python -c \"from fedvlm.models.load import locate; print(locate('tiny')[0])\"`."
        )
    elif local:
        notes.append("The base model is a folder of the machine that exported this.")
    name, revision = parted(base)
    known, finds = f"{name!r}", ""
    if bundled and not local:
        known = f"locate({name!r})[0]"
        finds = "\nfrom fedvlm.models.load import locate"
    pinned = f", revision={revision!r}" if revision else ""
    words, adapter = ["ADAPTER", "PICTURE", "QUESTION"], "ADAPTER"
    if at is not None:
        words = ["PICTURE", "QUESTION"] if at.folder else ["FOLDER", "PICTURE", "QUESTION"]
        adapter = f"{at.repo!r}, subfolder={repr(at.folder) if at.folder else 'FOLDER'}"
        adapter += f", revision={at.revision!r}" if at.revision else ""
    code = f"""\
import sys

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor{finds}

{", ".join(words)} = sys.argv[1:{len(words) + 1}]
BASE = {known}
processor = AutoProcessor.from_pretrained(BASE{pinned})
model = AutoModelForImageTextToText.from_pretrained(BASE{pinned}, dtype=DTYPE)
model = PeftModel.from_pretrained(model, {adapter}).eval()
"""
    return " ".join(filter(None, notes)) + "\n\n```python\n" + code + _ASK + "```\n"


def of_merged() -> str:
    """Code that needs only transformers."""
    code = """\
import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL, PICTURE, QUESTION = sys.argv[1:4]
processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=DTYPE).eval()
"""
    note = (
        "Save this as `ask.py`, and run `python ask.py MODEL PICTURE QUESTION`. `MODEL` is the "
        "path of this folder, or its name on the hub.\n\n```python\n"
    )
    return note + code + _ASK + "```\n"


_ASK = """\
prompt = QUESTION
if not processor.chat_template and "image" in str(processor.tokenizer.chat_template):
    processor.chat_template = processor.tokenizer.chat_template
if processor.chat_template:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    turn = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
begin = processor.tokenizer.bos_token
bare = bool(processor.chat_template and begin and prompt.startswith(begin))
options = {"add_special_tokens": False} if bare else {}  # a second begin token changes answers
image = Image.open(PICTURE).convert("RGB")
inputs = processor(text=[prompt], images=[[image]], return_tensors="pt", **options)
inputs = inputs.to(model.device, DTYPE)  # the picture; the tokens stay integers
with torch.no_grad():
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
print(processor.batch_decode(ids[:, start:], skip_special_tokens=True)[0].strip())
"""


def filled(loading: str, config: Config) -> str:
    """The code with this run's precision and answer length."""
    return loading.replace("DTYPE", f"torch.{config.model.dtype}").replace(
        "TOKENS", str(config.eval.max_new_tokens)
    )
