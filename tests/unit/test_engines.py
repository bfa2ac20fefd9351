"""Extraction through an engine: what is asked of it, what is resumed, and what of its files is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mcore_spec.config import BaseIdentity
from mcore_spec.data.hidden_states import StatesStore
from mcore_spec.data.hidden_states.plan import ExtractionPlan
from mcore_spec.data.store_files import StoreCounts, StoreWriter, TokenStore
from mcore_spec.engines.extract import Captured, EngineSetting, extract
from mcore_spec.engines.final_norm import FinalNorm
from mcore_spec.engines.tensorrt_llm import TensorRtLlmEngine, read_dump
from mcore_spec.engines.vllm import VllmEngine, wait_for
from mcore_spec.errors import CheckpointError, ConfigError
from mcore_spec.weights.base_directory import BaseDirectory
from tests.tiny import base_architecture

HIDDEN = 16
AUX = (1, 4)
CONVERSATIONS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16, 17]]


class Harmful:
    """An object that would run code where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("it ran",)


class CountingEngine:
    """States that say of which token and layer they are."""

    last_is_normed = True

    def __init__(self, *, dies_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.dies_at = dies_at

    def capture(self, conversations: Sequence[list[int]]) -> Iterator[Captured]:
        for token_ids in conversations:
            if len(self.asked) == self.dies_at:
                raise KeyboardInterrupt
            self.asked.append(token_ids)
            rows = torch.tensor(token_ids, dtype=torch.float32)[:, None].expand(-1, HIDDEN)
            yield Captured(torch.stack([rows + 0.25, rows + 0.5], dim=1), rows)

    def close(self) -> None:
        pass


@pytest.fixture
def plan(tmp_path: Path) -> ExtractionPlan:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    with StoreWriter(tokens) as writer:
        for token_ids in CONVERSATIONS:
            writer.append(token_ids, [False] + [True] * (len(token_ids) - 1))
    counts = StoreCounts(documents=writer.num_documents, tokens=writer.num_tokens, masked_tokens=writer.num_masked)
    writer.finish(fingerprint="tokens", seq_length=8, sources=["here"], counts=counts)
    conversations = TokenStore(tokens)
    return ExtractionPlan(
        architecture=base_architecture(),
        identity=BaseIdentity(source="a base", fingerprint="weights"),
        conversations=conversations,
        tokenizer_fingerprint="tokenizer",
        num_documents=len(CONVERSATIONS),
        aux_layer_ids=AUX,
        dtype="float32",
        documents=conversations,
    )


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "states"


def test_states_stand_where_their_tokens_are(plan: ExtractionPlan, output: Path) -> None:
    assert extract(plan.describe("vllm"), plan.documents, CountingEngine(), output, batch_size=2) == 5
    store = StatesStore(output, verify=True)
    for index, token_ids in enumerate(CONVERSATIONS):
        states = store.states(index)
        expected = torch.tensor(token_ids, dtype=torch.float32)[:, None].expand(-1, HIDDEN)
        assert states.token_ids.tolist() == token_ids
        assert states.loss_mask.tolist() == [False] + [True] * (len(token_ids) - 1)
        assert torch.equal(states.last, expected)
        assert torch.equal(states.aux, torch.stack([expected + 0.25, expected + 0.5], dim=1))
    about = store.description
    assert (about.aux_layer_ids, about.last_is_normed, about.backend, about.source) == (AUX, True, "vllm", "a base")
    assert (about.base_fingerprint, about.conversation_fingerprint) == ("weights", "tokens")


def test_an_interrupted_extraction_asks_for_what_is_missing(plan: ExtractionPlan, output: Path) -> None:
    first = CountingEngine(dies_at=3)
    # A shard a conversation: what was written is on the disk.
    with pytest.raises(KeyboardInterrupt):
        extract(plan.describe("vllm"), plan.documents, first, output, batch_size=1, max_shard_bytes=1)
    with pytest.raises(CheckpointError, match="not finished"):
        StatesStore(output)
    second = CountingEngine()
    # The last one stood in memory.
    assert extract(plan.describe("vllm"), plan.documents, second, output, batch_size=1) == 3
    assert second.asked == CONVERSATIONS[2:]
    assert len(StatesStore(output, verify=True)) == 5


def test_a_part_of_the_conversations_is_another_store(plan: ExtractionPlan, output: Path) -> None:
    some = plan._replace(num_documents=2)
    extract(some.describe("vllm"), some.documents, CountingEngine(), output, batch_size=8)
    assert len(StatesStore(output)) == 2
    with pytest.raises(CheckpointError, match="conversation_fingerprint"):
        extract(plan.describe("vllm"), plan.documents, CountingEngine(), output, batch_size=8)


def test_the_final_norm_is_the_bases(tmp_path: Path) -> None:
    weight, hidden = torch.rand(HIDDEN, dtype=torch.float64), torch.randn(7, HIDDEN, dtype=torch.float64)
    save_file({"model.norm.weight": weight}, tmp_path / "model.safetensors")
    base = BaseDirectory(tmp_path, base_architecture(), BaseIdentity(source="", fingerprint=""))
    expected = torch.nn.functional.rms_norm(hidden, (HIDDEN,), weight, 1e-5)
    torch.testing.assert_close(FinalNorm(base)(hidden), expected, rtol=1e-12, atol=1e-12)


def test_engines_that_are_not_installed_say_what_they_need(tmp_path: Path) -> None:
    setting = EngineSetting(base=tmp_path, aux_layer_ids=AUX, scratch=tmp_path / "x", max_tokens=8, dtype="float32")
    with pytest.raises(ConfigError, match="vllm_environment.sh"):
        VllmEngine(setting, num_layers=6)
    with pytest.raises(ConfigError, match="NVIDIA GPU"):
        TensorRtLlmEngine(setting, hidden_size=HIDDEN)
    assert not (tmp_path / "x").exists()


def dump(**changes: Any) -> list[dict[str, Any]]:
    values = {
        "id": 1,
        "input_ids": torch.tensor([5, 6, 7]),
        "hidden_state": torch.arange(3.0 * HIDDEN).view(3, HIDDEN),
        "aux_hidden_states": torch.arange(6.0 * HIDDEN).view(3, 2 * HIDDEN),
    }
    return [{name: value for name, value in {**values, **changes}.items() if value is not None}]


def test_dumps_of_tensorrt_llm_are_read(tmp_path: Path) -> None:
    path = tmp_path / "captured_1.pt"
    torch.save(dump(), path)
    captured = read_dump(path, [5, 6, 7], shape=(2, HIDDEN))
    assert torch.equal(captured.last, dump()[0]["hidden_state"])
    aux = dump()[0]["aux_hidden_states"]
    assert torch.equal(captured.aux, torch.stack([aux[:, :HIDDEN], aux[:, HIDDEN:]], dim=1))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: torch.save(dump(input_ids=torch.tensor([5, 6, 8])), path), "other tokens"),
        (lambda path: torch.save(dump(hidden_state=None), path), "'hidden_state'"),
        (lambda path: torch.save(dump(hidden_state=torch.zeros(2, HIDDEN)), path), "shapes"),
        (lambda path: torch.save(dump(aux_hidden_states=torch.zeros(3, HIDDEN)), path), "shapes"),
        (lambda path: torch.save(dump() * 2, path), "one request"),
        (lambda path: torch.save(dump(id=Harmful()), path), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
    ],
)
def test_other_dumps_of_tensorrt_llm_are_refused(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "captured_1.pt"
    torch.save(dump(), path)
    damage(path)
    with pytest.raises(ConfigError, match=said):
        read_dump(path, [5, 6, 7], shape=(2, HIDDEN))


def test_a_file_of_vllm_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "captured.safetensors"
    late = threading.Timer(0.05, path.touch)
    late.start()
    assert wait_for(path, timeout_s=30) == path
    late.join()
    with pytest.raises(ConfigError, match="did not write"):
        wait_for(tmp_path / "never", timeout_s=0.02)
