from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image as PILImage

from lightning_mmgen.batch import Batch, Condition
from lightning_mmgen.data.buckets import Buckets, Rows, bucketed, measure
from lightning_mmgen.data.crops import CropDataModule
from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.data.images import crop, open_picture, picture_size, sdxl_sizes
from lightning_mmgen.data.order import BucketSampler
from lightning_mmgen.data.shards import WebDatasetStream, write_shards
from lightning_mmgen.data.sources import JSONLSource, write_jsonl
from lightning_mmgen.models.unet import denoise
from lightning_mmgen.prompt import Record, Reference

SHAPES = [(32, 32), (48, 24), (24, 48), (33, 31), (70, 30)]  # width, height


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> JSONLSource:
    """40 records of five shapes with none to two references; the picture of the last is not there."""
    folder, records = tmp_path_factory.mktemp("shapes"), []
    for i in range(40):
        picture = PILImage.new("RGB", SHAPES[i % 5], (i, i, i))
        references = tuple(Reference(k + 1, picture) for k in range(i % 3))
        records.append(Record("draw " + " ".join(f"[ref#{r.marker}]" for r in references), references, picture, id=str(i)))
    path = write_jsonl(records, folder)
    (folder / "pictures/000039_target.png").unlink()
    return JSONLSource(str(path))


