"""Building a `GPTModel` from a description, and describing a `GPTModel` that somebody else built."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from mcore_spec.bases.megatron_cache import cache_params
from mcore_spec.bases.megatron_layers import (
    BaseRotaryEmbedding,
    CausalAttention,
    document_params,
    empty_block_spec,
    local_block_spec,
    transformer_engine_layer_spec,
)
from mcore_spec.config import BaseArchitecture, RopeConfig
from mcore_spec.errors import UnsupportedError
from mcore_spec.layers.cache import KeyValueCache, NewRows
from mcore_spec.layers.mlp import ACTIVATIONS
from mcore_spec.layers.rotary import rotary_frequencies
from mcore_spec.parallel.collectives import group_rank, group_size
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.layout import Layout, device, require_transformer_engine
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.planning.layout import check_divides

TransformerImpl = Literal["local", "transformer_engine"]
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# What megatron-core fixes of llama3's scaling; only the factor can be chosen there.
MEGATRON_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass
class BaseTransformerConfig(TransformerConfig):
    """megatron-core's configuration and the three fields that its attention reads but does not declare.

    The factor on cos and sin (YaRN and LongRoPE) reaches attention as
    ``(0.1 m ln s + 1) / (0.1 a ln s + 1)``; with s = e, m = 10 (factor - 1) and a = 0 it is the factor.
    """

    yarn_rotary_scaling_factor: float = math.e
    yarn_mscale: float = 0.0
    yarn_mscale_all_dim: float = 0.0


class BaseGPTModel(GPTModel):
    """A `GPTModel` that remembers its description; weight names and forward are megatron-core's."""

    architecture: BaseArchitecture


