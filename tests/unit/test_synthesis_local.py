"""A tiny model that answers in this process, against transformers' own way of generating one answer."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from mcore_spec.errors import ConfigError
from mcore_spec.synthesis.dialogue import Answer, Question, Refusal, Sampling
from mcore_spec.synthesis.local import LocalAnswerer
from tests.unit.data_cases import CHATML, byte_tokenizer, talk

TURNS = ("a", "a longer question?", "what?", "and now something that is longer still")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # peaked enough that rounding decides nothing
    # What a model brings along for chatting must not change what is asked for.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), do_sample=True, top_k=2, repetition_penalty=3.0
    )
    model.save_pretrained(directory)
    return directory


def answerer(directory: Path, **options: Any) -> LocalAnswerer:
    sampling = Sampling(options.pop("temperature", 0.0), options.pop("max_tokens", 20))
    return LocalAnswerer(
        str(directory),
        **{"batch_size": 4, "sampling": sampling, "dtype": "float32", "device": torch.device("cpu"), **options},
    )


def ask(given: LocalAnswerer, questions: list[Question]) -> list[Any]:
    return list(asyncio.run(given.answer(questions)))


def questions(*, seed: int = 0) -> list[Question]:
    return [Question(talk(turn, system="s"), seed + index) for index, turn in enumerate(TURNS)]


def test_greedy_answers_are_the_models_own(model_dir: Path) -> None:
    """One forward pass over everything a token, without a cache, padding or `generate`."""
    tokenizer, model = byte_tokenizer(CHATML), AutoModelForCausalLM.from_pretrained(model_dir).eval()
    end = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "</s>")}
    expected = []
    for question in questions():
        ids = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True)["input_ids"]
        answer: list[int] = []
        while len(answer) < 20 and not end.intersection(answer):
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        is_whole = bool(end.intersection(answer))
        text = tokenizer.decode([token for token in answer if token not in end], skip_special_tokens=True)
        expected.append(Answer(text, "stop" if is_whole else "length"))
    assert ask(answerer(model_dir), questions()) == expected
    assert len({answer.text for answer in expected}) > 1


def test_an_answer_ends_at_the_end_of_turn(model_dir: Path) -> None:
    given = answerer(model_dir)
    whole = ask(given, questions()[:1])[0].text
    # The fifth token it says is made the end of its turn.
    ids = given._tokenizer(whole, add_special_tokens=False)["input_ids"]
    given._end_ids = [ids[4]]
    given._set_generation()
    (answer,) = ask(given, questions()[:1])
    stop = ids.index(ids[4])
    assert answer == Answer(given._tokenizer.decode(ids[:stop]), "stop")


def test_a_sample_depends_on_its_seed_and_not_on_its_company(model_dir: Path) -> None:
    given = answerer(model_dir, temperature=2.0)
    together = ask(given, questions())
    assert [ask(given, [question])[0] for question in questions()] == together
    assert ask(given, questions()[::-1])[::-1] == together
    assert all(a != b for a, b in zip(ask(given, questions(seed=100)), together, strict=True))


def test_samples_follow_the_temperature(model_dir: Path) -> None:
    """Of one token, 3000 times, against softmax(logits / temperature); tolerance: four standard deviations."""
    tokenizer, model = byte_tokenizer(CHATML), AutoModelForCausalLM.from_pretrained(model_dir).eval()
    messages, number, temperature = talk("a"), 3000, 3.0
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    wanted = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double() / temperature, -1)
    given = answerer(model_dir, temperature=temperature, max_tokens=1, batch_size=1000)
    samples = Counter(
        answer.text
        for start in range(0, number, 1000)
        for answer in ask(given, [Question(messages, seed) for seed in range(start, start + 1000)])
    )
    checked = 0
    for token, probability in enumerate(wanted.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True)
        # Bytes that are no character alone all look the same.
        if probability * number < 30 or not text.isascii() or not text:
            continue
        checked += 1
        deviation = math.sqrt(probability * (1 - probability) * number)
        assert abs(samples[text] - probability * number) < 4 * deviation, (text, probability)
    assert checked >= 2


def test_a_question_without_room_or_template(model_dir: Path) -> None:
    asked = [*questions()[:1], Question(talk("long " * 40), 0), *questions()[1:2]]
    first, second, third = ask(answerer(model_dir), asked)
    assert isinstance(first, Answer) and isinstance(third, Answer)
    assert isinstance(second, Refusal) and "max_tokens = 20 are more than the model's 160 positions" in second.reason
    given = answerer(model_dir)
    given._tokenizer.chat_template = "{{ raise_exception('no system') }}"
    (refused,) = ask(given, questions()[:1])
    assert isinstance(refused, Refusal) and "the chat template refuses this conversation (no system)" in refused.reason


def test_a_run_that_is_stopped_does_not_wait_for_its_answers(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = answerer(model_dir, max_tokens=100)
    stop = threading.Event()
    stop.set()
    (answer,) = given._generate([[1, 2, 3]], [0], stop)
    assert len(answer.text) <= 2 and answer.finish_reason == "length"

    # Whoever is cancelled sets the event that the thread looks at.
    begun, heard = threading.Event(), []

    def wait(asked: object, event: threading.Event) -> list[Answer | Refusal]:
        begun.set()
        heard.append(event.wait(20))
        return []

    async def interrupt() -> None:
        task = asyncio.create_task(given.answer(questions()))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(given, "_answer", wait)
    asyncio.run(interrupt())
    assert heard == [True]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "modelopt",
            r"transformers does not apply \(quant_method = 'modelopt'\); give the model that it was made from",
        ),
        ("compressed-tensors", "holds no language model that can be read .*compressed.tensors"),
    ],
)
def test_weights_whose_scales_nobody_applies(model_dir: Path, tmp_path: Path, method: str, message: str) -> None:
    """transformers would answer with numbers that are not scaled; or lacks the package that scales them."""
    directory = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        answerer(directory)


def test_directories_that_hold_no_model(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer_model = {tmp_path} holds no tokenizer"):
        answerer(tmp_path)
    byte_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no chat template"):
        answerer(tmp_path)
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"model = {tmp_path} holds no language model that can be read"):
        answerer(tmp_path)
