"""Finds the rows that show the same image, which a client must not both train and test on."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedvlm.data.columns import SHOWN, TEXT
from fedvlm.data.labels import codes_of, values_of

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("fedvlm")


def image_groups(rows: datasets.Dataset) -> np.ndarray:
    """Numbers the rows; rows that share an image have the same number.

    The column ``image_path`` is the source's own statement and decides where it has a value. Other
    rows share an image if they have the same image file or the same bytes (``image_hash``), or
    come from one conversation. If a row has several pictures, rows that share any of them have the
    same number, and so have rows between which others make such a chain, whatever ``image_path``
    says.
    """
    groups, pictures = _of_one_picture(rows), each_picture(rows)
    return _chained(groups, pictures) if any(len(own) > 1 for own in pictures) else groups


def each_picture(rows: datasets.Dataset) -> list[list[str]]:
    """For each row, a text of each of its pictures that equal pictures share; see below."""
    several = "image_hash" in rows.column_names
    return [text.split(" ") if several else [text] for text in same_pictures(rows).tolist()]


def _chained(groups: np.ndarray, pictures: Sequence[Sequence[str]]) -> np.ndarray:
    """Gives rows that share a picture, and groups that share a row, the same number."""
    lower = list(range(int(groups.max()) + 1))  # a group -> itself, or a lower one it belongs to
    first: dict[str, int] = {}  # picture -> the group of its first row

    def least(group: int) -> int:
        while lower[group] != group:
            lower[group] = lower[lower[group]]
            group = lower[group]
        return group

    for group, own in zip(groups.tolist(), pictures, strict=True):
        for picture in filter(None, own):
            one, two = least(group), least(first.setdefault(picture, group))
            lower[max(one, two)] = min(one, two)
    return np.array([least(group) for group in groups.tolist()])


def _of_one_picture(rows: datasets.Dataset) -> np.ndarray:
    """The number of each row, where rows share an image if all of their pictures are the same."""
    known, none = same_pictures(rows), np.full(len(rows), "", dtype=object)
    have = rows.column_names
    if not {"image_path", SHOWN} & set(have):
        return _as_first(np.arange(len(rows)), known)
    stated = values_of(rows, "image_path") if "image_path" in have else none
    made = values_of(rows, SHOWN) if SHOWN in have else none
    as_text = "image_path" not in have or rows.features["image_path"].dtype in TEXT
    groups = _alone_where_missing(np.where(stated == "", made, stated), as_text)
    return _as_first(groups, np.where(stated == "", known, ""))


def joined(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Groups in which rows with equal values stay together too; an empty value joins no rows.

    Args:
        groups: the number of each row's group.
        values: a text for each row, such as the patient.
    """
    codes = _alone_where_missing(values, as_text=True)
    while True:
        least = np.full(codes.max() + 1, len(groups))
        np.minimum.at(least, codes, groups)
        lower = least[codes]  # the smallest group among the rows of a value
        least = np.full(groups.max() + 1, len(groups))
        np.minimum.at(least, groups, lower)
        lower = least[groups]  # and among the rows of a group
        if np.array_equal(lower, groups):
            return np.unique(groups, return_inverse=True)[1]
        groups = lower


def same_pictures(rows: datasets.Dataset) -> np.ndarray:
    """For each row, a text that equal pictures share; empty if it is not known.

    The texts of the pictures of a row with several stand in their order, with a space between.
    """
    if "image_hash" in rows.column_names:
        return values_of(rows, "image_hash")
    return _image_files(rows) if "image" in rows.column_names else np.full(len(rows), "")


def _alone_where_missing(values: np.ndarray, as_text: bool) -> np.ndarray:
    codes = codes_of(values, as_text=as_text)[0]
    return np.where(values == "", codes.max() + 1 + np.arange(len(values)), codes)


def _image_files(rows: datasets.Dataset) -> np.ndarray:
    """The path of each image that is a file; the empty text for embedded images."""
    paths: list[str] = []
    for batch in rows.select_columns(["image"]).with_format("arrow").iter(1000):
        images = batch["image"].combine_chunks()
        if pa.types.is_list(images.type):
            return np.full(len(rows), "")  # without hashes, such rows count as different
        embedded = images.field("bytes").is_valid().to_pylist()
        found = zip(images.field("path").to_pylist(), embedded, strict=True)
        paths += [
            "" if inside or path is None else os.path.normpath(path) for path, inside in found
        ]
    return np.array(paths, dtype=object)


def _as_first(groups: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Gives the rows of one picture the group of the first of them; ``pictures`` may be empty."""
    _, first, place = np.unique(pictures.astype(str), return_index=True, return_inverse=True)
    return np.where(pictures == "", groups, groups[first][place])


def warn_of_shared_images(splits: Mapping[str, Any], groups: np.ndarray) -> None:
    """Warns of test rows whose image another client trains on.

    Args:
        splits: client -> its rows, as :class:`fedvlm.data.partition.Split`.
        groups: the number of each row's group.
    """
    trained = np.unique(groups[np.concatenate([s.train for s in splits.values()])])
    tested = groups[np.concatenate([s.test for s in splits.values()])]
    shared = int(np.isin(tested, trained).sum())
    if shared:
        logger.warning(
            "%d of %d test rows show an image that another client trains on",
            shared,
            len(tested),
        )


def warn_of_equal_pictures(splits: Mapping[str, Any], pictures: np.ndarray) -> None:
    """Warns of pictures that ``image_path`` calls different."""
    tested = [np.isin(pictures[s.test], pictures[s.train]) for s in splits.values()]
    known = [pictures[s.test] != "" for s in splits.values()]
    equal = int((np.concatenate(tested) & np.concatenate(known)).sum())
    if equal:
        logger.warning(
            "%d of %d test rows show a picture that the same client trains on under another "
            "image_path: give equal pictures one image_path",
            equal,
            sum(map(len, tested)),
        )
