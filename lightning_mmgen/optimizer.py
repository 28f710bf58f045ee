"""One optimizer for the whole parameter table: AdamW, and Muon or Adafactor for the rows that ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from transformers.optimization import Adafactor

from .shards import local, part_of, whole_of


def make_optimizer(groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999), fused: bool = False) -> Optimizer:
    """torch's own AdamW where no group asks for another (it is what DeepSpeed knows), else all as one.

    Args:
        groups: of parameters, each with ``name``, ``lr``, ``weight_decay`` and ``optimizer``: ``adamw``, ``muon`` or ``adafactor``.
        betas: of AdamW; Adafactor takes the first.
        fused: AdamW's fused kernel.
    """
    if all(g["optimizer"] == "adamw" for g in groups):
        return AdamW(groups, betas=betas, fused=fused)
    return TableOptimizer(groups, betas, fused)


def beside_parameters(optimizer: Optimizer) -> None:
    """Put each parameter's state on its device: Lightning moves all of a resumed optimizer's to one. ``step`` is torch's own affair."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                state[key] = value.to(parameter.device)


class TableOptimizer(Optimizer):
    """AdamW and Muon (Jordan et al. 2024) of torch and Adafactor of transformers, as one optimizer that schedules, clips and saves as one.

    Muon orthogonalises the update of a matrix, so that directions with small gradients are learned as fast as those with large ones. Its
    rate is scaled to AdamW's (Liu et al. 2025, section 2.2), so that one rate serves both. A convolution's kernel is a matrix too,
    [out, in x height x width] (Jordan et al. 2024).

    Adafactor (Shazeer & Stern 2018, algorithms 4 and 5) keeps a second moment by rows and columns, of the last two axes of a tensor of two
    or more; a vector keeps all of its own. State is float32, as is all that is trained. The rate is the group's (no relative steps).
    Instruct-Imagen gives beta2 .999, but the library has no beta2: its own decay is used, 1 - t^-0.8. Its momentum, beta1, holds steps
    already times the rate, so that a change of rate reaches the weights over some ten steps. ZeRO, which flattens tensors, would undo the
    factoring. Arguments: see :func:`make_optimizer`.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], fused: bool) -> None:
        kinds: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
            "adamw": lambda chosen: AdamW(chosen, betas=betas, fused=fused),
            "muon": lambda chosen: StackedMuon(chosen, momentum=0.9),
            "adafactor": lambda chosen: Adafactor(chosen, beta1=betas[0], scale_parameter=False, relative_step=False, warmup_init=False),
        }
        chosen = {kind: [g for g in groups if g["optimizer"] == kind] for kind in kinds}
        self.inner = {kind: make(chosen[kind]) for kind, make in kinds.items() if chosen[kind]}
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


class StackedMuon(Muon):
    """torch's Muon with the matrices of one shape, on one device, orthogonalised together: LoRA has hundreds of small ones. Kernels of
    convolutions are flattened to matrices. State is torch's, settings are its defaults; the rate is scaled by ``match_rms_adamw``. Where
    processes hold parts of a matrix (FSDP2), each gathers the whole of its momentum, orthogonalises it, and takes its own part.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        settings = Muon([torch.zeros(1, 1)], lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw").defaults
        Optimizer.__init__(self, params, settings)  # Muon's own refuses kernels

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
            self._init_group(group, *found)
            stacks: dict[tuple[torch.Size, torch.device], list[tuple[Tensor, Tensor, Tensor]]] = {}
            for matrix in zip(*found, strict=True):
                stacks.setdefault((matrix[0].shape, matrix[0].device), []).append(matrix)
            for (shape, _), alike in stacks.items():
                self._step(group, shape, *map(list, zip(*alike, strict=True)))

    def _step(self, group: dict[str, Any], shape: torch.Size, matrices: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        held, own, kept = ([local(t) for t in tensors] for tensors in (matrices, grads, buffers))
        torch._foreach_lerp_(kept, own, 1 - momentum)
        ahead = torch.stack([whole_of(m, t).flatten(1) for m, t in zip(matrices, torch._foreach_lerp(own, kept, momentum), strict=True)])
        update = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(matrices[0].dtype)
        torch._foreach_mul_(held, 1 - lr * group["weight_decay"])
        parts = [local(part_of(m, u.view(shape))) for m, u in zip(matrices, update, strict=True)]
        torch._foreach_add_(held, parts, alpha=-lr * 0.2 * max(ahead.shape[1:]) ** 0.5)


@cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


def orthogonal(stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iteration (Jordan et al. 2024) on matrices [n, rows, columns], in bfloat16 as torch has it: singular values near 1.

    In float32 on a CPU that has no bfloat16: there it is emulated, and takes fifty times as long.
    """
    a, b, c = coefficients
    x = stack.bfloat16() if stack.device.type != "cpu" or has_bfloat16() else stack.float()
    x = x.mT if stack.shape[1] > stack.shape[2] else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if stack.shape[1] > stack.shape[2] else x
