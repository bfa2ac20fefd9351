"""Speculative decoding on real caches: against an independent engine without any, in every layout, greedy and drawn."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mcore_spec.parallel.layout import Layout
from tests.parallel.evaluation_cases import D2T, OSL, PROMPTS, VOCAB_SIZE, Case, write_base
from tests.pool import RankPool
from tests.reference import engine

CASES = "tests.parallel.evaluation_cases"
EAGLE3 = {"use_aux_hidden_state": True, "use_last_layernorm": True}


def _eagle(**architecture: Any) -> list[tuple[str, dict[str, Any]]]:
    return [("eagle", {"eagle_architecture_config": architecture})]


# name -> base, mode, d2t
DRAFTS: dict[str, tuple[str, Any, Any]] = {
    "eagle3": ("llama", _eagle(**EAGLE3), None),
    "eagle3, reduced vocabulary": ("llama", _eagle(**EAGLE3), D2T),
    "eagle3, everything": (
        "qwen3",
        _eagle(
            **EAGLE3,
            num_hidden_layers=2,
            norm_before_residual=True,
            fc_norm=True,
            norm_output=True,
            attention_bias=True,
            mlp_bias=True,
            rope_theta=123.0,
        ),
        D2T,
    ),
    "eagle3 on a windowed base": ("windowed", _eagle(**EAGLE3), None),
    "eagle1": ("llama", _eagle(use_input_layernorm_in_first_layer=False), None),
    "eagle-mtp": ("qwen3", _eagle(use_mtp_layernorm=True, use_last_layernorm=True), None),
    "medusa": ("llama", [("medusa", {"medusa_num_heads": 3})], None),
    "medusa, reduced vocabulary": ("llama", [("medusa", {"medusa_num_heads": 3})], D2T),
    "eagle3, reduced vocabulary, three tokens a step": (
        "llama",
        _eagle(**EAGLE3, parallel_draft_step=3, parallel_draft_heads_num_layers=2),
        D2T,
    ),
    "eagle1, two tokens a step": (
        "llama",
        _eagle(use_input_layernorm_in_first_layer=False, parallel_draft_step=2),
        None,
    ),
}
LAYOUTS = {
    "TP2": (Layout(tensor=2), 2),
    "TP2+SP": (Layout(tensor=2, sequence_parallel=True), 2),
    "PP2": (Layout(pipeline=2), 2),
    "TP2 PP2+SP": (Layout(tensor=2, pipeline=2, sequence_parallel=True), 4),
}


class Directories:
    """Bases and exported drafts, made once."""

    def __init__(self, root: Path, pool: RankPool) -> None:
        self.root, self.pool = root, pool

    def base(self, name: str) -> Path:
        path = self.root / name
        return path if path.exists() else write_base(path, name)

    def draft(self, name: str) -> Path:
        base, mode, d2t = DRAFTS[name]
        path = self.root / f"draft {name}"
        if not path.exists():
            self.pool.run(
                f"{CASES}:write_draft", world_size=1, base=self.base(base), directory=path, mode=mode, d2t=d2t
            )
        return path

    def case(self, name: str, **changes: Any) -> Case:
        return Case(self.base(DRAFTS[name][0]), self.draft(name), **changes)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, rank_pool: RankPool) -> Directories:
    return Directories(tmp_path_factory.mktemp("evaluation"), rank_pool)


# --- the reference: transformers' base without a cache, and an engine's reading of the exported draft -------------


@cache
def reference_base(directory: Path) -> engine.Base:
    return engine.Base.load(directory, torch.float64)


def greedy(base: engine.Base, prompt: tuple[int, ...], num: int) -> list[int]:
    """The base's own answer, every token from the whole sequence anew."""
    tokens = list(prompt)
    for _ in range(num):
        _, last = base.hidden_states(torch.tensor([tokens]))
        tokens.append(int(F.linear(last[-1, 0], base.head).argmax()))
    return tokens[len(prompt) :]


