"""What ``quantize`` takes. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mcore_spec.cli.arguments import OneOf, ParallelArguments
from mcore_spec.config import StrictConfig
from mcore_spec.config.quantization import KV_CACHE_FP8, RECIPES, CalibrationMethod, Recipe, find_recipe


def _recipes() -> list[str]:
    return list(RECIPES)


class CalibrationArguments(StrictConfig):
    """The conversations on which scales of activations are found."""

    calib_data: tuple[str, ...] = Field(
        (),
        description="Conversations: .jsonl, .json or .parquet (also .gz), or a Hugging Face dataset. May be repeated. "
        "Default: none, for recipes whose scales are computed anew for each activation.",
    )
    calib_size: int = Field(512, ge=1, description="Conversations at most, from the first.")
    calib_method: CalibrationMethod = Field(
        "max",
        description="max: scales cut nothing off. percentile: all but a ten-thousandth of the values is kept. mse: the "
        "cut with the least squared error.",
    )
    seq_length: int = Field(2048, ge=8, description="Tokens of a conversation; longer ones are truncated.")
    data_cache_path: str | None = Field(
        None, description="Directory of the tokenised conversations. Default: data_cache in --save."
    )
    on_bad_line: Literal["error", "skip"] = Field("error", description="What to do about a line that cannot be read.")
    tokenizer_model: str | None = Field(
        None, description="Directory or hub id of the tokenizer. Default: the one in --load."
    )


class QuantizeArguments(ParallelArguments, CalibrationArguments):
    """What is quantised, how, and where the result goes."""

    load: str = Field(min_length=1, description="Megatron-core checkpoint, with a draft or without.")
    ckpt_step: int | None = Field(None, ge=0, description="Iteration of --load. Default: the newest.")
    save: str = Field(min_length=1, description="Directory of the quantised checkpoint to write.")
    export_quant_cfg: Annotated[str, OneOf(_recipes)] = Field(
        description="Recipe. fp8: one scale a weight and activation; fp8_per_channel: a scale for each output and each "
        "token; fp8_blockwise: for 128 x 128 numbers of weights and 128 of activations; int8_per_channel; "
        "int4_per_channel: for experiments, no engine's."
    )
    export_kv_cache_quant: Literal["none", "fp8"] = Field("none", description="Quantise keys and values too.")
    quant_include: tuple[str, ...] = Field(
        ("*",), description="Patterns of linear maps to quantise, such as 'decoder.*'. May be repeated."
    )
    quant_exclude: tuple[str, ...] = Field(
        (),
        description="Patterns of linear maps to leave alone, such as 'eagle_module.fc'. May be repeated. Heads, "
        "embeddings and routers always are.",
    )

    @model_validator(mode="after")
    def _check_calibration(self) -> Self:
        needs_data = self.recipe().is_calibrated
        if needs_data and not self.calib_data:
            raise ValueError(
                f"--export-quant-cfg {self.export_quant_cfg} --export-kv-cache-quant {self.export_kv_cache_quant} has "
                "scales of activations: give --calib-data"
            )
        if not needs_data and self.model_fields_set & CalibrationArguments.model_fields.keys():
            raise ValueError(
                f"--export-quant-cfg {self.export_quant_cfg} computes its scales anew for each activation: drop "
                "--calib-data and the options of conversations"
            )
        return self

    def recipe(self) -> Recipe:
        """The recipe with the patterns, and keys and values where they are asked for."""
        recipe = find_recipe(self.export_quant_cfg)
        kv_cache = None if self.export_kv_cache_quant == "none" else KV_CACHE_FP8
        return recipe.model_copy(
            update={"kv_cache": kv_cache, "include": self.quant_include, "exclude": self.quant_exclude}
        )
