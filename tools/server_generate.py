"""Let a served base model answer prompts; `mcore-spec synthesize` with the flags that users of ModelOpt know.

    python tools/server_generate.py --data_path prompts.jsonl --output_path conversations.jsonl \\
        --system_prompt "Be brief."

The server is any OpenAI-compatible one (vLLM, SGLang, TensorRT-LLM). `mcore-spec synthesize --help` has more options.
"""

from __future__ import annotations

import argparse
import os

from mcore_spec.cli.main import run_command

KEY_VARIABLE = "MCORE_SPEC_API_KEY"


def main() -> int:
    """Translate the flags; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="file of prompts or conversations")
    parser.add_argument("--output_path", required=True, help="file of conversations, .jsonl; is added to")
    parser.add_argument("--system_prompt", nargs="+", help="system message of prompts that have none")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the endpoint (%(default)s)")
    parser.add_argument("--model", help="its name there (the one that is served)")
    parser.add_argument("--num_threads", default="256", help="conversations that are asked at a time (%(default)s)")
    parser.add_argument("--temperature", default="0.0", help="of sampling (%(default)s: greedy)")
    parser.add_argument("--max_tokens", default="2048", help="of an answer at most (%(default)s)")
    parser.add_argument("--api_key", help="of the endpoint (none is sent)")
    given = parser.parse_args()
    words = ["--prompts-path", given.data_path, "--output", given.output_path, "--base-url", given.url]
    words += ["--num-concurrent", given.num_threads, "--temperature", given.temperature]
    words += ["--max-tokens", given.max_tokens]
    if given.model is not None:
        words += ["--model", given.model]
    if given.system_prompt is not None:
        words += ["--system-prompt", " ".join(given.system_prompt)]
    if given.api_key is not None:
        os.environ[KEY_VARIABLE] = given.api_key
        words += ["--api-key-env", KEY_VARIABLE]
    return run_command("synthesize", words)


if __name__ == "__main__":
    raise SystemExit(main())
