"""The commands as a user types them: scripts, the console command, torchrun; and what they print."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import Done, Run, subprocess_environment, tree
from tests.one_file_algorithm import registered
from tests.pool import RankPool

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 32, 48, 103, 4, 2, 8
LAYER = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 3 * HIDDEN * FFN
BASE_PARAMETERS = 8 * (LAYER + 2 * HIDDEN) + HIDDEN + 2 * VOCAB * HIDDEN
# EAGLE-3: q, k and v read twice the width; fc over three layers; four norms.
EAGLE3_PARAMETERS = LAYER + HIDDEN * (HEADS + 2 * KV_HEADS) * HEAD_DIM + 3 * HIDDEN * HIDDEN + 4 * HIDDEN


def conversion(base: Path, algorithm: str, save: Path) -> tuple[object, ...]:
    """The words of a conversion; flags of one test come behind them."""
    return ("convert", "--pretrained-model-path", base, "--export-algorithm", algorithm, "--save", save)


def script(*words: object) -> Done:
    """A process of its own, in the repository root."""
    command = [sys.executable, *(str(word) for word in words)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=subprocess_environment(), capture_output=True, text=True, timeout=180
    )
    return Done(done.returncode, done.stdout, done.stderr)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_the_scripts_from_a_model_to_a_draft_directory(base_dir: Path, run_script: Run, tmp_path: Path) -> None:
    """`python examples/convert_model.py`, then `examples/export.py`."""
    done = run_script(
        REPOSITORY / "examples/convert_model.py",
        *("--pretrained-model-path", base_dir, "--export-algorithm", "eagle", "--export-eagle-algorithm", "eagle3"),
        *("--save", tmp_path / "checkpoint"),
    )
    assert done.code == 0, done.err
    assert f"saved {tmp_path / 'checkpoint' / 'iter_0000001'}\n" in done.out
    words = ("--load", tmp_path / "checkpoint", "--export-dir", tmp_path / "draft", "--export-extra-modules")
    done = run_script(REPOSITORY / "examples/export.py", *words)
    assert done.code == 0, done.err
    assert done.out.endswith(f"exported {tmp_path / 'draft'} (iteration 1, EAGLE-3)\n")
    assert weights(tmp_path / "draft")["lm_head.weight"].shape == (VOCAB, HIDDEN)


def test_torchrun_and_the_console_command(base_dir: Path, run: Run, tmp_path: Path) -> None:
    """Two ranks under torchrun; what they save is exported by `mcore-spec` on one, with the same bytes."""
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "examples/convert_model.py")
    convert = ("--pretrained-model-path", base_dir, "--export-algorithm", "eagle")
    done = script(*torchrun, *convert, "--save", tmp_path / "two", "--tensor-model-parallel-size", 2)
    assert done.code == 0, done.err
    assert done.out.count("saved ") == 1, "every rank spoke"
    assert done.out.count("base: ") == 1 and done.out.count("draft: ") == 1
    # What pip makes of it is a script of these two lines; the package need not be installed.
    entry = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]["mcore-spec"]
    module, _, function = entry.partition(":")
    export = ("export", "--load", tmp_path / "two", "--export-dir", tmp_path / "two_draft", "--export-extra-modules")
    done = script("-c", f"import sys; from {module} import {function}; sys.exit({function}())", *export)
    assert done.code == 0, done.err
    assert run("convert", *convert, "--save", tmp_path / "one").code == 0
    words = ("--load", tmp_path / "one", "--export-dir", tmp_path / "one_draft", "--export-extra-modules")
    assert run("export", *words).code == 0
    assert tree(tmp_path / "one_draft") == tree(tmp_path / "two_draft")


def test_a_configuration_file_and_flags_that_win_over_it(base_dir: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "convert.yaml"
    lines = {
        "pretrained_model_path": str(base_dir),
        "export-algorithm": "medusa",
        "export-num-medusa-heads": 4,
        "save": str(tmp_path / "from_file"),
    }
    file.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
    done = run("convert", "--config", file)
    assert done.code == 0, done.err
    assert "draft: Medusa; " in done.out and (tmp_path / "from_file" / "iter_0000001").is_dir()
    done = run("convert", "--config", file, "--export-num-medusa-heads", 1, "--save", tmp_path / "from_flag")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "from_flag" / "iter_0000001" / "mcore_spec.json").read_text())
    assert record["conversion"]["config"]["medusa_num_heads"] == 1
    assert len(list((tmp_path / "from_file").iterdir())) == 2  # the iteration and the tracker: untouched


# --- what is printed ------------------------------------------------------------------------------


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in {text}"
    return int(found.group(1).replace(",", ""))


def test_the_report_of_an_eagle3_draft(base_dir: Path, run: Run, tmp_path: Path) -> None:
    """Parameters trained and frozen, aux layers, draft vocabulary, bytes a rank."""
    targets = torch.arange(0, 80, 2)
    torch.save(targets - torch.arange(40), tmp_path / "d2t.pt")
    words = ("--pretrained-model-path", base_dir, "--export-algorithm", "eagle", "--save", tmp_path / "checkpoint")
    done = run("convert", *words, "--draft-vocab-cache", tmp_path / "d2t.pt")
    assert done.code == 0, done.err
    base, draft, sizes, saved = done.out.splitlines()
    assert base.startswith("base: llama, 8 layers, hidden 32, vocabulary 103, float32; ") and base.endswith("frozen")
    assert number(r"; ([\d,]+) parameters, frozen", base) == BASE_PARAMETERS
    trained = EAGLE3_PARAMETERS + 40 * HIDDEN
    assert number(r"draft: EAGLE-3; ([\d,]+) parameters, trained", draft) == trained
    assert "aux layers 1, 3, 4" in draft and draft.endswith("draft vocabulary 40; starts as the base's last layer")
    assert number(r"bytes a rank: ([\d,]+)$", sizes) == 4 * (BASE_PARAMETERS + trained)
    assert saved == f"saved {tmp_path / 'checkpoint' / 'iter_0000001'}"


@pytest.mark.parametrize(
    ("words", "name", "num_trained"),
    [
        (("--export-eagle-algorithm", "eagle3"), "EAGLE-3", EAGLE3_PARAMETERS),
        (("--export-eagle-algorithm", "eagle1"), "EAGLE-1", LAYER + HIDDEN + 2 * HIDDEN * HIDDEN),
        (("--export-eagle-algorithm", "eagle-mtp"), "EAGLE-MTP", LAYER + 5 * HIDDEN + 2 * HIDDEN * HIDDEN),
    ],
)
def test_the_report_counts_every_eagle(
    words, name: str, num_trained: int, base_dir: Path, run: Run, tmp_path: Path
) -> None:
    convert = conversion(base_dir, "eagle", tmp_path / "out")
    done = run(*convert, *words)
    assert done.code == 0, done.err
    assert number(rf"draft: {name}; ([\d,]+) parameters, trained", done.out) == num_trained
    assert number(r"; ([\d,]+) parameters, frozen", done.out) == BASE_PARAMETERS


def test_the_report_of_medusa(base_dir: Path, run: Run, tmp_path: Path) -> None:
    convert = conversion(base_dir, "medusa", tmp_path / "out")
    done = run(*convert, "--export-num-medusa-heads", 3, "--export-num-medusa-layers", 2)
    trained = 3 * (2 * (HIDDEN * HIDDEN + HIDDEN) + VOCAB * HIDDEN)
    assert number(r"draft: Medusa; ([\d,]+) parameters, trained", done.out) == trained


# --- roads ----------------------------------------------------------------------------------------


def test_a_plain_base_checkpoint_and_back(base_dir: Path, run: Run, tmp_path: Path) -> None:
    """HF -> checkpoint -> HF is the same model; a draft from --load is the draft from the HF directory."""
    plain, out = tmp_path / "plain", tmp_path / "out"
    done = run("convert", "--pretrained-model-path", base_dir, "--export-algorithm", "none", "--save", plain)
    assert done.code == 0 and "draft" not in done.out
    done = run("export", "--load", plain, "--export-dir", out / "base")
    assert (done.code, done.out) == (0, f"exported {out / 'base'} (iteration 1, base)\n")
    theirs, ours = weights(base_dir), weights(out / "base")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (out / "base" / "tokenizer.json").read_bytes() == (base_dir / "tokenizer.json").read_bytes()
    assert json.loads((out / "base" / "config.json").read_text()) == json.loads((base_dir / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(out / "base")

    for name, source in (("direct", ("--pretrained-model-path", base_dir)), ("loaded", ("--load", plain))):
        convert = ("convert", *source, "--export-algorithm", "eagle", "--save", tmp_path / name)
        assert run(*convert).code == 0
        export = ("export", "--load", tmp_path / name, "--export-dir", out / name, "--export-extra-modules")
        assert run(*export).code == 0
    assert tree(out / "direct") == tree(out / "loaded")
    # The base under a draft is still the base, and the draft lies in it.
    assert run("export", "--load", tmp_path / "direct", "--export-dir", out / "base_again").code == 0
    assert weights(out / "base_again").keys() == theirs.keys()
    exports_own = "mcore_spec_export.json"
    drafts = [tree(out / "base_again" / "draft"), tree(out / "direct")]
    assert drafts[0] == {name: data for name, data in drafts[1].items() if name != exports_own}
    assert (out / "base_again" / "model.safetensors").read_bytes() == (out / "base" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("form", ["whole", "architecture only"])
def test_both_forms_of_an_eagle_configuration(form: str, base_dir: Path, run: Run, tmp_path: Path) -> None:
    architecture = {"num_hidden_layers": 2, "rms_norm_eps": 0.001, "eagle_aux_hidden_state_layer_ids": [1, 5]}
    values: dict[str, Any] = architecture
    if form == "whole":
        values = {"eagle_ttt_steps": 5, "eagle_architecture_config": architecture}
    (tmp_path / "eagle.json").write_text(json.dumps(values))
    convert = conversion(base_dir, "eagle", tmp_path / "out")
    done = run(*convert, "--eagle-config", tmp_path / "eagle.json")
    assert done.code == 0, done.err
    assert "aux layers 1, 5" in done.out
    record = json.loads((tmp_path / "out" / "iter_0000001" / "mcore_spec.json").read_text())["conversion"]
    assert record["algorithm"] == "eagle"
    assert record["config"]["eagle_ttt_steps"] == (5 if form == "whole" else 3)
    resolved = record["config"]["eagle_architecture_config"]
    assert {name: resolved[name] for name in architecture} == architecture
    # What is not given follows the base.
    followed = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
    }
    assert {name: resolved[name] for name in followed} == followed
    assert math.isclose(resolved["rope_theta"], 10000.0)


def test_a_later_save_is_the_next_iteration(base_dir: Path, run: Run, tmp_path: Path) -> None:
    convert = ("convert", "--pretrained-model-path", base_dir, "--save", tmp_path / "out", "--export-algorithm")
    assert run(*convert, "none").code == 0
    assert run(*convert, "medusa").code == 0
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "2"
    export = ("export", "--load", tmp_path / "out", "--export-extra-modules", "--export-dir", tmp_path / "draft")
    assert run(*export, "--ckpt-step", 1).code == 2
    done = run(*export)
    assert (done.code, done.out) == (0, f"exported {tmp_path / 'draft'} (iteration 2, Medusa)\n")
    base = ("export", "--load", tmp_path / "out", "--export-dir", tmp_path / "base")
    assert run(*base).out == f"exported {tmp_path / 'base'} (iteration 2, base and Medusa)\n"
    assert run(*base, "--ckpt-step", 1, "--overwrite").out == f"exported {tmp_path / 'base'} (iteration 1, base)\n"


def test_a_relative_place_to_export_to(
    base_dir: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also ".", an empty directory that is replaced, whose name the temporary sibling needs."""
    assert run(*conversion(base_dir, "medusa", tmp_path / "checkpoint")).code == 0
    here = tmp_path / "here"
    here.mkdir()
    export = ("export", "--load", tmp_path / "checkpoint", "--export-extra-modules", "--overwrite", "--export-dir")
    for place in (".", "below/it"):
        monkeypatch.chdir(here)  # "." was replaced: the process stands in the directory that was
        done = run(*export, place)
        assert (done.code, done.out) == (0, f"exported {place} (iteration 1, Medusa)\n"), done.err
        assert (here / place / "model.safetensors").is_file()
    done = run(*export, "..")
    assert done.code == 2 and f"export_dir = {tmp_path} is not an earlier export" in done.err


