"""Check what ruff and mypy do not: the shape of the package and the direction of its imports.

    python tools/check_style.py [PACKAGE_DIR]

Prints one line an offender, `file:line: what`, then the counts; exit code 1 if there is any offender.
What a rule asks is its function's docstring; the limits and the rooms are the constants below.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 400
MAX_DYNAMIC_PER_KLOC = 1.0
# Below this size one getattr would already break the limit.
DYNAMIC_FROM_LINES = 1000

# The rooms of the package, left to right. A room imports itself and what is left of it; rooms of one
# rank are siblings, and do not import each other.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("config",),
    # Sizes of a run, reckoned without torch; and how models are cut over ranks.
    ("planning", "parallel"),
    ("layers", "losses", "data"),
    ("drafts", "synthesis"),
    ("bases",),
    ("objectives",),
    ("hosting",),
    ("conversion",),
    ("weights",),
    # Put on models from outside: neither bases nor drafts know of it.
    ("quantization",),
    ("checkpoint",),
    ("export", "evaluation", "engines"),
    # Where the rooms meet; the others reach it through `config.ALGORITHMS` alone.
    ("algorithms",),
    ("training", "huggingface"),
    ("cli",),
)
RANKS = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

TRANSFORMERS_HOMES = (
    "bases/transformers",
    "hosting/",
    "data/chat.py",
    "weights/",
    "synthesis/local.py",
    "engines/transformers.py",
    "evaluation/",
    "huggingface/",
    "cli/",
)
PARALLEL_HOME = "parallel/"
PARALLEL_NAMES = {"parallel_state", "transformer_engine"}
BROAD = {"Exception", "BaseException"}
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"}
MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
IMPORT_CALLS = {"import_module", "__import__", "find_spec"}
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Offence(NamedTuple):
    """One line of the report."""

    path: str
    line: int
    what: str


class Import(NamedTuple):
    """One imported module: absolute dotted name, and the name taken from it if there is one."""

    line: int
    module: str
    name: str | None


@dataclass
class Module:
    """One source file of the package."""

    name: str  # dotted, "mcore_spec.drafts.eagle3"; a package is named without __init__
    path: str  # relative to the package
    is_package: bool
    lines: int
    tree: ast.Module
    imports: list[Import] = field(default_factory=list)

    @property
    def room(self) -> str | None:
        """The first component below the package; None for the package's own __init__."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else None


@dataclass
class Report:
    """What the check found."""

    offences: list[Offence]
    num_files: int
    num_lines: int
    num_dynamic: int

    @property
    def dynamic_per_kloc(self) -> float:
        """getattr and hasattr calls for a thousand lines."""
        return 1000 * self.num_dynamic / max(self.num_lines, 1)


def check(package: Path) -> Report:
    """Apply every rule to the package in the directory `package`."""
    modules = [read_module(path, package) for path in sorted(package.rglob("*.py"))]
    offences: list[Offence] = []
    for module in modules:
        for rule in MODULE_RULES:
            offences.extend(Offence(module.path, line, what) for line, what in rule(module))
    offences.extend(import_cycles(modules))
    num_lines = sum(module.lines for module in modules)
    dynamic = [(module.path, line) for module in modules for line in dynamic_calls(module)]
    report = Report(sorted(offences), len(modules), num_lines, len(dynamic))
    if num_lines > DYNAMIC_FROM_LINES and report.dynamic_per_kloc > MAX_DYNAMIC_PER_KLOC:
        rate = f"{report.dynamic_per_kloc:.2f} getattr/hasattr per kLOC > {MAX_DYNAMIC_PER_KLOC}"
        report.offences.extend(Offence(path, line, f"dynamic attribute ({rate})") for path, line in dynamic)
    return report


# --- reading --------------------------------------------------------------------------------------


