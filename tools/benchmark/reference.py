"""What the losses must be: EAGLE-3 written a second time in plain torch, in each contender's definition.

    python -m tools.benchmark.reference --base DIR --work-dir DIR [--gradients] CASE

Prints one JSON line. float32, from transformers' own hidden states; nothing is fast. The definitions:

peer_cross_entropy   ModelOpt: a step is the mean, over the rows whose teacher position p = t+1+k is in the mask, of
                     -sum p log q; the sum of the steps, each times decay^k. The last position, whose target lies behind
                     the document, has a teacher and counts.
peer_divergence      speculators: the same rows and means of the divergence, which is less by the teacher's entropy
                     and has the same gradient.
per_token            this package: rows with m[t+1] and m[t+2+k] inside the document and a teacher whose first choice is
                     in the draft vocabulary; all steps are divided by the rows of step 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from tools.benchmark.cases import LOSS_DECAY, BaseSizes, Case, Inputs

_ROWS = 256


class Base(NamedTuple):
    """Of the frozen base: joined aux hidden states [n, 3 h], last ones after the final norm [n, h], head and
    embedding [V, h]."""

    aux: Tensor
    last: Tensor
    head: Tensor
    embedding: Tensor


class StepLosses(NamedTuple):
    """Rows t = 0 .. n-2-k of a step: cross-entropy with the teacher, the teacher's entropy, and whether its first
    choice over the whole vocabulary is in the draft's."""

    cross_entropy: Tensor
    entropy: Tensor
    is_covered: Tensor


