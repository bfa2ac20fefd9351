"""Tokenizers and templates of the data tests: small enough to see every token, made without a download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mcore_spec.data.chat import ChatEncoder, EncodedConversation, RenderedConversation
from mcore_spec.data.conversations import Message
from mcore_spec.data.store import build_token_store
from mcore_spec.errors import ConfigError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Contents are trimmed, and the end of turn follows the content at once.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>' "
    "+ '\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# The reasoning of answers before the last question is dropped; the last answer always gets a place for it.
QWEN3 = """{%- set last = namespace(query=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set reasoning = '' -%}{%- set answer = message.content -%}
{%- if '</think>' in message.content -%}
{%- set reasoning = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set answer = message.content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > last.query -%}
{{ '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + answer + '<|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>assistant\\n' + answer + '<|im_end|>\\n' }}
{%- endif -%}
{%- else -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""
# The model is asked to continue behind an opened <think>, which the history does not have.
ALWAYS_THINKS = QWEN3.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")
# The system's text stands in the last question, so earlier prompts are no prefix of the whole.
MISTRAL = """{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{%- if loop.last or loop.index0 == turns | length - 2 -%}
{{ '[INST] ' + system + message.content + '[/INST]' }}
{%- else -%}
{{ '[INST] ' + message.content + '[/INST]' }}
{%- endif -%}
{%- else -%}
{{ ' ' + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}"""
# The end of the text is marked besides the end of the turn, but only behind the last one.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# No end of turn: what follows an answer is the header of the next question, a special token.
GLM = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# Between the answer and its end stands a token that was added to the vocabulary, but is not special.
SEPARATED = CHATML.replace("message['content'] + '<|im_end|>", "message['content'] + '<sep><|im_end|>")
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
MARKED = """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}"""
MARKED_WITHOUT_END = MARKED.replace(
    "{{ message.content + '<|im_end|>' }}{% endgeneration %}",
    "{{ message.content }}{% endgeneration %}{{ '<|im_end|>' }}",
)
MARKED_GLM = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip


def byte_tokenizer(
    template: str | None = CHATML, *, merges: tuple[tuple[str, str], ...] = (), trims: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte, besides `SPECIAL` and `merges` (in the byte-level alphabet: Ġ is a blank, Ċ a line's end)."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(BPE({symbol: index for index, symbol in enumerate(symbols)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<sep>", special=False)])
    # As many do, it puts a token of its own before a text, unless it is told not to.
    start = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trims), start])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def talk(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant by turns."""
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*start, *({"role": roles[index % 2], "content": text} for index, text in enumerate(contents))]


def write_lines(path: Path, records: list[Any]) -> Path:
    """A ``.jsonl`` file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def build_on_every_rank(*, data: Path, tokenizer: Path, cache_dir: Path) -> dict[str, Any]:
    """What a rank sees of a store that is built together, and of a build that fails on rank 0."""
    tokenised, tokenize = [], ChatEncoder.tokenize

    def count(encoder: ChatEncoder, rendered: Sequence[RenderedConversation]) -> list[EncodedConversation]:
        tokenised.extend(rendered)
        return tokenize(encoder, rendered)

    with patch.object(ChatEncoder, "tokenize", count):
        store = build_token_store([data], tokenizer, cache_dir=cache_dir, seq_length=500)
    documents = [store.document(index) for index in range(len(store))]
    with pytest.raises(ConfigError) as caught:
        build_token_store([data], tokenizer, cache_dir=cache_dir, seq_length=8)
    return {
        "tokenised": len(tokenised),
        "documents": [(each.token_ids.tolist(), each.mask.tolist()) for each in documents],
        "error": str(caught.value),
    }
