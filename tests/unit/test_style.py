"""The package keeps its style, and every rule of the checker is seen to fire on a bad sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_style

REPOSITORY = Path(__file__).resolve().parents[2]


def write_package(root: Path, files: dict[str, str]) -> Path:
    """A package `mcore_spec` under `root` with the given sources."""
    package = root / "mcore_spec"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


def offences(root: Path, files: dict[str, str]) -> list[tuple[str, int, str]]:
    return [tuple(offence) for offence in check_style.check(write_package(root, files)).offences]


def test_the_package_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    code = check_style.main([])
    report = capsys.readouterr().out
    assert code == 0, f"tools/check_style.py reports:\n{report}"
    num_files = len(list((REPOSITORY / "mcore_spec").rglob("*.py")))
    assert f"mcore_spec: {num_files} files" in report


# rule -> (file, source, line of the offence, part of what is said)
BAD_SAMPLES = {
    "argument": ("losses/a.py", "def f(a, b: int) -> None: ...\n", 1, "argument 'a' of f()"),
    "keyword argument": ("losses/a.py", "def f(*, a=1) -> None: ...\n", 1, "argument 'a' of f()"),
    "variadic argument": ("losses/a.py", "def f(*args) -> None: ...\n", 1, "argument 'args' of f()"),
    "variadic keywords": ("losses/a.py", "def f(**rest) -> None: ...\n", 1, "argument 'rest' of f()"),
    "argument of a method": ("losses/a.py", "class A:\n    def f(self, a) -> None: ...\n", 2, "argument 'a'"),
    "argument of a static method": (
        "losses/a.py",
        "class A:\n    @staticmethod\n    def f(a) -> None: ...\n",
        3,
        "argument 'a' of f()",
    ),
    "return": ("losses/a.py", "async def f():\n    ...\n", 1, "the return of f()"),
    "return of __init__": (
        "losses/a.py",
        "class A:\n    def __init__(self): ...\n",
        2,
        "the return of __init__",
    ),
    "long function": (
        "losses/a.py",
        "def f() -> None:\n" + "    pass\n" * 80,
        1,
        "f() has 81 lines, over 80",
    ),
    "long file": ("losses/a.py", "x = 1\n" * 401, 401, "file has 401 lines, over 400"),
    "bare except": ("losses/a.py", "try:\n    x = 1\nexcept:\n    pass\n", 3, "bare except"),
    "broad except": ("losses/a.py", "try:\n    x = 1\nexcept Exception:\n    pass\n", 3, "except: Exception"),
    "broad except in a tuple": (
        "losses/a.py",
        "try:\n    x = 1\nexcept (OSError, BaseException):\n    pass\n",
        3,
        "broad except: BaseException",
    ),
    "suppressing everything": (
        "losses/a.py",
        "import contextlib\nwith contextlib.suppress(Exception):\n    pass\n",
        2,
        "broad except: Exception",
    ),
    "mutable default": ("losses/a.py", "def f(a: list[int] = []) -> None: ...\n", 1, "mutable default []"),
    "mutable keyword default": (
        "losses/a.py",
        "def f(*, a: object = dict()) -> None: ...\n",
        1,
        "mutable default dict()",
    ),
    "print": ("losses/a.py", "def f() -> None:\n    print(1)\n", 2, "print() in the package"),
    "to the right": (
        "layers/a.py",
        "from mcore_spec.drafts.b import c\n",
        1,
        "layers imports to its right: drafts",
    ),
    "to the right, relative": (
        "layers/a.py",
        "from ..drafts import b\n",
        1,
        "layers imports to its right: drafts",
    ),
    "to the right, by module": (
        "layers/a.py",
        "import mcore_spec.cli.main\n",
        1,
        "layers imports to its right: cli",
    ),
    "to the right, for types only": (
        "config.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mcore_spec.layers import a\n",
        3,
        "config imports to its right: layers",
    ),
    "to the right, late": (
        "parallel/a.py",
        "def f() -> None:\n    from mcore_spec.training import t\n",
        2,
        "parallel imports to its right: training",
    ),
    "to the right, by name": (
        "parallel/a.py",
        "import importlib\nt = importlib.import_module('mcore_spec.training')\n",
        2,
        "parallel imports to its right: training",
    ),
    "sibling": ("losses/a.py", "from mcore_spec.layers.b import c\n", 1, "losses imports its sibling layers"),
    "the public surface": ("cli/a.py", "import mcore_spec\n", 1, "cli imports mcore_spec itself"),
    "unknown room": ("helpers.py", "", 1, "room 'helpers' is not in the table"),
    "transformers": (
        "training/a.py",
        "from transformers import AutoModel\n",
        1,
        "transformers is imported outside",
    ),
    "transformers in the wrong file of a room": (
        "bases/megatron.py",
        "import transformers.models\n",
        1,
        "transformers is imported outside",
    ),
    "parallel state": (
        "drafts/a.py",
        "from megatron.core import parallel_state\n",
        1,
        "parallel_state is imported outside of parallel/",
    ),
    "parallel state, by attribute": (
        "drafts/a.py",
        "import megatron.core\nx = megatron.core.parallel_state.is_initialized()\n",
        2,
        "parallel_state is used outside of parallel/",
    ),
    "transformer engine": (
        "layers/a.py",
        "import transformer_engine.pytorch as te\n",
        1,
        "transformer_engine is imported outside of parallel/",
    ),
}


@pytest.mark.parametrize("sample", BAD_SAMPLES.values(), ids=BAD_SAMPLES.keys())
def test_a_rule_fires(sample: tuple[str, str, int, str], tmp_path: Path) -> None:
    file, source, line, what = sample
    found = offences(tmp_path, {file: source})
    assert len(found) == 1, found
    assert found[0][:2] == (file, line)
    assert what in found[0][2]


def test_import_cycles_are_found(tmp_path: Path) -> None:
    found = offences(
        tmp_path,
        {
            "drafts/__init__.py": "",
            "drafts/a.py": "from mcore_spec.drafts import b\n",
            "drafts/b.py": "from __future__ import annotations\nfrom mcore_spec.drafts.c import x\n",
            "drafts/c.py": "def f() -> None:\n    from .a import y\n",
        },
    )
    chain = "mcore_spec.drafts.a -> mcore_spec.drafts.b -> mcore_spec.drafts.c -> mcore_spec.drafts.a"
    assert found == [("drafts/a.py", 1, f"import cycle: {chain}")]


def test_getattr_is_counted_and_limited(tmp_path: Path) -> None:
    rare = {f"drafts/f{index}.py": "x = 1\n" * 300 for index in range(4)}
    often = {"drafts/g.py": "y = getattr(int, 'real')\nz = hasattr(int, 'imag')\n"}
    small = check_style.check(write_package(tmp_path / "small", often))
    assert (small.num_lines, small.num_dynamic, small.offences) == (2, 2, [])
    large = check_style.check(write_package(tmp_path / "large", rare | often))
    assert (large.num_lines, large.num_dynamic) == (1202, 2)
    assert [(path, line) for path, line, _ in large.offences] == [("drafts/g.py", 1), ("drafts/g.py", 2)]
    assert "1.66 getattr/hasattr per kLOC > 1.0" in large.offences[0].what


def test_what_is_allowed(tmp_path: Path) -> None:
    good = {
        "__init__.py": "from mcore_spec.cli.main import main\n",
        "errors.py": "class ConfigError(ValueError): ...\n",
        "parallel/state.py": "import transformer_engine\nfrom megatron.core import parallel_state\n",
        "layers/linear.py": (
            "from mcore_spec.errors import ConfigError\n"
            "from mcore_spec.parallel import state\n"
            "from .norm import x\n"
            "class A:\n"
            "    def f(self, /, a: int, *args: int, b: int = 0, **rest: int) -> None: ...\n"
            "    @classmethod\n"
            "    def g(cls) -> None: ...\n"
        ),
        "layers/norm.py": "x = lambda y: y\n",
        "bases/transformers.py": "import transformers\n",
        "data/chat.py": "from transformers import AutoTokenizer\n",
        "cli/main.py": "import transformers\ndef main() -> None:\n    from mcore_spec.training import t\n",
        "training/t.py": "",
        "config.py": "def f() -> None:\n" + "    pass\n" * 79 + "\n" * 320,
    }
    assert offences(tmp_path, good) == []


def test_the_command_names_the_offender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = write_package(tmp_path, {"errors.py": "x = 1\nprint(x)\n"})
    assert check_style.main([str(package)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mcore_spec/errors.py:2: print() in the package"
    assert lines[-1].endswith("1 offender(s)")
    assert check_style.main([str(tmp_path / "nowhere")]) == 2
