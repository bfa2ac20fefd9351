# What a run is made of. Copy it, change it, and start the chain with
#
#   bash examples/slurm/submit.sh my_config.sh
#
# Every variable reaches every job (sbatch --export=ALL); one that is set before submit.sh is called wins over this
# file, also an empty one. Ask `mcore-spec plan --find-layout` which layout a base needs. These values: Llama-3.1-70B on 8 x 80 GB nodes.

# --- what -----------------------------------------------------------------------------------------
: "${BASE=meta-llama/Llama-3.1-70B-Instruct}" # Hugging Face directory or hub id
: "${WORK=$PWD/runs/llama-3.1-70b}"           # everything is written below it; on a file system that all nodes see
: "${PROMPTS=examples/data/prompts.jsonl}"    # the base answers them; empty: CONVERSATIONS is there already
: "${CONVERSATIONS=$WORK/conversations.jsonl}"
: "${DRAFT_VOCAB_SIZE=32000}" # empty: the draft speaks the base's whole vocabulary
: "${ALGORITHM_CONFIG=}"      # JSON with the draft's configuration; empty: the defaults

# --- how it is trained ----------------------------------------------------------------------------
# Nodes x ranks a node = TENSOR x PIPELINE x CONTEXT x data-parallel copies.
: "${TRAIN_NODES=16}"
: "${RANKS_PER_NODE=8}"
: "${TENSOR=8}"
: "${PIPELINE=4}"
: "${CONTEXT=2}"
: "${SEQ_LENGTH=8192}"
: "${MICRO_BATCH_SIZE=1}"
: "${GLOBAL_BATCH_SIZE=64}"
# Length of the run, precision, learning rate: any further options of finetune.
: "${TRAIN_OPTIONS=--bf16 --num-epochs 2 --lr 1e-4 --lr-warmup-iters 100 --save-interval 200 --eval-interval 200}"

# --- the other jobs -------------------------------------------------------------------------------
: "${CONVERT_TENSOR=8}"       # ranks of one node that convert and export; any layout loads in any other
: "${CONVERT_OPTIONS=}"       # further options of convert, such as --params-dtype bf16
: "${SYNTHESIZE_OPTIONS=--max-tokens 2048}"
# A server of the base on the node of the synthesis; empty: the base answers inside of the job (small models).
: "${SERVER_COMMAND=vllm serve $BASE --tensor-parallel-size 8 --port 8000}"
: "${SERVER_URL=http://127.0.0.1:8000}"
# Recipe and calibration, such as --export-quant-cfg fp8 --calib-size 512 --calib-data $CONVERSATIONS; empty: none.
: "${QUANTIZE_OPTIONS=}"
: "${EXPORT_OPTIONS=}"

# --- the cluster ----------------------------------------------------------------------------------
: "${GPUS_PER_NODE=8}" # 0: no GPUs are asked for
: "${TRAIN_TIME=24:00:00}"
: "${OTHER_TIME=08:00:00}"
: "${GRACE_SECONDS=300}"   # SLURM's warning before the time is over: enough for a checkpoint
: "${SBATCH_OPTIONS=}"     # --partition, --account, --qos, ...
: "${CONTAINER_IMAGE=}"    # image with this package (pyxis); empty: the nodes' own Python
: "${CONTAINER_MOUNTS=$PWD:$PWD,$WORK:$WORK}"
: "${MCORE_SPEC=mcore-spec}" # the command
