"""Levels of dispreference by similarity to the preferred answer (HSCR §3.2)."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from hscr.config import RerankConfig
from hscr.contrast.embedder import Embedder

_TOLERANCE = 1e-9
Similarity = Callable[[str, str], float]


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation: two texts with equal words say the same."""
    return re.findall(r"\w+", text.lower())


def token_f1(first: str, second: str) -> float:
    """Harmonic mean of word precision and recall, counted with repetition, in [0, 1]."""
    a, b = Counter(words(first)), Counter(words(second))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def corley_mihalcea(texts: Sequence[str]) -> Similarity:
    """IDF-weighted share of each text's words found in the other, averaged over both directions, in [0, 1].

    Corley & Mihalcea (2005) with exact word identity as word-to-word similarity: no lexical resource is
    needed or assumed. IDF, smoothed, is taken over `texts`.
    """
    documents = [set(words(text)) for text in texts]
    frequency = Counter(word for document in documents for word in document)

    def idf(word: str) -> float:
        return math.log((1 + len(documents)) / (1 + frequency[word])) + 1

    def covered(first: list[str], second: list[str]) -> float:
        weights = [idf(word) for word in first]
        known = set(second)
        found = (weight for word, weight in zip(first, weights, strict=True) if word in known)
        return math.fsum(found) / math.fsum(weights) if weights else float(not second)

    def similarity(first: str, second: str) -> float:
        a, b = words(first), words(second)
        return (covered(a, b) + covered(b, a)) / 2

    return similarity


def embedded(chosen: str, candidates: Sequence[str], embedder: Embedder) -> list[float]:
    """Cosine of each candidate's embedding with that of `chosen`, rescaled from [-1, 1] to [0, 1].

    Rounded to four decimals: the last bits of a forward pass must not decide a gap.
    """
    vectors = embedder.embed([chosen, *candidates])
    return [round(float(1 + cosine) / 2, 4) for cosine in vectors[1:] @ vectors[0]]


def similarities(
    chosen: str, candidates: Sequence[str], config: RerankConfig, embedder: Embedder | None = None
) -> list[float]:
    """Similarity of each candidate to `chosen`, in [0, 1]; `sentence_embedding` needs the embedder.

    IDF is taken over this record's own texts, so that a record's levels depend on nothing but the record:
    the words that differ between its texts weigh most. The paper cites Corley & Mihalcea (2005) and names no
    other measure, so theirs is the default; it needs no further model.
    """
    if config.similarity == "sentence_embedding":
        assert embedder is not None, "whoever reads the configuration loads its embedder"
        measured = embedded(chosen, candidates, embedder)
    else:
        measure = token_f1 if config.similarity == "token_f1" else corley_mihalcea([chosen, *candidates])
        measured = [measure(chosen, candidate) for candidate in candidates]
    return [min(1.0, max(0.0, value)) for value in measured]


def levels(scores: Sequence[float], config: RerankConfig) -> list[int]:
    """Indices of at most `levels` candidates by descending similarity, at least `gap` apart.

    `adjacent` measures from the last one kept, `from_preferred` from the preferred answer itself. Ties go
    to the lower index.
    """
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    if config.gap_mode == "from_preferred":
        return [index for index in ranked if 1 - scores[index] >= config.gap - _TOLERANCE][: config.levels]
    kept: list[int] = []
    for index in ranked:
        if not kept or scores[kept[-1]] - scores[index] >= config.gap - _TOLERANCE:
            kept.append(index)
    return kept[: config.levels]
