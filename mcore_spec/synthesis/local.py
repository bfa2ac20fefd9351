"""A model of transformers' in this process, where there is no server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcore_spec.data.chat import check_tokenizer, encode_question, load_tokenizer
from mcore_spec.errors import ConfigError
from mcore_spec.synthesis.dialogue import CUT_OFF, WHOLE, Answer, Question, Refusal, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LocalAnswerer:
    """An `Answerer`: conversations of a batch are answered together.

    Answers depend on the question, its seed and the weights. Which others are in the batch only changes the rounding.

    Attributes:
        batch_size: conversations at a time.
        num_concurrent: 1.
    """

    def __init__(
        self, directory: str, *, batch_size: int, sampling: Sampling, dtype: str, device: torch.device
    ) -> None:
        """Load the model and its tokenizer.

        Args:
            directory: of Hugging Face files, or a hub id.
            batch_size: conversations at a time.
            sampling: how answers are drawn.
            dtype: of the weights, by torch's name; auto: as stored.
            device: where the model runs.

        Raises:
            ConfigError: there is no such model, or it has no chat template.
        """
        self.batch_size, self.num_concurrent = batch_size, 1
        self._sampling, self._device = sampling, device
        self._tokenizer = load_tokenizer(directory)
        encode_question(self._tokenizer, [{"role": "user", "content": "?"}])
        self._model = _load_model(directory, dtype, device)
        embedding: Any = self._model.get_input_embeddings()
        check_tokenizer(self._tokenizer, embedding.weight.shape[0], directory)
        self._end_ids = _end_ids(self._model, self._tokenizer.eos_token_id)
        self._set_generation()

    def _set_generation(self) -> None:
        """Nothing but the limits: a stored top_p or repetition penalty would change what `temperature` says."""
        from transformers import GenerationConfig

        self._model.generation_config = GenerationConfig(
            max_new_tokens=self._sampling.max_tokens,
            do_sample=False,  # `_Noise` samples
            eos_token_id=self._end_ids,
            pad_token_id=self._end_ids[0],
        )

    async def answer(self, questions: Sequence[Question]) -> list[Answer | Refusal]:
        """See `Answerer`; in a thread, so that Ctrl-C is heard at once."""
        stop = threading.Event()
        try:
            return await asyncio.to_thread(self._answer, questions, stop)
        finally:
            stop.set()

    def _answer(self, questions: Sequence[Question], stop: threading.Event) -> list[Answer | Refusal]:
        outcomes: dict[int, Answer | Refusal] = {}
        prompts: dict[int, list[int]] = {}
        for index, question in enumerate(questions):
            try:
                prompts[index] = self._encode(question)
            except ConfigError as error:
                outcomes[index] = Refusal(str(error))
        if prompts:
            seeds = [questions[index].seed for index in prompts]
            answers = self._generate(list(prompts.values()), seeds, stop)
            outcomes |= dict(zip(prompts, answers, strict=True))
        return [outcomes[index] for index in range(len(questions))]

    def _encode(self, question: Question) -> list[int]:
        """Token ids of a question.

        Raises:
            ConfigError: the chat template refuses it, or it leaves no room for the answer.
        """
        ids = encode_question(self._tokenizer, question.messages)
        positions = self._model.config.get_text_config().to_dict().get("max_position_embeddings")
        if positions is not None and len(ids) + self._sampling.max_tokens > positions:
            raise ConfigError(
                f"{len(ids)} tokens and max_tokens = {self._sampling.max_tokens} are more than the model's {positions} "
                "positions"
            )
        return ids

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], stop: threading.Event) -> list[Answer]:
        """Answers to prompts of any lengths, padded on the left to [b, s]."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        length = max(len(ids) for ids in prompts)
        input_ids = torch.full((len(prompts), length), self._end_ids[0], dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, length - len(ids) :] = torch.tensor(ids)
            attention_mask[row, length - len(ids) :] = 1
        processors = [_Noise(self._sampling.temperature, seeds)] if self._sampling.temperature > 0 else []
        model: Any = self._model  # `generate` is a method of every model with a head
        output: Tensor = model.generate(
            input_ids=input_ids.to(self._device),
            attention_mask=attention_mask.to(self._device),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
        )
        return [self._decode(ids) for ids in output[:, length:].tolist()]

    def _decode(self, ids: list[int]) -> Answer:
        end = next((index for index, token in enumerate(ids) if token in self._end_ids), None)
        text = self._tokenizer.decode(ids if end is None else ids[:end], skip_special_tokens=True)
        assert isinstance(text, str)
        return Answer(text, CUT_OFF if end is None else WHOLE)


class _Noise:
    """Adds noise to logits so that the largest of a row is a sample of softmax(logits / temperature).

    softmax(z) is the distribution of argmax(z - log e) over independent e ~ Exponential(1). The noise of a row comes
    from the row's own generator, so that a sample does not depend on the other rows.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` [b, vocabulary] with the noise in."""
        rows = [torch.empty(scores.shape[1]).exponential_(generator=each) for each in self._generators]
        noise = torch.stack(rows).clamp_min_(torch.finfo(torch.float32).tiny).to(scores.device)
        return scores.float() / self._temperature - noise.log()


class _Stop:
    """Ends every row once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row is done, bool [b]."""
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


def _load_model(directory: str, dtype: str, device: torch.device) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    try:
        declared = vars(AutoConfig.from_pretrained(directory)).get("quantization_config")
        # transformers would leave such weights as they are stored, without their scales, and warn.
        if declared and not AutoHfQuantizer.supports_quant_method(declared):
            raise ConfigError(
                f"model = {directory} is quantised in a form that transformers does not apply (quant_method = "
                f"{declared.get('quant_method')!r}); give the model that it was made from, or a server of it with "
                "base_url"
            )
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model = {directory} holds no language model that can be read ({reason}); give a Hugging Face directory "
            "or hub id, or the address of a server with base_url"
        ) from error
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _end_ids(model: PreTrainedModel, tokenizer_id: int | None) -> list[int]:
    """Tokens that end an answer: the model's own list, and the tokenizer's end of text.

    Raises:
        ConfigError: there is none.
    """
    config = model.generation_config
    stored = config.eos_token_id if config is not None else None
    ids = [*(stored if isinstance(stored, list) else [stored]), tokenizer_id]
    known = sorted({each for each in ids if each is not None})
    if not known:
        raise ConfigError(
            "neither generation_config.json nor the tokenizer names an end-of-turn token; add eos_token_id"
        )
    return known
