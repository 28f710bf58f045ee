"""torchmetrics classes, and the ratings that go into them."""

from .clip import CLIPSimilarity, DirectionalSimilarity, PickScore
from .distribution import FID, KID
from .drift import MaskedMSE, MaskedPSNR, MaskedSSIM, StructureDistance
from .following import ToyboxFollowing, toybox_rating
from .lpips import MaskedLPIPS
from .mean import PictureMean
from .probes import CopyPaste, Movement
from .ratings import Ratings, fleiss_kappa, krippendorff_alpha, rating_table, read_ratings
from .regions import Detected, RecordBoxes
from .similarity import FaceSimilarity, ImageSimilarity, MultimodalPromptScore, ReferenceSimilarity, SubjectSimilarity

__all__ = [
    "FID",
    "KID",
    "CLIPSimilarity",
    "CopyPaste",
    "Detected",
    "DirectionalSimilarity",
    "FaceSimilarity",
    "ImageSimilarity",
    "MaskedLPIPS",
    "MaskedMSE",
    "MaskedPSNR",
    "MaskedSSIM",
    "Movement",
    "MultimodalPromptScore",
    "PickScore",
    "PictureMean",
    "Ratings",
    "RecordBoxes",
    "ReferenceSimilarity",
    "StructureDistance",
    "SubjectSimilarity",
    "ToyboxFollowing",
    "fleiss_kappa",
    "krippendorff_alpha",
    "rating_table",
    "read_ratings",
    "toybox_rating",
]
