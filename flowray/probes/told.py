"""How surely captions tell their pictures: sample by sample, so that a part of them that does not
belong is seen beside the rest that does.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import islice, takewhile
from statistics import NormalDist

import numpy as np

WORDS = 64  # most frequent ones that are looked at
ENOUGH = 16  # captions with a word, and without it
RIVALS = 32  # captions with other words that never stand beside it
COMPONENTS, FOLDS, RIDGE = 64, 4, 0.05
BEST = 8  # words that tell most
TELLING = 0.7  # area under the curve of a word that tells something
OPEN_ENDED = {"a", "an", "the", "of", "on", "in", "at", "with", "and", "to"}
LOW = 0.2  # ranks up to here are of pictures that are not what the word says


def words_of(caption: str) -> list[str]:
    """Its words in lower case; of scripts without spaces every character is one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+", caption.lower())


def _components(latents: np.ndarray, count: int) -> np.ndarray:
    """The first principal components of rows (N, D), each of variance 1."""
    centred = latents - latents.mean(0)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    kept = values[-count:] > 1e-9 * values[-1]
    return vectors[:, -count:][:, kept] * np.sqrt(len(latents))


def _scores(x: np.ndarray, has: np.ndarray) -> np.ndarray:
    """How much each picture looks like each word (N, words), by those of the other folds."""
    made, fold = np.zeros(has.shape), np.arange(len(x)) % FOLDS
    rows = np.c_[np.ones(len(x)), x]
    for part in range(FOLDS):
        fit, test = fold != part, fold == part
        gram = rows[fit].T @ rows[fit] + RIDGE * fit.sum() * np.eye(rows.shape[1])
        made[test] = rows[test] @ np.linalg.solve(gram, rows[fit].T @ has[fit])
    return made


def _ranks(scores: np.ndarray, own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of the others that each of the own lies above, ties counting half."""
    order = np.sort(scores[others])
    sides = [np.searchsorted(order, scores[own], side) for side in ("left", "right")]
    return sum(sides) / 2 / len(order)


def word_ranks(captions: Sequence[str], latents: np.ndarray) -> list[np.ndarray]:
    """For each word that tells something of the picture, best first, at most BEST: where its
    captions' pictures stand among those of captions that say something else in its place.

    latents (N, D). About 1 where captions are right, anywhere in [0, 1] where they are not.
    """
    said = [set(words_of(caption)) for caption in captions]
    counts = Counter(word for words in said for word in words)
    most = len(captions) - ENOUGH
    words = [word for word, n in counts.most_common(WORDS) if ENOUGH <= n <= most]
    if not words or len(captions) < 4 * ENOUGH:
        return []
    has = np.array([[word in one for word in words] for one in said], dtype=np.float64)
    x = _components(latents.reshape(len(latents), -1), min(COMPONENTS, len(captions) // 8))
    scores, share = _scores(x, has), has.mean(0)
    rival = has.T @ has / len(has) < 0.3 * np.outer(share, share)
    found = []
    for place in range(len(words)):
        own = has[:, place] > 0
        instead = (has[:, rival[place]] > 0).any(1) & ~own
        ranks = _ranks(scores[:, place], own, instead if instead.sum() >= RIVALS else ~own)
        if ranks.mean() > TELLING:
            found.append(ranks)
    return sorted(found, key=lambda ranks: -ranks.mean())[:BEST]


def _wrong(ranks: np.ndarray) -> float:
    """Share of ranks that are spread over [0, 1] beside those of a word that tells its pictures
    always in the same measure, a normal shift: what both say of the highest quarter and of the
    lowest ranks must agree.
    """
    normal, low = NormalDist(), float((ranks < LOW).mean())
    upper = min(float(np.quantile(ranks, 0.75)), 1 - 0.5 / len(ranks))
    share = 0.0
    for _ in range(20):
        above = (0.25 - share * (1 - upper)) / (1 - share)
        shift = normal.inv_cdf(upper) - normal.inv_cdf(1 - min(max(above, 0.01), 0.99))
        expected = normal.cdf(normal.inv_cdf(LOW) - shift)
        share = min(max((low - expected) / (LOW - expected), 0.0), 0.9) if expected < LOW else 0.0
    return share


def told_metrics(captions: Sequence[str], latents: np.ndarray) -> dict[str, float]:
    """data/word_auc, data/captions_wrong*: how well the best word tells pictures, and the share of
    captions whose picture is not what they say; low: with two standard errors taken off.

    Captions paired wrongly spoil all words alike, and a word of two meanings (the face of a clock)
    none but itself: so where words differ by more than chance, the error is that of their mean.
    """
    told = word_ranks(captions, latents)
    if not told:
        return {}
    sizes, wrong = [len(ranks) for ranks in told], [_wrong(ranks) for ranks in told]
    share, size = float(np.average(wrong, weights=sizes)), sum(sizes)
    p = min(max(share * LOW, 1 / size), 1.0)
    by_chance = float(np.sqrt(p * (1 - p) / size)) / LOW
    by_words = float(np.std(wrong)) / max(len(wrong) - 1, 1) ** 0.5
    return {
        "data/word_auc": float(np.mean(told[0])),
        "data/captions_wrong": share,
        "data/captions_wrong_low": share - 2 * max(by_chance, by_words),
    }


def _begins(word: str, vocabulary: Sequence[str]) -> bool:
    """Whether a word of a sorted vocabulary, not its plural, begins with this one."""
    after = islice(vocabulary, bisect_right(vocabulary, word), None)
    longer = takewhile(lambda other: other.startswith(word), after)
    return any(other[len(word) :] not in ("s", "es") for other in longer)


def caption_metrics(captions: Sequence[str]) -> dict[str, float]:
    """data/caption_*: what is odd about captions as texts, whatever their pictures show.

    same: share that the commonest has; over_next: times as many as the next. wordless: share
    without a word. full, broken: share that is as long as the longest, in characters or words, and
    of these that end within a word (it begins another that is not its plural, in captions of the
    greatest length in characters only), or on one that wants another.
    """
    counts = Counter(captions)
    (_, most), *rest = counts.most_common(2)
    split = [words_of(caption) for caption in captions]
    vocabulary = sorted({word for words in split for word in words})

    longest = max(map(len, captions))
    # those that stand where no cut after so many characters can be
    whole = {
        word
        for text, words in zip(captions, split, strict=True)
        for word in words[: -1 if len(text) == longest else None]
    }

    def broken(text: str, words: list[str]) -> bool:
        if not words:
            return False
        last = words[-1]
        begun = len(text) == longest and last not in whole and _begins(last, vocabulary)
        return begun or last in OPEN_ENDED

    found = {"data/caption_full": 0.0, "data/caption_broken": 0.0}
    for sizes, least in (
        (list(map(len, captions)), longest - 1),  # a space at the cut is often taken off
        (list(map(len, split)), max(map(len, split))),
    ):
        full = [n >= least for n in sizes]
        ends = [one for one, n in zip(zip(captions, split, strict=True), full, strict=True) if n]
        cut = sum(broken(*end) for end in ends) / len(captions)
        if cut >= found["data/caption_broken"]:
            found = {"data/caption_full": sum(full) / len(captions), "data/caption_broken": cut}
    return found | {
        "data/caption_same": most / len(captions),
        "data/caption_over_next": most / (rest[0][1] if rest else 1),
        "data/caption_wordless": sum(not words for words in split) / len(captions),
    }
