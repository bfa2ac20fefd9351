"""What is different about a transformers decoder while its features are computed.

Documents lie behind each other in one row and do not see each other, nothing is dropped, outputs of layers are kept.
Each is a block that leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from mcore_spec.bases.packed_attention import Window, packed_attention
from mcore_spec.parallel.documents import Documents

# Under this name transformers finds our attention, while a base's features are computed.
_ATTENTION = "mcore_spec_packed"


def register_packed_attention() -> None:
    """Let transformers find our attention; it may be called again."""
    AttentionInterface.register(_ATTENTION, _packed_attention)


@contextmanager
def packed_rows(decoder: nn.Module, *, is_checkpointed: bool) -> Iterator[None]:
    """During the block the decoder takes one row of documents (`packed_documents`), without dropout.

    Args:
        decoder: of a causal language model.
        is_checkpointed: whether the layers that transformers was told to checkpoint are computed again in backward;
            without autograd there is nothing to.
    """
    with _without_dropout(decoder), _with_packed_attention(decoder):
        if not is_checkpointed:
            yield
            return
        with _computed_again(decoder):
            yield


@contextmanager
def capture_layer_outputs(layers: nn.ModuleList, layer_ids: Sequence[int]) -> Iterator[list[Tensor]]:
    """Outputs of the layers `layer_ids`, appended in layer order during the block; no others are kept."""
    captured: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
        captured.append(output)

    handles = [layers[layer].register_forward_hook(keep) for layer in sorted(set(layer_ids))]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_dropout(decoder: nn.Module) -> Iterator[None]:
    """A teacher has no dropout, and its layers, no longer in training mode, are not checkpointed."""
    trained = [module for module in decoder.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@contextmanager
def _computed_again(decoder: nn.Module) -> Iterator[None]:
    """Checkpoint as transformers would; a layer that runs again behind this block runs as it did in it."""
    layers: list[Any] = [
        module
        for module in decoder.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    before = [layer._gradient_checkpointing_func for layer in layers]

    def again(function: Callable[..., Any], *inputs: Any) -> Any:
        def run(*inputs: Any) -> Any:
            with packed_rows(decoder, is_checkpointed=False):
                return function(*inputs)

        # Nothing is drawn.
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

    for layer in layers:
        layer.training, layer._gradient_checkpointing_func = True, again
    try:
        yield
    finally:
        for layer, function in zip(layers, before, strict=True):
            layer.training, layer._gradient_checkpointing_func = False, function


@contextmanager
def _with_packed_attention(decoder: nn.Module) -> Iterator[None]:
    config: Any = decoder.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: object,
    *,
    packed_documents: Documents,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, rows, d] -> [1, rows, heads, d], and no weights."""
    # Under autocast rotated queries and keys are wider than values.
    query, key, value = (x.permute(2, 0, 1, 3).to(value.dtype) for x in (query, key, value))
    mixed = packed_attention(query, key, value, packed_documents, Window(sliding_window, scaling))
    return mixed.transpose(0, 1), None
