"""What the ranks do for `test_drafts.py`: drafts alone, and drafts on a pipelined base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import BaseArchitecture, EagleConfig, TrainingConfig
from mcore_spec.conversion import convert, find_algorithm, parse_mode
from mcore_spec.data.batch import Document, make_batch
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.drafts.mtp import MiMoDraft
from mcore_spec.errors import McoreSpecError
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import Shard, gather_whole, sharded_tensors
from mcore_spec.parallel.tensor_parallel import Placement, TensorParallel
from mcore_spec.training.optimizer import DraftOptimizer
from mcore_spec.training.step import DraftStep
from tests.tiny import VOCAB_SIZE, base_architecture, cut, draft_to_target, drawn, fill, import_base

LENGTH, BATCH, STEPS = 6, 2, 4
VOCABULARY = Shard(2, VOCAB_SIZE)


class Variant(NamedTuple):
    """One draft on one base."""

    mode: tuple[str, dict[str, Any]]
    base: dict[str, Any] = {}
    has_d2t: bool = False


def eagle3(has_d2t: bool = False, base: dict[str, Any] | None = None, **architecture: Any) -> Variant:
    return _eagle({"use_aux_hidden_state": True, "use_last_layernorm": True, **architecture}, base, has_d2t)


def eagle1(**architecture: Any) -> Variant:
    return _eagle({"use_input_layernorm_in_first_layer": False, **architecture}, None, False)


def mtp(base: dict[str, Any], **architecture: Any) -> Variant:
    return _eagle({"use_mtp_layernorm": True, "use_last_layernorm": True, **architecture}, base, False)


def _eagle(architecture: dict[str, Any], base: dict[str, Any] | None, has_d2t: bool) -> Variant:
    return Variant(("eagle", {"eagle_architecture_config": architecture}), base or {}, has_d2t)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "eagle3": eagle3(),
    "eagle3, 3 layers": eagle3(num_hidden_layers=3),
    "eagle3, no GQA": eagle3(num_key_value_heads=4),
    "eagle3, other heads": eagle3(num_attention_heads=8, num_key_value_heads=2, head_dim=4, intermediate_size=20),
    "eagle3, norm_before_residual": eagle3(norm_before_residual=True),
    "eagle3, norm_before_fc": eagle3(norm_before_fc=True),
    "eagle3, fc_norm": eagle3(fc_norm=True),
    "eagle3, norm_output": eagle3(norm_output=True, num_hidden_layers=2),
    "eagle3, attention_bias": eagle3(attention_bias=True, num_hidden_layers=2),
    "eagle3, mlp_bias": eagle3(mlp_bias=True, hidden_act="gelu_pytorch_tanh"),
    "eagle3, reduced vocabulary": eagle3(has_d2t=True),
    "eagle3, has_lm_head": eagle3(has_lm_head=True, hidden_act="gelu"),
    "eagle3, one aux layer": eagle3(eagle_aux_hidden_state_layer_ids=[3]),
    "eagle3, yarn": eagle3(rope_scaling=YARN),
    "eagle3, llama3 rope of the base": eagle3(
        base={
            "rope": {
                "theta": 500.0,
                "rope_type": "llama3",
                "scaling": {k: v for k, v in LLAMA3.items() if k != "rope_type"},
            }
        }
    ),
    "eagle3, everything": eagle3(
        has_d2t=True,
        num_hidden_layers=2,
        norm_before_residual=True,
        fc_norm=True,
        norm_output=True,
        attention_bias=True,
        mlp_bias=True,
        rope_theta=123.0,
        rms_norm_eps=1e-3,
    ),
    "eagle1": eagle1(),
    "eagle1, 2 layers": eagle1(num_hidden_layers=2),
    "eagle1, biases": eagle1(attention_bias=True, mlp_bias=True),
    "eagle-mtp on Qwen3": mtp({"family": "qwen3", "qk_norm": True}),
    "eagle-mtp on Qwen2": mtp({"family": "qwen2", "qkv_bias": True}, num_hidden_layers=2),
    "medusa, 3 heads of 2 layers": Variant(("medusa", {"medusa_num_heads": 3, "medusa_num_layers": 2})),
}


class Built(NamedTuple):
    """A draft with drawn weights, and what it was built from."""

    draft: Draft
    config: Any
    base: BaseArchitecture


def build(variant: Variant, tp: TensorParallel) -> Built:
    base = base_architecture(**variant.base)
    name, config = parse_mode([variant.mode])
    d2t = draft_to_target() if variant.has_d2t else None
    algorithm = find_algorithm(name)
    config = algorithm.resolve(config, base, d2t)
    draft = algorithm.build(config, base, place=Placement(tp=tp, dtype=torch.float64))
    fill(draft, tp)
    return Built(draft, config, base)


def feature_width(variant: Variant) -> int:
    """Hidden states that are joined before they reach the draft, times their width."""
    draft = build(variant, TensorParallel()).draft
    return base_architecture().hidden_size * (len(draft.aux_layer_ids) if isinstance(draft, Eagle3Draft) else 1)


def inputs(width: int) -> tuple[Tensor, list[Tensor]]:
    """Whole features and embeddings of every step, of order one as a norm leaves them."""
    hidden = base_architecture().hidden_size
    embeddings = [5 * drawn(f"embedding {step}", (LENGTH, BATCH, hidden)) for step in range(STEPS)]
    return 5 * drawn("features", (LENGTH, BATCH, width)), embeddings


def base_head() -> Tensor:
    return drawn("base head", (VOCAB_SIZE, base_architecture().hidden_size))


class Outputs(NamedTuple):
    """Everything that a draft gives, with how each tensor is cut."""

    states: dict[str, Tensor]
    logits: dict[str, tuple[Tensor, Shard]]


def weighted_sum(outputs: Outputs, tp: TensorParallel) -> Tensor:
    """This rank's part of a weighted sum over every number that the draft gives.

    Logits are sharded over the vocabulary: each rank adds its own entries (padding has weight zero), and
    the backward of `TensorParallel.enter`, which the logits went through, sums the ranks' gradients. States
    are outside of the parallel region. Without sequence parallelism every rank has all of them, and by
    Megatron's convention every rank computes the whole gradient of a replicated tensor, so each takes the
    whole term; under sequence parallelism each rank takes its own rows.
    """
    terms = []
    rows = Shard(0 if tp.sequence_parallel else None)
    for name, state in outputs.states.items():
        whole = drawn(f"weight of {name}", (LENGTH, *state.shape[1:]))
        terms.append((state * cut(whole, rows, tp)).sum())
    for name, (logits, shard) in outputs.logits.items():
        whole = drawn(f"weight of {name}", (*logits.shape[:2], shard.size or 0))
        terms.append((logits * cut(whole, shard, tp)).sum())
    return torch.stack(terms).sum()


def results(draft: nn.Module, outputs: Outputs, leaves: dict[str, Tensor], tp: TensorParallel) -> dict[str, Tensor]:
    """Whole outputs, and the whole gradient of every weight and of `leaves`, as this rank sees them."""
    weighted_sum(outputs, tp).backward()
    rows = Shard(0 if tp.sequence_parallel else None)
    found = {name: gather_whole(state, rows, tp) for name, state in outputs.states.items()}
    found |= {name: gather_whole(logits, shard, tp) for name, (logits, shard) in outputs.logits.items()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} has no gradient"
        found[f"gradient of {name}"] = gather_whole(leaf.grad, rows, tp)
    for entry in sharded_tensors(draft):
        if entry.tensor.is_floating_point():
            assert entry.tensor.grad is not None, f"{entry.name} has no gradient"
            found[f"gradient of {entry.name}"] = gather_whole(entry.tensor.grad, entry.shard, tp)
    return found


def draft_outputs(draft: Draft, features: Tensor, embeddings: Sequence[Tensor], base_logits: Any) -> Outputs:
    """Run a draft and its head; a draft without a head of its own gives its hidden state to the base's."""
    if isinstance(draft, MedusaDraft):
        return Outputs({}, {f"logits {i}": (logits, VOCABULARY) for i, logits in enumerate(draft(features))})
    states: dict[str, Tensor] = {}
    logits: dict[str, tuple[Tensor, Shard]] = {}
    head = draft.lm_head if isinstance(draft, Eagle3Draft) else None
    for step, (hidden, feedback) in enumerate(draft(features, embeddings)):
        states |= {f"hidden {step}": hidden, f"feedback {step}": feedback}
        if head is None:
            logits[f"logits {step}"] = (base_logits(hidden), VOCABULARY)
        else:
            logits[f"logits {step}"] = (head(draft.tp.enter(hidden)), Shard(2, head.vocab_size))
    return Outputs(states, logits)


