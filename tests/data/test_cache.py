from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lightning_mmgen.batch import Batch
from lightning_mmgen.cli import main as lightning
from lightning_mmgen.data.cache import Cache, Caches, digest_of, open_caches
from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.models.codec import Codec
from lightning_mmgen.tools.main import main as mmgen

PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).view(3, 16, 16)


# -- entries ---------------------------------------------------------------------------------------------------------------------


def test_an_entry_belongs_to_its_pixels(tmp_path: Path) -> None:
    cache, value = Cache(tmp_path), torch.randn(8, 4, 4)
    cache.write(PICTURE, value)
    assert torch.equal(cache.read(PICTURE.clone()), value)  # type: ignore[arg-type]
    changed = PICTURE.clone()
    changed[0, 0, 0] += 1e-6
    for other in (changed, PICTURE.flip(-1), PICTURE.view(3, 8, 32), PICTURE[:, :8], PICTURE.double()):
        assert cache.read(other) is None


def test_an_entry_that_a_crash_left_is_not_there_and_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, value = Cache(tmp_path), torch.randn(8, 4, 4)
    cache.write(PICTURE, value)
    whole = cache.path(PICTURE).read_bytes()
    for torn in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1]):
        cache.path(PICTURE).write_bytes(torn)
        assert cache.read(PICTURE) is None
        cache.write(PICTURE, value)
        assert torch.equal(cache.read(PICTURE), value)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            cache.write(PICTURE + 1, value)
    assert cache.read(PICTURE + 1) is None and len(list(tmp_path.rglob("*.*"))) == 1


def _write(folder: Path, number: int) -> int:
    cache = Cache(folder)
    for i in range(30):
        cache.write(PICTURE * i, torch.full((2000,), float(i)))
        if (value := cache.read(PICTURE * i)) is None or not (value == i).all():
            return -1
    return number


def test_several_writers_of_the_same_entries_do_not_disturb_each_other(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3) as pool:
        assert list(pool.map(_write, [tmp_path] * 3, range(3))) == [0, 1, 2]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 30 and not list(tmp_path.rglob("*.staging"))


def test_the_digest_follows_weights_and_settings() -> None:
    layer = nn.Linear(3, 3)
    before = digest_of(layer, {"a": 1})
    assert digest_of(layer, {"a": 1}) == before
    assert len({before, digest_of(layer, {"a": 2}), digest_of(layer.double(), {"a": 1}), digest_of(nn.Linear(3, 3), {"a": 1})}) == 4


def test_moments_of_the_codec_say_all_that_its_latents_need(vae: AutoencoderKL) -> None:
    codec, pixels, noise = Codec(vae), torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    moments = codec.moments(pixels)
    assert moments.shape == (2, 8, 8, 8)
    for drawn in (None, noise):
        assert torch.equal(codec.encode(torch.zeros_like(pixels), drawn, moments), codec.encode(pixels, drawn))


# -- from the command to the loss ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny experiment with its data in files: every reference is seen as it is."""
    from lightning_mmgen.data.sources import ToyboxSource, write_jsonl

    folder = tmp_path_factory.mktemp("cached")
    write_jsonl(ToyboxSource({"subject": 1.0}, length=6), folder / "data")
    text = experiment.read_text().replace(
        "train: {class_path: ToyboxSource, init_args: {tasks: {subject: 0.5, caption: 0.5}, length: 8}}",
        f"train: {folder}/data/records.jsonl",
    )
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def filled(config: Path) -> Path:
    out = config.parent / "cache"
    assert mmgen(["cache", "-c", str(config), "--out", str(out), "--device", "cpu"]) == 0
    return out


