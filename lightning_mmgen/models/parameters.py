"""The parameter table: how each module trains, in the shape of MUMU's Table 1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from .loading import present
from .placement import count

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj")

OptimizerName = Literal["adamw", "muon", "adafactor"]


@dataclass
class Row:
    """One row of the table.

    Args:
        match: a module's dotted name, ``*`` within a name allowed: the row holds all that lies below it.
        train: ``frozen``, ``lora`` or ``full``.
        lr: peak learning rate; needed unless frozen.
        rank, alpha, dropout: of LoRA; alpha is the rank if none is given.
        target_modules: ends of the names of the linear layers that get LoRA; by default the attention projections below the row,
            or every linear layer where there are none.
        weight_decay: decoupled, as in AdamW.
        optimizer: ``adamw``; ``muon`` for the row's matrices and kernels (its vectors stay with AdamW, at the same rate); ``adafactor``
            (Instruct-Imagen) for all of the row.
        dtype: of the frozen weights (``bfloat16``, say); what is trained is float32.
        checkpointing: recompute activations in the backward pass.
    """

    match: str
    train: Literal["frozen", "lora", "full"]
    lr: float | None = None
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | None = None
    weight_decay: float = 0.01
    optimizer: OptimizerName = "adamw"
    dtype: str | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.train == "frozen" and self.lr is not None:
            raise ValueError(f"parameter row {self.match!r}: a frozen row has no lr")
        if self.train != "frozen" and (self.lr is None or self.lr <= 0):
            raise ValueError(f"parameter row {self.match!r}: {self.train} needs a positive lr")
        if self.train == "full" and self.dtype not in (None, "float32"):
            raise ValueError(f"parameter row {self.match!r}: what is fully trained is float32; use trainer.precision for its arithmetic")
        if self.train != "frozen" and self.match.split(".")[0] == "codec":
            raise ValueError(f"parameter row {self.match!r}: the codec is not trained here")
        if self.train == "lora" and self.rank < 1:
            raise ValueError(f"parameter row {self.match!r}: rank must be 1 or more")
        if self.optimizer not in (known := get_args(OptimizerName)):
            raise ValueError(f"parameter row {self.match!r}: optimizer must be one of {', '.join(known)}, not {self.optimizer!r}")

    def covers(self, name: str) -> bool:
        """Whether a dotted name is the row's module or lies below it."""
        parts, pattern = name.split("."), self.match.split(".")
        return len(parts) >= len(pattern) and all(fnmatchcase(a, b) for a, b in zip(parts, pattern, strict=False))

    @property
    def rank_of_match(self) -> tuple[int, int]:
        """How specific the pattern is: its parts, then its literal characters."""
        return self.match.count("."), len(self.match.replace("*", ""))


@dataclass
class RowState:
    """What a row came to hold, for the printed table, the optimizer and the export."""

    row: Row
    total: int = 0
    trainable: int = 0
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    device: str = ""
    """Where it lives, if that is not the default device."""


