from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from lightning_mmgen.batch import pack
from lightning_mmgen.models.adapter import Adapter
from lightning_mmgen.models.codec import Codec
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.parameters import ATTENTION, ParameterTable, Row
from lightning_mmgen.models.unet import denoise

PARTS = ("encoder", "adapter", "unet")
MUMU = [
    Row("encoder.vision", "frozen"),
    Row("encoder.projector", "lora", rank=8, lr=3e-6),
    Row("encoder.language", "lora", rank=8, lr=3e-6),
    Row("adapter", "full", lr=1e-5),
    Row("unet", "lora", rank=8, lr=5e-6),
]
FROZEN = [Row(part, "frozen") for part in PARTS]


class Model(nn.Module):
    """What a table is applied to: encoder, adapter, UNet and codec, under those names."""

    def __init__(self, encoder: Idefics2Encoder, adapter: Adapter, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.adapter, self.unet, self.codec = encoder, adapter, unet, Codec(vae)

    def forward(self) -> Tensor:
        """A prediction of one sample with one reference."""
        generator = torch.Generator().manual_seed(3)
        picture, z_t = torch.rand(3, 16, 16, generator=generator), torch.randn(1, 4, 8, 8, generator=generator)
        condition = self.adapter(self.encoder(["a [ref#1] dog"], [[1]], pack([[picture]])))
        return denoise(self.unet, z_t, torch.tensor([500]), condition, (16, 16))


@pytest.fixture
def model(encoder: Idefics2Encoder, adapter: Adapter, unet: UNet2DConditionModel, vae: AutoencoderKL) -> Model:
    return Model(encoder, adapter, unet, vae)


def applied(model: Model, rows: list[Row]) -> ParameterTable:
    table = ParameterTable(rows)
    table.apply(model, PARTS)
    return table


def lora_layers(part: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in part.named_modules() if hasattr(m, "lora_A")}


def linears(part: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in part.named_modules() if isinstance(m, nn.Linear)}


# -- which row -----------------------------------------------------------------------------------------------------------------


def test_the_most_specific_row_wins() -> None:
    rows = [Row("*", "frozen"), Row("unet", "frozen"), Row("unet.*.attentions", "frozen"), Row("unet.mid_block.attentions", "frozen")]
    table = ParameterTable([*rows, Row("codec", "frozen"), Row("*.vae", "frozen")])
    for name, match in (
        ("codec.vae.weight", "*.vae"),  # more parts go before more letters
        ("adapter.x.weight", "*"),
        ("unet.conv_in.weight", "unet"),
        ("unet.down.attentions.0.weight", "unet.*.attentions"),
        ("unet.mid_block.attentions.0.weight", "unet.mid_block.attentions"),
        ("unet.mid_block.resnets.0.weight", "unet"),
    ):
        assert table.row_of(name).match == match, name


def test_a_row_covers_whole_names_only() -> None:
    row = Row("unet.conv", "frozen")
    assert row.covers("unet.conv") and row.covers("unet.conv.weight")
    assert not row.covers("unet.conv_in.weight") and not row.covers("unet") and not row.covers("my.unet.conv")


def test_a_row_that_matches_nothing_raises_and_names_it(model: Model) -> None:
    with pytest.raises(ValueError, match="'unet.down_blocks.7' matches nothing.*adapter, codec, encoder, unet"):
        applied(model, [*FROZEN, Row("unet.down_blocks.7", "full", lr=1e-4)])


def test_a_row_whose_parameters_all_fall_under_others_matches_nothing(model: Model) -> None:
    rows = [Row("encoder", "frozen"), *(Row(f"encoder.{p}", "frozen") for p in ("vision", "projector", "language")), *FROZEN[1:]]
    with pytest.raises(ValueError, match="'encoder' matches nothing"):
        applied(model, rows)


def test_a_parameter_without_a_row_raises_and_is_named(model: Model) -> None:
    with pytest.raises(ValueError, match=r"encoder\.projector\.\S+ falls under no row"):
        applied(model, [Row("encoder.vision", "frozen"), Row("encoder.language", "frozen"), *FROZEN[1:]])


def test_two_equally_specific_rows_raise(model: Model) -> None:
    with pytest.raises(ValueError, match=r"unet\.down_blocks\.\S+ falls under two equally .* rows: 'unet\.down\*' and 'unet\.\*ocks'"):
        applied(model, [*FROZEN, Row("unet.down*", "frozen"), Row("unet.*ocks", "frozen")])


def test_one_pattern_twice_raises() -> None:
    with pytest.raises(ValueError, match="'unet' is given twice"):
        ParameterTable([Row("unet", "frozen"), Row("unet", "full", lr=1e-4)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"train": "frozen", "lr": 1e-4}, "frozen row has no lr"),
        ({"train": "full"}, "full needs a positive lr"),
        ({"train": "full", "lr": 1e-4, "optimizer": "sgd"}, "'unet': optimizer must be one of adamw, muon, adafactor, not 'sgd'"),
        ({"train": "lora", "lr": 0.0}, "lora needs a positive lr"),
        ({"train": "lora", "lr": 1e-4, "rank": 0}, "rank must be 1 or more"),
    ],
)
def test_rows_that_contradict_themselves_raise(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row("unet", **row)


def test_the_codec_is_frozen_unless_a_row_covers_it(model: Model) -> None:
    applied(model, FROZEN)
    assert not any(p.requires_grad for p in model.codec.parameters())
    rows = [*FROZEN, Row("codec", "frozen", dtype="bfloat16")]
    assert len(ParameterTable(rows).rows) == 4
    applied(model, rows)
    assert all(p.dtype == torch.bfloat16 for p in model.codec.parameters())
    for train in ("lora", "full"):
        with pytest.raises(ValueError, match="codec is not trained"):
            Row("codec.vae", train, lr=1e-4)


# -- how it trains -------------------------------------------------------------------------------------------------------------


def test_frozen_lora_and_full_are_really_set(model: Model) -> None:
    applied(model, MUMU)
    for name, parameter in model.named_parameters():
        part = name.split(".")[0] if not name.startswith("encoder.") else ".".join(name.split(".")[:2])
        expected = part == "adapter" or (part in ("encoder.projector", "encoder.language", "unet") and ".lora_" in name)
        assert parameter.requires_grad == expected, name
    assert lora_layers(model.encoder.projector).keys() == {"gate_proj", "up_proj", "down_proj"}
    assert not lora_layers(model.encoder.vision) and not lora_layers(model.adapter)
    for part in (model.encoder.language, model.unet):
        names = list(lora_layers(part))
        assert names and all(any(n.endswith("." + e) for e in ATTENTION) for n in names)


def test_only_what_is_trained_moves_and_all_of_it_does(model: Model) -> None:
    table = applied(model, MUMU)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(table.groups(), weight_decay=0.0)
    for _ in range(2):  # in the first step lora_A gets no gradient, since lora_B is 0
        optimizer.zero_grad()
        model().square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name


def test_the_fresh_model_computes_what_it_did_without_lora(model: Model) -> None:
    before = model()
    applied(model, MUMU)
    torch.testing.assert_close(model(), before, rtol=0, atol=1e-5)


def test_each_row_of_one_part_has_its_own_rank_and_alpha(model: Model) -> None:
    rows = [
        Row("encoder.vision", "lora", lr=1e-4, rank=2),
        Row("encoder.projector", "lora", lr=1e-4, rank=3, alpha=12),
        Row("encoder.language", "lora", lr=1e-4, rank=5, alpha=2.5),
        Row("encoder.language.layers.1", "lora", lr=1e-4, rank=5, alpha=20),
        *FROZEN[1:],
    ]
    applied(model, rows)
    expected = {"vision": (2, 1.0), "projector": (3, 4.0), "language": (5, 0.5), "language.layers.1": (5, 4.0)}
    for name, layer in lora_layers(model.encoder).items():
        rank, scaling = expected["language.layers.1" if name.startswith("language.layers.1") else name.split(".")[0]]
        assert layer.lora_A["default"].weight.shape == (rank, layer.in_features), name
        assert layer.lora_B["default"].weight.shape == (layer.out_features, rank), name
        assert layer.scaling["default"] == scaling, name
    assert {n.split(".")[0] for n in lora_layers(model.encoder)} == {"vision", "projector", "language"}


def test_alpha_and_rank_act_on_the_output(model: Model) -> None:
    applied(model, [*FROZEN[:2], Row("unet", "lora", lr=1e-4, rank=2, alpha=6)])
    name, layer = next(iter(lora_layers(model.unet).items()))
    x = torch.randn(3, layer.in_features)
    nn.init.normal_(layer.lora_B["default"].weight)
    plain = layer.base_layer(x) + 6 / 2 * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), plain, msg=name)


