"""What the ranks do in `test_export`: convert a base, export the draft, and say what the module computes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import BaseGPTModel, build_gpt_model
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.checkpoint.store import make_record
from mcore_spec.config import BaseIdentity
from mcore_spec.conversion import convert
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.errors import McoreSpecError
from mcore_spec.export.draft import export_draft
from mcore_spec.parallel.collectives import gather_without_grad
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import sharded_tensors, whole_shape
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from mcore_spec.weights.hf_import import import_hf
from mcore_spec.weights.safetensors_io import WeightDirectory

# Tokens that are drafted in a row.
CHAIN = 3


def import_base(directory: Path, layout: Layout) -> tuple[BaseGPTModel, BaseIdentity]:
    """The base in this layout, and where it came from."""
    raw = read_hf_config(directory)
    model = build_gpt_model(describe_hf(raw, where=str(directory)), layout)
    with WeightDirectory(directory) as weights:
        import_hf(model, weights)
        identity = BaseIdentity(source=str(directory), fingerprint=weights.fingerprint(), hf_config=raw)
    return model, identity


def converted(
    base_directory: Path, layout: Layout, mode: Any, d2t: Tensor | None
) -> tuple[BaseGPTModel, CheckpointRecord]:
    """The base with a draft whose weights are far from their initial ones, and equal in every layout."""
    model, identity = import_base(base_directory, layout)
    if mode is not None:
        convert(model, mode, d2t=d2t)
        draft = MegatronBase(model).draft()
        if draft is not None:
            disturb(draft)
    return model, make_record(model, identity)


@torch.no_grad()
def disturb(draft: Draft) -> None:
    """Norms are not one, residual blocks and biases not zero, the head not the base's; padding stays zero."""
    for entry in sharded_tensors(draft):
        name, tensor, shard = entry
        if not tensor.dtype.is_floating_point:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = 0.2 * torch.randn(whole_shape(entry, draft.tp), generator=generator, dtype=torch.float64)
        if shard.dim is not None:
            start = draft.tp.rank * tensor.shape[shard.dim]
            length = min(tensor.shape[shard.dim], noise.shape[shard.dim] - start)
            noise, tensor = noise.narrow(shard.dim, start, length), tensor.narrow(shard.dim, 0, length)
        tensor.add_(noise)


def export_and_run(
    base_directory: Path, directory: Path, layout: Layout, mode: Any, d2t: Tensor | None, token_ids: Tensor
) -> dict[str, Any] | None:
    """Export the draft; on the last stage, also what the module says about `token_ids` [b, s + CHAIN]."""
    with parallel_runtime(layout):
        model, record = converted(base_directory, layout, mode, d2t)
        export_draft(model, record, directory)
        return module_outputs(model, token_ids)


@torch.no_grad()
def module_outputs(model: BaseGPTModel, token_ids: Tensor) -> dict[str, Any] | None:
    """Logits of every step over given tokens, and the tokens that the draft would propose."""
    base = MegatronBase(model)
    draft = base.draft()
    num_rows = token_ids.shape[1] - CHAIN
    aux_ids = draft_aux_ids(model)
    features = base.features(token_ids[:, :num_rows], aux_layer_ids=aux_ids)
    if features is None:
        return None
    if isinstance(draft, MedusaDraft):
        logits = [whole_logits(base, each, draft.heads[0].lm_head.vocab_size) for each in draft(features.last)]
        chain = torch.stack([draft.head_token_ids()[each[-1].argmax(-1)] for each in logits[:CHAIN]])
        return {"logits": logits, "chain": chain}
    assert draft is not None
    read = features.aux if draft.reads == "aux" else features.last

    def step_logits(tokens: Tensor, num_steps: int) -> list[Tensor]:
        rows = [tokens[:, 1 + step : 1 + step + num_rows] for step in range(num_steps)]
        outputs = draft(read, [base.embed(each) for each in rows])
        return [head_logits(base, draft, output.hidden) for output in outputs]

    # Row s-1 of step k sees no other row of the steps after the first: the columns that are not drafted
    # yet may hold anything.
    drafted = torch.cat([token_ids[:, : num_rows + 1], torch.zeros_like(token_ids[:, :CHAIN])], 1)
    for step in range(CHAIN):
        ids = step_logits(drafted, step + 1)[step][-1].argmax(-1)
        if isinstance(draft, Eagle3Draft) and draft.has_reduced_vocabulary:
            ids = draft.head_token_ids()[ids]
        drafted[:, num_rows + 1 + step] = ids
    return {"logits": step_logits(token_ids, CHAIN), "chain": drafted[:, num_rows + 1 :].T}


def draft_aux_ids(model: nn.Module) -> tuple[int, ...]:
    """The aux layers; every stage must know them."""
    from mcore_spec.config import EagleConfig
    from mcore_spec.conversion import conversion_of

    conversion = conversion_of(model)
    assert conversion is not None
    if not isinstance(conversion.config, EagleConfig):
        return ()
    return conversion.config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids


def head_logits(base: MegatronBase, draft: Draft, hidden: Tensor) -> Tensor:
    """[s, b, h] -> [s, b, v] of the draft's head, or of the base's where it has none."""
    heads = draft.own_heads()
    if heads:
        return whole_logits(base, heads[0](base.tp.enter(hidden)), heads[0].vocab_size)
    return whole_logits(base, base.logits(hidden), base.architecture.vocab_size)


def whole_logits(base: MegatronBase, local: Tensor, vocab_size: int) -> Tensor:
    """This rank's logits -> all, without padding."""
    return gather_without_grad(local, -1, base.tp.group)[..., :vocab_size]


def refused_export(
    base_directory: Path,
    directory: Path,
    layout: Layout,
    mode: Any,
    d2t: Tensor | None,
    damage: str,
    export_format: Any = "hf",
) -> str:
    """Spoil the draft in one way, try to export it, and return the message of the refusal."""
    with parallel_runtime(layout):
        model, record = converted(base_directory, layout, mode, d2t)
        draft = MegatronBase(model).draft()
        if draft is not None:
            DAMAGES[damage](draft)
        try:
            export_draft(model, record, directory, export_format=export_format)
        except McoreSpecError as error:
            return f"{type(error).__name__}: {error}"
    return "not refused"


DAMAGES: dict[str, Any] = {
    "none": lambda draft: None,
    "d2t never filled": lambda draft: draft.d2t.fill_(-1),
    "d2t out of range": lambda draft: draft.d2t[-1:].fill_(1000),
    "unsorted layers": lambda draft: setattr(draft, "aux_layer_ids", (4, 1, 3)),
}