def expected_passes(case: Case, prompt: tuple[int, ...], *, osl: int = OSL) -> list[int]:
    """Proposals that each verification accepts, with an engine that forgets everything between two passes."""
    base = reference_base(case.base)
    assert case.draft is not None
    drafter = engine.load(case.draft, base)
    answer, accepted, known = greedy(base, prompt, osl + case.steps), [], 1
    while known < osl:
        tokens = torch.tensor([[*prompt, *answer[:known]]])
        features = drafter.features(base, tokens[:, :-1])
        proposals = [int(each.token_ids) for each in drafter.propose(base, features, tokens, case.steps)]
        num = 0
        while num < case.steps and proposals[num] == answer[known + num]:
            num += 1
        accepted.append(num)
        known += num + 1
    return accepted


@pytest.mark.parametrize("name", DRAFTS)
def test_tokens_and_passes_are_those_of_an_engine_without_a_cache(
    name: str, rank_pool: RankPool, directories: Directories
) -> None:
    case = directories.case(name)
    (answers,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case)
    base = reference_base(case.base)
    assert [answer.token_ids for answer in answers] == [greedy(base, prompt, OSL) for prompt in PROMPTS]
    assert [answer.accepted for answer in answers] == [expected_passes(case, prompt) for prompt in PROMPTS]
    # Some proposals are right and some are wrong, or nothing is shown.
    passes = [number for answer in answers for number in answer.accepted]
    assert 0 < sum(passes) < len(passes) * case.steps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["eagle3, reduced vocabulary", "eagle3, everything", "eagle-mtp", "medusa, reduced vocabulary"]
)
def test_every_layout_decodes_alike(name: str, layout: str, rank_pool: RankPool, directories: Directories) -> None:
    case = directories.case(name)
    (expected,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case)
    ranks, world_size = LAYOUTS[layout]
    for answers in rank_pool.run(f"{CASES}:decode", world_size=world_size, case=case._replace(layout=ranks)):
        assert answers == expected


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_batch_is_its_sequences_one_by_one(temperature: float, rank_pool: RankPool, directories: Directories) -> None:
    case = directories.case("eagle3, reduced vocabulary", temperature=temperature)
    (together,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case)
    (apart,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case, one_by_one=True)
    assert together == apart
    assert all(len(answer.token_ids) == OSL for answer in together)


@pytest.mark.parametrize("base", ["windowed", "qwen3", "longrope"])
def test_a_base_alone_decodes_as_without_a_cache(base: str, rank_pool: RankPool, directories: Directories) -> None:
    case = Case(directories.base(base), None, steps=0)
    # LongRoPE's table follows from the length that a sequence may grow to: one prompt for each table.
    prompts = ((1, 2, 3), (4, 1, 3, 0, 2) * 4) if base == "longrope" else PROMPTS
    (answers,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case, prompts=prompts, osl=10)
    reference = reference_base(case.base)
    assert [answer.token_ids for answer in answers] == [greedy(reference, prompt, 10) for prompt in prompts]
    assert all(answer.accepted == [0] * 9 for answer in answers)
    assert not any(any(answer.origins) for answer in answers)


def test_an_answer_ends_behind_an_end_and_counts_what_was_accepted(
    rank_pool: RankPool, directories: Directories
) -> None:
    case = directories.case("eagle3, reduced vocabulary")
    (whole,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case)
    # A token that the draft proposed: what it proposed behind the end was accepted too, and is not said.
    end = next(token for token, is_drafts in zip(whole[0].token_ids, whole[0].origins, strict=True) if is_drafts)
    (cut,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case._replace(end_ids=(end,)))
    lengths = [each.token_ids.index(end) + 1 if end in each.token_ids else OSL for each in whole]
    assert min(lengths) < OSL
    for answer, ended, length in zip(whole, cut, lengths, strict=True):
        assert ended.token_ids == answer.token_ids[:length]
        assert ended.accepted == answer.accepted[: len(ended.accepted)]
        assert ended.origins == answer.origins[:length]


