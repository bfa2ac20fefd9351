"""The benchmark of quantisation: its table."""

from __future__ import annotations

from tools.benchmark.quantization import HEAD, Plain, Row, table


def test_table_says_what_was_lost_and_what_came_back() -> None:
    rows = [
        Row("fp8, max", 10.05, 1.5, None),
        Row("int4_per_channel", 12.0, 1.2, 1.47),
        Row("int8_per_channel", 10, 1.52, 1.6),
    ]
    lines = table(rows, plain=Plain(10.0, 1.5, 1.56))
    assert lines[0] == f"| {' | '.join(HEAD)} |"
    assert lines[2:] == [
        "| none | 10.0000 |  | 1.500 |  | 1.560 |  |  |",
        "| fp8, max | 10.0500 | +0.50% |  | 1.500 |  |  |  |",
        "| int4_per_channel | 12.0000 | +20.00% |  | 1.200 | 1.470 | 90% | 75% |",
        # Rounding lost nothing of what the draft was given with.
        "| int8_per_channel | 10.0000 | +0.00% |  | 1.520 | 1.600 |  | 200% |",
    ]


def test_a_base_alone_has_a_perplexity() -> None:
    lines = table([Row("fp8_per_channel", 10.1)], plain=Plain(10.0))
    assert lines[2:] == [
        "| none | 10.0000 |  |  |  |  |  |  |",
        "| fp8_per_channel | 10.1000 | +1.00% |  |  |  |  |  |",
    ]