def run_variant(variant: Variant, tp: TensorParallel) -> dict[str, Tensor]:
    """A draft alone, on drawn features; the base's head is a drawn matrix, sharded like a head."""
    rows = Shard(0 if tp.sequence_parallel else None)
    features, embeddings = inputs(feature_width(variant))
    leaves = {"features": features, **{f"embedding {step}": value for step, value in enumerate(embeddings)}}
    leaves = {name: cut(value, rows, tp).clone().requires_grad_() for name, value in leaves.items()}
    head = cut(base_head(), Shard(0, VOCAB_SIZE), tp)
    draft = build(variant, tp).draft
    embeddings = [leaves[f"embedding {step}"] for step in range(STEPS)]
    outputs = draft_outputs(draft, leaves["features"], embeddings, lambda hidden: F.linear(tp.enter(hidden), head))
    if isinstance(draft, MedusaDraft):
        leaves = {"features": leaves["features"]}
    return results(draft, outputs, leaves, tp)


def modules(*, sequence_parallel: tuple[bool, ...]) -> dict[bool, dict[str, dict[str, Tensor]]]:
    """Every variant alone, the ranks of the job as its tensor-parallel group."""
    found = {}
    for is_on in sequence_parallel:
        tp = TensorParallel(group=dist.group.WORLD, sequence_parallel=is_on)
        found[is_on] = {name: run_variant(variant, tp) for name, variant in VARIANTS.items()}
    return found


