"""Weights & Biases and trackio for `test_training_log.py`, in a process of its own: both leave things behind in theirs.

    python -m tests.unit.log_cases DIR     # the last line is a JSON object, see `main`

Nothing may be sent anywhere; addresses of other machines that are asked for are in the answer.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcore_spec.training.log import RUN_ID_NAME, open_loggers

LOGGERS = ("wandb", "trackio")
SETTINGS: dict[str, Any] = {"lr": 1e-4, "data_path": ["a.jsonl", "b.jsonl"], "train_iters": None}
# Numbers with all their digits, a step that was skipped, validation at the iteration of a training entry.
ENTRIES: list[dict[str, Any]] = [
    {
        "iteration": 4,
        "consumed_tokens": 123_456_789_012,
        "loss": 1 / 3,
        "accuracy": [0.1, 2 / 7, None],
        "grad_norm": None,
        "learning_rate": 1.1e-5,
        "tokens_per_second": 1e5 / 3,
    },
    {"iteration": 8, "loss": 0.1 + 0.2, "accuracy": [5e-324, 1.0, 1 - 2**-53], "grad_norm": 1e300},
    {"iteration": 8, "validation_loss": 7 / 11, "validation_accuracy": [1 / 9]},
    {"iteration": 12, "loss": None, "accuracy": None, "learning_rate": 1e-6},
]
# The run is stopped after this one and gone on with.
STOPPED_AT = 8
_LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)


def main() -> None:
    """Log a run that is interrupted, and read it back.

    Prints ``{"wandb": [[id, name, config, {step: figures}], ...], "trackio": [[name, config, {step: figures}], ...],
    "addresses": [...]}``; of Weights & Biases one run for each part, as it keeps what is not sent.
    """
    directory = Path(sys.argv[1])
    addresses: list[str] = []
    sys.addaudithook(lambda event, arguments: _note_address(addresses, event, arguments))
    for iteration in (0, STOPPED_AT):
        loggers = open_loggers(LOGGERS, directory, iteration=iteration, settings=SETTINGS)
        for entry in ENTRIES:
            if (entry["iteration"] <= STOPPED_AT) == (iteration == 0):
                for logger in loggers:
                    logger.write(entry)
        for logger in loggers:
            logger.close()
    files = sorted((directory / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    runs = {"wandb": [read_wandb(path) for path in files], "trackio": read_trackio(), "addresses": addresses}
    print(json.dumps(runs | {"run_id": (directory / RUN_ID_NAME).read_text().strip()}))


def _note_address(addresses: list[str], event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" and arguments[0] not in _LOCAL:
        addresses.append(str(arguments[0]))
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in _LOCAL:
        addresses.append(str(arguments[1]))


def read_trackio() -> list[list[Any]]:
    """Every run of trackio, read by its own storage."""
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for record in SQLiteStorage.get_run_records("mcore_spec"):
        steps: dict[int, dict[str, float]] = {}
        for row in SQLiteStorage.get_logs("mcore_spec", run_id=record["id"]):
            figures = {name: value for name, value in row.items() if name not in ("step", "timestamp")}
            steps.setdefault(row["step"], {}).update(figures)
        config = SQLiteStorage.get_run_config("mcore_spec", record["name"])
        found.append([record["name"], _without_own(config or {}), steps])
    return found


def read_wandb(path: Path) -> list[Any]:
    """A run of Weights & Biases from its file, in which each record is a message of the package's own."""
    from wandb.proto import wandb_internal_pb2

    run_id, name, config, steps = "", "", {}, {}
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("run"):
            run_id, name = record.run.run_id, record.run.display_name
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            steps[items["_step"]] = _without_own(items)
    return [run_id, name, _without_own(config), steps]


def _without_own(values: dict[str, Any]) -> dict[str, Any]:
    """Without what the packages add, whose names begin with an underscore."""
    return {name: value for name, value in values.items() if not name.startswith("_")}


def _records(data: bytes) -> Iterator[bytes]:
    """The log format of LevelDB: blocks of 32 KiB, in them parts with a checksum, a length and a place in the record.

    Seven bytes that say what the file is stand before it, inside of the first block.
    """
    header, block = struct.Struct("<IHB"), 2**15
    position, record = header.size, b""
    while position + header.size <= len(data):
        if block - position % block < header.size:
            position += block - position % block
            continue
        _, length, place = header.unpack_from(data, position)
        position += header.size
        is_first, is_last = place in (1, 2), place in (1, 4)
        record = (b"" if is_first else record) + data[position : position + length]
        position += length
        if is_last:
            yield record


if __name__ == "__main__":
    main()
