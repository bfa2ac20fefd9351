"""What the ranks do for `test_drafts_documents.py`: drafts, and a base, on packed rows in several layouts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from mcore_spec.bases.megatron_build import build_gpt_model
from mcore_spec.bases.megatron_layers import document_params
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.errors import McoreSpecError
from mcore_spec.layers.attention import AttentionShape, KeyValue, TTTAttention, TTTRows
from mcore_spec.parallel.collectives import Group
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import Shard, gather_whole, sharded_tensors
from mcore_spec.parallel.tensor_parallel import Placement, TensorParallel
from tests.parity.draft_cases import VOCABULARY, Variant, build, eagle1, eagle3, mtp
from tests.tiny import VOCAB_SIZE, base_architecture, cut, drawn, fill

STEPS = 4
HIDDEN = base_architecture().hidden_size
# Multiples of four: two context-parallel ranks. Padding at the end of the first and the last.
BOUNDS, LENGTHS = (0, 4, 16, 24), (3, 12, 6)
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    # The second document takes the long table. The third would too, were its padding counted.
    "original_max_position_embeddings": 6,
    "factor": 2.0,
}
VARIANTS = {
    "eagle3": eagle3(),
    "eagle3, longrope": eagle3(rope_scaling=LONGROPE, num_hidden_layers=2, norm_output=True),
    "eagle3, biases": eagle3(attention_bias=True, mlp_bias=True, fc_norm=True),
    "eagle1": eagle1(num_hidden_layers=2),
    "eagle-mtp on Qwen3": mtp({"family": "qwen3", "qk_norm": True}),
    "medusa": Variant(("medusa", {"medusa_num_heads": 3, "medusa_num_layers": 2})),
}


class Cut(NamedTuple):
    """How many ranks share a layer, and how many share the rows."""

    tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False


class Groups(NamedTuple):
    """This rank's groups under a `Cut`: neighbours share a layer."""

    tp: TensorParallel
    context: Group


def groups_of(layout: Cut) -> Groups:
    """Every rank of the job must call, since all of them take part in making a group."""
    if layout.tensor * layout.context == 1:
        return Groups(TensorParallel(), None)
    ranks = torch.arange(layout.tensor * layout.context).view(layout.context, layout.tensor)
    own, tensor, context = dist.get_rank(), None, None
    for row in ranks.tolist():
        group = dist.new_group(row)
        tensor = group if own in row else tensor
    for column in ranks.T.tolist():
        group = dist.new_group(column)
        context = group if own in column else context
    tp = TensorParallel(
        group=tensor if layout.tensor > 1 else None, sequence_parallel=layout.sequence_parallel
    )  # fmt: skip
    return Groups(tp, context if layout.context > 1 else None)


def draft_inputs(draft: Draft, num_rows: int) -> list[Tensor]:
    """Whole features, and embeddings of every step, [rows, 1, width] of order one."""
    width = HIDDEN * (len(draft.aux_layer_ids) if isinstance(draft, Eagle3Draft) else 1)
    names = ["features", *(f"embedding {step}" for step in range(STEPS))]
    if isinstance(draft, MedusaDraft):
        return [5 * drawn("features", (num_rows, 1, width))]
    widths = [width, *[HIDDEN] * STEPS]
    return [5 * drawn(name, (num_rows, 1, size)) for name, size in zip(names, widths, strict=True)]