class Attached(NamedTuple):
    """A draft to be attached by `convert` to one of the Hugging Face directories."""

    base: str
    mode: tuple[str, dict[str, Any]]
    has_d2t: bool = False


AUX_LAYERS = (0, 2, 3)  # of six layers: both stages of a pipeline have some, and one is a stage's last
ATTACHED = {
    "eagle3": Attached("llama", eagle3(eagle_aux_hidden_state_layer_ids=AUX_LAYERS).mode),
    "eagle3, reduced vocabulary, tied": Attached(
        "llama-tied", eagle3(eagle_aux_hidden_state_layer_ids=AUX_LAYERS, num_hidden_layers=2).mode, has_d2t=True
    ),
    "eagle3, all aux on the first stage": Attached("llama", eagle3(eagle_aux_hidden_state_layer_ids=(1, 2)).mode),
    "eagle3, all aux on the last stage": Attached("llama", eagle3(eagle_aux_hidden_state_layer_ids=(4, 5)).mode),
    "eagle1": Attached("llama", eagle1().mode),
    "eagle1, tied": Attached("llama-tied", eagle1().mode),
    "eagle-mtp on Qwen3, tied": Attached("qwen3-tied", mtp({}).mode),
    "eagle-mtp on Qwen2": Attached("qwen2", mtp({}).mode),
    "medusa": Attached("llama", ("medusa", {"medusa_num_heads": 2, "medusa_num_layers": 1})),
}
# Two tokens more than rows: row t of step k embeds token t + 1 + k.
TOKENS = torch.randint(VOCAB_SIZE, (BATCH, LENGTH + STEPS), generator=torch.Generator().manual_seed(5))


