"""Run a command, and write how long it took and how much memory it held.

    python -m tools.benchmark.acceptance_timed --output FILE.json -- COMMAND [ARGUMENT ...]

The whole process counts, its start and the loading of the base included, the same for every contender. The file is
written only where the command succeeds; its exit code is passed on.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MIB = 1024**2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the command's exit code."""
    parser = argparse.ArgumentParser(description="Measure a command.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file with seconds and peak_mib")
    parser.add_argument("command", nargs="+", help="what is run")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    exit_code = subprocess.run(options.command, check=False).returncode
    seconds = time.perf_counter() - begun
    if exit_code == 0:
        # Linux: KiB, of the largest of the processes that have ended.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        options.output.write_text(json.dumps({"seconds": seconds, "peak_mib": peak / MIB}) + "\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
