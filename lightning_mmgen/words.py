"""Words of a tokenised text: where their tokens stand, and which of them a set of names has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from .build.words import IRREGULAR

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
SINGULAR = {plural: word for word, plural in IRREGULAR.items()}
LITTLE = """a an the this that these those of at on in to into by for from with without and or but not no as is are was were be been it its
he she they his her their there which what who where how do does did has have had will can some any each"""
FUNCTION_WORDS = frozenset(LITTLE.split())
"""Words that show nothing: where a diffusion model looks for them says nothing either."""


class Word(NamedTuple):
    """A word in lower case, and the places of its tokens, one or several."""

    text: str
    tokens: tuple[int, ...]
    root: str


class Reading(NamedTuple):
    """What spaCy says of a word: its lemma and its part of speech."""

    lemma: str
    pos: str


def stem(word: str) -> str:
    """A word in lower case without the endings of a plural or of a verb, and without its last e; of an irregular plural, the singular's.

    Made for comparing: "riding", "rides" and "ride" have one stem.
    """
    word = SINGULAR.get(word, re.sub(r"['\u2019]s?$", "", word))
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("((?:[xz]|ch|sh))es", r"\1"), ("(?<![su])s", ""), ("ing", ""), ("ed", "")):
        cut = re.sub(rf"(?:{ending})$", instead, word)
        if cut != word and len(cut) > 2 and re.search("[aeiouy]", cut):
            word = re.sub(r"([bdgkmnprtvz])\1$", r"\1", cut) if ending in ("ing", "ed") else cut
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


class WordMatcher:
    """Which words of a text are among given names, after sub-word tokens are merged and letters are lower case.

    Args:
        match: ``exact``, or ``root``: the lemmas are equal.
        pos: parts of speech that count (``NOUN``, ``ADJ``, ...); all if none are given, and then function words match no name.
        pipeline: a spaCy pipeline, by name or folder, for lemmas and parts of speech. Without one a rule cuts endings.

    Raises:
        OSError: no such pipeline.
        ValueError: parts of speech without a pipeline, or spaCy is not installed.
    """

    def __init__(self, match: Literal["exact", "root"] = "root", pos: tuple[str, ...] | None = None, pipeline: str | None = None) -> None:
        if match not in ("exact", "root"):
            raise ValueError(f"words: match is exact or root, not {match!r}")
        if pos is not None and pipeline is None:
            raise ValueError("words: parts of speech need a spaCy pipeline (words.pipeline)")
        self.match, self.pos, self.pipeline = match, pos, pipeline
        self.nlp = None if pipeline is None else _load(pipeline)
        self.read = lru_cache(4096)(self._read)

    def words(self, ids: Sequence[int], tokenizer: Any) -> list[Word]:
        """The words of a text as a model reads it, from left to right; special tokens part them and are none."""
        text, ends = _text(ids, tokenizer)
        readings, out, at = self.read(text), [], 0
        for found in WORD.finditer(text):
            while ends[at] <= found.start():
                at += 1
            last = at
            while ends[last] < found.end():
                last += 1
            while last + 1 < len(ends) and ends[last + 1] == ends[last]:  # bytes of its last letter
                last += 1
            reading = readings.get(found.start())
            if self.pos is None or (reading is not None and reading.pos in self.pos):
                word = found[0].lower()
                out.append(Word(word, tuple(range(at, last + 1)), self._root(word, reading)))
        return out

    def root(self, name: str) -> str:
        """What a name is compared by."""
        name = name.lower()
        return self._root(name, self.read(name).get(0))

    def matched(self, words: Iterable[Word], names: Iterable[str]) -> dict[str, list[Word]]:
        """The words of each name that has some, in the order of the names; without parts of speech to go by, no function words."""
        by_root: dict[str, list[Word]] = {}
        for word in (w for w in words if self.pos is not None or w.text not in FUNCTION_WORDS):
            by_root.setdefault(word.root, []).append(word)
        found = ((name, by_root.get(self.root(name), [])) for name in names)
        return {name: of for name, of in found if of}

    def phrases(self, words: Sequence[Word], phrase: str) -> list[tuple[int, ...]]:
        """The tokens of each occurrence of a phrase of one or several words."""
        asked = [self.root(part) for part in WORD.findall(phrase)]
        at = [i for i in range(len(words) - len(asked) + 1) if asked and [w.root for w in words[i : i + len(asked)]] == asked]
        return [tuple(token for word in words[i : i + len(asked)] for token in word.tokens) for i in at]

    def _root(self, word: str, reading: Reading | None) -> str:
        if self.match == "exact":
            return word
        return stem(word) if reading is None else reading.lemma

    def _read(self, text: str) -> dict[int, Reading]:
        """What spaCy says of the words of a text, by where they begin; nothing without a pipeline."""
        return {} if self.nlp is None else {t.idx: Reading(t.lemma_.lower() or t.lower_, t.pos_) for t in self.nlp(text)}


def _load(pipeline: str) -> Any:
    try:
        import spacy
    except ImportError as error:
        raise ValueError("words.pipeline needs spaCy: pip install 'lightning_mmgen[build]'") from error
    try:
        return spacy.load(pipeline, exclude=["ner", "parser"])
    except OSError as error:
        raise OSError(f"{pipeline}: no such spaCy pipeline; `python -m spacy download {pipeline}` installs it") from error


def _text(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[int]]:
    """A text and where each of its tokens ends in it; runs of special tokens become one space."""
    special, text = set(tokenizer.all_special_ids), ""
    ends: list[int] = []
    run: list[int] = []
    for i, token in enumerate([*ids, None]):
        if token is not None and token not in special:
            run.append(token)
            continue
        for end in _ends(tuple(run), tokenizer):
            ends.append(len(text) + end)
        if run:
            text += tokenizer.decode(run) + " "
        if i < len(ids):
            ends.append(len(text))
        run = []
    return text, ends


def _ends(ids: tuple[int, ...], tokenizer: Any) -> list[int]:
    """Where each token ends in the text of all. A token's own text depends on the one before it alone, but for split letters."""
    if not ids:
        return []
    alone = tokenizer.batch_decode([[token] for token in ids])
    pairs = tokenizer.batch_decode([list(pair) for pair in zip(ids, ids[1:], strict=False)])
    pieces = [alone[0], *(pair[len(first) :] for pair, first in zip(pairs, alone, strict=False))]
    if "".join(pieces) != tokenizer.decode(list(ids)):
        return [len(tokenizer.decode(list(ids[: k + 1]))) for k in range(len(ids))]
    ends = [len(pieces[0])]
    for piece in pieces[1:]:
        ends.append(ends[-1] + len(piece))
    return ends
