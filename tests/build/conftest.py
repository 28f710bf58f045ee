"""Tiny parts of the builders, made from configurations with random weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import spacy
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from spacy.tokens import Doc
from spacy.training import Example
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from lightning_mmgen.build.journal import Journal

from ..conftest import CLIP_WORDS, UNET, make_vae

DETECTOR_WORDS = ["man", "dog", "scooter", "ball", "red", "big", "head", "woman", "##s"]


@pytest.fixture(scope="session")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GroundingDINO for texts of 24 tokens, with 12 object queries; [CLS], [SEP] and the full stop have their usual numbers."""
    folder = tmp_path_factory.mktemp("grounding_dino")
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *DETECTOR_WORDS]
    words += [f"[filler{i}]" for i in range(1012 - len(words))] + ["."]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    text = {"model_type": "bert", "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    swin = {"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    swin |= {"window_size": 4, "initializer_range": 0.2, "out_features": ["stage1", "stage2"]}
    small = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32}
    small |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 12, "num_feature_levels": 2, "max_text_len": 24}
    config = GroundingDinoConfig(backbone_config=swin, text_config=text, **small)
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config)
    for weight in model.bbox_embed[0].parameters():  # the library begins with boxes of one size
        torch.nn.init.normal_(weight, std=0.2)
    torch.nn.init.constant_(model.bbox_embed[0].layers[-1].bias, 1.0)
    model.save_pretrained(folder)
    return folder


NOUNS, VERBS, ADJECTIVES = ("man", "woman", "dog", "scooter", "ball", "dogs"), ("sees", "rides", "holds"), ("red", "big")


PATTERNS = (
    "the/DET/2/det ADJ/ADJ/1/amod NOUN/NOUN/1/nsubj VERB/VERB/0/ROOT a/DET/2/det ADJ/ADJ/1/amod OTHER/NOUN/-3/dobj ./PUNCT/-4/punct",
    "a/DET/1/det NOUN/NOUN/4/nsubj and/CCONJ/-1/cc his/PRON/1/poss OTHER/NOUN/-3/conj VERB/VERB/0/ROOT it/PRON/-1/dobj",
    "a/DET/1/det NOUN/NOUN/1/nsubj VERB/VERB/0/ROOT two/NUM/2/nummod ADJ/ADJ/1/amod OTHER/NOUN/-3/dobj ./PUNCT/-4/punct",
    "it/PRON/1/nsubj VERB/VERB/0/ROOT a/DET/1/det NOUN/NOUN/-2/dobj and/CCONJ/-1/cc a/DET/1/det OTHER/NOUN/-3/conj ./PUNCT/-6/punct",
    "a/DET/1/det couple/NOUN/3/nsubj of/ADP/-1/prep NOUN/NOUN/-1/pobj VERB/VERB/0/ROOT the/DET/1/det OTHER/NOUN/-2/dobj ./PUNCT/-3/punct",
    "VERB/VERB/0/ROOT up/ADV/-1/advmod ./PUNCT/-2/punct",
)
"""Words with part of speech, way to the head, and dependency."""


def annotated_sentences() -> list[dict[str, list[Any]]]:
    """Toy English, each pattern with each pair of nouns."""
    rows = []
    for i, (pattern, noun, other) in enumerate(itertools.product(PATTERNS, NOUNS, NOUNS)):
        fill = {"NOUN": noun, "OTHER": other, "VERB": VERBS[i % 3], "ADJ": ADJECTIVES[i % 2]}
        words, tags, ways, deps = map(list, zip(*(token.split("/") for token in pattern.split(" ")), strict=True))
        rows.append(
            {
                "words": [fill.get(word, word) for word in words],
                "pos": tags,
                "heads": [k + int(way) for k, way in enumerate(ways)],
                "deps": deps,
            }
        )
    return rows


@pytest.fixture(scope="session")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a spaCy pipeline, parts of speech and parser, trained on toy English."""
    nlp = spacy.blank("en")
    tok2vec = {"@architectures": "spacy.HashEmbedCNN.v2", "width": 32, "depth": 2, "embed_size": 200, "window_size": 1}
    tok2vec |= {"maxout_pieces": 2, "subword_features": True, "pretrained_vectors": None}
    nlp.add_pipe("morphologizer", config={"model": {"@architectures": "spacy.Tagger.v2", "tok2vec": tok2vec}})
    parser = {"@architectures": "spacy.TransitionBasedParser.v2", "state_type": "parser", "extra_state_tokens": False}
    nlp.add_pipe("parser", config={"model": {**parser, "hidden_width": 32, "maxout_pieces": 2, "use_upper": True, "tok2vec": tok2vec}})
    rows = [{**row, "spaces": [True] * len(row["words"])} for row in annotated_sentences()]
    examples = [Example.from_dict(Doc(nlp.vocab, row["words"], row["spaces"]), row) for row in rows]
    spacy.util.fix_random_seed(0)
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(14):
        for batch in spacy.util.minibatch(examples, 24):
            nlp.update(batch, sgd=optimizer)
    folder = tmp_path_factory.mktemp("english")
    nlp.to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def painter(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Stable Diffusion that draws 16 x 16 px and reads 12 tokens."""
    folder = tmp_path_factory.mktemp("painter")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = CLIPTextModel(CLIPTextConfig(**size, **ends, vocab_size=len(CLIP_WORDS), max_position_embeddings=12))
    tokenizer = AutoTokenizer.from_pretrained(clip, model_max_length=12)
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    unet = UNet2DConditionModel(**UNET, down_block_types=down, up_block_types=up)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(make_vae(), text, tokenizer, unet, scheduler, **parts).save_pretrained(folder)
    return folder


def make_classifier(folder: Path, *labels: str) -> Path:
    """A tiny ViT that tells these labels apart, with random weights."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=4, **names)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def interrupt(monkeypatch: pytest.MonkeyPatch, items: int) -> None:
    """The process is interrupted once so many items are noted."""
    add = Journal.add

    def adding(journal: Journal, *args: Any) -> None:
        if len(journal.done) == items:
            raise KeyboardInterrupt
        add(journal, *args)

    monkeypatch.setattr(Journal, "add", adding)


def contents(out: Path, pictures: str) -> tuple[list[str], dict[str, bytes]]:
    """What a build has written: its records, sorted, and its pictures."""
    rows = sorted((out / "records.jsonl").read_text().splitlines())
    return rows, {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob(pictures)}
