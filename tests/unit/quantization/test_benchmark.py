"""The benchmark of quantisation: its table."""

from __future__ import annotations

from tools.benchmark.quantization import HEAD, Row, table


def test_table_says_what_was_lost_and_what_came_back() -> None:
    rows = [
        Row("fp8", 10.05, 1.5, None),
        Row("int4_per_channel", 12.0, 1.2, 1.47),
        Row("int8_per_channel", 10, 1.52, 1.6),
    ]
    lines = table(rows, perplexity_before=10.0, acceptance_before=1.5)
    assert lines[0] == f"| {' | '.join(HEAD)} |"
    assert lines[2:] == [
        "| none | 10.0000 | | 1.500 | | | |",
        "| fp8 | 10.0500 | +0.50% | | 1.500 |  |  |",
        "| int4_per_channel | 12.0000 | +20.00% | | 1.200 | 1.470 | 90% |",
        "| int8_per_channel | 10.0000 | +0.00% | | 1.520 | 1.600 |  |",
    ]
