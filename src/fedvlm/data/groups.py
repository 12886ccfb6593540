"""Finds the rows that show the same image, which a client must not both train and test on."""

from __future__ import annotations

import datasets
import numpy as np

from fedvlm.data.columns import TEXT
from fedvlm.data.labels import codes_of, values_of


def image_groups(rows: datasets.Dataset) -> np.ndarray:
    """Numbers the rows; rows that share an image have the same number.

    Rows share an image if they have the same ``image_path``, the same image file, or the same
    ``image_hash``, directly or through other rows.
    """
    groups = np.arange(len(rows))
    if "image_path" in rows.column_names:
        as_text = rows.features["image_path"].dtype in TEXT
        groups = _alone_where_missing(values_of(rows, "image_path"), as_text)
    if "image_hash" in rows.column_names:
        groups = _united(groups, _alone_where_missing(values_of(rows, "image_hash")))
    elif "image" in rows.column_names:
        groups = _united(groups, _alone_where_missing(_image_files(rows)))
    return groups


def _alone_where_missing(values: np.ndarray, as_text: bool = True) -> np.ndarray:
    codes = codes_of(values, as_text=as_text)[0]
    return np.where(values == "", codes.max() + 1 + np.arange(len(values)), codes)


def _image_files(rows: datasets.Dataset) -> np.ndarray:
    """The path of each image that is a file; the empty text for embedded images."""
    paths: list[str] = []
    for batch in rows.select_columns(["image"]).with_format("arrow").iter(1000):
        images = batch["image"].combine_chunks()
        embedded = images.field("bytes").is_valid().to_pylist()
        found = zip(images.field("path").to_pylist(), embedded, strict=True)
        paths += ["" if inside or path is None else path for path, inside in found]
    return np.array(paths, dtype=object)


def _united(groups: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Joins the groups that share a number of ``others``; a joined group has its lowest number."""
    others = np.unique(others, return_inverse=True)[1]
    joined = groups
    while True:
        least = np.full(others.max() + 1, joined.max())
        np.minimum.at(least, others, joined)
        renamed = np.arange(joined.max() + 1)
        np.minimum.at(renamed, joined, least[others])
        if np.array_equal(renamed[joined], joined):
            return joined
        joined = renamed[joined]
