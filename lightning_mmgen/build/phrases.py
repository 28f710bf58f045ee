"""Noun phrases of a caption: the words that may get a picture (MUMU, section 4)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .words import MEASURES, PEOPLE

LEADING = re.compile(
    r"(?:(?:a|an|the|this|that|these|those|some|any|each|every|all|both|another|no|my|your|his|her|its|our|their|whose|\d+|one|two|three|four|"
    r"five|six|seven|eight|nine|ten|eleven|twelve|several|many|few|\S+?(?: ?['\u2019]s|s['\u2019]))\s+)+",
    re.IGNORECASE,
)
AFTER_HEAD = re.compile(
    r"[,;:]|\b(?:of|in|on|with|at|from|by|and|that|who|near|under|behind|wearing|holding|riding|sitting|standing|walking)\b"
)


class Phrase(NamedTuple):
    """A noun phrase without its determiner, and where it begins in the caption, in characters."""

    text: str
    start: int


def bare(text: str, start: int = 0) -> Phrase:
    """A phrase without leading determiners, possessors and number words: "his dog" is "dog", "the man's two big dogs" "big dogs"."""
    lead = LEADING.match(text)
    cut = lead.end() if lead else 0
    return Phrase(text[cut:], start + cut)


def is_person(phrase: str) -> bool:
    """Whether the head noun, the last word before a preposition, is a person or people."""
    words = re.findall(r"[\w-]+", AFTER_HEAD.split(phrase.lower())[0])
    return bool(words) and words[-1].split("-")[-1] in PEOPLE


class Parser:
    """spaCy's noun chunks.

    Args:
        pipeline: name or folder of a pipeline with parts of speech and a dependency parser.

    Raises:
        OSError: no such pipeline.
        ValueError: spaCy is not installed, or the pipeline does not parse.
    """

    def __init__(self, pipeline: str = "en_core_web_sm") -> None:
        try:
            import spacy
        except ImportError as error:
            raise ValueError("noun phrases need spaCy: pip install 'lightning_mmgen[build]'") from error
        try:
            self.nlp: Any = spacy.load(pipeline, exclude=["ner", "lemmatizer"])
        except OSError as error:
            raise OSError(f"{pipeline}: no such spaCy pipeline; `python -m spacy download {pipeline}` installs it") from error
        if "parser" not in self.nlp.pipe_names:
            raise ValueError(f"{pipeline}: has no dependency parser, so that it finds no noun phrases")

    def __call__(self, captions: Iterable[str]) -> Iterator[list[Phrase]]:
        """The noun phrases of each caption in reading order, without pronouns and measures ("a couple" of dogs)."""
        for text in self.nlp.pipe(captions):
            yield [bare(chunk.text, chunk.start_char) for chunk in text.noun_chunks if _shows(chunk)]


def _shows(chunk: Any) -> bool:
    after = chunk.doc[chunk.end].lower_ if chunk.end < len(chunk.doc) else ""
    return chunk.root.pos_ != "PRON" and not (after == "of" and chunk.root.lower_ in MEASURES)
