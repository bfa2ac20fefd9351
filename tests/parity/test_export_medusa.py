"""Medusa's heads under FasterDecoding's names, read as TensorRT-LLM, FasterDecoding and vLLM read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.parallel.layout import Layout
from tests.pool import RankPool
from tests.tiny import DRAFT_VOCAB_SIZE, VOCAB_SIZE, draft_to_target, write_hf_model

RANKS = "tests.parallel.medusa_cases"
HIDDEN = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


def as_tensorrt_llm(directory: Path, hidden: Tensor) -> list[Tensor]:
    """Its names of the two numbers; every tensor taken by its name, those of a head counted through."""
    config, tensors = (
        json.loads((directory / "config.json").read_text()),
        load_file(directory / "medusa_lm_head.safetensors"),
    )
    assert config["architectures"] == ["MedusaForCausalLM"]
    num_layers, logits = config["medusa_num_layers"], []
    for head in range(config["num_medusa_heads"]):
        z = hidden
        for layer in range(num_layers):
            z = z + F.silu(
                F.linear(z, tensors.pop(f"{head}.{layer}.linear.weight"), tensors.pop(f"{head}.{layer}.linear.bias"))
            )
        logits.append(F.linear(z, tensors.pop(f"{head}.{num_layers}.weight")))
    assert tensors == {}
    return logits


class ResBlock(nn.Module):
    """FasterDecoding's block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


def as_fasterdecoding(directory: Path, hidden: Tensor) -> list[Tensor]:
    """A list of sequences that takes the file as its state; one block in a head, run for each layer."""
    config = json.loads((directory / "config.json").read_text())
    heads = nn.ModuleList(
        nn.Sequential(
            *([ResBlock()] * config["medusa_num_layers"]), nn.Linear(HIDDEN, config["vocab_size"], bias=False)
        )
        for _ in range(config["medusa_num_heads"])
    ).double()
    heads.load_state_dict(load_file(directory / "medusa_lm_head.safetensors"), strict=True)
    return [head(hidden) for head in heads]


@pytest.mark.parametrize(
    ("export_format", "num_layers", "layout", "world_size"),
    [
        ("tensorrt-llm", 2, Layout(), 1),
        ("tensorrt-llm", 1, Layout(tensor=2, pipeline=2), 4),
        ("fasterdecoding", 1, Layout(), 1),
        ("fasterdecoding", 1, Layout(tensor=2), 2),
    ],
)
@torch.no_grad()
def test_a_reader_computes_what_the_module_does(
    export_format: str,
    num_layers: int,
    layout: Layout,
    world_size: int,
    base: Path,
    rank_pool: RankPool,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "export"
    results = rank_pool.run(
        f"{RANKS}:export_heads",
        world_size=world_size,
        base=base,
        directory=directory,
        layout=layout,
        config={"medusa_num_heads": 3, "medusa_num_layers": num_layers},
        export_format=export_format,
    )
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md",
        "config.json",
        "mcore_spec_export.json",
        "medusa_lm_head.safetensors",
        "model.safetensors.index.json",
    ]
    read = as_tensorrt_llm if export_format == "tensorrt-llm" else as_fasterdecoding
    for result in results:
        if result is None:
            continue
        found = read(directory, result.hidden)
        assert len(found) == len(result.logits) == 3
        for ours, theirs, back in zip(result.logits, found, result.read, strict=True):
            assert theirs.shape == (12, VOCAB_SIZE)
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)
            assert torch.equal(back, ours)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == load_file(directory / "medusa_lm_head.safetensors").keys()
    card = (directory / "README.md").read_text()
    assert "--num_medusa_heads 3" in card if export_format == "tensorrt-llm" else "medusa_lm_head.pt" in card


@pytest.mark.parametrize(
    ("mode", "export_format", "parts"),
    [
        (
            [("medusa", {"draft_vocab_size": DRAFT_VOCAB_SIZE})],
            "tensorrt-llm",
            ("draft_vocab_size = 37", "know no draft vocabulary", "choose hf, or convert without one"),
        ),
        (
            [("medusa", {"medusa_num_layers": 2})],
            "fasterdecoding",
            ("medusa_num_layers = 2", "runs it that many times", "choose hf or tensorrt-llm"),
        ),
        (
            "medusa",
            "speculators",
            ("export_format = 'speculators'", "Medusa", "choose hf or tensorrt-llm or fasterdecoding"),
        ),
        ([("eagle", {})], "tensorrt-llm", ("export_format = 'tensorrt-llm'", "EAGLE-3", "choose hf or speculators")),
        (
            [("eagle", {})],
            "fasterdecoding",
            ("export_format = 'fasterdecoding'", "EAGLE-3", "choose hf or speculators"),
        ),
    ],
)
def test_what_would_not_serve_is_refused(
    mode: object, export_format: str, parts: tuple[str, ...], base: Path, rank_pool: RankPool, tmp_path: Path
) -> None:
    (message,) = rank_pool.run(
        "tests.parity.export_cases:refused_export",
        world_size=1,
        base_directory=base,
        directory=tmp_path / "export",
        layout=Layout(),
        mode=mode,
        d2t=draft_to_target() if "draft_vocab_size" in str(mode) else None,
        damage="none",
        export_format=export_format,
    )
    assert [part for part in parts if part not in message] == [], message
    assert list(tmp_path.iterdir()) == []
