"""ModelOpt's form: ``ID.pt`` for each conversation, a dictionary of

    input_ids          int64 [n]
    hidden_states      [n, h], the last layer's output, behind the final norm unless `hidden_states_prenorm` is true
    aux_hidden_states  [n, layers * h], joined in layer order
    loss_mask          int64 [n]; dumps that train on all tokens have none
    conversation_id    the ID

Read in ModelOpt 0.47: `modelopt/torch/speculative/eagle/utils.py` and its scripts in ``collect_hidden_states``. No file
says which layers the aux states are of, nor how many layers the base has. EAGLE heads there ignore
`hidden_states_prenorm` and take every last state as normed, so that no other is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_spec.data.durable_files import publish_file
from mcore_spec.data.foreign_states.form import (
    FLOATS,
    Facts,
    Form,
    LeftOpen,
    asked,
    check_rows,
    numbered_files,
    take_tensor,
)
from mcore_spec.data.hidden_states import DocumentStates
from mcore_spec.data.torch_files import UnreadableFile, read_torch_file
from mcore_spec.errors import ConfigError

INTEGERS = (torch.int64, torch.int32, torch.bool)
_PRENORM = "hidden_states_prenorm"


class ModelOptReader:
    """A directory of ``.pt`` files, in the order of their names."""

    def __init__(self, directory: Path, left_open: LeftOpen) -> None:
        """Look at the first file.

        Raises:
            ConfigError: no such files, a damaged one, or a question that neither they nor `left_open` answer.
        """
        self._paths = numbered_files(directory, "*.pt")
        self._counts_all = left_open.counts_all_tokens
        asked(
            left_open.aux_layer_ids, where=directory, what="of which layers its aux states are", flag="--aux-layer-ids"
        )
        assert left_open.aux_layer_ids is not None
        first = self._paths[0]
        values = load(first)
        hidden = take_tensor(values, "hidden_states", where=first, ndim=2, kinds=FLOATS)
        self._normed = _is_normed(values)
        if left_open.last_is_normed not in (None, self._normed):
            raise ConfigError(
                f"--last-is-normed {str(left_open.last_is_normed).lower()}, but {first} says "
                f"{_PRENORM} = {not self._normed}; leave the flag out"
            )
        self.facts = Facts("", left_open.aux_layer_ids, self._normed, hidden.shape[1], len(self._paths))

    def states(self, index: int) -> DocumentStates:
        """See `Reader`."""
        path = self._paths[index]
        values = load(path)
        token_ids = take_tensor(values, "input_ids", where=path, ndim=1, kinds=INTEGERS)
        if _is_normed(values) != self._normed:
            raise ConfigError(f"{path}: {_PRENORM} differs from that of {self._paths[0]}; keep the two kinds apart")
        aux = take_tensor(values, "aux_hidden_states", where=path, ndim=2, kinds=FLOATS)
        layers, width = len(self.facts.aux_layer_ids), self.facts.hidden_size
        if aux.shape[1] != layers * width:
            raise ConfigError(
                f"{path}: aux_hidden_states has {aux.shape[1]} columns, {layers} layers of hidden size {width} are "
                f"{layers * width}; correct --aux-layer-ids"
            )
        states = DocumentStates(
            token_ids=token_ids.to(torch.int64),
            loss_mask=self._mask(values, token_ids, path),
            aux=aux.unflatten(1, (layers, width)),
            last=take_tensor(values, "hidden_states", where=path, ndim=2, kinds=FLOATS),
        )
        return check_rows(states, self.facts, where=path)

    def _mask(self, values: dict[str, Any], token_ids: Tensor, path: Path) -> Tensor:
        if "loss_mask" in values:
            return take_tensor(values, "loss_mask", where=path, ndim=1, kinds=INTEGERS).to(torch.bool)
        if not self._counts_all:
            raise ConfigError(
                f"{path} has no 'loss_mask'; give --counts-all-tokens where every token is to be learnt, or dump the "
                "hidden states with a loss mask"
            )
        return torch.ones(len(token_ids), dtype=torch.bool)


class ModelOptWriter:
    """A file a conversation; its number is the conversation's id."""

    def __init__(self, directory: Path, facts: Facts, _num_layers: int) -> None:
        """Nothing is written yet."""
        self._directory, self._normed = directory, facts.last_is_normed

    def append(self, index: int, states: DocumentStates) -> None:
        """See `Writer`."""
        identifier = f"{index:08d}"
        values = {
            "input_ids": states.token_ids.clone(),
            "hidden_states": states.last.clone(),
            "aux_hidden_states": states.aux.flatten(1).clone(),
            "loss_mask": states.loss_mask.to(torch.int64),
            "conversation_id": identifier,
            _PRENORM: not self._normed,
        }
        publish_file(self._directory / f"{identifier}.pt", lambda path: torch.save(values, path))

    def finish(self) -> None:
        """Nothing stands beside the files."""


def load(path: Path) -> dict[str, Any]:
    """The dictionary in a file, its tensors mapped.

    Raises:
        ConfigError: it is damaged, or holds something else.
    """
    try:
        values = read_torch_file(path, mmap=True)
    except UnreadableFile as error:
        raise ConfigError(f"{path} cannot be read ({error}); write it again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not a dictionary of tensors; write it again")
    return values


def _is_normed(values: dict[str, Any]) -> bool:
    return not bool(values.get(_PRENORM, False))


MODELOPT = Form(ModelOptReader, ModelOptWriter, wants_normed=True)
