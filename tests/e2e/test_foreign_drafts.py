"""EAGLE-3 directories that other programs wrote: read like our own where they say enough, refused where they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mcore_spec.bases.megatron_build import build_gpt_model
from mcore_spec.cli.main import run_command
from mcore_spec.errors import CheckpointError, ConfigError, McoreSpecError, UnsupportedError
from mcore_spec.export.directory import MARKER
from mcore_spec.export.reader import attach_exported
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from mcore_spec.weights.hf_import import import_hf
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.e2e.conftest import Run, make_base, make_chat_base

pytestmark = pytest.mark.e2e
IDS = "eagle_aux_hidden_state_layer_ids"
DRAFT_VOCABULARY = (3, 5, 6, 40, 41, 77, 100)

Config = dict[str, Any]
Tensors = dict[str, Tensor]
Write = Callable[..., Path]

DRAFTS: dict[str, Config] = {
    "base's head": {},
    "own head, norms": {"has_lm_head": True, "norm_before_residual": True, "norm_before_fc": True},
    "two layers, other sizes": {
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-4,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "fc_norm": True,
        "norm_output": True,
        "attention_bias": True,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 5, 7],
    },
    "draft vocabulary": {"draft_vocab_size": len(DRAFT_VOCABULARY)},
}


def export(base: Path, directory: Path, architecture: Config, *, form: str = "hf") -> Path:
    """A draft with weights that a warm start would not give, as we export it."""
    directory.mkdir()
    config, d2t = directory / "architecture.json", directory / "d2t.pt"
    config.write_text(json.dumps({"initializer_range": 0.1, **architecture}))
    torch.save(torch.tensor(DRAFT_VOCABULARY) - torch.arange(len(DRAFT_VOCABULARY)), d2t)
    vocabulary = ["--draft-vocab-cache", str(d2t)] if "draft_vocab_size" in architecture else []
    words = ["--pretrained-model-path", str(base), "--save", str(directory / "checkpoint"), "--draft-init", "random"]
    kind = ["--export-algorithm", "eagle", "--eagle-config", str(config)]
    assert run_command("convert", [*words, *kind, *vocabulary]) == 0
    words = ["--load", str(directory / "checkpoint"), "--export-dir", str(directory / "draft")]
    assert run_command("export", [*words, "--export-extra-modules", "--export-format", form]) == 0
    return directory / "draft"


def rewrite(
    source: Path,
    target: Path,
    *,
    config: Callable[[Config], None] | None = None,
    tensors: Callable[[Tensors], None] | None = None,
) -> Path:
    """The export without our record, and changed as somebody else writes it."""
    shutil.copytree(source, target)
    (target / MARKER).unlink()
    values, weights = json.loads((target / "config.json").read_text()), load_file(target / "model.safetensors")
    if config is not None:
        config(values)
    if tensors is not None:
        tensors(weights)
    (target / "config.json").write_text(json.dumps(values))
    save_file(weights, target / "model.safetensors")
    return target


def like_modelopt(values: Config) -> None:
    """Layer ids in the nested list alone, flags that are off left out, fields of its own."""
    del values[IDS]
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        if not values[name]:
            del values[name]
    values["eagle_config"] |= {"use_last_layernorm": True, "use_mtp_layernorm": False, "parallel_draft_step": 1}


def with_numbered_layer(tensors: Tensors) -> None:
    """``layers.0.`` for the one layer."""
    for name in [name for name in tensors if name.startswith("midlayer.")]:
        tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)


def attached(base: Path, draft: Path) -> tuple[Config, Tensors]:
    """What is read: the draft's architecture, and its weights on the base."""
    with parallel_runtime(Layout()):
        model = build_gpt_model(describe_hf(read_hf_config(base), where="base"), Layout())
        with WeightDirectory(base) as weights:
            import_hf(model, weights)
        record = attach_exported(model, draft)
        assert record.conversion is not None
        state = {name: value.clone() for name, value in model.eagle_module.state_dict().items()}
        return record.conversion.config["eagle_architecture_config"], state


def check_same(base: Path, ours: Path, theirs: Path) -> None:
    """Both directories are one draft. Fields that say nothing about an exported one may differ."""
    (architecture, expected), (other, actual) = attached(base, ours), attached(base, theirs)
    unsaid = {"initializer_range", "has_lm_head"}
    assert {k: v for k, v in other.items() if k not in unsaid} == {
        k: v for k, v in architecture.items() if k not in unsaid
    }
    # A head that is the base's is written out, and read as the draft's own.
    assert actual.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def _set(**fields: Any) -> Callable[[Config], None]:
    return lambda values: values.update(fields)


@pytest.mark.parametrize("name", DRAFTS)
def test_the_engines_form_without_our_record_is_the_same_draft(name: str, base_dir: Path, tmp_path: Path) -> None:
    ours = export(base_dir, tmp_path / "ours", DRAFTS[name])
    theirs = rewrite(ours, tmp_path / "theirs", config=like_modelopt, tensors=with_numbered_layer)
    check_same(base_dir, ours, theirs)


