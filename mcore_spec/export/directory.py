"""A directory that appears under its name only when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.layout import barrier, is_rank_zero, run_on_rank_zero

# What was exported: base, conversion, package versions. It is in everything that this package exports and in
# nothing else (a user's model has a config.json too, a checkpoint a mcore_spec.json); an overwrite touches
# no directory without it.
MARKER = "mcore_spec_export.json"


@contextmanager
def atomic_directory(final: Path, *, record: CheckpointRecord, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `final` that takes its name at the end of the block; all ranks take part.

    Args:
        final: where the directory is to be; also relative, ``.`` included.
        record: what is exported; written into it.
        overwrite: replace an earlier export.

    Raises:
        ConfigError: `final` exists, and is not to be or must not be replaced.
    """
    # The sibling needs the directory's own name, which "." hides.
    final = final.resolve()
    partial = run_on_rank_zero(lambda: _begin(final, overwrite=overwrite))
    try:
        yield partial
        barrier()
        run_on_rank_zero(lambda: _publish(partial, final, record))
    finally:
        # After success it has another name and nothing is left to remove.
        if is_rank_zero():
            shutil.rmtree(partial, ignore_errors=True)


def check_export_directory(final: Path, *, overwrite: bool) -> None:
    """Refuse a name that is taken, before any work is done.

    Raises:
        ConfigError: it is taken, by something that is not to be or must not be replaced.
    """
    final = final.resolve()
    if final.exists() and not overwrite:
        raise ConfigError(f"export_dir = {final} exists; choose another directory, or give --overwrite")
    if final.exists() and (not final.is_dir() or (any(final.iterdir()) and not (final / MARKER).exists())):
        raise ConfigError(
            f"export_dir = {final} is not an earlier export (no {MARKER} in it), and --overwrite replaces nothing "
            "else; choose another directory"
        )


def _begin(final: Path, *, overwrite: bool) -> Path:
    check_export_directory(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".partial-{final.name}")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def _publish(partial: Path, final: Path, record: CheckpointRecord) -> None:
    (partial / MARKER).write_text(record.model_dump_json(indent=2) + "\n")
    # A non-empty directory cannot be replaced in one step: the old one stays, under another name, until
    # the new one has the name. An interrupted export may have left one there.
    old = final.with_name(f".replaced-{final.name}")
    if final.exists():
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
    partial.rename(final)
    if old.exists():
        shutil.rmtree(old)