@torch.no_grad()
def read_base(base: Path, token_ids: Tensor) -> Base:
    """Run transformers' model over the tokens [n]."""
    sizes = BaseSizes.read(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    output = model.model(token_ids[None], use_cache=False, output_hidden_states=True)
    # Entry 0 is the embedding, entry i + 1 the output of layer i; the last entry has the final norm.
    aux = torch.cat([output.hidden_states[layer_id + 1][0] for layer_id in sizes.aux_layer_ids], -1)
    head, embedding = model.lm_head.weight.detach(), model.model.embed_tokens.weight.detach()
    return Base(aux, output.last_hidden_state[0], head, embedding)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension."""
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Draft:
    """One EAGLE-3 layer: [n, h] in, [n, h] out, a step at a time."""

    def __init__(self, weights: dict[str, Tensor], sizes: BaseSizes) -> None:
        """Take weights under engines' names."""
        self.weights, self.sizes = weights, sizes
        self.eps: float = sizes.config["rms_norm_eps"]
        exponents = torch.arange(0, sizes.head_dim, 2, dtype=torch.float32) / sizes.head_dim
        self.inv_freq = sizes.config["rope_theta"] ** -exponents
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def start(self, aux: Tensor) -> Tensor:
        """g_0."""
        self.keys, self.values = [], []
        return F.linear(aux, self.weights["fc.weight"])

    def step(self, state: Tensor, embedding: Tensor) -> Tensor:
        """The next state, of which the head reads the normed one."""
        normed = self._norm("layers.0.hidden_norm", state)
        joined = torch.cat([self._norm("layers.0.input_layernorm", embedding), normed], -1)
        x = state + self._attention(joined)
        return x + self._mlp(self._norm("layers.0.post_attention_layernorm", x))

    def hidden(self, state: Tensor) -> Tensor:
        """What the head reads."""
        return self._norm("norm", state)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.eps)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"layers.0.{name}.weight"])

    def _mlp(self, x: Tensor) -> Tensor:
        return self._linear("mlp.down_proj", F.silu(self._linear("mlp.gate_proj", x)) * self._linear("mlp.up_proj", x))

    def _rotate(self, x: Tensor, step: int) -> Tensor:
        angles = (torch.arange(x.shape[0]) + step)[:, None] * self.inv_freq
        cos, sin = (torch.cat([part, part], -1)[:, None] for part in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def _attention(self, x: Tensor) -> Tensor:
        """Row t sees the keys of step 0 up to its own, and its own of every later step."""
        n, step, dim = x.shape[0], len(self.keys), self.sizes.head_dim
        query = self._rotate(self._linear("self_attn.q_proj", x).view(n, -1, dim), step)
        self.keys.append(self._rotate(self._linear("self_attn.k_proj", x).view(n, -1, dim), step))
        self.values.append(self._linear("self_attn.v_proj", x).view(n, -1, dim))
        hidden_rows = torch.ones(n, n, dtype=torch.bool).triu(1)
        outputs = []
        for head in range(self.sizes.num_heads):
            kv_head = head // (self.sizes.num_heads // self.sizes.num_kv_heads)
            own = query[:, head]
            past = (own @ self.keys[0][:, kv_head].T).masked_fill(hidden_rows, float("-inf"))
            diagonals = [(own * keys[:, kv_head]).sum(-1, keepdim=True) for keys in self.keys[1:]]
            weights = (torch.cat([past, *diagonals], -1) * dim**-0.5).softmax(-1)
            output = weights[:, :n] @ self.values[0][:, kv_head]
            for index, values in enumerate(self.values[1:]):
                output = output + weights[:, n + index, None] * values[:, kv_head]
            outputs.append(output)
        return self._linear("self_attn.o_proj", torch.cat(outputs, -1))


def step_losses(hidden: Tensor, teacher: Tensor, head: Tensor, target_ids: Tensor | None) -> StepLosses:
    """Rows [r, h] of the draft against those of the base, 256 at a time."""
    parts = []
    for student_rows, teacher_rows in zip(hidden.split(_ROWS), teacher.split(_ROWS), strict=True):
        logits = F.linear(teacher_rows, head)
        best = logits.argmax(-1)
        is_covered = torch.ones_like(best, dtype=torch.bool)
        student_head = head
        if target_ids is not None:
            is_covered = torch.isin(best, target_ids)
            logits, student_head = logits[:, target_ids], head[target_ids]
        log_p = logits.log_softmax(-1)
        log_q = F.linear(student_rows, student_head).log_softmax(-1)
        p = log_p.exp()
        parts.append(StepLosses(-(p * log_q).sum(-1), -(p * log_p).sum(-1), is_covered))
    return StepLosses(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def draft_losses(
    base: Base, case: Case, inputs: Inputs, weights: dict[str, Tensor], sizes: BaseSizes
) -> list[StepLosses]:
    """Every step of the draft."""
    draft = Draft(weights, sizes)
    state, losses = draft.start(base.aux), []
    for step in range(case.num_steps):
        token_ids = F.pad(inputs.token_ids[1 + step :], (0, 1 + step))
        state = draft.step(state, F.embedding(token_ids, base.embedding))
        num_rows = case.num_tokens - 1 - step
        losses.append(step_losses(draft.hidden(state)[:num_rows], base.last[1 + step :], base.head, inputs.target_ids))
    return losses


def total_losses(case: Case, losses: Sequence[StepLosses]) -> dict[str, Tensor]:
    """The three definitions at the top of this file."""
    mask, counted = case.loss_mask(), case.counted_rows()
    zero = losses[0].cross_entropy.new_zeros(())
    peer, entropy, tokens = zero, zero, zero
    num_first = 0
    for step, loss in enumerate(losses):
        decay = LOSS_DECAY**step
        in_mask = mask[1 + step :].float()
        peer = peer + decay * (loss.cross_entropy * in_mask).sum() / in_mask.sum()
        entropy = entropy + decay * (loss.entropy * in_mask).sum() / in_mask.sum()
        is_counted = counted[step][: loss.is_covered.shape[0]] & loss.is_covered
        num_first = num_first or int(is_counted.sum())
        tokens = tokens + decay * loss.cross_entropy[is_counted].sum()
    return {"peer_cross_entropy": peer, "peer_divergence": peer - entropy, "per_token": tokens / num_first}


def matrix_grad_norms(loss: Tensor, weights: dict[str, Tensor]) -> dict[str, float]:
    """As `harness.grad_norms`."""
    matrices = {name: value for name, value in weights.items() if value.ndim == 2}
    grads = torch.autograd.grad(loss, list(matrices.values()), retain_graph=True)
    norms = (float(torch.linalg.vector_norm(grad, dtype=torch.float64)) for grad in grads)
    return dict(zip(matrices, norms, strict=True))


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compute the losses that the contenders must have.")
    parser.add_argument("--base", type=Path, required=True, help="the base model, an HF directory")
    parser.add_argument("--work-dir", type=Path, required=True, help="where prepare wrote the inputs")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--gradients", action="store_true", help="norms of the gradients too; for short cases")
    parser.add_argument("case", type=Case.parse, help="such as t256-k3")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case: Case = options.case
    inputs = Inputs.read(options.work_dir, case)
    base = read_base(options.base, inputs.token_ids)
    weights = {name: value.requires_grad_(options.gradients) for name, value in inputs.draft.items()}
    with torch.set_grad_enabled(options.gradients):
        totals = total_losses(case, draft_losses(base, case, inputs, weights, BaseSizes.read(options.base)))
    norms = {name: matrix_grad_norms(loss, weights) for name, loss in totals.items()} if options.gradients else {}
    losses = {name: float(loss.detach()) for name, loss in totals.items()}
    print(json.dumps({"contender": "reference", "case": case.name, "losses": losses, "grad_norms": norms}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
