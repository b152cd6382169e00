"""What keeps a written file over a power cut."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the kernel write a file's bytes, or a folder's entries, to its disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
