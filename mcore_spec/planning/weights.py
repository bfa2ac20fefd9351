"""How many parameters a rank holds: of the base on each stage, and of the draft."""

from __future__ import annotations

from typing import NamedTuple

from mcore_spec.config import EagleAlgorithm, EagleArchitectureConfig, EagleConfig
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.planning.layout import PlannedLayout, padded
from mcore_spec.planning.shapes import ModelShape


class StageWeights(NamedTuple):
    """Parameters of the base on one rank of a stage.

    Attributes:
        base: its layers, and embedding, final norm and head where they are.
        embedding_copy: frozen rows of the embedding on the last stage of an untied base.
    """

    base: int
    embedding_copy: int


def layer_matrices(shape: ModelShape, *, tensor: int = 1, active_only: bool = False) -> int:
    """Entries of the weight matrices of one decoder layer on one rank.

    Args:
        shape: the base.
        tensor: ranks that share it. Experts are cut like a dense MLP; there is no expert parallelism.
        active_only: of the experts those that a token goes through.
    """
    base = shape.architecture
    hidden, heads = base.hidden_size, base.num_attention_heads + base.num_key_value_heads
    attention = 2 * hidden * heads * base.head_dim // tensor
    if shape.experts is None:
        return attention + 3 * hidden * base.intermediate_size // tensor
    experts = shape.experts
    num = experts.active if active_only else experts.num
    # The router is on every rank.
    return attention + hidden * experts.num + num * 3 * hidden * experts.width // tensor


def layer_parameters(shape: ModelShape, *, tensor: int = 1) -> int:
    """Of one decoder layer on one rank: matrices, norms and biases."""
    base = shape.architecture
    norms = 2 * base.hidden_size + (2 * base.head_dim if base.qk_norm else 0)
    heads = base.num_attention_heads + 2 * base.num_key_value_heads
    biases = heads * base.head_dim // tensor if base.qkv_bias else 0
    return layer_matrices(shape, tensor=tensor) + norms + biases


def base_parameters(shape: ModelShape) -> int:
    """Of the whole base, without padding."""
    base = shape.architecture
    vocabulary = base.vocab_size * base.hidden_size
    ends = vocabulary + base.hidden_size + (0 if base.tie_word_embeddings else vocabulary)
    return base.num_layers * layer_parameters(shape) + ends


def stage_weights(shape: ModelShape, layout: PlannedLayout, *, stage: int) -> StageWeights:
    """Of the base on one rank of a stage, counted from 0."""
    base = shape.architecture
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    layers = layout.layers_of_stages(base.num_layers)[stage]
    total = layers * layer_parameters(shape, tensor=layout.tensor)
    rows = vocabulary_rows(base.vocab_size, layout) * base.hidden_size
    if is_first:
        total += rows
    if is_last:
        total += base.hidden_size
        # A tied head is the embedding on one stage, and a second copy of it on another.
        total += 0 if is_first and base.tie_word_embeddings else rows
    needs_copy = is_last and not is_first and not base.tie_word_embeddings
    return StageWeights(total, rows if needs_copy else 0)


def vocabulary_rows(size: int, layout: PlannedLayout) -> int:
    """Rows of a head on one rank."""
    return padded(size, layout.tensor) // layout.tensor


def given(value: int | None) -> int:
    """A field of a resolved configuration."""
    assert value is not None, "the architecture must be resolved against its base first"
    return value


class DraftSizes(NamedTuple):
    """A draft of the EAGLE family on one rank of the last stage.

    Attributes:
        member: of the family.
        hidden: width of the residual stream.
        query: of all query heads of the rank.
        kv: of all its key heads.
        num_heads: its query heads.
        head_dim: of one.
        intermediate: of its part of the MLP.
        num_layers: decoder layers.
        num_aux: layers of the base that it reads.
        vocabulary: its rows of the head that the draft reads.
        owns_head: whether that head is the draft's own.
        is_reduced: whether the draft vocabulary is a part of the base's.
        qkv_bias: whether query, key and value have biases.
        qk_norm: whether its query and key heads are normed.
    """

    member: EagleAlgorithm
    hidden: int
    query: int
    kv: int
    num_heads: int
    head_dim: int
    intermediate: int
    num_layers: int
    num_aux: int
    vocabulary: int
    owns_head: bool
    is_reduced: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def joins_each_step(self) -> bool:
        """Whether embedding and state are joined before the layers, at every step; EAGLE-3 does it inside the first."""
        return self.member != "eagle3"

    @property
    def first_width(self) -> int:
        """What the first layer's attention reads."""
        return self.hidden if self.joins_each_step else 2 * self.hidden

    @property
    def first_norms(self) -> int:
        """Norms of the first layer."""
        return {"eagle3": 3, "eagle1": 1, "eagle-mtp": 2}[self.member]

    @property
    def has_final_norm(self) -> bool:
        """Whether there is one behind the layers."""
        return self.member != "eagle1"


