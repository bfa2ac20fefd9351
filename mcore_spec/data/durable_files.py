"""Files that have their names only when they are whole and on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Begins the name of what is not whole yet.
PARTIAL = ".partial-"


def publish_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, which then takes its name in one step; or leave what was there."""
    partial = path.with_name(f"{PARTIAL}{path.name}.{os.getpid()}")
    try:
        write(partial)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's data, or a directory's entries, durable before something refers to them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
