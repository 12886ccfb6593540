"""The bundled data set: pictures of scenes, questions and answers at sites that differ.

It needs no download. Rows are drawn from a seed and kept as parquet. They have the columns of
RLAIF-V, so code that reads RLAIF-V reads this data set too. There are two sorts of questions. The
bundled tiny model was trained on the first sort (name, colour, count, place, comparison, yes or
no). Only the sites know the novel sort (textures, handwritten digits, new shapes, new colours). The
`style` sets how the sites differ, the `strength` by how much.

    >>> data = scenes(sites=2, rows=3)
    >>> data.num_rows, data["site"][0]
    (6, 'site-0')
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedvlm.data import compose, questions
from fedvlm.data.render import Scene, render
from fedvlm.data.sites import STYLES, Site, make_sites

if TYPE_CHECKING:
    import datasets
    from PIL import Image

VERSION = 4  # of the generator; raise it with any change of the rows, or old caches are read
_SITE_GENERIC = {
    "name": 0.2,
    "colour": 0.25,
    "count": 0.15,
    "position": 0.15,
    "comparison": 0.1,
    "yesno": 0.15,
}
_TRIES = 400


def scenes(
    *, sites: int = 8, rows: int = 120, style: str = "mixed", strength: float = 1.0, seed: int = 0
) -> datasets.Dataset:
    """Makes scenes with questions and answers at several sites. Later calls read a cache.

    Args:
        sites: number of sites. The column `site` names them; the rows of a site are together.
        rows: mean number of rows per site.
        style: how the sites differ. `iid`: not at all. `label`: frequency of each answer
            (Dirichlet). `covariate`: each site has its own camera (hue, tilt, blur, noise,
            mirrored, inverted), and answers are about the undisturbed scene. `concept`: each site
            has its own wording of answers (language, sentence, capitals, codes), and the question
            has no hint of it. `quantity`: number of rows, by a power law. `mixed`: all of these.
            `odd`: all sites answer in German, but the last, which answers in English.
        strength: from 0 (all sites alike) to 1.
        seed: seed of all random draws. Equal arguments give equal bytes on every machine with the
            same library versions.

    Returns:
        A `datasets.Dataset` with the columns of RLAIF-V and `site`.

    Raises:
        ValueError: an argument is outside its range.
    """
    _check_whole("sites", sites, 1)
    _check_whole("rows", rows, 1)
    _check_whole("seed", seed, 0)
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; it must be one of {', '.join(STYLES)}")
    if (
        isinstance(strength, bool)
        or not isinstance(strength, int | float)
        or not 0 <= strength <= 1
    ):
        raise ValueError(f"strength is {strength!r}; it must be a number from 0 to 1")
    strength = float(strength)
    what = {"sites": sites, "rows": rows, "style": style, "strength": strength, "seed": seed}

    def make() -> Iterator[dict]:
        for site in make_sites(sites, rows, style, strength, seed):
            for number in range(site.rows):
                yield site_row(site, number, seed)

    return _cached("scenes", what, make)


def generic(count: int, seed: int = 0, *, kinds: tuple[str, ...] | None = None) -> datasets.Dataset:
    """Makes independent rows of the kinds that the bundled tiny model knows, all at one site.

    Args:
        count: number of rows.
        seed: seed of the rows. The training of the model used none of them.
        kinds: kinds of questions; all of `questions.GENERIC` by default.
    """
    _check_whole("count", count, 1)
    _check_whole("seed", seed, 0)
    kinds = tuple(questions.GENERIC) if kinds is None else tuple(kinds)
    unknown = [kind for kind in kinds if kind not in questions.GENERIC]
    if unknown or not kinds:
        raise ValueError(f"kinds is {kinds!r}; it must name some of {', '.join(questions.GENERIC)}")
    weights = {kind: questions.GENERIC[kind] for kind in kinds}

    def make() -> Iterator[dict]:
        for number in range(count):
            rng = random.Random(f"generic/{seed}/{number}")
            scene, item = _draw(rng, _pick(rng, weights), None)
            yield _row("generic", "site-0", number, item, render(scene), item.chosen, item.rejected)

    return _cached("generic", {"count": count, "seed": seed, "kinds": kinds}, make)


def site_row(site: Site, number: int, seed: int) -> dict:
    """Makes one row of a site, as a function of the arguments alone."""
    rng = random.Random(f"scenes/{seed}/{site.name}/{number}")
    kind = _pick(rng, questions.NOVEL if rng.random() < site.novel else _SITE_GENERIC)
    scene, item = _draw(rng, kind, site.prefers.get(kind))
    picture = site.camera.shoot(render(scene), rng)
    return _row(site.name, site.name, number, item, picture, *site.wording.answers(item))


def _draw(
    rng: random.Random, kind: str, prefers: dict[str, float] | None
) -> tuple[Scene, questions.Item]:
    """Draws scenes and questions of a kind until the answer is the one that the site prefers.

    The preferred answer is drawn first, from the weights in `prefers`. An answer that has no weight
    there, such as yes and no, is accepted at once, so that the site's share of such questions does
    not grow.
    """
    wanted, made = None, None
    for _ in range(_TRIES):
        scene = compose.make_scene(rng, kind)
        item = questions.ask(rng, kind, scene)
        if item is None:
            continue
        made, answer = (scene, item), " ".join(item.words)
        if wanted is None:
            if prefers is None or answer not in prefers:
                return made
            wanted = _pick(rng, prefers)
        if answer == wanted:
            return made
    if made is None:
        raise RuntimeError(f"none of {_TRIES} scenes allowed a question of the kind {kind!r}")
    return made


def _pick(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def _row(
    folder: str,
    site: str,
    number: int,
    item: questions.Item,
    picture: Image.Image,
    chosen: str,
    rejected: str,
) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    path = f"{folder}/{number:05d}.png"
    return {
        "ds_name": "scenes",
        "image": {"bytes": buffer.getvalue(), "path": path},
        "question": item.question,
        "chosen": chosen,
        "rejected": rejected,
        "origin_dataset": f"scenes/{item.kind}",
        "origin_split": json.dumps({"model": "renderer", "type": item.kind}),
        "idx": str(number),
        "image_path": path,
        "site": site,
    }


def cache_folder() -> Path:
    """Folder of the generated data sets: `FEDVLM_CACHE`, or `~/.cache/fedvlm`."""
    return Path(os.environ.get("FEDVLM_CACHE") or Path.home() / ".cache" / "fedvlm")


def _cached(name: str, what: dict, make: Callable[[], Iterator[dict]]) -> datasets.Dataset:
    """Reads a data set from the cache. It is made first if it is not there."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = dict.fromkeys(("ds_name", "question", "chosen", "rejected"), "string")
    text |= dict.fromkeys(("origin_dataset", "origin_split", "idx", "image_path", "site"), "string")
    columns = {key: datasets.Value(kind) for key, kind in text.items()}
    columns = {"ds_name": columns.pop("ds_name"), "image": datasets.Image(), **columns}
    features = datasets.Features(columns)
    key = hashlib.sha256(json.dumps([name, VERSION, what], sort_keys=True).encode()).hexdigest()[
        :16
    ]
    path = cache_folder() / f"{name}-v{VERSION}-{key}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(list(make()), schema=features.arrow_schema)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".draft")
        os.close(handle)
        pq.write_table(table, draft)
        os.replace(draft, path)
    return datasets.Dataset(pq.read_table(path), info=datasets.DatasetInfo(features=features))


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
