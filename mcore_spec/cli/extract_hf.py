"""``mcore-spec extract-hf``: the same with a transformers model, a whole one on each data-parallel rank."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from mcore_spec.bases.extraction import DataShare
from mcore_spec.bases.transformers import load_base
from mcore_spec.cli.arguments import DTYPE_NAMES
from mcore_spec.cli.conversations import read_conversations
from mcore_spec.cli.extract import extract, make_plan
from mcore_spec.cli.extract_arguments import ExtractHfArguments
from mcore_spec.data.hidden_states.plan import cache_beside
from mcore_spec.parallel.layout import Layout, device, parallel_runtime, run_on_rank_zero
from mcore_spec.weights.base_directory import find_base


def run(arguments: ExtractHfArguments) -> None:
    """Tokenise, say what it will take, load the base, extract."""
    with parallel_runtime(Layout()):
        directory, base, identity, _ = run_on_rank_zero(lambda: find_base(arguments.pretrained_model_path))
        store = read_conversations(arguments, base, directory, cache_dir=cache_beside(Path(arguments.output_dir)))
        plan = make_plan(arguments, base, identity, store, directory, own_layers=None)
        model = load_base(directory, DTYPE_NAMES[arguments.params_dtype], device=device())
        share = DataShare(rank=dist.get_rank(), size=dist.get_world_size(), context_group=None, device=device())
        extract(model, plan, arguments, backend="transformers", share=share)
