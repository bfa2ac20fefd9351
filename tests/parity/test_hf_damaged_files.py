"""Files that are missing, truncated or damaged are found before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcore_spec.errors import CheckpointError
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.parity.hf_models import TinyModel
from tests.pool import RankPool

REFUSAL = "tests.parity.import_cases:refusal"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _header(directory: Path) -> tuple[dict[str, Any], bytes]:
    data = (directory / SINGLE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _write_header(directory: Path, header: Any, data: bytes) -> None:
    encoded = json.dumps(header).encode()
    (directory / SINGLE).write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def _truncate(directory: Path, size: int) -> None:
    (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes()[:size])


def _scribble(directory: Path, text: bytes) -> None:
    data = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(data[:40] + text + data[40 + len(text) :])


def _damage_entry(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = _header(directory)
    change(header["model.norm.weight"])
    _write_header(directory, header, data)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (lambda directory: (directory / SINGLE).unlink(), "neither model.safetensors nor"),
    "empty": (lambda directory: _truncate(directory, 0), "truncated"),
    "cut_in_the_size": (lambda directory: _truncate(directory, 5), "truncated"),
    "cut_in_the_header": (lambda directory: _truncate(directory, 200), "truncated"),
    "cut_in_the_data": (lambda directory: _truncate(directory, 60_000), "is truncated: "),
    "cut_at_the_end": (
        lambda directory: _truncate(directory, (directory / SINGLE).stat().st_size - 1),
        "is truncated: ",
    ),
    "a_page_of_html": (
        lambda directory: (directory / SINGLE).write_text("<!DOCTYPE html>" * 99),
        "no safetensors file",
    ),
    "not_json": (lambda directory: _scribble(directory, b"{{{"), "the header is damaged"),
    "not_utf8": (lambda directory: _scribble(directory, b"\xff\xfe"), "the header is damaged"),
    "a_list": (lambda directory: _write_header(directory, [1], _header(directory)[1]), "the header is damaged"),
    "no_offsets": (
        lambda directory: _damage_entry(directory, lambda entry: entry.pop("data_offsets")),
        "the header is damaged",
    ),
    "no_numbers": (
        lambda directory: _damage_entry(directory, lambda entry: entry.update(data_offsets=["0", "8"])),
        "the header is damaged",
    ),
    "offsets_of_another_shape": (
        lambda directory: _damage_entry(directory, lambda entry: entry.update(shape=[16])),
        "the header is damaged",
    ),
    "dtype": (
        lambda directory: _damage_entry(directory, lambda entry: entry.update(dtype="F8_E5M2")),
        "model.norm.weight has dtype F8_E5M2",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_file(copy_of: Callable[[str], Path], case: str) -> None:
    """Found in the header, before any weight is read."""
    damage, message = FILES[case]
    directory = copy_of("llama31")
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        WeightDirectory(directory)
    assert message in str(caught.value) and str(directory) in str(caught.value)


def test_bytes_that_no_tensor_claims(rank_pool: RankPool, copy_of: Callable[[str], Path]) -> None:
    """What only safetensors' own reader refuses is an error for the user too."""
    directory = copy_of("llama31")
    with (directory / SINGLE).open("ab") as file:
        file.write(bytes(64))
    kind, message = rank_pool.run(REFUSAL, world_size=1, directory=directory)[0]
    assert kind == "CheckpointError" and f"{directory / SINGLE} is damaged" in message


@pytest.fixture
def in_shards(tiny_models: dict[str, TinyModel], tmp_path: Path) -> Path:
    """A model in several files with an index, as transformers writes them."""
    tiny_models["llama31"].model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    return tmp_path / "shards"


def test_shards(rank_pool: RankPool, in_shards: Path) -> None:
    """Read as one model; the other tests damage this one."""
    assert rank_pool.run(REFUSAL, world_size=1, directory=in_shards)[0] is None


def test_missing_shard(in_shards: Path) -> None:
    """The index names a file that is not there."""
    shard = sorted(in_shards.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX} names files that are not there: {shard.name}"):
        WeightDirectory(in_shards)


def test_shard_of_another_model(rank_pool: RankPool, in_shards: Path) -> None:
    """Every file is there, but not every tensor in it."""
    first, second = sorted(in_shards.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    kind, message = rank_pool.run(REFUSAL, world_size=1, directory=in_shards)[0]
    assert kind == "CheckpointError" and "missing model.layers." in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"model.norm.weight": 3}}'])
def test_damaged_index(in_shards: Path, text: str) -> None:
    """An index that is none is named."""
    (in_shards / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        WeightDirectory(in_shards)
