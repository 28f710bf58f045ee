"""Train image generators to follow multimodal instructions: text with pictures in it."""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if not (_root / "lightning_mmgen" / "callbacks").exists() and (_root / "callbacks" / "run_card.py").is_file():
    __path__.append(str(_root))  # a source tree, where callbacks/ lies beside the package and not yet in it
