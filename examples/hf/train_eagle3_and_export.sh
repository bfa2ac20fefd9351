#!/usr/bin/env bash
# From a base model to a served EAGLE-3 draft in one line: train, validate, export.
#
#   bash examples/hf/train_eagle3_and_export.sh --base_model BASE [--num_gpu 1] [--data FILE [--data FILE ...]]
#       [--offline-data DIR] [--output_dir eagle3_out] [--num_prompts 16] [--osl 128] [any option of launch_train.sh ...]
#
# With neither --data nor --offline-data the base answers the prompts in examples/data/ first: a draft learns from what
# its base would say.
# OUTPUT_DIR/model is the trained model with its draft, OUTPUT_DIR/export what engines load. PYTHON names the interpreter.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
source "$here/options.sh"
base_model="" num_gpu=1 data=() output_dir=eagle3_out num_prompts=16 osl=128 offline_data=""
take_options "base_model num_gpu data output_dir num_prompts osl offline_data" "$@"
[[ -n "$base_model" ]] || fail "--base_model is missing; give the base's directory or hub id"
# ar_validate.py decodes on Megatron-core, which does not read this form's scales.
if grep -qs '"mcore_spec_quantization"' "$base_model/config.json"; then
    fail "--base_model $base_model is quantised, and is not validated here; train it on with launch_train.sh, then export_hf_checkpoint.py"
fi

mkdir -p "$output_dir"
if [[ ${#data[@]} -eq 0 && -z "$offline_data" ]]; then
    data=("$output_dir/conversations.jsonl")
    "$python" -m mcore_spec.cli.main synthesize --model "$base_model" --prompts-path "$here/../data/prompts.jsonl" \
        --output "${data[0]}"
fi
learned=(${offline_data:+--offline-data "$offline_data"})
for file in "${data[@]}"; do
    learned+=(--data "$file")
done
bash "$here/launch_train.sh" --model "$base_model" --output_dir "$output_dir/model" "${learned[@]}" \
    --num_gpu "$num_gpu" --mode eagle3 "${rest[@]}"
"$python" "$here/ar_validate.py" --model_path "$output_dir/model" --num-prompts "$num_prompts" --osl "$osl" \
    --output "$output_dir/validate.json"
"$python" "$here/export_hf_checkpoint.py" --model_path "$output_dir/model" --export_path "$output_dir/export" --overwrite
