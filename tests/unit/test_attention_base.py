"""The attention and the rotary embedding that a megatron-core base is given: packed rows, windows, masks.

float64: a softmax over a dozen scores, taken in another order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mcore_spec.bases import packed_attention
from mcore_spec.bases.megatron_layers import BaseRotaryEmbedding, CausalAttention, DocumentParams, document_params
from mcore_spec.config import RopeConfig
from mcore_spec.errors import ConfigError, McoreSpecError, UnsupportedError
from mcore_spec.layers.rotary import apply_rotary
from mcore_spec.parallel.documents import Documents
from tests.unit.document_cases import StandIn, documents_of_ranks

ROUNDING = 1e-12
CPU = torch.device("cpu")
HEADS, GROUPS, HEAD_DIM = 4, 2, 8
BOUNDS = [0, 1, 3, 8, 17]


def attention(*, window: int | None = None, context: Any = None, scale: float | None = None) -> CausalAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=HEADS,
        window_size=None if window is None else (window - 1, 0),
    )
    groups = ProcessGroupCollection()
    groups.cp = context
    return CausalAttention(config, 1, None, "self", softmax_scale=scale, pg_collection=groups)


def packed_inputs(rows: int) -> list[Tensor]:
    """Query, key, value and the weights of a sum over the output, [rows, heads, d]."""
    generator = torch.Generator().manual_seed(3)
    sizes = (HEADS, GROUPS, GROUPS)
    given = [torch.randn(rows, n, HEAD_DIM, generator=generator, dtype=torch.float64) for n in sizes]
    weight = torch.randn(rows, HEADS * HEAD_DIM, generator=generator, dtype=torch.float64)
    return [*(tensor.requires_grad_() for tensor in given), weight]


def by_mask(
    query: Tensor, key: Tensor, value: Tensor, *, bounds: list[int], window: int | None, scale: float
) -> Tensor:
    """One softmax over all scores, what is not visible left out."""
    rows = torch.arange(query.shape[0])
    visible = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for start, stop in pairwise(bounds):
        visible[start:stop, start:stop] = True
    distance = rows[:, None] - rows
    visible &= (distance >= 0) & (distance < (window or len(rows)))
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hst,thd->shd", weights, value).flatten(1)


def results(output: Tensor, given: list[Tensor]) -> list[Tensor]:
    return [output, *torch.autograd.grad((output * given[3]).sum(), given[:3])]


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= ROUNDING * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("bounds", [BOUNDS, [0, 17]], ids=["several", "one"])
def test_packed_documents_equal_one_masked_softmax(
    bounds: list[int], window: int | None, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "WINDOW_BLOCK", 2)
    given = packed_inputs(bounds[-1])
    params = document_params(Documents(bounds), device=CPU)
    found = attention(window=window, scale=scale)(*given[:3], None, packed_seq_params=params)
    expected = by_mask(*given[:3], bounds=bounds, window=window, scale=scale or HEAD_DIM**-0.5)
    check(results(found, given), results(expected, given))


class WholeKeys(Documents):
    """Documents of one rank of several, without the others: joining gives what the test laid ready."""

    whole: Tensor

    def join(self, tensor: Tensor, *, with_grad: bool) -> Tensor:
        assert with_grad
        assert torch.equal(tensor, self.take(self.whole))
        return self.whole


@pytest.mark.parametrize("window", [None, 3, 9, 100])
def test_ranks_together_equal_one_masked_softmax(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "WINDOW_BLOCK", 2)
    bounds = [0, 4, 16, 28]
    given = packed_inputs(28)
    query, key, value, _ = given
    output = torch.zeros(28, HEADS * HEAD_DIM, dtype=torch.float64)
    for rank in range(2):
        group: Any = StandIn(rank, 2)
        documents = WholeKeys(bounds, group=group)
        documents.whole = torch.cat((key, value), dim=1)[:, None]
        local = [documents.take(tensor) for tensor in (query, key, value)]
        params = document_params(documents, device=CPU)
        rows = attention(window=window, context=group)(*local, None, packed_seq_params=params)
        output = output.index_copy(0, documents.row_index, rows)
    expected = by_mask(query, key, value, bounds=bounds, window=window, scale=HEAD_DIM**-0.5)
    check(results(output, given), results(expected, given))


def test_no_scores_of_a_windowed_row_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and scores are as large as a block and its window, not as the row."""
    monkeypatch.setattr(packed_attention, "WINDOW_BLOCK", 16)
    rows, window = 256, 8
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        if tensor.shape[-2:].numel() > 0 and tensor.shape[-1] != HEAD_DIM:
            largest = max(largest, tensor.shape[-2:].numel())
        return tensor

    given = packed_inputs(rows)
    params = document_params(Documents([0, 100, rows]), device=CPU)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention(window=window)(*given[:3], None, packed_seq_params=params)
    assert 0 < largest <= HEADS * 16 * (16 + window)


