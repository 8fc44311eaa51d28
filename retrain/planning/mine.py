"""Strategic grams from a run's own completions: the procedure of HICRA (arXiv 2509.03646)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retrain.planning.encoder import Embed
from retrain.types import RetrainError

WORDS = (3, 4, 5)
MOST_CANDIDATES = 2000  # clustering takes quadratic memory
MERGED_BELOW = 0.4  # mean cosine distance of two clusters that are one

_WORD = r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*"
# Words with spaces alone between them: only those can a gram of the regex detector match.
_PHRASE = re.compile(rf"(?<!\w){_WORD}(?:[ \t]+{_WORD})*(?!\w)")


@dataclass(frozen=True)
class Cluster:
    """Phrases that mean much the same. gram: the one in most documents; documents: how many hold any of them."""

    gram: str
    documents: int
    members: tuple[str, ...]


def mine(texts: Iterable[str], embed: Embed, *, least: int = 2) -> list[Cluster]:
    """Clusters of the n-grams of the texts, those in most documents first.

    texts: successful completions; equal ones count as one document. least: in how many documents an n-gram must be.
    At most the MOST_CANDIDATES most frequent n-grams are clustered. The same texts give the same list.
    Raises RetrainError where no n-gram is in so many documents.
    """
    holding: dict[str, set[int]] = {}
    for document, text in enumerate(sorted(set(texts))):
        for gram in ngrams(text):
            holding.setdefault(gram, set()).add(document)
    frequent = [gram for gram, documents in holding.items() if len(documents) >= least]
    if not frequent:
        raise RetrainError(f"no phrase of {WORDS[0]} to {WORDS[-1]} words is in {least} different completions or more")
    candidates = sorted(frequent, key=lambda gram: (-len(holding[gram]), gram))[:MOST_CANDIDATES]
    labels = _clusters(embed(candidates))
    clusters = []
    for label in range(max(labels) + 1):
        members = tuple(gram for gram, own in zip(candidates, labels, strict=True) if own == label)
        documents = len(set().union(*(holding[gram] for gram in members)))
        clusters.append(Cluster(members[0], documents, members))
    return sorted(clusters, key=lambda cluster: (-cluster.documents, cluster.gram))


def ngrams(text: str) -> Iterator[str]:
    """The phrases of 3 to 5 words in a text, in lower case; none across punctuation, a number or a line break."""
    for phrase in _PHRASE.findall(text.lower()):
        words = phrase.split()
        for n in WORDS:
            yield from (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def _clusters(embeddings: np.ndarray) -> Sequence[int]:
    """The cluster of each row, from 0: average linkage, until every two clusters are MERGED_BELOW apart."""
    if len(embeddings) == 1:
        return [0]
    # sentence-transformers brings it.
    from sklearn.cluster import AgglomerativeClustering

    linkage = AgglomerativeClustering(
        n_clusters=None,  # pyright: ignore[reportArgumentType] - its documentation wants None beside a threshold
        metric="cosine",
        linkage="average",
        distance_threshold=MERGED_BELOW,
    )
    return linkage.fit_predict(embeddings).tolist()
