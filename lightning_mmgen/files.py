"""Files that are the old one or the new one, whole, whatever happens while they are written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, tag: str | None = None) -> Iterator[BinaryIO]:
    """What is written lies beside ``path`` until all of it is on the disk, then takes its name; its folder is made if need be.

    Args:
        path: of the file.
        tag: names what lies beside it, so that a writer that comes again after a kill overwrites it; by default each has its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{tag or uuid.uuid4().hex}.staging")
    try:
        with staging.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
