#!/usr/bin/env bash
# Submit a run as a chain of jobs, each of which waits for the one before:
#
#   bash examples/slurm/submit.sh [CONFIG.sh] [FIRST_STAGE]
#
# Stages: synthesize (the base answers the prompts), convert (import, draft vocabulary, draft), train, quantize (where
# QUANTIZE_OPTIONS says how), export. A chain that broke is continued with the stage that failed; finished work is not
# done again.
set -euo pipefail

SLURM_SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=$(realpath "${1:-$SLURM_SCRIPTS/config.sh}")
FIRST=${2:-synthesize}
STAGES=(synthesize convert train quantize export)
if [[ ! " ${STAGES[*]} " == *" $FIRST "* ]]; then
    echo "error: stage $FIRST is not one of ${STAGES[*]}" >&2
    exit 2
fi

set -a # every variable of the configuration is passed on
source "$CONFIG"
set +a
export SLURM_SCRIPTS CONFIG

if ((TRAIN_NODES * RANKS_PER_NODE % (TENSOR * PIPELINE * CONTEXT))); then
    echo "error: TRAIN_NODES x RANKS_PER_NODE = $((TRAIN_NODES * RANKS_PER_NODE)) is not a multiple of TENSOR x" \
        "PIPELINE x CONTEXT = $((TENSOR * PIPELINE * CONTEXT)); change one of them in $CONFIG" >&2
    exit 2
fi
mkdir -p "$WORK/logs"

# submit STAGE NODES RANKS TIME [sbatch options]: prints the job's number.
PREVIOUS=
submit() {
    local stage=$1 nodes=$2 ranks=$3 time=$4
    shift 4
    local options=(--parsable --job-name="mcore-spec-$stage" --nodes="$nodes" --ntasks-per-node="$ranks"
        --time="$time" --output="$WORK/logs/$stage-%j.log" --open-mode=append --export=ALL)
    if ((GPUS_PER_NODE > 0)); then options+=(--gpus-per-node="$GPUS_PER_NODE"); fi
    if [[ -n $PREVIOUS ]]; then options+=(--dependency="afterok:$PREVIOUS" --kill-on-invalid-dep=yes); fi
    # shellcheck disable=SC2086 # options of the user's, several words
    PREVIOUS=$(sbatch "${options[@]}" $SBATCH_OPTIONS "$@" "$SLURM_SCRIPTS/$stage.sbatch")
    PREVIOUS=${PREVIOUS%%;*}
    echo "$stage: job $PREVIOUS, log $WORK/logs/$stage-$PREVIOUS.log"
}

started=
for stage in "${STAGES[@]}"; do
    if [[ $stage == "$FIRST" ]]; then started=1; fi
    if [[ -z $started || ($stage == synthesize && -z $PROMPTS) ]]; then continue; fi
    if [[ $stage == quantize && -z $QUANTIZE_OPTIONS ]]; then continue; fi
    case $stage in
        synthesize) submit synthesize 1 1 "$OTHER_TIME" ;;
        convert) submit convert 1 "$CONVERT_TENSOR" "$OTHER_TIME" ;;
        # The warning goes to the ranks (without "B:"): a second one, handed on by the script, would end them at once.
        train) submit train "$TRAIN_NODES" "$RANKS_PER_NODE" "$TRAIN_TIME" --requeue --signal="TERM@$GRACE_SECONDS" ;;
        quantize) submit quantize 1 "$CONVERT_TENSOR" "$OTHER_TIME" ;;
        export) submit export 1 "$CONVERT_TENSOR" "$OTHER_TIME" ;;
    esac
done
