"""Labels free-text answers by topic: clusters of their words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from fedvlm.errors import DataError
from fedvlm.settings.sections import PartitionConfig

_WORDS = 20_000  # size of the vocabulary, the most frequent words
_NAMED = 3  # words in a cluster's name


def check_installed(settings: PartitionConfig) -> None:
    """Refuses a partition by clusters where scikit-learn is not installed.

    Raises:
        DataError: with the command that installs it.
    """
    if settings.clusters and find_spec("sklearn") is None:
        raise DataError(
            f"partition.clusters={settings.clusters} needs scikit-learn, which is not installed: "
            "pip install 'fedvlm[clusters]', or label the rows by partition.column"
        )


def cluster_codes(texts: Sequence[str], count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Labels every text by its cluster: k-means (Lloyd 1982) on the TF-IDF weights of its words.

    Args:
        texts: the answers.
        count: number of clusters. The result can have fewer, if few texts share a word.
        seed: seed of k-means.

    Returns:
        The label of each text, and the name of each label. A name has the words that are more
        frequent in the cluster than elsewhere.

    Raises:
        DataError: there are fewer different texts than clusters, or the texts hold no words.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    different = len(set(texts))
    if different < count:
        raise DataError(
            f"partition.clusters={count}, but there are {different} different answers: lower it, "
            "or leave it out, so that every answer is a label"
        )
    words = TfidfVectorizer(sublinear_tf=True, max_features=_WORDS, token_pattern=r"(?u)\b\w+\b")
    try:
        weights = words.fit_transform(texts)
    except ValueError as error:  # an empty vocabulary
        raise DataError(f"partition.clusters: the answers hold no words ({error})") from error
    means = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=4096)
    # One thread, because the sums depend on the number of threads.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = means.fit_predict(weights)
    used, codes = np.unique(found, return_inverse=True)
    apart = means.cluster_centers_[used] - np.asarray(weights.mean(axis=0))
    return codes, _names(apart, words.get_feature_names_out())


def _names(apart: np.ndarray, words: np.ndarray) -> list[str]:
    """Names each cluster by its heaviest words; function words only if it has no others.

    Args:
        apart: the clusters' centres minus the mean of all texts, [clusters, words].
        words: the vocabulary.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    names: list[str] = []
    for weights in apart:
        heavy = [words[i] for i in np.argsort(-weights, kind="stable")[:50] if weights[i] > 0]
        telling = [word for word in heavy if word not in ENGLISH_STOP_WORDS] or heavy
        name = " / ".join(telling[:_NAMED]) or "(other)"
        again = sum(other.split(" #")[0] == name for other in names)
        names.append(f"{name} #{again + 1}" if again else name)
    return names
