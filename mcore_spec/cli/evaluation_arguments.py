"""What ``validate`` and ``generate`` take: a base with its draft, and how they decode. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from mcore_spec.cli.arguments import ParallelArguments, ParamsDtype
from mcore_spec.config import StrictConfig


class DraftedBaseArguments(StrictConfig):
    """The base model and its draft."""

    load: str | None = Field(
        None, min_length=1, description="Megatron-core checkpoint with the draft. Either this, or --base and --draft."
    )
    ckpt_step: int | None = Field(None, ge=0, description="Iteration of --load. Default: the newest.")
    base: str | None = Field(None, min_length=1, description="Hugging Face directory or hub id of the base model.")
    draft: str | None = Field(None, min_length=1, description="Directory of a draft that export wrote.")
    params_dtype: ParamsDtype = Field("auto", description="Dtype of the weights; auto: as stored.")
    tokenizer_model: str | None = Field(
        None, description="Directory or hub id of the tokenizer. Default: the one in --load or --base."
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.load is not None and (self.base is not None or self.draft is not None):
            raise ValueError("--load has base and draft in it: drop it, or drop --base and --draft")
        if self.load is None and (self.base is None or self.draft is None):
            raise ValueError("give --load, or --base and --draft")
        if self.ckpt_step is not None and self.load is None:
            raise ValueError("--ckpt-step chooses an iteration of --load, which is not given: drop it")
        return self


class DecodingArguments(StrictConfig):
    """Speculative decoding."""

    steps: int = Field(3, ge=1, description="Tokens that the draft proposes, one behind the other.")
    top_k: int = Field(
        1, ge=1, description="Proposals at each step, the likeliest of which is gone on from; above 1 they are a tree."
    )
    tree: str | None = Field(
        None, description="A static tree instead of --steps: paths of ranks, such as '0 1 0,0 0,1 0,0,0'."
    )
    osl: int = Field(128, ge=1, description="Most new tokens of an answer.")
    temperature: float = Field(0.0, ge=0, description="Of sampling; 0: always the likeliest token.")
    seed: int = Field(1234, ge=0, description="Seed of sampling.")
    acceptance: Literal["exact", "typical"] = Field(
        "exact",
        description="exact: answers are the base's. typical (Medusa's paper): proposals that the base finds likely "
        "enough at --temperature are kept too; answers are other ones.",
    )
    typical_epsilon: float = Field(0.09, gt=0, le=1, description="Probability that is always enough (typical).")
    typical_delta: float = Field(
        0.3, gt=0, description="A probability above this times exp(-entropy) is enough too (typical)."
    )

    @model_validator(mode="after")
    def _check_tree(self) -> Self:
        if self.tree is not None and {"steps", "top_k"} & self.model_fields_set:
            raise ValueError("--tree says what is proposed at every step: drop --steps and --top-k")
        is_typical, of_typical = self.acceptance == "typical", {"typical_epsilon", "typical_delta"}
        if not is_typical and of_typical & self.model_fields_set:
            raise ValueError(
                "--typical-epsilon and --typical-delta belong to --acceptance typical: give it, or drop them"
            )
        if is_typical and self.temperature == 0:
            raise ValueError("--acceptance typical is exact acceptance while --temperature is 0: raise it, such as 0.7")
        if is_typical and "seed" in self.model_fields_set:
            raise ValueError("--seed has no effect with --acceptance typical, which draws nothing: drop it")
        if self.temperature > 0 and not is_typical and (self.tree is not None or self.top_k > 1):
            raise ValueError("--temperature above 0 samples a chain: drop --tree and --top-k")
        if self.temperature == 0 and "seed" in self.model_fields_set:
            raise ValueError("--seed has no effect while --temperature is 0: drop it")
        return self


class EvaluationArguments(DraftedBaseArguments, DecodingArguments, ParallelArguments):
    """What both commands take."""

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.transformer_impl != "local":
            raise ValueError(
                f"--transformer-impl {self.transformer_impl} keeps no keys and values for decoding: drop it"
            )
        return self


class ValidateArguments(EvaluationArguments):
    """The prompts, and where the result goes."""

    prompts_path: str = Field(
        min_length=1,
        description="Prompts: .jsonl, .json or .parquet with turns (MT-Bench), conversations or messages, .txt with "
        "one a line, or a Hugging Face dataset such as HuggingFaceH4/mt_bench_prompts.",
    )
    num_prompts: int | None = Field(None, ge=1, description="Take only so many, from the first. Default: all.")
    batch_size: int = Field(8, ge=1, description="Prompts that a data-parallel rank answers at a time.")
    compare: bool = Field(True, description="Let the base answer alone too: its speed, and whether the answers agree.")
    output: Path | None = Field(None, description="JSON file to write.")
    plot: Path | None = Field(None, description="Picture to write; needs matplotlib.")


class GenerateArguments(EvaluationArguments):
    """What is asked."""

    prompt: str | None = Field(
        None, min_length=1, description="A single question. Default: questions are read line by line, with memory."
    )
    system: str | None = Field(None, min_length=1, description="System message.")
