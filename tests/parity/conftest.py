"""The tiny models, made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.hf_models import TINY_CONFIGS, TinyModel, make_tiny_model


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    """Every family with its special features, in float64."""
    root = tmp_path_factory.mktemp("tiny_models")
    return {name: make_tiny_model(name, root / name) for name in TINY_CONFIGS}


@pytest.fixture
def copy_of(tiny_models: dict[str, TinyModel], tmp_path: Path) -> Callable[[str], Path]:
    """A tiny model's directory that may be damaged."""
    return lambda name: Path(shutil.copytree(tiny_models[name].directory, tmp_path / name))
