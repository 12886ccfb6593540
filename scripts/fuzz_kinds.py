"""The trials of scripts/fuzz.py: one function a kind, from a generator to an error or nothing."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from fuzz_damage import SMALL, WORDS, Wrong, spoiled
from fuzz_wire import messages

# Configurations


def configurations(rng: random.Random, folder: Path) -> None:
    """A damaged file, overrides of odd values, or a dict of odd objects."""
    from fedvlm import config as configs

    way = rng.randrange(3)
    if way == 0:
        text = rng.choice(_texts())
        path = folder / "c.yaml"
        path.write_bytes(spoiled(rng, text.encode(), rng.choice((1, 2, 6))))
        found = configs.load(path)
    elif way == 1:
        pairs = [(_key(rng), _value(rng)) for _ in range(rng.randint(1, 3))]
        found = configs.load(None, *(f"{key}={value}" for key, value in pairs))
        for key, value in dict(pairs).items():
            _as_written(found, key, value)
    else:
        tree: Any = {}
        for _ in range(rng.randint(1, 3)):
            part, _, leaf = _key(rng).partition(".")
            inner = tree.setdefault(part, {}) if leaf else tree
            if isinstance(inner, dict):
                inner[leaf or part] = rng.choice(_objects(tree, rng))
        found = configs.load(tree)
    text = configs.dump(found)
    path = folder / "d.yaml"
    path.write_text(text, encoding="utf-8")
    if configs.load(path) != found:
        raise Wrong(f"the configuration changes when it is written: {text[:100]}")


def _texts() -> list[str]:
    from fedvlm import config as configs

    whole = configs.dump(configs.load(None, "algorithm.name=ditto"))
    return [whole, "train: {rounds: 3, lr: 1e-4}\nseed: 1\n", "a: &a [1]\nb: [*a, *a]\n"]


def _key(rng: random.Random) -> str:
    from fedvlm.config import _keys
    from fedvlm.settings.sections import Config

    keys = [*_keys(Config), "algorithm.share", "algorithm.server_lr", "lora.ranks.a"]
    key = rng.choice(keys)
    odd = rng.random()
    return key if odd < 0.9 else spoiled(rng, key.encode(), 1).decode("utf-8", "surrogateescape")


def _value(rng: random.Random) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
    return rng.choice(("", " ", ", ")).join(words) * rng.choice((1,) * 9 + (3000,))


def _objects(tree: Any, rng: random.Random) -> list[Any]:
    import numpy as np

    deep: Any = []
    for _ in range(rng.choice((3, 70, 5000))):
        deep = [deep]
    odd = [b"x", {1, 2}, object(), tree, deep, np.arange(3), np.float32(2), np.bool_(True)]
    keys = [{1: 2}, {None: 1}, {"a": tree}, {"\ud800": 1}, {(1,): 1}]
    return [*odd, *keys, Path("x"), (1, 2), 10**400, 1e300, float("nan"), "\0", rng.choice(WORDS)]


def _as_written(config: Any, key: str, value: str) -> None:
    """A number is what stands there, and so is a text."""
    from fedvlm.documents import scalar

    found = config
    for part in key.strip().split("."):
        if not hasattr(found, part):
            return
        found = getattr(found, part)
    meant, text = scalar(value.strip()), value.strip()
    quoted = text[:1] in tuple("'\"[{")
    if isinstance(found, str) and not quoted and key.strip() != "algorithm.name" and found != text:
        raise Wrong(f"{key}={value!r} became the text {found!r}")
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if number and not quoted and (type(meant) not in (int, float) or float(meant) != found):
        raise Wrong(f"{key}={value!r} became the number {found!r}")


# Pictures


def picture(rng: random.Random) -> tuple[Any, bytes]:
    """A picture of any mode and format of Pillow, and its file."""
    from PIL import Image

    mode = rng.choice(("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I", "F", "I;16"))
    kind = rng.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX"))
    size = rng.randint(1, 40), rng.randint(1, 40)
    need = {"1": 1, "RGB": 3, "YCbCr": 3, "RGBA": 4, "CMYK": 4, "I": 4, "F": 4, "LA": 2, "I;16": 2}
    length = size[0] * size[1] * need.get(mode, 1)
    image = Image.frombytes(mode, size, rng.randbytes(length if mode != "1" else length * 8))
    out = io.BytesIO()
    extra = {"exif": b"Exif\0\0" + rng.randbytes(30)} if rng.random() < 0.1 else {}
    try:
        image.save(out, kind, **extra)
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):  # not this mode, or this EXIF
        image, kind = image.convert("RGB"), "PNG"
        out = io.BytesIO()
        image.save(out, kind)
    return image, out.getvalue()


def pictures(rng: random.Random, folder: Path) -> None:
    """A whole or damaged picture: what passes the check of the rows can be used."""
    import datasets

    from fedvlm.data.images import check_pictures, open_image
    from fedvlm.errors import DataError

    image, content = picture(rng)
    whole = rng.random() < 0.2
    content = content if whole else spoiled(rng, content)
    value = {"bytes": content, "path": None}
    features = datasets.Features(
        {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    )
    rows = datasets.Dataset.from_dict({"image": [value]}, features=features)
    reason = check_pictures(rows, keep=False).broken
    try:
        found = open_image(value)
    except DataError as error:
        if not reason or whole:
            raise Wrong(f"the check passes a picture that cannot be used: {error}") from error
        raise
    if reason:
        raise DataError(next(iter(reason.values())))
    if found.mode != "RGB":
        raise Wrong(f"a picture of mode {found.mode}")
    if whole and image.mode == "RGB" and content[:4] == b"\x89PNG" and "exif" not in image.info:
        same = found.tobytes() == image.tobytes() or found.size != image.size
        if not same:
            raise Wrong("a PNG has other pixels")


# Data files


def data_files(rng: random.Random, folder: Path) -> None:
    """A damaged file of rows: its rows have texts, and pictures that can be opened."""
    from fedvlm.data.images import open_image
    from fedvlm.data.sources import load_rows
    from fedvlm.settings.sections import DataConfig

    name = rng.choice(("a.csv", "a.jsonl", "a.json", "a.parquet"))
    path = folder / "data" / name
    original = (folder / "rows" / name).read_bytes()
    path.write_bytes(spoiled(rng, original, 3))
    columns = {"image": "image", "question": "question", "answer": "answer"}
    data = DataConfig(path=str(path), columns=columns, on_error=rng.choice(("fail", "skip")))  # type: ignore[arg-type]
    rows = load_rows(data)
    for row in rows:
        if not (row["question"] or "").strip() or not (row["answer"] or "").strip():
            raise Wrong(f"row {row['row']} has no text")
        open_image(row["image"])


def _make_rows(folder: Path) -> None:
    import pandas as pd
    from PIL import Image

    (folder / "rows").mkdir()
    (folder / "data").mkdir()
    rows = []
    for n in range(6):
        Image.new("RGB", (8, 8), (40 * n, 0, 0)).save(folder / "data" / f"{n}.png")
        row = {"image": f"{n}.png", "question": f"what, {n}?", "answer": f'"{n}"', "site": f"0{n}"}
        rows.append(row | {"age": n / 2})
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "rows" / "a.csv", index=False)
    frame.to_json(folder / "rows" / "a.jsonl", orient="records", lines=True)
    (folder / "rows" / "a.json").write_text(json.dumps(rows))
    content = [(folder / "data" / f"{n}.png").read_bytes() for n in range(6)]
    frame["image"] = [{"bytes": b, "path": None} for b in content]
    frame.to_parquet(folder / "rows" / "a.parquet")


# Run folders


def run_files(rng: random.Random, folder: Path) -> None:
    """A run with one damaged file: an error, or the same content."""
    which = rng.choice(("finished", "unfinished"))
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / which, copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.suffix not in (".png", ".lock"))
    path = rng.choice(files)
    content, how = path.read_bytes(), rng.randrange(5)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif how == 2:
        path.write_bytes(rng.choice(files).read_bytes())
    else:
        path.write_bytes(spoiled(rng, content, 1))
    expected = json.loads((folder / f"{which}.json").read_text())
    found = _seen(copy, which)
    for part, value in expected.items():
        if found[part] != value:
            where = path.relative_to(copy)
            raise Wrong(f"{which}: {where} changed ({how}), and {part} differs without a word")


def _seen(folder: Path, which: str) -> dict[str, Any]:
    """All that later commands read of a run, by name."""
    from fedvlm import config as configs
    from fedvlm.after.opened import WEIGHTS, open_run
    from fedvlm.store import files
    from fedvlm.store.run import CONFIG, Store, check_whole
    from fedvlm.tree import digest

    check_whole(folder)
    config = configs.load(folder / CONFIG).model_dump_json()
    if which == "unfinished":  # as a resumed run reads it
        store = Store(folder)
        store.rewind()
        found: dict[str, Any] = {"config": config, "round": store.finished()}
        found["server"] = digest(store.server())
        found["personal"] = [digest(t) for t in store.personal(["site-0", "site-1"])]
        return found | {"metrics": json.dumps(store.lines())}
    run = open_run(folder)
    found = {"config": config, "table": json.dumps(run.results.table)}
    for model in ("untuned", "global", "personal"):
        found[model] = json.dumps([run.results.answers(model), run.results.scores(model)])
    found["partition"] = json.dumps(run.partition.to_dict())
    for name in (None, *run.clients):
        found[f"adapter of {name}"] = digest(files.load_tree(run.adapter_folder(name) / WEIGHTS))
    return found


def _make_runs(folder: Path) -> None:
    import fedvlm
    from fedvlm.rounds.progress import Progress

    class Stop(Progress):
        def round(self, line: Any, seconds: float) -> None:
            if line["round"] == 1:
                raise KeyboardInterrupt

    fedvlm.run(None, *SMALL, f"output={folder / 'finished'}", report=False)
    with contextlib.suppress(KeyboardInterrupt):
        fedvlm.run(None, *SMALL, f"output={folder / 'unfinished'}", progress=Stop())
    for which in ("finished", "unfinished"):
        (folder / f"{which}.json").write_text(json.dumps(_seen(folder / which, which)))


KINDS = {
    "config": configurations,
    "pictures": pictures,
    "data": data_files,
    "runs": run_files,
    "wire": messages,
}


def make(kinds: list[str], folder: Path) -> None:
    """Makes the sound files that trials damage."""
    if "data" in kinds:
        _make_rows(folder)
    if "runs" in kinds:
        _make_runs(folder)


def warm(kind: str, folder: Path) -> None:
    """Imports what a trial imports, so that its time and memory are its own."""
    import torch

    torch.set_num_threads(1)
    for number in range(3):
        with contextlib.suppress(Exception):
            KINDS[kind](random.Random(number), folder)
