"""torchmetrics classes."""

from .clip import CLIPSimilarity
from .following import ToyboxFollowing

__all__ = ["CLIPSimilarity", "ToyboxFollowing"]