def test_target_modules_choose_the_layers(model: Model) -> None:
    rows = [*FROZEN[:2], Row("unet", "lora", lr=1e-4, target_modules=["attn2.to_k", "to_v"])]
    applied(model, rows)
    names = list(lora_layers(model.unet))
    assert any(n.endswith("attn1.to_v") for n in names)
    assert all(n.endswith(("attn2.to_k", "to_v")) for n in names) and any(n.endswith("attn2.to_k") for n in names)


@pytest.mark.parametrize("row", [Row("unet", "lora", lr=1e-4, target_modules=["to_x"]), Row("unet.conv_in", "lora", lr=1e-4)])
def test_lora_that_finds_no_layer_raises(model: Model, row: Row) -> None:
    with pytest.raises(ValueError, match=f"'{row.match}': no linear layer"):
        applied(model, [r for r in FROZEN if r.match != row.match] + [row])


def test_lora_dropout_is_set_and_must_agree_within_a_part(model: Model) -> None:
    with pytest.raises(ValueError, match=r"encoder: LoRA rows with different dropouts \[0.0, 0.1\]"):
        applied(model, [Row("encoder", "lora", lr=1e-4), Row("encoder.language", "lora", lr=1e-4, dropout=0.1), *FROZEN[1:]])
    applied(model, [*FROZEN[:2], Row("unet", "lora", lr=1e-4, dropout=0.25)])
    assert {m.lora_dropout["default"].p for m in lora_layers(model.unet).values()} == {0.25}


