"""Useful work of a training step, and the speed that a GPU would reach with a share of its arithmetic.

Counted as in ``tools/benchmark/harness.py``: a multiply and an add are two operations; the least that a step must
compute, elementwise work left out; every token is counted in the loss.
"""

from __future__ import annotations

from typing import NamedTuple

from mcore_spec.planning.activations import TrainingSetup
from mcore_spec.planning.layout import PlannedLayout
from mcore_spec.planning.weights import draft_sizes, given, layer_matrices


class Work(NamedTuple):
    """Operations on one micro-batch, of all ranks together."""

    base: float
    draft: float
    teacher_head: float
    student_head: float
    attention_base: float
    attention_draft: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


class Speed(NamedTuple):
    """An estimate.

    Attributes:
        step_seconds: of one optimizer step.
        tokens_per_second: of all GPUs.
        busiest_stage: the pipeline stage that the others wait for.
    """

    step_seconds: float
    tokens_per_second: float
    busiest_stage: int


def count_work(setup: TrainingSetup) -> Work:
    """Of a micro-batch whose samples are each one document of `seq_length` tokens.

    Matrices: forward 2 a weight and row, backward twice that; the frozen base has no backward, fc no gradient of its
    input. The teacher's head once for each position, the student's for each row and step: forward and the gradient of
    its input, and of its weights where the head is the draft's own. Attention is causal: half of each product, two
    products forward, four backward, and one key for each earlier step.
    """
    base, draft, whole = setup.shape.architecture, setup.architecture, PlannedLayout()
    n, length, steps, hidden = setup.all_rows, setup.seq_length, setup.num_steps, base.hidden_size
    sizes = draft_sizes(setup.draft, setup.shape, whole)
    layer = layer_matrices(setup.shape, active_only=True)
    mlp = 3 * hidden * sizes.intermediate
    first = sizes.first_width * (sizes.query + 2 * sizes.kv) + sizes.query * hidden + mlp
    further = hidden * (2 * sizes.query + 2 * sizes.kv) + mlp
    matrices = first + (sizes.num_layers - 1) * further + (2 * hidden * hidden if sizes.joins_each_step else 0)
    # EAGLE-3's fc reads the aux states once.
    fused = 0 if sizes.joins_each_step else sizes.num_aux * hidden * hidden
    judged = [max(0, n - setup.micro_batch_size * (2 + step)) for step in range(steps)]
    heads = 3 if sizes.owns_head else 2
    query = base.num_attention_heads * base.head_dim
    full_layers = base.num_layers - _num_windowed(setup)
    seen = full_layers * _pairs(length, length) + _num_windowed(setup) * _pairs(length, base.window_size or length)
    own = 2 * n * sizes.query * sum(range(steps))
    own_pairs = setup.micro_batch_size * 2 * _pairs(length, length) * sizes.query
    return Work(
        base=2.0 * n * base.num_layers * layer,
        draft=4.0 * n * fused + 6.0 * n * matrices * steps,
        teacher_head=2.0 * judged[0] * hidden * base.vocab_size,
        student_head=2.0 * heads * hidden * given(draft.draft_vocab_size) * sum(judged),
        attention_base=4.0 * setup.micro_batch_size * seen * query,
        attention_draft=6.0 * sizes.num_layers * (steps * own_pairs + own),
    )


def _num_windowed(setup: TrainingSetup) -> int:
    base = setup.shape.architecture
    if base.window_size is None:
        return 0
    return sum(base.windowed_layers) if base.windowed_layers else base.num_layers


def _pairs(length: int, window: int) -> float:
    """Query and key pairs of one causal layer of which a query sees `window` keys at most."""
    window = min(window, length)
    return window * length - window * window / 2


def estimate_speed(setup: TrainingSetup, *, num_micro_batches: int, flops_per_second: float) -> Speed:
    """How long a step takes if every busy rank reaches `flops_per_second`.

    Micro-batches stream through the stages, of which each works on its own layers and the last on draft and heads too:
    the busiest stage sets the pace, the others fill the pipeline once. Communication, reading data and the
    optimizer are left out.

    Args:
        setup: the run.
        num_micro_batches: of one data-parallel rank in a step.
        flops_per_second: of one GPU.
    """
    work, layout = count_work(setup), setup.layout
    layers = layout.layers_of_stages(setup.shape.architecture.num_layers)
    rate = layout.tensor * layout.context * flops_per_second
    seconds = [(work.base + work.attention_base) * count / sum(layers) / rate for count in layers]
    seconds[-1] += (work.total - work.base - work.attention_base) / rate
    busiest = max(range(len(seconds)), key=lambda stage: seconds[stage])
    step = num_micro_batches * seconds[busiest] + sum(seconds) - seconds[busiest]
    tokens = num_micro_batches * setup.all_rows * layout.data
    return Speed(step, tokens / step, busiest)
