"""``mcore-spec extract-hf``: the same with a transformers model, a whole one on each data-parallel rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from mcore_spec.bases.extraction import DataShare
from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.cli.arguments import DTYPE_NAMES
from mcore_spec.cli.conversations import read_conversations
from mcore_spec.cli.extract import cache_of, extract, make_plan
from mcore_spec.cli.extract_arguments import ExtractHfArguments
from mcore_spec.parallel.layout import Layout, device, parallel_runtime, run_on_rank_zero
from mcore_spec.weights.base_directory import find_base


def run(arguments: ExtractHfArguments) -> None:
    """Tokenise, say what it will take, load the base, extract."""
    with parallel_runtime(Layout()):
        directory, base, identity, _ = run_on_rank_zero(lambda: find_base(arguments.pretrained_model_path))
        store = read_conversations(arguments, base, directory, cache_dir=cache_of(arguments))
        plan = make_plan(arguments, base, identity, store, directory, own_layers=None)
        model = load_model(directory, DTYPE_NAMES[arguments.params_dtype], target=device())
        share = DataShare(rank=dist.get_rank(), size=dist.get_world_size(), context_group=None, device=device())
        extract(model, plan, arguments, backend="transformers", share=share)


def load_model(directory: Path, dtype: str, *, target: torch.device) -> TransformersBase:
    """The model as a base.

    Args:
        directory: Hugging Face's files.
        dtype: of the weights; auto: as stored.
        target: where it runs.

    Raises:
        UnsupportedError: a model that cannot carry a draft.
    """
    wanted = dtype if dtype == "auto" else vars(torch)[dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=wanted)
    model.to(target)
    return TransformersBase(model)
