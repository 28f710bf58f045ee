"""An encoder with a device of its own, and a quantised one."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_mmgen import cli
from lightning_mmgen.batch import pack
from lightning_mmgen.models.adapter import AdapterConfig
from lightning_mmgen.models.codec import CodecConfig
from lightning_mmgen.models.encoder import Encoder
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.llava import LlavaEncoder
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.models.qwen2_5_vl import Qwen25VLEncoder
from lightning_mmgen.models.unet import UNetConfig
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.optimizer import StackedMuon
from lightning_mmgen.pipeline import MultimodalPipeline
from lightning_mmgen.tools.export import export

from ..second_device import SECOND, SecondDevice
from ..tools.test_export import ADAPTER, LANGUAGE, PROJECTOR, UNET, VISION, drawn

DEVICES = [str(SECOND), *(["cuda:0"] if torch.cuda.is_available() else [])]
ROWS = [VISION, PROJECTOR, LANGUAGE, ADAPTER, UNET]
TEXTS, MARKERS = ["a dog", "place [ref#1] left of [ref#2]"], [[], [1, 2]]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the threads that load weights know nothing of the test's device
    return str(request.param)


def there(device: str) -> AbstractContextManager[Any]:
    """Where the device exists."""
    return SecondDevice() if device == str(SECOND) else nullcontext()


def exact(device: str) -> dict[str, float]:
    """A GPU rounds otherwise than the CPU, with which it is compared."""
    return {"rtol": 0, "atol": 0} if device == str(SECOND) else {"rtol": 1e-3, "atol": 1e-4}


def unbuilt(parts: Path, rows: list[Row], **settings: Any) -> MultimodalDiffusion:
    encoder = Idefics2Encoder(**{"pretrained": str(parts / "vlm"), "image_tokens": 16} | settings)
    unet, codec = UNetConfig(str(parts / "unet"), None), CodecConfig(str(parts / "vae"), None)
    return MultimodalDiffusion(encoder, AdapterConfig(layers=2, heads=2, width=8), unet, codec, tuple(rows))


def placed(parts: Path, rows: list[Row], **settings: Any) -> MultimodalDiffusion:
    """A module of the tiny parts; what it trains has the same values wherever it is."""
    module, numbers = unbuilt(parts, rows, **settings), torch.Generator().manual_seed(1)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.trainable().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=numbers))
    return module.eval()


def devices(part: nn.Module) -> set[str]:
    return {str(t.device) for t in (*part.parameters(), *part.buffers())}


def references() -> list[Any]:
    torch.manual_seed(3)
    return pack([[], [torch.rand(3, 16, 16) * 2 - 1, torch.rand(3, 8, 24) * 2 - 1]])


def gradients(module: MultimodalDiffusion) -> dict[str, Tensor]:
    condition = module.conditioner(TEXTS, MARKERS, references())
    assert str(condition.tokens.device) == str(condition.mask.device) == "cpu"
    (condition.tokens.square().mean() + condition.pooled.square().mean()).backward()  # type: ignore[union-attr]
    return {n: p.grad for n, p in module.trainable().items() if p.grad is not None}


def test_gradients_come_through_the_boundary_as_if_there_were_none(parts: Path, device: str) -> None:
    whole = placed(parts, ROWS)
    expected = gradients(whole)
    assert all(len(row) == 5 for row in whole.table.table())
    with there(device):
        module = placed(parts, ROWS, device=device)
        assert devices(module.encoder) == {device} and devices(module.adapter) == devices(module.unet) == {"cpu"}
        assert [row[5] for row in module.table.table()] == ["device", device, device, device, "", "", ""]
        assert module.table.markdown().splitlines()[1].count("---") == 6
        found = gradients(module)
        assert {n: str(g.device) for n, g in found.items() if n.startswith("encoder")} == dict.fromkeys(
            (n for n in expected if n.startswith("encoder")), device
        )
        assert_close({n: g.cpu() for n, g in found.items()}, expected, **exact(device))
    assert any(n.startswith("encoder.language") and g.abs().sum() > 0 for n, g in expected.items())


def test_pictures_and_token_ids_go_there_and_hidden_states_come_back(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with SecondDevice() as second:
        module, given = placed(parts, ROWS, device=str(SECOND)), references()
        second.crossed.clear()
        condition = module.conditioner(TEXTS, MARKERS, given)
        b, n = condition.mask.shape
        words, pixels = [("cpu", "cpu:1", torch.Size([b, n])), ("cpu", "cpu:1", torch.Size([b]))], [g.pixels.shape for g in given]
        states = [("cpu:1", "cpu", torch.Size([b, n, 24])), ("cpu:1", "cpu", torch.Size([b, n]))]
        assert [(b, n), len(pixels)] == [condition.tokens.shape[:2], 2]
        assert second.crossed == [*(("cpu", "cpu:1", shape) for shape in pixels), *words, *states]
        second.crossed.clear()
        condition.tokens.square().mean().backward()
        assert second.crossed == [("cpu", "cpu:1", torch.Size([b, n, 24]))]


def test_tensors_of_two_devices_do_not_mix() -> None:
    with SecondDevice(), pytest.raises(RuntimeError, match="two devices"):
        torch.ones(2) + torch.ones(2, device=SECOND)


def test_an_encoder_with_a_device_of_its_own_changes_its_dtype_but_not_its_place(vlm: Path, device: str) -> None:
    with there(device):
        encoder = Idefics2Encoder(str(vlm), image_tokens=16, device=device)
        encoder.build()
        whole = nn.Sequential(encoder, nn.Linear(1, 1))
        for moved in (whole.to("cpu"), whole.cpu(), whole.bfloat16(), whole.to("meta")):
            assert devices(moved[0]) == {device}
        assert {p.dtype for p in whole.parameters()} == {torch.bfloat16} and devices(whole[1]) == {"meta"}
    free = Idefics2Encoder(str(vlm), image_tokens=16)
    free.build()
    assert devices(nn.Sequential(free).to("meta")) == {"meta"}


def fit(experiment: Path, name: str, *more: str) -> dict[str, Any]:
    """The last checkpoint of a run that clips gradients by their norm."""
    cli.main(["fit", "-c", str(experiment), "--trainer.gradient_clip_val=0.01", f"--trainer.logger.init_args.name={name}", *more])
    return dict(torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True, map_location="cpu"))


def test_a_run_goes_on_across_two_devices_as_on_one(
    device: str, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its gradients clipped by their norm over both, each row with an optimizer of its own."""
    monkeypatch.chdir(tmp_path)
    text = experiment.read_text()
    for rate, optimizer in (("1.0e-2", "adafactor"), ("2.0e-2", "muon"), ("4.0e-2", "muon")):
        text = text.replace(f"rank: 2, lr: {rate}", f"rank: 2, optimizer: {optimizer}, lr: {rate}")
    (here := tmp_path / "experiment.yaml").write_text(text)
    fit(here, "start", "--trainer.max_steps=1")
    start = "--ckpt_path=runs/start/version_0/checkpoints/last.ckpt"
    whole = fit(here, "whole", start)
    with there(device):
        split = fit(here, "split", start, f"--model.init_args.encoder.init_args.device={device}")
        assert f"  {device}\n" in capsys.readouterr().out
    assert split["global_step"] == whole["global_step"] == 2
    moments = [{f"{i}.{k}": v for i, of in run["optimizer_states"][0]["state"].items() for k, v in of.items()} for run in (split, whole)]
    tensors = [{k: v for k, v in of.items() if isinstance(v, Tensor)} for of in moments]
    assert len(tensors[1]) > len(whole["state_dict"]) > 0
    assert_close(tensors[0], tensors[1], **exact(device))
    assert_close(split["state_dict"], whole["state_dict"], **exact(device))


