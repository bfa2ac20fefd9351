"""What the ranks do for `test_evaluation.py`: bases that know few tokens, so that drafts are right now and then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen3Config

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import build_gpt_model
from mcore_spec.data.conversations import Message
from mcore_spec.data.document import Document
from mcore_spec.data.prompts import Prompt
from mcore_spec.errors import McoreSpecError
from mcore_spec.evaluation.acceptance import Evaluator, Settings
from mcore_spec.evaluation.decoding import Answer, Decoder, Request
from mcore_spec.evaluation.report import to_json
from mcore_spec.evaluation.tree import Topology
from mcore_spec.export.draft import export_draft
from mcore_spec.export.reader import attach_exported
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.training.acceptance import AcceptanceCheck
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from mcore_spec.weights.hf_import import import_hf
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.parity.export_cases import converted
from tests.parity.hf_models import LONGROPE, SIZES, randomise

# Odd, so that it is padded where it is sharded; few, so that a random draft is right in a fifth of its tokens.
VOCAB_SIZE = 5
D2T = torch.tensor([0, 1, 1])  # the draft knows tokens 0, 2 and 3
PROMPTS = ((1, 4, 2, 2, 3, 0, 1), (3,), (0, 2, 1, 4), (4, 4, 1, 0, 2, 3, 1, 1, 3, 2, 0, 1, 4))
OSL = 14
WINDOW = 5

_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BASES: dict[str, Any] = {
    "llama": (LlamaConfig, {"rope_parameters": _PLAIN_ROPE}),
    "qwen3": (Qwen3Config, {"rope_parameters": _PLAIN_ROPE, "head_dim": 8, "tie_word_embeddings": True}),
    "windowed": (MistralConfig, {"rope_parameters": _PLAIN_ROPE, "sliding_window": WINDOW}),
    "longrope": (
        Phi3Config,
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": None},
    ),
}


class Case(NamedTuple):
    """How sequences are continued.

    Attributes:
        base: directory of the base.
        draft: directory of the exported draft; ``None``: the base alone.
        layout: of the ranks.
        tree: paths of the proposals; ``None``: a chain of `steps`.
    """

    base: Path
    draft: Path | None
    layout: Layout = Layout()
    steps: int = 3
    tree: str | None = None
    temperature: float = 0.0
    end_ids: tuple[int, ...] = ()

    @property
    def topology(self) -> Topology:
        return Topology.chain(self.steps) if self.tree is None else Topology.parse(self.tree)


def write_base(directory: Path, name: str) -> Path:
    config_class, changes = BASES[name]
    config = config_class(**{**SIZES, "vocab_size": VOCAB_SIZE, "hidden_size": 32, **changes})
    model = AutoModelForCausalLM.from_config(config).double()
    randomise(model, torch.Generator().manual_seed(3))
    model.save_pretrained(directory)
    return directory


def write_draft(*, base: Path, directory: Path, mode: Any, d2t: Tensor | None) -> None:
    """Attach, disturb and export a draft."""
    with parallel_runtime(Layout()):
        model, record = converted(base, Layout(), mode, d2t)
        export_draft(model, record, directory)


def loaded(case: Case) -> Any:
    """The base, and the draft read back from its export."""
    model = build_gpt_model(describe_hf(read_hf_config(case.base), where="base"), case.layout)
    with WeightDirectory(case.base) as weights:
        import_hf(model, weights)
    if case.draft is not None:
        attach_exported(model, case.draft)
    return model


def requests_of(prompts: tuple[tuple[int, ...], ...], *, osl: int = OSL, seed: int = 0) -> list[Request]:
    return [Request(prompt, osl, seed + index) for index, prompt in enumerate(prompts)]


def decode(
    *, case: Case, prompts: tuple[tuple[int, ...], ...] = PROMPTS, one_by_one: bool = False, osl: int = OSL
) -> list[Answer]:
    """Continue all prompts, in one batch or each by itself."""
    with parallel_runtime(case.layout):
        decoder = Decoder(loaded(case), topology=case.topology, temperature=case.temperature, end_ids=case.end_ids)
        requests = requests_of(prompts, osl=osl)
        if one_by_one:
            return [decoder.decode([request]).answers[0] for request in requests]
        return decoder.decode(requests).answers


def refusals(*, case: Case, osl: int, prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> str:
    with parallel_runtime(case.layout):
        try:
            decoder = Decoder(loaded(case), topology=case.topology, temperature=case.temperature)
            decoder.decode(requests_of(prompts, osl=osl))
        except McoreSpecError as error:
            return f"{type(error).__name__}: {error}"
    return "not refused"


def sampled(*, case: Case, prompt: tuple[int, ...], num: int, osl: int) -> list[list[int]]:
    """Many continuations of one prompt."""
    with parallel_runtime(case.layout):
        decoder = Decoder(loaded(case), topology=case.topology, temperature=case.temperature)
        requests = requests_of((prompt,) * num, osl=osl, seed=1000)
        return [answer.token_ids for answer in decoder.decode(requests).answers]


class Digits:
    """Prompts and answers are digits, one a token."""

    end_ids: tuple[int, ...] = (4,)

    def encode(self, messages: list[Message]) -> list[int]:
        text = "".join(message["content"] for message in messages)
        return [int(each) % VOCAB_SIZE for each in text if each.isdigit()]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(str, token_ids))


CONVERSATIONS = (
    Prompt("a", "first", ("12", "3")),
    Prompt("b", None, ("0312",)),
    Prompt("c", "first", ("22", "11", "03")),
    Prompt("d", "second", ("1",), system="3"),
    Prompt("e", "second", ("0",)),
)


def evaluate(*, case: Case, batch_size: int = 2, compares: bool = True) -> dict[str, Any]:
    """A whole evaluation as JSON, times left out."""
    with parallel_runtime(case.layout):
        settings = Settings(
            topology=case.topology,
            osl=OSL,
            temperature=case.temperature,
            batch_size=batch_size,
            compares=compares,
        )
        evaluation = Evaluator(loaded(case), Digits(), settings)(CONVERSATIONS)
    values = to_json(evaluation)
    assert values.pop("tokens_per_second") > 0
    assert (values.pop("baseline_tokens_per_second") is not None) == compares
    json.dumps(values)
    return values


def broken_evaluation(*, case: Case) -> dict[str, Any]:
    """The base's head is another one while the draft's proposals are verified: greedy answers differ."""
    with parallel_runtime(case.layout):
        model = loaded(case)
        settings = Settings(topology=case.topology, osl=OSL, batch_size=2)
        evaluator = Evaluator(model, Digits(), settings)
        judge = evaluator.decoder._logits
        # A cache that forgot something would change logits like this.
        evaluator.decoder._logits = lambda features, spans: judge(features, spans).roll(1, -1)
        evaluation = evaluator(CONVERSATIONS)
        return {**to_json(evaluation), "faults": [each.describe() for each in evaluation.faults]}


def tied_evaluation(*, case: Case) -> dict[str, Any]:
    """Two tokens with one head row between them but for rounding, one of which the draft's run prefers."""
    with parallel_runtime(case.layout):
        model = loaded(case)
        base = MegatronBase(model)
        with torch.no_grad():
            head = base.head_weight()
            head[1].copy_(head[0])
        settings = Settings(topology=case.topology, osl=OSL, batch_size=2)
        evaluator = Evaluator(model, Digits(), settings)
        judge = evaluator.decoder._logits

        def nudged(features: Any, spans: Any) -> Tensor:
            logits = judge(features, spans)
            logits[:, 1] += 1e-14
            return logits

        evaluator.decoder._logits = nudged
        return to_json(evaluator(CONVERSATIONS))


def checked(*, case: Case) -> dict[str, Any]:
    """What a run measures in its middle."""
    documents = [Document(np.array([*prompt, 0, 0]), np.arange(len(prompt) + 2) >= len(prompt)) for prompt in PROMPTS]
    with parallel_runtime(case.layout):
        return AcceptanceCheck(loaded(case), documents, num_steps=case.steps, end_ids=(4,))()
