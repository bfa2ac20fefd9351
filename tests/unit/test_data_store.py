"""The token store: what is in it, what is left out, when it is made again, and what a killed build leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mcore_spec.data import store as store_module
from mcore_spec.data.chat import ChatEncoder, encode_conversation
from mcore_spec.data.conversations import Message
from mcore_spec.data.store import StoreCounts, TokenStore, build_token_store
from mcore_spec.data.store_files import FORMAT_VERSION, StoreWriter
from mcore_spec.errors import ConfigError
from tests.pool import RankPool
from tests.unit.data_cases import CHATML, LLAMA3, byte_tokenizer, talk, write_lines

CONVERSATIONS = [talk("a", "b"), talk("c", "d" * 40, system="s"), talk("e", "é", "f", "g"), talk("h" * 60, "i")]
FILES = ("manifest.json", "mask.bin", "offsets.bin", "tokens.bin")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "x.jsonl", [{"messages": each} for each in CONVERSATIONS])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(CHATML)


def build(data: Path, tokenizer: Any, *, seq_length: int = 500, **options: Any) -> TokenStore:
    return build_token_store([data], tokenizer, cache_dir=data.parent / "cache", seq_length=seq_length, **options)


def cached(data: Path) -> list[str]:
    return sorted(path.name for path in (data.parent / "cache").iterdir())


def contents(store: TokenStore) -> list[tuple[list[int], list[bool]]]:
    return [(each.token_ids.tolist(), each.mask.tolist()) for each in map(store.document, range(len(store)))]


def expected(tokenizer: PreTrainedTokenizerFast, conversations: list[list[Message]]) -> list[Any]:
    return [tuple(encode_conversation(tokenizer, each)) for each in conversations]


def test_documents_are_what_the_tokenizer_makes(
    data: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_CONVERSATIONS_AT_ONCE", 3)
    store = build(data, tokenizer)
    encoded = expected(tokenizer, CONVERSATIONS)
    assert contents(store) == encoded
    assert store.document(0).token_ids.dtype == np.int64
    assert store.document(0).mask.dtype == np.bool_
    assert store.lengths.dtype == np.int64
    assert store.lengths.tolist() == [len(token_ids) for token_ids, _ in encoded]
    num_tokens = sum(len(token_ids) for token_ids, _ in encoded)
    # Content bytes and one end of turn each; é is two bytes.
    assert store.counts == StoreCounts(documents=4, tokens=num_tokens, masked_tokens=2 + 41 + 3 + 2 + 2)
    directory = data.parent / "cache" / store.fingerprint
    assert sorted(path.name for path in directory.iterdir()) == list(FILES)
    assert (directory / "tokens.bin").stat().st_size == 4 * num_tokens
    assert json.loads((directory / "manifest.json").read_text())["sources"] == [str(data)]
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"document {index} of 4"):
            store.document(index)


def test_a_second_build_only_opens(
    data: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(data, tokenizer)
    times = {path: path.stat().st_mtime_ns for path in (data.parent / "cache" / first.fingerprint).iterdir()}

    def refuse(*_arguments: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(ChatEncoder, "tokenize", refuse)
    # The same contents under another name, and the tokenizer read from its files, are the same store.
    tokenizer.save_pretrained(data.parent / "tokenizer")
    renamed = data.rename(data.with_name("y.jsonl"))
    second = build(renamed, data.parent / "tokenizer")
    assert contents(second) == contents(first)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert cached(data) == [first.fingerprint]


def test_whatever_changes_the_tokens_makes_another_store(data: Path) -> None:
    fingerprints = [build(data, byte_tokenizer(CHATML)).fingerprint]
    assert build(data, byte_tokenizer(CHATML)).fingerprint == fingerprints[0]
    template = CHATML.replace("<|im_end|>", "<|end|>")
    fingerprints.append(build(data, byte_tokenizer(template)).fingerprint)
    fingerprints.append(build(data, byte_tokenizer(CHATML, merges=(("d", "d"),))).fingerprint)
    fingerprints.append(build(data, byte_tokenizer(CHATML), seq_length=499).fingerprint)
    fingerprints.append(build(data, byte_tokenizer(CHATML), on_bad_line="skip").fingerprint)
    write_lines(data, [{"messages": each} for each in CONVERSATIONS[:3]])
    fingerprints.append(build(data, byte_tokenizer(CHATML)).fingerprint)
    assert len(set(fingerprints)) == 6
    assert cached(data) == sorted(fingerprints)
    store = build(data, byte_tokenizer(CHATML, merges=(("d", "d"),)))
    assert store.counts.masked_tokens == 2 + 21 + 3 + 2


def test_long_documents_lose_their_end(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    # Of the last conversation nothing is left that the model produces: its question alone is longer.
    encoded = expected(tokenizer, CONVERSATIONS)
    limit = 40
    kept = [(token_ids[:limit], mask[:limit]) for token_ids, mask in encoded[:3]]
    assert [len(token_ids) for token_ids, _ in encoded] == [23, 73, 47, 82]
    store = build(data, tokenizer, seq_length=limit)
    assert contents(store) == kept
    assert store.seq_length == limit
    counts = store.counts
    assert (counts.documents, counts.truncated, counts.empty, counts.tokens) == (3, 2, 1, 23 + 40 + 40)
    assert counts.masked_tokens == 2 + 9 + 3


def test_nothing_to_learn_anywhere(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError) as caught:
        build(data, tokenizer, seq_length=8)
    assert str(caught.value) == (
        f"data_path = {data}: within seq_length = 8 no conversation has a token that the model must produce (4 "
        "without, 0 skipped); raise seq_length, or check the chat template, which makes of the first one: "
        r"'<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n'"
    )
    assert cached(data) == []
    write_lines(data, [{"messages": talk("long " * 200, "b")}])
    with pytest.raises(ConfigError) as caught:
        build(data, tokenizer, seq_length=8)
    shown = str(caught.value).partition("first one: ")[2]
    assert shown.startswith(r"'<|im_start|>user\nlong long")
    assert " ... " in shown
    assert shown.endswith(r"<|im_start|>assistant\nb<|im_end|>\n'")
    assert len(shown) < 420


def test_bad_entries_are_skipped_and_counted(data: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system please') }}{% endif %}" + CHATML
    tokenizer = byte_tokenizer(template)
    with data.open("a") as file:
        file.write("{\n")
    with pytest.raises(ConfigError) as caught:
        build(data, tokenizer)
    problem = "the chat template refuses this conversation (no system please); change it, or give another template"
    assert str(caught.value) == (f"{data}:2: {problem}; correct it, or leave such lines out with on_bad_line = skip")
    assert cached(data) == []
    store = build(data, tokenizer, on_bad_line="skip")
    assert contents(store) == expected(tokenizer, [CONVERSATIONS[index] for index in (0, 2, 3)])
    assert (store.counts.documents, store.counts.skipped) == (3, 2)
    assert len(store.counts.skip_reasons) == 2
    assert f"{data}:2: {problem}" in store.counts.skip_reasons
    assert TokenStore(data.parent / "cache" / store.fingerprint).counts == store.counts
    write_lines(data, [{"messages": CONVERSATIONS[1]}, {}])
    with pytest.raises(ConfigError) as caught:
        build(data, tokenizer, on_bad_line="skip")
    assert str(caught.value).startswith(
        f"data_path = {data}: every entry is bad (2 skipped); correct them. The first: "
    )


def test_a_tokenizer_of_another_base(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build(data, tokenizer, vocab_size=len(tokenizer))
    with pytest.raises(ConfigError, match=rf"the base's vocabulary has {len(tokenizer) - 1} entries"):
        build(data, tokenizer, vocab_size=len(tokenizer) - 1)


def kill_in_the_middle(data: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build in a child process that is killed while it writes its third document."""
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.tokenize([encoder.render(each) for each in CONVERSATIONS])
    append = StoreWriter.append

    def append_or_die(writer: StoreWriter, *arguments: Any) -> None:
        if writer.num_documents == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        append(writer, *arguments)

    child = os.fork()
    if child == 0:
        # The tokenizer's threads do not live on in a child; its result is there already.
        monkeypatch.setattr(ChatEncoder, "tokenize", lambda *_arguments: encoded)
        monkeypatch.setattr(StoreWriter, "append", append_or_die)
        try:
            build(data, tokenizer)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_build_leaves_nothing_that_is_read(
    data: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_in_the_middle(data, tokenizer, monkeypatch)
    (left,) = cached(data)
    assert left.startswith(".partial-")
    partial = data.parent / "cache" / left
    assert "manifest.json" not in {path.name for path in partial.iterdir()}
    store = build(data, tokenizer)
    assert contents(store) == expected(tokenizer, CONVERSATIONS)
    # It might have been another builder's: it stays until it has not been written to for a day.
    assert cached(data) == [left, store.fingerprint]
    yesterday = time.time() - 25 * 3600
    for path in (*partial.iterdir(), partial):
        os.utime(path, (yesterday, yesterday))
    shutil.rmtree(data.parent / "cache" / store.fingerprint)
    build(data, tokenizer)
    assert cached(data) == [store.fingerprint]


def test_an_error_leaves_nothing(
    data: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", full)
        with pytest.raises(ConfigError) as caught:
            build(data, tokenizer)
    cache = data.parent / "cache"
    assert str(caught.value) == (
        f"data_cache_path = {cache} cannot be written (No space left on device); make room, or give another directory"
    )
    assert cached(data) == []
    cache.rmdir()
    cache.write_text("in the way")
    with pytest.raises(ConfigError, match=rf"data_cache_path = {cache} cannot be written \(File exists\)"):
        build(data, tokenizer)


def test_two_builders_at_once(data: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, stores = StoreWriter.finish, []

    def finish_second(writer: StoreWriter, **arguments: Any) -> None:
        if not stores:
            stores.append(None)
            stores.append(build(data, tokenizer))  # the other one, from beginning to end
        finish(writer, **arguments)

    monkeypatch.setattr(StoreWriter, "finish", finish_second)
    store = build(data, tokenizer)
    assert contents(store) == contents(stores[1]) == expected(tokenizer, CONVERSATIONS)
    assert cached(data) == [store.fingerprint]


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_store_is_named(file: str, data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    directory = data.parent / "cache" / build(data, tokenizer).fingerprint
    path = directory / file
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", None):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(ConfigError) as caught:
            build(data, tokenizer)
        assert str(caught.value).startswith(f"data_cache_path: the token store {directory} is damaged (")
        assert str(caught.value).endswith("delete that directory to have it made again")
    path.write_bytes(whole)
    assert len(build(data, tokenizer)) == 4


def test_a_store_of_another_format(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    directory = data.parent / "cache" / build(data, tokenizer).fingerprint
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(ConfigError, match=rf"is damaged \(format 0, not {FORMAT_VERSION}\)"):
        TokenStore(directory)
    with pytest.raises(ConfigError, match=r"is not there on this rank; give a directory on a file system that all"):
        TokenStore(directory.with_name("nowhere"))


def test_rank_zero_builds_and_all_open(data: Path, rank_pool: RankPool) -> None:
    byte_tokenizer(LLAMA3).save_pretrained(data.parent / "tokenizer")
    results = rank_pool.run(
        "tests.unit.data_cases:build_on_every_rank",
        world_size=2,
        data=data,
        tokenizer=data.parent / "tokenizer",
        cache_dir=data.parent / "cache",
    )
    assert [result["tokenised"] for result in results] == [4, 0]
    assert results[0]["documents"] == results[1]["documents"] == expected(byte_tokenizer(LLAMA3), CONVERSATIONS)
    for result in results:
        assert "within seq_length = 8 no conversation has a token" in result["error"]
