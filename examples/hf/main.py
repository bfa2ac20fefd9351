"""Train a draft on a transformers model with transformers' Trainer; `launch_train.sh` starts it with accelerate.

    python examples/hf/main.py --model_name_or_path BASE --data_path conversations.jsonl --output_dir OUT \\
        --mode eagle3 --eagle_config config.json --num_train_epochs 1 --learning_rate 1e-4

Every option of transformers' TrainingArguments is known too; `--help` lists all. A run that was interrupted goes on
from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import sys

from mcore_spec.cli.terminal import say, say_error
from mcore_spec.errors import McoreSpecError
from mcore_spec.huggingface.arguments import parse_arguments
from mcore_spec.huggingface.train import run

STOPPED = 130


def main() -> int:
    """Returns the exit code: 0, or 2 behind one line that says what the user can repair."""
    try:
        arguments, training = parse_arguments(sys.argv[1:], description=__doc__)
        run(arguments, training, say=say)
    except McoreSpecError as error:
        say_error(str(error))
        return 2
    except KeyboardInterrupt:
        say_error("stopped; the same command goes on from the last checkpoint (--save_strategy, --save_steps)")
        return STOPPED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
