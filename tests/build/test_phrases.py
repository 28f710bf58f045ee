from __future__ import annotations

from pathlib import Path

import pytest
import spacy

from lightning_mmgen.build.phrases import Parser, bare, is_person
from lightning_mmgen.build.words import plural


def test_nouns_come_without_determiners_and_with_their_places(english: Path) -> None:
    captions = ["the big man sees a red dog .", "a woman and his scooter holds it", "it rides two big dogs .", "holds up .", ""]
    found = list(Parser(str(english))(captions))
    assert [[p.text for p in phrases] for phrases in found] == [["big man", "red dog"], ["woman", "scooter"], ["big dogs"], [], []]
    for caption, phrases in zip(captions, found, strict=True):
        assert all(caption[p.start :].startswith(p.text) for p in phrases)


def test_a_phrase_that_occurs_twice_has_two_places(english: Path) -> None:
    (phrases,) = Parser(str(english))(["it sees a dog and a dog ."])
    assert phrases == [("dog", 10), ("dog", 20)]


def test_a_measure_is_no_phrase(english: Path) -> None:
    (phrases,) = Parser(str(english))(["a couple of dogs sees the ball ."])
    assert [p.text for p in phrases] == ["dogs", "ball"]


@pytest.mark.parametrize(
    ("text", "rest", "start"),
    [
        ("his dog", "dog", 4),
        ("A big brown bear", "big brown bear", 2),
        ("the man's two big dogs", "big dogs", 14),
        ("a man 's arm", "arm", 9),
        ("the boys' 3 kites", "kites", 12),
        ("another", "another", 0),
        ("anthill", "anthill", 0),
    ],
)
def test_leading_words_are_cut_and_the_place_moves_on(text: str, rest: str, start: int) -> None:
    assert bare(text, 100) == (rest, 100 + start)


@pytest.mark.parametrize("phrase", ["man", "young Women", "baseball player", "smiling boy in a red shirt", "people", "ex-policeman"])
def test_a_person_is_known_by_the_head_noun(phrase: str) -> None:
    assert is_person(phrase)


@pytest.mark.parametrize("phrase", ["dog", "man cave", "dog of a man", "", "personal item"])
def test_other_things_are_no_persons(phrase: str) -> None:
    assert not is_person(phrase)


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("dog", "dogs"),
        ("bus", "buses"),
        ("woman", "women"),
        ("baby", "babies"),
        ("boy", "boys"),
        ("wine glass", "wine glasses"),
        ("skis", "skis"),
    ],
)
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many


def test_a_missing_pipeline_and_one_without_a_parser_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="python -m spacy download xx_nowhere") as error:
        Parser("xx_nowhere")
    assert "\n" not in str(error.value)
    spacy.blank("en").to_disk(tmp_path)
    with pytest.raises(ValueError, match="no dependency parser"):
        Parser(str(tmp_path))
