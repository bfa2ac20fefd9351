"""What ``synthesize`` and ``prepare-prompts`` take. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from mcore_spec.cli.arguments import OneOf, ParamsDtype, flag_of
from mcore_spec.config import StrictConfig
from mcore_spec.synthesis.backoff import Backoff
from mcore_spec.synthesis.dialogue import Rules, Sampling
from mcore_spec.synthesis.prompt_sets import PROMPT_SETS

_BACKOFF, _RULES, _SAMPLING = Backoff(), Rules(), Sampling()
_SERVER_FIELDS = ("num_concurrent", "api_key_env", "timeout", "max_retries", "retry_delay")
_LOCAL_FIELDS = ("batch_size", "params_dtype")


def _check_json_lines(path: str) -> str:
    if not path.endswith(".jsonl"):
        raise ValueError("must end in .jsonl: finetune --data-path goes by the name")
    return path


JsonLinesPath = Annotated[str, AfterValidator(_check_json_lines)]


class ServerArguments(StrictConfig):
    """A server that answers."""

    base_url: str | None = Field(
        None,
        min_length=1,
        description="OpenAI-compatible endpoint, such as http://localhost:8000/v1. Default: --model answers here.",
    )
    num_concurrent: int = Field(32, ge=1, description="Conversations that are asked at a time.")
    api_key_env: str | None = Field(
        None, min_length=1, description="Environment variable with the endpoint's key. Default: no key is sent."
    )
    timeout: float = Field(600.0, gt=0, allow_inf_nan=False, description="Seconds to wait for an answer.")
    max_retries: int = Field(
        _BACKOFF.max_retries,
        ge=0,
        description="Further attempts where the server cannot be reached, or answers 429 or 5xx.",
    )
    retry_delay: float = Field(
        _BACKOFF.first_delay,
        ge=0,
        allow_inf_nan=False,
        description=f"Seconds before the first of them; doubled each time, up to {_BACKOFF.longest_delay:.0f}.",
    )


class LocalArguments(StrictConfig):
    """A model in this process that answers."""

    batch_size: int = Field(8, ge=1, description="Conversations that are answered together.")
    params_dtype: ParamsDtype = Field("auto", description="Dtype of the weights; auto: as stored.")


class SynthesizeArguments(LocalArguments, ServerArguments):
    """What is asked, who answers, and where the conversations go."""

    prompts_path: str = Field(
        min_length=1,
        description="Prompts: .jsonl, .json, .parquet or .txt, with turns, conversations or messages; or a dataset.",
    )
    output: JsonLinesPath = Field(description="File of conversations, .jsonl. What is there is not asked again.")
    model: str | None = Field(
        None,
        min_length=1,
        description="Hugging Face directory or hub id; with --base-url the name there (default: the one served).",
    )
    system_prompt: str | None = Field(
        None, min_length=1, description="System message of prompts that have none of their own."
    )
    temperature: float = Field(
        _SAMPLING.temperature, ge=0, allow_inf_nan=False, description="Of sampling; 0: the likeliest token."
    )
    max_tokens: int = Field(_SAMPLING.max_tokens, ge=1, description="Tokens of an answer at most.")
    seed: int = Field(_RULES.seed, ge=0, description="Of sampling.")
    num_samples: int | None = Field(None, ge=1, description="Prompts from the beginning. Default: all.")
    drop_truncated: bool = Field(
        False, description="Leave conversations out whose last answer was cut off (at --max-tokens, for example)."
    )
    on_refused: Literal["error", "skip"] = Field(
        "error",
        description="A turn that cannot be asked, because the conversation is too long for example: end the run, or "
        "that conversation.",
    )

    @model_validator(mode="after")
    def _check_answerer(self) -> Self:
        if self.base_url is None and self.model is None:
            raise ValueError("give --model (it answers here), or --base-url (a server answers)")
        where, ignored = ("with", _LOCAL_FIELDS) if self.base_url else ("without", _SERVER_FIELDS)
        given = [flag_of(name) for name in ignored if name in self.model_fields_set]
        if given:
            raise ValueError(f"{', '.join(given)} would be ignored {where} --base-url: drop what does not apply")
        return self


def _prompt_sets() -> list[str]:
    return list(PROMPT_SETS)


class PreparePromptsArguments(StrictConfig):
    """Which prompts are read, and where they go."""

    format: Annotated[str, OneOf(_prompt_sets)] = Field(
        description="Set that the prompts are from; own: any file of prompts."
    )
    input: str | None = Field(
        None,
        min_length=1,
        description="File or Hugging Face dataset (organisation/name:split). Default: where the set is published.",
    )
    output: JsonLinesPath = Field(description="File of prompts, .jsonl. What is there already is not added.")
    num_samples: int | None = Field(None, ge=1, description="Prompts from the beginning. Default: all.")
    on_bad_line: Literal["error", "skip"] | None = Field(
        None,
        description="Entries that hold no prompt: end the run, or leave them out. Default: what is usual for the set.",
    )
