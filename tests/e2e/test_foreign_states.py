"""Stores of hidden states in the forms of other tools: there and back bit for bit, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mcore_spec.data.hidden_states import DocumentStates, StatesStore, StatesWriter, StoreDescription
from mcore_spec.data.hidden_states.writer import finish_store
from tests.e2e.conftest import Done, Run, check_refused

LENGTHS = (5, 9, 3)
AUX = (1, 3, 4)
HIDDEN = 32
NUM_LAYERS = 8
LAYERS = [word for layer in AUX for word in ("--aux-layer-ids", layer)]
Damage = Callable[[Path], object]


def documents(*, dtype: torch.dtype, seed: int = 0) -> list[DocumentStates]:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    made = []
    for length in LENGTHS:
        ids = torch.randint(0, 49152, (length,), generator=generator)
        mask = torch.arange(length) >= length // 2
        made.append(DocumentStates(ids, mask, rows(length, len(AUX), HIDDEN), rows(length, HIDDEN)))
    return made


def write_store(directory: Path, *, last_is_normed: bool, dtype: Any = "bfloat16") -> list[DocumentStates]:
    given = documents(dtype=getattr(torch, dtype))
    description = StoreDescription(
        source="a base",
        base_fingerprint="of its weights",
        backend="transformers",
        tokenizer_fingerprint="of its tokenizer",
        conversation_fingerprint="of the conversations",
        num_documents=len(given),
        seq_length=max(LENGTHS),
        vocab_size=49152,
        hidden_size=HIDDEN,
        aux_layer_ids=AUX,
        last_is_normed=last_is_normed,
        dtype=dtype,
    )
    with StatesWriter(directory, description) as writer:
        for index, states in enumerate(given):
            writer.append(index, states)
    finish_store(directory)
    return given


def convert(run: Run, source: Path, form: str, output: Path, to_form: str, *words: object) -> Done:
    return run(
        "hidden-states",
        *("--input-dir", source, "--from-form", form, "--output-dir", output, "--to-form", to_form, *words),
    )


def assert_same(store: StatesStore, given: list[DocumentStates]) -> None:
    assert len(store) == len(given)
    for index, expected in enumerate(given):
        found = store.states(index)
        for name, tensor in expected._asdict().items():
            assert torch.equal(found._asdict()[name], tensor), (index, name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    ("form", "is_normed", "words"),
    [("modelopt", True, LAYERS), ("speculators-v1", False, []), ("speculators", False, LAYERS)],
)
def test_there_and_back_is_bitwise(
    run: Run, tmp_path: Path, base: Path, form: str, is_normed: bool, words: list[object], dtype: str
) -> None:
    given = write_store(tmp_path / "own", last_is_normed=is_normed, dtype=dtype)
    there = convert(run, tmp_path / "own", "mcore-spec", tmp_path / "theirs", form, "--base", base)
    assert there.code == 0, there.err
    back = convert(run, tmp_path / "theirs", form, tmp_path / "back", "mcore-spec", "--base", base, *words)
    assert back.code == 0, back.err
    store = StatesStore(tmp_path / "back", verify=True)
    assert_same(store, given)
    about = store.description
    assert (about.aux_layer_ids, about.last_is_normed, about.dtype, about.backend) == (AUX, is_normed, dtype, "foreign")
    assert (about.seq_length, about.hidden_size, about.vocab_size) == (max(LENGTHS), HIDDEN, 49152)


def test_files_have_the_shapes_of_their_tools(run: Run, tmp_path: Path, base: Path) -> None:
    first = write_store(tmp_path / "normed", last_is_normed=True)[0]
    write_store(tmp_path / "raw", last_is_normed=False)
    assert convert(run, tmp_path / "normed", "mcore-spec", tmp_path / "modelopt", "modelopt").code == 0
    for form in ("speculators-v1", "speculators"):
        assert convert(run, tmp_path / "raw", "mcore-spec", tmp_path / form, form, "--base", base).code == 0

    file = torch.load(tmp_path / "modelopt" / "00000000.pt", weights_only=True)
    assert torch.equal(file["input_ids"], first.token_ids)
    assert torch.equal(file["hidden_states"], first.last)
    assert torch.equal(file["aux_hidden_states"], torch.cat(first.aux.unbind(1), dim=-1))
    assert torch.equal(file["loss_mask"], first.loss_mask.long())
    assert file["hidden_states_prenorm"] is False

    file = torch.load(tmp_path / "speculators-v1" / "data_0.pt", weights_only=True)
    assert [tuple(rows.shape) for rows in file["hidden_states"]] == [(LENGTHS[0], HIDDEN)] * 4
    assert torch.equal(torch.cat(file["hidden_states"][:-1], dim=-1), torch.cat(first.aux.unbind(1), dim=-1))
    assert torch.equal(file["hidden_states"][-1], first.last)
    config = json.loads((tmp_path / "speculators-v1" / "data_config.json").read_text())
    assert config["version"] == "2.0"
    # Boundaries: one more than the output of the layer; the last one is their number.
    assert config["hidden_states"]["layer_ids"] == [2, 4, 5, NUM_LAYERS]
    lengths = json.loads((tmp_path / "speculators-v1" / "sample_lengths.json").read_text())
    assert lengths == {str(index): length for index, length in enumerate(LENGTHS)}

    file = load_file(tmp_path / "speculators" / "hidden_states" / "hs_0.safetensors")
    assert torch.equal(file["token_ids"], first.token_ids)
    assert torch.equal(file["hidden_states"], torch.cat([first.aux, first.last[:, None]], dim=1))


def test_eight_bits_of_vllm_are_read(run: Run, tmp_path: Path, base: Path) -> None:
    write_store(tmp_path / "own", last_is_normed=False, dtype="float32")
    convert(run, tmp_path / "own", "mcore-spec", tmp_path / "theirs", "speculators", "--base", base)
    expected = []
    for index in range(len(LENGTHS)):
        path = tmp_path / "theirs" / "hidden_states" / f"hs_{index}.safetensors"
        file = load_file(path)
        scales = torch.linspace(0.01, 0.02, LENGTHS[index])[:, None, None]
        file["hidden_states"] = (file["hidden_states"] / scales).to(torch.float8_e4m3fn)
        expected.append(file["hidden_states"].float() * scales)
        save_file({**file, "hidden_states_scales": scales}, path)
    done = convert(run, tmp_path / "theirs", "speculators", tmp_path / "back", "mcore-spec", "--base", base, *LAYERS)
    assert done.code == 0, done.err
    store = StatesStore(tmp_path / "back")
    assert store.description.dtype == "float32"
    for index, hidden in enumerate(expected):
        states = store.states(index)
        assert torch.equal(torch.cat([states.aux, states.last[:, None]], dim=1), hidden)


def test_last_states_go_through_the_final_norm(run: Run, tmp_path: Path, base: Path) -> None:
    given = write_store(tmp_path / "raw", last_is_normed=False, dtype="float64")
    weight = torch.rand(HIDDEN) + 0.5
    weights = load_file(base / "model.safetensors")
    assert (weights["model.norm.weight"] == 1).all()
    other = tmp_path / "base"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    save_file({**weights, "model.norm.weight": weight}, other / "model.safetensors", metadata={"format": "pt"})
    words = ("--base", other, "--norm-last")
    for form, flags in (("mcore-spec", ()), ("modelopt", LAYERS)):
        assert convert(run, tmp_path / "raw", "mcore-spec", tmp_path / form, form, *words).code == 0
        if form != "mcore-spec":
            done = convert(run, tmp_path / form, form, tmp_path / "back", "mcore-spec", "--base", other, *flags)
            assert done.code == 0, done.err
        store = StatesStore(tmp_path / ("back" if form != "mcore-spec" else form))
        assert store.description.last_is_normed
        for index, states in enumerate(given):
            expected = states.last / (states.last.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            torch.testing.assert_close(store.states(index).last, expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(store.states(index).aux, states.aux)


def test_forms_that_norm_themselves_take_no_normed_states(run: Run, tmp_path: Path, base: Path) -> None:
    write_store(tmp_path / "normed", last_is_normed=True)
    write_store(tmp_path / "raw", last_is_normed=False)
    for form in ("speculators-v1", "speculators"):
        done = convert(run, tmp_path / "normed", "mcore-spec", tmp_path / "out", form, "--base", base)
        check_refused(done, form, "before the norm")
    done = convert(run, tmp_path / "raw", "mcore-spec", tmp_path / "out", "modelopt")
    check_refused(done, "modelopt", "--norm-last")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["normed", "raw"]


def test_questions_that_files_leave_open_are_asked(run: Run, tmp_path: Path, base: Path) -> None:
    write_store(tmp_path / "normed", last_is_normed=True)
    write_store(tmp_path / "raw", last_is_normed=False)
    convert(run, tmp_path / "normed", "mcore-spec", tmp_path / "modelopt", "modelopt")
    convert(run, tmp_path / "raw", "mcore-spec", tmp_path / "v1", "speculators-v1", "--base", base)
    convert(run, tmp_path / "raw", "mcore-spec", tmp_path / "current", "speculators")
    out = tmp_path / "out"

    def refused(form: str, directory: str, *words: object) -> Done:
        done = convert(run, tmp_path / directory, form, out, "mcore-spec", "--base", base, *words)
        assert not out.exists()
        return done

    check_refused(refused("modelopt", "modelopt"), "--aux-layer-ids")
    check_refused(refused("speculators", "current"), "--aux-layer-ids")
    check_refused(refused("modelopt", "modelopt", *LAYERS[:4]), "96 columns", "--aux-layer-ids")
    check_refused(refused("modelopt", "modelopt", *LAYERS[:4], "--aux-layer-ids", 8), "8 of", "--aux-layer-ids")
    check_refused(refused("modelopt", "modelopt", *LAYERS, "--no-last-is-normed"), "hidden_states_prenorm")
    check_refused(refused("speculators", "current", *LAYERS, "--last-is-normed"), "never normed")
    check_refused(refused("speculators-v1", "v1", "--layer-id-convention", "output"), "boundary")

    path = tmp_path / "v1" / "data_config.json"
    config = json.loads(path.read_text())
    del config["hidden_states"]["layer_id_convention"]
    path.write_text(json.dumps(config))
    check_refused(refused("speculators-v1", "v1"), "--layer-id-convention")
    # By output the last state would be of a ninth layer.
    check_refused(refused("speculators-v1", "v1", "--layer-id-convention", "output"), "layer 8", "7")
    del config["hidden_states"]["last_is_normed"]
    config["hidden_states"]["layer_ids"] = [*AUX, NUM_LAYERS - 1]
    path.write_text(json.dumps(config))
    check_refused(refused("speculators-v1", "v1", "--layer-id-convention", "output"), "--no-last-is-normed")
    words = ("--base", base, "--layer-id-convention", "output", "--no-last-is-normed")
    done = convert(run, tmp_path / "v1", "speculators-v1", out, "mcore-spec", *words)
    assert done.code == 0, done.err
    assert StatesStore(out).description.aux_layer_ids == AUX


def test_files_without_a_loss_mask_count_whole_on_request(run: Run, tmp_path: Path, base: Path) -> None:
    write_store(tmp_path / "own", last_is_normed=True)
    convert(run, tmp_path / "own", "mcore-spec", tmp_path / "theirs", "modelopt")
    for path in (tmp_path / "theirs").iterdir():
        file = torch.load(path, weights_only=True)
        del file["loss_mask"]
        torch.save(file, path)
    words = ("modelopt", tmp_path / "back", "mcore-spec", "--base", base, *LAYERS)
    check_refused(convert(run, tmp_path / "theirs", *words), "loss_mask", "--counts-all-tokens")
    assert convert(run, tmp_path / "theirs", *words, "--counts-all-tokens").code == 0
    assert StatesStore(tmp_path / "back").num_masked_tokens == sum(LENGTHS)


def without(key: str) -> Damage:
    def damage(path: Path) -> None:
        file = torch.load(path, weights_only=True)
        del file[key]
        torch.save(file, path)

    return damage


def reshaped(key: str) -> Damage:
    def damage(path: Path) -> None:
        file = torch.load(path, weights_only=True)
        rows = file[key]
        file[key] = [row[:-1] for row in rows] if isinstance(rows, list) else rows[:-1]
        torch.save(file, path)

    return damage


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


class Harmful:
    """An object that would run code where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("it ran",)


