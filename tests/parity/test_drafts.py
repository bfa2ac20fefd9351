"""Draft modules against the oracle, and every layout against one process: outputs and every gradient.

Everything is float64. The oracle and the package add the same few hundred terms of order one in another
order, through at most four steps: the differences are near 1e-14, and 1e-10 leaves room for neither a
missing term nor float32 anywhere but in the rotary angles, which both take as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_spec.parallel.layout import Layout
from mcore_spec.parallel.tensor_parallel import TensorParallel
from tests.parity import draft_cases
from tests.parity.draft_cases import ATTACHED, BATCH, INITIAL, LENGTH, STEPS, TOKENS, VARIANTS, Variant
from tests.pool import RankPool
from tests.reference import drafts as oracle
from tests.tiny import draft_to_target, drawn, write_hf_model

BOUND = 1e-10
# transformers computes its norms in float32 whatever the input; a wrong layer is off by more than 0.1.
FLOAT32_NORMS = 1e-5

Results = dict[str, Tensor]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny base in three families, as Hugging Face directories."""
    root = tmp_path_factory.mktemp("bases")
    cases = {"llama": False, "llama-tied": True, "qwen3-tied": True, "qwen2": False}
    return {name: write_hf_model(root / name, name.split("-")[0], tied=tied) for name, tied in cases.items()}


def worst(found: Results, expected: Results) -> tuple[float, str]:
    """The largest difference and where it is; both sides must have the same names and shapes."""
    assert found.keys() == expected.keys()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    return max(((found[name] - expected[name]).abs().max().item(), name) for name in expected)


def rope_of(variant: Variant) -> dict[str, Any]:
    """transformers' rope parameters of the draft, put together from what the variant says."""
    base = {"theta": 10000.0, "rope_type": "default", "scaling": {}} | variant.base.get("rope", {})
    parameters = {"rope_type": base["rope_type"], "rope_theta": base["theta"], **base["scaling"]}
    architecture = variant.mode[1].get("eagle_architecture_config", {})
    if "rope_scaling" in architecture:
        parameters = {"rope_theta": base["theta"], **architecture["rope_scaling"]}
    if "rope_theta" in architecture:
        parameters["rope_theta"] = architecture["rope_theta"]
    return parameters


def oracle_shape(variant: Variant) -> oracle.Shape:
    given = variant.mode[1].get("eagle_architecture_config", {})
    head_dim = given.get("head_dim", 8)
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=4, head_dim=head_dim, rope_parameters=rope_of(variant)
    )  # fmt: skip
    rotary = LlamaRotaryEmbedding(config)
    return oracle.Shape(
        num_heads=given.get("num_attention_heads", 4),
        num_kv_heads=given.get("num_key_value_heads", 2),
        head_dim=head_dim,
        eps=given.get("rms_norm_eps", 1e-5),
        hidden_act=given.get("hidden_act", "silu"),
        inv_freq=rotary.inv_freq,
        attention_scaling=rotary.attention_scaling,
        num_layers=given.get("num_hidden_layers", 1),
    )


def oracle_runner(variant: Variant, weights: Results) -> Callable[[Tensor, list[Tensor]], list[oracle.StepOutput]]:
    """The oracle of an EAGLE variant as a function of features and embeddings."""
    shape, head = oracle_shape(variant), draft_cases.base_head()
    given = variant.mode[1]["eagle_architecture_config"]
    if given.get("use_aux_hidden_state"):
        flags = {name: given.get(name, False) for name in ("norm_before_residual", "norm_output")}
        own = None if "lm_head.weight" in weights else head
        return lambda features, embeddings: oracle.eagle3(weights, shape, features, embeddings, own, **flags)
    function: Callable[..., list[oracle.StepOutput]] = oracle.eagle1
    if given.get("use_mtp_layernorm"):
        function = partial(oracle.eagle_mtp, is_mimo=variant.base.get("family") == "qwen2")
    return lambda features, embeddings: function(weights, shape, features, embeddings, head)


def expected_results(variant: Variant) -> Results:
    """Outputs and gradients by the oracle; names of weights and outputs as the case functions give them."""
    draft = draft_cases.build(variant, TensorParallel()).draft
    weights = {
        name: drawn(name, tuple(parameter.shape)).requires_grad_() for name, parameter in draft.named_parameters()
    }
    features, embeddings = draft_cases.inputs(draft_cases.feature_width(variant))
    leaves = {"features": features.requires_grad_()}
    states: Results = {}
    if variant.mode[0] == "medusa":
        logits = {f"logits {i}": z for i, z in enumerate(oracle.medusa(weights, features, 3, 2))}
    else:
        leaves |= {f"embedding {step}": value.requires_grad_() for step, value in enumerate(embeddings)}
        steps = oracle_runner(variant, weights)(features, embeddings)
        for step, output in enumerate(steps):
            states |= {f"hidden {step}": output.hidden, f"feedback {step}": output.feedback}
        logits = {f"logits {step}": output.logits for step, output in enumerate(steps)}
    given = {**states, **logits}
    total = sum((value * drawn(f"weight of {name}", tuple(value.shape))).sum() for name, value in given.items())
    total.backward()
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in (leaves | weights).items()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    return {name: value.detach() for name, value in given.items()} | gradients


