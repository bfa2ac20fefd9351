"""Hidden states of one conversation, and their form on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mcore_spec.data.hidden_states.description import StoreDescription
from mcore_spec.errors import ConfigError
from mcore_spec.planning.states import StatesDtype

DTYPES: dict[StatesDtype, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
# Tensors of a shard, one document behind the other.
TOKENS, MASK, AUX, LAST = "token_ids", "loss_mask", "aux", "last"
SCALE = "_scale"
_LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


class DocumentStates(NamedTuple):
    """One conversation and what the base made of it.

    Attributes:
        token_ids: int64 [n].
        loss_mask: bool [n], the tokens that the model must produce.
        aux: outputs of the aux layers in layer order, [n, aux layers, h].
        last: output of the last layer, behind the final norm where the description says so, [n, h].
    """

    token_ids: Tensor
    loss_mask: Tensor
    aux: Tensor
    last: Tensor


class ScaledRows(NamedTuple):
    """Rows in eight bits.

    Attributes:
        values: float8_e4m3fn [..., h].
        scales: float32 [...], what the values of a row are multiplied by.
    """

    values: Tensor
    scales: Tensor


def scale_rows(rows: Tensor) -> ScaledRows:
    """[..., h] -> each row over its largest value's share of what float8_e4m3fn holds."""
    wide = rows.float()
    largest = wide.abs().amax(dim=-1)
    scales = torch.where(largest > 0, largest / _LARGEST_FP8, torch.ones_like(largest))
    return ScaledRows((wide / scales[..., None]).clamp(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn), scales)


def encode(states: DocumentStates, description: StoreDescription) -> dict[str, Tensor]:
    """Tensors of a document by their names in a shard, on the host.

    Args:
        states: on any device, of any floating dtype.
        description: of the store.

    Raises:
        ConfigError: shapes that do not fit the description, token ids outside of the vocabulary, or states that are
            no numbers.
    """
    _check(states, description)
    encoded = {
        TOKENS: states.token_ids.to(device="cpu", dtype=torch.int32),
        MASK: states.loss_mask.to(device="cpu", dtype=torch.bool),
    }
    for name, rows in ((AUX, states.aux), (LAST, states.last)):
        if description.dtype == "float8_e4m3fn":
            scaled = scale_rows(rows)
            encoded |= {name: scaled.values.cpu(), name + SCALE: scaled.scales.cpu()}
        else:
            encoded[name] = rows.to(device="cpu", dtype=DTYPES[description.dtype])
    return encoded


def decode(tensors: Mapping[str, Tensor]) -> DocumentStates:
    """The inverse of `encode`; states in eight bits come back in float32."""
    rows = {name: tensors[name] for name in (AUX, LAST)}
    for name in rows:
        if name + SCALE in tensors:
            rows[name] = rows[name].float() * tensors[name + SCALE][..., None]
    return DocumentStates(tensors[TOKENS].to(torch.int64), tensors[MASK], rows[AUX], rows[LAST])


def _check(states: DocumentStates, description: StoreDescription) -> None:
    num_tokens, hidden_size = len(states.token_ids), description.hidden_size
    if not 0 < num_tokens <= description.seq_length:
        raise ConfigError(f"a document of {num_tokens} tokens for a store of seq_length = {description.seq_length}")
    expected = {
        "token_ids": (num_tokens,),
        "loss_mask": (num_tokens,),
        "aux": (num_tokens, len(description.aux_layer_ids), hidden_size),
        "last": (num_tokens, hidden_size),
    }
    for name, tensor in states._asdict().items():
        if tuple(tensor.shape) != expected[name]:
            raise ConfigError(
                f"{name} of a document of {num_tokens} tokens has shape {list(tensor.shape)}, the store holds "
                f"{list(expected[name])}: {len(description.aux_layer_ids)} aux layers and hidden_size = {hidden_size}"
            )
    smallest, largest = int(states.token_ids.min()), int(states.token_ids.max())
    if smallest < 0 or largest >= description.vocab_size:
        raise ConfigError(
            f"token ids from {smallest} to {largest} for vocab_size = {description.vocab_size}; the conversations were "
            "made with another tokenizer"
        )
    for name in ("aux", "last"):
        if not bool(states._asdict()[name].isfinite().all()):
            raise ConfigError(f"{name}: hidden states hold NaN or infinity; run the base in a wider dtype")
