"""Checkpoints: across layouts bit for bit, to and from Megatron-LM, strict, and whole or not there at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_spec.checkpoint.store import RECORD, TRACKER, find_checkpoint
from mcore_spec.errors import CheckpointError
from mcore_spec.parallel.layout import Layout
from tests.parallel.checkpoint_cases import KINDS
from tests.pool import RankPool
from tests.tiny import drawn, write_hf_model

CASES = "tests.parallel.checkpoint_cases"
REPOSITORY = Path(__file__).resolve().parents[2]
# megatron-core's attention and norms instead of ours, in float64: the same sums in another order.
PLAIN_BOUND = 1e-10


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    tied = {"llama": False, "llama-tied": True, "qwen3-tied": True, "qwen2": False}
    return {name: write_hf_model(root / name, name.split("-")[0], tied=is_tied) for name, is_tied in tied.items()}


@pytest.fixture(scope="module")
def bfloat16_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, dtype = tmp_path_factory.mktemp("bfloat16"), torch.bfloat16
    tied = {"llama": False, "llama-tied": True, "qwen3-tied": True, "qwen2": False}
    return {
        name: write_hf_model(root / name, name.split("-")[0], tied=is_tied, dtype=dtype)
        for name, is_tied in tied.items()
    }


CHAIN = (
    (2, Layout(tensor=2)),
    (2, Layout(pipeline=2)),
    (4, Layout(tensor=2, pipeline=2)),
    (2, Layout(tensor=2)),
    (1, Layout()),
)


@pytest.fixture(scope="module")
def chain(
    rank_pool: RankPool, bfloat16_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[str, list[str]]]]:
    """Each layout loads what the one before saved: what each rank found not to be as it should."""
    root = tmp_path_factory.mktemp("chain")
    found = []
    for index, (world_size, layout) in enumerate(CHAIN):
        ranks = rank_pool.run(
            f"{CASES}:resave",
            world_size=world_size,
            layout=layout,
            source=root / str(index - 1) if index else None,
            save_to=root / str(index),
            directories=bfloat16_bases,
        )
        found.append(ranks)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_loads_the_same_bits(kind: str, chain: list[list[dict[str, list[str]]]]) -> None:
    for (_, layout), ranks in zip(CHAIN, chain, strict=True):
        for rank, found in enumerate(ranks):
            assert found[kind] == [], f"rank {rank} in {layout}"


def test_each_rank_loads_its_own_shard(rank_pool: RankPool, bases: dict[str, Path], tmp_path: Path) -> None:
    """The trap: a shard saved as if it were replicated comes back as rank 0's on every rank."""
    ranks = rank_pool.run(f"{CASES}:own_shards", world_size=2, directory=tmp_path / "saved", base=bases["llama"])
    query = drawn("layers.1.self_attn.q_proj.weight", (32, 16))
    head = drawn("lm_head.weight", (37, 16))
    for rank, (rows, head_rows) in enumerate(ranks):
        assert torch.equal(rows, query[16 * rank : 16 * (rank + 1)])
        padded = torch.cat((head, torch.zeros(1, 16, dtype=torch.float64)))
        assert torch.equal(head_rows, padded[19 * rank : 19 * (rank + 1)])


