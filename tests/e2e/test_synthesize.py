"""`mcore-spec synthesize` and `prepare-prompts` as a user runs them, killed and resumed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mcore_spec
from mcore_spec.cli.parser import parse_arguments
from mcore_spec.cli.synthesis_arguments import SynthesizeArguments
from mcore_spec.data.conversations import ConversationReader
from mcore_spec.errors import ConfigError
from tests.chat_server import Body, ChatServer, Reply, completion, echo, refusal
from tests.e2e.conftest import Run, check_refused, subprocess_environment, tree
from tests.unit.data_cases import CHATML, byte_tokenizer, write_lines

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 8
COMMAND = "import sys; from mcore_spec.cli.main import main; sys.exit(main(['synthesize', *sys.argv[1:]]))"
# The process is killed in the middle of its fourth conversation, with half a character on the disk.
KILLED = """
import os, signal
from mcore_spec.data import json_lines
append, lines = json_lines.GrowingFile.append, []
def cut(file, value):
    if "conversations" in value:
        lines.append(value)
    if len(lines) == 4:
        line = json_lines.json.dumps(value, ensure_ascii=False).encode()
        os.write(file._descriptor, line[: line.index("ü".encode()) + 1])
        os.kill(os.getpid(), signal.SIGKILL)
    append(file, value)
json_lines.GrowingFile.append = cut
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    entries = [
        {"question_id": n, "category": "xyz"[n % 3], "turns": [f"{n}.{turn} ü漢🙂" for turn in range(1 + n % 2)]}
        for n in range(NUM_PROMPTS)
    ]
    return write_lines(tmp_path / "prompts.jsonl", entries)


def words(server: ChatServer, prompts: Path, output: Path, *more: object) -> list[str]:
    given = ("--base-url", server.url, "--prompts-path", prompts, "--output", output, "--retry-delay", 0.01, *more)
    return [str(word) for word in given]


def stored(path: Path) -> dict[str, Any]:
    """The conversations as `finetune` reads them, by name."""
    read = [conversation.messages for conversation in ConversationReader([path])]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["conversations"] for line in lines] == read
    assert len({line["conversation_id"] for line in lines}) == len(lines)
    assert all(line["category"] == "xyz"[int(line["conversation_id"]) % 3] for line in lines)
    return {line["conversation_id"]: line["conversations"] for line in lines}


