"""``mcore-spec extract-engine``: hidden states of a base that runs in vLLM or TensorRT-LLM.

Their environments need not have megatron-core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mcore_spec.cli.arguments import DTYPE_NAMES
from mcore_spec.cli.base_limits import choose_layers
from mcore_spec.cli.engine_arguments import ExtractEngineArguments
from mcore_spec.cli.terminal import say
from mcore_spec.data.chat import ChatEncoder, load_tokenizer
from mcore_spec.data.hidden_states.plan import ExtractionPlan, cache_beside
from mcore_spec.data.store import build_token_store
from mcore_spec.engines.extract import EngineSetting, extract
from mcore_spec.engines.final_norm import FinalNorm
from mcore_spec.engines.tensorrt_llm import TensorRtLlmEngine
from mcore_spec.engines.vllm import VllmEngine
from mcore_spec.errors import ConfigError
from mcore_spec.planning.states import STORAGE_DTYPES
from mcore_spec.weights.base_directory import find_base

# Below the store: what an engine wrote and was not read yet.
SCRATCH = ".captured"


def run(arguments: ExtractEngineArguments) -> None:
    """Tokenise, say what it will take, load the engine, extract."""
    base = find_base(arguments.pretrained_model_path)
    output = Path(arguments.output_dir)
    tokenizer = load_tokenizer(base.directory)
    base.architecture.check_seq_length(arguments.seq_length)
    conversations = build_token_store(
        arguments.data_path,
        tokenizer,
        cache_dir=Path(arguments.data_cache_path or cache_beside(output)),
        seq_length=arguments.seq_length,
        on_bad_line=arguments.on_bad_line,
        vocab_size=base.architecture.vocab_size,
    )
    plan = ExtractionPlan(
        architecture=base.architecture,
        identity=base.identity,
        conversations=conversations,
        tokenizer_fingerprint=ChatEncoder(tokenizer).fingerprint(),
        num_documents=min(arguments.num_samples or len(conversations), len(conversations)),
        aux_layer_ids=choose_layers(arguments.aux_layer_ids, base.architecture),
        dtype=STORAGE_DTYPES[arguments.storage_dtype],
        documents=conversations,
    )
    say(f"{output}: {plan.describe_size()}")
    plan.check_bytes(arguments.max_bytes)
    engine = load_engine(
        arguments.engine,
        plan,
        base.directory,
        scratch=output / SCRATCH,
        dtype=DTYPE_NAMES[arguments.params_dtype],
        tensor_parallel_size=arguments.tensor_parallel_size,
    )
    norm = FinalNorm(base) if arguments.norm_last and not engine.last_is_normed else None
    try:
        is_normed = engine.last_is_normed or norm is not None
        description = plan.describe(arguments.engine).model_copy(update={"last_is_normed": is_normed})
        computed = extract(description, plan.documents, engine, output, batch_size=arguments.batch_size, norm=norm)
    finally:
        engine.close()
    normed = "behind" if is_normed else "before"
    say(f"done: {computed:,} conversations added; last states {normed} the final norm; in {output}")


def load_engine(
    name: Literal["vllm", "tensorrt-llm"],
    plan: ExtractionPlan,
    directory: Path,
    *,
    scratch: Path,
    dtype: str,
    tensor_parallel_size: int,
) -> VllmEngine | TensorRtLlmEngine:
    """What runs the base.

    Args:
        name: of the engine.
        plan: what it is to run over.
        directory: of the base.
        scratch: for what it wrote and was not read yet.
        dtype: in which; auto: the weights'.
        tensor_parallel_size: GPUs.

    Raises:
        ConfigError: an engine that is not installed, or conversations that are too long for it.
    """
    base = plan.architecture
    longest = int(plan.documents.lengths[: plan.num_documents].max())
    # An engine samples a token behind each prompt.
    if longest >= base.max_position_embeddings:
        raise ConfigError(
            f"a conversation of {longest} tokens leaves no position for the token that {name} samples "
            f"({base.max_position_embeddings} positions); lower --seq-length by one"
        )
    setting = EngineSetting(
        base=directory,
        aux_layer_ids=plan.aux_layer_ids,
        scratch=scratch,
        max_tokens=longest,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
    )
    if name == "vllm":
        return VllmEngine(setting, num_layers=base.num_layers)
    return TensorRtLlmEngine(setting, hidden_size=base.hidden_size)
