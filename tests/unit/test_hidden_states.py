"""The store of hidden states: what is written is read, whatever happened in between."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_spec.data.hidden_states import DocumentStates, StatesStore, StatesWriter, StoreDescription
from mcore_spec.data.hidden_states.writer import finish_store
from mcore_spec.errors import CheckpointError, ConfigError

LENGTHS = (5, 1, 7, 3, 2, 6)
NUM_AUX, HIDDEN = 3, 8


def description(**changes: Any) -> StoreDescription:
    values: dict[str, Any] = {
        "source": "a base",
        "base_fingerprint": "b",
        "backend": "megatron",
        "tokenizer_fingerprint": "t",
        "conversation_fingerprint": "c",
        "num_documents": len(LENGTHS),
        "seq_length": 8,
        "vocab_size": 50,
        "hidden_size": HIDDEN,
        "aux_layer_ids": (1, 2, 4),
        "last_is_normed": True,
        "dtype": "float64",
    }
    return StoreDescription.parse({**values, **changes})


def document(index: int, *, num_aux: int = NUM_AUX) -> DocumentStates:
    generator = torch.Generator().manual_seed(index)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 10

    length = LENGTHS[index]
    return DocumentStates(
        torch.randint(50, (length,), generator=generator),
        torch.rand(length, generator=generator) < 0.5,
        drawn(length, num_aux, HIDDEN),
        drawn(length, HIDDEN),
    )


def write(directory: Path, documents: Iterable[int], *, writer: int = 0, shard_bytes: int = 1, **changes: Any) -> None:
    with StatesWriter(directory, description(**changes), writer=writer, max_shard_bytes=shard_bytes) as made:
        for index in documents:
            if index not in made.done:
                made.append(index, document(index, num_aux=len(made.description.aux_layer_ids)))


def check_whole(directory: Path) -> None:
    store = StatesStore(directory, verify=True)
    assert store.lengths.tolist() == list(LENGTHS)
    assert store.num_masked_tokens == sum(int(document(index).loss_mask.sum()) for index in range(len(LENGTHS)))
    for index in range(len(LENGTHS)):
        expected, found = document(index), store.states(index)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        tokens = store.document(index)
        assert tokens.token_ids.tolist() == expected.token_ids.tolist()
        assert tokens.mask.tolist() == expected.loss_mask.tolist()
    names = {path.name for path in directory.iterdir()}
    assert names == {"manifest.json", *(name for name in names if name.startswith("shard-"))}


@pytest.mark.parametrize("shard_bytes", [1, 2000, 1 << 20])
def test_several_writers_make_one_store(shard_bytes: int, tmp_path: Path) -> None:
    write(tmp_path, (4, 0, 2), shard_bytes=shard_bytes)
    with pytest.raises(CheckpointError, match="was not finished"):
        StatesStore(tmp_path)
    with pytest.raises(CheckpointError, match=r"3 of 6 documents are missing \(1, 3, 5\)"):
        finish_store(tmp_path)
    write(tmp_path, (5, 1, 3), writer=1, shard_bytes=shard_bytes)
    finish_store(tmp_path)
    check_whole(tmp_path)
    # Given again, everything is there.
    write(tmp_path, range(6))
    finish_store(tmp_path)
    check_whole(tmp_path)


def test_no_aux_layers(tmp_path: Path) -> None:
    write(tmp_path, range(6), aux_layer_ids=(), dtype="float8_e4m3fn", shard_bytes=2000)
    finish_store(tmp_path)
    states = StatesStore(tmp_path).states(2)
    assert states.aux.shape == (7, 0, HIDDEN)
    torch.testing.assert_close(states.last, document(2, num_aux=0).last.float(), rtol=2**-4, atol=1e-3)


def test_eight_bits_keep_each_row_to_its_largest_value(tmp_path: Path) -> None:
    """Three bits behind the first: half a unit in the last place is 2^-4 of a value that is not too small."""
    write(tmp_path, range(6), dtype="float8_e4m3fn")
    finish_store(tmp_path)
    store = StatesStore(tmp_path)
    for index in range(len(LENGTHS)):
        found, expected = store.states(index), document(index)
        for ours, theirs in ((found.aux, expected.aux), (found.last, expected.last)):
            smallest_normal = theirs.abs().amax(dim=-1, keepdim=True) / 448 * 2**-6
            error = (ours.double() - theirs).abs()
            assert bool((error <= torch.maximum(theirs.abs() * 2**-4, smallest_normal * 2**-4) * 1.0001).all())
            assert float(error.max()) > 0


@pytest.mark.parametrize("is_journaled", [True, False])
def test_what_a_killed_writer_left_is_gone_on_with(is_journaled: bool, tmp_path: Path) -> None:
    """A shard that was not whole, and one that had its name and was not in the journal."""
    write(tmp_path, (0, 1, 2))
    journal = tmp_path / "journal-00000.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    if not is_journaled:
        journal.write_text("".join(lines[:2]) + lines[2][:20])
    (tmp_path / ".partial-shard-00000-0000003.safetensors").write_bytes(b"half")
    with StatesWriter(tmp_path, description(), max_shard_bytes=1) as writer:
        assert writer.done == ({0, 1, 2} if is_journaled else {0, 1})
        for index in set(range(6)) - writer.done:
            writer.append(index, document(index))
    finish_store(tmp_path)
    check_whole(tmp_path)


@pytest.mark.parametrize("damage", ["cut off", "changed", "missing"])
def test_a_damaged_shard_is_named_and_made_again(damage: str, tmp_path: Path) -> None:
    write(tmp_path, range(6))
    finish_store(tmp_path)
    victim = sorted(tmp_path.glob("shard-*"))[-1]
    contents = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "cut off":
        victim.write_bytes(contents[:-1])
    else:
        victim.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    if damage == "changed":
        StatesStore(tmp_path)
    with pytest.raises(CheckpointError, match=victim.name):
        StatesStore(tmp_path, verify=True)
    if damage == "cut off":
        with pytest.raises(CheckpointError, match=f"{victim.name} has .* delete that file and extract"):
            write(tmp_path, range(6))
    victim.unlink(missing_ok=True)
    write(tmp_path, range(6))
    finish_store(tmp_path)
    check_whole(tmp_path)


def _write_slowly(directory: Path) -> None:
    for number in range(2):
        write(directory, range(number, 6, 2), writer=number)
    finish_store(directory)


def test_a_writer_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    """No document twice, none missing, whatever stood on the disk when it was killed."""
    context, moments = multiprocessing.get_context("fork"), random.Random(3)
    num_killed = 0
    while num_killed < 200:
        process = context.Process(target=_write_slowly, args=(tmp_path / "states",))
        process.start()
        # Longer each time: on a busy machine a process may need long to begin.
        process.join(moments.uniform(0, 0.02 + 0.005 * num_killed))
        is_killed = process.is_alive()
        process.kill()
        process.join()
        if not is_killed and process.exitcode == 0:
            check_whole(tmp_path / "states")
            if num_killed >= 20:
                return
            shutil.rmtree(tmp_path / "states")
        assert is_killed or process.exitcode in (0, -signal.SIGKILL)
        num_killed += is_killed
    pytest.fail("it never came to its end")


def test_another_store_is_not_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path, (0,))
    with pytest.raises(CheckpointError, match="was begun with base_fingerprint = 'b', now it is 'other'"):
        write(tmp_path, (1,), base_fingerprint="other")
    write(tmp_path, range(1, 6), source="moved")
    finish_store(tmp_path)
    with pytest.raises(CheckpointError, match=r"was begun with aux_layer_ids = \(1, 2, 4\), now it is \(1, 2, 3\)"):
        write(tmp_path, (1,), aux_layer_ids=(1, 2, 3))
    check_whole(tmp_path)


def test_another_format(tmp_path: Path) -> None:
    write(tmp_path, range(6))
    finish_store(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["description"]["format_version"] = 2
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format_version 2, this package reads 1"):
        StatesStore(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"aux": torch.zeros(5, 2, HIDDEN)}, "aux of a document of 5 tokens has shape"),
        ({"last": torch.full((5, HIDDEN), float("nan"))}, "last: hidden states hold NaN"),
        ({"token_ids": torch.full((5,), 50)}, "token ids from 50 to 50 for vocab_size = 50"),
    ],
)
def test_states_that_do_not_fit(changes: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    with StatesWriter(tmp_path, description()) as writer, pytest.raises(ConfigError, match=says):
        writer.append(0, document(0)._replace(**changes))


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    with StatesWriter(tmp_path, description()), pytest.raises(ConfigError, match="another process is writing"):
        StatesWriter(tmp_path, description())
