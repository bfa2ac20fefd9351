"""Typical acceptance with Medusa's heads: against a decoder without caches, in every layout."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.evaluation.tree import Topology
from mcore_spec.evaluation.typical import TypicalAcceptance
from mcore_spec.parallel.layout import Layout
from tests.parallel.evaluation_cases import OSL, PROMPTS, Case, write_base
from tests.pool import RankPool
from tests.reference import engine

CASES = "tests.parallel.evaluation_cases"
RANKS = "tests.parallel.medusa_cases"
TREE = "0 1 0,0 0,1 1,0 0,0,0 0,1,0"
# Loose and strict enough that of five tokens some pass and some do not.
TYPICAL = TypicalAcceptance(temperature=0.8, epsilon=0.25, delta=0.9)
LAYOUTS = {
    "one": (Layout(), 1),
    "TP2+SP": (Layout(tensor=2, sequence_parallel=True), 2),
    "PP2": (Layout(pipeline=2), 2),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, rank_pool: RankPool) -> Case:
    root = tmp_path_factory.mktemp("typical")
    base = write_base(root / "base", "llama")
    mode = [("medusa", {"medusa_num_heads": 3})]
    rank_pool.run(f"{CASES}:write_draft", world_size=1, base=base, directory=root / "draft", mode=mode, d2t=None)
    return Case(base, root / "draft")


@cache
def reference_base(directory: Path) -> engine.Base:
    return engine.Base.load(directory, torch.float64)


@cache
def distribution(directory: Path, tokens: tuple[int, ...]) -> Tensor:
    """Behind the tokens, at the temperature."""
    base = reference_base(directory)
    _, last = base.hidden_states(torch.tensor([tokens]))
    return (F.linear(last[-1, 0], base.head) / TYPICAL.temperature).softmax(0)


def passes(directory: Path, tokens: list[int], path: list[int]) -> float | None:
    """Sum of the logarithms of the path's probabilities; ``None`` where one of them is too small."""
    total = 0.0
    for index, token in enumerate(path):
        p = distribution(directory, (*tokens, *path[:index])).tolist()
        entropy = -sum(each * math.log(each) for each in p)
        if p[token] <= min(TYPICAL.epsilon, TYPICAL.delta * math.exp(-entropy)):
            return None
        total += math.log(p[token])
    return total


@cache
def expected(directory: Path, draft: Path, tree: str | None, prompt: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Answer and accepted proposals, every path looked at by itself and from the beginning."""
    base = reference_base(directory)
    drafter = engine.load(draft, base)
    paths = Topology.chain(3).paths if tree is None else Topology.parse(tree).paths
    tokens, accepted = [*prompt], []
    tokens.append(int(distribution(directory, tuple(tokens)).argmax()))
    while len(tokens) - len(prompt) < OSL:
        features = drafter.features(base, torch.tensor([tokens[:-1]]))
        ranked = [head[-1, 0].argsort(descending=True).tolist() for head in drafter.logits(features, [])]
        best: tuple[int, float] = (0, 0.0)
        chosen: list[int] = []
        for ranks in paths:
            path = [ranked[depth][rank] for depth, rank in enumerate(ranks)]
            total = passes(directory, tokens, path)
            if total is not None and (len(path), total) > best:
                best, chosen = (len(path), total), path
        accepted.append(len(chosen))
        tokens += chosen
        tokens.append(int(distribution(directory, tuple(tokens)).argmax()))
    return tokens[len(prompt) :][:OSL], accepted


@pytest.mark.parametrize("tree", [None, TREE])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_is_what_the_criterion_says(
    layout: str, tree: str | None, rank_pool: RankPool, case: Case
) -> None:
    ranks, world_size = LAYOUTS[layout]
    changed = case._replace(layout=ranks, tree=tree)
    results = rank_pool.run(f"{RANKS}:decode_typically", world_size=world_size, case=changed, typical=TYPICAL)
    assert case.draft is not None
    wanted = [expected(case.base, case.draft, tree, prompt) for prompt in PROMPTS]
    for answers in results:
        assert [(answer.token_ids, answer.accepted) for answer in answers] == wanted
    numbers = [number for _, accepted in wanted for number in accepted]
    assert {0, 1} < set(numbers), "short runs and longer ones"


def test_cold_it_is_exact_acceptance(rank_pool: RankPool, case: Case) -> None:
    cold = TypicalAcceptance(temperature=1e-3)
    for changed in (case, case._replace(tree=TREE)):
        (exact,) = rank_pool.run(f"{CASES}:decode", world_size=1, case=changed)
        (typical,) = rank_pool.run(f"{RANKS}:decode_typically", world_size=1, case=changed, typical=cold)
        assert typical == exact


def test_nothing_is_claimed_about_the_answers(rank_pool: RankPool, case: Case) -> None:
    (found,) = rank_pool.run(f"{RANKS}:evaluate_typically", world_size=1, case=case, typical=TYPICAL)
    assert found["json"]["acceptance"] == "typical"
    assert found["json"]["lossless"] is None
    assert found["json"]["baseline_tokens_per_second"] is not None
    assert found["table"][-1] == "typical acceptance: the answers are not those of the base alone"


def test_the_bound_by_hand() -> None:
    base = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    typical = TypicalAcceptance(temperature=1.0, epsilon=0.3, delta=0.5)
    # Entropies ln 2, 0.940 and 0: bounds min(0.3, 0.25), min(0.3, 0.195) and min(0.3, 0.5).
    scores = typical.scores(torch.tensor([1, 0, 0]), base)
    assert scores.tolist() == pytest.approx([math.log(0.5), math.log(0.7), 0.0])
    scores = typical.scores(torch.tensor([2, 1, 3]), base)
    assert scores.tolist() == [-math.inf] * 3
    # Entropy 1.036: the lower of the two bounds, 0.177, is what counts.
    uneven = torch.tensor([[0.5, 0.28, 0.22, 0.0]], dtype=torch.float64)
    assert typical.scores(torch.tensor([2]), uneven).tolist() == pytest.approx([math.log(0.22)])
    # A probability that is the bound itself is not above it.
    assert TypicalAcceptance(temperature=1.0, epsilon=0.5, delta=9.0).scores(torch.tensor([0]), base[:1]).isinf()


def test_of_paths_of_one_length_the_likeliest() -> None:
    topology = Topology.parse("0 1 0,0 1,0 1,0,0")
    even = [0.25, 0.25, 0.25, 0.25]
    base = torch.tensor([[0.3, 0.6, 0.05, 0.05], even, even, even, even, [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    typical = TypicalAcceptance(temperature=1.0, epsilon=0.2, delta=9.0)
    # Nodes 0 and 1 are tokens 0 and 1; both children pass; the grandchild, token 2, does not behind a sure parent.
    base[4] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert typical.keep(topology, [0, 1, 3, 3, 2], base) == [1, 3]
    base[4] = torch.tensor(even)
    assert typical.keep(topology, [0, 1, 3, 3, 2], base) == [1, 3, 4]
    assert typical.keep(topology, [2, 3, 0, 0, 0], base) == []