def build_gpt_model(
    architecture: BaseArchitecture,
    layout: Layout,
    *,
    transformer_impl: TransformerImpl = "local",
    target: torch.device | None = None,
) -> BaseGPTModel:
    """This rank's part of the base, its weights allocated and not yet filled.

    Args:
        architecture: the base.
        layout: must be the one that `parallel_runtime` was entered with.
        transformer_impl: whose layers to use.
        target: device of the weights; ``None``: this rank's. On "meta" nothing is allocated.

    Raises:
        ConfigError: heads, layers or widths that the layout does not divide.
        UnsupportedError: a base with experts.
    """
    if architecture.num_experts is not None:
        raise UnsupportedError(
            f"num_experts = {architecture.num_experts}: bases with experts are not built here; build the GPTModel "
            "yourself and call convert() or restore() on it"
        )
    check_layout(architecture, layout)
    config = transformer_config(architecture, layout)
    target = device() if target is None else target
    if target.type == "meta":
        # Weights are then made where torch makes tensors by default, and not on the GPU.
        config.use_cpu_initialization = True
        config.init_model_with_meta_device = True
    spec: Any
    if not architecture.has_layers:
        spec = empty_block_spec()
    elif transformer_impl == "transformer_engine":
        require_transformer_engine("transformer_impl = transformer_engine", instead="transformer_impl = local")
        spec = transformer_engine_layer_spec(config)
    else:
        spec = local_block_spec(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device(target) if target.type == "meta" else nullcontext():
        model = _construct(architecture, config, spec, groups)
    model.architecture = architecture
    return model.to(target)


def _construct(
    architecture: BaseArchitecture, config: BaseTransformerConfig, spec: Any, groups: ProcessGroupCollection
) -> BaseGPTModel:
    stage, num_stages = group_rank(groups.pp), group_size(groups.pp)
    model = BaseGPTModel(
        config,
        spec,
        vocab_size=TensorParallel(group=groups.tp).padded(architecture.vocab_size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=stage == 0,
        post_process=stage == num_stages - 1,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope.theta,
        pg_collection=groups,
    )
    model.rotary_pos_emb = BaseRotaryEmbedding(architecture.rope, architecture.head_dim)
    return model


def check_layout(architecture: BaseArchitecture, layout: Layout) -> None:
    """Refuse a layout that does not divide the base.

    Raises:
        ConfigError: names the size that does not divide.
        UnsupportedError: stages of a base without layers.
    """
    if not architecture.has_layers and layout.pipeline > 1:
        raise UnsupportedError(
            f"pipeline_model_parallel_size = {layout.pipeline} for a base that is kept without its layers, "
            "which is one stage; give 1"
        )
    check_divides(
        architecture, tensor=layout.tensor, pipeline=layout.pipeline, last_stage_layers=layout.last_stage_layers
    )


def transformer_config(architecture: BaseArchitecture, layout: Layout) -> BaseTransformerConfig:
    """megatron-core's configuration of the base in this layout."""
    dtype = DTYPES[architecture.dtype]
    scaling = rotary_frequencies(architecture.rope, architecture.head_dim, beyond_original=False).attention_scaling
    window = None if architecture.window_size is None else (architecture.window_size - 1, 0)
    return BaseTransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[architecture.hidden_act],
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        window_size=window,
        window_attn_skip_freq=[int(on) for on in architecture.windowed_layers] or None,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        # Weights are read, not drawn: allocate on the host or device and leave them unset.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Fusions are CUDA extensions; the base runs forward only, in torch's own kernels.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        # Gradients are sums over tokens, divided once by the number of tokens of all ranks.
        calculate_per_token_loss=True,
        yarn_mscale=10 * (scaling - 1),
    )


def describe(model: GPTModel) -> BaseArchitecture:
    """The description of a `GPTModel`, also of one that this package did not build.

    Raises:
        UnsupportedError: a part of the model that a draft's layers could not follow.
    """
    if isinstance(model, BaseGPTModel):
        return model.architecture
    config = model.config
    _require(
        model.position_embedding_type == "rope",
        f"position_embedding_type = {model.position_embedding_type!r}",
    )
    _require(config.normalization == "RMSNorm", f"normalization = {config.normalization!r}")
    _require(config.gated_linear_unit, "gated_linear_unit = False")
    _require(not config.add_bias_linear, "add_bias_linear = True")
    _require(model.rotary_percent == 1.0, f"rotary_percent = {model.rotary_percent}")
    _require(not config.rotary_interleaved, "rotary_interleaved = True")
    _require(not config.multi_latent_attention, "multi_latent_attention = True")
    _require(not config.layernorm_zero_centered_gamma, "layernorm_zero_centered_gamma = True")
    _require(not config.qk_l2_norm, "qk_l2_norm = True")
    interpolation = model.rotary_pos_emb.seq_len_interpolation_factor
    _require(interpolation in (None, 1), f"seq_len_interpolation_factor = {interpolation}")
    window = None if config.window_size is None else config.window_size[0] + 1
    windowed = [
        is_layer_window_attention(config.window_size, config.window_attn_skip_freq, number)
        for number in range(1, config.num_layers + 1)
    ]
    return BaseArchitecture(
        family="megatron",
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_sequence_length,
        rms_norm_eps=config.layernorm_epsilon,
        hidden_act=_activation_name(config.activation_func),
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        qkv_bias=config.add_qkv_bias,
        qk_norm=config.qk_layernorm,
        rope=_describe_rope(model),
        window_size=window,
        windowed_layers=() if all(windowed) or window is None else tuple(windowed),
        num_experts=config.num_moe_experts,
        dtype=next(name for name, dtype in DTYPES.items() if dtype is config.params_dtype),
    )


def packed_options(model: GPTModel, documents: Documents) -> dict[str, Any]:
    """What the decoder of `model` takes besides hidden states so that documents do not see each other.

    Raises:
        UnsupportedError: the model's attention builds whole [s, s] scores (megatron-core's local one).
    """
    attention = model.decoder.layers[0].self_attention.core_attention
    _require(not isinstance(attention, DotProductAttention), "megatron-core's local attention and packed documents")
    rotary, params = model.rotary_pos_emb, document_params(documents, device=next(model.parameters()).device)
    if isinstance(rotary, BaseRotaryEmbedding):
        angles = rotary.packed(documents)
    else:
        angles = rotary(params.max_seqlen_q, packed_seq=True)
    return {"rotary_pos_emb": angles, "packed_seq_params": params}


def cached_options(model: GPTModel, rows: NewRows, cache: KeyValueCache) -> dict[str, Any]:
    """What the decoder of `model` takes besides hidden states so that rows join sequences with kept keys and values.

    Raises:
        UnsupportedError: layers of somebody else's, see `check_cacheable`.
    """
    check_cacheable(model)
    rotary = model.rotary_pos_emb.rotary
    params = cache_params(rows, cache, rotary, dtype=model.config.params_dtype)
    return {"rotary_pos_emb": None, "packed_seq_params": params}


def check_cacheable(model: GPTModel) -> None:
    """Refuse a model that cannot keep keys and values.

    Raises:
        UnsupportedError: attention or rotary embedding of somebody else's, or experts on several ranks.
    """
    num_ranks = model.config.expert_model_parallel_size
    if num_ranks > 1:
        raise UnsupportedError(
            f"decoding with expert_model_parallel_size = {num_ranks}: ranks that share experts would have to decode in "
            "step; load the model with 1"
        )
    attention = model.decoder.layers[0].self_attention.core_attention
    if not isinstance(attention, CausalAttention) or not isinstance(model.rotary_pos_emb, BaseRotaryEmbedding):
        raise UnsupportedError(
            f"decoding with a key/value cache and {type(attention).__name__}: only this package's attention keeps "
            "keys and values; load the checkpoint with --transformer-impl local"
        )


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise UnsupportedError(f"GPTModel with {found} cannot carry a draft: its layers could not follow the base")


def _activation_name(function: Callable[[Tensor], Tensor]) -> Any:
    for name, known in ACTIVATIONS.items():
        if function is known:
            return name
    raise UnsupportedError(f"activation_func = {function} is not one of {', '.join(ACTIVATIONS)}")


def _describe_rope(model: GPTModel) -> RopeConfig:
    """Plain or llama3 rotary embedding, recognised by the frequencies themselves."""
    head_dim, actual = model.config.kv_channels, model.rotary_pos_emb.inv_freq.float().cpu()
    rope = RopeConfig(theta=float(model.rotary_base))
    if model.rotary_scaling:
        # The model keeps no record of the factor: its lowest frequency is the plain one divided by it.
        plain = rotary_frequencies(rope, head_dim, beyond_original=False).inv_freq
        scaling = {**MEGATRON_LLAMA3, "factor": round(float(plain[-1] / actual[-1]), 3)}
        rope = RopeConfig(theta=rope.theta, rope_type="llama3", scaling=scaling)
    if not torch.allclose(rotary_frequencies(rope, head_dim, beyond_original=False).inv_freq, actual, rtol=1e-6):
        raise UnsupportedError("the GPTModel's rotary frequencies follow neither rotary_base nor llama3 scaling")
    return rope
