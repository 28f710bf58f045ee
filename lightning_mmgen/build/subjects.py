"""``mmgen build subjects``: pictures grouped by what they show, each a target whose references are others of its group (Instruct-Imagen,
section 3.2: subjects of SuTI, identities of CelebA)."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ..data.images import locate_file, open_picture
from ..data.instructions import naming
from ..prompt import Record, RecordError, Reference
from .captions import read_captions
from .journal import Journal, Shard, adopt, digest_of
from .photos import picture_names


@dataclass(frozen=True)
class Subjects:
    """What the records depend on.

    Attributes:
        images: folder with a folder of pictures for each subject.
        classes: file of lines ``folder,words``, what each subject is called (DreamBench's ``prompts_and_classes.txt``); "" takes the names
            of the folders.
        captions: COCO JSON, JSONL rows {image, caption} or a folder of .txt; "" makes "a <words>" of each picture.
        references: most pictures beside a target.
        min_size: subjects of fewer pictures are dropped.

    Raises:
        ValueError: a number out of its range.
    """

    images: str
    classes: str = ""
    captions: str = ""
    references: int = 3
    min_size: int = 2

    def __post_init__(self) -> None:
        if self.references < 1 or self.min_size < 2:
            raise ValueError("--references must be 1 or more, --min-size 2 or more")


def build_subjects(settings: Subjects, out: str, shard: Shard = Shard()) -> str:
    """Make every picture of every subject a target, with the next ones of its subject, in the order of their names, as references.

    Returns:
        A report: the path of the records, and counts by rule.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: no folder of a subject, one without its class, or ``out`` lies among the pictures or holds a build with other settings.
    """
    root = Path(settings.images)
    names = picture_names(root, Path(out))
    groups = by_subject(names)
    if not groups:
        raise ValueError(f"{root}: holds no folder of a subject")
    classes = read_classes(settings.classes, groups) if settings.classes else {subject: subject for subject in groups}
    captions = {s.image: s.captions[0].text for s in read_captions(settings.captions, settings.images)} if settings.captions else None
    digests = {name: digest_of(map(str, (known or {}).items())) for name, known in (("classes", classes), ("captions", captions))}
    journal = Journal(out, {**asdict(settings), "images": digest_of(names), **digests}, shard)
    for subject in tqdm(journal.todo(list(groups), key=str), desc="subjects", disable=None):
        counts: Counter[str] = Counter()
        usable = [name for name in groups[subject] if _usable(name, root, captions, counts)]
        small = len(usable) < settings.min_size
        counts["subjects under --min-size" if small else "subjects"] += 1
        texts = {name: captions[name] if captions else f"a {classes[subject]}" for name in usable}
        records = [] if small else _records(texts, classes[subject], settings.references, root, journal.out)
        journal.add(subject, records, dict(counts + Counter(records=len(records))))
    return journal.conclude()


def by_subject(names: Iterable[str]) -> dict[str, list[str]]:
    """The pictures of each subject: of its folder, and of all folders in it; those beside the folders are of none."""
    groups: dict[str, list[str]] = {}
    for name in names:
        subject, _, rest = name.partition("/")
        if rest:
            groups.setdefault(subject, []).append(name)
    return groups


def read_classes(path: str, subjects: Iterable[str]) -> dict[str, str]:
    """What each subject is called.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a subject is not in it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, encoding="utf-8", newline="") as lines:
        listed = {row[0]: " ".join(row[1].split()) for row in csv.reader(lines) if len(row) == 2}
    if missing := [subject for subject in subjects if not listed.get(subject)]:
        raise ValueError(f"{path}: has no class for the folder {missing[0]!r}")
    return {subject: listed[subject] for subject in subjects}


def _usable(name: str, root: Path, captions: dict[str, str] | None, counts: Counter[str]) -> bool:
    """Whether a picture can be read and has a caption; counted by rule."""
    rule = "pictures"
    try:
        open_picture(name, root)
        if captions is not None and not captions.get(name):
            rule = "no caption"
    except RecordError as error:
        tqdm.write(str(error), sys.stderr)
        rule = "unreadable"
    counts[rule] += 1
    return rule == "pictures"


def _records(captions: dict[str, str], words: str, most: int, root: Path, out: Path) -> list[Record]:
    """A record for each picture of a subject; the pictures become part of the build."""
    names, paths = list(captions), {name: adopt(locate_file(name, root), out, name) for name in captions}
    return [
        _record(name, captions[name], words, [paths[n] for n in (names[i + 1 :] + names[:i])[:most]], paths[name])
        for i, name in enumerate(names)
    ]


def _record(name: str, caption: str, words: str, shown: Sequence[str], target: str) -> Record:
    references = tuple(Reference(k, path, words) for k, path in enumerate(shown, 1))
    text = f"Generate an image of {naming(list(references))}, using the caption: {caption}"
    return Record(text, references, target, caption, task="subjects", id=name)
