# What the jobs share. Sourced by *.sbatch.
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# In the image too: pyxis lets a variable of the image win unless it is named.
PASSED=MASTER_ADDR,MASTER_PORT,HF_HOME,HF_HUB_OFFLINE,OMP_NUM_THREADS,SLURM_SCRIPTS
CONTAINER=()
if [[ -n $CONTAINER_IMAGE ]]; then
    CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS"
        --container-workdir="$PWD" --container-env="$PASSED")
fi

# prepare TASKS COMMAND...: the command with one task a rank, in STEP.
prepare() {
    local tasks=$1
    shift
    STEP=(srun --ntasks="$tasks" --kill-on-bad-exit=1 "${CONTAINER[@]}" bash "$SLURM_SCRIPTS/rank.sh" "$@")
}

# launch TASKS COMMAND...: the same, run to its end.
launch() {
    prepare "$@"
    "${STEP[@]}"
}
