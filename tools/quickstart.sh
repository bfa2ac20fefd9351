#!/usr/bin/env bash
# From nothing to a trained draft that an inference engine serves, on any machine: environment, small base model, its own
# answers, EAGLE-3 draft with a reduced vocabulary, training, acceptance before and after, export, and a closing page.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/quickstart.sh [--quick] [--serve] [--work-dir DIR]

  --quick          fewer answers and a shorter training: minutes, and a draft that knows little
  --serve          serve the draft in vLLM at the end, on the same prompts, and fail where its acceptance is another;
                   makes an environment for it (tools/vllm_environment.sh), unless VLLM_VENV names one
  --work-dir DIR   where everything goes (default: quickstart_out in the repository)

May be run again with the same options: what is complete stays, and an interrupted training goes on.
TEXT
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
work_dir="$here/../quickstart_out" quick="" serve=""
while (($#)); do
    case "$1" in
        --work-dir)
            if [[ -z "${2:-}" ]]; then
                echo "error: --work-dir needs a directory" >&2
                usage >&2
                exit 2
            fi
            work_dir="$2"
            shift 2
            ;;
        --work-dir=?*)
            work_dir="${1#*=}"
            shift
            ;;
        --quick)
            quick=yes
            shift
            ;;
        --serve)
            serve=yes
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            echo "error: unknown argument: $1" >&2
            usage >&2
            exit 2
            ;;
    esac
done
mkdir -p "$work_dir"
work_dir="$(cd "$work_dir" && pwd)"

source "$here/environment.sh"
cd "$REPOSITORY"

# Print a command as it can be typed, then run it.
show() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

prepare_environment demo
install_demo_weights
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

if [[ -n "$quick" ]]; then
    num_prompts=16 max_tokens=96 train_iters=20 seq_length=512 osl=48
else
    num_prompts=64 max_tokens=160 train_iters=120 seq_length=1024 osl=96
fi
prompts=examples/data/prompts.jsonl
held_out=examples/data/prompts_held_out.jsonl

show python tools/demo_model.py --output "$work_dir/base"

# A draft learns from what its base would say.
show mcore-spec synthesize \
    --model "$work_dir/base" --params-dtype fp32 \
    --prompts-path "$prompts" --num-samples "$num_prompts" --max-tokens "$max_tokens" \
    --output "$work_dir/conversations.jsonl"

show mcore-spec draft-vocab \
    --pretrained-model-path "$work_dir/base" \
    --data-path "$work_dir/conversations.jsonl" \
    --draft-vocab-size 16384 \
    --output-dir "$work_dir/vocab"

if [[ ! -e "$work_dir/converted/latest_checkpointed_iteration.txt" ]]; then
    show torchrun --nproc_per_node=1 examples/convert_model.py \
        --pretrained-model-path "$work_dir/base" \
        --export-algorithm eagle \
        --export-eagle-algorithm eagle3 \
        --draft-vocab-cache "$work_dir/vocab/d2t.pt" \
        --params-dtype fp32 \
        --save "$work_dir/converted"
fi

if [[ ! -e "$work_dir/validate_before.json" ]]; then
    show python examples/validate.py \
        --load "$work_dir/converted" --prompts-path "$held_out" --steps 3 --osl "$osl" \
        --output "$work_dir/validate_before.json"
fi

show torchrun --nproc_per_node=1 examples/finetune.py \
    --load "$work_dir/converted" --save "$work_dir/checkpoint" \
    --data-path "$work_dir/conversations.jsonl" \
    --seq-length "$seq_length" --global-batch-size 1 --train-iters "$train_iters" \
    --lr 5e-4 --lr-warmup-iters 5 --log-interval 5 --split 95,5,0

show python examples/validate.py \
    --load "$work_dir/checkpoint" --prompts-path "$held_out" --steps 3 --osl "$osl" \
    --output "$work_dir/validate.json" --plot "$work_dir/acceptance.png"

show python examples/export.py \
    --load "$work_dir/checkpoint" \
    --export-dir "$work_dir/export" \
    --export-extra-modules \
    --overwrite

# What vLLM counts on the same prompts; the page is written whether they agree or not.
agrees=yes served=()
if [[ -n "$serve" ]]; then
    show bash tools/vllm_environment.sh
    served=(--served "$work_dir/serve.json")
    rm -f "$work_dir/serve.json"
    show env PYTHONPATH="$REPOSITORY" "${VLLM_VENV:-$REPOSITORY/.venv-vllm}/bin/python" tools/serve_check.py \
        --base "$work_dir/base" --draft "$work_dir/export" --prompts-path "$held_out" --steps 3 --osl "$osl" \
        --validated "$work_dir/validate.json" --output "$work_dir/serve.json" || agrees=""
    if [[ ! -e "$work_dir/serve.json" ]]; then
        echo "error: vLLM did not serve the draft" >&2
        exit 1
    fi
fi

show python tools/quickstart_report.py --work-dir "$work_dir" --osl "$osl" "${served[@]}"
if [[ -z "$agrees" ]]; then
    echo "error: vLLM accepts another number of tokens than validate measured; see the page" >&2
    exit 1
fi
