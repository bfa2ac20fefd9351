"""What needs no model: counts of known answers, trees, choosing and drawing tokens, attention over cached rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcore_spec.errors import ConfigError
from mcore_spec.evaluation.acceptance import Evaluation, Settings
from mcore_spec.evaluation.choice import HeadVocabulary, draw, verify_by_rejection
from mcore_spec.evaluation.decoding import Answer
from mcore_spec.evaluation.lossless import Difference
from mcore_spec.evaluation.report import check_plot, table, to_json, write_json
from mcore_spec.evaluation.report import draw as draw_picture
from mcore_spec.evaluation.statistics import Acceptance
from mcore_spec.evaluation.tree import ROOT, Topology
from mcore_spec.layers.attention import KeyValue
from mcore_spec.layers.cache import KeyValueCache, NewRows, Span
from mcore_spec.parallel.tensor_parallel import TensorParallel

# --- statistics -----------------------------------------------------------------------------------


def answer(num_tokens: int, *accepted: int) -> Answer:
    return Answer(token_ids=[0] * num_tokens, accepted=list(accepted), origins=[False] * num_tokens)


def test_acceptance_of_known_answers() -> None:
    counted = Acceptance.of([answer(9, 3, 0, 1), answer(1), answer(6, 2, 3)], num_steps=3)
    assert counted.kept == (5, 4, 3, 2)
    assert counted.num_forwards == 5
    assert counted.num_tokens == 16
    # Not a mean of means: (9/3 + 7/2) / 2 would be 3.25.
    assert counted.acceptance_length == (9 + 5) / 5
    assert counted.acceptance_by_position == [4 / 5, 3 / 4, 2 / 3]


def test_acceptance_of_nothing() -> None:
    counted = Acceptance.of([answer(1)], num_steps=2)
    assert counted.acceptance_length is None
    assert counted.acceptance_by_position == [None, None]


def test_acceptance_adds_up() -> None:
    answers = [answer(9, 3, 0, 1), answer(1), answer(6, 2, 3)]
    parts = [Acceptance.of([each], num_steps=3) for each in answers]
    assert Acceptance.total(parts) == Acceptance.of(answers, num_steps=3)


def evaluation(*, is_tie: bool = True) -> Evaluation:
    first, second = Acceptance.of([answer(5, 2, 1)], num_steps=2), Acceptance.of([answer(1)], num_steps=2)
    difference = Difference("p.jsonl:3", 4, 7, 8, 1e-7, 2e-7, is_tie)
    return Evaluation(
        overall=Acceptance.total([first, second]),
        by_category={"math": first, "writing": second},
        tokens_per_second=30.0,
        baseline_tokens_per_second=20.0,
        differences=(difference,),
        is_lossless=is_tie,
        settings=Settings(topology=Topology.chain(2), osl=6),
        dtype="float32",
    )


def test_report_as_table_and_json(tmp_path: Path) -> None:
    lines = table(evaluation())
    assert lines[0].split() == [
        "category",
        "answers",
        "passes",
        "tokens",
        "acceptance",
        "length",
        "accepted",
        "by",
        "position",
    ]
    assert lines[1].split() == ["math", "1", "2", "5", "2.500", "1.000", "0.500"]
    assert lines[2].split() == ["writing", "1", "0", "1", "-", "-", "-"]
    assert lines[3].split()[0] == "all"
    assert lines[4] == "30.0 tokens/s with the draft, 20.0 without: 1.50 x"
    assert (
        lines[5] == "lossless: every greedy answer is the base's but for 1 where two tokens' logits tie within rounding"
    )
    assert "NOT lossless" in table(evaluation(is_tie=False))[-1]
    assert "p.jsonl:3: token 5 of the answer is 7 with the draft and 8 without" in table(evaluation(is_tie=False))[-1]
    write_json(evaluation(), tmp_path / "new" / "validate.json")
    values = json.loads((tmp_path / "new" / "validate.json").read_text())
    assert values == to_json(evaluation())
    assert values["acceptance_length"] == 2.5
    assert values["lossless"] is True
    measured = {"acceptance": "exact", "proposals": "chain", "temperature": 0.0, "osl": 6, "dtype": "float32"}
    assert {name: values[name] for name in measured} == measured
    assert values["categories"]["math"]["acceptance_by_position"] == [1.0, 0.5]


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "validate.png"
    check_plot(path)
    draw_picture(evaluation(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"matplotlib writes .*png"):
        check_plot(tmp_path / "validate.txt")


# --- trees ----------------------------------------------------------------------------------------


def test_tree() -> None:
    tree = Topology.parse("1 0,1 0 0,0 0,1,0")
    assert tree.paths == [(0,), (1,), (0, 0), (0, 1), (0, 1, 0)]
    assert tree.parents == [ROOT, ROOT, 0, 0, 3]
    assert tree.ranks == [0, 1, 0, 1, 0]
    assert (tree.depth, len(tree), tree.is_chain, tree.inner) == (3, 5, False, [0, 3])
    assert tree.at_depth(2) == [2, 3]
    assert tree.children(0) == [2, 3]
    part = tree.part([ROOT, *range(5)], first_new=0, device=torch.device("cpu"))
    assert part.depths.tolist() == [0, 1, 1, 2, 2, 3]
    assert part.visible.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    later = tree.part([0, 3], first_new=1, device=torch.device("cpu"))
    assert later.visible.tolist() == [[True, True]]
    assert later.depths.tolist() == [0, 1]


def test_chains_and_combs() -> None:
    assert Topology.chain(3).paths == [(0,), (0, 0), (0, 0, 0)]
    assert Topology.chain(3).is_chain
    assert Topology.comb(2, top_k=2).paths == [(0,), (1,), (0, 0), (0, 1)]
    assert (len(Topology.chain(0)), Topology.chain(0).depth, Topology.chain(0).is_chain) == (0, 0, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0", "has no parent 0 in it"),
        ("0 0", "twice"),
        ("0 a", "paths of ranks"),
        (" ", "empty"),
        ("-1", "no parent"),
    ],
)
def test_trees_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Topology.parse(text)


# --- choosing and drawing -------------------------------------------------------------------------

WHOLE = HeadVocabulary(size=5, vocab_size=5, target_ids=None, tp=TensorParallel())


def test_the_likeliest_tokens_are_no_padding_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, -1.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0, 9.0]])
    before = logits.clone()
    assert WHOLE.likeliest(logits, 3).tolist() == [[1, 3, 2], [0, 1, 2]]
    assert torch.equal(logits, before)
    targets = torch.tensor([1, 4, 5, 7, 9])
    reduced = HeadVocabulary(size=5, vocab_size=11, target_ids=targets, tp=TensorParallel())
    assert reduced.likeliest(logits, 2).tolist() == [[4, 7], [1, 4]]
    probabilities = reduced.probabilities(logits, 0.5)
    assert probabilities.shape == (2, 11)
    torch.testing.assert_close(probabilities[:, targets], (logits[:, :5].double() / 0.5).softmax(1))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, dtype=torch.float64))


def test_drawing_inverts_the_cumulative_sum() -> None:
    weights = torch.tensor([[0.0, 2.0, 0.0, 6.0, 0.0]]).double().expand(5, -1)
    assert draw(weights, torch.tensor([0.0, 0.2499, 0.25, 0.999, 1.0]).double()).tolist() == [1, 1, 3, 3, 3]


def test_rejection_keeps_the_distribution() -> None:
    """Every outcome by its share: the first two tokens of many are distributed as the base says."""
    generator = torch.Generator().manual_seed(1)
    num, size = 200_000, 4
    draft = torch.rand(2, size, generator=generator).double().softmax(1)
    draft[0, 1] = 0  # a token that the draft does not know
    draft[0] /= draft[0].sum()
    base = (3 * torch.rand(3, size, generator=generator).double()).softmax(1)
    proposed = torch.stack(
        [torch.multinomial(draft[step], num, replacement=True, generator=generator) for step in range(2)], 1
    )
    uniforms = torch.rand(num, 3, generator=generator).double()
    kept = verify_by_rejection(
        proposed, draft.expand(num, -1, -1), base.expand(num, -1, -1), uniforms[:, :2], uniforms[:, 2]
    )
    first = torch.where(kept.num > 0, proposed[:, 0], kept.next_ids)
    shares = torch.bincount(first, minlength=size) / num
    torch.testing.assert_close(shares.double(), base[0], atol=5e-3, rtol=0)
    accepted = torch.minimum(draft[0], base[0]).sum()
    assert float((kept.num > 0).double().mean()) == pytest.approx(float(accepted), abs=5e-3)
    second = torch.where(kept.num > 1, proposed[:, 1], kept.next_ids)[kept.num > 0]
    shares = torch.bincount(second, minlength=size) / second.shape[0]
    torch.testing.assert_close(shares.double(), base[1], atol=5e-3, rtol=0)
    third = kept.next_ids[kept.num == 2]
    shares = torch.bincount(third, minlength=size) / third.shape[0]
    torch.testing.assert_close(shares.double(), base[2], atol=1e-2, rtol=0)


# --- cached rows ----------------------------------------------------------------------------------

HEADS, KV_HEADS, DIM = 4, 2, 8


def dense(query: Tensor, keys: Tensor, values: Tensor, seen: list[int]) -> Tensor:
    """One row [heads, d] over the keys it sees."""
    group = HEADS // KV_HEADS
    key, value = (x[seen].repeat_interleave(group, dim=1) for x in (keys, values))
    weights = torch.einsum("hd,thd->ht", query, key).mul(DIM**-0.5).softmax(1)
    return torch.einsum("ht,thd->hd", weights, value)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_sequences_see_their_own_past(window: int | None) -> None:
    """Prompts of different lengths, then different numbers of rows, one sequence not at all, rows taken back."""
    generator = torch.Generator().manual_seed(0)
    cache = KeyValueCache(num_sequences=3, capacity=12)
    device = torch.device("cpu")
    known: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    plan = [[(0, 0, 4), (1, 0, 1), (2, 0, 6)], [(0, 4, 2), (2, 6, 2)], [(2, 7, 3), (0, 5, 1), (1, 1, 3)]]
    for spans in plan:
        rows = NewRows([Span(*span, length=12) for span in spans], device=device, multiple=4)
        assert rows.num_rows % 4 == 0
        query = torch.randn(rows.num_rows, HEADS, DIM, generator=generator).double()
        key, value = (torch.randn(rows.num_rows, KV_HEADS, DIM, generator=generator).double() for _ in range(2))
        output = rows.attend(query, cache.write(7, rows, KeyValue(key, value)), window=window)
        row = 0
        for sequence, start, count in spans:
            past = known[sequence][:start]
            past += [(key[row + index], value[row + index]) for index in range(count)]
            known[sequence] = past
            keys, values = (torch.stack(each) for each in zip(*past, strict=True))
            for index in range(count):
                last = start + index
                seen = list(range(0 if window is None else max(0, last - window + 1), last + 1))
                assert rows.places.positions[row] == last
                torch.testing.assert_close(output[row], dense(query[row], keys, values, seen))
                row += 1


def test_moved_rows() -> None:
    cache = KeyValueCache(num_sequences=2, capacity=6)
    rows = NewRows([Span(1, 0, 6, 6)], device=torch.device("cpu"))
    key = torch.arange(6.0)[:, None, None].expand(6, 1, 2)
    cached = cache.write(0, rows, KeyValue(key, key + 10))
    cache.move(1, [2, 4, 5], 2)
    assert cached.key[1, 0, :, 0].tolist() == [0, 1, 2, 4, 5, 5]
    assert cached.value[1, 0, :, 0].tolist() == [10, 11, 12, 14, 15, 15]
    assert not cached.key[0].any()
