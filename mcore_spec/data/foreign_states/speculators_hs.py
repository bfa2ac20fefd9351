"""speculators' current form (0.5 to 0.9): a Hugging Face dataset on disk (`input_ids`, `loss_mask`, `seq_len`) and, in
its directory `hidden_states`, ``hs_{i}.safetensors`` for row i:

    token_ids             int64 [n]
    hidden_states         [n, layers, h], the last layer's output last, before the final norm
    hidden_states_scales  float32 [n, 1, 1], where hidden_states is float8_e4m3fn

These files are vLLM's: its `ExampleHiddenStatesConnector` writes them, in layer order, where boundary n (the number of
layers) is the last layer's output before the final norm, which speculators applies itself. Which layers the others
are no file says. Read in speculators 0.9.0 (`train/data.py`, `data_generation/offline.py`, `hs_connectors`).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcore_spec.data.durable_files import publish_file
from mcore_spec.data.foreign_states.form import (
    FLOATS,
    Facts,
    Form,
    LeftOpen,
    asked,
    check_rows,
    check_tensor,
    take_tensor,
)
from mcore_spec.data.foreign_states.modelopt import INTEGERS
from mcore_spec.data.hidden_states import DocumentStates
from mcore_spec.data.sources import require
from mcore_spec.errors import ConfigError

HIDDEN_STATES = "hidden_states"
_SCALES = "hidden_states_scales"


class CapturedStates(NamedTuple):
    """One ``hs_{i}.safetensors``.

    Attributes:
        token_ids: int64 [n].
        hidden_states: [n, layers, h].
    """

    token_ids: Tensor
    hidden_states: Tensor


def read_captured(path: Path) -> CapturedStates:
    """What vLLM captured of one conversation; eight bits come back in float32.

    Raises:
        ConfigError: missing, damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            values: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); write it again") from error
    token_ids = take_tensor(values, "token_ids", where=path, ndim=1, kinds=INTEGERS).to(torch.int64)
    kinds = (*FLOATS, torch.float8_e4m3fn)
    hidden = take_tensor(values, HIDDEN_STATES, where=path, ndim=3, kinds=kinds)
    if len(hidden) != len(token_ids):
        raise ConfigError(f"{path}: {len(hidden)} rows of hidden_states for {len(token_ids)} token_ids; write it again")
    if hidden.dtype == torch.float8_e4m3fn:
        scales = take_tensor(values, _SCALES, where=path, ndim=3, kinds=(torch.float32,))
        if scales.shape != (len(hidden), 1, 1):
            raise ConfigError(f"{path}: {_SCALES} has shape {list(scales.shape)}, not {[len(hidden), 1, 1]}")
        hidden = hidden.float() * scales
    return CapturedStates(token_ids, hidden)


class SpeculatorsReader:
    """A dataset with its hidden states."""

    def __init__(self, directory: Path, left_open: LeftOpen) -> None:
        """Open the dataset and look at the first file.

        Raises:
            ConfigError: either is missing or damaged, or a question that neither they nor `left_open` answer.
        """
        asked(
            left_open.aux_layer_ids,
            where=directory,
            what="of which layers its aux states are",
            flag="--aux-layer-ids (0-based, by output: one less than vLLM's ids, without the last)",
        )
        assert left_open.aux_layer_ids is not None
        if left_open.last_is_normed:
            raise ConfigError("--last-is-normed true: speculators' last state is never normed; leave the flag out")
        self._directory = directory
        self._rows = _open_dataset(directory)
        width = read_captured(self._path(0)).hidden_states.shape[-1]
        self.facts = Facts("", left_open.aux_layer_ids, False, width, len(self._rows))

    def _path(self, index: int) -> Path:
        return self._directory / HIDDEN_STATES / f"hs_{index}.safetensors"

    def states(self, index: int) -> DocumentStates:
        """See `Reader`."""
        path = self._path(index)
        captured = read_captured(path)
        row = self._rows[index]
        token_ids, mask = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["loss_mask"])
        if not torch.equal(token_ids.to(torch.int64), captured.token_ids):
            raise ConfigError(
                f"{path}: its token_ids are not the input_ids of row {index} of {self._directory}; they belong to "
                "another dataset"
            )
        check_tensor(mask, "loss_mask", where=self._directory, ndim=1, kinds=INTEGERS)
        hidden = captured.hidden_states
        states = DocumentStates(captured.token_ids, mask.to(torch.bool), hidden[:, :-1], hidden[:, -1])
        return check_rows(states, self.facts, where=path)


class SpeculatorsWriter:
    """A file a conversation, then the dataset."""

    def __init__(self, directory: Path, _facts: Facts, _num_layers: int) -> None:
        """Nothing is written yet.

        Raises:
            ConfigError: the package datasets is missing.
        """
        _datasets()
        self._directory = directory
        self._states = directory / HIDDEN_STATES
        self._rows: dict[int, dict[str, list[int]]] = {}

    def append(self, index: int, states: DocumentStates) -> None:
        """See `Writer`."""
        self._states.mkdir(exist_ok=True)
        tensors = {
            "token_ids": states.token_ids.contiguous(),
            HIDDEN_STATES: torch.cat([states.aux, states.last[:, None]], dim=1).contiguous(),
        }
        publish_file(self._states / f"hs_{index}.safetensors", lambda path: save_file(tensors, path))
        self._rows[index] = {
            "input_ids": states.token_ids.tolist(),
            "loss_mask": states.loss_mask.to(torch.int64).tolist(),
        }

    def finish(self) -> None:
        """Write the dataset, in the order of the numbers."""
        datasets = _datasets()
        rows = [self._rows[index] for index in sorted(self._rows)]
        columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
        columns["seq_len"] = [len(row["input_ids"]) for row in rows]
        dataset = datasets.Dataset.from_dict(columns)
        dataset.set_format("torch", columns=["input_ids", "loss_mask", "seq_len"])
        dataset.save_to_disk(str(self._directory))


def _datasets() -> ModuleType:
    return require(
        "datasets", package="datasets", wanted_by="speculators' form", instead="choose the form speculators-v1"
    )


def _open_dataset(directory: Path) -> Any:
    datasets = _datasets()
    try:
        rows = datasets.load_from_disk(str(directory)).with_format("torch")
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{directory} holds no dataset that can be read ({reason}); give what speculators' prepare-data wrote, "
            f"with the files in {HIDDEN_STATES}"
        ) from error
    missing = {"input_ids", "loss_mask"} - set(rows.column_names)
    if missing or not len(rows):
        raise ConfigError(
            f"{directory}: a dataset of {len(rows)} rows without {sorted(missing)}; prepare the data again"
        )
    return rows


SPECULATORS = Form(SpeculatorsReader, SpeculatorsWriter, wants_normed=False)
