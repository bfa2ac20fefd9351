"""``mcore-spec extract-engine``: hidden states of a base that runs in transformers, vLLM or TensorRT-LLM.

vLLM's environment need not have megatron-core.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_spec.cli.arguments import DTYPE_NAMES
from mcore_spec.cli.engine_arguments import ExtractEngineArguments
from mcore_spec.cli.hidden_states import STORAGE
from mcore_spec.cli.terminal import say
from mcore_spec.config import EagleArchitectureConfig
from mcore_spec.data.chat import ChatEncoder, load_tokenizer
from mcore_spec.data.store import build_token_store
from mcore_spec.drafts.resolve import resolve_aux_layers
from mcore_spec.engines.extract import Plan, check_bytes, extract
from mcore_spec.engines.final_norm import FinalNorm
from mcore_spec.engines.tensorrt_llm import TensorRtLlmEngine
from mcore_spec.engines.vllm import VllmEngine
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.weights.base_directory import BaseDirectory, find_base

if TYPE_CHECKING:
    from mcore_spec.engines.transformers import TransformersEngine

# Below the store: what an engine wrote and was not read yet.
_SCRATCH = ".captured"


def run(arguments: ExtractEngineArguments) -> None:
    """Tokenise, say what it will take, load the engine, extract; under torchrun the ranks share the conversations."""
    with ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if arguments.engine != "transformers":
                raise ConfigError(
                    f"--engine {arguments.engine} starts its own processes: run it without torchrun, and give "
                    "--tensor-parallel-size"
                )
            stack.enter_context(parallel_runtime(Layout()))
        _extract(arguments)


def _extract(arguments: ExtractEngineArguments) -> None:
    base = find_base(arguments.pretrained_model_path)
    output = Path(arguments.output_dir)
    plan = make_plan(arguments, base, output)
    check_bytes(plan, max_bytes=arguments.max_bytes)
    say(
        f"{plan.num_documents:,} conversations, {plan.num_tokens:,} tokens, aux layers "
        f"{', '.join(map(str, plan.aux_layer_ids))} (0-based, by output): {plan.num_bytes:,} bytes in {output}"
    )
    engine = load_engine(
        arguments.engine,
        plan,
        dtype=DTYPE_NAMES[arguments.params_dtype],
        norm_last=arguments.norm_last,
        tensor_parallel_size=arguments.tensor_parallel_size,
    )
    norm = FinalNorm(base) if arguments.norm_last and not engine.last_is_normed else None
    try:
        computed = extract(plan, engine, backend=arguments.engine, batch_size=arguments.batch_size, norm=norm)
    finally:
        engine.close()
    normed = "behind" if norm is not None or engine.last_is_normed else "before"
    say(f"computed {computed:,} on this rank; last states {normed} the final norm; wrote {output}")


def make_plan(arguments: ExtractEngineArguments, base: BaseDirectory, output: Path) -> Plan:
    """Conversations and layers.

    Raises:
        ConfigError: conversations or layers that do not fit.
    """
    architecture = base.architecture
    wanted = EagleArchitectureConfig(eagle_aux_hidden_state_layer_ids=arguments.aux_layer_ids)
    aux_layer_ids = resolve_aux_layers(wanted, architecture)
    if list(aux_layer_ids) != sorted(set(aux_layer_ids)):
        raise ConfigError(f"--aux-layer-ids {list(aux_layer_ids)}: give different layers, ascending")
    if arguments.seq_length > architecture.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {arguments.seq_length} is above the base's {architecture.max_position_embeddings} "
            "positions; lower it"
        )
    tokenizer = load_tokenizer(base.directory)
    cache = arguments.data_cache_path or str(output.with_name(f"{output.name}.data_cache"))
    store = build_token_store(
        arguments.data_path,
        tokenizer,
        cache_dir=Path(cache),
        seq_length=arguments.seq_length,
        on_bad_line=arguments.on_bad_line,
        vocab_size=architecture.vocab_size,
    )
    return Plan(
        base=base,
        store=store,
        tokenizer_fingerprint=ChatEncoder(tokenizer).fingerprint(),
        num_documents=min(arguments.num_samples or len(store), len(store)),
        aux_layer_ids=aux_layer_ids,
        dtype=STORAGE[arguments.storage_dtype],
        output=output,
    )


def load_engine(
    name: str, plan: Plan, *, dtype: str, norm_last: bool, tensor_parallel_size: int = 1
) -> TransformersEngine | VllmEngine | TensorRtLlmEngine:
    """What runs the base.

    Args:
        name: transformers, vllm or tensorrt-llm.
        plan: what it is to run over.
        dtype: in which; auto: the weights'.
        norm_last: whether last states are wanted behind the final norm, where the engine can choose.
        tensor_parallel_size: GPUs.

    Raises:
        ConfigError: an engine that is not installed, or conversations that are too long for it.
    """
    base = plan.base.architecture
    if name == "transformers":
        if tensor_parallel_size != 1:
            raise ConfigError("--tensor-parallel-size: transformers runs on one device; choose vllm, or leave it out")
        # transformers is imported where it is asked for: vLLM's workers have no need of it.
        from mcore_spec.engines.transformers import TransformersEngine

        return TransformersEngine(
            plan.base.directory,
            num_layers=base.num_layers,
            aux_layer_ids=plan.aux_layer_ids,
            norm_last=norm_last,
            dtype=dtype,
        )
    # Other engines sample a token behind each prompt.
    if plan.longest >= base.max_position_embeddings:
        raise ConfigError(
            f"a conversation of {plan.longest} tokens leaves no position for the token that {name} samples "
            f"({base.max_position_embeddings} positions); lower --seq-length by one"
        )
    scratch = plan.output / _SCRATCH
    if name == "vllm":
        return VllmEngine(
            plan.base.directory,
            num_layers=base.num_layers,
            aux_layer_ids=plan.aux_layer_ids,
            scratch=scratch,
            max_tokens=plan.longest,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
        )
    return TensorRtLlmEngine(
        plan.base.directory,
        hidden_size=base.hidden_size,
        aux_layer_ids=plan.aux_layer_ids,
        scratch=scratch,
        max_tokens=plan.longest,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
    )
