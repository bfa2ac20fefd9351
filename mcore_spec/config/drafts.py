"""What a user asks for: the configuration of a draft, and the presets.

Field names are ModelOpt's, so that a configuration written for ModelOpt works here. A field that is
``None`` follows the base model; `drafts.resolve` fills it in. Unknown keys raise. Nothing
here imports torch: the command line's ``--help`` is printed from these classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mcore_spec.config.strict import StrictConfig, suggest
from mcore_spec.errors import ConfigError, UnsupportedError

EagleAlgorithm = Literal["eagle1", "eagle3", "eagle-mtp"]
# What a draft's weights start as.
DraftInit = Literal["auto", "random", "base"]

# Keys of ModelOpt's architecture configuration that the base model owns. A user's file may carry them;
# they are checked against the base by convert() instead of being believed.
BASE_OWNED_FIELDS = ("hidden_size", "vocab_size", "max_position_embeddings")


class MedusaConfig(StrictConfig):
    """Medusa (arXiv 2401.10774): independent heads on the base's last hidden state."""

    medusa_num_heads: int = Field(2, ge=1, description="Number of heads; head i predicts token t+2+i.")
    medusa_num_layers: int = Field(1, ge=1, description="Residual blocks in each head.")
    medusa_loss_decay_factor: float = Field(
        0.8, gt=0, le=1, description="Loss weight of head i is this factor to the power i."
    )
    medusa_self_logit_distillation: bool = Field(
        False, description="Train against the base's distribution instead of the data's next token."
    )
    draft_vocab_size: int | None = Field(
        None, ge=1, description="Entries of the heads' vocabulary (default: the base's, no mapping)."
    )


