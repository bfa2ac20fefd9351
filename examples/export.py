"""Write a Megatron-core checkpoint with a draft as a directory that an inference engine loads.

    python examples/export.py --load CHECKPOINT_DIR --export-dir EXPORT_DIR --export-extra-modules

`--help` lists every option. On several ranks, start it with `torchrun --nproc-per-node N`.
"""

from __future__ import annotations

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("export"))
