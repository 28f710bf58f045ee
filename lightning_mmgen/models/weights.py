"""Where pretrained parts come from: a hub name, a local folder or file, or ``toybox/<part>`` for the embedded weights."""

from __future__ import annotations

from pathlib import Path

TOYBOX = Path(__file__).parent.parent / "toybox" / "weights"


def locate(pretrained: str) -> str:
    """Turn ``toybox/<part>`` into the embedded folder or file; anything else passes through to ``from_pretrained``.

    Raises:
        FileNotFoundError: no such embedded part, or a path that looks local and is not there.
    """
    if pretrained.startswith("toybox/"):
        folder = TOYBOX / pretrained.removeprefix("toybox/")
        if not folder.exists():
            known = ", ".join(sorted(f"toybox/{p.name}" for p in TOYBOX.iterdir() if p.suffix != ".md"))
            raise FileNotFoundError(f"{pretrained} is not an embedded part; there are {known}")
        return str(folder)
    if pretrained.startswith((".", "/", "~")):
        folder = Path(pretrained).expanduser()
        if not folder.exists():
            raise FileNotFoundError(f"{pretrained}: no such folder")
        return str(folder)
    return pretrained