def fitted(config: Path, folder: Path, *more: str) -> tuple[Any, list[dict[str, Any]]]:
    """A run, and its losses to the last bit."""
    recorder = {"class_path": "tests.recorder.LossRecorder", "init_args": {"out": str(folder / "losses.jsonl")}}
    options = [f"--trainer.callbacks+={json.dumps(recorder)}", "--trainer.logger=false", f"--trainer.default_root_dir={folder}", *more]
    cli = lightning(["fit", "-c", str(config), *options])
    return cli, [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    """The run without a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMGEN_ALLOW", "tests")
        return fitted(config, tmp_path_factory.mktemp("plain"))


def test_the_loss_is_bit_equal_with_and_without_the_cache(
    config: Path,
    filled: Path,
    plain: tuple[Any, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    _, without = plain
    encoded: list[Tensor] = []
    monkeypatch.setattr(Codec, "moments", lambda self, pixels: encoded.append(pixels))
    monkeypatch.setattr("lightning_mmgen.models.idefics2.Idefics2Encoder.see", lambda self, pixels: encoded.append(pixels))
    _, cached = fitted(config, tmp_path, f"--data.init_args.cache={filled}")
    assert cached == without and len(without) == 2
    assert not encoded and not [w for w in recwarn if "in the cache" in str(w.message)]


def test_a_second_pass_adds_nothing_and_only_new_pictures_are_added(
    config: Path, filled: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["cache", "-c", str(config), "--out", str(filled), "--device", "cpu", "--only", "moments"]
    assert mmgen(command) == 0 and "0 pictures added, 6 were there" in capsys.readouterr().out
    picture = next((config.parent / "data/pictures").glob("*_target.png"))
    kept = picture.read_bytes()
    picture.write_bytes(next((config.parent / "data/pictures").glob("*_ref1.png")).read_bytes())
    try:
        assert mmgen(command) == 0 and "1 pictures added, 5 were there" in capsys.readouterr().out, "other bytes"
    finally:
        picture.write_bytes(kept)
    smaller = config.parent / "smaller.yaml"
    smaller.write_text(config.read_text().replace("target_size: 16", "target_size: 8"))
    assert mmgen([*command[:2], str(smaller), *command[3:], "--shard", "1/2"]) == 0
    assert "2 pictures added, 0 were there" in capsys.readouterr().out, "other settings"


def test_a_miss_is_encoded_anew_and_said(filled: Path, config: Path, tmp_path: Path) -> None:
    data = MultimodalDataModule(str(config.parent / "data/records.jsonl"), target_size=16, reference_size=16, batch_size=3)
    data.setup("fit")
    data.cache, data.caches = "there", Caches(moments=Cache(next(filled.glob("moments-*"))), vision=Cache(tmp_path))
    loader = data._loader(data.rows(), data.train_dataloader().batch_sampler, data.caches)  # type: ignore[arg-type]
    batch: Batch = next(iter(loader))[0]
    assert batch.moments is not None and batch.moments.target is not None and batch.references[0].patches is None
    missing = data.caches.moments.path(batch.target[1])  # type: ignore[union-attr]
    hidden = missing.rename(missing.with_suffix(".hidden"))
    try:
        good, bad = next(iter(loader))
        with pytest.warns(UserWarning, match="there: not all pictures of .* are in the cache"):
            data.on_before_batch_transfer((good, bad), 0)
        assert good.moments.target is None
    finally:
        hidden.rename(missing)


def test_a_cache_of_other_weights_or_none_is_refused(plain: tuple[Any, list[dict[str, Any]]], filled: Path, tmp_path: Path) -> None:
    cli, _ = plain
    assert all(open_caches(filled, cli.model, "32-true"))
    shutil.copytree(filled, tmp_path / "copy")
    assert open_caches(tmp_path / "copy", cli.model, "32-true").moments is not None, "a cache may move"
    with pytest.raises(ValueError, match="vision were made with another vision tower or other settings"):
        open_caches(filled, cli.model, "bf16-mixed")
    with torch.no_grad():
        next(cli.model.encoder.vision.parameters()).add_(1)
    with pytest.raises(ValueError, match="vision were made with another vision tower or other settings .*; run `mmgen cache`"):
        open_caches(filled, cli.model, "32-true")
    with torch.no_grad():
        next(cli.model.codec.parameters()).add_(1)
    with pytest.raises(ValueError, match="moments were made with another VAE"):
        open_caches(filled, cli.model, "32-true")
    with pytest.raises(FileNotFoundError, match="nowhere: no such cache"):
        open_caches(tmp_path / "nowhere", cli.model, "32-true")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no cache"):
        open_caches(tmp_path / "empty", cli.model, "32-true")
    next(cli.model.encoder.vision.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match=r"encoder.vision is trained"):
        open_caches(shutil.copytree(next(filled.glob("vision-*")), tmp_path / "v/vision-0").parent, cli.model, "32-true")
