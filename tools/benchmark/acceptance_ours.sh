#!/usr/bin/env bash
# This package's side of acceptance.sh: convert, train and export with the commands that users have. Their defaults, but
# for what both contenders are told.
#
#     acceptance_ours.sh WORK_DIR CONTENDER CONVERT_FLAGS FINETUNE_FLAGS
set -euo pipefail

# Fill `options` with a variant's own flags, and with those of the pairs that it does not have: FLAGS [--flag value]...
choose_options() {
    local flags="$1"
    shift
    # shellcheck disable=SC2206 # a list of options
    options=($flags)
    while (($#)); do
        if [[ " $flags " != *" $1 "* && " $flags " != *" $1="* ]]; then
            options+=("$1" "$2")
        fi
        shift 2
    done
}

out="$1/$2"
choose_options "$3" --pretrained-model-path "$1/base" --params-dtype fp32 --seed 0 \
    --export-algorithm eagle --export-eagle-algorithm eagle3 --save "$out.converted"
mcore-spec convert "${options[@]}"

# Conversations are taken in another order than the file's, and those without anything to learn are left out.
choose_options "$4" --load "$out.converted" --save "$out.checkpoint" \
    --data-path "$1/train.jsonl" --split 100,0,0 --seq-length 256 \
    --micro-batch-size 4 --global-batch-size 4 --train-iters 100 \
    --lr 5e-4 --lr-warmup-iters 10 --clip-grad 0.5 --seed 0
mcore-spec finetune --no-packing "${options[@]}"

mcore-spec export --load "$out.checkpoint" --export-dir "$out.export" --export-extra-modules