@pytest.mark.parametrize("name", ["own head, norms", "draft vocabulary"])
def test_the_speculators_form_without_our_record_is_the_same_draft(name: str, base_dir: Path, tmp_path: Path) -> None:
    ours = export(base_dir, tmp_path / "ours", DRAFTS[name], form="speculators")
    # The name of the class when speculators 0.9 itself saves one.
    theirs = rewrite(
        ours, tmp_path / "theirs", config=_set(architectures=["Eagle3DraftModel"], target_hidden_size=None)
    )
    check_same(base_dir, ours, theirs)


@pytest.fixture(scope="module")
def ours(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain export, with a head of its own."""
    return export(base_dir, tmp_path_factory.mktemp("foreign") / "ours", {"has_lm_head": True})


def _other_embedding(tensors: Tensors) -> None:
    tensors["embed_tokens.weight"] = torch.zeros(103, 32)


def _like_speculators(values: Config) -> None:
    values.update(speculators_model_type="eagle3", transformer_layer_config=dict(values), eagle_config={})
    values.pop("norm_before_residual")


@pytest.mark.parametrize(
    ("config", "tensors", "kind", "message"),
    [
        (
            _set(architectures=["LlamaForCausalLM"]),
            None,
            CheckpointError,
            "architectures = 'LlamaForCausalLM' is no EAGLE",
        ),
        (_set(speculators_model_type="peagle"), None, CheckpointError, "speculators_model_type = 'peagle' is no"),
        (_set(hidden_size=64, head_dim=16), None, CheckpointError, "hidden_size = 64, this base has 32"),
        (_set(vocab_size=99), None, CheckpointError, "vocab_size = 99, this base has 103"),
        (_set(target_hidden_size=48), None, CheckpointError, "target_hidden_size = 48"),
        (_set(**{IDS: [0, 3, 5]}), None, UnsupportedError, "0 is the embedding"),
        (_set(**{IDS: [2, 4, 9]}), None, ConfigError, "[8] out of range"),
        (_set(**{IDS: "2"}), None, ConfigError, "must be a list of whole numbers"),
        (_set(eagle_config={"parallel_draft_step": 4}), None, UnsupportedError, "parallel_draft_step = 4"),
        (_set(quantization_config={"quant_algo": "FP8"}), None, UnsupportedError, "quantization_config"),
        (_set(model_type="qwen3"), None, UnsupportedError, "model_type = 'qwen3'"),
        (_set(fc_norm=True), None, CheckpointError, "missing ['fc_norm.0.weight'"),
        (_set(draft_vocab_size=7), None, CheckpointError, "there is no d2t among the tensors"),
        (_like_speculators, None, CheckpointError, "no norm_before_residual"),
        (None, lambda tensors: tensors.pop("norm.weight"), CheckpointError, "missing ['norm.weight']"),
        (None, lambda tensors: tensors.update(extra=torch.ones(2)), CheckpointError, "not known ['extra']"),
        (None, _other_embedding, UnsupportedError, "an embedding of its own"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    config: Callable[[Config], None] | None,
    tensors: Callable[[Tensors], None] | None,
    kind: type[McoreSpecError],
    message: str,
    base_dir: Path,
    ours: Path,
    tmp_path: Path,
) -> None:
    theirs = rewrite(ours, tmp_path / "theirs", config=config, tensors=tensors)
    with pytest.raises(kind) as caught:
        attached(base_dir, theirs)
    assert message in str(caught.value)


def test_an_embedding_that_is_the_bases_and_an_identity_are_taken(base_dir: Path, ours: Path, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["embed_tokens.weight"] = load_file(base_dir / "model.safetensors")["model.embed_tokens.weight"]
        tensors["d2t"] = torch.zeros(103, dtype=torch.int64)

    check_same(base_dir, ours, rewrite(ours, tmp_path / "theirs", tensors=add))


def test_the_reading_is_said(run: Run, demo_base: Path, tmp_path: Path) -> None:
    base = make_chat_base(tmp_path / "base", demo_base=demo_base)
    ours = export(base, tmp_path / "ours", {})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name three colours.\n")
    words = ("--base", base, "--prompts-path", prompts, "--osl", 3, "--draft")
    assert "note:" not in run("validate", *words, ours).out
    done = run("validate", *words, rewrite(ours, tmp_path / "nested", config=like_modelopt))
    assert done.code == 0, done.err
    assert "was not made with mcore_spec; aux layers 1, 3, 4 (0-based, by output)" in done.out
    assert "vLLM 0.32 reads it as inputs, one layer off" in done.out
    done = run("validate", *words, rewrite(ours, tmp_path / "other", config=_set(**{IDS: [3, 4, 6]})))
    assert done.code == 0, done.err
    assert "aux layers 2, 3, 5 (0-based, by output)" in done.out
    assert "[1, 3, 4] in eagle_config" in done.out and "says something else" in done.out
    silent = rewrite(ours, tmp_path / "silent", config=lambda values: (values.pop(IDS), values.pop("eagle_config")))
    assert "names no aux layers: the default three" in run("validate", *words, silent).out


def test_a_foreign_draft_of_another_base_is_refused(run: Run, base_dir: Path, ours: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", hidden_size=64)
    theirs = rewrite(ours, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="hidden_size = 32, this base has 64"):
        attached(other, theirs)