def test_lora_in_the_adapter_learns_and_acts_in_inference_too(model: Model) -> None:
    applied(model, [FROZEN[0], Row("adapter", "lora", lr=1e-4), FROZEN[2]])
    start = model()
    start.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for name, parameter in model.adapter.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    train = model()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(), train, rtol=0, atol=1e-5)
    assert (train - start).abs().max() > 1e-4


def test_a_full_row_inside_a_lora_part_keeps_its_gradient(model: Model) -> None:
    inside = [Row(name, "full", lr=1e-3) for name in ("unet.conv_in", "unet.mid_block.attentions.*.*.*.attn1")]
    table = applied(model, [*FROZEN[:2], Row("unet", "lora", lr=1e-4), *inside])
    assert all(p.requires_grad for p in model.unet.conv_in.parameters())
    inner = model.unet.mid_block.attentions[0].transformer_blocks[0]
    assert not lora_layers(inner.attn1) and lora_layers(inner.attn2)
    model().square().sum().backward()
    assert model.unet.conv_in.weight.grad is not None and model.unet.conv_in.weight.grad.abs().sum() > 0
    assert inner.attn1.to_q.weight.grad is not None and inner.attn2.to_q.base_layer.weight.grad is None
    assert {g["name"]: len(g["params"]) for g in table.groups()}["unet.conv_in"] == 2


def test_a_frozen_row_inside_a_lora_part_stays_without_lora(model: Model) -> None:
    applied(model, [*FROZEN[:2], Row("unet", "lora", lr=1e-4), Row("unet.mid_block", "frozen")])
    assert not lora_layers(model.unet.mid_block) and lora_layers(model.unet.down_blocks)


# -- dtype and checkpointing ---------------------------------------------------------------------------------------------------


def test_dtype_converts_frozen_weights_only(model: Model) -> None:
    rows = [
        Row("encoder.vision", "frozen", dtype="bfloat16"),
        Row("encoder.projector", "full", lr=1e-4),
        Row("encoder.language", "lora", lr=1e-4, dtype="bfloat16"),
        Row("adapter", "full", lr=1e-4),
        Row("unet", "lora", lr=1e-4, dtype="bfloat16"),
    ]
    applied(model, rows)
    for name, parameter in model.named_parameters():
        low = not parameter.requires_grad and not name.startswith("codec")
        assert parameter.dtype == (torch.bfloat16 if low else torch.float32), name
    with pytest.raises(ValueError, match="float32"):
        Row("adapter", "full", lr=1e-4, dtype="bfloat16")
    model().float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n)


VISION_LAYER, LANGUAGE_LAYER = "encoder.vision.encoder.layers.0.mlp", "encoder.language.layers.0.mlp"


