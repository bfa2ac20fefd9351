"""Make what the contenders share: token ids, draft vocabularies, initial weights of the draft.

    python -m tools.benchmark.prepare --base DIR --work-dir DIR CASE...

The text is this repository's LICENSE, which does not change. A draft vocabulary holds every token that the base
ranks first somewhere in that text, so that no row is left out of the loss for want of a target: what is
saved there must not count as speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.benchmark.cases import DRAFT_FILE, INPUTS_FILE, BaseSizes, Case, CaseError, target_ids_key

TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
SEED = 20260101
INIT_STD = 0.02
# Queries and keys: so that attention is not even over the rows, and a wrong position or mask shows in the gradients.
ATTENTION_STD = 0.05


def draft_weights(sizes: BaseSizes) -> dict[str, Tensor]:
    """One EAGLE-3 layer with the base's sizes, float32, under engines' names: normal matrices, norms of one.

    With every norm's weight at one, the peers' first layers compute the same although one of them norms the
    hidden state twice.
    """
    generator = torch.Generator().manual_seed(SEED)
    hidden, ffn = sizes.hidden_size, sizes.intermediate_size
    query, key = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    matrices = {
        "fc.weight": (hidden, len(sizes.aux_layer_ids) * hidden),
        "layers.0.self_attn.q_proj.weight": (query, 2 * hidden),
        "layers.0.self_attn.k_proj.weight": (key, 2 * hidden),
        "layers.0.self_attn.v_proj.weight": (key, 2 * hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, query),
        "layers.0.mlp.gate_proj.weight": (ffn, hidden),
        "layers.0.mlp.up_proj.weight": (ffn, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, ffn),
    }
    stds = {name: ATTENTION_STD for name in matrices if name.endswith(("q_proj.weight", "k_proj.weight"))}
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return {
        **{
            name: stds.get(name, INIT_STD) * torch.randn(shape, generator=generator) for name, shape in matrices.items()
        },
        **{f"layers.0.{name}.weight": torch.ones(hidden) for name in norms},
        "norm.weight": torch.ones(hidden),
    }


@torch.no_grad()
def likely_tokens(base: Path, token_ids: Tensor) -> Tensor:
    """bool [vocabulary]: tokens that the base ranks first at some position of the text [n], float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    is_likely = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    hidden = model.model(token_ids[None], use_cache=False).last_hidden_state[0]
    for rows in hidden.split(256):
        is_likely[model.lm_head(rows).argmax(-1)] = True
    return is_likely


def choose_vocabulary(is_likely: Tensor, size: int) -> Tensor:
    """int64 [size], ascending: the likely tokens, then the lowest ids, which byte-pair merges made first.

    Raises:
        CaseError: more likely tokens than places.
    """
    num_likely = int(is_likely.sum())
    if not num_likely <= size <= is_likely.shape[0]:
        raise CaseError(
            f"draft vocabulary of {size}: the text needs {num_likely} tokens, the base has {is_likely.shape[0]}; "
            "take a size between them"
        )
    others = (~is_likely).nonzero()[:, 0][: size - num_likely]
    return torch.cat([is_likely.nonzero()[:, 0], others]).sort().values


def prepare(base: Path, work_dir: Path, cases: Sequence[Case]) -> None:
    """Write the two files that `Inputs.read` reads.

    Raises:
        CaseError: a case that the text or the base cannot serve.
    """
    token_ids = torch.tensor(AutoTokenizer.from_pretrained(base)(TEXT.read_text()).input_ids)
    num_tokens = max(case.num_tokens for case in cases)
    if token_ids.shape[0] < num_tokens:
        raise CaseError(f"{num_tokens} tokens: {TEXT.name} has {token_ids.shape[0]}; take shorter cases")
    # The whole text, whatever the cases: a case has the same inputs in every run.
    tensors = {"token_ids": token_ids}
    sizes = sorted({case.draft_vocab_size for case in cases if case.draft_vocab_size is not None})
    if sizes:
        is_likely = likely_tokens(base, token_ids)
        tensors |= {target_ids_key(size): choose_vocabulary(is_likely, size) for size in sizes}
    work_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, work_dir / INPUTS_FILE)
    save_file(draft_weights(BaseSizes.read(base)), work_dir / DRAFT_FILE)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the inputs that every contender shares.")
    parser.add_argument("--base", type=Path, required=True, help="the base model, an HF directory")
    parser.add_argument("--work-dir", type=Path, required=True, help="where the inputs go")
    parser.add_argument("cases", nargs="+", help="such as t1024-k3 or t1024-k3-v8192-m60")
    options = parser.parse_args(arguments)
    try:
        prepare(options.base, options.work_dir, [Case.parse(name) for name in options.cases])
    except CaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
