"""Hugging Face -> megatron-core -> Hugging Face changes no bit of a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mcore_spec.config import BaseArchitecture
from mcore_spec.errors import UnsupportedError
from mcore_spec.export.directory import MARKER
from mcore_spec.parallel.layout import Layout
from mcore_spec.weights.hf_config import describe_hf, to_hf_config
from tests.parity.hf_models import TINY_CONFIGS, TinyModel, norm_in_float64, run
from tests.parity.import_cases import describe
from tests.pool import RankPool

EXPORT = "tests.parity.import_cases:export_bases"
# Small enough for several files at every dtype, large enough that some hold several tensors.
MAX_FILE_BYTES = 12_000
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "tp2_pp2": Layout(tensor=2, pipeline=2, last_stage_layers=1),
}
# The features alone suggest a family with other names: stacked weights (Phi-3).
OF_ANOTHER_FAMILY = ("phi3", "phi3_longrope_window")


class StoredTensor(NamedTuple):
    """What a safetensors file says of one tensor."""

    dtype: str
    shape: list[int]
    data: bytes


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of every file, by safetensors' own reader."""
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                view, tensor = file.get_slice(name), file.get_tensor(name)
                assert name not in tensors, f"{name} is in two files"
                data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                tensors[name] = StoredTensor(view.get_dtype(), view.get_shape(), data)
    return tensors


def same_tensors(ours: Path, theirs: Path) -> None:
    """Names, dtypes, shapes and bytes."""
    exported, original = stored_tensors(ours), stored_tensors(theirs)
    assert exported.keys() == original.keys()
    different = [name for name in original if exported[name] != original[name]]
    assert not different, f"{ours.name}: {different} are not what was imported"


@pytest.fixture(scope="module")
def originals(tiny_models: dict[str, TinyModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family in one of the four dtypes, with a tokenizer's files."""
    root = tmp_path_factory.mktemp("originals")
    directories = {}
    for number, (name, tiny) in enumerate(tiny_models.items()):
        directories[name] = tiny.save(root / name, DTYPES[number % len(DTYPES)])
        (root / name / "tokenizer").mkdir()
        (root / name / "tokenizer" / "tokenizer.json").write_text(f'{{"of": "{name}"}}')
    return directories


def _export(rank_pool: RankPool, directories: dict[str, Path], layout: Layout, output: Path, **options: Any) -> Any:
    return rank_pool.run(
        EXPORT,
        world_size=layout.tensor * layout.pipeline,
        layout=layout,
        directories=directories,
        output=output,
        **options,
    )[0]


@pytest.fixture(scope="module")
def exported(
    rank_pool: RankPool, originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every family exported from every layout, in files of few tensors."""
    directories = {}
    for name, layout in LAYOUTS.items():
        directories[name] = tmp_path_factory.mktemp(name) / "exports"
        _export(rank_pool, originals, layout, directories[name], max_file_bytes=MAX_FILE_BYTES)
    return directories


@pytest.mark.parametrize("family", TINY_CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bit_identical(exported: dict[str, Path], originals: dict[str, Path], layout: str, family: str) -> None:
    """Weights, config.json and tokenizer; the index fits the files."""
    ours, theirs = exported[layout] / family, originals[family]
    same_tensors(ours, theirs)
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    assert (ours / "tokenizer.json").read_bytes() == (theirs / "tokenizer" / "tokenizer.json").read_bytes()

    index = json.loads((ours / "model.safetensors.index.json").read_text())
    files = sorted(ours.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    num_bytes = {path.name: 0 for path in files}
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        assert {index["weight_map"][name] for name in names} == {path.name}
        num_bytes[path.name] = sum(len(stored_tensors(theirs)[name].data) for name in names)
        assert num_bytes[path.name] <= MAX_FILE_BYTES or len(names) <= 3, "one row of the table may exceed the size"
    assert index["weight_map"].keys() == stored_tensors(theirs).keys()
    assert index["metadata"]["total_size"] == sum(num_bytes.values())
    assert len(files) > 2
    left = {path.name for path in ours.iterdir()} - {path.name for path in files}
    assert left == {"config.json", "tokenizer.json", "model.safetensors.index.json", MARKER}


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_transformers_loads_it(exported: dict[str, Path], originals: dict[str, Path], family: str) -> None:
    """The files of a pipeline are one model to transformers."""
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()
        for directory in (exported["tp2_pp2"] / family, originals[family])
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_file_where_it_fits(rank_pool: RankPool, originals: dict[str, Path], tmp_path: Path, layout: str) -> None:
    """No index for one stage; one file a stage otherwise."""
    directories = {name: originals[name] for name in ("llama2", "qwen2_tied_window")}
    _export(rank_pool, directories, LAYOUTS[layout], tmp_path / "exports")
    for name, original in directories.items():
        ours = tmp_path / "exports" / name
        same_tensors(ours, original)
        names = {path.name for path in ours.glob("model*")}
        if LAYOUTS[layout].pipeline == 1:
            assert names == {"model.safetensors"}
        else:
            assert names == {
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            }


def test_real_weights(rank_pool: RankPool, demo_base: Path, tmp_path: Path) -> None:
    """SmolLM2, at TP3: bfloat16 as it was."""
    _export(rank_pool, {"demo": demo_base}, Layout(tensor=3), tmp_path / "exports")
    same_tensors(tmp_path / "exports" / "demo", demo_base)


# --- a base that came without a config.json -----------------------------------------------------------


@pytest.fixture(scope="module")
def of_megatron(
    rank_pool: RankPool, tiny_models: dict[str, TinyModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, BaseArchitecture]]:
    """Exports of bases whose family and config.json are not known, and what they were."""
    directories = {name: tiny.directory for name, tiny in tiny_models.items() if name not in OF_ANOTHER_FAMILY}
    output = tmp_path_factory.mktemp("of_megatron") / "exports"
    return output, _export(rank_pool, directories, Layout(pipeline=2), output, as_megatron=True)


@pytest.mark.parametrize("name", [name for name in TINY_CONFIGS if name not in OF_ANOTHER_FAMILY])
def test_a_config_of_our_own(
    of_megatron: tuple[Path, dict[str, BaseArchitecture]], tiny_models: dict[str, TinyModel], name: str
) -> None:
    """`to_hf_config` says what `describe_hf` reads, and transformers computes the same from it."""
    output, architectures = of_megatron
    tiny, architecture = tiny_models[name], architectures[name]
    assert architecture.family == "megatron"
    assert describe(output / name).model_copy(update={"family": "megatron"}) == architecture
    same_tensors(output / name, tiny.directory)
    model = AutoModelForCausalLM.from_pretrained(output / name, dtype="auto", attn_implementation="sdpa")
    norm_in_float64(model)
    for before in tiny.runs:
        assert torch.equal(run(model, before.token_ids).logits, before.logits)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_our_config_round_trips(tiny_models: dict[str, TinyModel], name: str) -> None:
    architecture = describe(tiny_models[name].directory).model_copy(update={"family": "megatron"})
    again = describe_hf(to_hf_config(architecture), where=name)
    assert again.model_copy(update={"family": "megatron"}) == architecture


def test_windows_on_some_layers_of_a_llama_are_refused(tiny_models: dict[str, TinyModel]) -> None:
    base = describe(tiny_models["llama2"].directory)
    base = base.model_copy(
        update={"family": "megatron", "window_size": 7, "windowed_layers": (True, False, True, False)}
    )
    with pytest.raises(UnsupportedError, match="only Qwen windows some layers"):
        to_hf_config(base)
