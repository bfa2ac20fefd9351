"""What a store of hidden states says about its contents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mcore_spec.config import StrictConfig
from mcore_spec.errors import CheckpointError
from mcore_spec.planning.states import StatesDtype, StatesSize


class StoreDescription(StrictConfig):
    """Whose hidden states they are, of which conversations, and how they are kept.

    `format_version` is raised whenever the files or their meaning change.
    """

    format_version: Literal[1] = 1
    source: str = Field(description="Directory or hub id of the base, as its checkpoint records it.")
    base_fingerprint: str = Field(description="Of the base's weights: `BaseIdentity.fingerprint`.")
    backend: Literal["megatron", "transformers", "vllm", "tensorrt-llm", "foreign"] = Field(
        description="What ran the base; foreign: another tool wrote them."
    )
    tokenizer_fingerprint: str = Field(description="Of tokenizer and chat template: `ChatEncoder.fingerprint`.")
    conversation_fingerprint: str = Field(description="Of the token ids and masks: `TokenStore.fingerprint`.")
    num_documents: int = Field(ge=1, description="Conversations.")
    seq_length: int = Field(ge=1, description="Tokens of a conversation at most.")
    vocab_size: int = Field(ge=1, description="Entries of the base's vocabulary, without padding.")
    hidden_size: int = Field(ge=1, description="Width of a hidden state, h.")
    aux_layer_ids: tuple[int, ...] = Field(
        description="Layers whose outputs are kept, ascending: 0-based, by output, so that layer i is what leaves the "
        "i-th decoder layer. vLLM's and speculators' boundary id of it is i + 1."
    )
    last_is_normed: bool = Field(description="Whether the last layer's output went through the final norm.")
    dtype: StatesDtype = Field(description="Of the states; float8_e4m3fn has a float32 scale for each token and layer.")
    drops_tail: bool = Field(
        False, description="Whether each conversation ends with the last token that the model must produce."
    )

    @field_validator("aux_layer_ids")
    @classmethod
    def _check_layers(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or (value and value[0] < 0):
            raise ValueError("must be different layers from 0, ascending")
        return value

    @property
    def size(self) -> StatesSize:
        """What a token takes."""
        return StatesSize(self.hidden_size, len(self.aux_layer_ids), self.dtype)

    def check_same(self, wanted: StoreDescription, *, where: str) -> None:
        """Refuse to go on with a store of something else.

        Args:
            wanted: what is about to be written.
            where: the store, for the error.

        Raises:
            CheckpointError: names the first field that differs and both values.
        """
        # Where the base lay is no property of its weights.
        for name in sorted(type(self).model_fields.keys() - {"source"}):
            here, there = self.model_dump()[name], wanted.model_dump()[name]
            if here != there:
                raise CheckpointError(
                    f"{where} was begun with {name} = {here!r}, now it is {there!r}; give the same to go on with it, "
                    "or choose another directory"
                )
