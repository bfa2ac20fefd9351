#!/usr/bin/env bash
# Everything that must hold before a change is merged: format, lint, types, style, tests. Stops at the
# first failure; the last line is the closing line of the last pytest run.
set -euo pipefail

if (($#)); then
    echo "usage: tools/test.sh   (no arguments; for one test, run pytest itself)" >&2
    exit 2
fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPOSITORY"

prepare_environment dev
install_demo_weights

# A fixed number, so that sums are reduced in the same order on every machine; one, and passive waiting,
# because several tests, and the ranks of a parallel one, share few cores.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
# A test that reaches for a model hub is a test that fails without a network.
export HF_HUB_OFFLINE=1

# A test on each core; more than four would take more memory than they save time. A worker that has run out of tests
# takes some of another's, from the end, so that what a file sets up is seldom made twice.
PYTEST=(python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal)

announce() {
    printf '\n[test] %s\n' "$*"
}

step() {
    local start=$SECONDS
    announce "$*"
    if ! "$@"; then
        printf '[test] FAILED after %d s: %s\n' $((SECONDS - start)) "$*" >&2
        exit 1
    fi
    printf '[test] ok, %d s\n' $((SECONDS - start))
}

step python -m ruff format --check .
step python -m ruff check .
step python -m mypy
step python tools/check_style.py
# Once, before several workers want it.
step python tools/demo_model.py --output .cache/demo_base
step "${PYTEST[@]}" tests/unit
# Last and bare: its closing line, with its time in it, is the last line of all.
announce "${PYTEST[@]}" tests/parity tests/parallel tests/e2e
"${PYTEST[@]}" --durations=20 --durations-min=10 tests/parity tests/parallel tests/e2e
