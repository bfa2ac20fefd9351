"""Hidden states to disk and back, as a user does it: what is equal to training beside the base, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_spec.checkpoint.store import find_checkpoint
from mcore_spec.data.hidden_states import StatesStore
from tests.e2e.conftest import (
    CHAT_VOCAB_SIZE,
    CONVERSATIONS,
    Run,
    attach_draft,
    check_refused,
    conversation,
    make_base,
    subprocess_environment,
    tree,
)
from tests.e2e.disk import PAGE, mounted_disk
from tests.e2e.interrupted import Length, check_interrupted, log_of, train_whole
from tests.forked import start_command

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
SEQ_LENGTH = 128
OPTIONS = ("--global-batch-size", 2, "--log-interval", 1, "--split", "5,1,0", "--lr", 1e-3)
# float32 on both sides, with documents in other rows of a matrix product.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def converted(base: Path) -> Path:
    return attach_draft(base, base.parent / "converted")


@pytest.fixture(scope="module")
def states(data: Path, converted: Path) -> Path:
    """What one process extracted, in float32."""
    directory = converted.parent / "states"
    command = [sys.executable, "examples/offline_feature_extract.py", *extraction(converted, data, directory)]
    done = subprocess.run(command, cwd=REPOSITORY, env=subprocess_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done: 6 of 6 conversations added" in done.stdout
    return directory


def extraction(load: Path, data: Path, output: Path, *more: object) -> list[str]:
    words = ["--load", load, "--data-path", data, "--output-dir", output, "--seq-length", SEQ_LENGTH]
    dtype = () if "--storage-dtype" in more else ("--storage-dtype", "fp32")
    return [str(word) for word in (*words, *dtype, *more)]


def training(load: Path, save: Path, *more: object) -> list[object]:
    return ["--load", load, "--save", save, "--train-iters", 4, *OPTIONS, *more]


def check_same_log(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=TOLERANCE), key


def test_training_from_a_store_is_training_beside_the_base(
    run: Run, base: Path, data: Path, converted: Path, states: Path, tmp_path: Path
) -> None:
    beside = ("--data-path", data, "--seq-length", SEQ_LENGTH)
    assert run("finetune", *training(converted, tmp_path / "online", *beside)).code == 0
    stored = ("--offline-distillation-data", states)
    done = run("finetune", *training(converted, tmp_path / "offline", *stored))
    assert done.code == 0, done.err
    assert "hidden states: 6 conversations" in done.out
    assert "waiting for data" in done.out
    check_same_log(log_of(tmp_path / "offline"), log_of(tmp_path / "online"))
    # The same on a checkpoint without the base's layers, whose draft is then served with the whole base. It starts
    # with random weights: there is no last layer of the base.
    attach = ("--pretrained-model-path", base, "--export-algorithm", "eagle")
    assert run("convert", *attach, "--save", tmp_path / "all", "--draft-init", "random").code == 0
    done = run("convert", *attach, "--save", tmp_path / "head", "--export-offline-model")
    assert done.code == 0, done.err
    assert "8 layers, none of them kept" in done.out
    assert not find_checkpoint(tmp_path / "head").record.base.has_layers
    for name in ("all", "head"):
        assert run("finetune", *training(tmp_path / name, tmp_path / f"save_{name}", *stored)).code == 0
        draft = ("--export-dir", tmp_path / f"draft_{name}", "--export-extra-modules")
        assert run("export", "--load", tmp_path / f"save_{name}", *draft).code == 0
    assert log_of(tmp_path / "save_head") == log_of(tmp_path / "save_all")
    one, two = (load_file(tmp_path / f"draft_{name}" / "model.safetensors") for name in ("head", "all"))
    assert one.keys() == two.keys()
    assert [name for name, weight in one.items() if not torch.equal(weight, two[name])] == []
    measured = ("--base", base, "--draft", tmp_path / "draft_head", "--prompts-path", data, "--osl", 8)
    done = run("validate", *measured, "--num-prompts", 2)
    assert done.code == 0, done.err


def test_a_base_without_layers_does_not_run(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    words = ("--pretrained-model-path", base, "--export-algorithm", "eagle", "--save", head, "--export-offline-model")
    assert run("convert", *words).code == 0
    says = "was made with --export-offline-model and has no layers"
    online = ("--data-path", data, "--seq-length", SEQ_LENGTH)
    check_refused(run("finetune", *training(head, tmp_path / "save", *online)), says, "--offline-distillation-data")
    check_refused(run("validate", "--load", head, "--prompts-path", data), says, "--base HF_DIRECTORY --draft")
    check_refused(run("extract", *extraction(head, data, tmp_path / "states")), says, "the whole base")
    quantized = ("--load", head, "--save", tmp_path / "fp8", "--export-quant-cfg", "int8_per_channel")
    check_refused(run("quantize", *quantized), says, "the whole base with the draft")
    check_refused(run("export", "--load", head, "--export-dir", tmp_path / "out"), says, "--export-extra-modules")
    again = ("--pretrained-model-path", base, "--export-algorithm", "eagle", "--save", tmp_path / "other")
    check_refused(run("convert", *again, "--export-offline-model", "--draft-init", "base"), "--draft-init base")
    assert {path.name for path in tmp_path.iterdir()} == {"head"}


def test_a_checkpoint_with_layers_is_kept_without_them(run: Run, base: Path, states: Path, tmp_path: Path) -> None:
    words = ("--pretrained-model-path", base, "--export-algorithm", "none", "--save", tmp_path / "plain")
    assert run("convert", *words).code == 0
    words = ("--load", tmp_path / "plain", "--export-algorithm", "eagle", "--save", tmp_path / "head")
    assert run("convert", *words, "--export-offline-model").code == 0
    done = run("finetune", *training(tmp_path / "head", tmp_path / "save", "--offline-distillation-data", states))
    assert done.code == 0, done.err


def test_a_killed_run_goes_on_bit_for_bit(run: Run, converted: Path, states: Path, tmp_path: Path) -> None:
    """In a checkpoint, between two, in the middle of what is read ahead: wherever it happens to be."""

    def words(save: Path) -> list[object]:
        return ["--load", converted, "--save", save, "--offline-distillation-data", states, *OPTIONS]

    length = Length(iterations=16, save_interval=4)
    whole = train_whole(words, length, tmp_path / "whole")
    moment = length.random_moment()
    check_interrupted(run, signal.SIGKILL, words, length, whole=whole, parts=tmp_path / "parts", num_entries=moment)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_smaller_dtypes_train_alike(
    dtype: str, run: Run, data: Path, converted: Path, states: Path, tmp_path: Path
) -> None:
    extracted = run("extract", *extraction(converted, data, tmp_path / "small", "--storage-dtype", dtype))
    assert extracted.code == 0, extracted.err
    small, whole = StatesStore(tmp_path / "small", verify=True), StatesStore(states)
    # An id, a mask and four states of 32 numbers; a scale for each state in eight bits.
    per_token = {"bf16": 5 + 4 * 32 * 2, "fp8": 5 + 4 * (32 + 4)}[dtype]
    assert f"{per_token} bytes a token" in extracted.out
    assert small.num_bytes == pytest.approx(per_token * int(small.lengths.sum()), abs=2000)
    for index in range(len(small)):
        cosine = torch.nn.functional.cosine_similarity(small.states(index).aux.float(), whole.states(index).aux, dim=-1)
        assert float(cosine.min()) > {"bf16": 0.99999, "fp8": 0.999}[dtype]
    for name, store in (("small", tmp_path / "small"), ("whole", states)):
        words = ("--offline-distillation-data", store)
        assert run("finetune", *training(converted, tmp_path / f"save_{name}", *words)).code == 0
    for ours, theirs in zip(log_of(tmp_path / "save_small"), log_of(tmp_path / "save_whole"), strict=True):
        key = "loss" if "loss" in ours else "validation_loss"
        assert ours[key] == pytest.approx(theirs[key], rel=0.02)


def test_what_no_loss_reads_is_left_out_on_request(
    run: Run, data: Path, converted: Path, states: Path, tmp_path: Path
) -> None:
    assert run("extract", *extraction(converted, data, tmp_path / "trimmed", "--drop-tail")).code == 0
    trimmed, whole = StatesStore(tmp_path / "trimmed", verify=True), StatesStore(states)
    # The template ends with a line break behind the answer.
    assert (whole.lengths - trimmed.lengths).tolist() == [1] * 6
    for index in range(6):
        assert bool(trimmed.document(index).mask[-1])
    for name, store in (("trimmed", tmp_path / "trimmed"), ("whole", states)):
        words = ("--offline-distillation-data", store, "--no-packing")
        assert run("finetune", *training(converted, tmp_path / f"save_{name}", *words)).code == 0
    found, expected = log_of(tmp_path / "save_trimmed"), log_of(tmp_path / "save_whole")
    for ours, theirs in zip(found, expected, strict=True):
        key = "loss" if "loss" in ours else "validation_loss"
        assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_extraction_that_was_stopped_goes_on(
    how: signal.Signals, run: Run, data: Path, converted: Path, states: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many.jsonl"
    turns = [(f"{question} {number}", answer) for number in range(40) for question, answer in CONVERSATIONS]
    many.write_text("".join(json.dumps(conversation(*each)) + "\n" for each in turns))
    words = extraction(converted, many, tmp_path / "states", "--max-shard-bytes", 60000)
    process = start_command("extract", words, tmp_path / "said.txt")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and len(list((tmp_path / "states").glob("shard-*"))) < 3:
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, how)
    process.join(200)
    expected = -signal.SIGKILL if how is signal.SIGKILL else 0
    assert process.exitcode == expected, (tmp_path / "said.txt").read_text()
    with pytest.raises(Exception, match="was not finished"):
        StatesStore(tmp_path / "states")
    done = run("extract", *words)
    assert done.code == 0, done.err
    assert "were there" in done.out
    store = StatesStore(tmp_path / "states", verify=True)
    assert len(store) == len(turns)
    assert run("extract", *extraction(converted, many, tmp_path / "again")).code == 0
    for index in range(len(turns)):
        for ours, theirs in zip(store.states(index), StatesStore(tmp_path / "again").states(index), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_full_disk(run: Run, data: Path, converted: Path, tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("mounting a tmpfs is not permitted here")
        words = extraction(converted, data, tmp_path / "disk" / "states", "--max-shard-bytes", 20000)
        words += ["--data-cache-path", str(tmp_path / "cache")]
        messages, room = [], 1
        disk.set_limit("size", disk.used("size") + room)
        while (done := run("extract", *words)).code:
            check_refused(done, "No space left on device", "free space or choose another --output-dir")
            messages.append(done.err)
            room += 8
            disk.set_limit("size", room)
        assert len(messages) >= 2
        store = StatesStore(tmp_path / "disk" / "states", verify=True)
        assert store.num_bytes > 20 * PAGE
        assert {path.name[:6] for path in store.directory.iterdir()} == {"shard-", "manife"}


def test_a_size_that_is_too_large_is_refused_before_anything_is_written(
    run: Run, data: Path, converted: Path, tmp_path: Path
) -> None:
    whole = run("extract", *extraction(converted, data, tmp_path / "states", "--max-bytes", 30000))
    check_refused(whole, "--max-bytes is 30,000", "--num-samples 1 fits", "fp8")
    assert "517 bytes a token" in whole.out
    assert not (tmp_path / "states").exists()
    done = run("extract", *extraction(converted, data, tmp_path / "states", "--max-bytes", 30000, "--num-samples", 1))
    assert done.code == 0, done.err
    assert len(StatesStore(tmp_path / "states")) == 1


def test_a_store_that_does_not_fit(
    run: Run, base: Path, data: Path, converted: Path, states: Path, tmp_path: Path
) -> None:
    def refused(load: Path, store: Path, *says: object, more: tuple[object, ...] = ()) -> None:
        words = training(load, tmp_path / "save", "--offline-distillation-data", store, *more)
        check_refused(run("finetune", *words), *says)
        assert not (tmp_path / "save").exists()

    make_base(tmp_path / "other", seed=1, vocab_size=CHAT_VOCAB_SIZE)
    for path in base.glob("*token*"):
        shutil.copy(path, tmp_path / "other" / path.name)
    shutil.copy(base / "chat_template.jinja", tmp_path / "other" / "chat_template.jinja")
    other = attach_draft(tmp_path / "other", tmp_path / "other_converted")
    here, there = (find_checkpoint(path).record.identity.fingerprint for path in (other, converted))
    refused(other, states, "another base", here, there)
    assert run("extract", *extraction(converted, data, tmp_path / "two", "--aux-layer-ids", 1)).code == 0
    refused(converted, tmp_path / "two", "has aux layers [1], the draft reads [1, 3, 4]")
    refused(converted, states, "--seq-length 64", "extracted with 128", more=("--seq-length", 64))
    refused(converted, tmp_path / "nothing", "has no manifest.json", "mcore-spec extract")
    refused(converted, states, "both are given", more=("--data-path", data))
    template = tmp_path / "template"
    shutil.copytree(converted / "iter_0000001" / "tokenizer", template)
    path = template / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))
    refused(converted, states, "another tokenizer or chat template", template, more=("--tokenizer-model", template))
    damaged = tmp_path / "damaged"
    shutil.copytree(states, damaged)
    shard = next(damaged.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(converted, damaged, shard.name, "delete that file and extract with the same command")


def test_an_extraction_is_not_continued_with_other_settings(
    run: Run, data: Path, converted: Path, states: Path, tmp_path: Path
) -> None:
    shutil.copytree(states, tmp_path / "states")
    before = tree(tmp_path / "states")
    done = run("extract", *extraction(converted, data, tmp_path / "states", "--num-samples", 3))
    check_refused(done, "was begun with conversation_fingerprint = ")
    done = run("extract", *extraction(converted, data, tmp_path / "states", "--storage-dtype", "bf16"))
    check_refused(done, "was begun with dtype = 'float32', now it is 'bfloat16'")
    done = run("extract", *extraction(converted, data, tmp_path / "states"))
    assert "done: 0 of 6 conversations added, 6 were there" in done.out
    assert tree(tmp_path / "states") == before
    done = run("extract", *extraction(converted, data, tmp_path / "none", "--num-samples", 0))
    check_refused(done, "--num-samples = '0'")
    assert not (tmp_path / "none").exists()