def call(draft: Draft, leaves: Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
    """Everything that a draft gives, by name."""
    if isinstance(draft, MedusaDraft):
        return {f"logits {i}": logits for i, logits in enumerate(draft(leaves[0], **options))}
    outputs = draft(leaves[0], leaves[1:], **options)
    named = {f"hidden {step}": output.hidden for step, output in enumerate(outputs)}
    return named | {f"feedback {step}": output.feedback for step, output in enumerate(outputs)}


def weighted(values: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    return torch.stack([(value * weights[name]).sum() for name, value in values.items()]).sum()


def run_packed(
    variant: Variant, groups: Groups, *, bounds: Sequence[int], lengths: Sequence[int], recompute: bool = False
) -> dict[str, Tensor]:
    """Whole outputs of the packed row, and the whole gradients of weights and inputs, as this rank sees them."""
    tp = groups.tp
    documents = Documents(bounds, lengths=lengths, group=groups.context)
    draft = build(variant, tp).draft
    rows = Shard(0 if tp.sequence_parallel else None)

    def local(whole: Tensor) -> Tensor:
        return cut(documents.take(whole), rows, tp)

    leaves = [local(whole).clone().requires_grad_() for whole in draft_inputs(draft, documents.num_rows)]
    options: dict[str, Any] = {"recompute": True} if recompute else {}
    values = call(draft, leaves, documents=documents, **options)
    is_medusa = isinstance(draft, MedusaDraft)
    shard = VOCABULARY if is_medusa else rows
    width = VOCAB_SIZE if is_medusa else HIDDEN
    whole = {name: drawn(f"weight of {name}", (documents.num_rows, 1, width)) for name in values}
    # Logits stand inside of the parallel region: they have every row, and a part of the vocabulary.
    weights = {name: cut(documents.take(weight), shard, tp) for name, weight in whole.items()}
    weighted(values, weights).backward()

    def joined(tensor: Tensor, kept: Shard) -> Tensor:
        return documents.join(gather_whole(tensor, kept, tp), with_grad=False)

    found = {name: joined(value, shard) for name, value in values.items()}
    for index, leaf in enumerate(leaves):
        assert leaf.grad is not None, f"input {index} has no gradient"
        found[f"gradient of input {index}"] = joined(leaf.grad, rows)
    return found | parameter_gradients(draft, groups)


def parameter_gradients(module: nn.Module, groups: Groups) -> dict[str, Tensor]:
    """Whole gradients by name, each rank's rows' terms added."""
    found = {}
    for entry in sharded_tensors(module):
        if entry.tensor.is_floating_point():
            assert entry.tensor.grad is not None, f"{entry.name} has no gradient"
            whole = gather_whole(entry.tensor.grad, entry.shard, groups.tp)
            if groups.context is not None:
                dist.all_reduce(whole, group=groups.context)
            found[f"gradient of {entry.name}"] = whole
    return found


def packed_drafts(*, layout: Cut, recompute: bool) -> dict[str, dict[str, Tensor]]:
    """Every variant under one cut of the ranks."""
    groups = groups_of(layout)
    variants = {name: variant for name, variant in VARIANTS.items() if not recompute or name != "medusa"}
    return {
        name: run_packed(variant, groups, bounds=BOUNDS, lengths=LENGTHS, recompute=recompute)
        for name, variant in variants.items()
    }


ATTENTION = AttentionShape(
    input_size=12, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=8, eps=1e-5, qkv_bias=True, qk_norm=True
)


def attention_layer(*, layout: Cut) -> dict[str, Tensor]:
    """One attention layer over all steps: outputs, joined keys, and the gradient of the input and the weights."""
    groups = groups_of(layout)
    documents = Documents(BOUNDS, lengths=LENGTHS, group=groups.context)
    rope = base_architecture().rope
    layer = TTTAttention(ATTENTION, rope, place=Placement(tp=groups.tp, dtype=torch.float64))
    fill(layer, groups.tp)
    rows = Shard(0 if groups.tp.sequence_parallel else None)
    found: dict[str, Tensor] = {}
    past: list[KeyValue] = []
    leaves, terms = [], []
    for step in range(STEPS):
        whole = 5 * drawn(f"input {step}", (documents.num_rows, 1, ATTENTION.input_size))
        leaves.append(cut(documents.take(whole), rows, groups.tp).clone().requires_grad_())
        own = TTTRows(step=step, past=past, documents=documents)
        output = layer(leaves[-1], rows=own)
        past = own.steps
        weight = drawn(f"weight {step}", (documents.num_rows, 1, ATTENTION.hidden_size))
        terms.append((output * cut(documents.take(weight), rows, groups.tp)).sum())
        found[f"output {step}"] = documents.join(gather_whole(output, rows, groups.tp), with_grad=False)
    torch.stack(terms).sum().backward()
    assert past[0].key.shape[0] == documents.num_rows
    assert {step.key.shape[0] for step in past[1:]} == {documents.num_local_rows}
    for step, leaf in enumerate(leaves):
        assert leaf.grad is not None
        whole_grad = gather_whole(leaf.grad, rows, groups.tp)
        found[f"gradient of input {step}"] = documents.join(whole_grad, with_grad=False)
    return found | parameter_gradients(layer, groups)


# A window shorter than two of the documents on every other layer.
BASE = {"num_layers": 4, "window_size": 5, "windowed_layers": (True, False, True, False), "qk_norm": True}
TOKENS = torch.randint(VOCAB_SIZE, (1, BOUNDS[-1]), generator=torch.Generator().manual_seed(6))


def base_model(*, layout: Layout, alone: bool, plain: bool) -> dict[str, Tensor]:
    """Logits of megatron-core's forward over the packed row, and the gradient of every weight of this rank.

    Args:
        layout: tensor and context parallel.
        alone: each document in a call of its own, not packed.
        plain: megatron-core's own parameters instead of ours.
    """
    with parallel_runtime(layout):
        model = build_gpt_model(base_architecture(**BASE), layout)
        groups = Groups(
            TensorParallel(group=model.pg_collection.tp, sequence_parallel=layout.sequence_parallel),
            model.pg_collection.cp,
        )
        for name, parameter in model.named_parameters():
            _fill_base(name, parameter, groups.tp)
        weight = drawn("weight of logits", (1, BOUNDS[-1], VOCAB_SIZE))
        if alone:
            parts = [TOKENS[:, start:stop] for start, stop in pairwise(BOUNDS)]
            logits = torch.cat([_forward(model, part, None)[..., :VOCAB_SIZE] for part in parts], dim=1)
            (logits * weight).sum().backward()
        else:
            documents = Documents(BOUNDS, lengths=LENGTHS, group=groups.context)
            local = _forward(model, documents.take(TOKENS, 1), _params(documents, plain=plain))
            shard = Shard(2, VOCAB_SIZE)
            (local * cut(documents.take(weight, 1), shard, groups.tp)).sum().backward()
            whole = gather_whole(local, shard, groups.tp).transpose(0, 1)
            logits = documents.join(whole, with_grad=False).transpose(0, 1)
        gradients = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            gradients[f"gradient of {name}"] = parameter.grad
            dist.all_reduce(parameter.grad, group=groups.context)
            if not _is_sharded(parameter):
                # Other rows under sequence parallelism, other heads in the norms of queries and keys.
                dist.all_reduce(parameter.grad, group=groups.tp.group)
        return {"logits": logits.detach(), **gradients}


def _fill_base(name: str, parameter: Tensor, tp: TensorParallel) -> None:
    """Drawn values. Two tensor-parallel ranks draw their shards apart, which is all that a comparison needs."""
    label = f"rank {tp.rank} {name}" if _is_sharded(parameter) else name
    with torch.no_grad():
        parameter.copy_(drawn(label, tuple(parameter.shape)))


def _is_sharded(parameter: Tensor) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def _params(documents: Documents, *, plain: bool) -> PackedSeqParams:
    ours = document_params(documents, device=torch.device("cpu"))
    if not plain:
        return ours
    # Lengths without padding as a running sum, as Megatron-LM's loaders give them.
    sums = torch.tensor([0, *torch.tensor(documents.lengths).cumsum(0).tolist()], dtype=torch.int32)
    # The trap of megatron-core's own rotary embedding: max_seqlen as long as the row.
    longest = documents.num_rows
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=sums,
        cu_seqlens_kv=sums,
        cu_seqlens_q_padded=ours.cu_seqlens_q,
        cu_seqlens_kv_padded=ours.cu_seqlens_q,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _forward(model: nn.Module, tokens: Tensor, params: PackedSeqParams | None) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None, packed_seq_params=params)


def dense() -> str:
    """What a base says about a row without documents that two ranks share."""
    with parallel_runtime(Layout(context=2)):
        model = build_gpt_model(base_architecture(), Layout(context=2))
        try:
            _forward(model, TOKENS[:, :8], None)
        except McoreSpecError as error:
            return f"{type(error).__name__}: {error}"
    return "accepted"
