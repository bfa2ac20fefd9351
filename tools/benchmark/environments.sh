# Sourced by the benchmarks: an environment for each contender, in which only that one is installed.
#
#     source tools/benchmark/environments.sh
#     prepare_contender ours          # this package; afterwards `python` is its environment's
#     prepare_contender modelopt
#     python_of modelopt              # prints the interpreter
#
# Settings, all optional, beside those of tools/environment.sh:
#     MCORE_SPEC_BENCH_ENVS   directory of the peers' environments (default: .venv-bench in the repository)

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

MODELOPT="nvidia-modelopt[hf]==0.47.0"
SPECULATORS="speculators==0.9.0"
PEER_ENVIRONMENTS="${MCORE_SPEC_BENCH_ENVS:-$REPOSITORY/.venv-bench}"

# An environment with one peer, which wants other versions than this package: NAME REQUIREMENT.
prepare_peer() {
    local venv="$PEER_ENVIRONMENTS/$1" requirement="$2" torch package
    package="${requirement%%[\[=]*}"
    if [[ ! -x "$venv/bin/python" ]]; then
        say "creating $venv"
        "$(find_python)" -m venv "$venv"
    fi
    if [[ "$("$venv/bin/python" -c "from importlib.metadata import version; print(version('$package'))" 2>/dev/null)" \
        != "${requirement##*==}" ]]; then
        # torch first and by name, so that the peer's requirements choose no other build.
        torch="$(grep -E '^torch==' "$REPOSITORY/constraints.txt")"
        say "installing $torch and $requirement"
        "$venv/bin/python" -m pip install --quiet "$torch"
        "$venv/bin/python" -m pip install --quiet "$torch" "$requirement"
    fi
}

prepare_contender() {
    case "$1" in
        ours | ours_hf)
            prepare_environment demo
            install_demo_weights
            ;;
        modelopt) prepare_peer modelopt "$MODELOPT" ;;
        speculators) prepare_peer speculators "$SPECULATORS" ;;
    esac
}

python_of() {
    if [[ "$1" == ours* || "$1" == reference ]]; then
        printf '%s\n' "$VENV/bin/python"
    else
        printf '%s\n' "$PEER_ENVIRONMENTS/$1/bin/python"
    fi
}

# Refuse names of contenders that are not among the known ones: "NAMES" "KNOWN".
check_contenders() {
    local contender
    for contender in $1; do
        if [[ " $2 " != *" $contender "* ]]; then
            echo "error: --contenders $contender is none of ${2// /, }" >&2
            exit 2
        fi
    done
}

# Give the variable of a script's option its value; without one its `usage` and the end: OPTION [VALUE] ...
take_value() {
    local name="${1#--}"
    [[ -n "${2:-}" ]] || refuse "$1 needs a value"
    printf -v "${name//-/_}" '%s' "$2"
}

refuse() {
    echo "error: $1" >&2
    usage >&2
    exit 2
}

# One directory on the path for all environments; no network, no device, and no more threads than measured: THREADS.
isolate() {
    export PYTHONPATH="$REPOSITORY" HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="$1" MKL_NUM_THREADS="$1"
}
