"""``mcore-spec validate``: how many tokens a draft saves, measured by speculative decoding of prompts."""

from __future__ import annotations

import sys
from itertools import islice

from mcore_spec.cli.convert import layout_of
from mcore_spec.cli.drafted_base import load_drafted_base, sampling_temperature, topology_of, typical_of
from mcore_spec.cli.evaluation_arguments import ValidateArguments
from mcore_spec.cli.terminal import say
from mcore_spec.data.prompts import Prompt, read_prompts
from mcore_spec.errors import EvaluationError
from mcore_spec.evaluation.acceptance import Evaluation, Evaluator, Settings
from mcore_spec.evaluation.report import check_output, check_plot, draw, table, write_json
from mcore_spec.parallel.layout import parallel_runtime, run_on_rank_zero


def run(arguments: ValidateArguments) -> None:
    """Check what can be checked, load, answer the prompts, report.

    Raises:
        EvaluationError: greedy answers with the draft are not the base's; the report is written all the same.
    """
    layout, topology = layout_of(arguments), topology_of(arguments)
    with parallel_runtime(layout, seed=arguments.seed):
        prompts = run_on_rank_zero(lambda: _prompts(arguments))
        run_on_rank_zero(lambda: _check_outputs(arguments))
        model, encoder = load_drafted_base(arguments, layout)
        settings = Settings(
            topology=topology,
            osl=arguments.osl,
            temperature=sampling_temperature(arguments),
            typical=typical_of(arguments),
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            compares=arguments.compare,
        )
        evaluator = Evaluator(model, encoder, settings)
        proposals = f"{topology.depth} steps" + ("" if topology.is_chain else f", a tree of {len(topology)} tokens")
        say(f"{len(prompts):,} prompts, {proposals}, up to {arguments.osl} new tokens each")
        evaluation = evaluator(prompts, on_prompts=_show_progress if sys.stderr.isatty() else None)
        for line in table(evaluation):
            say(line)
        run_on_rank_zero(lambda: _write(arguments, evaluation))
        if evaluation.faults:
            raise EvaluationError(
                f"{len(evaluation.faults)} greedy answers differ from the base's beyond rounding; "
                f"{evaluation.faults[0].describe()}: this is a fault of the decoding, please report it"
            )


def _prompts(arguments: ValidateArguments) -> list[Prompt]:
    return list(islice(read_prompts(arguments.prompts_path), arguments.num_prompts))


def _check_outputs(arguments: ValidateArguments) -> None:
    check_plot(arguments.plot)
    check_output(arguments.output, field="output")
    check_output(arguments.plot, field="plot")


def _show_progress(num_done: int) -> None:
    say(f"  {num_done:,} prompts answered")


def _write(arguments: ValidateArguments, evaluation: Evaluation) -> None:
    if arguments.output is not None:
        write_json(evaluation, arguments.output)
        say(f"wrote {arguments.output}")
    if arguments.plot is not None:
        draw(evaluation, arguments.plot)
        say(f"drew {arguments.plot}")