def whole_path(*, layouts: list[Layout], directories: dict[str, Path]) -> list[dict[str, dict[str, Tensor]]]:
    """Import, convert, features, embeddings, draft and gradients in each layout; empty off the last stage."""
    found = []
    for layout in layouts:
        with parallel_runtime(layout):
            found.append({name: _attached(case, layout, directories[case.base]) for name, case in ATTACHED.items()})
    return found


def _attached(case: Attached, layout: Layout, directory: Path) -> dict[str, Tensor]:
    model = import_base(directory, layout).model
    convert(model, [case.mode], d2t=draft_to_target() if case.has_d2t else None)
    base = MegatronBase(model)
    draft = base.draft()
    aux_layers = draft.aux_layer_ids if isinstance(draft, Eagle3Draft | MiMoDraft) else ()
    if not base.is_last_stage:
        record = next(child for child in model.children() if type(child).__name__ == "Conversion")
        if isinstance(record.config, EagleConfig):
            aux_layers = record.config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids
    features = base.features(TOKENS[:, :LENGTH], aux_layer_ids=aux_layers)
    assert not any(hooks for layer in model.decoder.layers for hooks in [layer._forward_hooks])
    if features is None:
        assert draft is None
        return {}
    assert draft is not None
    fill(draft, base.tp)
    rows = Shard(0 if base.tp.sequence_parallel else None)
    found = {"last": gather_whole(features.last, rows, base.tp)}
    if features.aux is not None:
        found["aux"] = gather_whole(features.aux, rows, base.tp)
    found["base logits"] = gather_whole(base.logits(features.last), VOCABULARY, base.tp)
    leaf = (features.last if features.aux is None else features.aux).clone().requires_grad_()
    embeddings = []
    if not isinstance(draft, MedusaDraft):
        embeddings = [base.embed(TOKENS[:, 1 + step : 1 + step + LENGTH]) for step in range(STEPS)]
    found |= {f"embedding {i}": gather_whole(value, rows, base.tp) for i, value in enumerate(embeddings)}
    outputs = draft_outputs(draft, leaf, embeddings, base.logits)
    found |= results(draft, outputs, {"features": leaf}, base.tp)
    frozen = [name for name, parameter in model.named_parameters() if not _is_drafts(name) and parameter.requires_grad]
    assert not frozen, f"parameters of the base take gradients: {frozen}"
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not _is_drafts(name))
    return found


def _is_drafts(name: str) -> bool:
    return name.startswith(("eagle_module.", "medusa_heads."))


INITIAL = {
    "eagle3, reduced vocabulary": Attached("llama", eagle3(num_hidden_layers=2, mlp_bias=True).mode, has_d2t=True),
    "eagle3, reduced vocabulary, tied": Attached("llama-tied", eagle3(attention_bias=True).mode, has_d2t=True),
    "eagle3, has_lm_head": Attached("llama", eagle3(has_lm_head=True, initializer_range=0.05).mode),
    "eagle1": Attached("llama", eagle1(num_hidden_layers=2).mode),
    "medusa": Attached("llama", ("medusa", {"medusa_num_heads": 2, "medusa_num_layers": 2})),
    "medusa, tied": Attached("llama-tied", "medusa"),
    "eagle-mtp": Attached("qwen3-tied", mtp({}).mode),
    "eagle-mtp from the base, Qwen3": Attached(
        "qwen3-tied", ("eagle", {**mtp({}).mode[1], "eagle_reuse_base_decoder": True})
    ),
    "eagle-mtp from the base, Qwen2": Attached(
        "qwen2", ("eagle", {**mtp({}, num_hidden_layers=2).mode[1], "eagle_reuse_base_decoder": True})
    ),
}


