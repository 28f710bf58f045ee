"""torchmetrics classes, and the ratings that go into them."""

from .clip import CLIPSimilarity, PickScore
from .following import ToyboxFollowing, toybox_rating
from .ratings import Ratings, fleiss_kappa, krippendorff_alpha, read_ratings

__all__ = [
    "CLIPSimilarity",
    "PickScore",
    "Ratings",
    "ToyboxFollowing",
    "fleiss_kappa",
    "krippendorff_alpha",
    "read_ratings",
    "toybox_rating",
]
