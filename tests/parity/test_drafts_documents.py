"""Drafts and a base on packed documents: each document as if alone, every layout as one process, as an engine.

Everything is float64. Attention is merged from parts in an order of its own and sums run over ranks: a few
hundred terms of order one, through at most four steps, differ by 1e-14 relative to the largest value of a
tensor; 1e-12 leaves room for no missing term.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.drafts.steps import StepOutput
from mcore_spec.errors import UnsupportedError
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.layout import Layout
from mcore_spec.parallel.tensor_parallel import TensorParallel
from tests.parity import document_cases
from tests.parity.document_cases import BOUNDS, HIDDEN, LENGTHS, STEPS, VARIANTS, Cut, Groups
from tests.parity.draft_cases import Variant, build, eagle3
from tests.pool import RankPool
from tests.reference import drafts as oracle
from tests.tiny import VOCAB_SIZE, drawn

BOUND = 1e-12
Results = dict[str, Tensor]
ONE = Groups(TensorParallel(), None)


def worst(found: Results, expected: Results) -> tuple[float, str]:
    """The largest difference, relative to the tensor's largest value, and where it is."""
    assert found.keys() == expected.keys()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    return max(
        ((found[name] - value).abs().max().item() / max(1.0, value.abs().max().item()), name)
        for name, value in expected.items()
    )


def check(found: Results, expected: Results) -> None:
    difference, where = worst(found, expected)
    assert difference <= BOUND, f"{where} differs by {difference:.1e}"


def each_alone(variant: Variant, *, bounds: tuple[int, ...], lengths: tuple[int, ...]) -> Results:
    """Every document in a call without packing; outputs joined, gradients of weights added up."""
    draft = build(variant, TensorParallel()).draft
    leaves = [whole.requires_grad_() for whole in document_cases.draft_inputs(draft, bounds[-1])]
    parts: dict[str, list[Tensor]] = {}
    for (start, stop), length in zip(pairwise(bounds), lengths, strict=True):
        # Without documents a column's length is that of its tokens: padding goes in a call with documents.
        single = None if length == stop - start else Documents([0, stop - start], lengths=[length])
        values = document_cases.call(draft, [leaf[start:stop] for leaf in leaves], documents=single)
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    values = {name: torch.cat(each) for name, each in parts.items()}
    width = VOCAB_SIZE if isinstance(draft, MedusaDraft) else HIDDEN
    weights = {name: drawn(f"weight of {name}", (bounds[-1], 1, width)) for name in values}
    document_cases.weighted(values, weights).backward()
    found = {name: value.detach() for name, value in values.items()}
    for index, leaf in enumerate(leaves):
        assert leaf.grad is not None
        found[f"gradient of input {index}"] = leaf.grad
    return found | document_cases.parameter_gradients(draft, ONE)