def process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY, env=subprocess_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_process_that_is_killed_in_the_middle_of_a_line(prompts: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out" / "x.jsonl"
    with ChatServer() as server:
        done = process(COMMAND, *words(server, prompts, whole))
        assert (done.returncode, done.stderr) == (0, "")
        killed = process(KILLED + COMMAND, *words(server, prompts, output))
        assert killed.returncode == -signal.SIGKILL
        left = output.read_bytes()
        assert left.count(b"\n") == 3 and not left.endswith(b"\n")
        with pytest.raises(UnicodeDecodeError):
            left.decode()
        server.asked.clear()
        again = process(COMMAND, *words(server, prompts, output))
        assert (again.returncode, again.stderr) == (0, "")
        asked = {turn.split(".")[0] for turn in server.turns}
        assert f"3 have a conversation in {output}, 0 were left out earlier, 5 to ask; tiny answers" in again.stdout
        assert len(asked) == 5
        assert stored(output) == stored(whole) and len(stored(whole)) == NUM_PROMPTS
        # A third time there is nothing to do.
        server.asked.clear()
        before = tree(output.parent)
        assert process(COMMAND, *words(server, prompts, output)).returncode == 0
        assert server.asked == [] and tree(output.parent) == before


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_stopped_while_it_waits(kind: signal.Signals, prompts: Path, tmp_path: Path) -> None:
    output, held = tmp_path / "x.jsonl", threading.Event()
    waiting = threading.Semaphore(0)

    def reply(body: Body) -> Reply:
        if int(body["messages"][-1]["content"].split(".")[0]) < 3:
            return echo(body)
        waiting.release()
        return echo(body)._replace(wait_for=held)

    with ChatServer(reply) as server:
        given = [sys.executable, "-c", COMMAND, *words(server, prompts, output)]
        started = subprocess.Popen(
            given, cwd=REPOSITORY, env=subprocess_environment(), stderr=subprocess.PIPE, text=True
        )
        for _ in range(NUM_PROMPTS - 3):
            assert waiting.acquire(timeout=30)
        while not output.exists() or output.read_bytes().count(b"\n") < 3:
            assert started.poll() is None
            time.sleep(0.01)
        started.send_signal(kind)
        _, errors = started.communicate(timeout=10)
        assert started.returncode == (130 if kind is signal.SIGINT else -kind) and errors == ""
        held.set()
        assert set(stored(output)) == {"0", "1", "2"}
        server.reply, server.asked = echo, []
        assert process(COMMAND, *words(server, prompts, output)).returncode == 0
        assert len(server.asked) == sum(1 + n % 2 for n in range(3, NUM_PROMPTS))
    assert len(stored(output)) == NUM_PROMPTS


def test_what_a_run_says(prompts: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "x.jsonl"

    def reply(body: Body) -> Reply:
        return completion("cut", "length") if body["messages"][-1]["content"].startswith("3.0") else echo(body)

    with ChatServer(reply) as server:
        done = run("synthesize", *words(server, prompts, output, "--drop-truncated", "--system-prompt", "Be brief."))
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == (
        f"8 prompts: 0 have a conversation in {output}, 0 were left out earlier, 8 to ask; tiny answers"
    )
    assert re.fullmatch(r"8 prompts in \d+ s, 11 answers, \d+ a minute", lines[1])
    assert lines[2:] == [
        "left out, with the reasons in x.jsonl.state: 1",
        f"done: 7 conversations for 8 prompts in {output}",
    ]
    assert {messages[0]["content"] for messages in stored(output).values()} == {"Be brief."}
    with ChatServer() as server:
        check_refused(
            run("synthesize", *words(server, prompts, output)),
            f"output = {output} was made with system_prompt = 'Be brief.', this run has None",
        )


def test_a_model_that_answers_here(base_dir: Path, prompts: Path, tmp_path: Path, run: Run) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = byte_tokenizer(CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = ("--model", tmp_path / "model", "--prompts-path", prompts, "--max-tokens", 5, "--batch-size", 3)
    first, second = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    assert run("synthesize", *given, "--output", first).code == 0
    assert run("synthesize", *given, "--output", second, "--num-samples", 3).code == 0
    done = run("synthesize", *given, "--output", second)
    assert f"8 prompts: 3 have a conversation in {second}" in done.out
    assert stored(first) == stored(second) and len(stored(first)) == NUM_PROMPTS
    # Its scales would be nobody's.
    mcore_spec.quantize(model, "int8_per_channel").save_pretrained(tmp_path / "model")
    done = run("synthesize", *given, "--output", tmp_path / "z.jsonl")
    check_refused(done, f"model = {tmp_path}/model is a quantised model (mcore_spec_quantization in its config.json)")
    assert not (tmp_path / "z.jsonl").exists()


def test_modelopts_flags(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.jsonl"
    with ChatServer() as server:
        done = subprocess.run(
            [
                *(sys.executable, "tools/server_generate.py", "--data_path", prompts, "--output_path", output),
                *("--url", server.url, "--system_prompt", "Be", "brief.", "--api_key", "secret", "--num_threads", "3"),
            ],
            cwd=REPOSITORY, env=subprocess_environment(), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert set(server.authorizations[-2:]) == {"Bearer secret"}
        assert {body["max_tokens"] for body in server.asked} == {2048}
    assert {messages[0]["content"] for messages in stored(output).values()} == {"Be brief."}


BAD: dict[str, tuple[Callable[[Body], Reply], tuple[object, ...], str]] = {
    "key": (lambda body: refusal(401, "Incorrect API key provided"), (), "status 401 (Incorrect API key provided)"),
    "model": (lambda body: refusal(404, "no such model"), ("--model", "x"), "status 404 (no such model)"),
    "too long": (
        lambda body: refusal(400, "too long"),
        (),
        "prompts.jsonl:1: turn 1 was refused: status 400 (too long)",
    ),
    "down": (lambda body: refusal(500, "down"), ("--max-retries", 1), "status 500 (down), 2 attempts"),
    "no key": (echo, ("--api-key-env", "NOT_THERE"), "--api-key-env NOT_THERE is not set"),
    "name": (echo, ("--output", "x.json"), "must end in .jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refusal_is_one_line(case: str, prompts: Path, tmp_path: Path, run: Run) -> None:
    reply, more, said = BAD[case]
    output = tmp_path / "out" / "x.jsonl"
    with ChatServer(reply) as server:
        given = ("--base-url", server.url, "--prompts-path", prompts, "--num-concurrent", 1, "--retry-delay", 0.01)
        done = run("synthesize", *given, *(more if "--output" in more else ("--output", output, *more)))
    check_refused(done, said)
    assert not output.exists() and (not output.parent.exists() or not list(output.parent.iterdir()))


def test_files_that_cannot_be_used(prompts: Path, tmp_path: Path, run: Run) -> None:
    with ChatServer() as server:
        done = run("synthesize", *words(server, prompts, prompts))
        check_refused(done, f"--output {prompts} is the file of the prompts; choose another")
        bad = write_lines(tmp_path / "bad.jsonl", [{"turns": ["a"]}, {"turns": []}])
        check_refused(run("synthesize", *words(server, bad, tmp_path / "x.jsonl")), f"{bad}:2: turns = []; it must be")
        bad.write_text("")
        check_refused(run("synthesize", *words(server, bad, tmp_path / "x.jsonl")), f"prompts_path = {bad} is empty")
        assert server.asked == [] and not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give --model (it answers here), or --base-url (a server answers)"),
        (["--model", "d", "--timeout", "3"], "--timeout would be ignored without --base-url"),
        (["--base-url", "u", "--batch-size", "3"], "--batch-size would be ignored with --base-url"),
        (["--base-url", "u", "--temperature", "nan"], "--temperature = 'nan'"),
    ],
)
def test_options_that_do_not_go_together(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(
            SynthesizeArguments, ["--prompts-path", "p", "--output", "o.jsonl", *given], prog="x", description=""
        )
    assert said in str(caught.value)


def test_a_package_that_is_missing(prompts: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mcore_spec.synthesis.server", raising=False)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    done = run("synthesize", "--base-url", "http://a/v1", "--prompts-path", prompts, "--output", tmp_path / "x.jsonl")
    check_refused(done, "--base-url needs the package httpx2: pip install 'mcore-spec[synthesize]'")


def test_several_sets_in_one_file(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "prompts.jsonl"
    mtbench = write_lines(tmp_path / "question.jsonl", [{"question_id": n, "turns": [f"q{n}"]} for n in (81, 82)])
    ultrachat = write_lines(tmp_path / "u.jsonl", [{"id": "0", "data": ["a", "x"]}, {"id": "1", "data": []}])
    done = run("prepare-prompts", "--format", "mtbench", "--input", mtbench, "--output", output, "--num-samples", 1)
    assert done.out == f"1 prompts added to {output}, 0 were there already, 0 entries left out\n"
    done = run("prepare-prompts", "--format", "mtbench", "--input", mtbench, "--output", output)
    assert done.out == f"1 prompts added to {output}, 1 were there already, 0 entries left out\n"
    script = REPOSITORY / "examples" / "hf" / "prepare_input_conversations" / "add_ultrachat.py"
    added = subprocess.run(
        [sys.executable, script, "--input", ultrachat, "--output", output],
        cwd=REPOSITORY, env=subprocess_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert added.stdout.splitlines() == [
        f"1 prompts added to {output}, 0 were there already, 1 entries left out",
        f"  left out: {ultrachat}:2: data = []; it must be a list of texts",
    ]
    assert [json.loads(line)["conversation_id"] for line in output.read_text().splitlines()] == [
        "mtbench-81", "mtbench-82", "ultrachat-0",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "question.jsonl", "u.jsonl"}
    with ChatServer() as server:
        assert run("synthesize", *words(server, output, tmp_path / "x.jsonl")).code == 0
        assert sorted(server.turns) == ["a", "q81", "q82"]
    check_refused(
        run("prepare-prompts", "--format", "own", "--input", output, "--output", output), "is the file of --input"
    )
    check_refused(run("prepare-prompts", "--format", "mtbnch", "--output", output), "did you mean mtbench?")


@pytest.mark.parametrize("name", ["daring_anteater", "sharegpt", "ultrachat", "mtbench", "own"])
def test_each_script_is_its_format(name: str) -> None:
    text = (REPOSITORY / "examples" / "hf" / "prepare_input_conversations" / f"add_{name}.py").read_text()
    assert f'["--format", "{name.replace("_", "-")}", *sys.argv[1:]]' in text