def test_one_option_for_the_configuration_of_every_algorithm(base_dir: Path, run: Run, tmp_path: Path) -> None:
    """--algorithm-config is Medusa's file and, by another name, EAGLE's; a flag must not contradict it."""
    (tmp_path / "medusa.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_loss_decay_factor": 0.5}))
    convert = (*conversion(base_dir, "medusa", tmp_path / "out"), "--algorithm-config", tmp_path / "medusa.json")
    done = run(*convert, "--export-num-medusa-heads", 4)
    assert done.code == 2
    assert f"{tmp_path / 'medusa.json'} has medusa_num_heads = 3, --export-num-medusa-heads says 4; make" in done.err
    assert run(*convert, "--export-num-medusa-layers", 2).code == 0
    assert recorded(tmp_path / "out") == {
        "medusa_num_heads": 3,
        "medusa_num_layers": 2,
        "medusa_loss_decay_factor": 0.5,
        "medusa_self_logit_distillation": False,
        "draft_vocab_size": 103,
    }
    (tmp_path / "eagle.json").write_text(json.dumps({"num_hidden_layers": 2}))
    for flag in ("--eagle-config", "--algorithm-config"):
        out = tmp_path / flag.strip("-")
        assert run(*conversion(base_dir, "eagle", out), flag, tmp_path / "eagle.json").code == 0
    assert recorded(tmp_path / "eagle-config") == recorded(tmp_path / "algorithm-config")
    assert recorded(tmp_path / "eagle-config")["eagle_architecture_config"]["num_hidden_layers"] == 2


