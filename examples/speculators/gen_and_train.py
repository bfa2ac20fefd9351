"""Data generation, vocabulary mapping and training in one command.

    torchrun --nproc-per-node 8 examples/speculators/gen_and_train.py --verifier-name-or-path BASE \\
        --train-data-path sharegpt --max-samples 5000 --draft-vocab-size 32000 --output-path out --epochs 10

`--help` lists every option. Given again after an interruption, the command goes on.
"""

from __future__ import annotations

from mcore_spec.cli.main import Command, run_script
from mcore_spec.cli.speculators_arguments import GenAndTrainArguments

DESCRIPTION = __doc__.partition("\n")[0]
COMMAND = Command(GenAndTrainArguments, DESCRIPTION, "mcore_spec.cli.speculators_all:run", "output_path")

if __name__ == "__main__":
    raise SystemExit(run_script(COMMAND, prog="gen_and_train.py"))
