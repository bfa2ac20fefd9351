#!/usr/bin/env bash
# Two EAGLE-3 drafts from the same conversations, this package's and ModelOpt's, served in vLLM on this machine's
# processor: which of them proposes what the base accepts? From nothing: environments, data, training, serving, table.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/benchmark/acceptance.sh --data-path FILE [--contenders "NAME ..."] [--threads N] [--work-dir DIR]
                                     [--variant NAME [--convert-flags "..."] [--finetune-flags "..."]]

  --data-path       conversations, JSON lines: the first 400 are learnt from, the first questions of the next 40 asked
  --contenders      of ours modelopt (default: both)
  --variant         measure this package with other options as a contender of its own, ours-NAME
  --convert-flags   further options of mcore-spec convert for the variant
  --finetune-flags  further options of mcore-spec finetune for the variant; an option that is set here takes its value
  --threads         (default: 2)
  --work-dir        base, data, drafts, logs and results.jsonl (default: bench_acceptance_out in the repository)

May be run again: what is finished in the work directory stays, and joins the table. To measure a contender again,
remove its files there (CONTENDER.*).

Settings: MCORE_SPEC_BENCH_ENVS   directory of the peer's environment (default: .venv-bench in the repository)
          VLLM_VENV                environment with vLLM (default: .venv-vllm in the repository)
          MCORE_SPEC_VENV, PYTHON  as for tools/quickstart.sh
TEXT
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/environments.sh"
data_path="" contenders="ours modelopt" variant="" convert_flags="" finetune_flags="" threads=2
work_dir="$here/../../bench_acceptance_out"
while (($#)); do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --data-path | --contenders | --variant | --convert-flags | --finetune-flags | --threads | --work-dir)
            take_value "$@"
            shift 2
            ;;
        *)
            refuse "unknown argument: $1"
            ;;
    esac
done
check_contenders "$contenders" "ours modelopt"
if [[ -z "$data_path" ]]; then
    echo "error: --data-path is missing: name a file of conversations" >&2
    exit 2
fi
if [[ ! -r "$data_path" ]]; then
    echo "error: --data-path $data_path is no file that can be read" >&2
    exit 2
fi
if [[ -z "$variant" && -n "$convert_flags$finetune_flags" ]]; then
    echo "error: --convert-flags and --finetune-flags belong to a variant: give it a name with --variant" >&2
    exit 2
fi
if [[ ! "$variant" =~ ^[A-Za-z0-9_.-]*$ ]]; then
    echo "error: --variant $variant is to be the name of files: take letters, digits, '.', '_' and '-'" >&2
    exit 2
fi
data_path="$(realpath "$data_path")"
mkdir -p "$work_dir"
work_dir="$(cd "$work_dir" && pwd)"
cd "$REPOSITORY"

# Train and export in one process tree: CONTENDER COMMAND [ARGUMENT ...]. The time is of a whole run, so that one
# that did not end begins anew.
train() {
    local contender="$1"
    shift
    if [[ -e "$work_dir/$contender.time.json" ]]; then
        say "$contender is trained: $work_dir/$contender.export"
        return
    fi
    rm -rf "$work_dir/$contender".{export,converted,checkpoint}
    say "training $contender; its log: $work_dir/$contender.log"
    if ! "$(python_of ours)" -m tools.benchmark.acceptance_timed --output "$work_dir/$contender.time.json" -- "$@" \
        >"$work_dir/$contender.log" 2>&1; then
        tail -n 5 "$work_dir/$contender.log" >&2
        echo "error: $contender did not train" >&2
        exit 1
    fi
}

serve() {
    local contender="$1"
    if [[ -e "$work_dir/$contender.serve.json" ]]; then
        say "$contender was served: $work_dir/$contender.serve.json"
        return
    fi
    say "serving $contender"
    if ! "$vllm" tools/serve_check.py --base "$work_dir/base" --draft "$work_dir/$contender.export" \
        --prompts-path "$work_dir/prompts.jsonl" --steps 3 --osl 64 --output "$work_dir/$contender.serve.json" \
        >"$work_dir/$contender.serve.log" 2>&1; then
        tail -n 5 "$work_dir/$contender.serve.log" >&2
        echo "error: $contender could not be served" >&2
        exit 1
    fi
}

prepare_contender ours
if [[ " $contenders " == *" modelopt "* ]]; then
    prepare_contender modelopt
fi
bash tools/vllm_environment.sh
vllm="${VLLM_VENV:-$REPOSITORY/.venv-vllm}/bin/python"
isolate "$threads"

python tools/demo_model.py --output "$work_dir/base"
python -m tools.benchmark.acceptance_data --base "$work_dir/base" --data-path "$data_path" --work-dir "$work_dir"

for contender in $contenders; do
    if [[ "$contender" == ours ]]; then
        contender="ours${variant:+-$variant}"
        flags="$(printf '%s\n' "$convert_flags" "$finetune_flags")"
        if [[ -e "$work_dir/$contender.flags" && "$(<"$work_dir/$contender.flags")" != "$flags" ]]; then
            echo "error: $work_dir has a $contender with other options ($contender.flags): choose another --variant" >&2
            exit 2
        fi
        printf '%s\n' "$flags" >"$work_dir/$contender.flags"
        train "$contender" bash "$here/acceptance_ours.sh" "$work_dir" "$contender" "$convert_flags" "$finetune_flags"
    else
        train modelopt "$(python_of modelopt)" -m tools.benchmark.acceptance_modelopt \
            --base "$work_dir/base" --work-dir "$work_dir" --export-dir "$work_dir/modelopt.export" --threads "$threads"
    fi
    serve "$contender"
done
python -m tools.benchmark.acceptance_table "$work_dir"