def initial_weights(*, layouts: list[Layout], directories: dict[str, Path]) -> list[dict[str, dict[str, Tensor]]]:
    """Whole initial tensors of drafts attached by `convert`; empty off the last stage."""
    found = []
    for layout in layouts:
        with parallel_runtime(layout):
            cases = {}
            for name, case in INITIAL.items():
                model = import_base(directories[case.base], layout).model
                mode = case.mode if isinstance(case.mode, str) else [case.mode]
                convert(model, mode, d2t=draft_to_target() if case.has_d2t else None, draft_init="random")
                base = MegatronBase(model)
                draft = base.draft()
                entries = [] if draft is None else list(sharded_tensors(draft))
                cases[name] = {entry.name: gather_whole(entry.tensor, entry.shard, base.tp) for entry in entries}
                # Padding is zero: a logit of a row that is no token must not depend on what memory held.
                for head in [] if draft is None else draft.own_heads():
                    assert not head.weight[head.num_valid_rows() :].any(), f"{name}: padded rows are not zero"
            found.append(cases)
    return found


def indivisible(*, layout: Layout, directory: Path, architectures: list[dict[str, Any]]) -> list[str]:
    """What `convert` says on this rank to drafts that the layout does not divide."""
    messages = []
    with parallel_runtime(layout):
        for architecture in architectures:
            model = import_base(directory, layout).model
            before = [name for name, _ in model.named_children()]
            try:
                convert(model, [("eagle", {"eagle_architecture_config": architecture})])
                messages.append("converted")
            except McoreSpecError as error:
                messages.append(f"{type(error).__name__}: {error}")
            assert [name for name, _ in model.named_children()] == before, "a refused model is as it was"
    return messages


def expert_bias() -> dict[str, Any]:
    """A mixture-of-experts base before and after a training step of its draft and megatron-core's update of biases."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    with parallel_runtime(Layout()):
        config = TransformerConfig(
            num_layers=2,
            hidden_size=16,
            ffn_hidden_size=24,
            moe_ffn_hidden_size=24,
            num_attention_heads=4,
            num_query_groups=2,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bias_activation_fusion=False,
            use_cpu_initialization=True,
            num_moe_experts=4,
            moe_router_topk=2,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_load_balancing_type="none",
            moe_router_bias_update_rate=0.125,
        )
        spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
        model = GPTModel(config, spec, VOCAB_SIZE, 64, position_embedding_type="rope")
        routers = [layer.mlp.router for layer in model.decoder.layers]
        for index, router in enumerate(routers):
            router.expert_bias.copy_(drawn(f"bias {index}", (4,)))
        found: dict[str, Any] = {"biases before": torch.stack([router.expert_bias.clone() for router in routers])}
        base_before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}
        convert(model, [eagle3().mode])
        tokens = TOKENS[:, :LENGTH]
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
        step = DraftStep(model)
        training = TrainingConfig(data_path=("made up",), train_iters=2, lr=1e-2, lr_scaling="none")
        optimizer = DraftOptimizer(model, training, num_iterations=2)
        draft_before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        document = Document(tokens[0].numpy(), torch.ones(LENGTH, dtype=torch.bool).numpy())
        batch = make_batch([document], num_steps=step.num_steps, num_samples=1)
        optimizer.zero_grad()
        output = step(batch)
        assert output is not None
        output.loss.backward()
        optimizer.reduce_gradients(num_rows=int(output.judged_by_step[0]))
        assert optimizer.step().is_finite
        _update_router_expert_bias([model], config)
        after = model.state_dict()
        found["moved base"] = [name for name, tensor in base_before.items() if not torch.equal(tensor, after[name])]
        trained = [p for p in model.parameters() if p.requires_grad]
        found["unmoved draft"] = sum(torch.equal(p, q) for p, q in zip(trained, draft_before, strict=True))
        found["biases after"] = torch.stack([router.expert_bias.clone() for router in routers])
        # The same update after an ordinary forward pass moves the biases: the test can fail.
        model(tokens, torch.arange(LENGTH).expand_as(tokens), mask)
        _update_router_expert_bias([model], config)
        found["biases after training the base"] = torch.stack([router.expert_bias.clone() for router in routers])
        return found