def plain(**fields: Any) -> PackedSeqParams:
    """megatron-core's own parameters; lists are running sums."""
    tensors = {
        name: torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
        for name, value in fields.items()
    }
    return PackedSeqParams(**{"qkv_format": "thd", "max_seqlen_q": 17, "max_seqlen_kv": 17, **tensors})


def both(name: str, sums: list[int]) -> dict[str, list[int]]:
    suffix = "_padded" if name == "padded" else ""
    return {f"cu_seqlens_q{suffix}": sums, f"cu_seqlens_kv{suffix}": sums}


PLAIN = {
    "as ours": both("tokens", BOUNDS),
    "padded": {**both("tokens", [0, 1, 2, 6, 12]), **both("padded", BOUNDS)},
    "empty documents": both("tokens", [0, 1, 1, 3, 8, 17, 17]),
}


@pytest.mark.parametrize("fields", PLAIN.values(), ids=list(PLAIN))
def test_somebody_elses_parameters_say_the_same(fields: dict[str, list[int]]) -> None:
    given = packed_inputs(BOUNDS[-1])
    layer = attention()
    ours = layer(*given[:3], None, packed_seq_params=document_params(Documents(BOUNDS), device=CPU))
    assert torch.equal(layer(*given[:3], None, packed_seq_params=plain(**fields)), ours)


def test_our_parameters_are_megatron_cores() -> None:
    (documents,) = documents_of_ranks([0, 4, 12], 1, lengths=[3, 8])
    params = document_params(documents, device=CPU)
    assert isinstance(params, PackedSeqParams)
    assert isinstance(params, DocumentParams) and params.documents is documents
    assert params.cu_seqlens_q.dtype is torch.int32
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == [0, 4, 12]
    assert (params.qkv_format, params.max_seqlen_q, params.max_seqlen_kv) == ("thd", 8, 8)


WHOLE = both("tokens", BOUNDS)
REFUSED: dict[str, tuple[dict[str, Any], type[McoreSpecError], str]] = {
    "layout": ({**WHOLE, "qkv_format": "sbhd"}, UnsupportedError, "qkv_format = 'sbhd'"),
    "own ranks": ({**WHOLE, "local_cp_size": 2}, UnsupportedError, "local_cp_size = 2"),
    "other keys": ({**WHOLE, "cu_seqlens_kv": [0, 2, 3, 8, 17]}, UnsupportedError, "cu_seqlens_kv is not"),
    "other padding": ({**WHOLE, "cu_seqlens_q_padded": BOUNDS}, UnsupportedError, "cu_seqlens_kv_padded is not"),
    "too short": (both("tokens", [0, 1, 8]), ConfigError, "from 0 to 8, but there are 17 rows"),
    "no start": (both("tokens", [1, 8, 17]), ConfigError, "from 1 to 17"),
}


@pytest.mark.parametrize(("fields", "kind", "message"), REFUSED.values(), ids=list(REFUSED))
def test_other_parameters_are_refused_by_name(fields: dict[str, Any], kind: type[McoreSpecError], message: str) -> None:
    with pytest.raises(kind, match=message):
        attention()(*packed_inputs(17)[:3], None, packed_seq_params=plain(**fields))


def test_documents_that_ranks_cannot_share_are_refused() -> None:
    """Half of twelve rows on this rank; six does not go into four chunks."""
    layer = attention(context=StandIn(0, 2))
    with pytest.raises(ConfigError, match=r"documents of \[6, 6\] rows with context_parallel_size = 2.*multiple of 4"):
        layer(*packed_inputs(6)[:3], None, packed_seq_params=plain(**both("tokens", [0, 6, 12])))


def dense_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(6, 3, n, HEAD_DIM, generator=generator, dtype=torch.float64) for n in (HEADS, GROUPS, GROUPS)]