def draft_sizes(config: EagleConfig, shape: ModelShape, layout: PlannedLayout) -> DraftSizes:
    """The rank's sizes.

    Args:
        config: resolved against the base.
        shape: the base.
        layout: how it is cut.

    Raises:
        ConfigError: a size of the draft that the tensor-parallel size does not divide.
        UnsupportedError: an option whose training is not planned.
    """
    if not config.eagle_freeze_base_model:
        raise UnsupportedError(
            "eagle_freeze_base_model = false: gradients and activations of a base that is trained too are not planned"
        )
    if config.eagle_architecture_config.parallel_draft_step > 1:
        raise UnsupportedError(
            f"parallel_draft_step = {config.eagle_architecture_config.parallel_draft_step}: parallel heads are not "
            "planned"
        )
    draft, base, tensor = config.eagle_architecture_config, shape.architecture, layout.tensor
    num_aux = len(draft.eagle_aux_hidden_state_layer_ids)
    sizes = {
        "num_attention_heads": given(draft.num_attention_heads),
        "num_key_value_heads": given(draft.num_key_value_heads),
        "intermediate_size": given(draft.intermediate_size),
        "hidden states x hidden_size": (num_aux if config.algorithm == "eagle3" else 2) * base.hidden_size,
    }
    for name, value in sizes.items():
        if value % tensor:
            raise ConfigError(
                f"tensor_model_parallel_size = {tensor} does not divide the draft's {name} = {value}; choose a size "
                "that divides it"
            )
    vocabulary, head_dim = given(draft.draft_vocab_size), given(draft.head_dim)
    heads = sizes["num_attention_heads"] // tensor
    is_reduced = vocabulary < base.vocab_size
    is_mtp = config.algorithm == "eagle-mtp"
    return DraftSizes(
        member=config.algorithm,
        hidden=base.hidden_size,
        query=heads * head_dim,
        kv=sizes["num_key_value_heads"] // tensor * head_dim,
        num_heads=heads,
        head_dim=head_dim,
        intermediate=sizes["intermediate_size"] // tensor,
        num_layers=draft.num_hidden_layers,
        num_aux=num_aux,
        vocabulary=vocabulary_rows(vocabulary, layout),
        owns_head=is_reduced or draft.has_lm_head,
        is_reduced=is_reduced,
        # EAGLE-MTP repeats the base's own layer.
        qkv_bias=draft.attention_bias or (is_mtp and base.qkv_bias),
        qk_norm=is_mtp and base.qk_norm,
    )


def draft_tensors(sizes: DraftSizes, draft: EagleArchitectureConfig, *, tensor: int) -> list[int]:
    """Parameters of each trained tensor of the draft on one rank, that which reads the features first, the head last.

    Args:
        sizes: of the rank.
        draft: resolved.
        tensor: tensor-parallel size.
    """
    hidden, joined = sizes.hidden, (2 if sizes.joins_each_step else sizes.num_aux) * sizes.hidden
    tensors = [hidden * joined // tensor]
    if draft.norm_before_fc:
        tensors.append(joined)
    if draft.fc_norm:
        tensors += [hidden] * sizes.num_aux
    if sizes.member == "eagle-mtp":
        tensors += [hidden] * 2
    for layer in range(sizes.num_layers):
        # EAGLE-3's first layer reads the embedding beside the hidden state, and norms both.
        width, norms = (sizes.first_width, sizes.first_norms) if layer == 0 else (hidden, 2)
        tensors += [hidden] * norms
        tensors += [sizes.query * width, sizes.kv * width, sizes.kv * width, sizes.query * hidden]
        tensors += [hidden * sizes.intermediate] * 3
        if sizes.qkv_bias:
            tensors += [sizes.query, sizes.kv, sizes.kv]
        if draft.attention_bias:
            tensors.append(hidden)
        if sizes.qk_norm:
            tensors += [sizes.head_dim] * 2
        if draft.mlp_bias:
            tensors += [sizes.intermediate, sizes.intermediate, hidden]
    if sizes.has_final_norm:
        tensors.append(hidden)
    if sizes.owns_head:
        tensors.append(sizes.vocabulary * hidden)
    return tensors
