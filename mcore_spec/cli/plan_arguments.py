"""What ``plan`` takes. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mcore_spec.cli.arguments import MachineArguments, OneOf, ParallelArguments, flag_of
from mcore_spec.config import EagleAlgorithm
from mcore_spec.planning.shapes import known_shapes


class PlanArguments(ParallelArguments, MachineArguments):
    """Base, draft and batch."""

    pretrained_model_path: Path | None = Field(
        None, description="Hugging Face directory of the base, or its config.json. Either this or --model-shape."
    )
    model_shape: Annotated[str, OneOf(known_shapes)] | None = Field(
        None, description=f"A base whose sizes are known: {', '.join(known_shapes())}. Or --pretrained-model-path."
    )
    export_eagle_algorithm: EagleAlgorithm = Field("eagle3", description="Kind of draft.")
    algorithm_config: Path | None = Field(None, description="JSON file with the draft's configuration, as for convert.")
    eagle_config: Path | None = Field(None, description="The same as --algorithm-config, by ModelOpt's name.")
    draft_vocab_size: int | None = Field(
        None, ge=1, description="Entries of the draft vocabulary. Default: the configuration's, or the base's."
    )
    context_parallel_size: int = Field(1, ge=1, description="Ranks that share the rows of each sequence.")
    seq_length: int = Field(2048, ge=8, description="Tokens in a sample.")
    micro_batch_size: int = Field(1, ge=1, description="Samples in one forward pass of a data-parallel rank.")
    global_batch_size: int | None = Field(
        None, ge=1, description="Samples in one optimizer step. Default: one micro-batch from each data-parallel rank."
    )
    bf16: bool = Field(True, description="Compute in bfloat16 with float32 main weights; without it in float32.")
    recompute_granularity: Literal["none", "draft"] = Field(
        "none", description="draft: forget the activations of the draft's steps and compute them again backward."
    )
    use_distributed_optimizer: bool = Field(True, description="Shard the optimizer over the data-parallel ranks.")
    num_tokens: int | None = Field(
        None, ge=1, description="Tokens of the conversations, for the size of a store of hidden states."
    )
    find_layout: bool = Field(
        False, description="Look for the smallest layout that fits; the layout's own options are then left out."
    )
    gpus_per_node: int = Field(8, ge=1, description="GPUs that are connected closely; for --find-layout.")

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if (self.pretrained_model_path is None) == (self.model_shape is None):
            given = "neither is" if self.model_shape is None else "both are"
            raise ValueError(f"give either --pretrained-model-path or --model-shape: {given} given")
        if self.eagle_config is not None and self.algorithm_config is not None:
            raise ValueError("--eagle-config and --algorithm-config are two names of one option: keep one")
        layout = {"num_gpus", "context_parallel_size", *ParallelArguments.model_fields} - {"transformer_impl"}
        ignored = sorted(layout & self.model_fields_set)
        if self.find_layout and ignored:
            flags = ", ".join(flag_of(name) for name in ignored)
            raise ValueError(
                f"{flags} would be ignored with --find-layout, which chooses the layout: drop one of the two"
            )
        if not self.find_layout and "gpus_per_node" in self.model_fields_set:
            raise ValueError("--gpus-per-node is for --find-layout, which is not given: drop it")
        return self
