"""speculators' EAGLE-3 model, fed as its trainer feeds it.

speculators takes hidden states from an inference server. Here the base is transformers' model in the same process,
without its head: the draft model computes the teacher's logits itself. Attention and loss are those of its options
that need no compiled kernel.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.benchmark.cases import LOSS_DECAY, BaseSizes, Case, Inputs
from tools.benchmark.harness import Contender, hide_unused_audio_and_vision, load_draft, run

hide_unused_audio_and_vision()

from speculators.losses import resolve_loss_config  # noqa: E402
from speculators.models.eagle3 import Eagle3DraftModel  # noqa: E402
from speculators.models.eagle3.data import shift_batch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402


class Capture:
    """The hidden states that a pass of the base leaves behind."""

    def __init__(self, model: Any, layer_ids: tuple[int, ...]) -> None:
        """Hook the layers of `model`, transformers' decoder, and its final norm."""
        self.model = model
        self.aux: list[Tensor] = []
        self.last: Tensor | None = None
        for layer_id in layer_ids:
            model.layers[layer_id].register_forward_hook(self._keep_aux)
        model.norm.register_forward_pre_hook(self._keep_last)

    def _keep_aux(self, _module: object, _inputs: object, output: Any) -> None:
        self.aux.append(output if isinstance(output, Tensor) else output[0])

    def _keep_last(self, _module: object, inputs: tuple[Tensor, ...]) -> None:
        self.last = inputs[0]

    @torch.no_grad()
    def __call__(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[n] -> joined aux hidden states [n, 3 h], and the last ones before the final norm [n, h]."""
        self.aux.clear()
        self.model(token_ids[None], use_cache=False)
        assert self.last is not None
        return torch.cat(self.aux, -1)[0], self.last[0]


def build_draft(base: Path, case: Case, inputs: Inputs) -> Any:
    """The draft model in training mode, with the shared weights; it loads the heads from the base itself."""
    sizes = BaseSizes.read(base)
    layer_config = AutoConfig.from_pretrained(base)
    layer_config.num_hidden_layers = 1
    is_selected = None
    if inputs.target_ids is not None:
        is_selected = torch.zeros(sizes.vocab_size, dtype=torch.bool)
        is_selected[inputs.target_ids] = True
    draft = Eagle3DraftModel.from_training_args(
        layer_config,
        t2d=is_selected,
        d2t=inputs.draft_to_target,
        draft_vocab_size=case.draft_vocab_size or sizes.vocab_size,
        norm_before_residual=False,
        ttt_steps=case.num_steps,
        verifier_name_or_path=str(base),
        # Its ids are inputs of layers, ours outputs.
        target_layer_ids=[layer_id + 1 for layer_id in sizes.aux_layer_ids],
        draft_attn_impl="sdpa",
    )
    draft.float().train()
    load_draft(draft, inputs.draft)
    return draft


def build(base: Path, case: Case, inputs: Inputs) -> Contender:
    """Base and draft."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    capture = Capture(model.model, BaseSizes.read(base).aux_layer_ids)
    draft = build_draft(base, case, inputs)
    loss_config = resolve_loss_config("kl_div", "eager")

    def step() -> float:
        draft.zero_grad(set_to_none=True)
        aux, last = capture(inputs.token_ids)
        batch = shift_batch(
            {
                "input_ids": inputs.token_ids,
                "hidden_states": aux,
                "verifier_last_hidden_states": last,
                "loss_mask": inputs.loss_mask,
                "lengths": torch.tensor([case.num_tokens]),
                "position_ids": torch.arange(case.num_tokens),
            }
        )
        _, loss, _ = draft(
            hidden_states=batch["hidden_states"][None],
            input_ids=batch["input_ids"][None],
            document_ids=torch.zeros(1, case.num_tokens - 1, dtype=torch.int64),
            loss_mask=batch["loss_mask"][None],
            position_ids=batch["position_ids"][None],
            verifier_last_hidden_states=batch["verifier_last_hidden_states"][None],
            ttt_steps=case.num_steps,
            ttt_step_loss_decay=LOSS_DECAY,
            loss_config=loss_config,
        )
        loss.backward()
        return float(loss.detach())

    note = "" if case.draft_vocab_size is None else "head frozen"
    return Contender(step, draft, "peer_divergence", version("speculators"), note)


if __name__ == "__main__":
    sys.exit(run("speculators", build))
