"""Lightning callbacks, one a file; installed as ``lightning_mmgen.callbacks``."""

from .answers import AnswerEvaluation
from .attention_alignment import AttentionAlignment
from .clip_score import CLIPScoreEvaluation
from .consistency_penalty import ConsistencyPenalty
from .drift import DriftEvaluation
from .ema import EMA, evaluation
from .following import FollowingEvaluation
from .held_out import HeldOut, held_out, held_out_parts, sample
from .language import LanguageEvaluation
from .last_checkpoint import LastCheckpoint
from .picture_grid import PictureGrid, grid
from .picture_writer import PictureWriter
from .random_state import RandomState
from .reference import ReferenceEvaluation
from .rows import latest_scores, log_scores, write_rows
from .run_card import RunCard

__all__ = [
    "EMA",
    "AnswerEvaluation",
    "AttentionAlignment",
    "CLIPScoreEvaluation",
    "ConsistencyPenalty",
    "DriftEvaluation",
    "FollowingEvaluation",
    "HeldOut",
    "LanguageEvaluation",
    "LastCheckpoint",
    "PictureGrid",
    "PictureWriter",
    "RandomState",
    "ReferenceEvaluation",
    "RunCard",
    "evaluation",
    "grid",
    "held_out",
    "held_out_parts",
    "latest_scores",
    "log_scores",
    "sample",
    "write_rows",
]
