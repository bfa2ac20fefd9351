"""The scripts in examples/slurm with commands of SLURM that only record: the chain, stopping, and the queue again.

On a real SLURM: tools/slurm_on_one_machine.sh.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"

# Each records its words, and one variable of the configuration that must have come along.
RECORDING = """#!/usr/bin/env bash
echo "$(basename "$0") $* [$SEQ_LENGTH]" >>"$CALLS"
"""
SBATCH = RECORDING + 'echo $((100 + $(grep --count "^sbatch" "$CALLS")))\n'
# A run that says its end at once, or that goes on until it is stopped.
SRUN = (
    RECORDING
    + """
if [[ -n ${RUN_SAYS:-} ]]; then echo "$RUN_SAYS"; exit "${RUN_CODE:-0}"; fi
echo "loaded"
until [[ -e $STOP ]]; do /bin/sleep 0.05; done
echo "stopped, give the same command to go on: iteration 3 of 12"
"""
)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a submission: recording commands first in the path."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": RECORDING, "sleep": RECORDING}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return {
        **kept,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "STOP": str(tmp_path / "stop"),
        "WORK": str(tmp_path / "work"),
    }


def calls(environment: dict[str, str], command: str) -> list[str]:
    path = Path(environment["CALLS"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(command + " ")]


def submit(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / "submit.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_each_job_waits_for_the_one_before(slurm: dict[str, str]) -> None:
    done = submit(slurm)
    assert done.returncode == 0, done.stderr
    jobs = calls(slurm, "sbatch")
    assert [line.split("--job-name=")[1].split()[0] for line in jobs] == [
        f"mcore-spec-{stage}" for stage in ("synthesize", "convert", "train", "export")
    ]
    assert "--dependency" not in jobs[0]
    for number, line in enumerate(jobs[1:], start=101):
        assert f"--dependency=afterok:{number} --kill-on-invalid-dep=yes" in line
    # TP8 PP4 CP2, two copies.
    assert "--nodes=16 --ntasks-per-node=8" in jobs[2]
    assert "--requeue --signal=TERM@300" in jobs[2] and "--requeue" not in jobs[1] + jobs[3]
    assert all("--export=ALL" in line and line.endswith("[8192]") for line in jobs)
    assert "train: job 103" in done.stdout


def test_a_variable_that_is_set_wins_and_a_chain_can_begin_later(slurm: dict[str, str]) -> None:
    changed = {**slurm, "SEQ_LENGTH": "64", "GPUS_PER_NODE": "0", "SBATCH_OPTIONS": "--partition=large --qos=high"}
    assert submit(changed, str(SCRIPTS / "config.sh"), "train").returncode == 0
    train, export = calls(slurm, "sbatch")
    assert train.endswith("train.sbatch [64]") and export.endswith("export.sbatch [64]")
    assert "--dependency" not in train and "--dependency=afterok:101" in export
    assert "--gpus-per-node" not in train and "--partition=large --qos=high" in export
    # Quantisation is a job of its own where it is asked for.
    Path(slurm["CALLS"]).unlink()
    quantised = {**slurm, "QUANTIZE_OPTIONS": "--export-quant-cfg int8_per_channel"}
    assert submit(quantised, str(SCRIPTS / "config.sh"), "train").returncode == 0
    _, quantize, export = calls(slurm, "sbatch")
    assert "quantize.sbatch" in quantize and "--dependency=afterok:101" in quantize
    assert "export.sbatch" in export and "--dependency=afterok:102" in export
    # Conversations that are there already need no synthesis.
    Path(slurm["CALLS"]).unlink()
    assert submit({**slurm, "PROMPTS": ""}).returncode == 0
    assert "convert.sbatch" in calls(slurm, "sbatch")[0]


@pytest.mark.parametrize(
    ("changes", "words", "part"),
    [
        ({"TRAIN_NODES": "3"}, (), "TRAIN_NODES x RANKS_PER_NODE = 24 is not a multiple of"),
        (
            {},
            (str(SCRIPTS / "config.sh"), "trian"),
            "stage trian is not one of synthesize convert train quantize export",
        ),
    ],
)
def test_a_wrong_chain_is_not_submitted(
    slurm: dict[str, str], changes: dict[str, str], words: tuple[str, ...], part: str
) -> None:
    done = submit({**slurm, **changes}, *words)
    assert done.returncode == 2 and part in done.stderr
    assert calls(slurm, "sbatch") == []


# --- the training job -----------------------------------------------------------------------------


@pytest.fixture
def job(slurm: dict[str, str]) -> dict[str, str]:
    """What SLURM and submit.sh give to the training job."""
    (Path(slurm["WORK"]) / "logs").mkdir(parents=True)
    command = f"set -a; source {SCRIPTS / 'config.sh'}; env -0"
    output = subprocess.run(["bash", "-c", command], env=slurm, capture_output=True, text=True, check=True).stdout
    given = dict(entry.split("=", 1) for entry in output.split("\0") if entry)
    return {
        **given,
        "SLURM_SCRIPTS": str(SCRIPTS),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-16]",
    }


def start(job: dict[str, str]) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPTS / "train.sbatch")]
    return subprocess.Popen(command, env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("says", ["done: iteration 12 of 12, 24 samples", "x is the end of the run: 12; nothing to do"])
def test_a_run_at_its_end_is_a_job_that_succeeds(job: dict[str, str], says: str) -> None:
    process = start({**job, "RUN_SAYS": says})
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "the run is at its end" in output
    (launched,) = calls(job, "srun")
    assert "--ntasks=128" in launched and "--pipeline-model-parallel-size 4 --context-parallel-size 2" in launched
    assert "--sequence-parallel" in launched and "--bf16" in launched and "container" not in launched
    assert not any("requeue" in line for line in calls(job, "scontrol"))


def test_a_run_that_fails_is_a_job_that_fails(job: dict[str, str]) -> None:
    process = start({**job, "RUN_SAYS": "error: no such file", "RUN_CODE": "2"})
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "error: no such file" in output
    assert not any("requeue" in line for line in calls(job, "scontrol"))


def test_a_run_that_was_stopped_goes_into_the_queue_again(job: dict[str, str]) -> None:
    process = start({**job, "RUN_SAYS": "stopped, give the same command to go on: iteration 3 of 12"})
    assert process.wait(timeout=30) == 0  # the recording sleep ends at once
    assert calls(job, "scontrol")[-1].startswith("scontrol requeue 7 ")


def test_a_signal_to_the_script_does_not_leave_the_ranks_alone(job: dict[str, str], tmp_path: Path) -> None:
    """Preemption may signal the script beside the ranks; it waits for them and is there to requeue."""
    process = start({**job, "SLURM_RESTART_COUNT": "1"})
    log = Path(job["WORK"]) / "logs" / "train-7-attempt-1.log"
    wait_until(lambda: log.exists() and "loaded" in log.read_text())
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    (tmp_path / "stop").touch()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "stopped before its end" in output
    assert calls(job, "scontrol")[-1].startswith("scontrol requeue 7 ")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_container_gets_mounts_and_variables(job: dict[str, str]) -> None:
    image = {"CONTAINER_IMAGE": "registry/mcore_spec:1", "CONTAINER_MOUNTS": "/data:/data"}
    process = start({**job, **image, "RUN_SAYS": "done: iteration 12 of 12"})
    process.communicate(timeout=30)
    (launched,) = calls(job, "srun")
    for part in ("--container-image=registry/mcore_spec:1", "--container-mounts=/data:/data", "--container-env=MASTER"):
        assert part in launched


def test_a_rank_is_named_as_torch_distributed_names_it(slurm: dict[str, str]) -> None:
    command = ["bash", str(SCRIPTS / "rank.sh"), "bash", "-c", "echo $RANK $LOCAL_RANK $WORLD_SIZE"]
    named = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
    kept = {name: value for name, value in slurm.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    outputs = [
        subprocess.run(command, env={**kept, **each}, capture_output=True, text=True, check=True).stdout.strip()
        for each in (named, {**named, "SLURM_NTASKS": "1"})
    ]
    assert outputs == ["9 1 16", ""]
