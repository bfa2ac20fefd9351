#!/usr/bin/env bash
# Does the package `speculators` read what the export wrote? It wants other versions than this package, so
# it gets an environment of its own. Exports nothing: give it two exports of one draft.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/check_speculators.sh SPECULATORS_DIR HF_DIR

  SPECULATORS_DIR   written by `examples/export.py --export-extra-modules --export-format speculators`
  HF_DIR            the same draft, written with `--export-format hf`

The base must still lie where SPECULATORS_DIR/config.json says (speculators_config.verifier.name_or_path).
Settings: SPECULATORS_VENV   the environment (default: .venv-speculators in the repository root)
          PYTHON             the interpreter that makes it (default: python3.11)
TEXT
}

if (($# != 2)) || [[ "$1" == -* ]]; then
    usage >&2
    exit 2
fi

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${SPECULATORS_VENV:-$repository/.venv-speculators}"
if [[ ! -x "$venv/bin/python" ]]; then
    echo "creating $venv"
    "${PYTHON:-python3.11}" -m venv "$venv"
fi
if ! "$venv/bin/python" -c 'from importlib.metadata import version; assert version("speculators") == "0.9.0"' \
    2>/dev/null; then
    echo "installing speculators 0.9.0"
    "$venv/bin/python" -m pip install --quiet torch==2.13.0
    "$venv/bin/python" -m pip install --quiet torch==2.13.0 speculators==0.9.0
fi

export HF_HUB_OFFLINE=1 PYTHONPATH="$repository"
exec "$venv/bin/python" "$repository/tools/check_speculators.py" "$1" "$2"
