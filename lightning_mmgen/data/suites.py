"""Published sets of prompts that a model is tested on: ``lightning test -c experiments/eval/NAME.yaml``."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL.Image import Image
from torch.utils.data import DataLoader, TensorDataset

from ..prompt import PromptRecord, Record, RecordError, Reference
from .datamodule import MultimodalDataModule
from .images import FORMATS, open_picture
from .recipe import BadRow, Sample
from .sources import DatasetSource, RowError, Source, file_digest

LIVE = ("cat", "dog")
SUFFIXES = {".jpg", ".jpeg", *(f".{name.lower()}" for name in FORMATS)}


class DreamBenchSource(Source):
    """DreamBench (Ruiz et al. 2023, section 4.1): 30 subjects, 25 prompts each, four pictures a prompt.

    A record shows the first photo of its subject; its target is the second one, and all of them are under ``extra["real"]``, for
    :class:`~lightning_mmgen.metrics.similarity.SubjectSimilarity`. The paper's identifier gives way to the reference, and its caption to
    the class alone.

    Args:
        path: folder with a folder of photos a subject and ``prompts_and_classes.txt``, as google/dreambooth has them; or a data set of the
            hub with these files.
        pictures: how many of each prompt.

    Raises:
        FileNotFoundError: no such folder, or no prompts in it.
        ValueError: a folder that the list of classes lacks, or none that it has.
    """

    def __init__(self, path: str, pictures: int = 4) -> None:
        self.root = self._find(path)
        self.list = self.root / "prompts_and_classes.txt"
        if not self.list.is_file():
            raise FileNotFoundError(f"{self.list}: no such file")
        classes, objects, live = read_prompts(self.list.read_text())
        folders = {p.name for p in self.root.iterdir() if p.is_dir()}
        if unknown := sorted(folders - set(classes)):
            raise ValueError(f"{self.list}: has no class for the folder {unknown[0]!r}")
        if not folders:
            raise ValueError(f"{self.root}: holds no folder of a subject")
        if len(folders) < len(classes):
            rank_zero_warn(f"{self.root}: {len(folders)} of {len(classes)} subjects are there; the published scores are of all")
        subjects = [(s, c) for s, c in classes.items() if s in folders]
        self.rows = [(s, c, p, k) for s, c in subjects for p, k in product(live if c in LIVE else objects, range(pictures))]

    @staticmethod
    def _find(path: str) -> Path:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            if path.startswith((".", "/", "~")):
                raise FileNotFoundError(f"{path}: no such folder")
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(path, repo_type="dataset"))
        return folder / "dataset" if (folder / "dataset").is_dir() else folder

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int, epoch: int = 0) -> Record:
        subject, name, prompt, k = self.rows[index]
        try:
            photos = self._photos(subject)
        except RecordError as error:
            raise RowError(subject, index, str(error)) from error
        caption = " ".join(prompt.format("", name).split())
        return PromptRecord(
            prompt.format("[ref#1]", name),
            (Reference(1, photos[0], name),),
            photos[1] if len(photos) > 1 else None,
            caption,
            task="live" if name in LIVE else "object",
            id=f"{subject}/{caption}/{k}",
            extra={"real": photos},
        )

    @lru_cache(maxsize=2)  # noqa: B019  a subject's prompts come one after the other
    def _photos(self, subject: str) -> tuple[Image, ...]:
        assert self.root is not None
        files = sorted(p for p in (self.root / subject).iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise RecordError("holds no photos")
        return tuple(open_picture(str(p.relative_to(self.root)), self.root) for p in files)

    def fingerprint(self) -> str:
        return file_digest(self.list)


def read_prompts(text: str) -> tuple[dict[str, str], list[str], list[str]]:
    """What ``prompts_and_classes.txt`` says: subject -> class, the prompts of objects, those of live subjects, ``{0}`` for the identifier
    and ``{1}`` for the class.

    Raises:
        ValueError: one of them is not there.
    """
    listed, *prompts = re.split(r"prompt_list\s*=", text)
    classes = dict(re.findall(r"^(\w+),([\w ]+?)\s*$", listed, re.MULTILINE))
    classes.pop("subject_name", None)
    lists = [re.findall(r"'([^'\n]*\{0\} \{1\}[^'\n]*)'\.format", part) for part in prompts]
    if not classes or len(lists) != 2 or not all(lists):
        raise ValueError("prompts_and_classes.txt: needs subjects with classes, and two lists of prompts, of objects and of live subjects")
    objects, live = lists
    return classes, objects, live


class PartiPromptsSource(Source):
    """PartiPrompts (Yu et al. 2022, section 5.1): 1,632 prompts in words, each of a category, which is the record's task.

    Args:
        path: ``PartiPrompts.tsv``, or a data set of the hub with its columns (``Prompt``, ``Category``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has other columns, or no rows.
    """

    def __init__(self, path: str) -> None:
        if path.endswith(".tsv"):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file")
            with open(path, encoding="utf-8", newline="") as lines:
                rows: Sequence[dict[str, Any]] = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
            self.digest = file_digest(path)
        else:
            found = DatasetSource(path)
            rows, self.digest = found.rows.with_format(None).to_list(), found.fingerprint()
        if not rows or not {"Prompt", "Category"} <= rows[0].keys():
            raise ValueError(f"{path}: has no rows with the columns Prompt and Category")
        self.path, self.rows = path, rows

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int, epoch: int = 0) -> Record:
        text, category = (str(self.rows[index][key] or "") for key in ("Prompt", "Category"))
        try:
            return PromptRecord(text, caption=text, task=category, id=f"parti-{index:04d}")
        except RecordError as error:
            raise RowError(self.path, index, str(error)) from error

    def fingerprint(self) -> str:
        return self.digest


class SuiteDataModule(MultimodalDataModule):
    """A set of prompts to test on; the callbacks draw and score them.

    Args:
        suite: the prompts.
        target_size: side of the pictures to draw, in pixels.
        reference_size: side of the references, in pixels; by default what fills the encoder's token budget.
    """

    def __init__(self, suite: Source, target_size: int = 1024, reference_size: int | None = None) -> None:
        super().__init__(suite, suite, target_size, reference_size, batch_size=1)

    def test_dataloader(self) -> DataLoader[Any]:  # type: ignore[override]
        """One batch of nothing: what is to be drawn is asked for by callbacks."""
        return DataLoader(TensorDataset(torch.zeros(1)), collate_fn=_nothing)


def _nothing(_: Any) -> tuple[None, list[Sample | BadRow]]:
    return None, []
