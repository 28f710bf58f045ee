"""``mmgen build masks``: a segmentation of every box by SAM (Kirillov et al. 2023, arXiv 2304.02643), so that an object can be cut out
of its background (MUMU, section 7, question 2)."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image as PILImage
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import SamModel, SamProcessor

from ..data.images import locate_file, open_picture
from ..data.sources import Source, open_source
from ..models.weights import locate
from ..prompt import Picture, Record, RecordError
from .journal import Journal, Shard, adopt


@dataclass(frozen=True)
class Masks:
    """What the masks depend on.

    Attributes:
        records: JSONL file, parquet file or ``datasets`` folder.
        model: hub name or folder of a SAM.
        min_iou: a mask of which SAM expects a lower intersection over union with the object is left out.
    """

    records: str
    model: str = "facebook/sam-vit-base"
    min_iou: float = 0.8


class Row(NamedTuple):
    """A record, ready: SAM's inputs of its target where it has boxes without a mask, or why it cannot be used."""

    number: int
    record: Record | None
    inputs: dict[str, Tensor] | None
    reason: str


class Rows(Dataset[Row]):
    """Rows of a source by number, their targets read and scaled for SAM.

    Args:
        source: the records.
        processor: SAM's.
        numbers: of the rows to read.
    """

    def __init__(self, source: Source, processor: Any, numbers: Sequence[int]) -> None:
        self.source, self.processor, self.numbers = source, processor, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Row:
        number = self.numbers[index]
        try:
            record = self.source.record(number)
            if not (boxes := [list(box[1:5]) for box in record.boxes if box.mask is None]) or record.target is None:
                return Row(number, record, None, "")
            picture = open_picture(record.target, self.source.root)
            return Row(number, record, dict(self.processor(picture, input_boxes=[boxes], return_tensors="pt")), "")
        except ValueError as error:  # also of a strip that is nothing after scaling
            return Row(number, None, None, str(error))


class Mask(NamedTuple):
    """An object's segmentation as a grey picture of the target's size, white where the object is; its IoU as SAM expects it."""

    picture: Image
    iou: float


class Segmenter:
    """SAM, prompted with boxes.

    Args:
        pretrained: hub name or folder.
        device: where it runs.
    """

    def __init__(self, pretrained: str, device: str = "cpu") -> None:
        self.processor: Any = SamProcessor.from_pretrained(locate(pretrained))
        self.model: Any = SamModel.from_pretrained(locate(pretrained)).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def __call__(self, inputs: dict[str, Tensor]) -> list[Mask]:
        """Of each box of a picture the mask that SAM expects to be the best of its three.

        The picture passes SAM's encoder once, all its boxes the decoder together.
        """
        pixels, boxes = inputs["pixel_values"].to(self.device), inputs["input_boxes"].float().to(self.device)
        out = self.model(pixel_values=pixels, input_boxes=boxes, multimask_output=True)
        ious, best = out.iou_scores[0].float().cpu().max(-1)  # [n, 3] -> [n]
        logits = out.pred_masks[0].float().cpu()  # [n, 3, h, w]
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        masks = []
        for k, (iou, i) in enumerate(zip(ious.tolist(), best.tolist(), strict=True)):
            inside = self.processor.post_process_masks(logits[None, k : k + 1, i : i + 1], *sizes)[0][0, 0]  # [H, W]
            masks.append(Mask(PILImage.fromarray(inside.byte().mul(255).numpy()), iou))
        return masks


def build_masks(settings: Masks, out: str, device: str = "cpu", workers: int = 0, shard: Shard = Shard()) -> str:
    """Give every box of every record its mask; a box that has one keeps it, and a record keeps all else.

    Returns:
        A report: the path of the records, and counts.

    Raises:
        FileNotFoundError: no such file or model.
        ValueError: the file holds no rows, it would be written over, or ``out`` holds a build with other settings.
    """
    if Path(settings.records).resolve() == (Path(out) / "records.jsonl").resolve():
        raise ValueError(f"{settings.records}: would be written over; give another --out")
    source = open_source(settings.records)
    journal = Journal(out, {**asdict(settings), "records": source.fingerprint()}, shard)
    if todo := journal.todo(range(len(source)), key=str):
        segment = Segmenter(settings.model, device)
        loader = DataLoader(Rows(source, segment.processor, todo), batch_size=None, num_workers=workers)
        for row in tqdm(loader, desc="masks", unit="record", disable=None):
            counts = Counter(records=1)
            records = _masked(row, segment, settings.min_iou, partial(_settle, journal.out, source.root, row.number), counts)
            journal.add(str(row.number), records, counts)
    return journal.conclude()


Settle = Callable[[Picture, str], str]
"""Makes a picture part of the build under a name, and tells its path there."""


def _masked(row: Row, segment: Segmenter, min_iou: float, settle: Settle, counts: Counter[str]) -> list[Record]:
    """The record with its masks; nothing where it or one of its pictures cannot be read."""
    try:
        if row.record is None:
            raise RecordError(row.reason)
        record = row.record.map_pictures(settle)
    except (RecordError, OSError) as error:
        tqdm.write(f"row {row.number + 1}: {error}", sys.stderr)
        counts["unreadable"] += 1
        return []
    masks = iter(segment(row.inputs) if row.inputs else [])
    boxes = list(record.boxes)
    for k, box in enumerate(boxes):
        if box.mask is not None or (found := next(masks, None)) is None:
            continue
        good = found.iou >= min_iou and found.picture.getbbox() is not None
        counts["boxes masked" if good else "boxes without a good mask"] += 1
        if good:
            boxes[k] = box._replace(mask=settle(found.picture, f"box{k}"))
    return [replace(record, boxes=tuple(boxes))]


def _settle(out: Path, root: Path | None, row: int, picture: Picture, name: str) -> str:
    path = f"{row // 1000:05d}/{row:08d}_{name}"
    if isinstance(picture, str):
        source = locate_file(picture, root or Path.cwd())
        return adopt(source, out, path + source.suffix)
    target = out / "pictures" / f"{path}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image) else open_picture(picture)).save(target)
    return target.relative_to(out).as_posix()
