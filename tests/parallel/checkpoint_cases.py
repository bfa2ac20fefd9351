"""What the ranks do for `test_checkpoint.py`."""

from __future__ import annotations

import argparse
import dataclasses
import resource
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor, nn

import mcore_spec
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import BaseTransformerConfig, build_gpt_model, transformer_config
from mcore_spec.checkpoint.store import (
    TRACKER,
    find_checkpoint,
    load_checkpoint,
    make_record,
    restore,
    save_checkpoint,
)
from mcore_spec.checkpoint.writer import InProcessSaveStrategy
from mcore_spec.config import BaseArchitecture, BaseIdentity, eagle_preset
from mcore_spec.conversion import conversion_of, convert
from mcore_spec.errors import McoreSpecError
from mcore_spec.parallel.layout import Layout, barrier, is_rank_zero, parallel_runtime
from mcore_spec.parallel.sharding import Shard, gather_whole
from mcore_spec.weights.hf_config import describe_hf
from tests.tiny import VOCAB_SIZE, base_architecture, draft_to_target, expected_shards, fill, import_base

LENGTH = 6
TOKENS = torch.randint(VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(6))


class Kind(NamedTuple):
    """A model that is saved: a base and what is attached to it."""

    base: str
    mode: Any
    has_d2t: bool = False


def eagle(algorithm: Any, **architecture: Any) -> dict[str, Any]:
    preset = eagle_preset(algorithm)
    preset["config"]["eagle_architecture_config"].update(architecture)
    return preset


KINDS = {
    "eagle3-reduced": Kind("llama", eagle("eagle3", num_hidden_layers=2, attention_bias=True), has_d2t=True),
    "eagle3-reduced-tied": Kind("llama-tied", eagle("eagle3", fc_norm=True, mlp_bias=True), has_d2t=True),
    "eagle3-base-head": Kind("llama", eagle("eagle3", norm_before_fc=True)),
    "eagle3-own-head": Kind("llama-tied", eagle("eagle3", has_lm_head=True)),
    "eagle1": Kind("llama", eagle("eagle1", num_hidden_layers=2)),
    "eagle1-tied": Kind("llama-tied", eagle("eagle1")),
    "eagle-mtp": Kind("qwen2", eagle("eagle-mtp")),
    "eagle-mtp-tied": Kind("qwen3-tied", eagle("eagle-mtp")),
    "medusa": Kind("llama", [("medusa", {"medusa_num_heads": 2, "medusa_num_layers": 2})]),
    "medusa-tied": Kind("qwen3-tied", "medusa"),
    "none": Kind("qwen2", None),
    "none-tied": Kind("llama-tied", None),
}


def identity(source: str, raw_config: dict[str, Any] | None = None) -> BaseIdentity:
    return BaseIdentity(source=source, fingerprint=f"fingerprint of {source}", hf_config=raw_config or {})


def original(kind: Kind, directories: dict[str, Path], layout: Layout) -> GPTModel:
    """The model as it is before any checkpoint, in any layout."""
    model = import_base(directories[kind.base], layout).model
    if kind.mode is not None:
        convert(model, kind.mode, d2t=draft_to_target() if kind.has_d2t else None)
        base = MegatronBase(model)
        draft = base.draft()
        if draft is not None:
            fill(draft, base.tp)
    return model


def differing(model: nn.Module, expected: nn.Module) -> list[str]:
    """Tensors of this rank that are not bit for bit what they should be, or stand on one side only."""
    found, wanted = model.state_dict(), expected.state_dict()
    found, wanted = ({k: v for k, v in s.items() if isinstance(v, Tensor)} for s in (found, wanted))
    names = found.keys() ^ wanted.keys()
    return sorted(names | {name for name in found.keys() & wanted.keys() if not torch.equal(found[name], wanted[name])})


def resave(
    *, layout: Layout, source: Path | None, save_to: Path | None, directories: dict[str, Path]
) -> dict[str, list[str]]:
    """Load every kind from `source` in this layout (or make it), compare with the original, save to `save_to`.

    Returns:
        Kind -> names of tensors that this rank did not find as they should be.
    """
    found = {}
    with parallel_runtime(layout):
        for name, kind in KINDS.items():
            expected = original(kind, directories, layout)
            base = MegatronBase(expected)
            draft = base.draft()
            if draft is not None:
                # What the package put where must be what this rank's cut of the whole tensors says.
                held = draft.state_dict()
                assert all(torch.equal(held[key], v) for key, v in expected_shards(draft, base.tp).items())
            if source is None:
                model = expected
            else:
                checkpoint = find_checkpoint(source / name)
                model = load_checkpoint(checkpoint, layout)
                assert conversion_record(model) == conversion_record(expected)
                assert checkpoint.record.identity == identity(kind.base)
                assert frozen_names(model) == frozen_names(expected)
            found[name] = differing(model, expected)
            if save_to is not None:
                save_checkpoint(model, save_to / name, make_record(model, identity(kind.base)))
    return found


