"""Compute the hidden states of a base over conversations, in speculators' form.

    python examples/speculators/data_generation_offline.py --target-model-path BASE --train-data-path sharegpt \\
        --output-dir training_data --max-samples 5000

`--help` lists every option. Given again after an interruption, the command goes on.
"""

from __future__ import annotations

from mcore_spec.cli.main import Command, run_script
from mcore_spec.cli.speculators_arguments import DataGenerationArguments

DESCRIPTION = __doc__.partition("\n")[0]
COMMAND = Command(DataGenerationArguments, DESCRIPTION, "mcore_spec.cli.speculators_data:run", "output_dir")

if __name__ == "__main__":
    raise SystemExit(run_script(COMMAND, prog="data_generation_offline.py"))
