"""torchmetrics classes, and the ratings that go into them."""

from .clip import CLIPSimilarity, PickScore
from .following import ToyboxFollowing
from .ratings import Ratings, fleiss_kappa, krippendorff_alpha, read_ratings

__all__ = [
    "CLIPSimilarity",
    "PickScore",
    "Ratings",
    "ToyboxFollowing",
    "fleiss_kappa",
    "krippendorff_alpha",
    "read_ratings",
]