def test_the_buckets_are_of_nearly_one_area_and_sdxls_are_among_them() -> None:
    sizes = Buckets(64, 4.0).sizes(1024)
    assert all(h % 64 == w % 64 == 0 and 0.93 < h * w / 1024**2 <= 1 and max(h / w, w / h) <= 4 for h, w in sizes)
    assert {(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (640, 1600), (512, 2048), (896, 1152)} <= set(sizes)  # SDXL, appendix I
    assert Buckets(8, 1.0).sizes(32) == [(32, 32)] and sizes == sorted(sizes, key=lambda s: s[0] / s[1])
    with pytest.raises(ValueError, match="target_size 100 is no multiple of step 64"):
        Buckets().sizes(100)
    with pytest.raises(ValueError, match="step and max_aspect must be 1 or more"):
        Buckets(max_aspect=0.5)


def test_rows_go_to_the_nearest_aspect(source: JSONLSource) -> None:
    sizes = Buckets(8, 4.0).sizes(32)
    rows = measure(source, sizes)
    for i in range(39):
        w, h = SHAPES[i % 5]
        nearest = min(sizes, key=lambda s: abs(np.log(s[0] / s[1]) - np.log(h / w)))
        assert sizes[rows.bucket[i]] == nearest and rows.references[i] == i % 3
    assert sizes[rows.bucket[39]] == (32, 32), "a row that cannot be used goes among the squares"
    assert rows.bucket.nbytes + rows.references.nbytes == 3 * 40


def test_the_size_of_a_picture_is_that_of_its_upright_pixels(tmp_path: Path) -> None:
    picture, exif = PILImage.new("RGB", (20, 10)), PILImage.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert picture_size("a.jpg", tmp_path) == open_picture("a.jpg", tmp_path).size == (10, 20)
    assert picture_size(picture) == (20, 10)


def test_every_global_batch_is_of_one_bucket_and_of_like_reference_counts() -> None:
    rng = np.random.default_rng(0)
    rows = Rows(rng.integers(3, size=500).astype(np.uint16), rng.integers(5, size=500).astype(np.uint8))
    order = bucketed(rows, 8, np.random.default_rng(1))
    assert len(order) == sum(c // 8 * 8 for c in np.bincount(rows.bucket)) and len(set(order)) == len(order)
    batches = order.reshape(-1, 8)
    assert all(len(set(rows.bucket[batch])) == 1 for batch in batches)
    spread = np.array([np.ptp(rows.references[batch].astype(int)) for batch in batches])
    assert (spread == 0).mean() > 0.7 and spread.max() <= 1
    kinds = rows.bucket[batches[:, 0]]
    assert (np.diff(kinds) != 0).mean() > 0.4, "buckets come mixed"
    other = bucketed(rows, 8, np.random.default_rng(2))
    assert set(map(frozenset, other.reshape(-1, 8).tolist())).isdisjoint(map(frozenset, batches.tolist())), "other batches in another epoch"
    dropped = [set(range(500)) - set(bucketed(rows, 8, np.random.default_rng(s)).tolist()) for s in range(20)]
    assert len({int(rows.references[i]) for some in dropped for i in some}) > 2, "not always those with the most references"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_batches_of_one_order(world: int) -> None:
    rng = np.random.default_rng(0)
    rows, sizes = Rows(rng.integers(3, size=100).astype(np.uint16), np.zeros(100, np.uint8)), [(8, 32), (16, 16), (32, 8)]
    ranks = [list(BucketSampler(rows, sizes, 8 // world, 5, rank, world)) for rank in range(world)]
    alone = list(BucketSampler(rows, sizes, 8, 5))
    assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) == len(alone)
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert {p.index for part in parts for p in part} == {p.index for p in whole}
        assert {p.size for part in parts for p in part} == {sizes[rows.bucket[whole[0].index]]}


def module(source: Any, batch_size: int = 4, **settings: Any) -> MultimodalDataModule:
    data = MultimodalDataModule(
        source, target_size=32, reference_size=16, batch_size=batch_size, seed=5, bad_rows=0.1, buckets=Buckets(8, 4.0, **settings)
    )
    data.setup("fit")
    return data


def take(data: MultimodalDataModule, count: int) -> list[Batch]:
    out: list[Any] = []
    while len(out) < count:
        for batch in data.train_dataloader():
            out.append(data.on_before_batch_transfer(batch, 0))
            data.advance()
            if len(out) == count:
                break
    return out


def test_targets_are_of_their_buckets_size_and_a_run_goes_on_exactly(source: JSONLSource) -> None:
    whole = take(module(source), 14)
    for batch in whole:
        assert batch.sizes is not None and batch.sizes[:, 4:].tolist() == [list(batch.target.shape[2:])] * batch.size
        for name, size in zip(batch.ids, batch.sizes.tolist(), strict=True):
            w, h = SHAPES[int(name) % 5]
            assert size[:2] == [h, w]
    assert len({tuple(batch.target.shape[2:]) for batch in whole}) == 3
    first = module(source)
    take(first, 11)
    second = module(source)
    second.load_state_dict(first.state_dict())
    for a, b in zip(take(second, 3), whole[11:], strict=True):
        assert a.ids == b.ids and torch.equal(a.target, b.target)
    third = module(source, batch_size=2)
    third.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="with the same global batch, 4, not 2"):
        third.train_dataloader()


def test_the_table_is_kept_and_measured_again_for_other_data(source: JSONLSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = str(tmp_path / "table.npz")
    expected = [p for batch in module(source, table=table).sampler() for p in batch]
    with monkeypatch.context() as patch:
        patch.setattr("lightning_mmgen.data.buckets.measure", lambda *_: pytest.fail("the table was there"))
        assert [p for batch in module(source, table=table).sampler() for p in batch] == expected
    (tmp_path / "table.npz").write_bytes(b"damaged")
    assert [p for batch in module(source, table=table).sampler() for p in batch] == expected
    other = JSONLSource(str(write_jsonl([Record("a", target=PILImage.new("RGB", (8, 8)))] * 8, tmp_path)))
    assert {p.size for batch in module(other, table=table).sampler() for p in batch} == {(32, 32)}


def test_the_crop_is_centred_and_sdxl_is_told_of_it() -> None:
    picture = torch.arange(3 * 20 * 60).view(3, 20, 60).float() / 3600
    assert torch.equal(crop(picture, (20, 40)), picture[:, :, 10:50])
    assert sdxl_sizes((20, 60), (20, 40)) == (20, 60, 0, 10, 20, 40)
    assert crop(picture, (40, 40)).shape == (3, 40, 40) and sdxl_sizes((20, 60), (40, 40)) == (20, 60, 0, 40, 40, 40)
    assert sdxl_sizes((90, 30), (32, 32)) == (90, 30, 32, 0, 32, 32)


def test_the_unet_is_told_the_sizes_of_each_sample(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, told = torch.randn(2, 3, 16), list[torch.Tensor]()
    condition = Condition(tokens, torch.ones(2, 3, dtype=torch.bool), [[], []], torch.randn(2, 12))
    keep = unet.add_time_proj.register_forward_hook(lambda _, given, __: told.append(given[0].view(2, 6)))
    z, t, sizes = torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.tensor([[20, 60, 0, 40, 16, 16], [16, 16, 0, 0, 16, 16]])
    with torch.no_grad():
        plain, cropped = (denoise(unet, z, t, condition._replace(sizes=s), (16, 16)) for s in (None, sizes))
    keep.remove()
    assert told[0].tolist() == [[16, 16, 0, 0, 16, 16]] * 2 and torch.equal(told[1], sizes.float())
    torch.testing.assert_close(plain[1], cropped[1])
    assert not torch.allclose(plain[0], cropped[0])


def test_what_has_no_buckets_is_refused(source: JSONLSource, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="buckets: CropDataModule draws squares"):
        CropDataModule(source, buckets=Buckets(8))
    write_shards([source.record(0)], tmp_path, root=source.root)
    with pytest.raises(ValueError, match="buckets: a stream has no places to sort"):
        MultimodalDataModule(WebDatasetStream(f"{tmp_path}/*.tar"), buckets=Buckets(8))
    with pytest.raises(ValueError, match="no bucket of the data has rows for one batch of 30"):
        module(source, batch_size=30).sampler()