@pytest.fixture(scope="module")
def expected() -> dict[str, Results]:
    return {name: each_alone(variant, bounds=BOUNDS, lengths=LENGTHS) for name, variant in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_are_each_document_alone(name: str, expected: dict[str, Results]) -> None:
    check(document_cases.run_packed(VARIANTS[name], ONE, bounds=BOUNDS, lengths=LENGTHS), expected[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_documents_of_any_length(name: str) -> None:
    bounds = (0, 1, 3, 8)
    alone = each_alone(VARIANTS[name], bounds=bounds, lengths=(1, 2, 5))
    check(document_cases.run_packed(VARIANTS[name], ONE, bounds=bounds, lengths=(1, 2, 5)), alone)


LAYOUTS = {
    "CP2": Cut(context=2),
    "TP2 CP2": Cut(tensor=2, context=2),
    "TP2 CP2+SP": Cut(tensor=2, context=2, sequence_parallel=True),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_share_the_rows_equal_one_process(
    layout: str, recompute: bool, rank_pool: RankPool, expected: dict[str, Results]
) -> None:
    ways = LAYOUTS[layout]
    ranks = rank_pool.run(
        "tests.parity.document_cases:packed_drafts",
        world_size=ways.tensor * ways.context,
        layout=ways,
        recompute=recompute,
    )
    for found in ranks:
        for name, results in found.items():
            difference, where = worst(results, expected[name])
            assert difference <= BOUND, f"{name}: {where} differs by {difference:.1e}"


def test_one_attention_layer_on_ranks_that_share_the_rows(rank_pool: RankPool) -> None:
    single = document_cases.attention_layer(layout=Cut())
    for ways in LAYOUTS.values():
        ranks = rank_pool.run(
            "tests.parity.document_cases:attention_layer", world_size=ways.tensor * ways.context, layout=ways
        )
        for found in ranks:
            check(found, single)


SERVED = {
    "plain": {},
    "two layers, normed": {"num_hidden_layers": 2, "norm_output": True, "norm_before_residual": True},
}


@pytest.mark.parametrize("flags", SERVED.values(), ids=list(SERVED))
def test_training_rows_are_what_an_engine_computes(flags: dict[str, Any]) -> None:
    """Row t at step k of a packed row is the state after k drafted tokens behind the prefix 0..t.

    The engine is the oracle's: one row at a time over a growing cache, document by document. Its weights are the
    draft's; the drafted tokens are those whose embeddings the training step was given.
    """
    draft = build(eagle3(**flags), TensorParallel()).draft
    assert isinstance(draft, Eagle3Draft)
    aux = document_cases.draft_inputs(draft, 10)[0]
    spans = [slice(0, 1), slice(1, 3), slice(3, 10)]
    tokens = [5 * drawn(f"tokens {n}", (span.stop - span.start + STEPS, 1, HIDDEN)) for n, span in enumerate(spans)]
    # As many rows as the document has; row t of step k has token t + 1 + k.
    shifted = [torch.cat([each[1 + step : len(each) + 1 + step - STEPS] for each in tokens]) for step in range(STEPS)]
    with torch.no_grad():
        trained = draft(aux, shifted, documents=Documents([0, 1, 3, 10]))
        weights = dict(draft.named_parameters())
        rotary = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=16, num_attention_heads=4, head_dim=8,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
        )  # fmt: skip
        shape = oracle.Shape(4, 2, 8, 1e-5, "silu", rotary.inv_freq, num_layers=flags.get("num_hidden_layers", 1))
        ways = {name: flags.get(name, False) for name in ("norm_before_residual", "norm_output")}
        head = torch.eye(HIDDEN, dtype=torch.float64)
        for span, embeddings in zip(spans, tokens, strict=True):
            for row in range(span.stop - span.start):
                prefix = embeddings[: row + 1 + STEPS]
                served = oracle.eagle3_serve(weights, shape, aux[span], prefix, head, row, STEPS, **ways)
                for ours, theirs in zip(trained, served, strict=True):
                    found = StepOutput(*(state[span.start + row] for state in ours))
                    assert (found.hidden - theirs.hidden).abs().max() <= BOUND * theirs.hidden.abs().max()
                    assert (found.feedback - theirs.feedback).abs().max() <= BOUND * theirs.feedback.abs().max()


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "medusa"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_recomputing_steps_changes_no_bit_and_keeps_less(name: str, packed: bool) -> None:
    outcomes = []
    for recompute in (False, True):
        draft = build(VARIANTS[name], TensorParallel()).draft
        leaves = [leaf.requires_grad_() for leaf in document_cases.draft_inputs(draft, BOUNDS[-1])]
        given = leaves if packed else [torch.cat(leaf.split(BOUNDS[-1] // 2), 1) for leaf in leaves]
        saved: dict[int, int] = {}

        def note(tensor: Tensor, into: dict[int, int] = saved) -> Tensor:
            into[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        documents = Documents(BOUNDS, lengths=LENGTHS) if packed else None
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            values = document_cases.call(draft, given, documents=documents, recompute=recompute)
        weights = {key: drawn(f"weight of {key}", tuple(value.shape)) for key, value in values.items()}
        document_cases.weighted(values, weights).backward()
        results = {key: value.detach() for key, value in values.items()}
        results |= {f"gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
        # Keys and values reach a step inside of tuples, which the hook does not see.
        held = sum(2 * BOUNDS[-1] * p.weight.shape[0] * 8 for n, p in draft.named_modules() if n.endswith("k_proj"))
        kept = sum(saved.values()) + (STEPS * held if recompute else 0)
        outcomes.append((results | document_cases.parameter_gradients(draft, ONE), kept))
    (plain, plain_bytes), (again, again_bytes) = outcomes
    assert plain.keys() == again.keys()
    different = [key for key, value in plain.items() if not torch.equal(value, again[key])]
    assert not different
    # What is left are the inputs of the steps, and the keys and values that later steps read.
    assert again_bytes < 0.6 * plain_bytes


def test_medusa_rows_are_independent(expected: dict[str, Results]) -> None:
    """The bounds change nothing, so that a training loop may hand them to every draft."""
    draft = build(VARIANTS["medusa"], TensorParallel()).draft
    (features,) = document_cases.draft_inputs(draft, BOUNDS[-1])
    with torch.no_grad():
        bare, packed = (document_cases.call(draft, [features], documents=d) for d in (None, Documents(BOUNDS)))
    assert all(torch.equal(bare[name], packed[name]) for name in bare)


BASES = {
    "one process": Layout(),
    "CP2": Layout(context=2),
    "TP2 CP2+SP": Layout(tensor=2, context=2, sequence_parallel=True),
}


def run_base(rank_pool: RankPool, layout: Layout, **options: Any) -> list[Results]:
    world = layout.tensor * layout.context
    target = "tests.parity.document_cases:base_model"
    return rank_pool.run(target, world_size=world, layout=layout, **options)


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "megatron-core's parameters"])
@pytest.mark.parametrize("layout", ["one process", "CP2"])
def test_a_packed_base_is_each_document_alone(layout: str, plain: bool, rank_pool: RankPool) -> None:
    """Through GPTModel.forward, with windowed layers, and with every gradient: a base may be trained too."""
    (alone,) = run_base(rank_pool, Layout(), alone=True, plain=False)
    for found in run_base(rank_pool, BASES[layout], alone=False, plain=plain):
        check(found, alone)


def test_a_packed_base_on_four_ranks(rank_pool: RankPool) -> None:
    """Under TP the ranks hold their own drawn shards, so that TP2 is the reference of TP2 CP2."""
    reference = run_base(rank_pool, Layout(tensor=2, sequence_parallel=True), alone=False, plain=False)
    found = run_base(rank_pool, BASES["TP2 CP2+SP"], alone=False, plain=False)
    for rank, results in enumerate(found):
        check(results, reference[rank % 2])


def test_a_row_that_is_not_packed_is_refused_under_context_parallelism(rank_pool: RankPool) -> None:
    for message in rank_pool.run("tests.parity.document_cases:dense", world_size=2):
        assert message.startswith(UnsupportedError.__name__)
        assert "context_parallel_size = 2 without packed_seq_params" in message
