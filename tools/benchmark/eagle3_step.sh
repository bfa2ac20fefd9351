#!/usr/bin/env bash
# EAGLE-3 training steps side by side on this machine's processor: this package, ModelOpt, speculators.
# From nothing: environments, base model, inputs, one process a case and contender, table.
set -euo pipefail

CASES="t1024-k3 t1024-k7 t2048-k3 t2048-k7 t1024-k3-v8192-m60 t1024-k7-v8192-m60 t2048-k3-v8192-m60 t2048-k7-v8192-m60"
CHECK_CASES="t256-k3 t256-k3-v8192-m60"
LIMIT_S=7200

usage() {
    cat <<TEXT
usage: tools/benchmark/eagle3_step.sh [--check] [--cases "NAME ..."] [--contenders "NAME ..."] [--warmup N]
                                      [--repeats N] [--threads N] [--work-dir DIR] [--append]

  --check        short cases with gradients: do all contenders compute what the reference does? Minutes.
  --cases        t1024-k3: 1 x 1024 tokens, 3 steps; -v8192: a draft vocabulary; -m60: 60 % of the tokens in the mask
                 (default: $CASES)
  --contenders   of ours ours_hf modelopt speculators, in this order; ours_hf: on the base as a transformers model
                 (default: all but that)
  --warmup       steps before the clock (default: 1)
  --repeats      measured steps (default: 3)
  --threads      (default: 2)
  --work-dir     base, inputs, logs and results.jsonl (default: bench_out in the repository)
  --append       keep the lines of earlier runs; of one contender and case the last counts

Settings: MCORE_SPEC_BENCH_ENVS   directory of the peers' environments (default: .venv-bench in the repository)
          MCORE_SPEC_VENV, PYTHON  as for tools/quickstart.sh
TEXT
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/environments.sh"
cases="$CASES" contenders="ours modelopt speculators" warmup=1 repeats=3 threads=2 append="" gradients=""
work_dir="$here/../../bench_out"
while (($#)); do
    case "$1" in
        --check)
            cases="$CHECK_CASES" gradients="--gradients"
            shift
            ;;
        --append)
            append=yes
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        --cases | --contenders | --warmup | --repeats | --threads | --work-dir)
            take_value "$@"
            shift 2
            ;;
        *)
            refuse "unknown argument: $1"
            ;;
    esac
done
check_contenders "$contenders" "ours ours_hf modelopt speculators"
mkdir -p "$work_dir/logs"
work_dir="$(cd "$work_dir" && pwd)"
cd "$REPOSITORY"

# One fresh process: CONTENDER MODULE CASE [FLAG ...]. Its last line joins the results; a failure is a line too, and
# the run goes on. Where memory ends it is this process that stops: its allocations are limited to what is
# free at its start, and should that not do, the kernel takes it first.
measure() {
    local contender="$1" module="$2" name="$3" log status=0 free_kib
    shift 3
    log="$work_dir/logs/$name.$contender"
    free_kib="$(awk '/^MemAvailable:/ {print int($2 * 0.95)}' /proc/meminfo)"
    say "$name: $contender"
    (
        ulimit -d "$free_kib"
        echo 1000 >/proc/self/oom_score_adj
        exec timeout "$LIMIT_S" "$(python_of "$contender")" -m "tools.benchmark.$module" \
            --base "$work_dir/base" --work-dir "$work_dir" --threads "$threads" "$@" "$name"
    ) >"$log.out" 2>"$log.err" || status=$?
    if ((status == 0)); then
        tail -n 1 "$log.out" >>"$results"
    else
        tail -n 3 "$log.err" >&2
        printf '{"contender": "%s", "case": "%s", "failed": "exit code %d"}\n' "$contender" "$name" "$status" >>"$results"
    fi
}

prepare_contender ours
for contender in $contenders; do
    [[ "$contender" == ours* ]] || prepare_contender "$contender"
done
isolate "$threads"
results="$work_dir/results.jsonl"
if [[ -z "$append" ]]; then
    : >"$results"
fi
python tools/demo_model.py --output "$work_dir/base"
# shellcheck disable=SC2086 # a list of names
python -m tools.benchmark.prepare --base "$work_dir/base" --work-dir "$work_dir" $cases
for name in $cases; do
    measure reference reference "$name" $gradients
    for contender in $contenders; do
        module="peer_$contender"
        if [[ "$contender" == ours* ]]; then
            module="$contender"
        fi
        measure "$contender" "$module" "$name" --warmup "$warmup" --repeats "$repeats"
    done
done
python -m tools.benchmark.table "$results"
