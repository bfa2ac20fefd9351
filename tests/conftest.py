"""What every test may ask for: ranks, and the demo base model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import RankPool
from tools.demo_model import build_demo_model

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Worker processes for tests on several ranks; they start with the first job."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """The demo model as an HF directory, made once and kept. Without its package: an error, no skip."""
    return build_demo_model(REPOSITORY / ".cache" / "demo_base")
