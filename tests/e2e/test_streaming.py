"""Training while other ranks run the base, as a user starts it: equal to training beside the base, and what ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcore_spec.checkpoint.store import find_checkpoint
from tests.e2e.conftest import Run, attach_draft, check_refused, subprocess_environment
from tests.e2e.interrupted import log_of
from tests.parallel.stream_cases import free_port
from tests.pool import RankPool

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
NUM_ITERATIONS, SAVE_INTERVAL = 8, 2
# float32 on both sides, with documents in other rows of a matrix product.
TOLERANCE = 1e-4
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def converted(base: Path) -> Path:
    return attach_draft(base, base.parent / "converted")


def training(load: Path, data: Path, save: Path, *more: object) -> list[str]:
    options = ["--seq-length", 128, "--global-batch-size", 2, "--log-interval", 1, "--split", "5,1,0", "--lr", 1e-3]
    options += ["--train-iters", NUM_ITERATIONS, "--save-interval", SAVE_INTERVAL, "--eval-interval", 3]
    return [str(word) for word in ("--load", load, "--save", save, "--data-path", data, *options, *more)]


def streamed(rank_pool: RankPool, words: list[str], scratch: Path) -> list[tuple[int, str]]:
    """Code and output of a rank that trains and of one that runs the base."""
    case = "tests.parallel.stream_cases:command"
    return rank_pool.run(case, world_size=2, words=words, port=free_port(), scratch=scratch)


def start_both(words: list[str]) -> list[subprocess.Popen[str]]:
    """The two ranks as processes that nobody watches over: what ends is theirs to find out."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "examples/finetune.py", *words],
            cwd=REPOSITORY,
            env={**subprocess_environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for_entries(save: Path, number: int) -> None:
    log, deadline = save / "train_log.jsonl", time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= number):
        time.sleep(0.01)


def test_streamed_training_is_training_beside_the_base_and_survives_a_lost_rank(
    rank_pool: RankPool, run: Run, data: Path, converted: Path, tmp_path: Path
) -> None:
    (code, said), (other_code, other_said) = streamed(
        rank_pool, training(converted, data, tmp_path / "whole", "--extract-ranks", 1), tmp_path
    )
    assert (code, other_code) == (0, 0), said + other_said
    assert f"done: iteration {NUM_ITERATIONS} of {NUM_ITERATIONS}" in said
    assert "waiting for data" in said
    assert other_said == "", "one rank speaks"
    assert not find_checkpoint(tmp_path / "whole").record.base.has_layers
    done = run("finetune", *training(converted, data, tmp_path / "online"))
    assert done.code == 0, done.err
    found, expected = log_of(tmp_path / "whole"), log_of(tmp_path / "online")
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=TOLERANCE), key

    words = training(converted, data, tmp_path / "parts", "--extract-ranks", 1)
    trainer, extractor = start_both(words)
    wait_for_entries(tmp_path / "parts", SAVE_INTERVAL + 1)
    extractor.kill()
    said, _ = trainer.communicate(timeout=TIMEOUT_S)
    extractor.communicate(timeout=TIMEOUT_S)
    assert trainer.returncode == 2, said
    assert "error: extraction rank 1 has ended" in said
    assert "give the same command" in said
    assert "Traceback" not in said
    stopped = find_checkpoint(tmp_path / "parts").iteration
    assert 0 < stopped < NUM_ITERATIONS
    (code, said), (other_code, other_said) = streamed(rank_pool, words, tmp_path)
    assert (code, other_code) == (0, 0), said + other_said
    assert "resumed" in said
    assert log_of(tmp_path / "parts") == found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_extraction_ends_with_the_training(how: signal.Signals, data: Path, converted: Path, tmp_path: Path) -> None:
    trainer, extractor = start_both(training(converted, data, tmp_path / "save", "--extract-ranks", 1))
    wait_for_entries(tmp_path / "save", 1)
    if how is signal.SIGTERM:
        # A job that is ended tells every rank; the base runs on until the training has saved.
        extractor.send_signal(how)
    trainer.send_signal(how)
    said, _ = trainer.communicate(timeout=TIMEOUT_S)
    other_said, _ = extractor.communicate(timeout=TIMEOUT_S)
    if how is signal.SIGKILL:
        assert extractor.returncode == 2, other_said
        assert "[rank 1] error: training rank 0 has ended" in other_said
    else:
        assert (trainer.returncode, extractor.returncode) == (0, 0), said + other_said
        assert "stopped, give the same command to go on" in said


def test_what_a_streamed_run_is_refused_for(
    rank_pool: RankPool,
    run: Run,
    base: Path,
    data: Path,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*says: str, more: tuple[object, ...]) -> None:
        check_refused(run("finetune", *training(converted, data, tmp_path / "save", *more)), *says)

    refused("extract_ranks = 1 of world size 1", "start 2 processes", more=("--extract-ranks", 1))
    refused("--stream-depth", "--extract-ranks", more=("--stream-depth", 2))
    refused("--dry-run", "--extract-ranks 1", more=("--extract-ranks", 1, "--dry-run"))
    interval = ("--extract-ranks", 1, "--eval-acceptance-interval", 2)
    refused("--eval-acceptance-interval", "validate --base", more=interval)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    layout = ("--tensor-model-parallel-size", 2)
    refused("leaves 3 training ranks", "sizes of 2 x 1 x 1", "start 3", more=("--extract-ranks", 1, *layout))
    refused("extract_ranks = 4 of world size 4", "start 6 processes", more=("--extract-ranks", 4, *layout))
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")

    head = ("--pretrained-model-path", base, "--export-algorithm", "eagle", "--save", tmp_path / "head")
    assert run("convert", *head, "--export-offline-model").code == 0
    words = training(tmp_path / "head", data, tmp_path / "save", "--extract-ranks", 1)
    (code, said), (other_code, other_said) = streamed(rank_pool, words, tmp_path)
    assert (code, other_code) == (2, 2), said + other_said
    assert "has no layers: give the checkpoint of the whole base" in said
    assert "training rank 0 ended with an error" in other_said
    assert not (tmp_path / "save" / "train_log.jsonl").exists()
