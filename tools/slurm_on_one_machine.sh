#!/usr/bin/env bash
# A real SLURM on this one machine, and the chain of examples/slurm on it with the demo model and two ranks: submit,
# stop in the middle, requeue, resume, be preempted, resume, export.
#
#   bash tools/slurm_on_one_machine.sh setup     install (Debian, root) and start munge, slurmctld and slurmd
#   bash tools/slurm_on_one_machine.sh chain     run the chain; 5 to 8 minutes on 2 cores; DEMO_BASE names the base
#   bash tools/slurm_on_one_machine.sh stop      end the daemons that setup started
#
# The configuration, the state and the logs of the daemons lie in SLURM_HOME.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${SLURM_HOME:=/tmp/slurm_on_one_machine}"
: "${DEMO_BASE:=$REPOSITORY/.cache/demo_base}"
: "${PYTHON:=python}"
: "${SECONDS_AT_MOST:=900}"
NUM_RANKS=2
export SLURM_CONF=$SLURM_HOME/slurm.conf

write_configuration() {
    local host
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<CONF
ClusterName=one_machine
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: two minutes by default.
AuthInfo=socket=$SLURM_HOME/munge.socket,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The ranks take turns where there are fewer processors than ranks.
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=30
MpiDefault=none
ReturnToService=2
StateSaveLocation=$SLURM_HOME/state
SlurmdSpoolDir=$SLURM_HOME/spool
SlurmctldPidFile=$SLURM_HOME/slurmctld.pid
SlurmdPidFile=$SLURM_HOME/slurmd.pid
SlurmctldLogFile=$SLURM_HOME/slurmctld.log
SlurmdLogFile=$SLURM_HOME/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((NUM_RANKS * 2)) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

setup() {
    if ! command -v slurmctld >/dev/null; then
        # Daemons are started below, with a configuration of their own.
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        apt-get install --yes -qq --no-install-recommends slurm-wlm munge
        rm /usr/sbin/policy-rc.d
    fi
    mkdir -p "$SLURM_HOME/state" "$SLURM_HOME/spool" "$SLURM_HOME/munge"
    chmod 755 "$SLURM_HOME"
    write_configuration
    (umask 077 && head -c 1024 /dev/urandom >"$SLURM_HOME/munge/key")
    munged --key-file="$SLURM_HOME/munge/key" --socket="$SLURM_HOME/munge.socket" \
        --pid-file="$SLURM_HOME/munge/munged.pid" --log-file="$SLURM_HOME/munge/munged.log" \
        --seed-file="$SLURM_HOME/munge/seed" --force
    slurmctld -c
    slurmd
    for _ in $(seq 30); do
        if [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle ]]; then
            sinfo
            return
        fi
        sleep 1
    done
    sinfo || true
    echo "error: the node is not idle; see $SLURM_HOME/slurmd.log and slurmctld.log" >&2
    return 1
}

stop() {
    for file in "$SLURM_HOME"/slurmd.pid "$SLURM_HOME"/slurmctld.pid "$SLURM_HOME"/munge/munged.pid; do
        if [[ -f $file ]]; then kill "$(cat "$file")" || true; fi
    done
}

# state JOB: PENDING, RUNNING, COMPLETED, ...
state() {
    scontrol show job "$1" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'
}

# wait_for JOB WHAT COMMAND...: until the command succeeds; not beyond the end of the job.
wait_for() {
    local job=$1 what=$2 deadline=$((SECONDS + SECONDS_AT_MOST)) ended=
    shift 2
    until "$@"; do
        if ((SECONDS > deadline)) || [[ -n $ended ]]; then
            echo "error: no $what; job $job is ${ended:-$(state "$job")} after $SECONDS s; see $SLURM_HOME/runs/logs" >&2
            exit 1
        fi
        # Looked at before the command has its last chance.
        if has_ended "$job"; then ended=$(state "$job"); fi
        sleep 1
    done
}

has_ended() {
    [[ $(state "$1") =~ ^(|COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY)$ ]]
}

has_iteration() {
    grep --quiet "^iteration $2:" "$1" 2>/dev/null
}

chain() {
    local work=$SLURM_HOME/runs submitted train export_job log
    rm -rf "$work"
    mkdir -p "$work"
    head -n 8 "$REPOSITORY/examples/data/prompts.jsonl" >"$work/prompts.jsonl"
    cat >"$work/config.sh" <<CONFIG
BASE=$DEMO_BASE
WORK=$work
PROMPTS=$work/prompts.jsonl
DRAFT_VOCAB_SIZE=2000
TRAIN_NODES=1
RANKS_PER_NODE=$NUM_RANKS
TENSOR=1
PIPELINE=$NUM_RANKS
CONTEXT=1
SEQ_LENGTH=128
GLOBAL_BATCH_SIZE=2
TRAIN_OPTIONS="--train-iters 40 --lr 1e-3 --log-interval 1 --save-interval 5 --split 7,1,0"
CONVERT_TENSOR=1
CONVERT_OPTIONS="--params-dtype fp32"
SYNTHESIZE_OPTIONS="--max-tokens 16 --batch-size 8"
SERVER_COMMAND=
GPUS_PER_NODE=0
TRAIN_TIME=00:30:00
OTHER_TIME=00:30:00
GRACE_SECONDS=60
MCORE_SPEC="$PYTHON -m mcore_spec.cli.main"
OMP_NUM_THREADS=1
HF_HUB_OFFLINE=1
PYTHONPATH=$REPOSITORY
source "$REPOSITORY/examples/slurm/config.sh"
CONFIG
    submitted=$(bash "$REPOSITORY/examples/slurm/submit.sh" "$work/config.sh")
    echo "$submitted"
    train=$(sed -n 's/^train: job \([0-9]*\),.*/\1/p' <<<"$submitted")
    export_job=$(sed -n 's/^export: job \([0-9]*\),.*/\1/p' <<<"$submitted")
    log=$work/logs/train-$train-attempt

    wait_for "$train" "fourth iteration" has_iteration "$log-0.log" 4
    echo "--- stopping job $train in the middle: scancel --signal=TERM"
    scancel --signal=TERM "$train"
    wait_for "$train" "second attempt" test -f "$log-1.log"
    wait_for "$train" "tenth iteration" has_iteration "$log-1.log" 10
    echo "--- preempting it: scontrol requeue"
    scontrol requeue "$train"
    wait_for "$export_job" "end of the export" has_ended "$export_job"

    for attempt in "$log"-*.log; do
        echo "--- $(basename "$attempt")"
        grep --extended-regexp '^(loaded|resumed|iteration|done|stopped)|nothing to do$' "$attempt" || true
    done
    squeue
    for job in $train $export_job; do
        scontrol show job "$job" | grep --only-matching --extended-regexp '(JobId|JobName|JobState|Restarts)=[^ ]*' | paste -sd' '
    done
    if [[ $(state "$train") != COMPLETED || $(state "$export_job") != COMPLETED ]]; then
        echo "error: the chain did not end well; see $work/logs" >&2
        exit 1
    fi
    ls -l "$work/draft"
}

case ${1:-} in
    setup | chain | stop) "$1" ;;
    *)
        sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
