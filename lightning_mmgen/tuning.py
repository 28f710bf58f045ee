"""What every LightningModule here shares: the parameter table, terms of the loss, the optimizer, checkpoints of what is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from .checkpoint import AtomicCheckpointIO, trained_weights
from .data.datamodule import MultimodalDataModule
from .losses import AnsweringStep, DenoisingStep, LossTerm
from .models.loading import Weights
from .models.parameters import ParameterTable, Row
from .models.weights import locate
from .optimizer import beside_parameters, make_optimizer
from .ranks import mean
from .shards import part_of, put, shape
from .strategies import Sharing


@dataclass
class LRSchedule:
    """Factor on every row's rate, by optimizer step, whatever the number of devices and the accumulation.

    Args:
        warmup: optimizer steps of linear warm-up.
        decay: ``constant`` after the warm-up, or ``cosine`` or ``linear`` to ``floor`` at the trainer's ``max_steps``, or ``step``: times
            ``gamma`` after ``every`` optimizer steps (torch's StepLR; of an epoch, say).
        floor: the factor at the end.

    Raises:
        ValueError: ``step`` without ``every``.
    """

    warmup: int = 0
    decay: Literal["constant", "cosine", "linear", "step"] = "constant"
    floor: float = 0.0
    gamma: float = 0.85
    every: int | None = None

    def __post_init__(self) -> None:
        if self.decay == "step" and (self.every is None or self.every < 1):
            raise ValueError("schedule.decay: step needs schedule.every, in optimizer steps")

    def factor(self, step: int, max_steps: int) -> float:
        """The factor at an optimizer step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        if self.every is not None and self.decay == "step":
            return float(self.gamma ** (step // self.every))
        done = min((step - self.warmup) / max(max_steps - self.warmup, 1), 1.0)
        left = 1 - done if self.decay == "linear" else 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))
        return self.floor + (1 - self.floor) * left


class TunedModule(L.LightningModule, ABC):
    """A LightningModule whose parts train by rows of a parameter table.

    A subclass builds its parts in :meth:`build`, and there brings them under the table.

    Args:
        parameters: the parameter table; every parameter falls under exactly one row.
        schedule: warm-up and decay of all learning rates.
        betas: of AdamW; Adafactor takes the first.
        start: a checkpoint whose trained weights a fit begins from, with a new optimizer and a new count of steps (MUMU's stage 2 after
            its stage 1); of the same parameter table, or of one that trains less.
    """

    def __init__(self, parameters: Sequence[Row], schedule: LRSchedule, betas: tuple[float, float], start: str | None) -> None:
        super().__init__()
        self.table, self.schedule, self.betas, self.start = ParameterTable(parameters), schedule, betas, start
        self.strict_loading = False  # checkpoints hold what is trained, and are compared with it by name

    def configure_model(self) -> None:
        """Build the parts and bring them under the parameter table; Lightning calls this where the weights are to live."""
        if self.table.states:
            return
        self.check()
        self.build("later" if self.engine and self.engine.reads_parts else True)
        if self.engine:
            self.engine.share(self)
            self.table.hold(self)
        if self.start and self._trainer and not self._trainer.ckpt_path:
            path = locate(self.start) if self.start.startswith("toybox/") else self.start
            checkpoint = AtomicCheckpointIO().load_checkpoint(path, whole=self.engine is None)
            self.load_trained(checkpoint, more=True)
            for term in self.terms():
                term.start_from(checkpoint["callbacks"].get(term.state_key, {}))

    @property
    def engine(self) -> Sharing | None:
        """The strategy, where it shares the parameters or their states among processes."""
        strategy = self._trainer.strategy if self._trainer else None
        return strategy if isinstance(strategy, Sharing) else None

    def roots(self) -> list[nn.Module]:
        """The modules that are cut over processes, each of them called as a whole, those of a list one by one; a subclass leaves out what
        is not."""
        called = [m for child in self.children() for m in (child if isinstance(child, nn.ModuleList) else [child])]
        return [module for module in called if any(True for _ in module.parameters())]

    def check(self) -> None:
        """Raises: ValueError: the trainer cannot train this; asked before anything is built."""

    @abstractmethod
    def build(self, weights: Weights = True) -> None:
        """Create the parts and bring them under the table.

        Args:
            weights: False builds from configurations alone (on the meta device, say); ``later`` leaves out what a strategy will read.
        """

    def apply_table(self, parts: Sequence[str]) -> None:
        """Bring the parts, and those of the loss's terms, under the parameter table; a subclass does so at the end of :meth:`build`.

        Without a trainer there are no terms, and the rows of their parts hold nothing.

        Args:
            parts: dotted names, see :meth:`ParameterTable.apply`.
        """
        own = {name: part for term in self.terms() for name, part in term.parts(self).items()}
        for name, part in own.items():
            self.add_module(name, part)
        if not self._trainer:
            self.table.rows = [row for row in self.table.rows if self._holds(row.match)]
        self.table.apply(self, [*parts, *own])

    def _holds(self, name: str) -> bool:
        """Whether a dotted name, or a pattern of one, begins in a part that is here."""
        return any(fnmatchcase(child, name.split(".")[0]) for child, _ in self.named_children())

    # -- the loss ------------------------------------------------------------------------------------------------------------

    def terms(self) -> list[LossTerm]:
        """The trainer's callbacks that add to the loss."""
        return [c for c in self._trainer.callbacks if isinstance(c, LossTerm)] if self._trainer else []  # type: ignore[attr-defined]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Terms of the loss that look into the forward pass do so within this block."""
        with ExitStack() as stack:
            for term in self.terms():
                stack.enter_context(term.watching(self))
            yield

    def added(self, step: DenoisingStep | AnsweringStep) -> dict[str, Tensor]:
        """What the terms of the loss add in a step, by name, weighted."""
        return {name: term.weight * value for term in self.terms() for name, value in term.compute(step).items()}

    def total(self, terms: dict[str, Tensor], size: int, rows: Sequence[str]) -> Tensor:
        """The sum of the loss's terms, logged with them: means over the samples of all ranks.

        Args:
            size: samples of the batch.
            rows: their names; without any, the sum is zero times what it is (:meth:`.MultimodalDataModule.stand_in`).

        Raises:
            ValueError: it is no number; before it reaches the weights.
        """
        total = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(total):
            values = ", ".join(f"{name} {term.item():g}" for name, term in terms.items())
            raise ValueError(f"loss is {total.item():g} at step {self.global_step} (terms: {values}; rows: {', '.join(rows)})")
        *parts, whole = mean(torch.stack([*terms.values(), total]).detach(), len(rows))
        self.log_dict({f"loss/{name}": part for name, part in zip(terms, parts, strict=True)}, batch_size=size)
        self.log("loss", whole, prog_bar=True, batch_size=size)
        return total if rows else 0 * total

    def on_train_batch_end(self, *_: Any) -> None:
        if isinstance(data := getattr(self.trainer, "datamodule", None), MultimodalDataModule):
            self.log("data/bad_rows", float(len(data.bad)))

    # -- optimizer and checkpoints -------------------------------------------------------------------------------------------

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with AdamW where the strategy cannot run what a row asks for."""
        return self.table.groups(self.engine.optimizers_known if self.engine else None)

    def configure_optimizers(self) -> Any:
        """One group a trained row, and the schedule in optimizer steps."""
        fused = "mixed" not in str(self.trainer.precision)  # Lightning does not clip the gradients of a fused optimizer under autocast
        if self.engine and (others := self.table.unknown(self.engine.optimizers_known)):
            rank_zero_only(print)(f"{type(self.engine).__name__} trains by AdamW, at their own rates: {', '.join(others)}")
        optimizer = make_optimizer(self.groups(), self.betas, fused)
        steps = self.trainer.max_steps
        if self.schedule.decay in ("cosine", "linear") and steps < 1:
            raise ValueError(f"schedule.decay: {self.schedule.decay} needs trainer.max_steps")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: self.schedule.factor(i, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            beside_parameters(optimizer)

    def trainable(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = self.trainable()
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n in names}

    def load_trained(self, checkpoint: dict[str, Any], more: bool = False) -> None:
        """Take over what the checkpoint's run has trained, averaged where it kept an average; the rest of its state stays behind.

        Args:
            checkpoint: as it was read.
            more: this table may train more than the checkpoint's did.

        Raises:
            ValueError: the checkpoint is of another parameter table.
        """
        self.compare(checkpoint, more)
        for name, value in trained_weights(checkpoint).items():
            if self._trainer or self._holds(name):
                put(parameter := self.get_parameter(name), part_of(parameter, value))

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.compare(checkpoint)

    def compare(self, checkpoint: Mapping[str, Any], more: bool = False) -> None:
        """Raises: ValueError: what the checkpoint's run has trained is not what is trained here, or, if this may be ``more``, not a part
        of it."""
        saved = {n: tuple(w.shape) for n, w in checkpoint["state_dict"].items() if self._trainer or self._holds(n)}
        here = {n: shape(p) for n, p in self.trainable().items() if n in saved or not more}
        if names := sorted(n for n in saved.keys() | here.keys() if saved.get(n) != here.get(n)):
            rows, name = ", ".join(sorted({self._row_name(n) for n in names})), names[0]
            how = f"is of shape {saved.get(name)} there and {here.get(name)} here"
            if name not in here or name not in saved:
                how = f"trained only in {'the checkpoint' if name in saved else 'this parameter table'}"
            raise ValueError(
                f"the checkpoint is of another parameter table: rows {rows} differ in {len(names)} tensors, first {name}, {how}"
            )

    def _row_name(self, name: str) -> str:
        """The row of a parameter, which this table may not have."""
        try:
            return self.table.row_of(name).match
        except ValueError:
            return name.split(".")[0]
