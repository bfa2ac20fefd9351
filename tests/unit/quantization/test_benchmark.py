"""The benchmark of quantisation: its table."""

from __future__ import annotations

import statistics

import pytest

from mcore_spec.evaluation.acceptance import Evaluation, Settings
from mcore_spec.evaluation.decoding import Answer
from mcore_spec.evaluation.report import to_json
from mcore_spec.evaluation.statistics import Acceptance
from mcore_spec.evaluation.tree import Topology
from tools.benchmark.quantization import HEAD, Length, Plain, Row, table


def length(tokens: float) -> Length:
    return Length(tokens, 0.01)


def test_table_says_what_was_lost_and_what_came_back() -> None:
    rows = [
        Row("fp8, max", 10.05, length(1.5), None),
        Row("int4_per_channel", 12.0, length(1.2), length(1.47)),
        Row("int8_per_channel", 10, length(1.52), length(1.6)),
    ]
    lines = table(rows, plain=Plain(10.0, length(1.5), length(1.56)))
    assert lines[0] == f"| {' | '.join(HEAD)} |"
    assert lines[2:] == [
        "| none | 10.0000 |  | 1.500 ± 0.010 |  | 1.560 ± 0.010 |  |  |",
        "| fp8, max | 10.0500 | +0.50% |  | 1.500 ± 0.010 |  |  |  |",
        "| int4_per_channel | 12.0000 | +20.00% |  | 1.200 ± 0.010 | 1.470 ± 0.010 | 90% | 75% |",
        # Rounding lost nothing of what the draft was given with.
        "| int8_per_channel | 10.0000 | +0.00% |  | 1.520 ± 0.010 | 1.600 ± 0.010 |  | 200% |",
    ]


def test_a_base_alone_has_a_perplexity() -> None:
    lines = table([Row("fp8_per_channel", 10.1)], plain=Plain(10.0))
    assert lines[2:] == [
        "| none | 10.0000 |  |  |  |  |  |  |",
        "| fp8_per_channel | 10.1000 | +1.00% |  |  |  |  |  |",
    ]


def test_the_error_of_a_length_is_that_of_its_passes() -> None:
    accepted = [0, 0, 1, 3, 2, 0, 1, 0]
    counted = Acceptance.of([Answer(token_ids=[7] * 15, accepted=accepted)], num_steps=3)
    report = to_json(
        Evaluation(counted, {}, 1.0, None, (), None, Settings(topology=Topology.chain(3), osl=64), "float32")
    )
    found = Length.of(report)
    tokens = [1 + number for number in accepted]
    assert found.tokens == pytest.approx(statistics.mean(tokens))
    assert found.error == pytest.approx(statistics.pstdev(tokens) / len(tokens) ** 0.5)
