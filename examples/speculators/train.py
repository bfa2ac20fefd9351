"""Train an EAGLE-3 draft on what the data generation wrote; each epoch is a directory for vLLM.

    torchrun --nproc-per-node 8 examples/speculators/train.py --verifier-name-or-path BASE \\
        --data-path training_data --d2t-path vocab/d2t.npy --t2d-path vocab/t2d.npy --save-path checkpoints --epochs 10

`--help` lists every option. Given again after an interruption, the command goes on.
"""

from __future__ import annotations

from mcore_spec.cli.main import Command, run_script
from mcore_spec.cli.speculators_arguments import SpeculatorsTrainArguments

DESCRIPTION = __doc__.partition("\n")[0]
COMMAND = Command(SpeculatorsTrainArguments, DESCRIPTION, "mcore_spec.cli.speculators_train:run", "save_path")

if __name__ == "__main__":
    raise SystemExit(run_script(COMMAND, prog="train.py"))
