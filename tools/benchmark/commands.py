"""Commands of the package that a benchmark runs once: started again, it goes on behind what succeeded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# What `resource` counts reads in.
_BLOCK_BYTES = 512


class Finished(NamedTuple):
    """A command that succeeded.

    Attributes:
        output: what it said.
        peak_mib: most memory of its process.
        read_mib: what it read from disks.
    """

    output: str
    peak_mib: float
    read_mib: float = 0.0


def words_of(command: str, options: Mapping[str, object]) -> list[str]:
    """The command line of ``mcore-spec COMMAND``: options by name, without the leading dashes."""
    return [command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def run_once(place: Path, words: Sequence[str]) -> Finished:
    """Run ``mcore-spec WORDS`` unless it has succeeded before.

    Args:
        place: path without suffix; ``.log`` and ``.done.json`` are put behind it.
        words: of the command line.

    Raises:
        SystemExit: it failed; the end of what it said.
    """
    done = place.with_suffix(".done.json")
    if done.exists():
        return Finished(**json.loads(done.read_text()))
    print(f"{place.parent.name}: {words[0]}", file=sys.stderr, flush=True)
    with place.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen([sys.executable, "-m", "mcore_spec.cli.main", *words], stdout=log, stderr=log)
        # The peak of this child alone; `resource.getrusage` has that of all.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise SystemExit(f"mcore-spec {' '.join(words)} ended with {process.returncode}:\n{output[-3000:]}")
    result = Finished(output, usage.ru_maxrss / 1024, usage.ru_inblock * _BLOCK_BYTES / 2**20)
    done.write_text(json.dumps(result._asdict()) + "\n")
    return result


def check_settings(place: Path, settings: Mapping[str, object]) -> None:
    """Refuse to mix runs of different settings in one directory.

    Raises:
        SystemExit: `place` was begun with others.
    """
    given = {name: str(value) for name, value in settings.items()}
    path = place / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(given, indent=2) + "\n")
    elif json.loads(path.read_text()) != given:
        raise SystemExit(f"{place} was begun with other settings ({path}); give those, or another --work-dir")
