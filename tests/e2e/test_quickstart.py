"""The quickstart's last part: what it serves, what the page says, how it ends. Its commands are stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]

# Records what it is called with; the page alone is made by the real interpreter.
PYTHON = """#!/bin/bash
echo "python $*" >>"$CALLS"
if [[ "$1" == tools/quickstart_report.py ]]; then exec "$REAL_PYTHON" "$@"; fi
"""
COMMAND = '#!/bin/bash\necho "${0##*/} $*" >>"$CALLS"\n'
# vLLM's interpreter: complete, and it serves as SERVED says.
VLLM = """#!/bin/bash
echo "vllm $PYTHONPATH $*" >>"$CALLS"
if [[ "$1" == - ]]; then exit 0; fi
while [[ "$1" != --output ]]; do shift; done
if [[ -n "$SERVED" ]]; then cp "$SERVED" "$2"; fi
exit "$SERVE_CODE"
"""
MEASURED = {
    "acceptance_length": 1.4,
    "acceptance_by_position": [0.3, 0.3, None],
    "tokens_per_second": 30.0,
    "baseline_tokens_per_second": 40.0,
    "lossless": True,
    "num_answers": 8,
}
ENTRY = {"iteration": 20, "consumed_tokens": 8515, "loss": 9.5, "accuracy": [0.2, 0.1, 0.05], "tokens_per_second": 210}
Ended = subprocess.CompletedProcess[str]


def executable(path: Path, text: str) -> None:
    """A script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Both environments, the first up to date, and what earlier commands have left in the work directory."""
    venv, work = tmp_path / "venv", tmp_path / "out"
    for name, text in (("python", PYTHON), ("mcore-spec", COMMAND), ("torchrun", COMMAND)):
        executable(venv / "bin" / name, text)
    executable(tmp_path / "vllm" / "bin" / "python", VLLM)
    values = {**os.environ, "MCORE_SPEC_VENV": str(venv), "VLLM_VENV": str(tmp_path / "vllm"), "SERVE_CODE": "0"}
    values |= {"CALLS": str(tmp_path / "calls"), "REAL_PYTHON": sys.executable, "SERVED": ""}
    key = ["bash", "-c", "source tools/environment.sh && installation_key"]
    stamp = subprocess.run(key, cwd=REPOSITORY, env=values, check=True, capture_output=True, text=True).stdout
    (venv / ".mcore_spec_demo").write_text(stamp)
    (work / "checkpoint").mkdir(parents=True)
    (work / "conversations.jsonl").write_text("{}\n" * 16)
    (work / "checkpoint" / "train_log.jsonl").write_text(
        json.dumps({**ENTRY, "loss": 24.0}) + f"\n{json.dumps(ENTRY)}\n"
    )
    before = {**MEASURED, "acceptance_length": 1.01}
    for name, measured in (("validate_before.json", before), ("validate.json", MEASURED)):
        (work / name).write_text(json.dumps(measured))
    return values


def quickstart(environment: dict[str, str], tmp_path: Path, *words: str, **changes: str) -> Ended:
    """Run it."""
    command = ["bash", "tools/quickstart.sh", "--quick", "--work-dir", str(tmp_path / "out"), *words]
    return subprocess.run(
        command, cwd=REPOSITORY, env={**environment, **changes}, capture_output=True, text=True, timeout=60
    )


def served(tmp_path: Path, **changes: Any) -> str:
    """What serve_check leaves, as a file."""
    figures = {"acceptance_length": 1.404, "acceptance_by_position": [0.31, 0.3, 0.0], "apart": 0.0028, **changes}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    return str(tmp_path / "figures.json")


def page(tmp_path: Path) -> str:
    """What the report says."""
    return (tmp_path / "out" / "report.md").read_text()


def test_without_an_engine_the_page_has_the_command_for_it(environment: dict[str, str], tmp_path: Path) -> None:
    done = quickstart(environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vllm" not in (tmp_path / "calls").read_text()
    work = tmp_path / "out"
    text = page(tmp_path)
    assert "| acceptance length (tokens a pass of the base) | 1.010 | 1.400 |" in text
    assert "bash tools/vllm_environment.sh" in text
    assert f"--base {work}/base --draft {work}/export" in text
    # The same answers as validate's, or the figures could not be compared.
    osl = (tmp_path / "calls").read_text().split("--osl ")[1].split()[0]
    assert f"--steps 3 --osl {osl} \\\n    --validated {work}/validate.json" in text
    assert "vllm serve" in text and "checkpoint/curves.png" in text


def test_what_vllm_counts_stands_on_the_page(environment: dict[str, str], tmp_path: Path) -> None:
    done = quickstart(environment, tmp_path, "--serve", SERVED=served(tmp_path))
    assert done.returncode == 0, done.stderr
    (call,) = (line for line in (tmp_path / "calls").read_text().splitlines() if "serve_check" in line)
    assert call.startswith(f"vllm {REPOSITORY} tools/serve_check.py --base {tmp_path}/out/base --draft ")
    assert f"--validated {tmp_path}/out/validate.json" in call
    assert "acceptance length 1.404, 0.28% from what was measured" in page(tmp_path)
    assert "0.310, 0.300, 0.000" in page(tmp_path)
    assert "tools/vllm_environment.sh" not in page(tmp_path)


def test_another_acceptance_fails_behind_the_page(environment: dict[str, str], tmp_path: Path) -> None:
    figures = served(tmp_path, acceptance_length=1.2, apart=0.1667)
    done = quickstart(environment, tmp_path, "--serve", SERVED=figures, SERVE_CODE="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: vLLM accepts another number of tokens")
    assert "acceptance length 1.200, 16.67% from" in page(tmp_path)


def test_an_engine_that_does_not_serve_fails(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out" / "serve.json").write_text("of an earlier run")
    done = quickstart(environment, tmp_path, "--serve", SERVE_CODE="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: vLLM did not serve the draft"
    assert not (tmp_path / "out" / "report.md").exists()
