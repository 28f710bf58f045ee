"""One optimizer for the whole parameter table: AdamW, and Muon for the rows that ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


def make_optimizer(groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999), fused: bool = False) -> Optimizer:
    """torch's own AdamW where no group asks for Muon (it is what DeepSpeed knows), else both as one.

    Args:
        groups: of parameters, each with ``name``, ``lr``, ``weight_decay`` and ``optimizer``: ``adamw`` or ``muon``.
        betas: of AdamW.
        fused: AdamW's fused kernel.
    """
    if all(g["optimizer"] == "adamw" for g in groups):
        return AdamW(groups, betas=betas, fused=fused)
    return MuonAdamW(groups, betas, fused)


class MuonAdamW(Optimizer):
    """AdamW and Muon (Jordan et al. 2024) of torch, as one optimizer that schedules, clips and saves as one.

    Muon orthogonalises the update of a matrix, so that directions with small gradients are learned as fast as those with large ones. Its
    rate is scaled to AdamW's (Liu et al. 2025, section 2.2), so that one rate serves both. Arguments: see :func:`make_optimizer`.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], fused: bool) -> None:
        chosen = {kind: [g for g in groups if g["optimizer"] == kind] for kind in ("adamw", "muon")}
        self.inner: dict[str, Optimizer] = {}
        if chosen["adamw"]:
            self.inner["adamw"] = AdamW(chosen["adamw"], betas=betas, fused=fused)
        if chosen["muon"]:
            self.inner["muon"] = Muon(chosen["muon"], momentum=0.9, adjust_lr_fn="match_rms_adamw")
        super().__init__(groups, {})  # the same dictionaries, which now hold their optimizer's settings

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, optimizer in self.inner.items():  # linked anew, as loading a checkpoint replaces groups and state
            optimizer.param_groups = [g for g in self.param_groups if g["optimizer"] == kind]
            optimizer.state = self.state
            optimizer.step()
        return loss