def causal(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_causal_mask_of_a_training_loop_is_taken(batch: int) -> None:
    for layer in (attention(), attention(window=2)):
        assert torch.equal(layer(*dense_inputs(), causal(batch, 1, 6, 6)), layer(*dense_inputs(), None))


MASKS = {
    "not causal": torch.zeros(1, 1, 6, 6, dtype=torch.bool),
    "a row's own key hidden": torch.ones(1, 1, 6, 6, dtype=torch.bool).triu(0),
    "one column of the batch another": torch.cat((causal(2, 1, 6, 6), ~causal(1, 1, 6, 6))),
    "additive": causal(1, 1, 6, 6).double(),
    "another batch": causal(2, 1, 6, 6),
    "another length": causal(1, 1, 5, 5),
    "two dimensions": causal(6, 6),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_other_masks_are_refused(mask: Tensor) -> None:
    with pytest.raises(UnsupportedError, match=r"attention_mask \(.*is not the causal mask of 6 rows"):
        attention()(*dense_inputs(), mask)


def test_what_would_be_ignored_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="attention_bias must be None"):
        attention()(*dense_inputs(), None, attention_bias=torch.zeros(6, 6))
    params = document_params(Documents([0, 6]), device=CPU)
    with pytest.raises(UnsupportedError, match="attention_mask must be None beside packed_seq_params"):
        attention()(*packed_inputs(6)[:3], causal(1, 1, 6, 6), packed_seq_params=params)
    with pytest.raises(UnsupportedError, match="context_parallel_size = 2 without packed_seq_params"):
        attention(context=StandIn(0, 2))(*dense_inputs(), None)


LONGROPE = RopeConfig(
    theta=100.0,
    rope_type="longrope",
    scaling={
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "original_max_position_embeddings": 5,
        "factor": 2.0,
        "attention_factor": 1.0,
    },
)
PLAIN_ROPE = RopeConfig(theta=100.0)


@pytest.mark.parametrize("rope", [PLAIN_ROPE, LONGROPE], ids=["default", "longrope"])
@pytest.mark.parametrize("size", [1, 2])
def test_megatron_core_rotates_packed_rows_as_each_document_alone(size: int, rope: RopeConfig) -> None:
    """The first document has more rows than the original context, and not more tokens."""
    bounds, lengths = [0, 8, 12, 24], [5, 4, 11]
    rotary = BaseRotaryEmbedding(rope, HEAD_DIM)
    x = packed_inputs(24)[0].detach()
    alone = []
    for (start, stop), length in zip(pairwise(bounds), lengths, strict=True):
        cos, sin = rotary.rotary(torch.arange(stop - start), sequence_length=length, dtype=torch.float64)
        alone.append(apply_rotary(x[start:stop, None], cos[:, None, None], sin[:, None, None])[:, 0])
    for rank, documents in enumerate(documents_of_ranks(bounds, size, lengths)):
        angles = rotary.packed(documents)
        assert angles.shape == (24, 1, 1, HEAD_DIM)
        sums = document_params(documents, device=CPU).cu_seqlens_q
        group: Any = StandIn(rank, size)
        found = _apply_rotary_pos_emb_thd(documents.take(x), sums, angles, cp_group=group)
        assert torch.equal(found, documents.take(torch.cat(alone)))


class Stage(nn.Module):
    """As much of a transformer block as is asked for its received hidden states."""

    input_tensor: Tensor | None = None


def asked_length(rotary: BaseRotaryEmbedding, params: PackedSeqParams | None, **config: Any) -> int:
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": HEADS}
    stage: Any = Stage()
    return rotary.get_rotary_seq_len(None, stage, torch.zeros(12, 1, 16), TransformerConfig(**sizes, **config), params)


def test_angles_are_asked_for_the_longest_document() -> None:
    """Also where max_seqlen says as many as there are rows, which megatron-core would take for angles row by row."""
    rotary = BaseRotaryEmbedding(PLAIN_ROPE, HEAD_DIM)
    parameters = [plain(**both("tokens", BOUNDS)), document_params(Documents(BOUNDS), device=CPU)]
    assert [asked_length(rotary, params, context_parallel_size=2) for params in parameters] == [9, 9]
    assert asked_length(rotary, None) == 12
    sharded = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_dtype": torch.float32}
    assert asked_length(rotary, None, **sharded) == 24


def test_a_dense_row_that_ranks_share_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="context_parallel_size = 2 without packed_seq_params"):
        asked_length(BaseRotaryEmbedding(PLAIN_ROPE, HEAD_DIM), None, context_parallel_size=2)


@pytest.mark.parametrize(
    ("bounds", "lengths", "is_mixed"),
    [
        ([0, 4, 9], None, False),
        ([0, 6, 13], None, False),
        ([0, 4, 10], None, True),
        # By their rows both are long, by their tokens one is not.
        ([0, 6, 13], [5, 7], True),
        ([0, 6, 13], [5, 5], True),
    ],
)
def test_one_table_for_documents_of_two_kinds_is_refused(
    bounds: list[int], lengths: list[int] | None, is_mixed: bool
) -> None:
    """GPTModel.forward asks for one table; `packed` has both."""
    params = document_params(Documents(bounds, lengths=lengths), device=CPU)
    for rope in (PLAIN_ROPE, LONGROPE):
        rotary = BaseRotaryEmbedding(rope, HEAD_DIM)
        if is_mixed and rope is LONGROPE:
            with pytest.raises(UnsupportedError, match="original_max_position_embeddings = 5"):
                asked_length(rotary, params)
        else:
            assert asked_length(rotary, params) == max(stop - start for start, stop in pairwise(bounds))
