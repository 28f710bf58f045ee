"""How like a picture is to others: to the references of its prompt, to its source, to real pictures of its subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..data.images import Edges, crop_square, open_picture, pixels
from ..models.features import Features, as_features
from ..prompt import Picture, Record
from .mean import PictureMean
from .regions import LIKENESSES, OBJECTS, RecordBoxes, Regions, cut


class ImageSimilarity(PictureMean):
    """Mean cos(I0, I1) of edited picture and source (InstructPix2Pix), or of any two pictures.

    Scores of different backbones are never compared.

    Args:
        pretrained: hub name or folder of a CLIP (its picture embeddings), a DINO (its class tokens), or any :class:`Features`.
    """

    def __init__(self, pretrained: str | Features = "openai/clip-vit-large-patch14") -> None:
        super().__init__()
        self.features = as_features(pretrained)

    def score(self, pictures: Tensor, sources: Tensor) -> Tensor:
        """Of pictures and those that they are compared with, each [b, 3, H, W] in [-1, 1], [b]."""
        return cosine_similarity(self.features.embed(pictures), self.features.embed(sources), dim=-1)


class Known:
    """Vectors of pictures that come again and again, as references and real pictures do, each computed once.

    Args:
        features: of the vectors, which have length 1.
        prepare: a picture [3, h, w] as [1, 3, s, s].
    """

    MOST = 10_000  # pictures

    def __init__(self, features: Features, prepare: Callable[[Tensor], Tensor]) -> None:
        self.features, self.prepare = features, prepare
        self.vectors: dict[bytes, Tensor] = {}

    def __call__(self, pictures: Sequence[Picture], device: torch.device) -> Tensor:
        """The vectors of some pictures, [b, d]."""
        opened = [open_picture(picture) for picture in pictures]
        keys = [blake2b(image.tobytes(), key=str(image.size).encode()).digest() for image in opened]
        if len(self.vectors) + len(keys) > self.MOST:
            self.vectors.clear()
        if new := {key: image for key, image in zip(keys, opened, strict=True) if key not in self.vectors}:
            embedded = self.features.embed(torch.cat([self.prepare(pixels(image).to(device)) for image in new.values()]))
            self.vectors |= zip(new, embedded.cpu(), strict=True)
        return torch.stack([self.vectors[key] for key in keys]).to(device)


class SubjectSimilarity(PictureMean):
    """Mean pairwise cosine of each generated picture with each real picture of its subject (DreamBooth, section 4.2: CLIP-I of
    ``openai/clip-vit-base-patch32``, DINO of ``facebook/dino-vits16``).

    Args:
        pretrained: as in :class:`ImageSimilarity`.
    """

    def __init__(self, pretrained: str | Features = "openai/clip-vit-base-patch32") -> None:
        super().__init__()
        self.features = as_features(pretrained)
        self.known = Known(self.features, self._square)

    def score(self, pictures: Tensor, records: Sequence[Record]) -> Tensor:
        """Of pictures [b, 3, H, W] in [-1, 1] and the pictures under ``extra["real"]`` of their records, [b]; nan where there are none."""
        out = pictures.new_full((len(pictures),), torch.nan, dtype=torch.float32)
        if shown := [i for i, record in enumerate(records) if record.extra.get("real")]:
            for i, vector in zip(shown, self.features.embed(pictures[shown]), strict=True):
                out[i] = (self.known(records[i].extra["real"], pictures.device) @ vector).mean()
        return out

    def _square(self, picture: Tensor) -> Tensor:
        return crop_square(picture, self.features.side)[None]


class ReferenceSimilarity(PictureMean):
    """CLIP-I, DINO or another cosine of each reference with its region of the generated picture, or with all of it where none is known;
    averaged over the references of a picture, then over the pictures.

    It rewards a copy of the reference: look at it beside the probes. Styles, layouts and neighbours do not count.

    Args:
        pretrained: as in :class:`ImageSimilarity`.
        regions: where references' objects are; by default where the record has boxes.
    """

    def __init__(self, pretrained: str | Features = "openai/clip-vit-large-patch14", regions: Regions | None = None) -> None:
        super().__init__()
        self.features, self.regions = as_features(pretrained), regions or RecordBoxes()
        self.known = Known(self.features, self._whole)

    def score(self, pictures: Tensor, records: Sequence[Record]) -> Tensor:
        """Of pictures [b, 3, H, W] in [-1, 1] and their records, [b]; nan where no reference counts."""
        return torch.stack([each.nanmean() for each in self.each(pictures, records)])

    def _whole(self, picture: Tensor) -> Tensor:
        return self.features.fit(picture[None])

    def each(self, pictures: Tensor, records: Sequence[Record]) -> list[Tensor]:
        """The score of each reference of each picture, by slot; nan where it does not count."""
        regions = self.regions(pictures, records)
        at = [(i, k) for i, record in enumerate(records) for k, r in enumerate(record.references) if r.role in LIKENESSES]
        return self._cosines(pictures, records, regions, at)

    def _cosines(
        self, pictures: Tensor, records: Sequence[Record], regions: list[list[Edges | None]], at: list[tuple[int, int]]
    ) -> list[Tensor]:
        """The cosines of the references ``at`` (picture, slot); nan for the others."""
        out = [torch.full((len(record.references),), torch.nan, device=pictures.device) for record in records]
        if at:
            drawn = self.features.embed(torch.cat([self.features.fit(cut(pictures[i], regions[i][k])[None]) for i, k in at]))
            shown = self.known([records[i].references[k].image for i, k in at], pictures.device)
            for (i, k), cosine in zip(at, (drawn * shown).sum(-1), strict=True):
                out[i][k] = cosine
        return out


class FaceSimilarity(ReferenceSimilarity):
    """Cosine of the embeddings of the reference's face and the generated one: of the heads of the record's boxes, where it has any.

    Args:
        pretrained: hub name or folder of any face model of ``transformers``.
        regions: where the faces are.
    """

    def __init__(self, pretrained: str | Features, regions: Regions | None = None) -> None:
        super().__init__(pretrained, regions or RecordBoxes("head"))


class MultimodalPromptScore(ReferenceSimilarity):
    """MUMU's multimodal CLIP score: the mean cosine of each crop of the prompt with the same object, cropped from the picture.

    ``compute`` gives ``similarity``, averaged over the objects that were found, and ``detected``, the share of the prompt's crops that
    were: a score of few objects says little. It rewards copy-paste, as MUMU found: look at it beside :class:`~.probes.CopyPaste`.

    Args:
        pretrained: as in :class:`ImageSimilarity`.
        regions: a detector's (:class:`~.regions.Detected`), or by default the record's boxes.
    """

    asked: Tensor

    def __init__(self, pretrained: str | Features = "openai/clip-vit-large-patch14", regions: Regions | None = None) -> None:
        super().__init__(pretrained, regions)
        self.add_state("asked", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def each(self, pictures: Tensor, records: Sequence[Record]) -> list[Tensor]:
        """The score of each reference of each picture, by slot; nan where its object was not found."""
        regions = self.regions(pictures, records)
        at = [(i, k) for i, k in _crops(records) if regions[i][k] is not None]
        return self._cosines(pictures, records, regions, at)

    def update(self, pictures: Tensor, records: Sequence[Record]) -> None:
        """Add pictures [b, 3, H, W] in [-1, 1] and their records."""
        scores = torch.cat(self.each(pictures, records)) if records else pictures.new_zeros(0)
        self.asked += len(_crops(records))
        self.include(scores[~scores.isnan()])

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The mean over the objects that were found, and their share."""
        return {"similarity": super().compute(), "detected": (self.count / self.asked).float()}


def _crops(records: Sequence[Record]) -> list[tuple[int, int]]:
    """Picture and slot of every reference that shows an object."""
    return [(i, k) for i, record in enumerate(records) for k, r in enumerate(record.references) if r.role in OBJECTS]
