"""Training as a user runs it: the commands one after the other, interruptions, and what users get wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_spec.checkpoint.store import TRACKER, find_checkpoint
from tests.e2e.conftest import Run, attach_draft, check_refused, conversation, subprocess_environment, tree
from tests.e2e.interrupted import Length, check_interrupted, log_of, train_whole
from tests.pool import RankPool

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def converted(base: Path) -> Path:
    """The base with a draft."""
    return attach_draft(base, base.parent / "converted")


def words(converted: Path, data: Path, save: Path, *more: object) -> list[object]:
    options = ["--seq-length", 64, "--global-batch-size", 2, "--log-interval", 1, "--split", "5,1,0"]
    options += ["--lr", 1e-3, "--lr-scaling", "none"]
    return ["--load", converted, "--save", save, "--data-path", data, *options, *more]


def test_from_conversations_to_an_exported_draft(
    run: Run, base: Path, data: Path, converted: Path, tmp_path: Path
) -> None:
    save = tmp_path / "trained"
    done = run("finetune", *words(converted, data, save, "--train-iters", 3))
    assert done.code == 0, done.err
    assert "data: 6 conversations" in done.out
    assert "done: iteration 3 of 3, 6 samples" in done.out
    entries = log_of(save)
    assert [entry["iteration"] for entry in entries] == [1, 2, 3, 3]
    assert {
        "iteration",
        "consumed_samples",
        "consumed_tokens",
        "loss",
        "accuracy",
        "simulated_acceptance_length",
        "grad_norm",
        "learning_rate",
    } <= entries[0].keys()
    assert entries[0]["learning_rate"] == 1e-3
    assert {"validation_loss", "validation_accuracy"} <= entries[3].keys()
    # Given again, there is nothing left to do; with more iterations, the run goes on.
    again = run("finetune", *words(converted, data, save, "--train-iters", 3))
    assert (again.code, "nothing to do" in again.out) == (0, True)
    assert log_of(save) == entries
    for name, load in (("before", converted), ("after", save)):
        assert run("export", "--load", load, "--export-dir", tmp_path / name, "--export-extra-modules").code == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    # The head is the base's, frozen, and everything else has learnt.
    assert [name for name in before if torch.equal(before[name], after[name])] == ["lm_head.weight"]
    # The base is what it was, bit for bit.
    assert run("export", "--load", save, "--export-dir", tmp_path / "whole").code == 0
    original, exported = (load_file(path / "model.safetensors") for path in (base, tmp_path / "whole"))
    assert all(torch.equal(original[name], exported[name]) for name in original)


def test_an_untrained_draft_starts_from_data_a_trained_one_goes_on(
    run: Run, data: Path, converted: Path, tmp_path: Path
) -> None:
    said = "the draft starts as the least-squares solution of 2 global batches"

    def trained(load: Path, name: str, *more: object) -> tuple[bool, float]:
        words_ = words(load, data, tmp_path / name, "--train-iters", 2, *more)
        done = run("finetune", *words_)
        assert done.code == 0, done.err
        return said in done.out, float(log_of(tmp_path / name)[0]["loss"])

    is_said, fitted = trained(converted, "fitted")
    assert is_said
    assert trained(converted, "asked for", "--fit-start", 2) == (True, fitted)
    is_said, as_converted = trained(converted, "as converted", "--fit-start", 0)
    assert not is_said
    assert fitted < as_converted
    # Behind the first run its weights are kept, and the rates that belong to its start.
    is_said, _ = trained(tmp_path / "fitted", "again")
    assert not is_said
    first, again = (find_checkpoint(tmp_path / name).record.training for name in ("fitted", "again"))
    assert first is not None
    assert again is not None
    assert again["rates"] == first["rates"]
    assert set(first["rates"].values()) != {1.0}


def check_one_log(two: Path, one: Path, *, tolerance: float) -> None:
    """What two ranks wrote is what one process wrote."""
    found, expected = log_of(two), log_of(one)
    assert [entry["consumed_tokens"] for entry in found if "loss" in entry] == [
        entry["consumed_tokens"] for entry in expected if "loss" in entry
    ]
    for ours, theirs in zip(found, expected, strict=True):
        key = "loss" if "loss" in ours else "validation_loss"
        assert ours[key] == pytest.approx(theirs[key], rel=tolerance)


def test_two_ranks_under_torchrun_write_one_log(run: Run, data: Path, converted: Path, tmp_path: Path) -> None:
    """Tensor and sequence parallel, beside one process."""
    both = ("--train-iters", 2, "--seed", 7)
    alone = run("finetune", *words(converted, data, tmp_path / "one", *both))
    assert alone.code == 0, alone.err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "examples/finetune.py"]
    layout = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
    command = [*torchrun, *words(converted, data, tmp_path / "two", *both, *layout)]
    done = subprocess.run(
        [str(word) for word in command], cwd=REPOSITORY, env=subprocess_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: iteration 2 of 2") == 1, "rank 0 speaks"
    # Sums in another order, in float32: five digits of 7.
    check_one_log(tmp_path / "two", tmp_path / "one", tolerance=1e-4)


def test_two_data_parallel_ranks_in_bfloat16_write_one_log(
    run: Run, rank_pool: RankPool, data: Path, converted: Path, tmp_path: Path
) -> None:
    both = ("--train-iters", 2, "--seed", 7, "--bf16")
    alone = run("finetune", *words(converted, data, tmp_path / "one", *both))
    assert alone.code == 0, alone.err
    given = [str(word) for word in words(converted, data, tmp_path / "two", *both)]
    outcomes = rank_pool.run("tests.e2e.rank_cases:outcome", world_size=2, command="finetune", words=given)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    # Sums in another order, with bfloat16 products: three digits of 3.
    check_one_log(tmp_path / "two", tmp_path / "one", tolerance=2e-2)


def test_a_draft_vocabulary_is_counted_and_trained(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    vocabulary = ("--pretrained-model-path", base, "--data-path", data, "--output-dir", tmp_path / "vocab")
    done = run("draft-vocab", *vocabulary, "--draft-vocab-size", 100)
    assert done.code == 0, done.err
    assert "100 of 49,152 tokens cover 100.00%" in done.out
    d2t, t2d = (torch.load(tmp_path / "vocab" / name) for name in ("d2t.pt", "t2d.pt"))
    assert torch.equal(torch.arange(100) + d2t, t2d.nonzero()[:, 0])
    draft = ("--export-algorithm", "eagle", "--draft-vocab-cache", tmp_path / "vocab" / "d2t.pt")
    assert run("convert", "--pretrained-model-path", base, *draft, "--save", tmp_path / "converted").code == 0
    done = run("finetune", *words(tmp_path / "converted", data, tmp_path / "trained", "--num-epochs", 1))
    assert done.code == 0, done.err
    assert len(log_of(tmp_path / "trained")) >= 1
    refused = run("draft-vocab", *vocabulary, "--draft-vocab-size", 60000)
    check_refused(refused, "--draft-vocab-size 60000", "49152")


# Many enough that the last is far when a signal comes behind the seventh.
LENGTH = Length(iterations=30, save_interval=5)


@pytest.fixture(scope="module")
def never_stopped(data: Path, converted: Path) -> Path:
    """A run from its beginning to its end."""
    return train_whole(partial(words, converted, data), LENGTH, converted.parent / "never_stopped")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_bit_for_bit(
    how: signal.Signals, run: Run, data: Path, converted: Path, never_stopped: Path, tmp_path: Path
) -> None:
    command = partial(words, converted, data)
    check_interrupted(run, how, command, LENGTH, whole=never_stopped, parts=tmp_path / "parts", num_entries=7)


def _bad_line(text: str, directory: Path) -> Path:
    path = directory / "bad.jsonl"
    path.write_text(json.dumps(conversation("Hello?", "Hello.")) + "\n" + text)
    return path


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--train-iters", 3, "--num-epochs", 1), ("--train-iters and --num-epochs",)),
        ((), ("--train-iters, --train-samples, --num-epochs", "none is given")),
        (("--train-iters", 1, "--global-batch-size", 3, "--micro-batch-size", 2), ("--global-batch-size 3", "2")),
        (("--train-iters", 1, "--seq-length", 512), ("--seq-length 512", "256 positions")),
        (("--num-epochs", 1, "--global-batch-size", 64), ("global_batch_size = 64", "give more data or epochs")),
        (("--train-iters", 1, "--tokenizer-model", "nowhere"), ("tokenizer_model = nowhere",)),
        (("--train-iters", 1, "--logger", "tensorbored"), ("tensorbored", "tensorboard, wandb, trackio")),
        (
            ("--train-iters", 1, "--pipeline-model-parallel-size", 2),
            ("world size 1", "pipeline_model_parallel_size = 2"),
        ),
        (("--train-iters", 1, "--context-parallel-size", 2), ("world size 1", "context_parallel_size = 2")),
    ],
)
def test_what_a_run_is_refused_for(
    options: tuple[object, ...], says: tuple[str, ...], run: Run, data: Path, converted: Path, tmp_path: Path
) -> None:
    given = words(converted, data, tmp_path / "trained")
    # A flag may be given once.
    for flag in options[::2]:
        if flag in given:
            index = given.index(flag)
            del given[index : index + 2]
    check_refused(run("finetune", *given, *options), *says)
    assert not (tmp_path / "trained" / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ("empty",)),
        ("{not json\n", ("bad.jsonl:2", "JSON")),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n',
            ("bad.jsonl:2", "user"),
        ),
    ],
)
def test_data_that_cannot_be_read(text: str, says: tuple[str, ...], run: Run, converted: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    if text:
        _bad_line(text, tmp_path)
    else:
        path.write_text("")
    check_refused(run("finetune", *words(converted, path, tmp_path / "trained", "--train-iters", 1)), *says)


def test_bad_lines_are_left_out_on_request(run: Run, data: Path, converted: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(data.read_text() + "{not json\n")
    more = ("--train-iters", 1, "--on-bad-line", "skip")
    done = run("finetune", *words(converted, path, tmp_path / "trained", *more))
    assert done.code == 0, done.err
    assert "1 unreadable left out" in done.out
    assert "mixed.jsonl:7" in done.out


def test_a_tokenizer_of_another_base(run: Run, base: Path, data: Path, converted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(converted / "iter_0000001" / "tokenizer", other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    # Two tokens have changed places; the number of ids is the same.
    vocabulary["Ġthe"], vocabulary["Ġand"] = vocabulary["Ġand"], vocabulary["Ġthe"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    done = run("finetune", *words(converted, data, tmp_path / "save", "--train-iters", 1, "--tokenizer-model", other))
    check_refused(done, f"--tokenizer-model {other} is not the base's tokenizer: the id of", "in the base's own")
    assert not (tmp_path / "save").exists()


def test_a_checkpoint_without_a_draft(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    plain = ("--pretrained-model-path", base, "--export-algorithm", "none", "--save", tmp_path / "plain")
    assert run("convert", *plain).code == 0
    done = run("finetune", *words(tmp_path / "plain", data, tmp_path / "trained", "--train-iters", 1))
    check_refused(done, "has no draft")


def test_weights_that_are_no_numbers(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    eagle = ("--pretrained-model-path", damaged, "--export-algorithm", "eagle", "--save", tmp_path / "converted")
    assert run("convert", *eagle).code == 0
    done = run("finetune", *words(tmp_path / "converted", data, tmp_path / "trained", "--train-iters", 1))
    check_refused(done, "decoder.layers.3.mlp.linear_fc1.weight", "NaN")


def test_a_save_that_was_killed_before_it_was_announced_is_announced(
    run: Run, data: Path, converted: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    assert run("finetune", *words(converted, data, save, "--train-iters", 2, "--save-interval", 1)).code == 0
    # What a kill leaves between giving the iteration its name and the announcement.
    (save / TRACKER).rename(save / "iter_0000002" / TRACKER)
    (save / TRACKER).write_text("1")
    done = run("finetune", *words(converted, data, save, "--train-iters", 3, "--save-interval", 1))
    assert done.code == 0, done.err
    assert f"resumed {save / 'iter_0000002'}" in done.out
    assert (save / TRACKER).read_text() == "3"


@pytest.mark.parametrize("again", [(), ("--ckpt-step", 1)], ids=["of a conversion", "of a run"])
def test_a_run_that_begins_anew_needs_a_directory_of_its_own(
    again: tuple[object, ...], run: Run, data: Path, converted: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    if again:
        assert run("finetune", *words(converted, data, save, "--train-iters", 1)).code == 0
    else:
        shutil.copytree(converted, save)
    before = tree(save)
    done = run("finetune", *words(converted, data, save, "--train-iters", 2, *again))
    check_refused(done, "save = ", save, "holds iteration 1 already, and this run begins anew")
    assert tree(save) == before


def test_a_run_is_not_continued_with_other_data(run: Run, data: Path, converted: Path, tmp_path: Path) -> None:
    save = tmp_path / "trained"
    assert run("finetune", *words(converted, data, save, "--train-iters", 1)).code == 0
    done = run("finetune", *words(converted, data, save, "--train-iters", 2, "--seed", 9))
    check_refused(done, "seed = 9", "began with 1234")
    assert find_checkpoint(save).iteration == 1
