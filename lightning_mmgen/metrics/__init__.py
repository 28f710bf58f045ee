"""torchmetrics classes, and the ratings that go into them."""

from .clip import CLIPSimilarity, DirectionalSimilarity, PickScore
from .drift import ImageSimilarity, MaskedMSE, MaskedPSNR, MaskedSSIM, StructureDistance
from .following import ToyboxFollowing, toybox_rating
from .lpips import MaskedLPIPS
from .ratings import Ratings, fleiss_kappa, krippendorff_alpha, read_ratings

__all__ = [
    "CLIPSimilarity",
    "DirectionalSimilarity",
    "ImageSimilarity",
    "MaskedLPIPS",
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
