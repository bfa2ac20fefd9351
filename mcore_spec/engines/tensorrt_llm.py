"""TensorRT-LLM as what runs the base: its `SaveHiddenStatesDecodingConfig` (PyTorch backend, 1.0 and later).

Written against TensorRT-LLM's sources (`_torch/speculative/save_hidden_state.py`, `llmapi/llm_args.py`), which need an
NVIDIA GPU; not run. TensorRT-LLM numbers layers by output, as this package does, and its `hidden_state` is the last
layer's output behind the final norm. Each request leaves a file of a list with one dictionary: `input_ids`,
`hidden_state` [n, h], `aux_hidden_states` [n, layers * h]. It takes states from the front of a buffer, so that one
request may run at a time, in one piece, and nothing of it may come from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mcore_spec.data.foreign_states.form import FLOATS, numbered_files, take_tensor
from mcore_spec.data.torch_files import UnreadableFile, read_torch_file
from mcore_spec.engines.extract import Captured, EngineSetting
from mcore_spec.errors import ConfigError

HOW = (
    "TensorRT-LLM is not importable here: it needs Linux, an NVIDIA GPU with CUDA, and `pip install tensorrt-llm` 1.0 "
    "or later (or NVIDIA's container nvcr.io/nvidia/tensorrt-llm/release); with this package on PYTHONPATH"
)
_PREFIX = "captured"


class TensorRtLlmEngine:
    """A TensorRT-LLM engine that gives hidden states of prompts.

    Attributes:
        last_is_normed: they stand behind the final norm.
    """

    last_is_normed = True

    def __init__(self, setting: EngineSetting, *, hidden_size: int) -> None:
        """Load the base.

        Args:
            setting: base, layers and scratch directory, which is emptied now.
            hidden_size: h.

        Raises:
            ConfigError: TensorRT-LLM is not installed.
        """
        try:
            from tensorrt_llm import LLM, SamplingParams
            from tensorrt_llm.llmapi import KvCacheConfig, SaveHiddenStatesDecodingConfig
        except ImportError as error:
            raise ConfigError(f"{HOW} ({error})") from error
        self._shape = (len(setting.aux_layer_ids), hidden_size)
        self._setting = setting
        setting.empty_scratch()
        self._sampling = SamplingParams(max_tokens=1, temperature=0)
        self._engine: Any = LLM(
            model=str(setting.base),
            dtype=setting.dtype,
            tensor_parallel_size=setting.tensor_parallel_size,
            attn_backend="TRTLLM",
            max_batch_size=1,
            max_num_tokens=setting.max_tokens + 1,
            max_seq_len=setting.max_tokens + 1,
            enable_chunked_prefill=False,
            cuda_graph_config=None,
            kv_cache_config=KvCacheConfig(enable_block_reuse=False, free_gpu_memory_fraction=0.5),
            speculative_config=SaveHiddenStatesDecodingConfig(
                output_directory=str(setting.scratch.resolve()),
                write_interval=1,
                file_prefix=_PREFIX,
                eagle3_layers_to_capture=set(setting.aux_layer_ids),
            ),
        )

    def capture(self, conversations: Sequence[list[int]]) -> Iterator[Captured]:
        """See `Engine`."""
        for token_ids in conversations:
            self._engine.generate([token_ids], self._sampling, use_tqdm=False)
            (path,) = numbered_files(self._setting.scratch, f"{_PREFIX}_*.pt")
            yield read_dump(path, token_ids, shape=self._shape)
            path.unlink()

    def close(self) -> None:
        """Let go of the GPUs and remove the scratch directory."""
        self._engine.shutdown()
        self._setting.remove_scratch()


def read_dump(path: Path, token_ids: list[int], *, shape: tuple[int, int]) -> Captured:
    """A file that TensorRT-LLM wrote for one request.

    Args:
        path: the file.
        token_ids: of the request.
        shape: aux layers and hidden size.

    Raises:
        ConfigError: it is damaged, of another request, or of another shape.
    """
    try:
        entries = read_torch_file(path)
    except UnreadableFile as error:
        raise ConfigError(f"{path} cannot be read ({error}); see TensorRT-LLM's log") from error
    if not isinstance(entries, list) or len(entries) != 1:
        raise ConfigError(f"{path} does not hold the states of one request; this version of TensorRT-LLM is not known")
    values = entries[0]
    found = take_tensor(values, "input_ids", where=path, ndim=1, kinds=(torch.int64, torch.int32)).tolist()
    # Some versions count the sampled token in.
    if found[: len(token_ids)] != token_ids:
        raise ConfigError(f"{path} holds states of other tokens than were given; see TensorRT-LLM's log")
    rows = slice(len(token_ids))
    last = take_tensor(values, "hidden_state", where=path, ndim=2, kinds=FLOATS)[rows]
    aux = take_tensor(values, "aux_hidden_states", where=path, ndim=2, kinds=FLOATS)[rows]
    layers, width = shape
    if last.shape != (len(token_ids), width) or aux.shape != (len(token_ids), layers * width):
        raise ConfigError(
            f"{path}: states of shapes {list(last.shape)} and {list(aux.shape)} for {len(token_ids)} tokens, {layers} "
            f"aux layers and hidden size {width}; this version of TensorRT-LLM is not known"
        )
    return Captured(aux.unflatten(1, (layers, width)), last)
