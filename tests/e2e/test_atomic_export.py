"""An export appears whole or not at all: SIGKILL at random moments, and what may be replaced."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Run, make_base, tree
from tests.forked import start_command

pytestmark = pytest.mark.e2e
NUM_KILLS = 16


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of some 200 MB, so that writing it takes a while, and its checkpoint."""
    from mcore_spec.cli.main import run_command

    root = tmp_path_factory.mktemp("big")
    base = make_base(root / "base", vocab_size=40_000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    words = ["--pretrained-model-path", str(base), "--export-algorithm", "none", "--save", str(root / "checkpoint")]
    assert run_command("convert", words) == 0
    return base, root / "checkpoint"


def is_whole(directory: Path, base: Path) -> bool:
    """Every tensor and file of the base is there, bit for bit."""
    ours, theirs = load_file(directory / "model.safetensors"), load_file(base / "model.safetensors")
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        and names <= {path.name for path in directory.iterdir()}
    )


def test_a_killed_export_leaves_nothing_or_everything(big_checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    base, checkpoint = big_checkpoint
    final = tmp_path / "out" / "export"
    argv = ["--load", checkpoint, "--export-dir", final, "--overwrite"]
    partial = final.with_name(f".partial-{final.name}")

    def wait_for_partial(process: BaseProcess) -> None:
        deadline = time.monotonic() + 60
        while not partial.exists() and process.is_alive():
            assert time.monotonic() < deadline, "the export does not begin to write"
            time.sleep(0.001)

    # How long writing takes, undisturbed.
    process = start_command("export", argv, tmp_path / "log")
    wait_for_partial(process)
    began = time.monotonic()
    while partial.exists():
        time.sleep(0.001)
    duration = time.monotonic() - began
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert is_whole(final, base)

    generator = random.Random(2)
    seen = {"killed while writing": 0, "finished": 0, "nothing": 0, "whole": 0}
    for attempt in range(NUM_KILLS):
        if attempt == NUM_KILLS // 2:  # now onto a free name, where there is no earlier export
            for path in list(final.parent.iterdir()):
                os.rename(path, tmp_path / f"moved-{path.name}")
        process = start_command("export", argv, tmp_path / "log")
        wait_for_partial(process)
        # At random, but some in every part of it, its end with the renaming included: the others were slower
        # or faster than the one that was measured.
        part = attempt % (NUM_KILLS // 2)
        time.sleep(generator.uniform(part, part + 1) / (NUM_KILLS // 2) * 1.4 * duration)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        seen["killed while writing" if partial.exists() else "finished"] += 1
        if final.exists():
            assert is_whole(final, base), f"attempt {attempt} left a half directory"
        seen["whole" if final.exists() else "nothing"] += 1
    assert seen["killed while writing"] >= NUM_KILLS // 2, f"the kills missed the writing: {seen}"
    assert seen["whole"] and seen["nothing"], f"one of the two cases did not come up: {seen}"

    # What was left behind does not disturb the next export, and is gone after it.
    process = start_command("export", argv, tmp_path / "log")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert is_whole(final, base)
    assert [path.name for path in final.parent.iterdir()] == ["export"]


@pytest.fixture(scope="module")
def small_checkpoint(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mcore_spec.cli.main import run_command

    save = tmp_path_factory.mktemp("small") / "checkpoint"
    words = ["--pretrained-model-path", str(base_dir), "--export-algorithm", "eagle", "--save", str(save)]
    assert run_command("convert", words) == 0
    return save


def test_an_existing_export_is_replaced_only_when_asked(run: Run, small_checkpoint: Path, tmp_path: Path) -> None:
    export = ("export", "--load", small_checkpoint, "--export-dir", tmp_path / "out")
    assert run(*export, "--export-extra-modules").code == 0
    before = tree(tmp_path)
    done = run(*export)
    assert done.code == 2
    assert f"export_dir = {tmp_path / 'out'} exists" in done.err and "--overwrite" in done.err
    assert tree(tmp_path) == before

    assert run(*export, "--overwrite").code == 0  # the base now; nothing of the draft remains
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and "extra_llm_api.yaml" not in names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_replacement_is_cleared_away(run: Run, small_checkpoint: Path, tmp_path: Path) -> None:
    """Killed between the two renames, the earlier export lies under another name."""
    export = ("export", "--load", small_checkpoint, "--export-dir", tmp_path / "out", "--export-extra-modules")
    assert run(*export).code == 0
    (tmp_path / "out").rename(tmp_path / ".replaced-out")
    assert run(*export).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["base model", "checkpoint", "iteration", "other files", "file"])
def test_what_is_no_export_is_never_touched(
    kind: str, run: Run, base_dir: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    """A Hugging Face model has a config.json too, and would be gone."""
    target = tmp_path / "precious"
    if kind == "base model":
        make_base(target)
    elif kind in ("checkpoint", "iteration"):
        assert (
            run(
                "convert", "--load", _plain(run, base_dir, tmp_path), "--export-algorithm", "medusa", "--save", target
            ).code
            == 0
        )
        target = target if kind == "checkpoint" else target / "iter_0000001"
    elif kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    for overwrite in ((), ("--overwrite",)):
        done = run("export", "--load", small_checkpoint, "--export-dir", target, "--export-extra-modules", *overwrite)
        assert done.code == 2
        assert f"export_dir = {target}" in done.err and "choose another directory" in done.err
        assert tree(tmp_path) == before


def _plain(run: Run, base_dir: Path, root: Path) -> Path:
    words = ("--pretrained-model-path", base_dir, "--export-algorithm", "none", "--save", root / "plain")
    assert run("convert", *words).code == 0
    return root / "plain"


def test_an_empty_directory_may_be_filled_when_asked(run: Run, small_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export = ("export", "--load", small_checkpoint, "--export-dir", tmp_path / "out", "--export-extra-modules")
    assert run(*export, "--overwrite").code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
