"""Load an export with `speculators`, and compare weights and logits with the export for engines.

Run by `check_speculators.sh`, in an environment that has speculators and not this package. Prints what was
compared; exit code 1 with the first difference.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

for _name in ("torchaudio", "torchvision"):
    try:
        importlib.import_module(_name)
    except (ImportError, OSError, RuntimeError):
        # Requirements of speculators that nothing here uses; built for CUDA, beside a torch for the CPU, they fail
        # when transformers imports them. None: as if they were not installed.
        sys.modules[_name] = None  # type: ignore[assignment]

from speculators import SpeculatorModel  # noqa: E402
from speculators.config import SpeculatorModelConfig  # noqa: E402

from tests.reference import engine  # noqa: E402

# Of speculators' model, what is the base's and no part of a draft.
VERIFIER = ("verifier_lm_head.", "verifier_norm.")
NUM_ROWS = 12
NUM_STEPS = 3
# float32 on both sides: sums in another order.
TOLERANCE = 1e-5


class CheckError(RuntimeError):
    """A difference; the message says where."""


def check(condition: bool, message: str) -> None:
    """Raise `CheckError` unless `condition`."""
    if not condition:
        raise CheckError(message)


def load_model(directory: Path) -> Any:
    """speculators' model in float32; its plain attention, which needs no compiled kernels."""
    config = SpeculatorModelConfig.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"
    return SpeculatorModel.from_pretrained(directory, config=config, dtype=torch.float32).eval()


def check_weights(model: nn.Module, speculators_dir: Path, hf_dir: Path) -> int:
    """The model has every tensor of its file, and the file those of the other export; returns their number."""
    stored = load_file(speculators_dir / "model.safetensors")
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(VERIFIER)}
    check(state.keys() == stored.keys(), f"the file and the model differ in {sorted(state.keys() ^ stored.keys())}")
    for name, tensor in stored.items():
        check(not state[name].isnan().any().item(), f"{name} was not loaded: it is NaN")
        check(torch.equal(state[name], tensor.to(state[name].dtype)), f"{name} is not what the file holds")
    other = load_file(hf_dir / "model.safetensors")
    other = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in other.items()}
    only_here = sorted(stored.keys() - other.keys() - {"embed_tokens.weight", "t2d"})
    check(not only_here, f"{hf_dir} lacks {only_here}")
    for name, tensor in other.items():
        check(name in stored and torch.equal(stored[name], tensor), f"{name} differs between the two exports")
    if "t2d" in stored:
        targets = torch.arange(stored["d2t"].shape[0]) + stored["d2t"]
        check(torch.equal(stored["t2d"].nonzero()[:, 0], targets), "t2d and d2t say different things")
    return len(stored)


def check_base(model: Any, speculators_dir: Path) -> None:
    """The embedding is that of the base which the configuration names."""
    base = Path(model.config.speculators_config.verifier.name_or_path)
    names = sorted(base.glob("*.safetensors"))
    check(bool(names), f"the base {base} has no safetensors")
    stored = {name: tensor for path in names for name, tensor in load_file(path).items()}
    embedding = load_file(speculators_dir / "model.safetensors")["embed_tokens.weight"]
    check(torch.equal(embedding, stored["model.embed_tokens.weight"]), "embed_tokens is not the base's embedding")


@torch.no_grad()
def speculators_logits(model: Any, aux: Tensor, token_ids: Tensor) -> list[Tensor]:
    """Logits of every step, [s, 1, v]; the forward returns tokens only, so they are taken from its head."""
    kept: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        num_rows = token_ids.shape[1]
        model(
            hidden_states=aux.transpose(0, 1),
            input_ids=token_ids,
            document_ids=torch.zeros_like(token_ids),
            position_ids=torch.arange(num_rows)[None],
            ttt_steps=NUM_STEPS,
        )
    finally:
        handle.remove()
    return [logits.transpose(0, 1) for logits in kept]


@torch.no_grad()
def engine_logits(hf_dir: Path, embedding: Tensor, aux: Tensor, token_ids: Tensor) -> list[Tensor]:
    """The same from the other export. Tokens that a step lacks at the end are 0, as speculators has them."""
    config = json.loads((hf_dir / "config.json").read_text())
    tensors = load_file(hf_dir / "model.safetensors")
    floats = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    draft = engine.Eagle3(config, floats)
    shifted = [F.pad(token_ids[:, step:], (0, step)) for step in range(NUM_STEPS)]
    return draft.logits(aux, [F.embedding(ids, embedding).transpose(0, 1) for ids in shifted])


def run(speculators_dir: Path, hf_dir: Path) -> None:
    """All checks."""
    model = load_model(speculators_dir)
    num_tensors = check_weights(model, speculators_dir, hf_dir)
    check_base(model, speculators_dir)
    print(f"ok: {num_tensors} tensors as stored, none NaN, embedding is the base's")
    hf_ids = json.loads((hf_dir / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"]
    check(list(model.target_layer_ids) == hf_ids, f"aux layers {model.target_layer_ids}, the other export {hf_ids}")
    generator = torch.Generator().manual_seed(0)
    layers = model.config.transformer_layer_config
    aux = torch.randn(NUM_ROWS, 1, len(hf_ids) * layers.hidden_size, generator=generator)
    token_ids = torch.randint(layers.vocab_size, (1, NUM_ROWS), generator=generator)
    theirs = speculators_logits(model, aux, token_ids)
    ours = engine_logits(hf_dir, model.embed_tokens.weight, aux, token_ids)
    check(len(theirs) == NUM_STEPS, f"{len(theirs)} steps instead of {NUM_STEPS}")
    for step, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        difference = (their - our).abs().max().item()
        check(
            difference <= TOLERANCE, f"step {step}: logits differ by {difference:.2e} (largest {our.abs().max():.2f})"
        )
        print(
            f"ok: step {step}: logits [{', '.join(map(str, our.shape))}] differ by {difference:.1e}, "
            f"largest {our.abs().max():.2f}"
        )


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) != 2:
        print("usage: check_speculators.py SPECULATORS_DIR HF_DIR", file=sys.stderr)
        return 2
    try:
        run(Path(arguments[0]), Path(arguments[1]))
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
