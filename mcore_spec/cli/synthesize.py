"""``mcore-spec synthesize``: a base model answers prompts, so that its draft learns from what the base itself says."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path

from mcore_spec.cli.arguments import DTYPE_NAMES
from mcore_spec.cli.synthesis_arguments import SynthesizeArguments
from mcore_spec.cli.terminal import say
from mcore_spec.data.prompts import Prompt, read_prompts
from mcore_spec.errors import ConfigError
from mcore_spec.synthesis.backoff import Backoff
from mcore_spec.synthesis.dialogue import Answerer, Dialogue, Rules, Sampling
from mcore_spec.synthesis.loop import synthesize
from mcore_spec.synthesis.output import STATE_SUFFIX, ConversationFile, Settings

_SECONDS_BETWEEN_LINES = 10.0


def run(arguments: SynthesizeArguments) -> None:
    """Read every prompt, then ask those that have no conversation yet."""
    output = Path(arguments.output)
    if output.exists() and Path(arguments.prompts_path).exists() and output.samefile(arguments.prompts_path):
        raise ConfigError(f"--output {output} is the file of the prompts; choose another")
    prompts = list(islice(read_prompts(arguments.prompts_path), arguments.num_samples))
    asyncio.run(_run(arguments, prompts, output))


async def _run(arguments: SynthesizeArguments, prompts: list[Prompt], output: Path) -> None:
    progress = _Progress()
    rules = Rules(
        system_prompt=arguments.system_prompt,
        seed=arguments.seed,
        drop_truncated=arguments.drop_truncated,
        skip_refused=arguments.on_refused == "skip",
    )
    async with AsyncExitStack() as stack:
        if arguments.base_url is not None:
            answerer, model = await _open_server(arguments, arguments.base_url, stack, progress)
        else:
            assert arguments.model is not None, "checked by the arguments"
            answerer, model = None, arguments.model
        file = stack.enter_context(ConversationFile(output, prompts, settings=_settings(arguments, model)))
        missing = file.missing
        say(
            f"{len(prompts):,} prompts: {file.num_written:,} have a conversation in {output}, {file.num_left_out:,} "
            f"were left out earlier, {len(missing):,} to ask; {model} answers"
        )
        progress.start(len(missing))
        if missing:
            await synthesize(answerer or _load_model(arguments, model), file, rules, report=progress.count)
            progress.say_end()
        if file.num_left_out:
            say(f"left out, with the reasons in {output.name}{STATE_SUFFIX}: {file.num_left_out:,}")
        say(f"done: {file.num_written:,} conversations for {len(prompts):,} prompts in {output}")


def _settings(arguments: SynthesizeArguments, model: str) -> Settings:
    """What the answers in one file have in common."""
    return {
        "model": model,
        "system_prompt": arguments.system_prompt,
        "temperature": arguments.temperature,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed if arguments.temperature > 0 else None,
    }


async def _open_server(
    arguments: SynthesizeArguments, base_url: str, stack: AsyncExitStack, progress: _Progress
) -> tuple[Answerer, str]:
    """The server and the name of the model there.

    Raises:
        ConfigError: no URL, no key, or no package to ask with.
    """
    try:
        from mcore_spec.synthesis.server import Endpoint, ServerAnswerer
    except ModuleNotFoundError as error:
        if error.name != "httpx2":
            raise
        raise ConfigError(
            "--base-url needs the package httpx2: pip install 'mcore-spec[synthesize]', or let the model answer here "
            "with --model DIR alone"
        ) from error
    key = None
    if arguments.api_key_env is not None:
        key = os.environ.get(arguments.api_key_env)
        if not key:
            raise ConfigError(f"--api-key-env {arguments.api_key_env} is not set; export the key under that name")
    endpoint = Endpoint(
        base_url,
        api_key=key,
        num_concurrent=arguments.num_concurrent,
        timeout=arguments.timeout,
        backoff=Backoff(max_retries=arguments.max_retries, first_delay=arguments.retry_delay),
    )
    sampling = Sampling(arguments.temperature, arguments.max_tokens)
    answerer = ServerAnswerer(endpoint, model=arguments.model, sampling=sampling, notify=progress.notify)
    await stack.enter_async_context(answerer)
    answerer.model = answerer.model or await answerer.find_model()
    return answerer, answerer.model


def _load_model(arguments: SynthesizeArguments, directory: str) -> Answerer:
    import torch

    from mcore_spec.synthesis.local import LocalAnswerer
    from mcore_spec.weights.hf_config import check_not_quantized, locate, read_hf_config

    # transformers would leave the scales away, and answer as the model did before.
    config = read_hf_config(locate(directory, with_weights=False, field="model"))
    check_not_quantized(config, what=f"model = {directory}")
    return LocalAnswerer(
        directory,
        batch_size=arguments.batch_size,
        sampling=Sampling(arguments.temperature, arguments.max_tokens),
        dtype=DTYPE_NAMES[arguments.params_dtype],
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


class _Progress:
    """Says how far the run is, now and then."""

    def __init__(self) -> None:
        self._num_missing = self._num_done = self._num_answers = self._num_quiet = 0
        self._begun = self._said = self._notified = time.monotonic() - _SECONDS_BETWEEN_LINES

    def start(self, num_missing: int) -> None:
        """Begin to count."""
        self._num_missing = num_missing
        self._begun = self._said = time.monotonic()

    def count(self, dialogue: Dialogue) -> None:
        """One prompt is through."""
        self._num_done += 1
        self._num_answers += sum(message["role"] == "assistant" for message in dialogue.messages)
        if time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            say(f"{self._num_done:,} of {self._num_missing:,} prompts, {self._rate()}")

    def notify(self, text: str) -> None:
        """A failed attempt; of many at a time one is shown."""
        if time.monotonic() - self._notified < _SECONDS_BETWEEN_LINES:
            self._num_quiet += 1
            return
        others = f" (and {self._num_quiet:,} more)" if self._num_quiet else ""
        self._notified, self._num_quiet = time.monotonic(), 0
        say(f"{text}{others}")

    def say_end(self) -> None:
        """The whole run."""
        say(f"{self._num_done:,} prompts in {time.monotonic() - self._begun:.0f} s, {self._rate()}")

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-3)
        return f"{self._num_answers:,} answers, {60 * self._num_answers / seconds:.0f} a minute"
