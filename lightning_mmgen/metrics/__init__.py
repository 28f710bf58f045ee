"""torchmetrics classes, and the ratings that go into them."""

from .clip import CLIPSimilarity, DirectionalSimilarity, PickScore
from .drift import ImageSimilarity, MaskedMSE, MaskedPSNR, MaskedSSIM, StructureDistance
from .following import ToyboxFollowing, toybox_rating
from .ratings import Ratings, fleiss_kappa, krippendorff_alpha, read_ratings

__all__ = [
    "CLIPSimilarity",
    "DirectionalSimilarity",
    "ImageSimilarity",
    "MaskedMSE",
    "MaskedPSNR",
    "MaskedSSIM",
    "PickScore",
    "Ratings",
    "StructureDistance",
    "ToyboxFollowing",
    "fleiss_kappa",
    "krippendorff_alpha",
    "read_ratings",
    "toybox_rating",
]
