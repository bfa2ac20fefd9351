"""The base model as this package describes it: everything needed to build it, and nothing of its weights.

Read from a Hugging Face configuration, from a Megatron-LM checkpoint's arguments or from a live
`GPTModel`; recorded with every checkpoint, so that one loads without the place that it came from.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mcore_spec.config.strict import StrictConfig
from mcore_spec.errors import ConfigError

Family = Literal["llama", "mistral", "phi3", "qwen2", "qwen3", "megatron"]
DtypeName = Literal["bfloat16", "float16", "float32", "float64"]
# Hugging Face's architecture class -> our family, and what that family always has.
HF_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
RopeType = Literal["default", "linear", "llama3", "yarn", "longrope"]

# Keys of a scaling dictionary, in transformers' spelling: required, then optional.
_ROPE_KEYS: dict[RopeType, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"},
    ),
    "longrope": (
        {"short_factor", "long_factor", "original_max_position_embeddings", "factor"},
        {"attention_factor"},
    ),
}


class RopeConfig(StrictConfig):
    """Rotary embedding: base, kind of scaling, and the scaling's own parameters."""

    theta: float = Field(gt=0, description="Base of the frequencies.")
    rope_type: RopeType = Field("default", description="Kind of frequency scaling.")
    scaling: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of the scaling, in transformers' spelling."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        required, optional = _ROPE_KEYS[self.rope_type]
        missing, unknown = required - self.scaling.keys(), self.scaling.keys() - required - optional
        if missing or unknown:
            raise ValueError(
                f"rope_scaling of type {self.rope_type!r}: missing {sorted(missing)}, unknown {sorted(unknown)}; "
                f"it takes {sorted(required)} and optionally {sorted(optional)}"
            )
        return self

    def to_hf(self) -> dict[str, Any]:
        """transformers' ``rope_parameters``: type, theta and scaling in one dictionary."""
        return {"rope_type": self.rope_type, "rope_theta": self.theta, **self.scaling}


class BaseArchitecture(StrictConfig):
    """A decoder-only base model with RMSNorm, rotary positions and a gated MLP."""

    family: Family = Field(description="Which table of weight names describes it in Hugging Face's form.")
    num_layers: int = Field(ge=1, description="Decoder layers.")
    hidden_size: int = Field(ge=1, description="Width of the residual stream.")
    intermediate_size: int = Field(ge=1, description="Width of the gated MLP.")
    num_attention_heads: int = Field(ge=1, description="Query heads.")
    num_key_value_heads: int = Field(ge=1, description="Key/value heads.")
    head_dim: int = Field(ge=2, description="Width of a head.")
    vocab_size: int = Field(ge=1, description="Vocabulary entries, without padding.")
    max_position_embeddings: int = Field(ge=1, description="Longest sequence in tokens.")
    rms_norm_eps: float = Field(gt=0, description="Epsilon of the norms.")
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"] = Field("silu", description="Activation.")
    tie_word_embeddings: bool = Field(description="The head is the embedding.")
    qkv_bias: bool = Field(False, description="Bias on q, k and v.")
    qk_norm: bool = Field(False, description="RMSNorm on each query and key head.")
    rope: RopeConfig = Field(description="Rotary embedding.")
    window_size: int | None = Field(
        None, ge=1, description="Tokens that a windowed layer sees, the query's own included."
    )
    windowed_layers: tuple[bool, ...] = Field((), description="Which layers are windowed; empty: all, if any.")
    num_experts: int | None = Field(None, ge=1, description="Experts of each layer's MLP; none: a dense MLP.")
    has_layers: bool = Field(
        True, description="Off: embedding, final norm and head alone; hidden states come from a store."
    )
    dtype: DtypeName = Field("bfloat16", description="Dtype of the weights.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.windowed_layers and len(self.windowed_layers) != self.num_layers:
            raise ValueError(f"windowed_layers has {len(self.windowed_layers)} entries for {self.num_layers} layers")
        return self

    def check_seq_length(self, seq_length: int, *, option: str = "--seq-length") -> None:
        """Refuse samples that there are no positions for.

        Args:
            seq_length: tokens of a sample.
            option: what the user calls it.

        Raises:
            ConfigError: names both.
        """
        if seq_length > self.max_position_embeddings:
            raise ConfigError(
                f"{option} {seq_length} is above the base's {self.max_position_embeddings} positions; lower it"
            )


class BaseIdentity(StrictConfig):
    """Where the base came from, and how to tell another one apart."""

    source: str = Field(description="Directory or hub id that the weights were read from.")
    fingerprint: str = Field(description="SHA-256 over names, shapes and samples of the base's weights.")
    hf_config: dict[str, Any] = Field(
        default_factory=dict, description="The Hugging Face config.json, empty for a Megatron-LM checkpoint."
    )
