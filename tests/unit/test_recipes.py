"""The recipes in examples/configs: each section is read by its command, a dry run of each builds base and draft."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from mcore_spec.checkpoint.record import CheckpointRecord, ConversionRecord
from mcore_spec.checkpoint.store import RECORD, TRACKER
from mcore_spec.cli.main import COMMANDS, run_command
from mcore_spec.cli.parser import Section, parse_arguments
from mcore_spec.config import BaseIdentity, EagleConfig
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.planning.layout import PlannedLayout
from mcore_spec.planning.shapes import known_shape
from mcore_spec.planning.weights import draft_sizes, draft_tensors, stage_weights
from mcore_spec.weights.hf_config import describe_hf
from tests.e2e.conftest import tree

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "examples" / "configs").glob("*.yaml"))
CONFIGS = REPOSITORY / "tests" / "hf_configs"

pytestmark = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def draft_vocabulary(recipe: Path) -> int | None:
    section = yaml.safe_load(recipe.read_text()).get("draft-vocab")
    return None if section is None else section["draft-vocab-size"]


def write_checkpoint(directory: Path, recipe: Path) -> Path:
    """What `convert` says about its checkpoint, without the weights."""
    base = describe_hf(json.loads((CONFIGS / recipe.stem / "config.json").read_text()), where="here")
    size = draft_vocabulary(recipe)
    given = {} if size is None else {"eagle_architecture_config": {"draft_vocab_size": size}}
    config = resolve_eagle(EagleConfig.parse(given), base)
    record = CheckpointRecord(
        base=base,
        identity=BaseIdentity(source=recipe.stem, fingerprint="none"),
        conversion=ConversionRecord(algorithm="eagle", config=config.model_dump(mode="json")),
        packages={},
    )
    path = directory / "iter_0000001"
    path.mkdir(parents=True)
    (path / "metadata.json").write_text("{}")
    (path / RECORD).write_text(record.model_dump_json())
    (directory / TRACKER).write_text("1")
    return directory


def test_every_section_is_read_by_its_command(recipe: Path) -> None:
    sections = yaml.safe_load(recipe.read_text())
    assert {"convert", "finetune", "export"} <= sections.keys()
    read = {
        name: parse_arguments(
            COMMANDS[name].arguments_class,
            ["--config", str(recipe)],
            prog=name,
            description="",
            section=Section(name, list(COMMANDS)),
        ).model_dump(mode="json", exclude_unset=True)
        for name in sections
    }
    for name, values in sections.items():
        assert {key.replace("-", "_"): value for key, value in values.items()} == read[name]
    assert read["finetune"]["load"] == read["convert"]["save"]
    assert read["export"]["load"] == read["finetune"]["save"]


def test_convert_rehearses_without_weights(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", recipe, "--pretrained-model-path", CONFIGS / recipe.stem, "--dry-run"]
    size = draft_vocabulary(recipe)
    if size is not None:
        torch.save(torch.arange(size), tmp_path / "d2t.pt")
        words += ["--draft-vocab-cache", tmp_path / "d2t.pt"]
    before = tree(tmp_path)
    code = run_command("convert", [str(word) for word in words])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert tree(tmp_path) == before
    assert "dry run: nothing was written" in out and "no weights in" in out
    check_bytes(out, recipe, section="convert")


def test_finetune_rehearses_without_weights(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = write_checkpoint(tmp_path / "converted", recipe)
    (tmp_path / "conversations.jsonl").write_text("{}")
    before = tree(tmp_path)
    words = ["--config", recipe, "--load", checkpoint, "--dry-run", "--num-gpus", 8]
    code = run_command("finetune", [str(word) for word in words])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert tree(tmp_path) == before
    assert "= 8 GPUs" in out and ": fits, " in out
    check_bytes(out, recipe, section="finetune")


def check_bytes(out: str, recipe: Path, *, section: str) -> None:
    """What was built without memory is what a plan reckons."""
    tensor = yaml.safe_load(recipe.read_text())[section].get("tensor-model-parallel-size", 1)
    shape, layout = known_shape(recipe.stem), PlannedLayout(tensor=tensor)
    size = draft_vocabulary(recipe)
    given = {} if size is None else {"eagle_architecture_config": {"draft_vocab_size": size}}
    config = resolve_eagle(EagleConfig.parse(given), shape.architecture)
    tensors = draft_tensors(draft_sizes(config, shape, layout), config.eagle_architecture_config, tensor=tensor)
    found = re.search(r"bytes of weights on a rank of stage 1 of 1: base ([\d,]+), draft ([\d,]+)", out)
    assert found is not None, out
    base, draft = (int(text.replace(",", "")) for text in found.groups())
    assert base == 2 * stage_weights(shape, layout, stage=0).base
    assert draft == 2 * sum(tensors)
