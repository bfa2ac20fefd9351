"""Serve a base with an exported draft in vLLM, count what the engine itself counts, and compare with `validate`.

    python tools/serve_check.py --base BASE_DIR --draft EXPORT_DIR --prompts-path prompts.jsonl \\
        [--steps 3] [--osl 128] [--num-prompts N] [--dtype float32] [--validated validate.json] [--output serve.json]

Runs under an interpreter that has vLLM, with this repository on PYTHONPATH; it installs nothing. On a machine without
a GPU: ``bash tools/vllm_environment.sh`` makes one in .venv-vllm. Prompts are asked as `validate` asks them: greedily,
turn by turn, behind the engine's own answers. With --validated, the acceptance lengths must agree within 2 %.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.data.prompts import Prompt, read_prompts
from mcore_spec.errors import ConfigError, McoreSpecError

TOLERANCE = 0.02
# Architecture in the draft's config.json -> vLLM's method.
METHODS = {
    "LlamaForCausalLMEagle3": "eagle3",
    "Eagle3Speculator": "eagle3",
    "Eagle3DraftModel": "eagle3",  # as speculators 0.9 itself saves it
    "LlamaForCausalLM": "eagle",
    "MedusaModel": "medusa",
    "MiMoForCausalLM": "mtp",
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


def method_of(config: dict[str, Any], *, draft: Path) -> str:
    """vLLM's name for the kind of draft that a directory's config.json describes.

    Raises:
        ConfigError: none that vLLM serves.
    """
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in METHODS:
        raise ConfigError(f"--draft {draft}: vLLM serves no {architecture}; known: {', '.join(METHODS)}")
    return METHODS[architecture]


def check_fits(draft: dict[str, Any], base: dict[str, Any], *, steps: int) -> None:
    """Refuse a draft of another base, or one that proposes less, before the engine trips over it.

    Args:
        draft: its config.json.
        base: of the base.
        steps: tokens to propose.

    Raises:
        ConfigError: names the field.
    """
    for field in ("hidden_size", "vocab_size"):
        made_for, there = draft.get(f"target_{field}") or draft.get(field), base.get(field)
        if None not in (made_for, there) and made_for != there:
            raise ConfigError(
                f"--draft is for a base with {field} = {made_for}, and --base has {there}; give the base that it was "
                "made for"
            )
    num_heads = draft.get("num_heads")
    if num_heads is not None and steps > num_heads:
        raise ConfigError(f"--steps {steps}: the draft has {num_heads} heads, one for each token; lower it")


def serve(given: argparse.Namespace, method: str, prompts: list[Prompt]) -> Served:
    """Ask the engine all prompts, turn by turn.

    Args:
        given: the command line.
        method: vLLM's name for the kind of draft.
        prompts: to ask.

    Raises:
        ConfigError: a prompt that the engine refuses.
    """
    from vllm import LLM, SamplingParams

    speculative = {"method": method, "num_speculative_tokens": given.steps}
    if method != "mtp":  # whose layer is part of the base's own directory
        speculative["model"] = str(given.draft)
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
        try:
            outputs = engine.chat([messages[index] for index in asked], sampling, use_tqdm=False)
        except ValueError as error:
            raise ConfigError(f"vLLM refuses the prompts ({error}); shorten them, or raise --max-model-len") from error
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
    """The figures under `validate`'s names.

    Raises:
        ConfigError: vLLM never asked the draft.
    """
    counters = served.counters
    if not counters.get("num_forwards"):
        raise ConfigError("vLLM asked the draft for nothing: the answers end with their first token; raise --osl")
    reached = [counters["num_forwards"], *counters["accepted_by_step"]]
    by_position = [after / before if before else None for before, after in zip(reached, reached[1:], strict=False)]
    length = 1 + counters["num_accepted_tokens"] / counters["num_forwards"]
    num_tokens = sum(map(len, served.answers))
    return {
        "acceptance_length": length,
        "acceptance_by_position": by_position,
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / served.seconds,
        **counters,
    }


def check_validated(validated: dict[str, Any], prompts: list[Prompt], given: argparse.Namespace) -> None:
    """Refuse figures of another measurement, before anything is served.

    Raises:
        ConfigError: other prompts, another way to answer them than `serve` has, or no acceptance length.
    """
    where, num_answers = given.validated, sum(len(prompt.turns) for prompt in prompts)
    for field, theirs, ours in (
        ("num_answers", validated.get("num_answers"), num_answers),
        ("steps", len(validated.get("acceptance_by_position") or ()), given.steps),
        ("osl", validated.get("osl"), given.osl),
        ("dtype", validated.get("dtype"), given.dtype),
        ("temperature", validated.get("temperature"), 0.0),
        ("acceptance", validated.get("acceptance"), "exact"),
        ("proposals", validated.get("proposals"), "chain"),
    ):
        if theirs != ours:
            raise ConfigError(
                f"--validated {where} has {field} = {theirs}, here it is {ours}: it is another measurement; "
                "run validate with the same prompts, --steps, --osl and dtype, greedily, exact, without a tree"
            )
    if validated.get("acceptance_length") is None:
        raise ConfigError(f"--validated {where} has no acceptance length; run validate with a larger --osl")


def compare(figures: dict[str, Any], validated: dict[str, Any]) -> bool:
    """Say how far the acceptance lengths are apart; whether they agree."""
    ours, engines = validated["acceptance_length"], figures["acceptance_length"]
    apart = abs(ours - engines) / engines
    print(f"acceptance length: vLLM {engines:.4f}, validate {ours:.4f}: {apart:.2%} apart")
    figures["validated_acceptance_length"], figures["apart"] = ours, apart
    return apart <= TOLERANCE


def read_json(file: Path, option: str) -> dict[str, Any]:
    """What an option's file holds.

    Raises:
        ConfigError: it is not there, or not what it should be.
    """
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {file} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{option}: {file} holds no object")
    return values


def has_vllm() -> bool:
    """Whether this interpreter could import it."""
    return importlib.util.find_spec("vllm") is not None


def run(given: argparse.Namespace) -> int:
    """Check what can be checked, serve, report; returns the exit code.

    Raises:
        McoreSpecError: input that cannot be used.
    """
    base = read_json(given.base / "config.json", "--base")
    draft = read_json(given.draft / "config.json", "--draft")
    method = method_of(draft, draft=given.draft)
    check_fits(draft, base, steps=given.steps)
    prompts = list(islice(read_prompts(given.prompts_path), given.num_prompts))
    validated = None
    if given.validated is not None:
        validated = read_json(given.validated, "--validated")
        check_validated(validated, prompts, given)
    if not has_vllm():
        raise ConfigError(HOW)
    served = serve(given, method, prompts)
    figures = report(served)
    agrees = validated is None or compare(figures, validated)
    print(json.dumps(figures, indent=2))
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps({**figures, "answers": served.answers}, indent=2) + "\n")
    if not agrees:
        print(f"error: not within {TOLERANCE:.0%} of each other", file=sys.stderr)
    return 0 if agrees else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory of the base")
    parser.add_argument("--draft", type=Path, required=True, help="directory that export wrote")
    parser.add_argument("--prompts-path", required=True, help="prompts, as validate takes them")
    parser.add_argument("--num-prompts", type=positive, help="take only so many")
    parser.add_argument("--steps", type=positive, default=3, help="tokens that the draft proposes")
    parser.add_argument("--osl", type=positive, default=128, help="most new tokens of an answer")
    parser.add_argument("--dtype", default="float32", help="of the weights; the same as validate's")
    parser.add_argument("--max-model-len", type=positive, default=2048, help="positions that vLLM reserves")
    parser.add_argument("--validated", type=Path, help="JSON file that validate wrote for the same prompts")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        return run(given)
    except McoreSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
