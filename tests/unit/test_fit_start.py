"""How many batches a least-squares start takes if nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_spec.config import EagleConfig, TrainingConfig
from mcore_spec.data.store import build_token_store
from mcore_spec.drafts.linear_start import MAX_DEFAULT_BYTES, ROWS_PER_INPUT
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.errors import UnsupportedError
from mcore_spec.objectives.eagle3 import eagle3_task
from mcore_spec.objectives.linear_start import check_linear_start, num_default_rows
from mcore_spec.objectives.objective import Task
from mcore_spec.training.data import Conversations
from tests.tiny import base_architecture
from tests.unit.data_cases import byte_tokenizer, talk, write_lines


def task(**architecture: object) -> Task:
    flags = {"use_aux_hidden_state": True, "use_last_layernorm": True, **architecture}
    config = EagleConfig.parse({"eagle_architecture_config": flags})
    return eagle3_task(resolve_eagle(config, base_architecture(num_layers=8)))


def test_rows_by_what_a_row_reads() -> None:
    base = base_architecture(num_layers=8)
    assert num_default_rows(task(), base) == ROWS_PER_INPUT * 4 * base.hidden_size
    one_layer = task(eagle_aux_hidden_state_layer_ids=[3])
    assert num_default_rows(one_layer, base) == ROWS_PER_INPUT * 2 * base.hidden_size


def test_sums_of_wide_bases_are_made_on_request_alone() -> None:
    # 8 bytes x 4 h x 5 h.
    limit = int((MAX_DEFAULT_BYTES / 160) ** 0.5)
    narrow, wide = (base_architecture(num_layers=8, hidden_size=size) for size in (limit, limit + 1))
    assert limit > 4096
    assert num_default_rows(task(), narrow) > 0
    assert num_default_rows(task(), wide) == 0
    check_linear_start(task(), num_batches=7)


def test_drafts_without_such_a_start() -> None:
    normed = task(norm_before_residual=True)
    assert num_default_rows(normed, base_architecture(num_layers=8)) == 0
    check_linear_start(normed, num_batches=None)
    with pytest.raises(UnsupportedError, match="fit_start = 3"):
        check_linear_start(normed, num_batches=3)


@pytest.mark.parametrize(
    ("num_rows", "train_iters", "expected"),
    [
        # 16 conversations with 8 tokens of the model's (7 bytes and the end of the turn), in batches of two.
        (16, 100, 1),
        (17, 100, 2),
        (100, 100, 7),
        (100, 3, 3),
        (10_000, 100, 8),
        (0, 100, 0),
    ],
)
def test_batches_of_the_first_epoch(num_rows: int, train_iters: int, expected: int, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = write_lines(tmp_path / "data.jsonl", [{"messages": talk("hi", f"answer{n % 10}")} for n in range(16)])
    store = build_token_store([data], tmp_path / "tokenizer", cache_dir=tmp_path / "cache", seq_length=64)
    assert store.counts.masked_tokens == 16 * 8
    config = TrainingConfig(
        data_path=(str(data),), train_iters=train_iters, split="1,0,0", seq_length=64, packing=False
    )
    conversations = Conversations(store, config, global_batch_size=2)
    assert conversations.num_fit_batches(num_rows=num_rows) == expected
