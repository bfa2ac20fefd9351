"""speculators' version 1 (0.3 and 0.4): ``data_{i}.pt`` for each conversation, a dictionary of

    input_ids      int64 [n]
    hidden_states  list of [n, h], a layer each, the last one last
    loss_mask      int64 [n]

beside `data_config.json` of version 2.0, which names the base, its width and the layers, and `sample_lengths.json`.

Read in speculators 0.3.0 and 0.4.0 (`data_generation`). There the ids 2, n // 2, n - 3 and n - 1 were captured behind
the layer of that number: by output. Their drafts, and vLLM, count boundaries, where the same ids stand for one layer
less. 0.4 sends the last state through the final norm itself, 0.3 did not. `data_config.json` says neither; what is
written here does, in two keys of its own, counts boundaries (2, n // 2, n - 3 and n) and does not norm.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mcore_spec.data.durable_files import publish_file
from mcore_spec.data.foreign_states.form import (
    FLOATS,
    Convention,
    Facts,
    Form,
    LeftOpen,
    asked,
    check_rows,
    check_tensor,
    numbered_files,
    take_tensor,
    to_boundary_ids,
    to_output_ids,
)
from mcore_spec.data.foreign_states.modelopt import INTEGERS, load
from mcore_spec.data.hidden_states import DocumentStates
from mcore_spec.errors import ConfigError

DATA_CONFIG, LENGTHS = "data_config.json", "sample_lengths.json"
_VERSION = "2.0"
_CONVENTION, _NORMED = "layer_id_convention", "last_is_normed"


class SpeculatorsV1Reader:
    """A directory of ``data_{i}.pt`` files."""

    def __init__(self, directory: Path, left_open: LeftOpen) -> None:
        """Read `data_config.json`.

        Raises:
            ConfigError: it is missing or damaged, files are missing, or neither it nor `left_open` answers a question.
        """
        path = directory / DATA_CONFIG
        config = _read_config(path)
        self._paths = numbered_files(directory, "data_*.pt")
        names = [path.name for path in self._paths]
        if names != [f"data_{index}.pt" for index in range(len(names))]:
            missing = next(name for index, name in enumerate(names) if name != f"data_{index}.pt")
            raise ConfigError(f"{directory}: {missing} stands where another number is due; files are missing")
        self.facts = _facts(config, left_open, path=path, num_documents=len(names))

    def states(self, index: int) -> DocumentStates:
        """See `Reader`."""
        path = self._paths[index]
        values = load(path)
        token_ids = take_tensor(values, "input_ids", where=path, ndim=1, kinds=INTEGERS)
        mask = take_tensor(values, "loss_mask", where=path, ndim=1, kinds=INTEGERS)
        rows = values.get("hidden_states")
        layers = len(self.facts.aux_layer_ids) + 1
        if not isinstance(rows, list) or len(rows) != layers:
            found = f"{len(rows)} tensors" if isinstance(rows, list) else type(rows).__name__
            raise ConfigError(f"{path}: hidden_states is {found}, {DATA_CONFIG} names {layers} layers; write it again")
        for row in rows:
            check_tensor(row, "hidden_states", where=path, ndim=2, kinds=FLOATS)
            if row.shape != (len(token_ids), self.facts.hidden_size):
                raise ConfigError(
                    f"{path}: hidden_states has a tensor of shape {list(row.shape)}, for {len(token_ids)} tokens of "
                    f"hidden size {self.facts.hidden_size}; write it again"
                )
        aux = torch.stack(rows[:-1], dim=1)
        states = DocumentStates(token_ids.to(torch.int64), mask.to(torch.bool), aux, rows[-1])
        return check_rows(states, self.facts, where=path)


class SpeculatorsV1Writer:
    """A file a conversation, then `data_config.json`."""

    def __init__(self, directory: Path, facts: Facts, num_layers: int) -> None:
        """Nothing is written yet."""
        self._directory, self._facts, self._num_layers = directory, facts, num_layers
        self._lengths: dict[int, int] = {}
        self._dtype = "torch.bfloat16"

    def append(self, index: int, states: DocumentStates) -> None:
        """See `Writer`."""
        values = {
            "input_ids": states.token_ids.clone(),
            "hidden_states": [*(aux.clone() for aux in states.aux.unbind(1)), states.last.clone()],
            "loss_mask": states.loss_mask.to(torch.int64),
        }
        publish_file(self._directory / f"data_{index}.pt", lambda path: torch.save(values, path))
        self._lengths[index] = len(states.token_ids)
        self._dtype = str(states.last.dtype)

    def finish(self) -> None:
        """Write what describes the files."""
        lengths = {str(index): self._lengths[index] for index in sorted(self._lengths)}
        for name, value in ((LENGTHS, lengths), (DATA_CONFIG, self._config())):
            text = json.dumps(value, indent=2) + "\n"
            publish_file(self._directory / name, lambda path, text=text: path.write_text(text))  # type: ignore[misc]

    def _config(self) -> dict[str, Any]:
        facts = self._facts
        layers = len(facts.aux_layer_ids) + 1
        seq_length = facts.seq_length or max(self._lengths.values())
        schema = {
            "input_ids": {"dtype": "torch.long", "shape": "[seq_len]"},
            "hidden_states": {
                "dtype": f"list[{self._dtype}]",
                "shape": f"list of [seq_len, {facts.hidden_size}]",
                "num_tensors": layers,
            },
            "loss_mask": {"dtype": "torch.long", "shape": "[seq_len]"},
        }
        return {
            "version": _VERSION,
            "generated_at": datetime.now(UTC).isoformat(),
            "reproducibility": {"package_versions": {"torch": torch.__version__}},
            "model": {
                "target_model_path": facts.source,
                "max_model_len": seq_length,
                "hidden_size": facts.hidden_size,
            },
            "data": {"seq_length": seq_length, "num_samples": facts.num_documents},
            "hidden_states": {
                "layer_ids": [*to_boundary_ids(facts.aux_layer_ids), self._num_layers],
                _CONVENTION: "boundary",
                _NORMED: facts.last_is_normed,
            },
            "format": {"file_pattern": "data_{idx}.pt", "data_format_version": 1, "schema": schema},
        }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; give a directory that speculators' data generation wrote") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); write it again") from error
    if not isinstance(config, dict) or config.get("version") != _VERSION:
        found = config.get("version") if isinstance(config, dict) else type(config).__name__
        raise ConfigError(f"{path}: version {found!r}; this package reads {_VERSION!r}")
    return config


def _facts(config: dict[str, Any], left_open: LeftOpen, *, path: Path, num_documents: int) -> Facts:
    try:
        hidden, model, data = config["hidden_states"], config["model"], config["data"]
        ids = [int(layer) for layer in hidden["layer_ids"]]
        width, expected = int(model["hidden_size"]), int(data["num_samples"])
        source, seq_length = str(model["target_model_path"]), int(data["seq_length"])
        stated, normed = hidden.get(_CONVENTION), hidden.get(_NORMED)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: no usable entry for {error}; write it again") from error
    if expected != num_documents:
        raise ConfigError(f"{path} lists {expected} samples, {num_documents} files are there; files are missing")
    if ids != sorted(set(ids)):
        raise ConfigError(f"{path}: layer_ids = {ids} do not ascend, so that it is open which state is whose")
    convention: Convention | None = stated if stated in ("boundary", "output") else left_open.convention
    asked(convention, where=path, what="how it counts layers", flag="--layer-id-convention boundary or output")
    is_normed = normed if isinstance(normed, bool) else left_open.last_is_normed
    what = "whether the last state went through the final norm"
    asked(
        is_normed,
        where=path,
        what=what,
        flag="--last-is-normed or --no-last-is-normed (speculators 0.3 and 0.4: it did not)",
    )
    assert convention is not None
    assert is_normed is not None
    for said, found, flag in (
        (left_open.convention, convention, "--layer-id-convention"),
        (left_open.last_is_normed, is_normed, "--last-is-normed"),
        (left_open.aux_layer_ids, to_output_ids(ids[:-1], convention), "--aux-layer-ids"),
    ):
        if said is not None and said != found:
            raise ConfigError(f"{flag} = {said}, but {path} says {found}; leave the flag out")
    *aux, last = to_output_ids(ids, convention)
    return Facts(source, tuple(aux), is_normed, width, num_documents, seq_length, last)


SPECULATORS_V1 = Form(SpeculatorsV1Reader, SpeculatorsV1Writer, wants_normed=False)