class ParameterTable:
    """Applies rows to a module: freezes, adds LoRA through PEFT, sets dtypes, and groups what is trained.

    Args:
        rows: the table; a row ``codec: frozen`` is added where none covers it, for a module that has one.

    Raises:
        ValueError: two rows with one pattern.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self._codec = list(rows), Row("codec", "frozen")
        if not any(r.match.split(".")[0] == "codec" for r in rows):
            self.rows.append(self._codec)
        names = [r.match for r in self.rows]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"parameter row {twice[0]!r} is given twice")
        self.states: list[RowState] = []

    def row_of(self, name: str) -> Row:
        """The most specific row that covers a dotted name.

        Raises:
            ValueError: no row, or two equally specific ones.
        """
        covering = [r for r in self.rows if r.covers(name)]
        if not covering:
            raise ValueError(f"parameter {name} falls under no row of the table; add one (train: frozen, lora or full)")
        best = max(r.rank_of_match for r in covering)
        winners = [r for r in covering if r.rank_of_match == best]
        if len(winners) > 1:
            raise ValueError(f"parameter {name} falls under two equally specific rows: {winners[0].match!r} and {winners[1].match!r}")
        return winners[0]

    def apply(self, root: nn.Module, parts: Iterable[str]) -> None:
        """Bring ``root``'s parameters under the table. LoRA is injected a part at a time, so that each part saves in its own format.

        Args:
            parts: dotted names of the parts, such as ``encoder.language`` and ``unet``.

        Raises:
            ValueError: a row that matches nothing, a parameter without a row, LoRA dropouts that differ in a part, LoRA without a layer.
        """
        names = [n for n, _ in root.named_parameters()]
        held = {id(self.row_of(n)) for n in names}
        self.rows = [row for row in self.rows if row is not self._codec or id(row) in held]
        for row in self.rows:
            if id(row) not in held:
                raise ValueError(
                    f"parameter row {row.match!r} matches nothing; the parts are {', '.join(sorted({n.split('.')[0] for n in names}))}"
                )
        for name, parameter in root.named_parameters():
            row = self.row_of(name)
            if row.train == "full" and not parameter.dtype.is_floating_point:
                raise ValueError(f"parameter row {row.match!r}: the weights are quantised; they train by lora, or not at all")
            parameter.requires_grad_(row.train == "full")
            if row.train == "full":
                parameter.data = parameter.data.float()
            elif row.dtype and parameter.dtype.is_floating_point:
                parameter.data = parameter.data.to(getattr(torch, row.dtype))
        for part in parts:
            self._inject(root.get_submodule(part), part)
        for row in self.rows:
            if row.checkpointing:
                self._checkpoint(root, row)
        self.hold(root)

    def _inject(self, part: nn.Module, name: str) -> None:
        """Add the LoRA layers of all rows that reach into one part, as one PEFT adapter with rank and alpha patterns."""
        chosen: dict[str, Row] = {}
        for row in (r for r in self.rows if r.train == "lora"):
            linear = [n for n, m in part.named_modules() if _takes_lora(m) and self.row_of(f"{name}.{n}.weight") is row]
            ends = row.target_modules or [e for e in ATTENTION if any(_ends(n, e) for n in linear)] or linear
            for n in linear:
                if any(_ends(n, e) for e in ends):
                    chosen[n] = row
        if not chosen:
            return
        if len(dropouts := {r.dropout for r in chosen.values()}) > 1:
            raise ValueError(f"{name}: LoRA rows with different dropouts {sorted(dropouts)}; PEFT takes one a part")
        first = next(iter(chosen.values()))
        config = LoraConfig(
            r=first.rank,
            lora_alpha=first.alpha or first.rank,
            lora_dropout=first.dropout,
            target_modules="|".join(re.escape(n) for n in chosen),
            rank_pattern={f"^{re.escape(n)}$": r.rank for n, r in chosen.items() if r.rank != first.rank},
            alpha_pattern={
                f"^{re.escape(n)}$": r.alpha or r.rank for n, r in chosen.items() if (r.alpha or r.rank) != (first.alpha or first.rank)
            },
        )
        trained = [p for p in part.parameters() if p.requires_grad]
        with present(part.get_submodule(n) for n in chosen):
            inject_adapter_in_model(config, part)
        for p in trained:  # injection freezes all but the LoRA layers
            p.requires_grad_(True)
        for n, p in part.named_parameters():
            if ".lora_" in n:
                p.data = p.data.float()

    def _checkpoint(self, root: nn.Module, row: Row) -> None:
        """Switch on activation checkpointing in the outermost modules of the row that offer it."""
        found: list[str] = []
        for name, module in root.named_modules():
            if not row.covers(name) or self.row_of(name) is not row or any(name.startswith(f + ".") for f in found):
                continue
            if hasattr(module, "gradient_checkpointing_enable"):
                module.gradient_checkpointing_enable({"use_reentrant": False})
                module.train()  # else transformers does not recompute
                found.append(name)
            elif hasattr(module, "enable_gradient_checkpointing"):
                module.enable_gradient_checkpointing()
                found.append(name)
        if not found:
            raise ValueError(f"parameter row {row.match!r}: nothing there supports activation checkpointing")

    def hold(self, root: nn.Module) -> None:
        """Note each row's parameters, and how many weights they are; again where a strategy has replaced them."""
        states, default = {id(r): RowState(r) for r in self.rows}, torch.get_default_device()
        for name, p in root.named_parameters():
            state = states[id(self.row_of(name))]
            state.total += count(p)
            state.device = "" if p.device == default else str(p.device)
            if p.requires_grad:
                state.trainable += count(p)
                state.parameters.append((name, p))
        self.states = list(states.values())
        for state in self.states:
            if state.row.train == "lora" and not state.trainable:
                wanted = f" named {', '.join(state.row.target_modules)}" if state.row.target_modules else ""
                raise ValueError(f"parameter row {state.row.match!r}: no linear layer{wanted} there, so LoRA trains nothing")

    def groups(self, known: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One optimizer group a trained row, named after it; with Muon, one more for the row's vectors.

        Args:
            known: optimizers that can run; a row that asks for another gets AdamW.
        """
        groups = []
        for s in self.states:
            rates = {"lr": s.row.lr, "weight_decay": s.row.weight_decay}
            kind = s.row.optimizer if known is None or s.row.optimizer in known else "adamw"
            own = [p for _, p in s.parameters if kind != "muon" or p.ndim > 1]
            rest = [p for _, p in s.parameters if kind == "muon" and p.ndim < 2]
            if own:
                groups.append({"name": s.row.match, "params": own, "optimizer": kind, **rates})
            if rest:
                name = f"{s.row.match} (vectors)" if own else s.row.match
                groups.append({"name": name, "params": rest, "optimizer": "adamw", **rates})
        return groups

    def unknown(self, known: Sequence[str]) -> list[str]:
        """Trained rows that ask for an optimizer that cannot run, with its name."""
        return [f"{s.row.match} ({s.row.optimizer})" for s in self.states if s.parameters and s.row.optimizer not in known]

    def table(self) -> list[tuple[str, ...]]:
        """Module, training, learning rate, trainable and all parameters, as text, a header first (MUMU, Table 1); and the device, where a
        row has one of its own."""
        how = {"frozen": "not trained", "lora": "LoRA rank {}", "full": "fully trained"}
        rows: list[tuple[str, ...]] = [("module", "training", "learning rate", "trainable", "parameters")]
        for s in self.states:
            rate = "-" if s.row.lr is None else f"{s.row.lr:g}"
            rows.append((s.row.match, how[s.row.train].format(s.row.rank), rate, f"{s.trainable:,}", f"{s.total:,}"))
        if any(s.device for s in self.states):
            rows = [(*row, device) for row, device in zip(rows, ["device", *(s.device for s in self.states)], strict=True)]
        return rows

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def markdown(self) -> str:
        """The table for TensorBoard's text page."""
        rows = [" | ".join(r) for r in self.table()]
        return "\n".join([rows[0], " | ".join(["---"] * len(self.table()[0])), *rows[1:]])


def _takes_lora(module: nn.Module) -> bool:
    """Linear layers but for the output of ``nn.MultiheadAttention``, which reads the weight and would pass LoRA by."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)
