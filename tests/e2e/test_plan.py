"""Plans against an allocator, in training steps of small models; and dry runs, which build and write nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_spec.planning.memory import rank_memory
from tests.e2e.conftest import Run, check_refused, tree
from tools.check_plan import CASES, TOLERANCE, compare, run_case, setup_of

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", ["ci", "ci-mtp"])
def test_planned_and_measured_peaks_agree(name: str) -> None:
    """Two settings; more of them, in minutes: python -m tools.check_plan."""
    (measured,) = run_case(name)
    rows = compare(rank_memory(setup_of(CASES[name]), stage=0), measured)
    for part in ("always", "base forward", "loss", "backward", "peak"):
        planned, found = rows[part]
        assert planned == pytest.approx(found, rel=TOLERANCE), part


# --- dry runs ---------------------------------------------------------------------------------------


def test_a_dry_run_checks_what_the_run_checks_and_leaves_nothing(run: Run, base_dir: Path, tmp_path: Path) -> None:
    words = ("--pretrained-model-path", base_dir, "--export-algorithm", "eagle", "--save", tmp_path / "saved")
    layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 4)
    done = run("convert", *words, *layout, "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert tree(tmp_path) == {}
    assert "no weights in" not in done.out and "dry run: nothing was written" in done.out
    assert "on a rank of stage 1 of 4: base " in done.out
    assert "on a rank of stage 4 of 4: base " in done.out and "embedding copy" in done.out
    check_refused(run("convert", *words, "--tensor-model-parallel-size", 3, "--dry-run"), "num_attention_heads = 4")
    check_refused(run("convert", *words, *layout, "--dry-run", "--num-gpus", 12), "world size 12")
    check_refused(run("convert", *words, "--num-gpus", 8), "--num-gpus", "--dry-run")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((base_dir / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes(b"nothing")
    check_refused(run("convert", *words[2:], "--pretrained-model-path", damaged, "--dry-run"), "model.safetensors")


def test_a_dry_run_of_training_reads_no_weight_and_writes_nothing(run: Run, base_dir: Path, tmp_path: Path) -> None:
    save, data = tmp_path / "converted", tmp_path / "conversations.jsonl"
    words = ("--pretrained-model-path", base_dir, "--export-algorithm", "eagle", "--save", save)
    assert run("convert", *words).code == 0
    data.write_text("{}\n")
    options = (
        "--load",
        save,
        "--save",
        tmp_path / "trained",
        "--data-path",
        data,
        "--train-iters",
        3,
        "--seq-length",
        64,
    )
    before = tree(tmp_path)
    rehearsal = ("--dry-run", "--num-gpus", 8, "--gpu", "h100", "--bf16")
    done = run("finetune", *options, *rehearsal, "--tensor-model-parallel-size", 2, "--sequence-parallel")
    assert (done.code, done.err) == (0, "")
    assert tree(tmp_path) == before
    for part in ("TP 2 (sequence parallel) x PP 1 x CP 1 x DP 4 = 8 GPUs", "draft's saved activations", "estimate"):
        assert part in done.out
    check_refused(run("finetune", *options, *rehearsal, "--global-batch-size", 3), "--global-batch-size 3")
    check_refused(run("finetune", *options, *rehearsal, "--seq-length", 512), "given twice")
    missing = (*options[:5], tmp_path / "nowhere.jsonl", *options[6:])
    check_refused(run("finetune", *missing, *rehearsal), "nowhere.jsonl")
