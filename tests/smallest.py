"""The model of most tests. It has the bundled model's family, and takes a fifth of its time."""

from __future__ import annotations


def model() -> str:
    """The folder of the model."""
    import families  # takes seconds, which tests without a model do not need

    return families.folder("idefics3")
