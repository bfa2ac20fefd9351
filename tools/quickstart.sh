#!/usr/bin/env bash
# From nothing to a directory that an inference engine serves, on any machine, in minutes:
# environment, small base model, base + EAGLE-3 draft as a distributed checkpoint, export.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/quickstart.sh [--work-dir DIR]

  --work-dir DIR   where base, checkpoint and export go (default: quickstart_out in the repository)

May be run again: what is complete stays, the checkpoint gets a further iteration,
and the export is written anew.
TEXT
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
work_dir="$here/../quickstart_out"
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

show python tools/demo_model.py --output "$work_dir/base"

show torchrun --nproc_per_node=1 examples/convert_model.py \
    --pretrained-model-path "$work_dir/base" \
    --export-algorithm eagle \
    --export-eagle-algorithm eagle3 \
    --save "$work_dir/checkpoint"

show python examples/export.py \
    --load "$work_dir/checkpoint" \
    --export-dir "$work_dir/export" \
    --export-extra-modules \
    --overwrite

cat <<TEXT

What lies where:
  $work_dir/base         the base model, an HF directory
  $work_dir/checkpoint   base and draft, a Megatron-LM distributed checkpoint: train or quantise from here
  $work_dir/export       the draft as an engine reads it

Serve it (the draft is untrained: the answers are the base's own, and no faster yet):
  vllm serve $work_dir/base \\
      --speculative-config '{"method": "eagle3", "model": "$work_dir/export", "num_speculative_tokens": 3}'
TEXT