@pytest.mark.parametrize("padded_vocab_size", [104, 128])
def test_a_plain_model_loads_our_base(
    padded_vocab_size: int, rank_pool: RankPool, bases: dict[str, Path], tmp_path: Path
) -> None:
    ranks = rank_pool.run(
        f"{CASES}:plain_loads_ours",
        world_size=2,
        directory=tmp_path,
        bases=bases,
        padded_vocab_size=padded_vocab_size,
    )
    for found in ranks:
        for plain, ours in found.values():
            assert (plain - ours).abs().max() < PLAIN_BOUND
            assert ours.abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "base", "changes"),
    [
        ("iter_0000007", "llama", {}),
        ("release", "qwen2", {}),
        ("iter_0000007", "qwen3-tied", {"vocab_size": None, "padded_vocab_size": 103}),
    ],
)
def test_megatron_lms_checkpoint_loads_here(
    name: str, base: str, changes: dict[str, Any], rank_pool: RankPool, bases: dict[str, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "megatron-lm"
    expected, _ = rank_pool.run(
        f"{CASES}:save_as_megatron_lm",
        world_size=2,
        directory=directory,
        name=name,
        base=bases[base],
        changes=changes,
    )
    for layout in (Layout(), Layout(tensor=2)):
        ranks = rank_pool.run(f"{CASES}:load_megatron_lm", world_size=layout.tensor, directory=directory, layout=layout)
        for found in ranks:
            assert (found["logits"] - expected).abs().max() < PLAIN_BOUND
            assert found["iteration"] == (0 if name == "release" else 7)
            assert found["vocab_size"] == 103
            assert found["differing"] == []


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"normalization": "LayerNorm"}, "UnsupportedError", "args.normalization = 'LayerNorm'"),
        ({"position_embedding_type": "learned_absolute"}, "UnsupportedError", "args.position_embedding_type"),
        ({"swiglu": False}, "UnsupportedError", "args.swiglu = False"),
        ({"rotary_percent": 0.5}, "UnsupportedError", "args.rotary_percent = 0.5"),
        ({"rotary_interleaved": True}, "UnsupportedError", "args.rotary_interleaved = True"),
        ({"apply_layernorm_1p": True}, "UnsupportedError", "args.apply_layernorm_1p = True"),
        ({"rotary_seq_len_interpolation_factor": 2}, "UnsupportedError", "rotary_seq_len_interpolation_factor = 2"),
        ({"num_experts": 8}, "UnsupportedError", "args.num_experts = 8"),
    ],
)
def test_megatron_lms_other_models_are_refused(
    changes: dict[str, Any], error: str, part: str, rank_pool: RankPool, bases: dict[str, Path], tmp_path: Path
) -> None:
    rank_pool.run(
        f"{CASES}:save_as_megatron_lm",
        world_size=2,
        directory=tmp_path,
        name="release",
        base=bases["llama"],
        changes=changes,
    )
    (said,) = rank_pool.run(f"{CASES}:load_one", world_size=1, directory=tmp_path)
    assert said.startswith(error) and part in said


