"""Let a served base model answer prompts: tools/server_generate.py, where users of ModelOpt look for it.

    python examples/hf/server_generate.py --data_path prompts.jsonl --output_path conversations.jsonl \\
        --system_prompt "Be brief."
"""

from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "server_generate.py"), run_name="__main__")
