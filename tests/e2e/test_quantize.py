"""The road from a trained draft to a quantised export, as a user walks it, and what users get wrong on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_spec.checkpoint.store import find_checkpoint
from tests.e2e.conftest import Run, attach_draft, check_refused, tree
from tests.reference import quantized_engine

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def converted(base: Path) -> Path:
    """The base with a draft."""
    return attach_draft(base, base.parent / "drafted")


def quantize_words(load: Path, save: Path, data: Path, *more: object) -> list[object]:
    return ["--load", load, "--save", save, "--calib-data", data, "--seq-length", 64, *more]


def finetune_words(load: Path, save: Path, data: Path, *more: object) -> list[object]:
    options = ["--seq-length", 64, "--global-batch-size", 2, "--log-interval", 1, "--split", "5,1,0", "--lr", 1e-3]
    return ["--load", load, "--save", save, "--data-path", data, *options, *more]


def test_quantise_train_measure_and_export(run: Run, converted: Path, data: Path, tmp_path: Path) -> None:
    quantised, trained, out = tmp_path / "quantised", tmp_path / "trained", tmp_path / "out"
    words = quantize_words(converted, quantised, data, "--calib-size", 4, "--export-kv-cache-quant", "fp8")
    done = run("quantize", *words, "--export-quant-cfg", "fp8")
    assert done.code == 0, done.err
    assert "calibration: 4 conversations of 6" in done.out
    assert "40 linear maps and 9 attentions" in done.out
    record = find_checkpoint(quantised).record.quantization
    assert record is not None
    assert (record.recipe.name, record.num_conversations, record.calibration) == ("fp8", 4, "max")
    done = run("finetune", *finetune_words(quantised, trained, data, "--train-iters", 3))
    assert done.code == 0, done.err
    # Scales belong to the weights that the calibration saw: no other start replaces those.
    assert "least-squares" not in done.out
    assert find_checkpoint(trained).record.quantization == record
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name three colours.\n")
    done = run("validate", "--load", trained, "--prompts-path", prompts, "--osl", 12)
    assert done.code == 0, done.err
    assert "lossless" in done.out
    for load, name in ((quantised, "before"), (trained, "after")):
        done = run("export", "--load", load, "--export-dir", out / name)
        assert done.code == 0, done.err
        assert "fp8)" in done.out
    base_before, base_after = (load_file(out / name / "model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(base_before[name], base_after[name]) for name in base_before)
    before, after = (load_file(out / name / "draft" / "model.safetensors") for name in ("before", "after"))
    # Training moves weights and leaves scales.
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.endswith("scale")} <= same
    assert "midlayer.mlp.up_proj.weight" not in same
    assert quantized_engine.read(out / "after" / "draft").inputs.keys() == {
        "fc",
        *(f"midlayer.self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"midlayer.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }


def test_learned_scales_are_exported(run: Run, converted: Path, data: Path, tmp_path: Path) -> None:
    quantised, trained, out = tmp_path / "quantised", tmp_path / "trained", tmp_path / "out"
    words = quantize_words(converted, quantised, data, "--export-kv-cache-quant", "fp8", "--export-quant-cfg", "fp8")
    assert run("quantize", *words).code == 0
    modes = ["--learn-scales", "--fp8-compute", "--fp8-gradient-scaling", "delayed"]
    done = run("finetune", *finetune_words(quantised, trained, data, "--train-iters", 3, *modes))
    assert done.code == 0, done.err
    record = find_checkpoint(trained).record.quantization
    assert record is not None and (record.has_learned_scales, record.gradient_scaling) == (True, "delayed")
    for others in ([], modes[:1], modes[:2]):
        again = finetune_words(quantised, trained, data, "--train-iters", 5, *others)
        check_refused(run("finetune", *again), "other options --learn-scales")
    for load, name in ((quantised, "before"), (trained, "after")):
        assert run("export", "--load", load, "--export-dir", out / name).code == 0
    before, after = (load_file(out / name / "draft" / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    scales = [name for name in before if name.endswith("_scale")]
    assert len(scales) == 18
    assert all(not torch.equal(before[name], after[name]) and bool((after[name] > 0).all()) for name in scales)
    # Engines that join these take one of the scales.
    for joined in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for kind in ("weight_scale", "input_scale"):
            assert len({float(after[f"midlayer.{each}.{kind}"]) for each in joined}) == 1
    read = quantized_engine.read(out / "after" / "draft")
    assert set(read.scales) == set(scales)
    base_before, base_after = (load_file(out / name / "model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(base_before[name], base_after[name]) for name in base_before)


def test_scales_that_need_no_data(run: Run, converted: Path, data: Path, tmp_path: Path) -> None:
    words = ["--load", converted, "--save", tmp_path / "quantised", "--export-quant-cfg", "int8_per_channel"]
    assert run("quantize", *words, "--quant-exclude", "eagle_module.*").code == 0
    export = ["--load", tmp_path / "quantised", "--export-dir", tmp_path / "out"]
    check_refused(run("export", *export), "--export-quant-format compressed-tensors")
    assert run("export", *export, "--export-quant-format", "compressed-tensors").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "int-quantized")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "draft" / "config.json").read_text())
    assert quantized_engine.read(tmp_path / "out" / "draft").scales == {}


@pytest.fixture(scope="module")
def quantised(converted: Path, data: Path) -> Path:
    from mcore_spec.cli.main import run_command

    save = converted.parent / "quantised"
    words = quantize_words(converted, save, data, "--export-quant-cfg", "fp8")
    assert run_command("quantize", [str(word) for word in words]) == 0
    return save


Case = tuple[str, list[object], tuple[str, ...]]


def cases(converted: Path, quantised: Path, data: Path, save: Path) -> dict[str, Case]:
    empty = data.parent / "empty.jsonl"
    empty.write_text("")
    fp8: list[object] = ["--export-quant-cfg", "fp8"]
    prompts = data.parent / "prompts.txt"
    prompts.write_text("Hello\n")
    return {
        "unknown recipe": (
            "quantize",
            quantize_words(converted, save, data, "--export-quant-cfg", "fp8_blockwize"),
            ("--export-quant-cfg", "did you mean fp8_blockwise?"),
        ),
        "twice": ("quantize", quantize_words(quantised, save, data, *fp8), ("is quantised already (fp8)",)),
        "onto itself": ("quantize", quantize_words(converted, converted, data, *fp8), ("is --load",)),
        "no data": ("quantize", ["--load", converted, "--save", save, *fp8], ("give --calib-data",)),
        "data for nothing": (
            "quantize",
            quantize_words(converted, save, data, "--export-quant-cfg", "fp8_per_channel"),
            ("drop --calib-data",),
        ),
        "empty data": ("quantize", quantize_words(converted, save, empty, *fp8), (str(empty),)),
        "pattern": (
            "quantize",
            quantize_words(converted, save, data, *fp8, "--quant-exclude", "*.q_prog"),
            ("'*.q_prog'", "matches no linear map"),
        ),
        "another start": (
            "finetune",
            finetune_words(quantised, save, data, "--train-iters", 1, "--fit-start", 1),
            ("--fit-start 1", "has scales for"),
        ),
        "FP8 products of nothing": (
            "finetune",
            finetune_words(converted, save, data, "--train-iters", 1, "--fp8-compute"),
            ("--fp8-compute", "is not quantised"),
        ),
        "learned scales of nothing": (
            "finetune",
            finetune_words(converted, save, data, "--train-iters", 1, "--learn-scales"),
            ("--learn-scales", "is not quantised"),
        ),
        "a backend of nothing": (
            "finetune",
            finetune_words(quantised, save, data, "--train-iters", 1, "--fp8-backend", "torch"),
            ("--fp8-backend", "without --fp8-compute"),
        ),
        "a backend that is not there": (
            "finetune",
            finetune_words(
                quantised, save, data, "--train-iters", 1, "--fp8-compute", "--fp8-backend", "transformer_engine"
            ),
            ("fp8_backend = transformer_engine", "choose fp8_backend = torch"),
        ),
        "no other teacher": (
            "finetune",
            finetune_words(converted, save, data, "--train-iters", 1, "--teacher", "unquantized"),
            ("--teacher unquantized", "is not quantised"),
        ),
        "converted again": (
            "convert",
            ["--load", quantised, "--export-algorithm", "medusa", "--save", save],
            ("has a draft already",),
        ),
        "form of nothing": (
            "export",
            ["--load", converted, "--export-dir", save, "--export-quant-format", "modelopt"],
            ("the checkpoint is not quantised",),
        ),
        "a store of it": (
            "extract",
            ["--load", quantised, "--data-path", data, "--output-dir", save, "--seq-length", 64],
            ("is quantised (fp8)", "extract with the checkpoint that it was made from"),
        ),
        "trained on a store": (
            "finetune",
            ["--load", quantised, "--save", save, "--offline-distillation-data", data.parent, "--train-iters", 1],
            ("is quantised (fp8)", "train on --data-path"),
        ),
        "an export is measured": (
            "validate",
            ["--base", data.parent / "base", "--draft", data.parent / "exported", "--prompts-path", prompts],
            ("is quantised (quantization_config)", "--load"),
        ),
    }


def test_refusals(run: Run, converted: Path, quantised: Path, data: Path, tmp_path: Path) -> None:
    exported = data.parent / "exported"
    assert run("export", "--load", quantised, "--export-dir", exported, "--export-extra-modules").code == 0
    save = tmp_path / "out"
    for name, (command, words, parts) in cases(converted, quantised, data, save).items():
        done = run(command, *words)
        check_refused(done, *parts)
        left: dict[str, Any] = tree(save)
        assert [path for path in left if "data_cache" not in path] == [], name
