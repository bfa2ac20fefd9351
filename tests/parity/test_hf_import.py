"""An imported base computes what transformers computes, and reads no more than it keeps.

transformers' own classes are the oracle. Tiny random models of every family run in float64, where 1e-10
leaves room for another order of summation (their logits are of the order of 10) and for nothing else.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mcore_spec.parallel.layout import Layout
from tests.parity.hf_models import TINY_CONFIGS, TinyModel
from tests.parity.import_cases import Differences
from tests.pool import RankPool

CASES = "tests.parity.import_cases"
REPOSITORY = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-10


class Job(NamedTuple):
    """One layout in which every family is compared."""

    layout: Layout
    window_block: int | None = None

    @property
    def world_size(self) -> int:
        return self.layout.tensor * self.layout.pipeline


JOBS = {
    "tp1": Job(Layout()),
    # Windowed attention in several blocks of queries, the last one not full.
    "tp1_window_blocks": Job(Layout(), window_block=5),
    "tp2": Job(Layout(tensor=2)),
    "tp2_sp": Job(Layout(tensor=2, sequence_parallel=True)),
    "pp2": Job(Layout(pipeline=2)),
    "pp2_uneven": Job(Layout(pipeline=2, last_stage_layers=1)),
    "tp2_pp2_sp": Job(Layout(tensor=2, pipeline=2, sequence_parallel=True)),
}
Compare = Callable[[str], dict[str, list[Differences]]]


@pytest.fixture(scope="module")
def compare(rank_pool: RankPool, tiny_models: dict[str, TinyModel]) -> Compare:
    """All families in one job a layout; the differences that its last stage reports."""
    done: dict[str, dict[str, list[Differences]] | Exception] = {}

    def measure(name: str) -> dict[str, list[Differences]]:
        if name not in done:
            try:
                done[name] = _run(name)
            except Exception as error:  # noqa: BLE001  # kept, so that one broken job is not run 17 times
                done[name] = error
        outcome = done[name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _run(name: str) -> dict[str, list[Differences]]:
        job = JOBS[name]
        results = rank_pool.run(
            f"{CASES}:compare_with_transformers",
            world_size=job.world_size,
            layout=job.layout,
            window_block=job.window_block,
            directories={name: tiny.directory for name, tiny in tiny_models.items()},
            runs={name: [tuple(run) for run in tiny.runs] for name, tiny in tiny_models.items()},
        )
        return results[-1]

    return measure


@pytest.mark.parametrize("family", TINY_CONFIGS)
@pytest.mark.parametrize("job", JOBS)
def test_float64_equals_transformers(compare: Compare, job: str, family: str) -> None:
    """Logits, and the output of every layer."""
    runs = compare(job)[family]
    assert len(runs) == len(TINY_CONFIGS[family].lengths)
    for length, differences in zip(TINY_CONFIGS[family].lengths, runs, strict=True):
        where = f"{family} at {job}, {length} tokens"
        assert len(differences.hidden_states) == 4
        for layer, difference in enumerate(differences.hidden_states):
            assert difference <= TOLERANCE, f"{where}: the output of layer {layer} is {difference:.1e} off"
        assert differences.logits <= TOLERANCE, f"{where}: logits are {differences.logits:.1e} off"


class ChatRun(NamedTuple):
    """transformers on the demo model: [1, s] and float32 [1, s, v]."""

    token_ids: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module")
def chat_run(demo_base: Path) -> ChatRun:
    """A conversation through the model's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(demo_base)
    messages = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue, and why was it red at 6:45 this morning?"},
    ]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(demo_base, dtype=torch.float32)
    with torch.no_grad():
        return ChatRun(inputs["input_ids"], model(**inputs).logits)


