"""Choose a draft vocabulary from the counts of the data generation: d2t.npy and t2d.npy.

    python examples/speculators/build_vocab_mapping.py --token-freq-path training_data/token_freq.pt \\
        --draft-vocab-size 32000 --target-model-path BASE --output-path vocab

`--help` lists every option. Given again after an interruption, the command goes on.
"""

from __future__ import annotations

from mcore_spec.cli.main import Command, run_script
from mcore_spec.cli.speculators_arguments import VocabMappingArguments

DESCRIPTION = __doc__.partition("\n")[0]
COMMAND = Command(VocabMappingArguments, DESCRIPTION, "mcore_spec.cli.speculators_vocab:run", "output_path")

if __name__ == "__main__":
    raise SystemExit(run_script(COMMAND, prog="build_vocab_mapping.py"))
