#!/usr/bin/env bash
# One rank: the names by which torch.distributed knows what SLURM says, then the command. No launcher of its own stands
# between SLURM and the rank, so that SIGTERM reaches it and it has all of the time that is left.
set -euo pipefail

if ((SLURM_NTASKS > 1)); then
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
fi
exec "$@"