@pytest.mark.parametrize("tensor", [1, 3])
def test_real_weights_in_float32(rank_pool: RankPool, demo_base: Path, chat_run: ChatRun, tensor: int) -> None:
    """SmolLM2: stored in bfloat16, computed in float32; 30 layers of another order of summation."""
    differences = rank_pool.run(
        f"{CASES}:compare_logits",
        world_size=tensor,
        layout=Layout(tensor=tensor),
        directory=demo_base,
        token_ids=chat_run.token_ids,
        logits=chat_run.logits,
    )
    assert chat_run.token_ids.shape[1] > 30
    assert max(differences) <= 2e-4, f"logits are {max(differences):.1e} off at TP{tensor}"


# --- what is read -------------------------------------------------------------------------------------


def _is_replicated(name: str) -> bool:
    return "norm" in name


def _count(rank_pool: RankPool, tiny_models: dict[str, TinyModel], layout: Layout) -> list[dict[str, Any]]:
    return rank_pool.run(
        f"{CASES}:count_reads",
        world_size=layout.tensor * layout.pipeline,
        layout=layout,
        directories={name: tiny.directory for name, tiny in tiny_models.items()},
    )


def _stored_bytes(tiny: TinyModel) -> dict[str, int]:
    names = {name for name, _ in tiny.model.named_parameters()}  # a tied head is named once
    state = tiny.model.state_dict()
    return {name: state[name].numel() * state[name].element_size() for name in names}


def test_a_rank_reads_its_half(rank_pool: RankPool, tiny_models: dict[str, TinyModel]) -> None:
    """TP2: half of every sharded tensor, the norms whole, each byte once."""
    ranks = _count(rank_pool, tiny_models, Layout(tensor=2))
    for family, tiny in tiny_models.items():
        stored = _stored_bytes(tiny)
        row_bytes = tiny.model.config.hidden_size * 8
        for rank, counts in enumerate(ranks):
            read, reads = counts[family]
            assert read.keys() == stored.keys(), f"{family}, rank {rank}"
            for name, size in stored.items():
                expected = size if _is_replicated(name) else size // 2
                if "embed_tokens" in name or "lm_head" in name:
                    # 103 rows: 52 for the first rank, 51 and one of padding for the second.
                    expected = (52 - rank) * row_bytes
                assert read[name] == expected, f"{family}, rank {rank}: {read[name]} of {size} bytes of {name}"
                # Stacked tensors (Phi-3) are read block by block.
                blocks = {"qkv_proj": 3, "gate_up_proj": 2}.get(name.split(".")[-2], 1)
                assert reads[name] == blocks, f"{family}, rank {rank}: {name} was read {reads[name]} times"
        sharded = [name for name in stored if not _is_replicated(name)]
        total = sum(counts[family][0][name] for counts in ranks for name in sharded)
        assert total == sum(stored[name] for name in sharded), family


def test_a_stage_reads_its_layers(rank_pool: RankPool, tiny_models: dict[str, TinyModel]) -> None:
    """PP2: the stages read every tensor once between them, a tied embedding twice."""
    ranks = _count(rank_pool, tiny_models, Layout(pipeline=2))
    for family, tiny in tiny_models.items():
        read = ranks[0][family][0] + ranks[1][family][0]
        expected = _stored_bytes(tiny)
        if tiny.model.config.tie_word_embeddings:
            expected["model.embed_tokens.weight"] *= 2
        assert dict(read) == expected, family
        shared = ranks[0][family][0].keys() & ranks[1][family][0].keys()
        assert shared == ({"model.embed_tokens.weight"} if tiny.model.config.tie_word_embeddings else set())


def test_the_model_is_held_once(demo_base: Path) -> None:
    """Importing 270 MB of bfloat16 takes less than one and a half times that.

    Beside the model there is one row of the table at a time, at most the embedding with its 21 % of the
    model; a second copy of the model would be 2.0. Pages of the mapped file do not count: they are the
    kernel's to drop.
    """
    command = [sys.executable, "-m", CASES, str(demo_base)]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    model_bytes, growth = map(int, output.stdout.splitlines()[-1].split())
    assert model_bytes == pytest.approx((demo_base / "model.safetensors").stat().st_size, rel=0.01)
    assert model_bytes * 0.9 < growth < model_bytes * 1.5, f"{growth / model_bytes:.2f} times the model"
