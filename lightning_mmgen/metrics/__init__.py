"""torchmetrics classes."""

from .clip import CLIPSimilarity, PickScore
from .following import ToyboxFollowing

__all__ = ["CLIPSimilarity", "PickScore", "ToyboxFollowing"]