def recorded(checkpoint: Path) -> dict[str, Any]:
    """The configuration in a checkpoint's first iteration."""
    record = json.loads((checkpoint / "iter_0000001" / "mcore_spec.json").read_text())
    return record["conversion"]["config"]


@pytest.mark.parallel
def test_a_third_algorithm_by_the_commands(base_dir: Path, run: Run, rank_pool: RankPool, tmp_path: Path) -> None:
    """Its file, its line, its flags: converted and exported, on one rank, on two and in two stages alike."""
    (tmp_path / "one_map.json").write_text(json.dumps({"one_map_std": 0.5}))

    def commands(name: str, *layout: str) -> list[list[str]]:
        save, out = tmp_path / name, tmp_path / f"{name}_draft"
        words = [*conversion(base_dir, "one-map", save), "--seed", 3, "--algorithm-config", tmp_path / "one_map.json"]
        export = ["export", "--load", save, "--export-dir", out, "--export-extra-modules"]
        return [[*map(str, words), *layout], [*map(str, export), *layout]]

    with registered():
        convert, export = (run(*words) for words in commands("one"))
    assert (convert.code, export.code) == (0, 0), convert.err + export.err
    num_trained = 2 * HIDDEN * HIDDEN + VOCAB * HIDDEN
    assert f"draft: One map; {num_trained:,} parameters, trained; standard deviation 0.5\n" in convert.out
    assert export.out == f"exported {tmp_path / 'one_draft'} (iteration 1, One map)\n"
    assert recorded(tmp_path / "one") == {"one_map_std": 0.5, "one_map_freeze": True}
    assert weights(tmp_path / "one_draft").keys() == {"projection.weight", "head.0.weight"}
    for name in ("tensor", "pipeline"):
        both = commands(name, f"--{name}-model-parallel-size", "2")
        codes = rank_pool.run("tests.one_file_algorithm:exit_codes", world_size=2, commands=both)
        assert codes == [[0, 0], [0, 0]]
        assert tree(tmp_path / f"{name}_draft") == tree(tmp_path / "one_draft")


def test_a_dtype_that_is_asked_for(base_dir: Path, run: Run, tmp_path: Path) -> None:
    convert = conversion(base_dir, "eagle", tmp_path / "out")
    assert run(*convert, "--params-dtype", "bf16").code == 0
    assert run("export", "--load", tmp_path / "out", "--export-dir", tmp_path / "base").code == 0
    ours, theirs = weights(tmp_path / "base"), weights(base_dir)
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in theirs)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["dtype"] == "bfloat16"