@pytest.fixture(scope="module")
def expected() -> dict[str, Results]:
    return {name: expected_results(variant) for name, variant in VARIANTS.items()}


def test_the_variants_reach_every_flag_of_a_draft() -> None:
    """A flag that changes what a draft computes must not be forgotten here."""
    given = {key for variant in VARIANTS.values() for key in variant.mode[1].get("eagle_architecture_config", {})}
    assert given >= {
        "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "has_lm_head", "norm_before_residual",
        "norm_before_fc", "fc_norm", "norm_output", "attention_bias", "mlp_bias", "eagle_aux_hidden_state_layer_ids",
    }  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_one_process_equals_the_oracle(name: str, expected: dict[str, Results]) -> None:
    found = draft_cases.run_variant(VARIANTS[name], TensorParallel())
    difference, where = worst(found, expected[name])
    assert difference <= BOUND, f"{where} differs by {difference:.1e}"


@pytest.fixture(scope="module")
def on_two_ranks(rank_pool: RankPool) -> list[dict[bool, dict[str, Results]]]:
    return rank_pool.run("tests.parity.draft_cases:modules", world_size=2, sequence_parallel=(False, True))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2+SP"])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_equal_the_oracle(
    name: str,
    sequence_parallel: bool,
    expected: dict[str, Results],
    on_two_ranks: list[dict[bool, dict[str, Results]]],
) -> None:
    """Each rank on its own: what is replicated must have the whole gradient on both."""
    for rank, found in enumerate(on_two_ranks):
        difference, where = worst(found[sequence_parallel][name], expected[name])
        assert difference <= BOUND, f"{where} differs by {difference:.1e} on rank {rank}"


LAYOUTS = {
    "PP2": Layout(pipeline=2),
    "TP2": Layout(tensor=2),
    "TP2+SP": Layout(tensor=2, sequence_parallel=True),
    "PP2, last stage of two layers": Layout(pipeline=2, last_stage_layers=2),
    "TP2 PP2": Layout(tensor=2, pipeline=2),
    "TP2 PP2+SP": Layout(tensor=2, pipeline=2, sequence_parallel=True),
}


def run_layouts(rank_pool: RankPool, function: str, directories: dict[str, Path]) -> dict[str, list[Any]]:
    """layout -> what each rank that has the draft found; one job for each number of ranks."""
    found: dict[str, list[Any]] = {}
    for world_size in (1, 2, 4):
        layouts = {"TP1": Layout()} if world_size == 1 else LAYOUTS
        layouts = {name: cut for name, cut in layouts.items() if cut.tensor * cut.pipeline == world_size}
        ranks = rank_pool.run(
            f"tests.parity.draft_cases:{function}",
            world_size=world_size,
            layouts=list(layouts.values()),
            directories=directories,
        )
        for index, (name, layout) in enumerate(layouts.items()):
            results = [rank[index] for rank in ranks]
            # The last ranks are the last stage; the others have no draft and gave nothing back.
            assert not any(result for rank in results[: -layout.tensor] for result in rank.values())
            found[name] = results[-layout.tensor :]
    return found


@pytest.fixture(scope="module")
def whole_path(rank_pool: RankPool, directories: dict[str, Path]) -> dict[str, list[dict[str, Results]]]:
    return run_layouts(rank_pool, "whole_path", directories)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ATTACHED)
def test_a_pipelined_base_with_a_draft_equals_one_process(
    name: str, layout: str, whole_path: dict[str, list[dict[str, Results]]]
) -> None:
    (single,) = whole_path["TP1"]
    assert single[name], "the single process has the draft"
    for found in whole_path[layout]:
        difference, where = worst(found[name], single[name])
        assert difference <= BOUND, f"{where} differs by {difference:.1e}"


@pytest.mark.parametrize("name", ATTACHED)
def test_features_and_embeddings_are_transformers(
    name: str, whole_path: dict[str, list[dict[str, Results]]], directories: dict[str, Path]
) -> None:
    case, (single,) = ATTACHED[name], whole_path["TP1"]
    model = AutoModelForCausalLM.from_pretrained(directories[case.base], dtype=torch.float64)
    with torch.no_grad():
        output = model(TOKENS[:, :LENGTH], output_hidden_states=True)
    found = single[name]
    theirs = {"last": output.hidden_states[-1].transpose(0, 1), "base logits": output.logits.transpose(0, 1)}
    layers = dict(case.mode[1].get("eagle_architecture_config", {})).get("eagle_aux_hidden_state_layer_ids")
    if layers:
        # hidden_states[0] is the embedding; the last entry is normed, so the last layer's output is not among them.
        available = [layer for layer in layers if layer < len(output.hidden_states) - 2]
        width = found["aux"].shape[-1] // len(layers)
        ours = [found["aux"].split(width, -1)[layers.index(layer)] for layer in available]
        for layer, value in zip(available, ours, strict=True):
            theirs[f"aux {layer}"] = output.hidden_states[layer + 1].transpose(0, 1)
            found = {**found, f"aux {layer}": value}
    for key, value in theirs.items():
        assert (found[key] - value).abs().max() < FLOAT32_NORMS, key
    if not name.startswith("medusa"):
        for step in range(STEPS):
            embedded = model.get_input_embeddings()(TOKENS[:, 1 + step : 1 + step + LENGTH]).transpose(0, 1)
            assert torch.equal(found[f"embedding {step}"], embedded)
            assert embedded.shape[:2] == (LENGTH, BATCH)


