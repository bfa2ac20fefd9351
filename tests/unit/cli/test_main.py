"""The entry points: commands, exit codes, one line for an error, and nothing heavy before it is needed."""

from __future__ import annotations

import errno
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_spec.cli import main as entry
from mcore_spec.cli.arguments import ConvertArguments
from mcore_spec.cli.terminal import say
from mcore_spec.errors import CheckpointError

REPOSITORY = Path(__file__).resolve().parents[3]
ARGV = ("convert", "--export-algorithm", "eagle", "--load", "base", "--save", "/out")

received: list[ConvertArguments] = []


def record(arguments: ConvertArguments) -> None:
    """Stands in for the command's own function."""
    received.append(arguments)


@pytest.fixture
def run_with(monkeypatch):
    """Run `ARGV` with a command that raises `error`, or records its arguments; returns the exit code."""
    monkeypatch.delenv("RANK", raising=False)

    def run(error: BaseException | None = None) -> int:
        def fail(arguments: ConvertArguments) -> None:
            assert error is not None
            raise error

        monkeypatch.setattr(sys.modules[__name__], "target", fail if error else record, raising=False)
        command = entry.COMMANDS["convert"]._replace(target=f"{__name__}:target")
        monkeypatch.setattr(entry, "COMMANDS", {"convert": command})
        return entry.main(ARGV)

    return run


def test_a_command_receives_its_arguments(run_with, capsys):
    received.clear()
    assert run_with() == 0
    assert [(each.load, each.save) for each in received] == [("base", "/out")]
    assert capsys.readouterr() == ("", "")


def test_run_command_reads_the_process_command_line(run_with, monkeypatch):
    received.clear()
    run_with()
    monkeypatch.setattr(sys, "argv", ["script.py", *ARGV[1:-1], "/other"])
    assert entry.run_command("convert") == 0
    assert [each.save for each in received] == ["/out", "/other"]


LISTING = f"commands: {', '.join(entry.COMMANDS)}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convrt"], "unknown command 'convrt'; did you mean convert?"),
        (["qqqq"], f"unknown command 'qqqq'; {LISTING}"),
        ([], f"no command; {LISTING}; see mcore-spec --help"),
        (["export", "--export-dri", "x"], "unknown flag --export-dri; did you mean --export-dir?"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(argv, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert entry.main(argv) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_the_overview_lists_the_commands(capsys):
    assert entry.main(["--help"]) == 0
    out = capsys.readouterr().out
    width = max(map(len, entry.COMMANDS))
    for name, command in entry.COMMANDS.items():
        assert f"  {name:<{width}}  {command.description}\n" in out


def os_error(code: int, path: str | None = None) -> OSError:
    return OSError(code, errno.errorcode[code], path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("weights are missing"), "weights are missing"),
        (os_error(errno.ENOSPC), "ENOSPC: /out; free space or choose another --save"),
        (os_error(errno.ENOSPC, "/tmp/x"), "ENOSPC: /tmp/x; free space or choose another path"),
        (os_error(errno.EACCES, "/out/a"), "EACCES: /out/a; change its permissions or choose another --save"),
        (os_error(errno.EACCES, "/"), "EACCES: /; change its permissions or choose another --save"),
        (os_error(errno.EACCES, "/out2"), "EACCES: /out2; change its permissions or choose another path"),
        (os_error(errno.ENOENT, "/base"), "ENOENT: /base; check it or choose another path"),
        (OSError("cannot reach the hub"), "cannot reach the hub"),
    ],
)
def test_errors_for_the_user_are_one_line_and_code_2(error, message, run_with, capsys):
    assert run_with(error) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_a_fault_of_ours_keeps_its_traceback(run_with):
    with pytest.raises(ZeroDivisionError):
        run_with(ZeroDivisionError())


def test_a_command_that_leaves_is_not_taken_for_help(run_with):
    with pytest.raises(SystemExit) as caught:
        run_with(SystemExit(3))
    assert caught.value.code == 3


def test_an_interrupt_is_130(run_with):
    assert run_with(KeyboardInterrupt()) == 130


def test_every_rank_but_the_first_names_itself(capsys, monkeypatch):
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        say(f"news of {rank}")
        assert entry.main(["convrt"]) == 2
    line = "error: unknown command 'convrt'; did you mean convert?\n"
    assert capsys.readouterr() == ("news of 0\n", f"{line}[rank 3] {line}")


@pytest.mark.parametrize("argv", [["--help"], ["convert", "--help"], ["export", "--help"]])
def test_help_imports_no_heavy_package(argv):
    script = (
        "import sys\n"
        "from mcore_spec.cli.main import main\n"
        f"code = main({argv!r})\n"
        "print({'torch', 'transformers', 'megatron'} & set(sys.modules), code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "set() 0"


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("convert_model.py", "convert"),
        ("export.py", "export"),
        ("validate.py", "validate"),
        ("generate.py", "generate"),
    ],
)
def test_examples_run_their_command(script, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "examples" / script), run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mcore-spec {command} ")
