"""The README's matrix: every algorithm on every base family.

The draft on the imported base against the reference of the drafts, fed with what transformers itself
computes: its hidden states, its embedding, its head, its rotary frequencies.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.hf_models import TINY_CONFIGS, TinyModel
from tests.parity.matrix_cases import MODES, NUM_STEPS, DraftRun
from tests.pool import RankPool
from tests.reference import drafts as reference

TOLERANCE = 1e-10


@pytest.fixture(scope="module", params=list(TINY_CONFIGS))
def family(
    request: pytest.FixtureRequest,
    tiny_models: dict[str, TinyModel],
    rank_pool: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TinyModel, dict[str, DraftRun]]:
    """One base, and every algorithm's run on it."""
    tiny = tiny_models[request.param]
    (runs,) = rank_pool.run(
        "tests.parity.matrix_cases:run_drafts",
        world_size=1,
        directory=tiny.directory,
        token_ids=tiny.runs[0].token_ids,
        export_root=tmp_path_factory.mktemp(request.param),
    )
    return tiny, runs


@pytest.mark.parametrize("algorithm", list(MODES))
def test_draft_on_imported_base(family: tuple[TinyModel, dict[str, DraftRun]], algorithm: str) -> None:
    tiny, runs = family
    expected = reference_logits(tiny, runs[algorithm], algorithm)
    assert len(expected) == len(runs[algorithm].logits)
    for step, (ours, theirs) in enumerate(zip(runs[algorithm].logits, expected, strict=True)):
        assert theirs.abs().max() > 1e-2
        difference = float((ours - theirs).abs().max())
        assert difference <= TOLERANCE * max(1.0, float(theirs.abs().max())), f"step {step}: {difference}"


def test_every_draft_exports(family: tuple[TinyModel, dict[str, DraftRun]]) -> None:
    """Or is refused, where engines' Llama layers do not know the base's activation or its longrope."""
    tiny, runs = family
    refusals = {"mistral": "silu only", "phi3": "silu only", "llama_longrope": "no field says another one"}
    assert {"blocks.0.layers.0.weight", "lm_heads.1.weight"} <= set(runs["medusa"].exported)
    if tiny.name in refusals:
        for name in ("eagle3", "eagle1", "eagle-mtp"):
            assert refusals[tiny.name] in runs[name].refusal
            assert runs[name].exported == []
        return
    assert {"fc.weight", "midlayer.hidden_norm.weight", "norm.weight", "lm_head.weight"} <= set(runs["eagle3"].exported)
    assert "layers.0.self_attn.q_proj.weight" in runs["eagle1"].exported
    assert {"eh_proj.weight", "enorm.weight", "hnorm.weight"} <= set(runs["eagle-mtp"].exported)


def reference_logits(tiny: TinyModel, run: DraftRun, algorithm: str) -> list[Tensor]:
    """The reference of the drafts on transformers' own hidden states."""
    token_ids, _, hidden_states = tiny.runs[0]
    rows = token_ids.shape[1] - NUM_STEPS
    last = hidden_states[-1].transpose(0, 1)[:rows]
    if algorithm == "medusa":
        num_heads = run.config["medusa_num_heads"]
        return reference.medusa(run.weights, last, num_heads, run.config["medusa_num_layers"])
    table, head = tiny.model.get_input_embeddings().weight, tiny.model.get_output_embeddings().weight
    embeddings = [table[token_ids[:, 1 + k : 1 + k + rows]].transpose(0, 1) for k in range(NUM_STEPS)]
    shape = reference_shape(tiny, token_ids)
    if algorithm == "eagle3":
        aux = torch.cat([hidden_states[layer] for layer in run.aux_layer_ids], dim=-1).transpose(0, 1)[:rows]
        outputs = reference.eagle3(run.weights, shape, aux, embeddings, head)
    elif algorithm == "eagle1":
        outputs = reference.eagle1(run.weights, shape, last, embeddings, head)
    else:
        is_mimo = bool(run.aux_layer_ids)
        read = before_final_norm(tiny, token_ids).transpose(0, 1)[:rows] if is_mimo else last
        outputs = reference.eagle_mtp(run.weights, shape, read, embeddings, head, is_mimo=is_mimo)
    return [output.logits.detach() for output in outputs]


@torch.no_grad()
def before_final_norm(tiny: TinyModel, token_ids: Tensor) -> Tensor:
    """The last layer's output, [b, s, h], which transformers hands out normed only."""
    seen: list[Tensor] = []
    handle = tiny.model.model.norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        tiny.model(input_ids=token_ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def reference_shape(tiny: TinyModel, token_ids: Tensor) -> reference.Shape:
    """The base's sizes, from transformers' configuration and its rotary embedding as it ran."""
    config, rotary = tiny.model.config, tiny.model.model.rotary_emb
    # LongRoPE chooses its table in the forward pass.
    rotary(tiny.model.get_input_embeddings().weight, torch.arange(token_ids.shape[1])[None])
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return reference.Shape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
        inv_freq=rotary.inv_freq,
        attention_scaling=rotary.attention_scaling,
    )
