"""``mmgen build photos``: large, clean pictures of at most one person, cropped around the person and captioned (MUMU, section 4)."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..data.images import open_picture, square_around
from ..models.weights import locate
from ..prompt import MARKER, Record, RecordError
from .captions import ENDINGS, read_captions
from .classifier import Classifier
from .detector import Detector
from .journal import Journal, Shard, digest_of, in_batches


@dataclass(frozen=True)
class Photos:
    """What the records depend on. The paper names the rules and not their limits.

    Attributes:
        images: folder of pictures, searched with all folders in it.
        min_side: least width and height, in pixels.
        max_people: most people; MUMU has 0 or 1.
        person: what the detector is asked for.
        detector: hub name or folder of a GroundingDINO.
        box_threshold, text_threshold: of the detector.
        watermark, unsafe: hub name or folder of an image classifier; "" does not filter.
        watermark_label, unsafe_label: the class whose probability counts.
        max_watermark, max_unsafe: a picture with a higher one is dropped.
        captions: JSONL rows {image, caption}, COCO JSON or a folder of texts (a picture's first counts); "" lets the captioner write.
        captioner: hub name or folder of a vision-language model with a chat template.
        caption_prompt: what it is asked.
        caption_tokens: its longest answer.
        caption_dtype: of its weights.
        format: ``jpeg`` (quality 95) or ``png``.
        batch_size: pictures that the models see together; rounding depends on it, so that it is the same in every shard.
    """

    images: str
    min_side: int = 1024
    max_people: int = 1
    person: str = "person"
    detector: str = "IDEA-Research/grounding-dino-base"
    box_threshold: float = 0.35
    text_threshold: float = 0.25
    watermark: str = ""
    watermark_label: str = "watermark"
    max_watermark: float = 0.5
    unsafe: str = ""
    unsafe_label: str = "nsfw"
    max_unsafe: float = 0.5
    captions: str = ""
    captioner: str = "llava-hf/llava-v1.6-mistral-7b-hf"
    caption_prompt: str = "Describe this picture in one sentence."
    caption_tokens: int = 128
    caption_dtype: str = "float16"
    format: str = "jpeg"
    batch_size: int = 8


@dataclass
class Photo:
    """A picture on its way through the rules.

    Attributes:
        number: its place in the sorted folder.
        name: its path there.
        image: it, and from the people's rule on its crop; None where it cannot be read.
        caption: "" where there is none yet.
        rule: "kept", or the rule that dropped it.
        scores: probabilities that the classifiers gave.
    """

    number: int
    name: str
    image: Image | None = None
    caption: str = ""
    rule: str = "kept"
    scores: dict[str, float] = field(default_factory=dict)


class Folder(Dataset[list[Photo]]):
    """Batches of pictures, read and checked for their size.

    Args:
        root: the folder.
        batches: which to read.
        min_side: least width and height, in pixels.
        captions: by name; None where they are yet to be written.
    """

    def __init__(self, root: Path, batches: Sequence[Sequence[Photo]], min_side: int, captions: Mapping[str, str] | None) -> None:
        self.root, self.batches, self.min_side, self.captions = root, batches, min_side, captions

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[Photo]:
        return [self._read(photo) for photo in self.batches[index]]

    def _read(self, photo: Photo) -> Photo:
        caption = "" if self.captions is None else self.captions.get(photo.name, "")
        if self.captions is not None and not caption:
            return replace(photo, rule="no caption")
        try:
            image = open_picture((self.root / photo.name).read_bytes())
        except (RecordError, OSError) as error:
            tqdm.write(f"{_printable(photo.name)}: {error}", sys.stderr)
            return replace(photo, rule="unreadable")
        if min(image.size) < self.min_side:
            return replace(photo, rule="under --min-side")
        return replace(photo, image=image, caption=caption)


class Judge:
    """An image classifier that drops pictures whose probability of one class is over a limit.

    Args:
        name: what the class means: ``watermark`` or ``unsafe``.
        pretrained: hub name or folder.
        label: the class.
        limit: from 0 to 1.
        device: where it runs.

    Raises:
        ValueError: it has no such class.
    """

    def __init__(self, name: str, pretrained: str, label: str, limit: float, device: str) -> None:
        self.name, self.limit = name, limit
        self.classifier = Classifier(pretrained, label, device)

    def __call__(self, photos: Sequence[Photo]) -> None:
        for photo, score in zip(photos, self.classifier([photo.image for photo in photos if photo.image]), strict=True):
            photo.scores[self.name] = score
            if score > self.limit:
                photo.rule = f"over --max-{self.name}"


class People:
    """Drops pictures of too many people and crops the others to the largest square around them.

    Args:
        detector: finds them.
        person: what it is asked for.
        most: people a picture may have.
    """

    def __init__(self, detector: Detector, person: str, most: int) -> None:
        self.detector, self.person, self.most = detector, person, most

    def __call__(self, photos: Sequence[Photo]) -> None:
        images = [photo.image for photo in photos if photo.image]
        for photo, image, people in zip(photos, images, self.detector.detect(images, [[self.person]] * len(images)), strict=True):
            if len(people) > self.most:
                photo.rule = "over --max-people"
            photo.image = image.crop(square_around(image.size, [(p.left, p.top, p.right, p.bottom) for p in people]))


class Captioner:
    """A vision-language model that is asked one thing about every picture; it answers greedily.

    Args:
        pretrained: hub name or folder.
        prompt: the question.
        tokens: the longest answer.
        dtype: of its weights.
        device: where it runs.

    Raises:
        ValueError: it has no chat template.
    """

    def __init__(self, pretrained: str, prompt: str, tokens: int, dtype: str, device: str) -> None:
        folder, self.tokens, self.device = locate(pretrained), tokens, device
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"{pretrained}: its processor has no chat template")
        self.processor.tokenizer.padding_side = "left"
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        self.text = self.processor.apply_chat_template([turn], add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token
        self.special = not (bos and self.text.startswith(bos))  # else it would come twice

    def __call__(self, photos: Sequence[Photo]) -> None:
        for photo, answer in zip(photos, self.answers([photo.image for photo in photos if photo.image]), strict=True):
            photo.caption = clean(answer)
            if not photo.caption:
                photo.rule = "no caption"

    @torch.inference_mode()
    def answers(self, images: Sequence[Image]) -> list[str]:
        """What the model says of each image."""
        text, nested = [self.text] * len(images), [[image] for image in images]
        inputs = self.processor(images=nested, text=text, padding=True, add_special_tokens=self.special, return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)  # whole numbers keep their type
        answers = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return list(self.processor.batch_decode(answers, skip_special_tokens=True))


def clean(caption: str) -> str:
    """A caption as one line, without ``[ref#k]`` markers."""
    return " ".join(MARKER.sub(" ", caption).split())


def build_photos(settings: Photos, out: str, device: str = "cpu", workers: int = 0, shard: Shard = Shard()) -> str:
    """Go over all pictures of a folder; keep what passes every rule, as a square with a caption.

    Returns:
        A report: the path of the records, counts by rule, quantiles of the classifiers' probabilities, and which filters were off.

    Raises:
        FileNotFoundError: no such folder, file or model.
        ValueError: no pictures, or ``out`` lies among them or holds a build with other settings.
    """
    root = Path(settings.images)
    names, captions = picture_names(root, Path(out)), _captions(settings)
    digests = {
        "images": digest_of(names),
        "captions": digest_of([f"{k}\n{v}" for k, v in captions.items()]) if captions is not None else "",
    }
    journal = Journal(out, {**asdict(settings), **digests}, shard)
    photos = [Photo(number, name) for number, name in enumerate(names)]
    if todo := journal.todo(in_batches(photos, settings.batch_size), key=_key):
        steps = _steps(settings, device)
        loader = DataLoader(Folder(root, todo, settings.min_side, captions), batch_size=None, num_workers=workers, collate_fn=list)
        for batch in tqdm(loader, desc="photos", unit="batch", disable=None):
            for step in steps:
                if left := [photo for photo in batch if photo.rule == "kept"]:
                    step(left)
            _note(batch, settings, journal)
    off = [f"not filtered by --{name}: no classifier given" for name in ("watermark", "unsafe") if not getattr(settings, name)]
    return "\n".join([journal.conclude(), *off])


def _key(batch: Sequence[Photo]) -> str:
    return str(batch[0].number)


def _note(batch: Sequence[Photo], settings: Photos, journal: Journal) -> None:
    """A batch that went through all rules: its records, counts by rule, and probabilities."""
    records = [record for photo in batch for record in _records(photo, settings, journal.out)]
    notes: defaultdict[str, list[float]] = defaultdict(list)
    for photo in batch:
        for name, score in photo.scores.items():
            notes[name].append(score)
    journal.add(_key(batch), records, Counter(pictures=len(batch)) + Counter(photo.rule for photo in batch), notes)


def _captions(settings: Photos) -> dict[str, str] | None:
    """The first caption of each picture that has one, where captions are given."""
    if not settings.captions:
        return None
    scenes = read_captions(settings.captions, settings.images)
    return {Path(scene.image).as_posix(): clean(scene.captions[0].text) for scene in scenes}


def picture_names(root: Path, out: Path) -> list[str]:
    """The pictures of a folder and all folders in it, by their endings, sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds none, or ``out`` lies in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"--out {out}: lies in {root}, where it would be taken for more pictures")
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix.lower() in ENDINGS)
    if not names:
        raise ValueError(f"{root}: holds no pictures ({', '.join(ENDINGS)})")
    return names


def _steps(s: Photos, device: str) -> list[Callable[[Sequence[Photo]], None]]:
    """The rules that need a model, in the order in which they are asked."""
    steps: list[Callable[[Sequence[Photo]], None]] = []
    if s.watermark:
        steps.append(Judge("watermark", s.watermark, s.watermark_label, s.max_watermark, device))
    if s.unsafe:
        steps.append(Judge("unsafe", s.unsafe, s.unsafe_label, s.max_unsafe, device))
    steps.append(People(Detector(s.detector, s.box_threshold, s.text_threshold, device), s.person, s.max_people))
    if not s.captions:
        steps.append(Captioner(s.captioner, s.caption_prompt, s.caption_tokens, s.caption_dtype, device))
    return steps


def _records(photo: Photo, settings: Photos, out: Path) -> list[Record]:
    """The record of a picture that is kept; its crop is written."""
    if photo.rule != "kept" or photo.image is None:
        return []
    path = out / "pictures" / f"{photo.number // 1000:05d}" / f"{photo.number:08d}.{'jpg' if settings.format == 'jpeg' else 'png'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.image.save(path, quality=95)  # a PNG has none
    target = path.relative_to(out).as_posix()
    return [Record(photo.caption, target=target, caption=photo.caption, task="photos", id=_printable(photo.name))]


def _printable(name: str) -> str:
    """A file's name without bytes that are not UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")
