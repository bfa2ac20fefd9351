"""The parts of a `GPTModel` that megatron-core's local implementation lacks or gets wrong off CUDA.

Its norm refuses sequence parallelism, its attention builds [s, s] scores, knows neither packed documents nor
context parallelism and ignores windows given per layer, and its rotary embeddings cannot say every scaling.
These classes have the constructors that megatron-core's specs call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from mcore_spec.bases.megatron_cache import CacheParams
from mcore_spec.bases.packed_attention import Window, dense_attention, longest, packed_attention
from mcore_spec.config import RopeConfig
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.layers.norm import rms_norm
from mcore_spec.layers.rotary import RotaryEmbedding
from mcore_spec.parallel.collectives import Group, group_size
from mcore_spec.parallel.documents import Documents


class BaseRMSNorm(nn.Module):
    """RMSNorm with the constructor of megatron-core's norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        """Weight of ones, marked for megatron-core's gradient reduction under sequence parallelism."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)


@dataclass
class DocumentParams(PackedSeqParams):
    """megatron-core's description of a packed row, and ours beside it.

    Attributes:
        documents: the same bounds, seen from this context-parallel rank.
    """

    documents: Documents = field(kw_only=True)


def document_params(documents: Documents, *, device: torch.device) -> DocumentParams:
    """The packed row for megatron-core's layers: bounds of the whole row, int32 on `device`, in rows.

    Padding at the end of a document counts as rows of it: attention is causal, so that no token sees it.
    """
    bounds = torch.tensor(documents.bounds, dtype=torch.int32, device=device)
    most = longest(documents.bounds)
    return DocumentParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=most,
        max_seqlen_kv=most,
        documents=documents,
    )


class _Packed(NamedTuple):
    """Bounds of the documents that have rows, and their lengths without padding."""

    bounds: tuple[int, ...]
    lengths: tuple[int, ...]


def _read_packed(params: PackedSeqParams) -> _Packed:
    """What somebody else's parameters say.

    Raises:
        UnsupportedError: another layout than ours, or keys of other documents than the queries'.
    """
    if params.qkv_format != "thd":
        raise UnsupportedError(f"packed_seq_params.qkv_format = {params.qkv_format!r}: only 'thd' is implemented")
    if params.cp_group is not None or params.local_cp_size is not None:
        raise UnsupportedError(
            f"packed_seq_params.local_cp_size = {params.local_cp_size}: a context-parallel size of each row's own is "
            "not implemented; leave it and cp_group out"
        )
    for name in ("cu_seqlens_{}", "cu_seqlens_{}_padded"):
        query, key = (vars(params)[name.format(kind)] for kind in ("q", "kv"))
        if (query is None) != (key is None) or (query is not None and query.tolist() != key.tolist()):
            raise UnsupportedError(
                f"packed_seq_params.{name.format('kv')} is not {name.format('q')}: only self attention is implemented"
            )
    tokens = params.cu_seqlens_q.tolist()
    rows = tokens if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded.tolist()
    filled = [index for index, (start, stop) in enumerate(pairwise(rows)) if stop > start]
    return _Packed(
        bounds=(rows[0], *(rows[index + 1] for index in filled)),
        lengths=tuple(tokens[index + 1] - tokens[index] for index in filled),
    )


def _documents_of(params: PackedSeqParams, *, num_local_rows: int, group: Group) -> Documents:
    """The documents behind `params` on this rank.

    Raises:
        UnsupportedError: see `_read_packed`.
        ConfigError: bounds that do not fit the rows or the number of context-parallel ranks.
    """
    if isinstance(params, DocumentParams):
        assert group_size(params.documents.group) == group_size(group), "documents are cut over the model's ranks"
        return params.documents
    packed, size = _read_packed(params), group_size(group)
    if packed.bounds[0] != 0 or packed.bounds[-1] != num_local_rows * size:
        raise ConfigError(
            f"packed_seq_params.cu_seqlens_q goes from {packed.bounds[0]} to {packed.bounds[-1]}, but there are "
            f"{num_local_rows * size} rows (context_parallel_size = {size}); let it cover every row, padding too"
        )
    spans = [stop - start for start, stop in pairwise(packed.bounds)]
    if size > 1 and any(span % (2 * size) for span in spans):
        raise ConfigError(
            f"packed_seq_params: documents of {spans} rows with context_parallel_size = {size}; pad each to a "
            f"multiple of {2 * size} and give cu_seqlens_q_padded"
        )
    return Documents(packed.bounds, lengths=packed.lengths, group=group)


