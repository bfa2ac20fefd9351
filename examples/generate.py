"""Answer a question with the draft, or hold a conversation; tokens that the draft contributed are green.

    python examples/generate.py --load CHECKPOINT_DIR --prompt "What is the capital of France?"
    python examples/generate.py --base BASE_DIR --draft EXPORT_DIR

`--help` lists every option. NO_COLOR=1 turns the colour off.
"""

from __future__ import annotations

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("generate"))
