"""Words of tokenised texts, and names among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spacy
from transformers import AutoTokenizer

from lightning_mmgen.models.weights import locate
from lightning_mmgen.words import WordMatcher, stem


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The toybox's: byte-level, with most words in several tokens."""
    return AutoTokenizer.from_pretrained(locate("toybox/vlm"))


def test_words_are_merged_from_their_tokens_whatever_lies_between(tokenizer: Any) -> None:
    image = tokenizer.convert_tokens_to_ids("<image>")
    parts = [tokenizer(text, add_special_tokens=False).input_ids for text in ("A big cafetière, the dog's", " left-hand\nCircles?")]
    ids = [tokenizer.bos_token_id, *parts[0], image, image, *parts[1], tokenizer.eos_token_id]
    words = WordMatcher("exact").words(ids, tokenizer)
    assert [w.text for w in words] == ["a", "big", "cafetière", "the", "dog's", "left-hand", "circles"]
    for word in words:
        assert tokenizer.decode([ids[k] for k in word.tokens]).strip().lower() == word.text
    assert len(words[2].tokens) > 2 and not {0, len(parts[0]) + 1, len(parts[0]) + 2} & {k for w in words for k in w.tokens}
    assert WordMatcher().words([], tokenizer) == []


def test_names_match_exactly_or_by_their_root(tokenizer: Any) -> None:
    ids = tokenizer("Two dogs are running by a dog, boxes", add_special_tokens=False).input_ids
    exact, root = WordMatcher("exact"), WordMatcher("root")
    names = ["Dog", "run", "box", "two", "cat"]
    assert {n: len(found) for n, found in exact.matched(exact.words(ids, tokenizer), names).items()} == {"Dog": 1, "two": 1}
    assert {n: len(found) for n, found in root.matched(root.words(ids, tokenizer), names).items()} == {
        "Dog": 2,
        "run": 1,
        "box": 1,
        "two": 1,
    }


def test_function_words_match_no_name_unless_parts_of_speech_are_asked_for(tokenizer: Any) -> None:
    ids = tokenizer("at the bottom of a tree", add_special_tokens=False).input_ids
    matcher = WordMatcher()
    assert list(matcher.matched(matcher.words(ids, tokenizer), ["at", "the", "bottom", "of", "a", "tree"])) == ["bottom", "tree"]


def test_a_phrase_is_found_wherever_its_words_follow_each_other(tokenizer: Any) -> None:
    ids = tokenizer("a red circle left of a small red circle", add_special_tokens=False).input_ids
    matcher = WordMatcher("exact")
    words = matcher.words(ids, tokenizer)
    found = matcher.phrases(words, "Red circle")
    assert [tokenizer.decode([ids[k] for k in tokens]) for tokens in found] == [" red circle"] * 2 and found[0] != found[1]
    assert matcher.phrases(words, "circle red") == matcher.phrases(words, "") == []


def test_forms_of_a_word_have_one_stem() -> None:
    for forms in ("ride rides riding", "dog dogs dog's", "box boxes", "glass glasses", "bus buses", "child children", "stop stops stopped"):
        assert len({stem(word) for word in forms.split()}) == 1


def test_short_words_and_other_words_keep_their_own_stem() -> None:
    assert [stem(word) for word in ("red", "ring", "bed", "is", "glass", "bus")] == ["red", "ring", "bed", "is", "glass", "bus"]
    assert len({stem(word) for word in ("circle", "square", "star", "ring", "heart", "string")}) == 6


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of speech and lemmas by a short list."""
    nlp = spacy.blank("en")
    ruler: Any = nlp.add_pipe("attribute_ruler")
    for word, pos, lemma in (("mice", "NOUN", "mouse"), ("mouse", "NOUN", "mouse"), ("ate", "VERB", "eat"), ("red", "ADJ", "red")):
        ruler.add([[{"LOWER": word}]], {"POS": pos, "LEMMA": lemma})
    folder = tmp_path_factory.mktemp("spacy") / "short"
    nlp.to_disk(folder)
    return folder


def test_a_pipeline_tells_lemmas_and_parts_of_speech(tokenizer: Any, pipeline: Path) -> None:
    ids = tokenizer("Red mice ate", add_special_tokens=False).input_ids
    nouns = WordMatcher("root", ("NOUN",), str(pipeline))
    assert [w.text for w in nouns.words(ids, tokenizer)] == ["mice"]
    everything = WordMatcher("root", None, str(pipeline))
    assert list(everything.matched(everything.words(ids, tokenizer), ["mouse", "eat", "ate", "rat"])) == ["mouse", "eat", "ate"]


def test_what_a_matcher_cannot_do_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts of speech need a spaCy pipeline"):
        WordMatcher(pos=("NOUN",))
    with pytest.raises(ValueError, match="match is exact or root, not 'stem'"):
        WordMatcher("stem")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no such spaCy pipeline"):
        WordMatcher(pipeline=str(tmp_path / "none"))
