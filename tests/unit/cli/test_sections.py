"""A recipe: one YAML file with a section for each command."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from mcore_spec.cli.parser import Section, parse_arguments
from mcore_spec.config import StrictConfig
from mcore_spec.errors import ConfigError

SECTION = Section("bake", ["bake", "boil", "serve"])


class BakeArguments(StrictConfig):
    """What is baked."""

    heat: int = Field(180, ge=0, description="Degrees.")
    name: str | None = Field(None, description="Of the cake.")


def parse(tmp_path: Path, text: str, *flags: str) -> BakeArguments:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    words = ["--config", str(path), *flags]
    return parse_arguments(BakeArguments, words, prog="bake", description="", section=SECTION)


def test_a_command_reads_its_own_section(tmp_path: Path) -> None:
    text = "bake:\n  heat: 200\nboil:\n  minutes: 3\n"
    assert parse(tmp_path, text) == BakeArguments(heat=200)
    assert parse(tmp_path, text, "--heat", "90") == BakeArguments(heat=90)


def test_a_file_without_sections_is_read_as_before(tmp_path: Path) -> None:
    assert parse(tmp_path, "heat: 200\n") == BakeArguments(heat=200)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("boil:\n  heat: 3\n", ("no section 'bake'", "it has boil")),
        ("bake:\n  heat: 3\nserv:\n  to: all\n", ("recipe.yaml:3: serv", "did you mean serve?")),
        ("bake:\n  heat: 3\nheat: 4\n", ("recipe.yaml:3: heat", "no such command")),
        ("bake:\n  heat: 3\nboil: 4\n", ("recipe.yaml:3: boil", "expected lines of the form")),
        ("bake:\n  heat: 3\nbake:\n  heat: 4\n", ("recipe.yaml:3: bake", "keep one")),
        ("bake:\n  hea: 3\n", ("recipe.yaml:2: hea", "did you mean heat?")),
        ("bake:\n  heat: hot\n", ("recipe.yaml:2: heat = 'hot'",)),
    ],
)
def test_wrong_recipes_are_named_with_their_line(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, text)
    assert [part for part in parts if part not in str(caught.value)] == []
