"""A layout as numbers: how many ranks share what, and what has to divide."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_spec.config import BaseArchitecture
from mcore_spec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlannedLayout:
    """How a model is cut over GPUs.

    Attributes:
        tensor: ranks that share each layer.
        pipeline: stages.
        context: ranks that share the rows of each sequence.
        data: copies of all that, which see other samples.
        sequence_parallel: the sequence is cut over the tensor-parallel ranks between parallel regions.
        last_stage_layers: decoder layers of the last stage; ``None``: an even split.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    last_stage_layers: int | None = None

    @property
    def num_model_gpus(self) -> int:
        """GPUs that hold one copy."""
        return self.tensor * self.pipeline * self.context

    @property
    def num_gpus(self) -> int:
        """All GPUs."""
        return self.num_model_gpus * self.data

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """Decoder layers of each stage; the split must have been checked."""
        if self.last_stage_layers is None:
            return [num_layers // self.pipeline] * self.pipeline
        others = (num_layers - self.last_stage_layers) // (self.pipeline - 1)
        return [others] * (self.pipeline - 1) + [self.last_stage_layers]


def check_divides(base: BaseArchitecture, *, tensor: int, pipeline: int, last_stage_layers: int | None) -> None:
    """Refuse sizes that do not divide the base.

    Raises:
        ConfigError: names the size that does not divide.
    """
    sizes = {
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": base.num_key_value_heads,
        "intermediate_size": base.intermediate_size,
    }
    for field, value in sizes.items():
        if value % tensor:
            raise ConfigError(
                f"tensor_model_parallel_size = {tensor} does not divide the base's {field} = {value}; "
                "choose a size that divides it"
            )
    layers, last = base.num_layers, last_stage_layers
    rest, rest_stages = (layers, pipeline) if last is None else (layers - last, pipeline - 1)
    if last is not None and (pipeline == 1 or not 0 < last < layers):
        raise ConfigError(
            f"decoder_last_pipeline_num_layers = {last} needs pipeline_model_parallel_size > 1 and 0 < it < "
            f"{layers}, the base's layers; got {pipeline} stages"
        )
    if rest % rest_stages or rest < rest_stages:
        raise ConfigError(
            f"pipeline_model_parallel_size = {pipeline} does not divide {rest} decoder layers over {rest_stages} "
            "stages; choose another size, or give decoder_last_pipeline_num_layers"
        )


def padded(num: int, tensor: int) -> int:
    """`num` rounded up to a multiple of the tensor-parallel size, as vocabularies are."""
    return -(-num // tensor) * tensor