@pytest.fixture(scope="module")
def saved(rank_pool: RankPool, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a directory with two iterations; tests copy what they damage."""
    root = tmp_path_factory.mktemp("saved")
    for kind in ("eagle3-reduced", "medusa-tied", "none"):
        said = rank_pool.run(
            f"{CASES}:save_one", world_size=1, directory=root / kind, kind=kind, bases=bases, source=kind, times=2
        )
        assert said == ["saved"]
    return {path.name: path for path in root.iterdir()}


def test_restore_attaches_the_draft_to_somebody_elses_model(
    rank_pool: RankPool, bases: dict[str, Path], saved: dict[str, Path]
) -> None:
    (found,) = rank_pool.run(
        f"{CASES}:restore_into_plain", world_size=1, directory=saved["eagle3-reduced"], bases=bases
    )
    assert found["differing"] == []
    assert (found["logits"] - found["expected"]).abs().max() < PLAIN_BOUND


def copied(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    import shutil

    shutil.copytree(source, target)
    return target


def load(rank_pool: RankPool, directory: Path, **options: Any) -> str:
    (said,) = rank_pool.run(f"{CASES}:load_one", world_size=1, directory=directory, **options)
    return said


def test_the_newest_iteration_or_the_one_asked_for(rank_pool: RankPool, saved: dict[str, Path]) -> None:
    directory = saved["medusa-tied"]
    assert load(rank_pool, directory) == "loaded iteration 2"
    assert load(rank_pool, directory, step=1) == "loaded iteration 1"
    said = load(rank_pool, directory, step=3)
    assert said.startswith("CheckpointError") and "iter_0000003" in said and "ckpt_step" in said
    assert (directory / TRACKER).read_text() == "2"
    assert sorted(path.name for path in directory.iterdir()) == ["iter_0000001", "iter_0000002", TRACKER]


def edit_record(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    for path in directory.glob(f"iter_*/{RECORD}"):
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))


def test_what_only_the_checkpoint_has_is_listed(rank_pool: RankPool, saved: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(saved["medusa-tied"], tmp_path / "saved")
    edit_record(directory, lambda record: record.update(conversion=None))
    said = load(rank_pool, directory)
    assert said.startswith("CheckpointError")
    assert "only in the checkpoint ['medusa_heads.heads.0." in said and "only in the model nothing" in said


def test_what_only_the_model_has_is_listed(rank_pool: RankPool, saved: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(saved["medusa-tied"], tmp_path / "saved")
    edit_record(directory, lambda record: record["conversion"]["config"].update(medusa_num_heads=3))
    said = load(rank_pool, directory)
    assert said.startswith("CheckpointError")
    assert "only in the model ['medusa_heads.heads.2." in said and "only in the checkpoint nothing" in said


def test_another_shape_is_refused(rank_pool: RankPool, saved: dict[str, Path], tmp_path: Path) -> None:
    """The record says a wider MLP than was saved: an error, not a part of a tensor."""
    directory = copied(saved["eagle3-reduced"], tmp_path / "saved")
    edit_record(
        directory,
        lambda record: record["conversion"]["config"]["eagle_architecture_config"].update(intermediate_size=28),
    )
    said = load(rank_pool, directory)
    assert said.startswith("CheckpointError")


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", 32), ("num_layers", 4), ("rms_norm_eps", 1e-6), ("vocab_size", 96)]
)
def test_a_checkpoint_of_another_base_is_refused(
    field: str, value: float, rank_pool: RankPool, saved: dict[str, Path]
) -> None:
    said = load(rank_pool, saved["eagle3-reduced"], into={field: value})
    assert said.startswith("CheckpointError") and "another base (eagle3-reduced)" in said
    assert f"its {field} is " in said and f"the model's {value!r}" in said


def test_a_directory_of_another_base_is_not_written_to(
    rank_pool: RankPool, bases: dict[str, Path], saved: dict[str, Path]
) -> None:
    before = sorted(saved["none"].rglob("*"))
    (said,) = rank_pool.run(
        f"{CASES}:save_one", world_size=1, directory=saved["none"], kind="none", bases=bases, source="the other"
    )
    assert said.startswith("CheckpointError") and "another base (none)" in said and "the other" in said
    assert sorted(saved["none"].rglob("*")) == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [
        (TRACKER, "abc", "'abc', neither an iteration nor 'release'"),
        (TRACKER, "", "neither an iteration"),
        (TRACKER, "9", "iter_0000009 is no checkpoint"),
        (TRACKER, None, f"no {TRACKER} there"),
        (RECORD, "{", "is not JSON"),
        (RECORD, "", "is not JSON"),
        (RECORD, "[]", RECORD),
        (RECORD, '{"format_version": 99}', "format_version 99"),
        (RECORD, '{"format_version": 1}', "base"),
        ("metadata.json", None, "not a whole one"),
        ("metadata.json", "{", "could not be read"),
        (".metadata", None, "could not be read"),
        (".metadata", "no pickle", "could not be read"),
        ("__0_0.distcp", None, "could not be read"),
        ("__0_0.distcp", "half", "could not be read"),
        ("common.pt", "half", "could not be read"),
    ],
)
def test_damage_is_named(
    file: str, text: str | None, part: str, rank_pool: RankPool, saved: dict[str, Path], tmp_path: Path
) -> None:
    directory = copied(saved["none"], tmp_path / "saved")
    path = directory / file if file == TRACKER else directory / "iter_0000002" / file
    assert path.exists()
    if text is None:
        path.unlink()
    elif text == "half":
        truncate(path)
    else:
        path.write_text(text)
    said = load(rank_pool, directory)
    assert said.startswith("CheckpointError"), said
    assert "Traceback" not in said
    assert part in said and str(directory) in said


def test_a_save_that_cannot_be_written_changes_nothing(
    rank_pool: RankPool, bases: dict[str, Path], saved: dict[str, Path], tmp_path: Path
) -> None:
    directory = copied(saved["none"], tmp_path / "saved")
    before = sorted(directory.rglob("*"))
    (said,) = rank_pool.run(f"{CASES}:save_beyond_the_limit", world_size=1, directory=directory, bases=bases)
    assert said.startswith("CheckpointError") and f"save = {directory}" in said and "free space" in said
    assert "Traceback" not in said
    assert sorted(directory.rglob("*")) == before
    assert load(rank_pool, directory) == "loaded iteration 2"


def test_the_library_takes_plain_paths(rank_pool: RankPool, tmp_path: Path) -> None:
    """On two ranks: what only one of them notices would leave the other waiting."""
    ranks = rank_pool.run(f"{CASES}:library_with_plain_paths", world_size=2, directory=tmp_path, timeout=60)
    files = ["README.md", "config.json", "extra_llm_api.yaml", "mcore_spec_export.json", "model.safetensors"]
    assert ranks == [(1, files), (1, files)]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no {TRACKER} there"):
        find_checkpoint(tmp_path / "nowhere")


def test_a_killed_save_leaves_the_iteration_before(tmp_path: Path) -> None:
    """SIGKILL at random moments of a loop of saves; every time a whole iteration loads, and saving goes on."""
    tries = 12
    finished = subprocess.run(
        [sys.executable, "-m", "tests.parallel.kill_during_save", str(tmp_path), str(tries)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    results = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert len(results) == tries
    for result in results:
        assert result["error"] == "", result
        # Nothing is announced before it is whole, and nothing that was announced is lost.
        assert result["loaded"] >= result["announced_before_the_kill"] >= 1, result
        # The next number is free, also where an iteration was renamed but not announced.
        assert result["next"] in (result["loaded"] + 1, result["loaded"] + 2), result
    assert any(result["partial"] for result in results), "no try was killed in the middle of a save"
