"""Training-time test: the steps of a draft that is fed with its own states, all rows of a step at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mcore_spec.layers.attention import KeyValue
from mcore_spec.parallel.collectives import gather
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.tensor_parallel import SEQUENCE_DIM, TensorParallel


class StepOutput(NamedTuple):
    """One TTT step, rows indexed by feature position; each [s or s/size, b, h].

    Attributes:
        hidden: what the head reads.
        feedback: what the next step reads in place of the base's features.
    """

    hidden: Tensor
    feedback: Tensor


class StepResult(NamedTuple):
    """One TTT step and the keys and values that it adds, one a layer."""

    output: StepOutput
    added: tuple[KeyValue, ...]


# Keys and values of the earlier steps: one entry a layer, in it one entry a step.
Past = tuple[tuple[KeyValue, ...], ...]
# (state, embedding, past, step) -> the step. Must change none of its arguments.
OneStep = Callable[[Tensor, Tensor, Past, int], StepResult]


class Mixing(NamedTuple):
    """Which rows read the draft's own state, where they are mixed with the base's.

    Attributes:
        replaced: rows that take it after each step but the last, bool [K - 1, local rows].
        documents: of the packed row, of which the tensors are this context-parallel rank's rows.
        tp: how those are shared out further.
    """

    replaced: Tensor
    documents: Documents
    tp: TensorParallel


def run_steps(
    one_step: OneStep,
    state: Tensor,
    embeddings: Sequence[Tensor],
    *,
    num_layers: int,
    recompute: bool,
    mixing: Mixing | None = None,
    detach: bool = False,
) -> list[StepOutput]:
    """All TTT steps, each fed with the one before.

    Args:
        one_step: one step.
        state: what step 0 reads, [s or s/size, b, h].
        embeddings: one a step, like `state`.
        num_layers: layers that keep keys and values.
        recompute: keep the inputs of a step only and run it a second time in backward. It is handed the same
            keys and values of earlier steps then, and what it adds the second time is dropped. The ranks'
            collectives run again too, in the order of the first time.
        mixing: no keys of earlier steps, see `_run_mixed_steps`.
        detach: a step's gradient ends at the state that it reads.
    """
    if recompute:
        one_step = _recomputed(one_step)
    nothing: Past = ((),) * num_layers
    if mixing is not None:
        return _run_mixed_steps(one_step, state, embeddings, nothing, mixing, detach=detach)
    past, outputs = nothing, []
    for step, embedding in enumerate(embeddings):
        result = one_step(state, embedding, past, step)
        past = tuple((*earlier, new) for earlier, new in zip(past, result.added, strict=True))
        state = result.output.feedback.detach() if detach else result.output.feedback
        outputs.append(result.output)
    return outputs


def _recomputed(one_step: OneStep) -> OneStep:
    def kept_inputs_only(state: Tensor, embedding: Tensor, past: Past, step: int) -> StepResult:
        # Drafts draw no random numbers: there is no random state to keep.
        result = checkpoint(one_step, state, embedding, past, step, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(result, StepResult)
        return result

    return kept_inputs_only


def _run_mixed_steps(
    one_step: OneStep,
    state: Tensor,
    embeddings: Sequence[Tensor],
    nothing: Past,
    mixing: Mixing,
    *,
    detach: bool,
) -> list[StepOutput]:
    """Every step plain causal attention over states of which some are the draft's own.

    Row p reads token x[p+1] at every step and predicts x[p+2]. Step 0 reads the base's features; after each step
    some rows take the draft's guess of their features, which is the state of the row before them, and keep it until
    they are drawn again (``mix_hidden_states`` of NVIDIA ModelOpt). Cheaper attention than keys that grow, and only
    near to what an engine computes: the rows that a query sees are mixed too.

    Returns:
        One output a step, its rows where all steps have them: row t of step k is row p = t + k of this scheme, which
        reads x[t+1+k]. Rows behind the end of a document have no meaning; none of them counts.
    """
    outputs = []
    for step in range(len(embeddings)):
        output = one_step(state, embeddings[0], nothing, 0).output
        outputs.append(StepOutput(*(_moved(tensor, step, mixing) for tensor in output)))
        if step < len(mixing.replaced):
            feedback = output.feedback.detach() if detach else output.feedback
            replaced = mixing.tp.own_rows(mixing.replaced[step])[:, None, None]
            state = torch.where(replaced, _moved(feedback, -1, mixing), state)
    return outputs


def _moved(tensor: Tensor, distance: int, mixing: Mixing) -> Tensor:
    """Row p + `distance` of the same document, or its nearest, for each row p; [s or s/size, b, h] -> the same."""
    if distance == 0:
        return tensor
    tp, documents = mixing.tp, mixing.documents
    if tp.sequence_parallel:
        # Each rank takes other rows of the whole.
        tensor = gather(tensor, SEQUENCE_DIM, tp.group, grad_is_partial=True)
    rows = documents.take(documents.neighbours(distance).to(tensor.device))
    return documents.join(tensor, with_grad=True).index_select(SEQUENCE_DIM, tp.own_rows(rows))
