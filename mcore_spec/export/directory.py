"""A directory that appears under its name only when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcore_spec.errors import ConfigError
from mcore_spec.parallel.layout import barrier, is_rank_zero, run_on_rank_zero

# Present in everything that this package exports; an overwrite touches nothing else.
MARKER = "config.json"


@contextmanager
def atomic_directory(final: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `final` that takes its name at the end of the block; all ranks take part.

    Args:
        final: where the directory is to be.
        overwrite: replace an earlier export.

    Raises:
        ConfigError: `final` exists, and is not to be or must not be replaced.
    """
    partial = run_on_rank_zero(lambda: _begin(final, overwrite=overwrite))
    try:
        yield partial
        barrier()
        run_on_rank_zero(lambda: _publish(partial, final))
    finally:
        # After success it has another name and nothing is left to remove.
        if is_rank_zero():
            shutil.rmtree(partial, ignore_errors=True)


def _begin(final: Path, *, overwrite: bool) -> Path:
    if final.exists() and not overwrite:
        raise ConfigError(f"export_dir = {final} exists; choose another directory, or give --overwrite")
    if final.exists() and (not final.is_dir() or (any(final.iterdir()) and not (final / MARKER).exists())):
        raise ConfigError(f"export_dir = {final} is not an earlier export; choose another directory")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".partial-{final.name}")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def _publish(partial: Path, final: Path) -> None:
    if not final.exists():
        partial.rename(final)
        return
    # A non-empty directory cannot be replaced in one step: the old one stays, under another name, until
    # the new one has the name.
    old = final.with_name(f".replaced-{final.name}")
    if old.exists():
        shutil.rmtree(old)
    final.rename(old)
    partial.rename(final)
    shutil.rmtree(old)
