"""Write the draft of a model that main.py saved as a directory that an inference engine loads.

python examples/hf/export_hf_checkpoint.py --model_path OUT --export_path DRAFT [--export_format speculators]
"""

from __future__ import annotations

import argparse
from typing import get_args

import mcore_spec
from mcore_spec.cli.terminal import say, say_error
from mcore_spec.config.quantization import QuantFormat
from mcore_spec.errors import McoreSpecError
from mcore_spec.huggingface.checkpointing import load_model


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="directory of the model with its draft")
    parser.add_argument("--export_path", required=True, help="directory to write")
    parser.add_argument("--export_format", choices=["hf", "speculators"], default="hf", help="whose form (%(default)s)")
    parser.add_argument(
        "--quant_format",
        choices=get_args(QuantFormat),
        help="whose form the scales of a quantised draft have (modelopt)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    given = parser.parse_args()
    try:
        mcore_spec.export_speculative_decoding(
            load_model(given.model_path),
            export_dir=given.export_path,
            export_format=given.export_format,
            overwrite=given.overwrite,
            quant_format=given.quant_format,
        )
    except McoreSpecError as error:
        say_error(str(error))
        return 2
    say(f"wrote {given.export_path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