def test_muon_stacks_what_lies_on_one_device(device: str) -> None:
    with there(device):
        together = [nn.Parameter(torch.eye(4).to(d)) for d in ("cpu", device, "cpu", device)]
        alone = [nn.Parameter(torch.eye(4)) for _ in together]
        for matrices in (together, alone):
            for k, matrix in enumerate(matrices):
                matrix.grad = (torch.arange(16.0).view(4, 4).roll(k) - 7).to(matrix.device)
            StackedMuon(matrices, lr=0.1, momentum=0.9).step()
        assert_close([m.detach().cpu() for m in together], [m.detach() for m in alone], **exact(device))


def test_an_export_knows_no_device_and_takes_one(parts: Path, tmp_path: Path, device: str) -> None:
    rows = [VISION, Row("encoder.projector", "full", lr=1e-3), LANGUAGE, ADAPTER, UNET]
    expected = drawn(MultimodalPipeline.of(placed(parts, rows)).frozen())
    with there(device):
        module = placed(parts, rows, device=device)
        folder = export(module, tmp_path / "model")
        assert_close(drawn(MultimodalPipeline.of(module).frozen()), expected, **exact(device))
        pipeline = MultimodalPipeline.from_pretrained(folder, encoder_device=device).to("cpu")
        assert devices(pipeline.encoder) == {device}
        assert_close(drawn(pipeline), expected, **exact(device))
    assert_close(drawn(MultimodalPipeline.from_pretrained(folder)), expected, **exact(device))
    assert device not in (folder / "model_index.json").read_text()


def test_several_processes_refuse_a_device_of_the_encoders_own(parts: Path) -> None:
    module = unbuilt(parts, ROWS, device="cpu")
    module.trainer = L.Trainer(accelerator="cpu", devices=2, logger=False)
    with pytest.raises(ValueError, match="encoder.device: cpu is for one process"):
        module.configure_model()


# -- quantised: the toybox's VLM, as bitsandbytes' CPU kernels take widths that are multiples of a block, 64 --------------------


def built(kind: type[Encoder], pretrained: str, **settings: Any) -> Encoder:
    encoder = kind(pretrained, image_tokens=16, **settings)
    encoder.build()
    return encoder.eval()


QUANTISED = {"nf4": Linear4bit, "int8": Linear8bitLt}


