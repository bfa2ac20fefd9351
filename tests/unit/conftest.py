"""What every unit test leaves behind it as it found it."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def _restored_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """`enable_huggingface_checkpointing` is for a process; here it ends with the test that called it."""
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", PreTrainedModel.__dict__["from_pretrained"])
