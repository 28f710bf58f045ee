"""Lightning callbacks, one a file; installed as ``lightning_mmgen.callbacks``."""

from .answers import AnswerEvaluation
from .attention_alignment import AttentionAlignment
from .caption_teacher import CaptionTeacher
from .clip_score import CLIPScoreEvaluation
from .consistency_penalty import ConsistencyPenalty
from .dashboard import Dashboard
from .drift import DriftEvaluation
from .edits import EditEvaluation
from .ema import EMA, evaluation
from .following import FollowingEvaluation
from .gate_mask import GateMask
from .gradient_norm import GradientNorm
from .held_out import HeldOut, held_out, held_out_parts, sample
from .language import LanguageEvaluation
from .last_checkpoint import LastCheckpoint
from .loggers import latest_scores, log_scores
from .model_card import ModelCard
from .pair_difference import PairDifference
from .picture_grid import PictureGrid, grid
from .picture_writer import PictureWriter
from .preemption import Preemption
from .random_state import RandomState
from .ratings import RatingsEvaluation
from .reference import ReferenceEvaluation
from .rows import write_rows
from .run_card import RunCard
from .scoring import Evaluation, PictureEvaluation
from .throughput import Throughput
from .timestep_loss import TimestepLoss

__all__ = [
    "EMA",
    "AnswerEvaluation",
    "AttentionAlignment",
    "CLIPScoreEvaluation",
    "CaptionTeacher",
    "ConsistencyPenalty",
    "Dashboard",
    "DriftEvaluation",
    "EditEvaluation",
    "Evaluation",
    "FollowingEvaluation",
    "GateMask",
    "GradientNorm",
    "HeldOut",
    "LanguageEvaluation",
    "LastCheckpoint",
    "ModelCard",
    "PairDifference",
    "PictureEvaluation",
    "PictureGrid",
    "PictureWriter",
    "Preemption",
    "RandomState",
    "RatingsEvaluation",
    "ReferenceEvaluation",
    "RunCard",
    "Throughput",
    "TimestepLoss",
    "evaluation",
    "grid",
    "held_out",
    "held_out_parts",
    "latest_scores",
    "log_scores",
    "sample",
    "write_rows",
]