@pytest.mark.parametrize("quantization", QUANTISED)
def test_the_linear_layers_of_the_language_model_are_quantised_and_no_others(quantization: str, vlm: Path, qwen: Path, llava: Path) -> None:
    for kind, folder in ((Idefics2Encoder, vlm), (Qwen25VLEncoder, qwen), (LlavaEncoder, llava)):
        encoder = built(kind, str(folder), quantization=quantization)
        found = {n: isinstance(m, QUANTISED[quantization]) for n, m in encoder.named_modules() if isinstance(m, nn.Linear)}
        assert found == {n: n.startswith("language.") for n in found} and any(found.values())


@pytest.mark.parametrize(("quantization", "error"), [("nf4", 0.15), ("int8", 0.03)])
def test_a_quantised_encoder_says_nearly_the_same(quantization: str, error: float) -> None:
    plain, quantised = (built(Idefics2Encoder, "toybox/vlm", **settings) for settings in ({}, {"quantization": quantization}))
    a, b = (encoder(TEXTS, MARKERS, references()).tokens for encoder in (plain, quantised))
    assert 0 < (a - b).norm() / a.norm() < error


def test_nf4_weights_are_those_of_a_plain_recomputation() -> None:
    """Blocks of 64, each by its largest absolute value, rounded to the nearest of 16 quantiles (Dettmers et al. 2023, section 3)."""
    plain, quantised = built(Idefics2Encoder, "toybox/vlm"), built(Idefics2Encoder, "toybox/vlm", quantization="nf4")
    normal, tail = torch.distributions.Normal(0, 1), 0.9677083
    positive, negative = (normal.icdf(torch.linspace(tail, 0.5, count)[:-1]) for count in (9, 8))
    levels = torch.cat([-negative, torch.zeros(1), positive]) / positive.max()
    weight = plain.language.get_submodule("layers.0.self_attn.q_proj").weight.detach()
    layer = quantised.language.get_submodule("layers.0.self_attn.q_proj")
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = levels[(blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale
    found = dequantize_4bit(layer.weight.data, layer.weight.quant_state).view(-1, 64)
    assert layer.weight.numel() == weight.numel() // 2 and layer.weight.quant_state.nested  # two to a byte; the scales are quantised too
    assert ((found - nearest).abs() < 0.02 * scale.max()).all()


@pytest.mark.parametrize("quantization", QUANTISED)
def test_lora_trains_on_a_quantised_encoder_and_an_export_draws_the_same(quantization: str, parts: Path, tmp_path: Path) -> None:
    rows = [VISION, PROJECTOR, replace(LANGUAGE, checkpointing=True), ADAPTER, UNET]
    module, plain = (placed(parts, rows, pretrained="toybox/vlm", **more) for more in ({"quantization": quantization}, {}))
    assert module.table.table() == plain.table.table()  # the counts are of weights, not of bytes
    picture = drawn(MultimodalPipeline.of(module))  # before the steps: evaluation leaves the backward pass whole
    before = {n: p.clone() for n, p in module.encoder.state_dict().items() if ".lora_" not in n}
    lora = [p for n, p in module.named_parameters() if "encoder.language" in n and ".lora_" in n]
    layers = {type(m) for m in module.encoder.language.modules() if isinstance(m, BaseTunerLayer)}
    assert {kind.__module__ for kind in layers} == {"peft.tuners.lora.bnb"}  # and not the LoRA of plain layers
    optimizer, losses = torch.optim.AdamW(module.table.groups()), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = module.train().conditioner(TEXTS, MARKERS, references()).tokens.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora)
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, module.encoder.state_dict()[n]) for n, v in before.items())
    trained = drawn(MultimodalPipeline.of(module.eval()).frozen())
    assert not torch.allclose(trained, picture, atol=1e-3)
    pipeline = MultimodalPipeline.from_pretrained(export(module, tmp_path / "model"))
    assert pipeline.encoder.quantization == quantization
    assert torch.equal(drawn(pipeline), trained)


def test_quantised_weights_are_not_fully_trained(parts: Path) -> None:
    module = unbuilt(parts, [Row("encoder", "full", lr=1e-3), ADAPTER, UNET], quantization="nf4")
    with pytest.raises(ValueError, match="'encoder': the weights are quantised"):
        module.configure_model()


@pytest.mark.parametrize("settings", [{"quantization": "nf4"}, {"quantization": "int8", "device": "cpu"}])
def test_without_bitsandbytes_one_line_says_what_to_install(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'lightning_mmgen\[quantization\]'$"):
        Idefics2Encoder("no/such-model", image_tokens=16, **settings).build()


def test_a_device_that_is_not_here_is_one_line(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning", "fit", "-c", str(experiment), "--model.init_args.encoder.init_args.device=cuda:77"])
    assert cli.command() == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: encoder.device: cuda:77 is not here (")
    with pytest.raises(ValueError, match="encoder.device: nowhere is not here"):
        Idefics2Encoder("no/such-model", image_tokens=16, device="nowhere").build()


def test_an_unknown_quantisation_raises() -> None:
    with pytest.raises(ValueError, match="quantization must be nf4 or int8, not 'fp3'"):
        Idefics2Encoder("nowhere", image_tokens=16, quantization="fp3")