# --- trees ----------------------------------------------------------------------------------------

TREE = "0 1 0,0 0,1 1,0 0,0,0 0,0,1 1,0,0"


@pytest.mark.parametrize("name", ["eagle3, reduced vocabulary", "eagle3 on a windowed base", "eagle1", "medusa"])
def test_a_tree_says_the_same_in_fewer_passes(name: str, rank_pool: RankPool, directories: Directories) -> None:
    case = directories.case(name)
    (chain,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case)
    (tree,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case._replace(tree=TREE))
    (same,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case._replace(tree="0 0,0 0,0,0"))
    assert same == chain
    assert [answer.token_ids for answer in tree] == [answer.token_ids for answer in chain]
    # The chain is in the tree: what it gets right, the tree does too.
    assert sum(len(answer.accepted) for answer in tree) < sum(len(answer.accepted) for answer in chain)


def test_a_tree_that_holds_every_token_is_always_right(rank_pool: RankPool, directories: Directories) -> None:
    every = range(VOCAB_SIZE)
    tree = " ".join([*map(str, every), *(f"{first},{second}" for first in every for second in every)])
    case = directories.case("eagle3", tree=tree)
    (answers,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case)
    assert {number for answer in answers for number in answer.accepted} == {2}
    base = reference_base(case.base)
    assert [answer.token_ids for answer in answers] == [greedy(base, prompt, OSL) for prompt in PROMPTS]


def test_a_tree_decodes_alike_in_a_layout(rank_pool: RankPool, directories: Directories) -> None:
    case = directories.case("eagle3, reduced vocabulary", tree=TREE)
    (expected,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case)
    layout, world_size = LAYOUTS["TP2 PP2+SP"]
    for answers in rank_pool.run(f"{CASES}:decode", world_size=world_size, case=case._replace(layout=layout)):
        assert answers == expected


# --- sampling -------------------------------------------------------------------------------------