class CausalAttention(nn.Module):
    """Causal grouped-query attention, optionally windowed, through torch's fused kernels.

    Packed documents do not see each other. Under context parallelism, which needs packed documents (one will
    do), keys and values are joined over the ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,
    ) -> None:
        """Take what megatron-core's `SelfAttention` passes.

        Raises:
            UnsupportedError: cross attention.
        """
        super().__init__()
        if attention_type != "self":
            raise UnsupportedError(f"attention_type = {attention_type!r}: only self attention is implemented")
        is_windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # megatron-core keeps keys with q - k <= window_size[0].
        self.window = config.window_size[0] + 1 if is_windowed else None
        self.layer_number = layer_number
        self.scale = softmax_scale
        self.context_group: Group = None if pg_collection is None else pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Tensor:
        """One layer's attention.

        Args:
            query: [s, b, heads, d]; with `packed_seq_params` this rank's rows of one packed row, [t, heads, d].
            key: like `query`, with the key/value heads.
            value: like `key`.
            attention_mask: ``None``, or the ordinary causal mask, bool [1 or b, 1, s, s], true where a key is hidden.
            options: `packed_seq_params`; of the others, `attention_bias` must be ``None``.

        Returns:
            [s, b, heads d], or [t, heads d].

        Raises:
            UnsupportedError: another mask, a bias, or context parallelism without `packed_seq_params`.
            ConfigError: packed bounds that do not fit the rows.
        """
        params, size = options.get("packed_seq_params"), group_size(self.context_group)
        if options.get("attention_bias") is not None:
            raise UnsupportedError("attention_bias must be None: attention is causal and nothing else")
        if params is not None:
            if attention_mask is not None:
                raise UnsupportedError("attention_mask must be None beside packed_seq_params, which says the same")
            if isinstance(params, CacheParams):
                return params.attend(query, key, value, layer=self.layer_number, window=self.window, scale=self.scale)
            documents = _documents_of(params, num_local_rows=query.shape[0], group=self.context_group)
            return self._packed(query, key, value, documents)
        _refuse_dense_context_parallelism(size)
        if attention_mask is not None:
            _check_causal(attention_mask, batch=query.shape[1], length=query.shape[0])
        return dense_attention(query, key, value, Window(self.window, self.scale)).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        """[t, heads, d] of this rank -> [t, heads d]; megatron-core drops the batch of one."""
        query, key, value = query[:, None], key[:, None], value[:, None]
        return packed_attention(query, key, value, documents, Window(self.window, self.scale))[:, 0].flatten(1)


def _refuse_dense_context_parallelism(size: int) -> None:
    if size > 1:
        raise UnsupportedError(
            f"context_parallel_size = {size} without packed_seq_params: rows are cut over the ranks document by "
            "document; give packed_seq_params, also for one document"
        )


def _check_causal(mask: Tensor, *, batch: int, length: int) -> None:
    """Megatron-LM's loops pass the causal mask; attention is causal without it, and nothing else."""
    if mask.dtype is torch.bool and mask.shape in ((1, 1, length, length), (batch, 1, length, length)):
        hidden = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
        if torch.equal(mask, hidden.expand_as(mask)):
            return
    raise UnsupportedError(
        f"attention_mask ({mask.dtype}, {list(mask.shape)}) is not the causal mask of {length} rows, bool and true "
        "above the diagonal: attention is causal; leave the mask out, and give documents as packed_seq_params"
    )


class BaseRotaryEmbedding(nn.Module):
    """Our rotary embedding with the interface of megatron-core's; every scaling has the one owner."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        """Compute the tables.

        Args:
            rope: base and scaling.
            head_dim: width of a head.
        """
        super().__init__()
        self.rotary = RotaryEmbedding(rope, head_dim)

    def forward(self, max_seq_len: int, offset: int = 0, **_unused: Any) -> Tensor:
        """Angles of positions offset..offset + max_seq_len - 1: [max_seq_len, 1, 1, head_dim] float32."""
        positions = torch.arange(offset, offset + max_seq_len, device=self.rotary.short.device)
        return self.rotary.angles(positions, sequence_length=offset + max_seq_len)[:, None, None, :]

    def packed(self, documents: Documents) -> Tensor:
        """Angles of every row of a packed row: [rows, 1, 1, head_dim] float32, the same on every rank.

        Positions restart with each document, whose own length chooses LongRoPE's table. megatron-core takes
        as many angles as there are rows for angles row by row, and cuts out each rank's
        (``_apply_rotary_pos_emb_thd`` in models/common/embeddings/rope_utils.py).
        """
        device = self.rotary.short.device
        positions, lengths = documents.positions.to(device), documents.row_lengths.to(device)
        return self.rotary.angles(positions, sequence_length=lengths)[:, None, None, :]

    def get_rotary_seq_len(
        self,
        _inference_context: object,
        transformer: TransformerBlock,
        transformer_input: Tensor | None,
        config: TransformerConfig,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> int:
        """How many positions `forward` is to be asked for: those of the longest document.

        Raises:
            UnsupportedError: context parallelism without packed documents, or documents that LongRoPE rotates
                by different tables: `forward` is told one length for all.
        """
        if packed_seq_params is not None:
            return self._longest_document(packed_seq_params)
        _refuse_dense_context_parallelism(config.context_parallel_size)
        received: Tensor | None = transformer.input_tensor
        hidden = transformer_input if received is None else received
        assert hidden is not None, "the first stage has an embedding, the others a received tensor"
        shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return int(hidden.shape[0]) * shards

    def _longest_document(self, params: PackedSeqParams) -> int:
        """From the bounds, not from max_seqlen: as many angles as rows would be taken for angles row by row."""
        if isinstance(params, DocumentParams):
            packed = _Packed(params.documents.bounds, params.documents.lengths)
        else:
            packed = _read_packed(params)
        most, original = longest(packed.bounds), self.rotary.original_length
        if self.rotary.has_two_tables and any((n > original) != (most > original) for n in packed.lengths):
            raise UnsupportedError(
                f"packed documents of {list(packed.lengths)} tokens, some longer than LongRoPE's "
                f"original_max_position_embeddings = {original} and some not, in GPTModel.forward, which rotates all "
                "alike; pack documents of one kind"
            )
        return most


def empty_block_spec() -> TransformerBlockSubmodules:
    """Submodules of a `TransformerBlock` that is the final norm alone."""
    return TransformerBlockSubmodules(layer_specs=[], layer_norm=BaseRMSNorm)


def local_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Submodules of one pipeline stage's `TransformerBlock`, with our norm and attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_num_layers_to_build

    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = BaseRMSNorm
    layer.submodules.pre_mlp_layernorm = BaseRMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = BaseRMSNorm
        attention.k_layernorm = BaseRMSNorm
    layers: list[ModuleSpec] = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=BaseRMSNorm)


def transformer_engine_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """megatron-core's Transformer Engine layer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