class EagleArchitectureConfig(StrictConfig):
    """The draft module of the EAGLE family. ``None`` means: as the base model has it."""

    num_hidden_layers: int = Field(1, ge=1, description="Decoder layers in the draft.")
    intermediate_size: int | None = Field(None, ge=1, description="Width of the draft's MLP.")
    num_attention_heads: int | None = Field(None, ge=1, description="Query heads.")
    num_key_value_heads: int | None = Field(None, ge=1, description="Key/value heads.")
    head_dim: int | None = Field(None, ge=2, description="Width of one attention head.")
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"] | None = Field(
        None, description="Activation of the gated MLP."
    )
    rms_norm_eps: float | None = Field(None, gt=0, description="Epsilon of every RMSNorm in the draft.")
    rope_theta: float | None = Field(None, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: dict[str, Any] | None = Field(
        None,
        description="RoPE scaling in transformers' form, e.g. {'rope_type': 'llama3', ...}, rope_theta in it or not. "
        "Its name in transformers 5, rope_parameters, is read too.",
    )
    draft_vocab_size: int | None = Field(
        None, ge=1, description="Entries of the draft vocabulary (default: the base's, no mapping)."
    )
    has_lm_head: bool = Field(False, description="Give the draft its own trainable head even with the full vocabulary.")
    use_aux_hidden_state: bool = Field(False, description="Read hidden states of several base layers (EAGLE-3).")
    use_last_layernorm: bool = Field(False, description="RMSNorm before the head.")
    use_mtp_layernorm: bool = Field(
        False, description="Norm embedding and hidden state before they are joined (EAGLE-MTP)."
    )
    use_input_layernorm_in_first_layer: bool = Field(
        True, description="Input norm in the first decoder layer (EAGLE-1 has none)."
    )
    eagle_aux_hidden_state_layer_ids: tuple[int, ...] = Field(
        (),
        description="Base layers (0-based, by output) whose hidden states are read; empty: EAGLE-3's default three. "
        "EAGLE-MTP: the last one alone, to read it before the final norm (always so on bases like Qwen2).",
    )
    norm_before_residual: bool = Field(
        False, description="EAGLE-3: the residual of the first layer is the normed hidden state."
    )
    norm_before_fc: bool = Field(
        False, description="EAGLE-3: one RMSNorm over the joined aux hidden states, before fc."
    )
    fc_norm: bool = Field(False, description="EAGLE-3: one RMSNorm for each aux hidden state, before fc.")
    norm_output: bool = Field(
        False, description="EAGLE-3: feed the normed output back to the next step instead of the raw one."
    )
    attention_bias: bool = Field(False, description="Bias on q, k, v and o projections.")
    mlp_bias: bool = Field(False, description="Bias on the MLP's projections.")
    initializer_range: float = Field(
        0.02, gt=0, description="Standard deviation of randomly initialised weight matrices."
    )
    # Accepted for ModelOpt's files; only the value that means "off" can be represented.
    attention_dropout: float = Field(0.0, ge=0, le=0, description="Must be 0: drafts have no dropout.")
    position_embedding_type: Literal["rope"] = Field("rope", description="Must be 'rope'.")
    torch_dtype: str | None = Field(None, description="Must be the base's dtype or absent.")
    parallel_draft_step: int = Field(
        1, ge=1, description="Tokens that each step proposes: one by its own head, the others by Medusa-like heads."
    )
    parallel_draft_heads_num_layers: int = Field(1, ge=1, description="Residual blocks in each of those other heads.")
    hidden_size: int | None = Field(None, description="Owned by the base; if given, must equal it.")
    vocab_size: int | None = Field(None, description="Owned by the base; if given, must equal it.")
    max_position_embeddings: int | None = Field(None, description="Owned by the base; if given, must equal it.")

    @model_validator(mode="before")
    @classmethod
    def _rope_parameters(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "rope_parameters" not in values:
            return values
        if values.get("rope_scaling") is not None:
            raise ValueError("rope_parameters and rope_scaling say the same in two spellings: leave one out")
        rest = {name: value for name, value in values.items() if name != "rope_parameters"}
        return {**rest, "rope_scaling": values["rope_parameters"]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids = self.eagle_aux_hidden_state_layer_ids
        if any(a >= b for a, b in zip(ids, ids[1:], strict=False)):
            raise ValueError(
                f"eagle_aux_hidden_state_layer_ids = {list(ids)} must be sorted and without repetition: "
                "engines join the hidden states in layer order"
            )
        if self.use_aux_hidden_state and self.use_mtp_layernorm:
            raise ValueError("use_aux_hidden_state and use_mtp_layernorm exclude each other: choose one")
        if self.parallel_draft_step == 1 and self.parallel_draft_heads_num_layers > 1:
            raise ValueError(
                f"parallel_draft_heads_num_layers = {self.parallel_draft_heads_num_layers} needs parallel_draft_step "
                "above 1: there are no such heads; leave it out"
            )
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other: choose one")
        if not self.use_aux_hidden_state:
            only_eagle3 = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
            wrong = [name for name in only_eagle3 if getattr(self, name)]
            if ids and not self.use_mtp_layernorm:
                wrong.append("eagle_aux_hidden_state_layer_ids")
            if wrong:
                raise ValueError(f"{', '.join(wrong)} need(s) use_aux_hidden_state = true (EAGLE-3)")
        return self

    @property
    def algorithm(self) -> EagleAlgorithm:
        """Which member of the family the flags describe."""
        if self.use_aux_hidden_state:
            return "eagle3"
        return "eagle-mtp" if self.use_mtp_layernorm else "eagle1"


class EagleConfig(StrictConfig):
    """EAGLE-1, EAGLE-3 or EAGLE-MTP; the architecture's flags say which."""

    eagle_offline: bool = Field(False, description="Must be false: training is told where hidden states come from.")
    eagle_self_logit_distillation: bool = Field(
        True, description="Soft labels from the base's logits; false: the data's next token."
    )
    eagle_freeze_base_model: bool = Field(
        True,
        description="Keep the base model's weights fixed; false: train it too, on the same tokens.",
    )
    eagle_train_through_features: bool = Field(
        False,
        description="With eagle_freeze_base_model = false: let the draft's gradient flow into the base through the "
        "hidden states that the draft reads; its head, embedding and distribution are read as they are in any case.",
    )
    eagle_report_acc: bool = Field(True, description="Report top-1 accuracy of every step.")
    eagle_reuse_base_decoder: bool = Field(
        False, description="EAGLE-MTP: start the decoder layer from the base's last decoder layer."
    )
    eagle_reuse_base_mtp: bool = Field(
        False,
        description="EAGLE-MTP: started as the base's own layer for multi-token prediction; written by convert "
        "--draft-init mtp.",
    )
    eagle_loss_decay_factor: float = Field(0.9, gt=0, le=1, description="Loss weight of step k is factor**k.")
    eagle_decoder_type: Literal["llama"] = Field("llama", description="Kind of decoder layer.")
    eagle_ttt_steps: int = Field(3, ge=1, description="Training-time-test steps.")
    eagle_mix_hidden_states: bool = Field(
        False, description="Replace rows of the input by the draft's own states instead of growing keys."
    )
    eagle_feature_noise: float = Field(
        0.0,
        ge=0,
        description="EAGLE-1: half-width of the uniform noise on the base's features in training, in a conversation of "
        "512 tokens; others have 512 / tokens of it. The paper's code has 0.1.",
    )
    eagle_detach_states: bool = Field(
        False, description="Let no gradient flow from a step into the state that the step before fed back to it."
    )
    eagle_keep_out_of_vocabulary: bool = Field(
        False, description="Learn from rows whose likeliest token is not in the draft vocabulary too."
    )
    eagle_architecture_config: EagleArchitectureConfig = Field(
        default_factory=lambda: EagleArchitectureConfig(use_aux_hidden_state=True, use_last_layernorm=True),
        description="The draft module.",
    )

    @model_validator(mode="before")
    @classmethod
    def _eagle3_unless_said(cls, values: Any) -> Any:
        """A partial architecture without any algorithm flag means EAGLE-3, the default algorithm."""
        architecture = values.get("eagle_architecture_config") if isinstance(values, Mapping) else None
        if not isinstance(architecture, Mapping) or _ALGORITHM_FLAGS & architecture.keys():
            return values
        return {
            **values,
            "eagle_architecture_config": {**_ARCHITECTURE_FLAGS["eagle3"], **architecture},
        }

    @model_validator(mode="after")
    def _labels_are_in_the_vocabulary(self) -> EagleConfig:
        if self.eagle_keep_out_of_vocabulary and not self.eagle_self_logit_distillation:
            raise ValueError(
                "eagle_keep_out_of_vocabulary = true needs eagle_self_logit_distillation = true: a label outside of "
                "the draft vocabulary has no logit"
            )
        return self

    @model_validator(mode="after")
    def _only_a_base_that_is_trained_takes_gradients(self) -> EagleConfig:
        if self.eagle_train_through_features and self.eagle_freeze_base_model:
            raise ValueError(
                "eagle_train_through_features = true needs eagle_freeze_base_model = false: a frozen base takes no "
                "gradient"
            )
        return self

    @model_validator(mode="after")
    def _noise_is_eagle1s(self) -> EagleConfig:
        if self.eagle_feature_noise and self.algorithm != "eagle1":
            raise ValueError(
                f"eagle_feature_noise = {self.eagle_feature_noise} is for eagle1, and this draft is {self.algorithm}: "
                "leave it out"
            )
        return self

    @property
    def algorithm(self) -> EagleAlgorithm:
        """Which member of the family this is."""
        return self.eagle_architecture_config.algorithm


# What tells the members of the EAGLE family apart.
_ARCHITECTURE_FLAGS: dict[EagleAlgorithm, dict[str, bool]] = {
    "eagle1": {"use_input_layernorm_in_first_layer": False},
    "eagle3": {"use_aux_hidden_state": True, "use_last_layernorm": True},
    "eagle-mtp": {"use_mtp_layernorm": True, "use_last_layernorm": True},
}
_ALGORITHM_FLAGS = {flag for flags in _ARCHITECTURE_FLAGS.values() for flag in flags}


def eagle_preset(algorithm: EagleAlgorithm) -> dict[str, Any]:
    """A fresh preset ``{"algorithm": "eagle", "config": {...}}`` for one member of the family."""
    if algorithm not in _ARCHITECTURE_FLAGS:
        known = list(_ARCHITECTURE_FLAGS)
        hint = suggest(str(algorithm), known, otherwise=f"choose one of {', '.join(known)}")
        raise ConfigError(f"eagle algorithm {algorithm!r} is not known; {hint}")
    return {
        "algorithm": "eagle",
        "config": {"eagle_architecture_config": copy.deepcopy(_ARCHITECTURE_FLAGS[algorithm])},
    }


EAGLE1_DEFAULT_CFG = eagle_preset("eagle1")
EAGLE3_DEFAULT_CFG = eagle_preset("eagle3")
EAGLE_MTP_DEFAULT_CFG = eagle_preset("eagle-mtp")


def check_supported(config: EagleConfig) -> None:
    """Refuse flag combinations that no member of the family has.

    Raises:
        UnsupportedError: the flags describe a module that neither the papers nor an engine knows.
    """
    architecture = config.eagle_architecture_config
    expected = {
        "eagle1": (False, False),
        "eagle3": (True, True),
        "eagle-mtp": (True, True),
    }[config.algorithm]
    actual = (architecture.use_last_layernorm, architecture.use_input_layernorm_in_first_layer)
    if actual != expected:
        raise UnsupportedError(
            f"{config.algorithm} needs use_last_layernorm = {expected[0]} and "
            f"use_input_layernorm_in_first_layer = {expected[1]}, got {actual[0]} and {actual[1]}: "
            "engines have no field for the other placement"
        )
    if config.eagle_reuse_base_decoder and config.algorithm != "eagle-mtp":
        raise UnsupportedError(
            f"eagle_reuse_base_decoder = true is for eagle-mtp; the first layer of {config.algorithm} has another shape"
        )