def frozen_names(model: GPTModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def conversion_record(model: GPTModel) -> tuple[str, object] | None:
    conversion = conversion_of(model)
    return conversion and (conversion.algorithm, conversion.config)


def own_shards(*, directory: Path, base: Path) -> tuple[Tensor, Tensor]:
    """After a TP2 round trip: this rank's rows of a sharded matrix, and of the draft's head."""
    layout = Layout(tensor=2)
    with parallel_runtime(layout):
        model = original(KINDS["eagle3-reduced"]._replace(base="only"), {"only": base}, layout)
        save_checkpoint(model, directory, make_record(model, identity("own shards")))
        loaded = load_checkpoint(find_checkpoint(directory), layout)
        draft = MegatronBase(loaded).draft()
        assert draft is not None
        state = draft.state_dict()
        return state["layers.1.self_attn.q_proj.weight"], state["lm_head.weight"]


def plain_model(architecture: BaseArchitecture, layout: Layout, *, vocab_size: int) -> GPTModel:
    """A `GPTModel` as anybody builds it: megatron-core's own local layers, norms and rotary embedding."""
    ours = transformer_config(architecture, layout)
    fields = {
        field.name: ours.__dict__[field.name]
        for field in dataclasses.fields(BaseTransformerConfig)
        if field.init and not field.name.startswith("yarn_")
    }
    fields |= {"window_size": None, "perform_initialization": True}
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = GPTModel(
        TransformerConfig(**fields),
        get_gpt_layer_local_spec(qk_layernorm=architecture.qk_norm, normalization="RMSNorm"),
        vocab_size,
        architecture.max_position_embeddings,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(architecture.rope.theta),
    )
    return model.to(ours.params_dtype)  # its norms are torch's, in torch's default dtype


def logits_of(model: GPTModel) -> Tensor:
    """Whole logits [s, b, vocabulary] of a model on one stage, padding dropped."""
    positions = torch.arange(LENGTH).expand_as(TOKENS)
    with torch.no_grad():
        logits = model(TOKENS, positions, None)
    return gather_whole(logits.transpose(0, 1), Shard(2, VOCAB_SIZE), MegatronBase(model).tp)


def plain_loads_ours(
    *, directory: Path, bases: dict[str, Path], padded_vocab_size: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Save a converted model; load its base into a plain `GPTModel` with its own `sharded_state_dict`."""
    layout, found = Layout(tensor=2), {}
    with parallel_runtime(layout):
        for name in ("eagle3-reduced", "eagle1-tied", "medusa-tied"):
            model = original(KINDS[name], bases, layout)
            path = save_checkpoint(model, directory / name, make_record(model, identity(name)))
            plain = plain_model(MegatronBase(model).architecture, layout, vocab_size=padded_vocab_size)
            state = dist_checkpointing.load({"model": plain.sharded_state_dict()}, str(path))
            plain.load_state_dict(state["model"])
            found[name] = (logits_of(plain), logits_of(model))
    return found


def megatron_lm_args(architecture: BaseArchitecture, **changes: Any) -> argparse.Namespace:
    """The arguments that Megatron-LM's training script would have saved, written out by hand."""
    values = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.intermediate_size,
        "num_attention_heads": architecture.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": architecture.num_key_value_heads,
        "kv_channels": architecture.head_dim,
        "max_position_embeddings": architecture.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "normalization": "RMSNorm",
        "norm_epsilon": architecture.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        "qk_layernorm": architecture.qk_norm,
        "untie_embeddings_and_output_weights": not architecture.tie_word_embeddings,
        "vocab_size": VOCAB_SIZE,
        "padded_vocab_size": 128,
        "params_dtype": torch.float64,
        "tensor_model_parallel_size": 2,
        "an_option_of_another_version": [1, 2],
    }
    return argparse.Namespace(**{**values, **changes})


def save_as_megatron_lm(*, directory: Path, name: str, base: Path, changes: dict[str, Any]) -> Tensor:
    """Save a plain `GPTModel` as Megatron-LM does, with what it keeps besides the model; its logits."""
    layout = Layout(tensor=2)
    with parallel_runtime(layout):
        ours = import_base(base, layout).model
        plain = plain_model(ours.architecture, layout, vocab_size=128)
        # The path over our checkpoint is another test's; here the tensors are named alike.
        for (key, theirs), (our_key, value) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
            assert key == our_key
            _copy_rows(theirs, value, MegatronBase(ours), is_vocabulary="embeddings" in key or "output" in key)
        path = directory / name
        if is_rank_zero():
            path.mkdir(parents=True)
        barrier()
        state = {
            "args": megatron_lm_args(ours.architecture, **changes),
            "checkpoint_version": 3.0,
            "iteration": 0 if name == "release" else 7,
            "model": plain.sharded_state_dict(),
            "rng_state": ShardedObject("rng_state", [torch.get_rng_state()], (1, 1), (0, 0), _replica()),
            "opt_param_scheduler": {"num_steps": 5},
        }
        dist_checkpointing.save(state, str(path), InProcessSaveStrategy())
        if is_rank_zero():
            (directory / TRACKER).write_text("release" if name == "release" else "7")
        barrier()
        return logits_of(plain)


def _replica() -> int:
    return 0 if is_rank_zero() else 1


@torch.no_grad()
def _copy_rows(theirs: Tensor, ours: Tensor, base: MegatronBase, *, is_vocabulary: bool) -> None:
    if not is_vocabulary:
        theirs.copy_(ours)
        return
    # Padded to another size, so the ranks' borders are elsewhere.
    whole = gather_whole(ours, Shard(0, VOCAB_SIZE), base.tp)
    first = base.tp.rank * theirs.shape[0]
    rows = whole[first : first + theirs.shape[0]]
    theirs[: rows.shape[0]].copy_(rows)


def load_megatron_lm(*, directory: Path, layout: Layout) -> dict[str, Any]:
    """Load it here, attach a draft, save that, and load it again by its own record."""
    with parallel_runtime(layout):
        checkpoint = find_checkpoint(directory)
        model = load_checkpoint(checkpoint, layout)
        logits = logits_of(model)
        convert(model, eagle("eagle3"), d2t=draft_to_target())
        saved = directory.parent / f"{directory.name}-converted-tp{layout.tensor}"
        save_checkpoint(model, saved, make_record(model, checkpoint.record.identity))
        again = load_checkpoint(find_checkpoint(saved), layout)
        return {
            "logits": logits,
            "iteration": checkpoint.iteration,
            "vocab_size": checkpoint.record.base.vocab_size,
            "differing": differing(again, model),
        }


def save_one(*, directory: Path, kind: str, bases: dict[str, Path], source: str = "tiny", times: int = 1) -> str:
    """Save a kind on one rank, `times` iterations of it; the error if it was refused."""
    with parallel_runtime(Layout()):
        model = original(KINDS[kind], bases, Layout())
        try:
            for _ in range(times):
                save_checkpoint(model, directory, make_record(model, identity(source)))
        except McoreSpecError as error:
            return f"{type(error).__name__}: {error}"
        return "saved"


def save_beyond_the_limit(*, directory: Path, bases: dict[str, Path]) -> str:
    """Save where no file may be larger than half of what the weights need, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (weights,) = directory.glob("iter_0000001/__0_0.distcp")
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights.stat().st_size // 2, hard))
    try:
        return save_one(directory=directory, kind="none", bases=bases, source="none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def load_one(*, directory: Path, step: int | None = None, into: dict[str, Any] | None = None) -> str:
    """Load on one rank, into the recorded base or into one of other sizes; the error if it was refused."""
    with parallel_runtime(Layout()):
        try:
            checkpoint = find_checkpoint(directory, step=step)
            if into is None:
                load_checkpoint(checkpoint, Layout())
            else:
                restore(build_gpt_model(checkpoint.record.base.model_copy(update=into), Layout()), checkpoint)
        except McoreSpecError as error:
            return f"{type(error).__name__}: {error}"
        return f"loaded iteration {checkpoint.iteration}"


def restore_into_plain(*, directory: Path, bases: dict[str, Path]) -> dict[str, Any]:
    """`restore` onto a `GPTModel` that this package did not build."""
    with parallel_runtime(Layout()):
        checkpoint = find_checkpoint(directory)
        raw = checkpoint.record.identity.hf_config
        assert raw == {}
        expected = original(KINDS["eagle3-reduced"], bases, Layout())
        plain = plain_model(describe(bases["llama"]), Layout(), vocab_size=VOCAB_SIZE)
        restore(plain, checkpoint)
        return {"differing": differing(plain, expected), "logits": logits_of(plain), "expected": logits_of(expected)}


def describe(base: Path) -> BaseArchitecture:
    from mcore_spec.weights.hf_config import read_hf_config

    return describe_hf(read_hf_config(base), where=str(base))


def library_with_plain_paths(*, directory: Path) -> tuple[int, list[str]]:
    """What a program of a user's own does, its paths plain strings: convert, save, export, find."""
    layout = mcore_spec.Layout(tensor=2)
    with mcore_spec.parallel_runtime(layout):
        model = build_gpt_model(base_architecture(), layout)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.5)
        mcore_spec.convert(model, mcore_spec.EAGLE3_DEFAULT_CFG)
        record = mcore_spec.make_record(model, mcore_spec.BaseIdentity(source="mine", fingerprint="run 17"))
        mcore_spec.save_checkpoint(model, str(directory / "checkpoint"), record)
        mcore_spec.export_draft(model, record, str(directory / "draft"))
        found = mcore_spec.find_checkpoint(str(directory / "checkpoint"))
    return found.iteration, sorted(path.name for path in (directory / "draft").iterdir())
