"""A least-squares start: the plain regression on every row that counts, in every layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_spec.config import EagleAlgorithm
from mcore_spec.drafts.linear_start import MLP_RIDGE, RIDGE, SIZE_OF_NOTHING, SIZE_OF_RATE, LinearMap, factor
from mcore_spec.objectives.linear_start import SHRINKING
from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import EACH_AXIS
from tests.parallel.linear_start_cases import RECURRENT
from tests.parallel.training_cases import documents
from tests.pool import RankPool
from tests.reference.drafts import ACTIVATIONS, Shape, eagle3, linear, rms_norm
from tests.tiny import write_hf_model

CASES = "tests.parallel.linear_start_cases"
LAYOUTS = {
    **EACH_AXIS,
    "TP2 CP2+SP": (Layout(tensor=2, context=2, sequence_parallel=True), 4),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def ridge_regression(z: Tensor, y: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """As ordinary least squares with one more row an input, measured by its root sum of squares."""
    scale = z.pow(2).sum(0).sqrt()
    share = (ridge * z.shape[1] / z.shape[0]) ** 0.5
    rows = torch.cat((z / scale, share * torch.eye(z.shape[1], dtype=z.dtype)))
    missing = torch.zeros(z.shape[1], y.shape[1], dtype=y.dtype)
    return torch.linalg.lstsq(rows, torch.cat((y, missing))).solution / scale[:, None]


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool, directory: Path) -> list[Tensor]:
    """Last hidden states that the regression predicts for the first row of each document."""
    (inputs,) = rank_pool.run("tests.parallel.training_cases:reference_inputs", world_size=1, directory=directory)
    read, next_states, firsts = [], [], []
    for document, (aux, last) in zip(documents(), inputs["states"], strict=True):
        tokens, mask = document.token_ids.tolist(), document.mask.tolist()
        for t in range(len(tokens)):
            following = tokens[(t + 1) % len(tokens)]
            # The input norm's weight, which the cases draw, is in the embedding part of every row alike.
            row = torch.cat((aux[t], normed(inputs["embedding"][following])))
            if t + 2 < len(tokens) and mask[t + 1] and mask[t + 2]:
                read.append(row)
                next_states.append(last[t + 1])
            if t == 0:
                firsts.append(row)
    z, y = torch.stack(read), torch.stack(next_states)
    solution = ridge_regression(z, y)
    return list(torch.stack(firsts) @ solution)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_start_is_the_regression(name: str, rank_pool: RankPool, directory: Path, expected: list[Tensor]) -> None:
    layout, world_size = LAYOUTS[name]
    one, *_ = rank_pool.run(f"{CASES}:fitted", world_size=1, layout=Layout(), directory=directory)
    results = rank_pool.run(f"{CASES}:fitted", world_size=world_size, layout=layout, directory=directory)
    # Every rank has the same rates, bit for bit.
    assert all(result["rates"] == results[0]["rates"] for result in results)
    for key, rate in results[0]["rates"].items():
        size = float(one["weights"][key].detach().pow(2).mean().sqrt())
        assert rate == pytest.approx((size if size > 0 else SIZE_OF_NOTHING) / SIZE_OF_RATE, rel=1e-6), key
    assert results[0]["rates"].keys() == {key for key, weight in one["weights"].items() if weight.dim() > 1}
    found = [result for result in results if "weights" in result]
    assert found
    for result in found:
        for key, weight in result["weights"].items():
            torch.testing.assert_close(
                weight, one["weights"][key], rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
            )
        for hidden, prediction in zip(result["firsts"], expected, strict=bool(result["firsts"])):
            # A first row sees itself alone: attention passes on its embedding's part whole. What the last norm
            # divides by is the length of the prediction without the norm's weight.
            unweighted = prediction / result["final_norm"]
            torch.testing.assert_close(hidden, normed(unweighted) * result["final_norm"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("member", ["eagle1", "eagle-mtp"])
def test_recurrent_drafts_start_as_the_regression(member: EagleAlgorithm, rank_pool: RankPool, directory: Path) -> None:
    case = RECURRENT[member]
    (inputs,) = rank_pool.run(
        "tests.parallel.training_cases:reference_inputs", world_size=1, directory=directory, case=case
    )
    (one,) = rank_pool.run(
        f"{CASES}:fitted_recurrent", world_size=1, layout=Layout(), directory=directory, member=member
    )
    is_mtp, weights, rows, next_states = member == "eagle-mtp", one["weights"], [], []
    of_one_document = []
    for number, (document, (read, last)) in enumerate(zip(documents(), inputs["states"], strict=True)):
        tokens, mask = document.token_ids.tolist(), document.mask.tolist()
        for t in range(len(tokens)):
            embedding = inputs["embedding"][tokens[(t + 1) % len(tokens)]]
            row = torch.cat((embedding, read[t]))
            if is_mtp:
                norms = (weights["enorm.weight"], weights["hnorm.weight"])
                row = torch.cat((norms[0] * normed(embedding), norms[1] * normed(read[t])))
            if t + 2 < len(tokens) and mask[t + 1] and mask[t + 2]:
                rows.append(row)
                next_states.append(last[t + 1])
            if number == 2:
                of_one_document.append(row)
    z, y = torch.stack(rows), torch.stack(next_states)
    prediction = torch.stack(of_one_document) @ ridge_regression(z, y)
    # Layers pass on what they are given; a last norm divides by the length without its weight.
    wanted = normed(prediction / one["final_norm"]) * one["final_norm"] if is_mtp else prediction
    torch.testing.assert_close(one["hidden"], wanted, rtol=1e-6, atol=1e-8)
    for layout, world_size in (
        (Layout(tensor=2, sequence_parallel=True), 2),
        (Layout(pipeline=2), 2),
        (Layout(context=2), 2),
    ):
        results = rank_pool.run(
            f"{CASES}:fitted_recurrent", world_size=world_size, layout=layout, directory=directory, member=member
        )
        for found in (result["weights"] for result in results if result):
            for key, weight in found.items():
                torch.testing.assert_close(weight, weights[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["", "norm_output", "two layers"])
def test_the_mlp_is_the_regression_of_what_is_left(kind: str, rank_pool: RankPool, directory: Path) -> None:
    """On states of the reference draft, whose MLP adds nothing yet."""
    architecture = {"norm_output": kind == "norm_output", "num_hidden_layers": 2 if kind == "two layers" else 1}
    (found,) = rank_pool.run(f"{CASES}:staged", world_size=1, directory=directory, architecture=architecture)
    (inputs,) = rank_pool.run("tests.parallel.training_cases:reference_inputs", world_size=1, directory=directory)
    mapped, solved, sized = found["weights"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=16, num_attention_heads=4, head_dim=8, rope_parameters=rope))
    shape = Shape(
        num_heads=4, num_kv_heads=2, head_dim=8, eps=1e-5, hidden_act="silu", inv_freq=rotary.inv_freq,
        num_layers=2 if kind == "two layers" else 1,
    )  # fmt: skip
    activations, missing = [], []
    for document, (aux, last) in zip(documents(), inputs["states"], strict=True):
        tokens, mask = document.token_ids, document.mask
        embedding = inputs["embedding"][torch.from_numpy(tokens).roll(-1)]
        (output,) = eagle3(mapped, shape, aux[:, None], [embedding[:, None]], inputs["head"])
        before = output.feedback[:, 0]
        normed_before = rms_norm(mapped, shape, "layers.0.post_attention_layernorm", before)
        gate, up = (linear(mapped, f"layers.0.mlp.{name}_proj", normed_before) for name in ("gate", "up"))
        for t in range(len(tokens) - 2):
            if mask[t + 1] and mask[t + 2]:
                activations.append(ACTIVATIONS[shape.hidden_act](gate[t]) * up[t])
                missing.append(last[t + 1] / mapped["norm.weight"] - before[t])
    expected = ridge_regression(torch.stack(activations), torch.stack(missing), ridge=MLP_RIDGE)
    torch.testing.assert_close(solved["layers.0.mlp.down_proj.weight"], expected.t(), rtol=1e-7, atol=1e-9)
    changed = {name for name in solved if not torch.equal(mapped[name], solved[name])}
    assert changed == {"layers.0.mlp.down_proj.weight"}
    # The state that is handed on must not change its size with the logits.
    if kind == "norm_output":
        assert all(torch.equal(solved[name], sized[name]) for name in solved)
        return
    shares = sized["norm.weight"] / solved["norm.weight"]
    steps = torch.log(shares) / math.log(SHRINKING)
    torch.testing.assert_close(steps, steps.round()[:1].expand_as(steps), rtol=0, atol=1e-9)
    assert {name for name in sized if not torch.equal(solved[name], sized[name])} <= {"norm.weight"}
    larger, own, smaller = found["losses"]
    assert steps[0] > 0.5
    assert own < larger
    assert own <= smaller


def test_few_numbers_keep_what_embeddings_need() -> None:
    """Of a map of rank 6, six numbers keep all; of fewer the best by brute comparison with random ones."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 12, dtype=torch.float64)
    x[:, 5] = 0
    whole = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    solution = LinearMap(torch.zeros(3, 6), whole, x.t() @ x / 400)
    first, second = factor(solution, rank=8)
    assert (first.shape, second.shape) == ((12, 8), (8, 6))
    torch.testing.assert_close(x @ first @ second, x @ whole, rtol=1e-9, atol=1e-9)

    def error(rank: int) -> float:
        pair = factor(solution, rank=rank)
        return float((x @ pair.first @ pair.second - x @ whole).norm())

    plain = torch.linalg.svd(x @ whole).S
    for rank in (1, 3, 5):
        # Eckart and Young: nothing of this rank is nearer.
        assert error(rank) == pytest.approx(float(plain[rank:].norm()), rel=1e-9)


def test_what_cannot_be_fitted(rank_pool: RankPool, directory: Path) -> None:
    (found,) = rank_pool.run(f"{CASES}:refusals", world_size=1, directory=directory)
    assert found[0].startswith("fit_start: no row of the first batches counts")
    assert found[1].startswith("fit_start needs norm_before_residual = false")
