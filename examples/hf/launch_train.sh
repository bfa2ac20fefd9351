#!/usr/bin/env bash
# Train a draft on a transformers model, on as many processes as asked for, with accelerate.
#
#   bash examples/hf/launch_train.sh --model BASE --output_dir OUT --data conversations.jsonl \
#       --num_gpu 1 --num_epochs 1 [--eagle_config FILE] [--mode eagle3] [--lr 1e-4] [--train_bs 4]
#       [--training_seq_len 2048] [--offline-data DIR] [--use_fsdp True] [--cp_size 2] [any option of main.py ...]
#
# Without a GPU the processes are CPU processes. PYTHON names the interpreter. One process is started without a launcher.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
source "$here/options.sh"
model="" output_dir="" data=() num_gpu=1 num_epochs=1 mode="" lr=1e-4 train_bs=4 training_seq_len=2048
use_fsdp=False cp_size=1 offline_data=""
take_options "model output_dir data num_gpu num_epochs mode lr train_bs training_seq_len use_fsdp cp_size offline_data" "$@"
[[ -n "$model" ]] || fail "--model is missing; give the base's directory or hub id"
[[ -n "$output_dir" ]] || fail "--output_dir is missing; give the directory to write to"
[[ ${#data[@]} -gt 0 || -n "$offline_data" ]] ||
    fail "--data is missing; give a file of conversations, or --offline-data a store of hidden states"
for name in num_gpu cp_size; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "--$name ${!name}: give a whole number of at least 1"
done
[[ "$num_epochs" =~ ^[0-9]*\.?[0-9]*$ && "$num_epochs" =~ [1-9] ]] ||
    fail "--num_epochs $num_epochs: nothing would be learned; give a number above 0"
learned=()
[[ ${#data[@]} -eq 0 ]] || learned+=(--data_path "${data[@]}")
[[ -z "$mode" ]] || learned+=(--mode "$mode")
[[ -z "$offline_data" ]] || learned+=(--offline_data "$offline_data")

((num_gpu % cp_size == 0)) ||
    fail "--cp_size $cp_size does not divide --num_gpu $num_gpu, the processes that share a sequence; choose one that does"
is_sharded=""
case "${use_fsdp,,}" in
    true) is_sharded=yes ;;
    false) ;;
    *) fail "--use_fsdp $use_fsdp: give True or False" ;;
esac
[[ "$cp_size" == 1 ]] || is_sharded=yes
launch=()
training=(--report_to none --save_strategy epoch --logging_steps 10 --warmup_steps 0.03 --lr_scheduler_type cosine)
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    [[ -z "$is_sharded" ]] ||
        fail "--use_fsdp True and --cp_size above 1 need GPUs, accelerate shards on them alone; leave them out"
    training+=(--use_cpu True --dataloader_pin_memory False)
    if [[ "$num_gpu" != 1 ]]; then
        # accelerate starts several processes without GPUs through MPI alone.
        launch=(-m torch.distributed.run --nproc_per_node "$num_gpu")
        if [[ -n "${MASTER_PORT:-}" ]]; then
            launch+=(--master_port "$MASTER_PORT")
        else
            launch+=(--standalone)
        fi
        training+=(--ddp_backend gloo)
    fi
else
    if [[ "$num_gpu" == 1 ]]; then
        # Of several GPUs Trainer would take all into one process.
        visible="${CUDA_VISIBLE_DEVICES:-0}"
        export CUDA_VISIBLE_DEVICES="${visible%%,*}"
    fi
    if [[ "$num_gpu" != 1 || -n "$is_sharded" ]]; then
        launch=(-m accelerate.commands.launch --num_machines 1 --num_processes "$num_gpu")
        launch+=(--dynamo_backend no --mixed_precision no)
        [[ "$num_gpu" == 1 ]] || launch+=(--multi_gpu)
    fi
fi
if [[ -n "$is_sharded" ]]; then
    launch+=(--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP)
    launch+=(--fsdp_state_dict_type FULL_STATE_DICT)
fi
if [[ "$cp_size" != 1 ]]; then
    launch+=(--use_parallelism_config --parallelism_config_cp_size "$cp_size")
    launch+=(--parallelism_config_dp_shard_size "$((num_gpu / cp_size))")
fi

exec "$python" "${launch[@]}" "$here/main.py" \
    --model_name_or_path "$model" "${learned[@]}" --output_dir "$output_dir" \
    --num_train_epochs "$num_epochs" --learning_rate "$lr" --per_device_train_batch_size "$train_bs" \
    --training_seq_len "$training_seq_len" "${training[@]}" "${rest[@]}"
