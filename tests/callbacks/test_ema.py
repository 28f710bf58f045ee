from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_mmgen.callbacks import EMA
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Small(L.LightningModule):
    """A trained layer on a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.frozen, self.trained = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)

    def trainable(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.trained(self.frozen(batch)).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trained.parameters(), 0.05)


class Weights(Callback):
    """The trained weights at the start and after each optimizer step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.rows.append({n: p.detach().clone() for n, p in pl_module.trainable().items()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.rows):
            self.on_train_start(trainer, pl_module)


def train(ema: EMA, steps: int, ckpt: Path | None = None, accumulate: int = 1) -> tuple[L.Trainer, Small, list[dict[str, Tensor]]]:
    weights, module = Weights(), Small()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, accumulate_grad_batches=accumulate, callbacks=[weights, ema], **quiet)
    data: Any = torch.randn(1, 4, generator=torch.Generator().manual_seed(1)).expand(60, 4)  # where a resume begins makes no difference
    trainer.fit(module, DataLoader(data, 2), ckpt_path=ckpt, weights_only=True)
    return trainer, module, weights.rows


def plain(rows: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average by its definition, number by number."""
    mean = {n: w.double() for n, w in rows[0].items()}
    for n, row in enumerate(rows[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        mean = {k: d * m + (1 - d) * row[k].double() for k, m in mean.items()}
    return mean


@pytest.mark.parametrize("decay", [0.25, 0.999])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_average_equals_a_plain_loop_over_optimizer_steps(decay: float, accumulate: int) -> None:
    ema = EMA(decay)
    _, _, rows = train(ema, 6, accumulate=accumulate)
    assert len(rows) == 7 and ema.updates == 6
    expected = plain(rows, decay)
    assert set(ema.mean) == set(expected) == {"trained.weight", "trained.bias"}  # what is frozen is not copied
    for name, mean in ema.mean.items():
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(mean, rows[-1][name])


def test_training_is_the_same_without_it() -> None:
    rows = [train(EMA(decay), 4)[2][-1] for decay in (0.1, 0.9)]
    assert all(torch.equal(rows[0][n], rows[1][n]) for n in rows[0])


def test_swapped_puts_the_average_in_and_takes_it_out_exactly() -> None:
    ema = EMA(0.9)
    _, module, _ = train(ema, 4)
    before = {n: w.clone() for n, w in module.state_dict().items()}
    with ema.swapped(module):
        assert all(torch.equal(p, ema.mean[n]) for n, p in module.trainable().items())
        assert torch.equal(module.frozen.weight, before["frozen.weight"])
    with pytest.raises(KeyError), ema.swapped(module):
        raise KeyError
    assert all(torch.equal(w, before[n]) for n, w in module.state_dict().items())


def test_a_resumed_average_is_the_one_of_the_whole_run(tmp_path: Path) -> None:
    whole, first, second = EMA(0.9), EMA(0.9), EMA(0.9)
    train(whole, 6)
    train(first, 3)[0].save_checkpoint(tmp_path / "a.ckpt")
    train(second, 6, ckpt=tmp_path / "a.ckpt")
    assert second.updates == whole.updates == 6
    for name, mean in whole.mean.items():
        torch.testing.assert_close(second.mean[name], mean, rtol=0, atol=1e-6)
        assert second.mean[name].data_ptr() != first.mean[name].data_ptr()


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        EMA(decay)
