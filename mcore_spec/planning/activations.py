"""Bytes that one micro-batch needs for a moment: in the base's forward pass, in the draft's steps, loss and backward.

Reckoned tensor by tensor from what the modules keep: `bases.megatron` and megatron-core's layer without autograd,
`drafts` and `layers` with it, `losses.fused`. A change there that keeps another tensor belongs here too;
``tools/check_plan.py`` compares with what an allocator saw.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcore_spec.config import EagleArchitectureConfig, EagleConfig
from mcore_spec.planning.layout import PlannedLayout
from mcore_spec.planning.shapes import ModelShape
from mcore_spec.planning.weights import DraftSizes, draft_sizes, draft_tensors, vocabulary_rows

# Elements of a block of logits, of `losses.fused`; a test compares them.
HOST_MAX_LOGITS, DEVICE_MAX_LOGITS = 2**24, 2**27
# Bytes of sums, statistics and logits.
WIDE = 4
# What the loss sums at once on the host: the product of a tile of `losses.softmax`.
HOST_TILE_BYTES = 2**20 * WIDE

Parts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """Everything that decides what a rank holds.

    Attributes:
        shape: the base.
        draft: configuration, resolved against it.
        layout: how it is cut.
        seq_length: tokens in a sample.
        micro_batch_size: samples in a forward pass.
        packed: several documents lie in a row of tokens.
        bf16: compute in bfloat16 with float32 main weights; otherwise in float32.
        use_distributed_optimizer: shard main weights and moments over the data- and context-parallel ranks.
        recompute: forget the draft's activations and compute them again backward.
        on_cuda: kernels and block sizes of a GPU; otherwise those of the host.
    """

    shape: ModelShape
    draft: EagleConfig
    layout: PlannedLayout
    seq_length: int
    micro_batch_size: int = 1
    packed: bool = True
    bf16: bool = True
    use_distributed_optimizer: bool = True
    recompute: bool = False
    on_cuda: bool = True

    @property
    def bytes(self) -> int:
        """Of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def all_rows(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.seq_length

    @property
    def rows(self) -> int:
        """Of those the ones of a context-parallel rank, as they are inside of the parallel regions."""
        return -(-self.all_rows // self.layout.context)

    @property
    def outer_rows(self) -> int:
        """Rows of a rank between the parallel regions."""
        return -(-self.rows // self.layout.tensor) if self.layout.sequence_parallel else self.rows

    @property
    def num_steps(self) -> int:
        """TTT steps."""
        return self.draft.eagle_ttt_steps

    @property
    def architecture(self) -> EagleArchitectureConfig:
        """The draft's sizes."""
        return self.draft.eagle_architecture_config

    @property
    def sizes(self) -> DraftSizes:
        """The draft's sizes on one rank."""
        return draft_sizes(self.draft, self.shape, self.layout)


def base_forward(setup: TrainingSetup, *, stage: int) -> Parts:
    """At the worst moment of the base's forward pass: inside of the last layer, or where aux states are joined."""
    base, layout, size = setup.shape.architecture, setup.layout, setup.bytes
    rows, outer = setup.rows, setup.outer_rows
    query = base.num_attention_heads * base.head_dim // layout.tensor
    kv = base.num_key_value_heads * base.head_dim // layout.tensor
    gathered = rows * base.hidden_size if layout.sequence_parallel else 0
    # Query, its products with cos and sin, and the fused projection of which key and value are views.
    attention = gathered + rows * (5 * query + 2 * kv)
    if layout.context > 1:
        # Keys and values of all ranks: as they came, in one piece, and in the order of the row.
        attention = max(attention, rows * (2 * query + 4 * kv) + 6 * kv * setup.all_rows)
    layer = outer * base.hidden_size + max(attention, gathered + _mlp(setup))
    joined_late = sum(setup.layout.layers_of_stages(base.num_layers)[: stage + 1])
    num_aux = sum(layer_id < joined_late for layer_id in setup.architecture.eagle_aux_hidden_state_layer_ids)
    state = outer * base.hidden_size * size
    # The embedded tokens, the layer's input and the residual stream inside of it.
    inside = {"base's layer": layer * size, "hidden states": 3 * state, "aux hidden states": num_aux * state}
    is_last = stage == layout.pipeline - 1
    # An earlier stage sends its hidden state along.
    num_joined = num_aux if is_last else num_aux + 1
    joining = {"hidden states": 2 * state, "aux hidden states": 2 * num_joined * state}
    return max(inside, joining, key=lambda parts: sum(parts.values()))


def _mlp(setup: TrainingSetup) -> int:
    """Elements in the middle of the base's MLP: gate and up, the activation, a second up (plus 0), the product."""
    base, tensor = setup.shape.architecture, setup.layout.tensor
    experts = setup.shape.experts
    if experts is None:
        return setup.rows * 5 * base.intermediate_size // tensor
    # Each token is copied to its experts, and what they say is added up.
    return setup.rows * experts.active * (2 * base.hidden_size + 5 * experts.width // tensor)


def training_phases(setup: TrainingSetup) -> dict[str, Parts]:
    """Of a last stage, by phase: the loss, which follows the draft's steps, and backward at its worst moment."""
    return {"loss": _loss(setup), "backward": _backward(setup)}


def _loss(setup: TrainingSetup) -> Parts:
    sizes, size = setup.sizes, setup.bytes
    state, whole = setup.outer_rows * sizes.hidden * size, setup.rows * sizes.hidden * size
    layout, num_steps = setup.layout, setup.num_steps
    # The embeddings and outputs of all steps, and the base's last hidden states.
    kept = (2 * num_steps + 1) * state
    if setup.bf16 and not setup.recompute:
        # In float32 it is saved for backward as it is.
        kept += num_steps * state
    if setup.recompute:
        kept -= num_steps * state  # the embeddings are among what is saved
    if layout.tensor > 1:
        kept += sizes.num_aux * state  # in one piece; a rank saves its columns
    if layout.sequence_parallel:
        kept += (num_steps + 1) * whole
    if layout.context > 1:
        kept += setup.all_rows * sizes.hidden * size
    head = sizes.vocabulary * sizes.hidden if sizes.owns_head else 0
    return {
        "draft's saved activations": _saved_total(setup),
        "hidden states": kept,
        "gradients of the loss": num_steps * whole + head * (WIDE + (size if setup.bf16 else 0)),
        "logit blocks": loss_blocks(setup),
    }


def loss_blocks(setup: TrainingSetup) -> int:
    """Blocks of logits of `losses.fused`, all rows counted."""
    sizes, size = setup.sizes, setup.bytes
    teacher, student = vocabulary_rows(setup.shape.architecture.vocab_size, setup.layout), sizes.vocabulary
    max_logits = DEVICE_MAX_LOGITS if setup.on_cuda else HOST_MAX_LOGITS
    max_positions = max(1, max_logits // max(teacher, student))
    num_chunks = -(-setup.rows // max_positions)
    chunk = -(-setup.rows // num_chunks)
    total = chunk * WIDE * (teacher + student)
    # Of the teacher over the draft vocabulary; and of the rows that are in the loss, where the mask has gaps.
    total += chunk * WIDE * student * (2 if sizes.is_reduced else 1)
    if setup.bf16:
        total += chunk * size * max(teacher, student)
    # A product that is summed at once; or rows of hidden states that are picked, and their gradients.
    product = chunk * WIDE * student if setup.on_cuda else HOST_TILE_BYTES
    picked = chunk * sizes.hidden * (2 * size + WIDE + (size if setup.bf16 else 0))
    return total + max(product, picked)


def _saved_total(setup: TrainingSetup) -> int:
    steps = range(setup.num_steps)
    if setup.recompute:
        return _saved_before(setup) + sum(_kept_input(setup, step) for step in steps)
    return _saved_before(setup) + sum(_saved(setup, step) for step in steps) + _saved_after(setup)


def _saved_before(setup: TrainingSetup) -> int:
    """What the fusion of aux states saves."""
    sizes, architecture = setup.sizes, setup.architecture
    if sizes.joins_each_step:
        return 0
    joined = sizes.num_aux * sizes.hidden * setup.bytes
    cut = 1 if setup.layout.sequence_parallel else setup.layout.tensor
    saved = setup.rows * joined // cut
    if architecture.norm_before_fc or architecture.fc_norm:
        # The normed states, before their weights; aux states take no gradient, so that nothing else is saved.
        saved += setup.outer_rows * joined
    return saved


def _saved_after(setup: TrainingSetup) -> int:
    """The last step's output, which its norm saves; the others are saved as the next step's input."""
    return 0 if setup.bf16 or setup.sizes.joins_each_step else setup.outer_rows * setup.sizes.hidden * setup.bytes


def _norm(setup: TrainingSetup) -> int:
    """Bytes that a norm of [outer rows, hidden] saves: its input in float32, and the normed rows before the weight."""
    return setup.outer_rows * setup.sizes.hidden * (WIDE + setup.bytes)


def _saved(setup: TrainingSetup, step: int) -> int:
    """Bytes that step `step` saves for backward."""
    sizes, size = setup.sizes, setup.bytes
    state = setup.outer_rows * sizes.hidden * size
    if sizes.joins_each_step:
        first = _joined(setup, step) + _layer(setup, step, input_width=sizes.hidden, num_norms=sizes.first_norms)
    else:
        # The embedding takes no gradient: of its norm only the normed rows are saved.
        first = state + _layer(setup, step, input_width=2 * sizes.hidden)
    return _final(setup) + first + (sizes.num_layers - 1) * _layer(setup, step, input_width=sizes.hidden)


def _final(setup: TrainingSetup) -> int:
    """What the final norm of a step saves."""
    sizes = setup.sizes
    if not sizes.has_final_norm:
        return 0
    if setup.bf16 or sizes.joins_each_step or setup.architecture.norm_output:
        return _norm(setup)
    # It reads what the next step reads: in float32 it is the same tensor, counted there.
    return _norm(setup) - setup.outer_rows * sizes.hidden * setup.bytes


def _joined(setup: TrainingSetup, step: int) -> int:
    """Embedding and state in one piece, of which a rank keeps its columns; and what EAGLE-MTP's two norms save."""
    sizes, layout = setup.sizes, setup.layout
    state = setup.outer_rows * sizes.hidden * setup.bytes
    saved = setup.rows * 2 * sizes.hidden * setup.bytes // (1 if layout.sequence_parallel else layout.tensor)
    if sizes.member == "eagle-mtp":
        # Of the embedding, and of the features at step 0, which take no gradient, the normed rows alone; in float32 the
        # state is kept for the loss.
        saved += 2 * state + (setup.outer_rows * sizes.hidden * WIDE if setup.bf16 and step > 0 else 0)
    return saved


def _layer(setup: TrainingSetup, step: int, *, input_width: int, num_norms: int = 2) -> int:
    """Of one decoder layer."""
    sizes, size, rows = setup.sizes, setup.bytes, setup.rows
    inputs = rows * (input_width + sizes.hidden) * size
    return num_norms * _norm(setup) + inputs + _attention(setup, step) + _mlp_saved(setup)


def _mlp_saved(setup: TrainingSetup) -> int:
    """Gate, its activation, up, and the product."""
    return setup.rows * 4 * setup.sizes.intermediate * setup.bytes


def _attention(setup: TrainingSetup, step: int) -> int:
    sizes, size, rows = setup.sizes, setup.bytes, setup.rows
    # Queries and what attention says; in several pieces that is put together, and laid out anew for the projection.
    is_in_pieces = setup.packed or setup.micro_batch_size > 1 or setup.layout.context > 1
    saved = rows * (3 if is_in_pieces else 2) * sizes.query * size + _key_value(setup, step)
    saved += rows * 2 * sizes.head_dim * size  # cos and sin
    saved += rows * sizes.num_heads * (WIDE + step * size)  # log-sum-exp, weights of the row's own keys
    if sizes.qk_norm:
        saved += rows * (sizes.query + sizes.kv) * (WIDE + size)
    return saved


def _key_value(setup: TrainingSetup, step: int) -> int:
    """Keys and values of a step; those of step 0 are of the whole row."""
    rows = setup.all_rows if step == 0 and setup.layout.context > 1 else setup.rows
    return rows * 2 * setup.sizes.kv * setup.bytes


def _kept_input(setup: TrainingSetup, step: int) -> int:
    """What is kept of a step that is computed again: state, embedding, the keys and values that it added."""
    state = setup.outer_rows * setup.sizes.hidden * setup.bytes
    return 2 * state + setup.sizes.num_layers * _key_value(setup, step)


def _backward(setup: TrainingSetup) -> Parts:
    """The worst moment: at the start, or in the MLP or at the end of some step."""
    sizes, size, steps = setup.sizes, setup.bytes, setup.num_steps
    state = setup.outer_rows * sizes.hidden * size
    grads = setup.rows * sizes.hidden * size
    head = sizes.vocabulary * sizes.hidden if sizes.owns_head else 0
    # EAGLE-1 compares its states with the base's, both picked from their rows and widened.
    compared = 2 * steps * setup.outer_rows * sizes.hidden * WIDE if sizes.member == "eagle1" else 0
    moments = [
        {
            "draft's saved activations": _saved_total(setup) + compared,
            "gradients of the loss": 2 * steps * grads + head * (2 * WIDE + (size if setup.bf16 else 0)),
        }
    ]
    weights = [numel * size for numel in draft_tensors(sizes, setup.architecture, tensor=setup.layout.tensor)]
    weights = weights[:-1] if sizes.owns_head else weights
    # EAGLE-3's fc is used once.
    weights = weights if sizes.joins_each_step else weights[1:]
    down, all_weights = sizes.hidden * sizes.intermediate * size, sum(weights)
    final = _final(setup)
    inner = setup.rows * sizes.intermediate * size
    saved = _saved_before(setup)
    for step in range(steps):
        whole, is_last = _saved(setup, step), step == steps - 1
        saved_here = saved + whole - final
        if setup.recompute:
            saved_here += _kept_input(setup, step)
        shared = {
            "gradients of the loss": step * grads,
            # Of keys and values, from the steps behind; of the residual stream.
            "gradients of activations": 2 * state + (0 if is_last else (step + 1) * _key_value(setup, step)),
        }
        in_mlp = dict(shared)
        in_mlp["draft's saved activations"] = saved_here
        in_mlp["gradients of activations"] += 2 * inner
        # Summed over the steps before they go into the buffers.
        in_mlp["gradients of weights"] = down if is_last else all_weights + down
        at_end = dict(shared)
        at_end["draft's saved activations"] = saved_here - _mlp_saved(setup)
        at_end["gradients of activations"] += setup.rows * (2 * sizes.query + 2 * sizes.kv + 4 * sizes.hidden) * size
        at_end["gradients of weights"] = all_weights + (max(weights) if not is_last else 0)
        if setup.on_cuda:
            # The flash kernel's own: the query's gradient in float32, keys and values for every query head.
            at_end["gradients of activations"] += setup.rows * sizes.query * (WIDE + 2 * size)
        moments += [in_mlp, at_end]
        saved += _kept_input(setup, step) if setup.recompute else whole
    return max(moments, key=lambda parts: sum(parts.values()))