def base_distribution(base: engine.Base, prompt: tuple[int, ...], num: int, temperature: float) -> dict[Any, float]:
    """Probability of every answer of `num` tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num):
        longer = {}
        for answer, probability in found.items():
            _, last = base.hidden_states(torch.tensor([[*prompt, *answer]]))
            row = (F.linear(last[-1, 0], base.head) / temperature).softmax(0)
            longer |= {(*answer, token): probability * float(row[token]) for token in range(VOCAB_SIZE)}
        found = longer
    return found


@pytest.mark.parametrize("name", ["eagle3, reduced vocabulary", "medusa, reduced vocabulary"])
def test_drawn_answers_have_the_distribution_of_the_base(
    name: str, rank_pool: RankPool, directories: Directories
) -> None:
    """Chi-square over all answers of four tokens, the rare ones together."""
    case, prompt, num = directories.case(name, temperature=2.0), PROMPTS[0], 4000
    (answers,) = rank_pool.run(f"{CASES}:sampled", world_size=1, case=case, prompt=prompt, num=num, osl=4)
    expected = base_distribution(reference_base(case.base), prompt, 4, 2.0)
    counts = Counter(map(tuple, answers))
    common = [answer for answer, probability in expected.items() if probability * num >= 5]
    observed = [counts[answer] for answer in common]
    wanted = [expected[answer] * num for answer in common]
    observed.append(num - sum(observed))
    wanted.append(num - sum(wanted))
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    freedom = len(wanted) - 1
    # Mean and variance of chi-square are k and 2k: five standard deviations.
    assert freedom > 20
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_drawn_answers_do_not_depend_on_the_layout(rank_pool: RankPool, directories: Directories) -> None:
    case = directories.case("eagle3, reduced vocabulary", temperature=1.0)
    (expected,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=case)
    for name in ("TP2+SP", "PP2"):
        layout, world_size = LAYOUTS[name]
        for answers in rank_pool.run(f"{CASES}:decode", world_size=world_size, case=case._replace(layout=layout)):
            assert answers == expected


# --- evaluation -----------------------------------------------------------------------------------


def test_evaluation_is_the_same_on_every_number_of_ranks(rank_pool: RankPool, directories: Directories) -> None:
    case = directories.case("eagle3, reduced vocabulary")
    (expected,) = rank_pool.run(f"{CASES}:evaluate", world_size=1, case=case)
    assert expected["lossless"] is True
    assert expected["num_ties"] == 0
    assert expected["categories"].keys() == {"first", "second", "other"}
    assert expected["categories"]["first"]["num_answers"] == 5
    assert expected["num_answers"] == 8
    assert expected["num_forwards"] == sum(each["num_forwards"] for each in expected["categories"].values())
    for batch_size in (1, 5):
        (other,) = rank_pool.run(f"{CASES}:evaluate", world_size=1, case=case, batch_size=batch_size)
        assert other == expected
    layouts = {"DP2": Layout(), "CP2": Layout(context=2), "TP2": Layout(tensor=2)}
    for layout in layouts.values():
        for other in rank_pool.run(f"{CASES}:evaluate", world_size=2, case=case._replace(layout=layout)):
            assert other == expected


def test_acceptance_in_the_middle_of_a_run_is_the_same_in_every_layout(
    rank_pool: RankPool, directories: Directories
) -> None:
    case = directories.case("eagle3, reduced vocabulary")
    (expected,) = rank_pool.run(f"{CASES}:checked", world_size=1, case=case)
    assert expected["acceptance_length"] > 1
    assert expected["acceptance_forwards"] > len(PROMPTS)
    for layout in (Layout(), Layout(tensor=2, pipeline=2, sequence_parallel=True), Layout(tensor=2, context=2)):
        for result in rank_pool.run(f"{CASES}:checked", world_size=4, case=case._replace(layout=layout)):
            assert result == expected


def test_another_answer_than_the_bases_is_a_fault(rank_pool: RankPool, directories: Directories) -> None:
    (result,) = rank_pool.run(f"{CASES}:broken_evaluation", world_size=1, case=directories.case("eagle3"))
    assert result["lossless"] is False
    assert "token 1 of the answer is" in result["faults"][0]


def test_a_tie_within_rounding_is_no_fault(rank_pool: RankPool, directories: Directories) -> None:
    (result,) = rank_pool.run(f"{CASES}:tied_evaluation", world_size=1, case=directories.case("eagle3"))
    assert result["lossless"] is True
    assert result["num_ties"] > 0


# --- refusals -------------------------------------------------------------------------------------


def test_refusals(rank_pool: RankPool, directories: Directories) -> None:
    def refusal(case: Case, **options: Any) -> str:
        (message,) = rank_pool.run(f"{CASES}:refusals", world_size=1, case=case, **{"osl": OSL, **options})
        return str(message)

    eagle3 = directories.case("eagle3")
    assert "4096 positions; lower --osl or --steps" in refusal(eagle3, osl=4085)
    assert "token ids from 1 to 5, outside of the base's vocabulary of 5" in refusal(eagle3, prompts=((1, 5),))
    assert "is empty" in refusal(eagle3, prompts=((),))
    assert "3 Medusa heads, one a step; lower --steps" in refusal(directories.case("medusa", steps=4))
    reduced = directories.case("eagle3, reduced vocabulary", tree="0 1 2 3")
    assert "4 proposals at a step, but the draft's vocabulary has 3 tokens" in refusal(reduced)
    assert "sampling is built for chains" in refusal(eagle3._replace(tree=TREE, temperature=1.0))
    assert "attach one first" in refusal(eagle3._replace(draft=None))
    other = eagle3._replace(draft=directories.root)
    assert "has no config.json" in refusal(other)