@pytest.mark.parametrize(
    ("match", "module", "others"),
    [
        ("encoder.language", LANGUAGE_LAYER, [VISION_LAYER, "adapter.blocks.0"]),
        ("encoder.vision", VISION_LAYER, [LANGUAGE_LAYER]),
        ("adapter", "adapter.blocks.0", [LANGUAGE_LAYER, "unet.mid_block.resnets.1"]),
        ("unet", "unet.mid_block.resnets.1", ["adapter.blocks.0"]),
    ],
)
def test_checkpointing_recomputes_the_row_and_nothing_else(model: Model, match: str, module: str, others: list[str]) -> None:
    rows = [Row(r.match, "full" if r.match != "unet" else "lora", lr=1e-4, checkpointing=r.match == match) for r in MUMU]
    calls = dict.fromkeys((module, *others), 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        model.get_submodule(name).register_forward_pre_hook(count(name))
    applied(model, rows)
    model().square().sum().backward()
    assert calls == {module: 2} | dict.fromkeys(others, 1)


def test_checkpointing_gives_equal_gradients(model: Model) -> None:
    applied(model, [Row(p, "full", lr=1e-4) for p in PARTS])
    model().square().sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    applied(model, [Row(r.match, "full", lr=1e-4, checkpointing=r.match != "encoder.projector") for r in MUMU])
    model().square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("vision", [True, False])
def test_checkpointing_reaches_all_outermost_modules_of_the_row(model: Model, vision: bool) -> None:
    own = [] if vision else [Row("encoder.vision", "full", lr=1e-4)]
    applied(model, [Row("encoder", "full", lr=1e-4, checkpointing=True), *own, *FROZEN[1:]])
    assert model.encoder.language.layers[0].gradient_checkpointing
    assert model.encoder.vision.encoder.layers[0].gradient_checkpointing == vision


def test_checkpointing_where_nothing_supports_it_raises(model: Model) -> None:
    with pytest.raises(ValueError, match="'encoder.projector': nothing there supports activation checkpointing"):
        applied(model, [*FROZEN, Row("encoder.projector", "full", lr=1e-4, checkpointing=True)])


# -- counts, groups and the printed table --------------------------------------------------------------------------------------


def test_counts_equal_a_plain_recount(model: Model) -> None:
    names = [r.match for r in MUMU] + ["codec"]
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in names}
    added = {}
    for part in ("encoder.projector", "encoder.language", "unet"):
        layers = linears(model.get_submodule(part))
        chosen = [m for n, m in layers.items() if part == "encoder.projector" or any(n.endswith("." + e) for e in ATTENTION)]
        added[part] = sum(8 * (m.in_features + m.out_features) for m in chosen)
    table = applied(model, MUMU)
    assert {s.row.match: s.trainable for s in table.states} == {"encoder.vision": 0, "adapter": sizes["adapter"], "codec": 0} | added
    assert {s.row.match: s.total for s in table.states} == {part: size + added.get(part, 0) for part, size in sizes.items()}


def test_groups_carry_names_rates_and_all_that_is_trained(model: Model) -> None:
    rows = [*MUMU[:4], Row("unet", "lora", lr=5e-6, weight_decay=0.25)]
    groups = applied(model, rows).groups()
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("encoder.projector", 3e-6, 0.01),
        ("encoder.language", 3e-6, 0.01),
        ("adapter", 1e-5, 0.01),
        ("unet", 5e-6, 0.25),
    ]
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups)
    assert [g["lr"] for g in optimizer.param_groups] == [3e-6, 3e-6, 1e-5, 5e-6]


def test_the_printed_table_has_the_shape_of_mumus_table_1(model: Model) -> None:
    table = applied(model, MUMU)
    rows = table.table()
    assert [r[:3] for r in rows] == [
        ("module", "training", "learning rate"),
        ("encoder.vision", "not trained", "-"),
        ("encoder.projector", "LoRA rank 8", "3e-06"),
        ("encoder.language", "LoRA rank 8", "3e-06"),
        ("adapter", "fully trained", "1e-05"),
        ("unet", "LoRA rank 8", "5e-06"),
        ("codec", "not trained", "-"),
    ]
    counts = [tuple(int(c.replace(",", "")) for c in r[3:]) for r in rows[1:]]
    assert counts == [(s.trainable, s.total) for s in table.states]
    lines = str(table).splitlines()
    assert len(lines) == 8 and len({len(line) for line in lines}) == 1 and set(lines[1]) == {"-"}
    assert all(cell in line for row, line in zip(rows, [lines[0], *lines[2:]], strict=True) for cell in row)
    assert table.markdown().splitlines()[:2] == [" | ".join(rows[0]), "--- | --- | --- | --- | ---"]
