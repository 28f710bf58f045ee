"""The Aligner: a small network between a model's attention to a picture and the map that it is to match (Lavender, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

Variant = Literal["light", "paper", "deep"]
Norm = Literal["instance", "batch", "group", "none"]

LAYERS: dict[Variant, int] = {"light": 2, "paper": 3, "deep": 5}
GROUPS = 8


def _norm(kind: Norm, width: int) -> nn.Module:
    """Batch norm goes by the batch in evaluation too: a checkpoint holds what is trained, and no running means."""
    make: dict[Norm, Callable[[], nn.Module]] = {
        "instance": lambda: nn.InstanceNorm2d(width, affine=True),
        "batch": lambda: nn.BatchNorm2d(width, track_running_stats=False),
        "group": lambda: nn.GroupNorm(GROUPS, width),
        "none": nn.Identity,
    }
    return make[kind]()


@dataclass
class AlignerConfig:
    """Size of the Aligner.

    Args:
        variant: ``paper``, three blocks of a 3 x 3 convolution, a norm and ReLU6; ``light``, two; ``deep``, five. A 1 x 1 convolution to
            one map follows.
        width: channels of the blocks.
        norm: ``instance``, ``batch``, ``group`` (of eight) or ``none``.
    """

    variant: Variant = "paper"
    width: int = 32
    norm: Norm = "instance"

    def __post_init__(self) -> None:
        if self.variant not in LAYERS or self.norm not in get_args(Norm):
            known = f"variant is one of {', '.join(LAYERS)} and norm of {', '.join(get_args(Norm))}"
            raise ValueError(f"aligner: {known}, not {self.variant} and {self.norm}")
        if self.width < 1 or (self.norm == "group" and self.width % GROUPS):
            raise ValueError(f"aligner: width must be 1 or more, and for norm: group a multiple of {GROUPS}, not {self.width}")

    def build(self, heads: int) -> Aligner:
        """The Aligner of maps of so many heads."""
        return Aligner(heads, self)


class Aligner(nn.Module):
    """Maps of words, heads as channels, to one map a word."""

    def __init__(self, heads: int, config: AlignerConfig) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for i in range(LAYERS[config.variant]):
            blocks += [nn.Conv2d(config.width if i else heads, config.width, 3, padding=1), _norm(config.norm, config.width), nn.ReLU6()]
        self.blocks, self.out = nn.Sequential(*blocks), nn.Conv2d(config.width, 1, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, heads, h, w] -> [n, h, w]."""
        return self.out(self.blocks(maps)).squeeze(1)  # type: ignore[no-any-return]