def read_module(path: Path, package: Path) -> Module:
    """Parse one file and collect its imports, wherever in the file they stand."""
    text = path.read_text(encoding="utf-8")
    relative = path.relative_to(package)
    parts = [package.name, *relative.with_suffix("").parts]
    is_package = parts[-1] == "__init__"
    if is_package:
        parts.pop()
    module = Module(
        name=".".join(parts),
        path=relative.as_posix(),
        is_package=is_package,
        lines=len(text.splitlines()),
        tree=ast.parse(text, filename=str(path)),
    )
    module.imports = list(_imports(module))
    return module


def _imports(module: Module) -> Iterator[Import]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = module.name.split(".")
                base = parts[: len(parts) - node.level + module.is_package]
                source = ".".join([*base, source] if source else base)
            for alias in node.names:
                yield Import(node.lineno, source, alias.name)
        elif isinstance(node, ast.Call) and _called_name(node) in IMPORT_CALLS and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(node.lineno, first.value, None)


def _called_name(node: ast.Call) -> str | None:
    """The last component of what is called."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else None


# --- rules on one module: (line, what) for each offender -------------------------------------------

Found = Iterator[tuple[int, str]]


def unannotated(module: Module) -> Found:
    """Every argument (`*args` too) and every return is annotated; the first of a method is not asked."""
    methods: set[ast.AST] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef):
            methods.update(
                item
                for item in node.body
                if isinstance(item, FunctionNode)
                and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in item.decorator_list)
            )
    for node in ast.walk(module.tree):
        if not isinstance(node, FunctionNode):
            continue
        positional = [*node.args.posonlyargs, *node.args.args]
        asked = [*positional[node in methods :], *node.args.kwonlyargs]
        asked += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        for argument in asked:
            if argument.annotation is None:
                yield argument.lineno, f"argument {argument.arg!r} of {node.name}() is not annotated"
        if node.returns is None:
            yield node.lineno, f"the return of {node.name}() is not annotated"


def too_long(module: Module) -> Found:
    """Functions and files keep to their limits."""
    if module.lines > MAX_FILE_LINES:
        yield module.lines, f"file has {module.lines} lines, over {MAX_FILE_LINES}"
    for node in ast.walk(module.tree):
        if isinstance(node, FunctionNode):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name}() has {length} lines, over {MAX_FUNCTION_LINES}"


def broad_except(module: Module) -> Found:
    """No bare `except`, and none that catches everything; nor `suppress(Exception)`."""
    for node in ast.walk(module.tree):
        caught: list[ast.expr] = []
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "bare except"
                continue
            caught = list(node.type.elts) if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and _called_name(node) == "suppress":
            caught = node.args
        for name in caught:
            text = ast.unparse(name).removeprefix("builtins.")
            if text in BROAD:
                yield name.lineno, f"broad except: {text}"


def mutable_defaults(module: Module) -> Found:
    """A default that all calls would share is not a list, dict or set."""
    for node in ast.walk(module.tree):
        if not isinstance(node, FunctionNode | ast.Lambda):
            continue
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            made = isinstance(default, ast.Call) and _called_name(default) in MUTABLE_CALLS
            if default is not None and (made or isinstance(default, MUTABLE_NODES)):
                yield default.lineno, f"mutable default {ast.unparse(default)}"


def prints(module: Module) -> Found:
    """The package does not print."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "print() in the package"


def import_direction(module: Module) -> Found:
    """A room imports itself and the rooms to its left; only the package's own __init__ sees all."""
    root = module.name.split(".")[0]
    if module.room is None:
        return
    if module.room not in RANKS:
        yield 1, f"room {module.room!r} is not in the table of rooms"
        return
    for line, source, name in module.imports:
        parts = source.split(".")
        if parts[0] != root:
            continue
        room = parts[1] if len(parts) > 1 else name
        if room not in RANKS:
            what = f"{room!r}, which is not a room" if room else f"{root} itself"
            yield line, f"{module.room} imports {what}; name the module that defines it"
        elif room != module.room and RANKS[room] >= RANKS[module.room]:
            relation = "its sibling" if RANKS[room] == RANKS[module.room] else "to its right:"
            yield line, f"{module.room} imports {relation} {room}"