def with_an_object(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "conversation_id": Harmful()}, path)


@pytest.mark.parametrize(
    ("form", "file", "damage", "said"),
    [
        ("modelopt", "00000001.pt", without("hidden_states"), "'hidden_states'"),
        ("modelopt", "00000001.pt", without("aux_hidden_states"), "'aux_hidden_states'"),
        ("modelopt", "00000001.pt", reshaped("hidden_states"), "last has shape [8, 32]"),
        ("modelopt", "00000001.pt", reshaped("loss_mask"), "loss_mask has shape [8]"),
        ("modelopt", "00000001.pt", truncated, "cannot be read"),
        ("modelopt", "00000001.pt", with_an_object, "cannot be read"),
        ("modelopt", "00000001.pt", lambda path: torch.save([1], path), "a list"),
        ("speculators-v1", "data_1.pt", without("hidden_states"), "NoneType"),
        ("speculators-v1", "data_1.pt", reshaped("hidden_states"), "shape [8, 32]"),
        ("speculators-v1", "data_1.pt", truncated, "cannot be read"),
        ("speculators-v1", "data_1.pt", with_an_object, "cannot be read"),
        ("speculators-v1", "data_1.pt", Path.unlink, "files are missing"),
        ("speculators-v1", "data_2.pt", Path.unlink, "files are missing"),
        ("speculators-v1", "data_config.json", Path.unlink, "data_config.json is missing"),
        ("speculators-v1", "data_config.json", lambda path: path.write_text("{}"), "version"),
        ("speculators", "hidden_states/hs_1.safetensors", truncated, "cannot be read"),
        ("speculators", "hidden_states/hs_1.safetensors", Path.unlink, "cannot be read"),
        ("speculators", "dataset_info.json", Path.unlink, "no dataset"),
    ],
)
def test_damaged_files_are_refused(
    run: Run, tmp_path: Path, base: Path, form: str, file: str, damage: Damage, said: str
) -> None:
    write_store(tmp_path / "own", last_is_normed=form == "modelopt")
    assert convert(run, tmp_path / "own", "mcore-spec", tmp_path / "theirs", form, "--base", base).code == 0
    damage(tmp_path / "theirs" / file)
    words = LAYERS if form != "speculators-v1" else []
    done = convert(run, tmp_path / "theirs", form, tmp_path / "back", "mcore-spec", "--base", base, *words)
    check_refused(done, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "theirs"]


def test_states_of_another_dataset_are_refused(run: Run, tmp_path: Path, base: Path) -> None:
    write_store(tmp_path / "own", last_is_normed=False)
    convert(run, tmp_path / "own", "mcore-spec", tmp_path / "theirs", "speculators")
    states = tmp_path / "theirs" / "hidden_states"
    (states / "hs_0.safetensors").replace(states / "hs_1.safetensors")
    done = convert(run, tmp_path / "theirs", "speculators", tmp_path / "out", "mcore-spec", "--base", base, *LAYERS)
    check_refused(done, "hs_")
