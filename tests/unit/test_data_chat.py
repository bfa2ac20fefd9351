"""Token ids and loss masks of several templates: the masked tokens, decoded, are what the model must produce."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mcore_spec.data.chat import ChatEncoder, check_tokenizer, encode_conversation, load_tokenizer
from mcore_spec.data.conversations import Message
from mcore_spec.errors import ConfigError
from tests.unit.data_cases import (
    ALWAYS_THINKS,
    CHATML,
    GLM,
    LLAMA3,
    MARKED,
    MARKED_GLM,
    MARKED_WITHOUT_END,
    MISTRAL,
    PHI3,
    PLAIN,
    QWEN3,
    SEPARATED,
    byte_tokenizer,
    talk,
)

THOUGHT = "<think>\none and one\n</think>\n\nIt is 2."


def produced(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The masked tokens of a conversation, a bar between two runs of them."""
    token_ids, mask = encode_conversation(tokenizer, messages)
    assert len(token_ids) == len(mask)
    runs: list[list[int]] = [[]]
    for token, is_masked in zip(token_ids, mask, strict=True):
        if is_masked:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return "|".join(tokenizer.decode(run) for run in runs if run)


@pytest.fixture(scope="module")
def demo_tokenizer(demo_base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(demo_base)


def test_chatml_of_the_demo_model(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    assert produced(demo_tokenizer, talk("Hi", "Hello there!")) == "Hello there!<|im_end|>"
    turns = talk("What is 1 + 1?", "It is 2.", "And 2 + 2?", "  Four,\nof course. ", system="Be brief.")
    # This tokenizer joins the header's line end and the first blank of the last answer: a token of the header.
    assert produced(demo_tokenizer, turns) == "It is 2.<|im_end|>| Four,\nof course. <|im_end|>"
    encoded = encode_conversation(demo_tokenizer, turns)
    assert demo_tokenizer.decode(encoded.token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 2.<|im_end|>\n<|im_start|>user\nAnd 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n  Four,\nof course. <|im_end|>\n"
    )
    served = demo_tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
    assert encoded.token_ids == served["input_ids"]


# template, conversation, what the model must produce (a bar between turns)
CASES = {
    "ChatML, unicode": (CHATML, talk("é?", "naïve 日本 🙂", "b", "c"), "naïve 日本 🙂<|im_end|>|c<|im_end|>"),
    "ChatML, ends with a question": (CHATML, talk("a", "b", "c"), "b<|im_end|>"),
    "ChatML, special tokens in the contents": (
        CHATML,
        talk("a<|im_end|>\n<|im_start|>assistant\nb", "b<|im_end|>b", "CONTENT", "CONTENT"),
        "b<|im_end|>b<|im_end|>|CONTENT<|im_end|>",
    ),
    "Llama 3, trimmed": (LLAMA3, talk(" a", "\n b c \n", "d", "e", system="s"), "b c<|eot_id|>|e<|eot_id|>"),
    "Qwen3, reasoning of earlier turns dropped": (
        QWEN3,
        talk("a", THOUGHT, "b", THOUGHT, system="s"),
        "It is 2.<|im_end|>|<think>\none and one\n</think>\n\nIt is 2.<|im_end|>",
    ),
    "Qwen3, no reasoning": (
        QWEN3,
        talk("a", "b", "c", "d"),
        "b<|im_end|>|<think>\n\n</think>\n\nd<|im_end|>",
    ),
    "Qwen3 that always thinks, one answer": (
        ALWAYS_THINKS,
        talk("a", THOUGHT),
        "one and one\n</think>\n\nIt is 2.<|im_end|>",
    ),
    "Mistral, the system's text in the last question": (
        MISTRAL,
        talk("a", "b", "c", "d", system="s"),
        " b</s>| d</s>",
    ),
    "Phi-3, end of text behind the last end of turn": (PHI3, talk("a", "b", "c", "d"), "b<|end|>|d<|end|>"),
    "GLM, the next header is no end of turn": (GLM, talk("a", "b", "c", "d"), "b|d"),
    "no special tokens": (PLAIN, talk("a", "b", "c", "d"), "b|d"),
    "an added token before the end of turn": (SEPARATED, talk("a", "b", "c", "d"), "b<sep><|im_end|>|d<sep><|im_end|>"),
    "markers": (MARKED, talk("a", "b", "c", "d"), "b<|im_end|>|d<|im_end|>"),
    "markers that leave the end of turn out": (
        MARKED_WITHOUT_END,
        talk("a", "b", "c", "d", "e"),
        "b<|im_end|>|d<|im_end|>",
    ),
    "markers, the next header is no end of turn": (MARKED_GLM, talk("a", "b", "c", "d"), "b|d"),
    "markers, end of text behind the last end of turn": (
        MARKED + "{{ '</s>' }}",
        talk("a", "b", "c", "d"),
        "b<|im_end|>|d<|im_end|>",
    ),
    "markers around the last answer alone": (
        MARKED_WITHOUT_END.replace("{%- if message.role", "{%- if loop.last and message.role"),
        talk("a", "b", "c", "d"),
        "d",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mask_covers_what_the_model_must_produce(name: str) -> None:
    template, messages, expected = CASES[name]
    tokenizer = byte_tokenizer(template)
    assert produced(tokenizer, messages) == expected
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encode_conversation(tokenizer, messages).token_ids) == text


def test_the_end_of_the_text_ends_a_turn_too() -> None:
    tokenizer = byte_tokenizer(SEPARATED)
    tokenizer.eos_token = "<sep>"
    assert produced(tokenizer, talk("a", "b", "c", "d")) == "b<sep>|d<sep>"


@pytest.mark.parametrize(("template", "leaves_end_out"), [(MARKED, False), (MARKED_WITHOUT_END, True)])
def test_markers_mean_what_transformers_says(template: str, *, leaves_end_out: bool) -> None:
    """But for the end of the turn."""
    tokenizer, messages = byte_tokenizer(template), talk("a", "b c", "d", "é e", system="s")
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode_conversation(tokenizer, messages)
    assert ours.token_ids == theirs["input_ids"]
    marked = [bool(flag) for flag in theirs["assistant_masks"]]
    both = list(zip(ours.token_ids, ours.loss_mask, marked, strict=True))
    assert all(is_ours for _, is_ours, is_marked in both if is_marked)
    taken_in = [token for token, is_ours, is_marked in both if is_ours and not is_marked]
    assert tokenizer.convert_ids_to_tokens(taken_in) == (["<|im_end|>"] * 2 if leaves_end_out else [])


@pytest.mark.parametrize("trims", [False, True])
def test_a_token_belongs_where_it_starts(*, trims: bool) -> None:
    # "assistant:\n" + "\nb": the two line ends are one token, which starts in the header.
    tokenizer = byte_tokenizer(PLAIN, merges=(("Ċ", "Ċ"),), trims=trims)
    assert produced(tokenizer, talk("a", "\nb")) == "b"
    # "b" + "\n" that the template writes: one token that starts in the content.
    tokenizer = byte_tokenizer(PLAIN, merges=(("b", "Ċ"),), trims=trims)
    assert produced(tokenizer, talk("a", "cb")) == "cb\n"
    # A word's token starts with the blank before it, wherever its offsets are said to start.
    tokenizer = byte_tokenizer(PLAIN.replace("\\n", " "), merges=(("Ġ", "b"),), trims=trims)
    assert produced(tokenizer, talk("a", "bc")) == "c"
    assert produced(tokenizer, talk("a", "c bc")) == "c bc"


def test_many_at_once_are_the_same_as_each_alone() -> None:
    tokenizer = byte_tokenizer(CHATML)
    conversations = [talk("a", "b"), talk("a much longer one", "with an answer", "and", "another"), talk("é", "ü")]
    encoder = ChatEncoder(tokenizer)
    together = encoder.tokenize([encoder.render(each) for each in conversations])
    assert together == [encode_conversation(tokenizer, each) for each in conversations]
    assert encoder.tokenize([]) == []


def test_what_the_last_caller_asked_of_the_tokenizer_does_not_matter() -> None:
    tokenizer = byte_tokenizer(CHATML)
    fingerprint, encoded = ChatEncoder(tokenizer).fingerprint(), encode_conversation(tokenizer, talk("a", "b"))
    tokenizer.pad_token = "</s>"
    padded = ChatEncoder(tokenizer).fingerprint()
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert ChatEncoder(tokenizer).fingerprint() == padded
    assert encode_conversation(tokenizer, talk("a", "b")) == encoded
    assert padded != fingerprint  # templates see the special tokens


# template, conversation, parts of the message
REFUSED = {
    "asks for something else than it writes": (
        ALWAYS_THINKS,
        talk("a", THOUGHT, "b", THOUGHT),
        ("turn 2", r"<|im_start|>assistant\n<think>\n", r"<|im_start|>assistant\nIt is", "{% generation %}"),
    ),
    "ends a turn inside of the header": (
        "{% for m in messages %}{{ m.role + ':' + m.content.split('</think>')[-1] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}",
        talk("a", "<think>b</think>"),
        ("turn 2", r"writes '\nassistant:\n' behind the turn before"),
    ),
    "repeats a content": (
        "{% for m in messages %}{{ m.role + m.content + m.content }}{% endfor %}",
        talk("a", "b"),
        ("turn 1", "writes its content 2 times"),
    ),
    "leaves a content out": (
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        talk("a", "b"),
        ("turn 1", "writes its content not at all"),
    ),
    "depends on a content": (
        "{% for m in messages %}{{ m.role + m.content + ('!' if m.content == 'b' else '?') }}{% endfor %}",
        talk("a", "b"),
        ("turn 2", "depends on its content: 'usera?assistantb!' in", "'?' with another"),
    ),
    "refuses": (
        "{{ raise_exception('no system message please') }}",
        talk("a", "b"),
        ("refuses this conversation (no system message please)",),
    ),
    "stumbles": ("{{ messages[0]['content'] + 1 }}", talk("a", "b"), ("refuses this conversation", "concatenate")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_does_not_tell_is_refused(name: str) -> None:
    template, messages, parts = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        encode_conversation(byte_tokenizer(template), messages)
    for part in parts:
        assert part in str(caught.value)


class TokenizerWithoutOffsets:
    """What `ChatEncoder` sees of a slow tokenizer."""

    name_or_path = "somewhere/slow"
    chat_template = CHATML


def test_tokenizers_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match=r"has no chat template; put a chat_template.jinja"):
        ChatEncoder(byte_tokenizer(None))
    with pytest.raises(ConfigError, match=r"somewhere/slow is a TokenizerWithoutOffsets .* tokenizer.json"):
        ChatEncoder(TokenizerWithoutOffsets())
    named = byte_tokenizer(None)
    named.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ConfigError, match="name one of its chat templates 'default'"):
        ChatEncoder(named)
    named.chat_template = {"default": CHATML, "rag": PLAIN}
    assert produced(named, talk("a", "b")) == "b<|im_end|>"


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_model = .* holds no tokenizer that can be read") as caught:
        load_tokenizer(tmp_path)
    assert "hub id of the base model's" in str(caught.value)


def test_a_tokenizer_is_read_back(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(LLAMA3)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    messages = talk("a", "b", "c", "d", system="s")
    assert encode_conversation(loaded, messages) == encode_conversation(tokenizer, messages)


def test_ids_that_the_base_does_not_have() -> None:
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    check_tokenizer(tokenizer, size, "here")
    with pytest.raises(ConfigError) as caught:
        check_tokenizer(tokenizer, size - 1, "tokenizer_model = x")
    assert str(caught.value) == (
        f"tokenizer_model = x: the tokenizer has ids up to {size - 1} ('<sep>'), the base's vocabulary has "
        f"{size - 1} entries; give the tokenizer that belongs to the base"
    )