def transformers_at_home(module: Module) -> Found:
    """`transformers` is imported only where HF models, chat templates and weights are handled."""
    if module.path.startswith(TRANSFORMERS_HOMES):
        return
    for line, source, _ in module.imports:
        if source.split(".")[0] == "transformers":
            yield line, f"transformers is imported outside of {', '.join(TRANSFORMERS_HOMES)}"


def parallel_at_home(module: Module) -> Found:
    """Only parallel/ knows megatron-core's global groups and Transformer Engine."""
    if module.path.startswith(PARALLEL_HOME):
        return
    root = module.name.split(".")[0]
    for line, source, name in module.imports:
        known = PARALLEL_NAMES.intersection([*source.split("."), name])
        if source.split(".")[0] != root and known:
            yield line, f"{known.pop()} is imported outside of {PARALLEL_HOME}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr in PARALLEL_NAMES:
            owner = ast.unparse(node.value).split(".")
            if owner[0] == "megatron" or owner[-1] == "core":
                yield node.lineno, f"{node.attr} is used outside of {PARALLEL_HOME}"


MODULE_RULES = (
    unannotated,
    too_long,
    broad_except,
    mutable_defaults,
    prints,
    import_direction,
    transformers_at_home,
    parallel_at_home,
)


# --- rules on the whole package --------------------------------------------------------------------


def dynamic_calls(module: Module) -> Iterator[int]:
    """Lines that call getattr or hasattr: attributes that no reader and no type checker can follow."""
    for node in ast.walk(module.tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id in ("getattr", "hasattr"):
            yield node.lineno


def import_cycles(modules: Sequence[Module]) -> Iterator[Offence]:
    """No chain of imports leads back to its module, type-checking and late imports included.

    One offence a cycle, the shortest through its first module; cycles that share a module with a
    reported one are left for the next run. Importing a module does not count as importing the package
    around it.
    """
    by_name = {module.name: module for module in modules}
    edges: dict[str, dict[str, int]] = {}
    for module in modules:
        targets: dict[str, int] = {}
        for line, source, name in module.imports:
            inner = f"{source}.{name}"
            target = inner if inner in by_name else source
            if target in by_name and target != module.name:
                targets.setdefault(target, line)
        edges[module.name] = targets
    reported: set[str] = set()
    for start in sorted(by_name):
        cycle = _shortest_cycle(start, edges)
        if cycle and not reported.intersection(cycle):
            reported.update(cycle)
            line = edges[start][cycle[1]]
            yield Offence(by_name[start].path, line, f"import cycle: {' -> '.join(cycle)}")


def _shortest_cycle(start: str, edges: dict[str, dict[str, int]]) -> list[str]:
    """The shortest chain start -> ... -> start, by breadth; empty if there is none."""
    came_from: dict[str, str] = {}
    frontier = [start]
    while frontier:
        following = []
        for name in frontier:
            for target in sorted(edges[name]):
                if target == start:
                    chain = [start]
                    while name != start:
                        chain.append(name)
                        name = came_from[name]
                    return [*reversed([*chain, start])]
                if target not in came_from:
                    came_from[target] = name
                    following.append(target)
        frontier = following
    return []


def main(arguments: Sequence[str]) -> int:
    """Print the report; returns the exit code."""
    repository = Path(__file__).resolve().parent.parent
    package = Path(arguments[0]) if arguments else repository / "mcore_spec"
    if not package.is_dir():
        print(f"error: {package} is not a directory; name the package to check", file=sys.stderr)
        return 2
    report = check(package)
    for offence in report.offences:
        print(f"{package.name}/{offence.path}:{offence.line}: {offence.what}")
    print(
        f"{package.name}: {report.num_files} files, {report.num_lines} lines, "
        f"{report.num_dynamic} getattr/hasattr ({report.dynamic_per_kloc:.2f} per kLOC), "
        f"{len(report.offences)} offender(s)"
    )
    return 1 if report.offences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
