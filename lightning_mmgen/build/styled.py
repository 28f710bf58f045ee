"""``mmgen build styled``: pictures of contents in styles (``mmgen build synthetic``) as styled generation or style transfer, filtered by
CLIP (Instruct-Imagen, section 3.2)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..data.images import locate_file, open_picture, pixels
from ..data.sources import open_source
from ..models.clip import Clip
from ..prompt import Record, Reference
from .captions import read_lines
from .embed import fit
from .journal import Journal, Shard, adopt, digest_of, in_batches

Place = tuple[int, int]
"""Of a picture: the numbers of its content and of its style."""


@dataclass(frozen=True)
class Styled:
    """What the records depend on.

    Attributes:
        records: JSONL file of ``mmgen build synthetic``.
        contents, styles: the text files that it was given.
        task: ``styled``, a picture in the style and the content in words; or ``style_transfer``, a picture of the content beside it.
        clip: hub name or folder of a CLIP.
        min_style: targets are dropped whose cosine with the style's picture is lower; None drops nothing.
        min_caption: the same with the words of the content.
        batch_size: pictures that CLIP sees together; rounding depends on it, so that it is the same in every shard.

    Raises:
        ValueError: an unknown task.
    """

    records: str
    contents: str
    styles: str
    task: str = "styled"
    clip: str = "openai/clip-vit-large-patch14"
    min_style: float | None = None
    min_caption: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.task not in ("styled", "style_transfer"):
            raise ValueError(f"--task {self.task!r} is neither styled nor style_transfer")


class Row(NamedTuple):
    """A target; what shows its style and content: another content in its style, its content in another style; the content's words."""

    target: Place
    style: Place
    content: Place
    words: str


def build_styled(settings: Styled, out: str, device: str = "cpu", shard: Shard = Shard()) -> str:
    """Make a target of every picture that another can show the style of, and the content in a style transfer, if CLIP agrees.

    Returns:
        A report: the path of the records, counts by rule, and quantiles of the cosines.

    Raises:
        FileNotFoundError: no such file or model.
        ValueError: records of other contents or styles, a picture that cannot be read, or ``out`` holds a build with other settings.
    """
    contents, styles = read_lines(settings.contents), read_lines(settings.styles)
    pictures = read_grid(settings.records, contents, styles)
    journal = Journal(out, {**asdict(settings), "contents": digest_of(contents), "styles": digest_of(styles)}, shard)
    rows = pair(sorted(pictures), contents, settings.task)
    if todo := journal.todo(in_batches(rows, settings.batch_size), key=_key):
        clip = Clip(settings.clip).to(device)
        for batch in tqdm(todo, desc="styled", unit="batch", disable=None):
            _note(batch, pictures, clip, settings, journal)
    return journal.conclude()


def read_grid(path: str, contents: Sequence[str], styles: Sequence[str]) -> dict[Place, Path]:
    """Where the picture of each content in each style is; some may be missing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a record of other contents or styles.
    """
    source, out = open_source(path), {}
    assert source.root is not None
    for number, record in enumerate(source, 1):
        i, _, j = record.id.partition("/")
        place = (int(i), int(j)) if i.isdigit() and j.isdigit() else (len(contents), len(styles))
        if place[0] >= len(contents) or place[1] >= len(styles) or record.caption != f"{contents[place[0]]}, {styles[place[1]]}":
            raise ValueError(f"{path}:{number}: is no picture of these contents and styles")
        out[place] = locate_file(str(record.target), source.root)
    return out


def pair(places: Sequence[Place], contents: Sequence[str], task: str) -> list[Row]:
    """What shows each picture's style and content: the next ones, in a ring; pictures that have none are left out."""
    by_style, by_content = defaultdict[int, list[Place]](list), defaultdict[int, list[Place]](list)
    for place in places:
        by_content[place[0]].append(place)
        by_style[place[1]].append(place)
    after = [{a: b for ring in rings.values() for a, b in zip(ring, ring[1:] + ring[:1], strict=True)} for rings in (by_style, by_content)]
    rows = [Row(place, after[0][place], after[1][place], contents[place[0]]) for place in places]
    return [row for row in rows if row.target not in ((row.style, row.content) if task == "style_transfer" else (row.style,))]


def _key(batch: Sequence[Row]) -> str:
    return "{:07d}/{:06d}".format(*batch[0].target)


def _note(batch: Sequence[Row], pictures: Mapping[Place, Path], clip: Clip, settings: Styled, journal: Journal) -> None:
    """The records of a batch, counts by rule, and the cosines."""
    targets, styles = (
        _embed([pictures[place] for place in places], clip) for places in zip(*((r.target, r.style) for r in batch), strict=True)
    )
    with_style = (targets * styles).sum(-1).tolist()
    with_caption = (targets * clip.embed_texts([row.words for row in batch])).sum(-1).tolist()
    counts, records = Counter(pictures=len(batch)), []
    for row, style, caption in zip(batch, with_style, with_caption, strict=True):
        rule = _rule(style, caption, settings)
        counts[rule] += 1
        if rule == "kept":
            records.append(_record(row, pictures, settings.task, journal.out))
    journal.add(_key(batch), records, dict(counts), {"cosine with the style": with_style, "cosine with the caption": with_caption})


def _embed(paths: Sequence[Path], clip: Clip) -> torch.Tensor:
    stacked = torch.stack([pixels(fit(open_picture(path.name, path.parent), clip.side)) for path in paths])  # [b, 3, side, side]
    return clip.embed(stacked.to(clip.model.device))


def _rule(style: float, caption: float, settings: Styled) -> str:
    if settings.min_style is not None and style < settings.min_style:
        return "under --min-style"
    return "under --min-caption" if settings.min_caption is not None and caption < settings.min_caption else "kept"


def _record(row: Row, pictures: Mapping[Place, Path], task: str, out: Path) -> Record:
    target, style, content = (adopt(pictures[p], out, f"{p[0]:07d}/{p[1]:06d}{pictures[p].suffix}") for p in row[:3])
    shown = [Reference(1, style, "style", "style")]
    text = f"Create an image in [ref#1] style with the caption: {row.words}"
    if task == "style_transfer":
        shown.append(Reference(2, content, "content", "content"))
        text = "Draw a picture in the given [ref#1] style, following the specified [ref#2] content"
    return Record(text, tuple(shown), target, row.words, task=task, id="{:07d}/{:06d}".format(*row.target))