@pytest.fixture(scope="module")
def initial(rank_pool: RankPool, directories: dict[str, Path]) -> dict[str, list[dict[str, Results]]]:
    return run_layouts(rank_pool, "initial_weights", directories)


@pytest.mark.parametrize("layout", ["TP2", "PP2", "TP2 PP2"])
@pytest.mark.parametrize("name", INITIAL)
def test_initial_weights_do_not_depend_on_the_layout(
    name: str, layout: str, initial: dict[str, list[dict[str, Results]]]
) -> None:
    (single,) = initial["TP1"]
    for found in initial[layout]:
        assert found[name].keys() == single[name].keys() != set()
        different = [key for key, value in single[name].items() if not torch.equal(found[name][key], value)]
        assert not different


@pytest.mark.parametrize("name", [name for name in INITIAL if name.startswith(("eagle3", "medusa"))])
def test_own_heads_start_as_the_bases_rows(
    name: str, initial: dict[str, list[dict[str, Results]]], directories: dict[str, Path]
) -> None:
    case, (single,) = INITIAL[name], initial["TP1"]
    tensors = load_file(directories[case.base] / "model.safetensors")
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    heads = {key: value for key, value in single[name].items() if key.endswith("lm_head.weight")}
    assert heads
    if case.has_d2t:
        d2t = draft_to_target()
        assert torch.equal(single[name]["d2t"], d2t)
        head = head[torch.arange(d2t.shape[0]) + d2t]
    for key, value in heads.items():
        assert torch.equal(value, head), key
    blocks = [value for key, value in single[name].items() if ".blocks." in key]
    assert bool(blocks) == name.startswith("medusa")
    assert not any(block.any() for block in blocks), "an untrained Medusa head is the base's head"


@pytest.mark.parametrize("name", ["eagle-mtp from the base, Qwen3", "eagle-mtp from the base, Qwen2"])
def test_a_reused_decoder_is_the_bases_last_layer(
    name: str, initial: dict[str, list[dict[str, Results]]], directories: dict[str, Path]
) -> None:
    (single,) = initial["TP1"]
    stored = load_file(directories[INITIAL[name].base] / "model.safetensors")
    prefix = "model.layers.5."
    theirs = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    ours = {key.removeprefix("layers.0."): value for key, value in single[name].items() if key.startswith("layers.0.")}
    assert ours.keys() == theirs.keys()
    assert not [key for key, value in theirs.items() if not torch.equal(ours[key], value)]


def test_drawn_matrices_have_the_configured_spread(initial: dict[str, list[dict[str, Results]]]) -> None:
    (single,) = initial["TP1"]
    for name, std in {"eagle3, has_lm_head": 0.05, "eagle1": 0.02}.items():
        drawn_values = torch.cat([v.flatten() for k, v in single[name].items() if "proj" in k or k == "fc.weight"])
        assert abs(drawn_values.std().item() / std - 1) < 0.05
        assert all(torch.equal(v, torch.ones_like(v)) for k, v in single[name].items() if "norm" in k)


@pytest.mark.parametrize(("world_size", "layout"), [(2, Layout(tensor=2)), (4, Layout(tensor=2, pipeline=2))])
def test_sizes_that_the_layout_does_not_divide_are_refused_on_every_rank(
    world_size: int, layout: Layout, rank_pool: RankPool, directories: dict[str, Path]
) -> None:
    """On every rank: one that went on alone would wait for the others for ever."""
    cases = {
        "num_attention_heads = 3": {"num_attention_heads": 3, "num_key_value_heads": 3},
        "num_key_value_heads = 1": {"num_key_value_heads": 1},
        "intermediate_size = 9": {"intermediate_size": 9},
    }
    ranks = rank_pool.run(
        "tests.parity.draft_cases:indivisible",
        world_size=world_size,
        layout=layout,
        directory=directories["llama"],
        architectures=list(cases.values()),
    )
    for messages in ranks:
        for part, message in zip(cases, messages, strict=True):
            assert message.startswith("ConfigError") and part in message
            assert "not divisible by tensor_model_parallel_size = 2" in message


def test_routers_of_a_frozen_base_keep_their_expert_bias(rank_pool: RankPool) -> None:
    (found,) = rank_pool.run("tests.parity.draft_cases:expert_bias", world_size=1)
    assert torch.equal(found["biases after"], found["biases before"])
    assert found["moved base"] == []
    assert found["unmoved draft"] == 0
    assert not torch.equal(found["biases after training the base"], found["biases before"])
