"""What ``hidden-states`` takes. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mcore_spec.config import StrictConfig
from mcore_spec.planning.states import StorageName

OWN: Literal["mcore-spec"] = "mcore-spec"
StatesForm = Literal["mcore-spec", "modelopt", "speculators-v1", "speculators"]


class HiddenStatesArguments(StrictConfig):
    """Which store is read, which is written, and what neither says."""

    from_form: StatesForm = Field(description="The form of --input-dir.")
    to_form: StatesForm = Field(description="The form of --output-dir.")
    input_dir: str = Field(min_length=1, description="The store that is read.")
    output_dir: str = Field(min_length=1, description="The store that is written; it must not be there yet.")
    base: str | None = Field(
        None,
        min_length=1,
        description="Hugging Face directory or hub id of the base model. Needed where the result is mcore-spec's, for "
        "--norm-last, and for speculators-v1, whose files number the last layer.",
    )
    aux_layer_ids: tuple[int, ...] = Field(
        (),
        description="Layers of the aux states, ascending, 0-based by output, where the files do not say (modelopt, "
        "speculators). Ids of vLLM and speculators are one higher.",
    )
    layer_id_convention: Literal["boundary", "output"] | None = Field(
        None, description="How data_config.json numbers layers, where it does not say (speculators-v1)."
    )
    last_is_normed: bool | None = Field(
        None, description="Whether the last state went through the final norm, where the files do not say."
    )
    counts_all_tokens: bool = Field(False, description="Files without a loss mask are learnt from whole (modelopt).")
    norm_last: bool = Field(False, description="Send the last state through the final norm of --base.")
    storage_dtype: StorageName | None = Field(
        None, description="Dtype of the result. Default: that of the input, float32 for float16 and eight bits."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.from_form == OWN:
            said = [name for name in ("layer_id_convention", "last_is_normed") if self.__dict__[name] is not None]
            said += ["aux_layer_ids"] * bool(self.aux_layer_ids) + ["counts_all_tokens"] * self.counts_all_tokens
            if said:
                raise ValueError(f"mcore-spec's store says {', '.join(said)} itself; leave it out")
        if self.to_form != OWN and self.storage_dtype == "fp8":
            raise ValueError("storage_dtype = fp8 is mcore-spec's own; choose bf16")
        needs_base = self.norm_last or self.to_form == "speculators-v1" or OWN == self.to_form != self.from_form
        if self.base is None and needs_base:
            raise ValueError("base must be given: the base model whose hidden states these are")
        return self
