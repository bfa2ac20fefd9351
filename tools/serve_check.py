"""Serve a base with an exported draft in vLLM, count what the engine itself counts, and compare with `validate`.

    python tools/serve_check.py --base BASE_DIR --draft EXPORT_DIR --prompts-path prompts.jsonl \\
        [--steps 3] [--osl 128] [--num-prompts N] [--dtype float32] [--validated validate.json] [--output serve.json]

Runs under an interpreter that has vLLM, with this repository on PYTHONPATH; it installs nothing. On a machine without
a GPU: ``bash tools/vllm_environment.sh`` makes one in .venv-vllm. Prompts are asked as `validate` asks them: greedily,
turn by turn, behind the engine's own answers. With --validated, the acceptance lengths must agree within 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.data.prompts import Prompt, read_prompts
from mcore_spec.errors import McoreSpecError

TOLERANCE = 0.02
# Architecture in the draft's config.json -> vLLM's method.
METHODS = {
    "LlamaForCausalLMEagle3": "eagle3",
    "Eagle3Speculator": "eagle3",
    "LlamaForCausalLM": "eagle",
    "MedusaModel": "medusa",
}
# vLLM's counters -> ours.
COUNTERS = {
    "vllm:spec_decode_num_drafts": "num_forwards",
    "vllm:spec_decode_num_draft_tokens": "num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted_tokens",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_by_step",
}
HOW = (
    "vLLM is not importable here: run `bash tools/vllm_environment.sh`, then this script with "
    ".venv-vllm/bin/python; or use an environment in which vLLM serves on your GPU"
)


class Served(NamedTuple):
    """What the engine did: its counters, its answers (token ids, by prompt and turn), and the time."""

    counters: dict[str, Any]
    answers: list[list[int]]
    seconds: float


def serve(given: argparse.Namespace, prompts: list[Prompt]) -> Served:
    """Ask the engine all prompts, turn by turn."""
    from vllm import LLM, SamplingParams

    config = json.loads((given.draft / "config.json").read_text())
    method = METHODS.get(config["architectures"][0])
    if method is None:
        raise SystemExit(f"{given.draft}: vLLM serves no {config['architectures'][0]}; known: {', '.join(METHODS)}")
    speculative = {"method": method, "model": str(given.draft), "num_speculative_tokens": given.steps}
    engine = LLM(
        model=str(given.base),
        dtype=given.dtype,
        enforce_eager=True,
        max_model_len=given.max_model_len,
        speculative_config=speculative,
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=given.osl)
    messages: list[list[dict[str, str]]] = [
        [] if prompt.system is None else [{"role": "system", "content": prompt.system}] for prompt in prompts
    ]
    answers: list[list[int]] = []
    begun = time.perf_counter()
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = [index for index, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        for index in asked:
            messages[index].append({"role": "user", "content": prompts[index].turns[turn]})
        outputs = engine.chat([messages[index] for index in asked], sampling, use_tqdm=False)
        for index, output in zip(asked, outputs, strict=True):
            messages[index].append({"role": "assistant", "content": output.outputs[0].text})
            answers.append(list(output.outputs[0].token_ids))
    seconds = time.perf_counter() - begun
    counters: dict[str, Any] = {}
    for metric in engine.get_metrics():
        if metric.name in COUNTERS:
            value = vars(metric)["values"] if "values" in vars(metric) else vars(metric)["value"]
            counters[COUNTERS[metric.name]] = value
    return Served(counters, answers, seconds)


def report(served: Served) -> dict[str, Any]:
    """The figures under `validate`'s names."""
    counters = served.counters
    reached = [counters["num_forwards"], *counters["accepted_by_step"]]
    by_position = [after / before if before else None for before, after in zip(reached, reached[1:], strict=False)]
    length = 1 + counters["num_accepted_tokens"] / counters["num_forwards"] if counters["num_forwards"] else None
    num_tokens = sum(map(len, served.answers))
    return {
        "acceptance_length": length,
        "acceptance_by_position": by_position,
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / served.seconds,
        **counters,
    }


def compare(figures: dict[str, Any], validated: Path) -> bool:
    """Say how far the acceptance lengths are apart; whether they agree."""
    other = json.loads(validated.read_text())
    ours, engines = other["acceptance_length"], figures["acceptance_length"]
    if ours is None or engines is None:
        print(f"no acceptance length to compare: validate {ours}, vLLM {engines}")
        return False
    apart = abs(ours - engines) / engines
    print(f"acceptance length: vLLM {engines:.4f}, validate {ours:.4f}: {apart:.2%} apart")
    return apart <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory of the base")
    parser.add_argument("--draft", type=Path, required=True, help="directory that export wrote")
    parser.add_argument("--prompts-path", required=True, help="prompts, as validate takes them")
    parser.add_argument("--num-prompts", type=int, help="take only so many")
    parser.add_argument("--steps", type=int, default=3, help="tokens that the draft proposes")
    parser.add_argument("--osl", type=int, default=128, help="most new tokens of an answer")
    parser.add_argument("--dtype", default="float32", help="of the weights; the same as validate's")
    parser.add_argument("--max-model-len", type=int, default=2048, help="positions that vLLM reserves")
    parser.add_argument("--validated", type=Path, help="JSON file that validate wrote for the same prompts")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        import vllm  # noqa: F401
    except ImportError:
        print(HOW, file=sys.stderr)
        return 2
    try:
        prompts = list(islice(read_prompts(given.prompts_path), given.num_prompts))
    except McoreSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    served = serve(given, prompts)
    figures = report(served)
    print(json.dumps(figures, indent=2))
    if given.output is not None:
        given.output.write_text(json.dumps({**figures, "answers": served.answers}, indent=2) + "\n")
    if given.validated is not None:
        return 0 if compare(figures, given.validated) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
