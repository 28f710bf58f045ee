"""``mmgen build synthetic``: pictures that a text-to-image model draws of contents in styles, the better ones kept (MUMU, section 4)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.images import pixels
from ..metrics import PickScore
from ..models.weights import locate
from ..prompt import Record
from .captions import read_lines
from .journal import Journal, Shard, digest_of, in_batches


@dataclass(frozen=True)
class Synthetic:
    """What the pictures depend on.

    Attributes:
        contents, styles: text files, one a line ("a man and a dog hiking"; "Cubist influences, bold color blocks").
        model: hub name or folder of any text-to-image pipeline of diffusers.
        styles_per_content: how many different styles each content is drawn in; all by default.
        steps, guidance, height, width: of the pipeline; its own by default.
        dtype: of its weights.
        pickscore: hub name or folder of a PickScore; "" scores nothing.
        min_pickscore: pictures below it are dropped. The paper does not state its threshold; by default nothing is dropped.
        seed: of the draw of styles and of the noise.
        batch_size: pictures that are drawn together; rounding depends on it, so that it is the same in every shard.
    """

    contents: str
    styles: str
    model: str
    styles_per_content: int | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "float16"
    pickscore: str = PickScore.HUB
    min_pickscore: float | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("styles_per_content", "steps", "height", "width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
        if self.min_pickscore is not None and not self.pickscore:
            raise ValueError("--min-pickscore needs a --pickscore")


class Pair(NamedTuple):
    """A content in a style: the numbers of their lines among the different ones, and their words."""

    place: tuple[int, int]
    content: str
    style: str

    @property
    def name(self) -> str:
        """``content/style`` by number."""
        return f"{self.place[0]:07d}/{self.place[1]:06d}"

    @property
    def caption(self) -> str:
        """What is drawn."""
        return f"{self.content}, {self.style}"

    def seed(self, seed: int) -> int:
        """63 bits for the picture's noise, from the words alone: the same in every shard and after every restart."""
        words = json.dumps([seed, self.content, self.style])
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def cross(contents: Sequence[str], styles: Sequence[str], per_content: int | None, seed: int) -> list[Pair]:
    """Each content with ``per_content`` different styles, so drawn that the styles occur equally often (to within one).

    Raises:
        ValueError: there are fewer styles.
    """
    count = len(styles) if per_content is None else per_content
    if count > len(styles):
        raise ValueError(f"--styles-per-content {count}: there are {len(styles)} styles")
    rng, used, pairs = np.random.default_rng(seed), np.zeros(len(styles), np.int64), []
    for i, content in enumerate(contents):
        chosen = np.sort(np.argsort(used + rng.random(len(styles)))[:count])  # the least used, ties by lot
        used[chosen] += 1
        pairs += [Pair((i, int(k)), content, styles[k]) for k in chosen]
    return pairs


class Painter:
    """A text-to-image pipeline, and the score of what it draws.

    Args:
        settings: its names and numbers.
        device: where it runs.
    """

    def __init__(self, settings: Synthetic, device: str) -> None:
        self.settings = settings
        self.pipe: Any = DiffusionPipeline.from_pretrained(locate(settings.model), torch_dtype=getattr(torch, settings.dtype)).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.pickscore = PickScore(settings.pickscore).to(device) if settings.pickscore else None
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "height": "height", "width": "width"}
        self.options = {theirs: value for theirs, ours in names.items() if (value := getattr(settings, ours)) is not None}

    def draw(self, pairs: Sequence[Pair]) -> list[Image]:
        """A picture of each pair; its noise is drawn on the CPU, so that it is the same on every device."""
        noise = [torch.Generator().manual_seed(pair.seed(self.settings.seed)) for pair in pairs]
        return list(self.pipe([pair.caption for pair in pairs], generator=noise, output_type="pil", **self.options).images)

    def cuts(self, pair: Pair) -> bool:
        """Whether the caption is longer than every text encoder of the pipeline reads."""
        texts = [part for part in self.pipe.components.values() if isinstance(part, PreTrainedTokenizerBase)]
        return bool(texts) and all(len(part(pair.caption).input_ids) > part.model_max_length for part in texts)

    def scores(self, pairs: Sequence[Pair], pictures: Sequence[Image]) -> list[float | None]:
        """The PickScore of each pair's picture, where there is a scorer."""
        if self.pickscore is None:
            return [None] * len(pairs)
        stacked = torch.stack([pixels(picture) for picture in pictures]).to(self.pickscore.device)
        return [float(score) for score in self.pickscore.score(stacked, [pair.caption for pair in pairs])]


def build_synthetic(settings: Synthetic, out: str, device: str = "cpu", shard: Shard = Shard()) -> str:
    """Draw every content in its styles; keep what is not blank and reaches the least score.

    Returns:
        A report: the path of the records, counts, and quantiles of the scores.

    Raises:
        FileNotFoundError: no such file or model.
        ValueError: files that cannot be crossed, or ``out`` holds a build with other settings.
    """
    contents, styles = read_lines(settings.contents), read_lines(settings.styles)
    pairs = cross(contents, styles, settings.styles_per_content, settings.seed)
    digests = {"contents": digest_of(contents), "styles": digest_of(styles)}
    journal = Journal(out, {**asdict(settings), **digests}, shard)
    if todo := journal.todo(in_batches(pairs, settings.batch_size), key=_key):
        painter = Painter(settings, device)
        for batch in tqdm(todo, desc="synthetic", unit="batch", disable=None):
            _draw(painter, batch, journal)
    return journal.conclude()


def _key(batch: Sequence[Pair]) -> str:
    return batch[0].name


def _draw(painter: Painter, batch: Sequence[Pair], journal: Journal) -> None:
    """Draw a batch and note it: the records of what is kept, counts by rule, and the scores of what is not blank."""
    pictures = painter.draw(batch)
    counts, scores, records = Counter(drawn=len(batch)), [], []
    for pair, picture, score in zip(batch, pictures, painter.scores(batch, pictures), strict=True):
        rule = _rule(picture, score, painter.settings.min_pickscore)
        counts[rule] += 1
        if painter.cuts(pair):
            counts["captions that the text encoder cut"] += 1
        if score is not None and rule != "blank":
            scores.append(score)
        if rule == "kept":
            target = journal.out / "pictures" / f"{pair.name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
            path = target.relative_to(journal.out).as_posix()
            records.append(Record(pair.caption, target=path, caption=pair.caption, task="synthetic", id=pair.name))
    journal.add(_key(batch), records, counts, {"PickScore": scores} if scores else {})


def _rule(picture: Image, score: float | None, least: float | None) -> str:
    if picture.getcolors(1) is not None:  # one colour: NaN of a half-precision VAE, or what a safety checker blackened
        return "blank"
    return "under --min-pickscore" if least is not None and score is not None and score < least else "kept"
