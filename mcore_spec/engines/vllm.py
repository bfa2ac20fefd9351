"""vLLM as what runs the base: its hidden-state extraction (`extract_hidden_states`), tried with 0.32.

vLLM counts boundaries: state i is what enters layer i, and state L (the number of layers) is what leaves the last
one. All stand before the final norm. A prompt's states are kept in a cache of their own beside keys and values,
and handed to a connector in the step after the one in which the request ended, behind one sampled token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mcore_spec.data.foreign_states.form import to_boundary_ids
from mcore_spec.data.foreign_states.speculators_hs import read_captured
from mcore_spec.engines.extract import Captured, EngineSetting
from mcore_spec.errors import ConfigError

_CONNECTOR_MODULE, _CONNECTOR = "mcore_spec.engines.vllm_connector", "StatesConnector"
_POLL_S = 0.01
HOW = (
    "vLLM is not importable here: run this with an interpreter that has it and this package on PYTHONPATH "
    "(`bash tools/vllm_environment.sh` makes one on a machine without a GPU)"
)


def wait_for(path: Path, *, timeout_s: float = 600.0) -> Path:
    """`path`, when it is there: vLLM says that a request ended one step before its states are written.

    Raises:
        ConfigError: it did not come.
    """
    end = time.monotonic() + timeout_s
    while not path.is_file():
        if time.monotonic() > end:
            raise ConfigError(
                f"vLLM did not write {path} within {timeout_s:g} s; see its log, and the space on the disk"
            )
        time.sleep(_POLL_S)
    return path


class VllmEngine:
    """A vLLM engine that gives hidden states of prompts.

    Attributes:
        last_is_normed: they stand before the final norm.
    """

    last_is_normed = False

    def __init__(self, setting: EngineSetting, *, num_layers: int) -> None:
        """Load the base.

        Args:
            setting: base, layers and scratch directory, which is emptied now.
            num_layers: of the base.

        Raises:
            ConfigError: vLLM is not installed.
        """
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ConfigError(f"{HOW} ({error})") from error
        self._setting = setting
        setting.empty_scratch()
        self._sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        # The last layer may be an aux layer too; it is kept once.
        states = sorted({*to_boundary_ids(setting.aux_layer_ids), num_layers})
        self._engine: Any = LLM(
            model=str(setting.base),
            dtype=setting.dtype,
            tensor_parallel_size=setting.tensor_parallel_size,
            enforce_eager=True,
            # One more for the token that ends the request.
            max_model_len=setting.max_tokens + 1,
            # A prefix that is taken from the cache would not run through the layers.
            enable_prefix_caching=False,
            speculative_config={
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": states}},
            },
            kv_transfer_config={
                "kv_connector": _CONNECTOR,
                "kv_connector_module_path": _CONNECTOR_MODULE,
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {
                    "shared_storage_path": str(setting.scratch.resolve()),
                    # A file takes its name when it is whole.
                    "use_synchronization_lock": False,
                },
            },
        )

    def capture(self, conversations: Sequence[list[int]]) -> Iterator[Captured]:
        """See `Engine`."""
        prompts = [{"prompt_token_ids": token_ids} for token_ids in conversations]
        outputs = self._engine.generate(prompts, self._sampling, use_tqdm=False)
        for token_ids, output in zip(conversations, outputs, strict=True):
            path = Path((output.kv_transfer_params or {}).get("hidden_states_path", ""))
            captured = read_captured(wait_for(path))
            if captured.token_ids.tolist() != token_ids:
                raise ConfigError(f"vLLM returned states of other tokens than it was given ({path}); see its log")
            states = captured.hidden_states
            yield Captured(states[:, : len(self._setting.aux_layer_ids)], states[:, -1])
            path.unlink()

    def close(self) -> None:
        """Remove the scratch directory."""
        self._setting.remove_scratch()
