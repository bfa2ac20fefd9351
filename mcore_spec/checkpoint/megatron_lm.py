"""What Megatron-LM keeps beside the weights: written so that it loads ours, read so that we load its."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed import checkpoint as torch_checkpoint

from mcore_spec.bases.megatron_build import MEGATRON_LLAMA3
from mcore_spec.checkpoint.record import NOT_MODEL, STORAGE_ERRORS, CheckpointRecord, storage_reason
from mcore_spec.config import BaseArchitecture, BaseIdentity, RopeConfig
from mcore_spec.errors import CheckpointError, UnsupportedError

_FINAL_NORM = "decoder.final_layernorm.weight"
_REQUIRED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "padded_vocab_size",
    "params_dtype",
)


def megatron_lm_common(base: BaseArchitecture, iteration: int) -> dict[str, Any]:
    """What Megatron-LM looks for beside the weights.

    Its arguments are left out where they could not say the base's rotary embedding, or that it has no layers: taking
    them from the checkpoint would build another model without a word.
    """
    is_scaled = base.rope.rope_type == "llama3"
    common = {"checkpoint_version": 3.0, "iteration": iteration}
    fixed = {name: base.rope.scaling.get(name) for name in MEGATRON_LLAMA3}
    is_known = base.rope.rope_type in ("default", "llama3") and not (is_scaled and fixed != MEGATRON_LLAMA3)
    if not (is_known and base.has_layers):
        return common
    args = argparse.Namespace(
        num_layers=base.num_layers,
        hidden_size=base.hidden_size,
        ffn_hidden_size=base.intermediate_size,
        num_attention_heads=base.num_attention_heads,
        group_query_attention=base.num_key_value_heads != base.num_attention_heads,
        num_query_groups=base.num_key_value_heads,
        kv_channels=base.head_dim,
        max_position_embeddings=base.max_position_embeddings,
        seq_length=base.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(base.rope.theta) if base.rope.theta.is_integer() else base.rope.theta,
        rotary_percent=1.0,
        use_rope_scaling=is_scaled,
        rope_scaling_factor=base.rope.scaling["factor"] if is_scaled else 8.0,
        window_size=None if base.window_size is None else (base.window_size - 1, 0),
        window_attn_skip_freq=[int(on) for on in base.windowed_layers] or None,
        normalization="RMSNorm",
        norm_epsilon=base.rms_norm_eps,
        swiglu=base.hidden_act == "silu",
        add_bias_linear=False,
        add_qkv_bias=base.qkv_bias,
        qk_layernorm=base.qk_norm,
        untie_embeddings_and_output_weights=not base.tie_word_embeddings,
        vocab_size=base.vocab_size,
        padded_vocab_size=base.vocab_size,
        params_dtype=getattr(torch, base.dtype),
        iteration=iteration,
    )
    return {"args": args, **common}


def megatron_lm_record(path: Path) -> CheckpointRecord:
    """Describe a base that Megatron-LM saved, from the arguments in its common state.

    Raises:
        CheckpointError: not a Megatron-LM checkpoint.
        UnsupportedError: arguments that describe another kind of model.
    """
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except (*STORAGE_ERRORS, ImportError, AttributeError) as error:
        raise CheckpointError(f"{path} could not be read: {storage_reason(error)}") from error
    if "args" not in common:
        raise CheckpointError(f"{path} has neither mcore_spec.json nor Megatron-LM's arguments; it cannot be described")
    args = vars(common["args"])
    _check_megatron_lm(args, path)
    scaling = {**MEGATRON_LLAMA3, "factor": args.get("rope_scaling_factor", 8.0)}
    is_scaled = bool(args.get("use_rope_scaling"))
    rope = {
        "theta": args.get("rotary_base", 10000),
        "rope_type": "llama3" if is_scaled else "default",
        "scaling": scaling if is_scaled else {},
    }
    heads, window = args["num_attention_heads"], args.get("window_size")
    windowed = args.get("window_attn_skip_freq")
    if isinstance(windowed, int):
        windowed = [layer % windowed != 0 for layer in range(1, args["num_layers"] + 1)]
    base = BaseArchitecture.parse(
        {
            "family": "megatron",
            "num_layers": args["num_layers"],
            "hidden_size": args["hidden_size"],
            "intermediate_size": args["ffn_hidden_size"],
            "num_attention_heads": heads,
            "num_key_value_heads": args.get("num_query_groups") or heads
            if args.get("group_query_attention")
            else heads,
            "head_dim": args.get("kv_channels") or args["hidden_size"] // heads,
            "vocab_size": args.get("vocab_size") or args["padded_vocab_size"],
            "max_position_embeddings": args["max_position_embeddings"],
            "rms_norm_eps": args.get("norm_epsilon", 1e-5),
            "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights"),
            "qkv_bias": bool(args.get("add_qkv_bias")),
            "qk_norm": bool(args.get("qk_layernorm")),
            "rope": RopeConfig.parse(rope, where=str(path)),
            "window_size": None if window is None else window[0] + 1,
            "windowed_layers": () if window is None else tuple(bool(on) for on in windowed or ()),
            "dtype": str(args["params_dtype"]).removeprefix("torch."),
        },
        where=f"{path}: args",
    )
    identity = BaseIdentity(source=str(path), fingerprint=_fingerprint(path))
    return CheckpointRecord(base=base, identity=identity, conversion=None, packages={})


def _check_megatron_lm(args: dict[str, Any], path: Path) -> None:
    """Refuse arguments that build another model under the same tensor names."""
    # Argument -> what can be represented, and what Megatron-LM takes where the argument is absent.
    expected: dict[str, tuple[Any, Any]] = {
        "position_embedding_type": ("rope", "learned_absolute"),
        "normalization": ("RMSNorm", "LayerNorm"),
        "swiglu": (True, False),
        "add_bias_linear": (False, True),
        "rotary_percent": (1.0, 1.0),
        "rotary_interleaved": (False, False),
        "rotary_seq_len_interpolation_factor": (None, None),
        "no_rope_freq": (None, None),
        "apply_layernorm_1p": (False, False),
        "qk_l2_norm": (False, False),
        "softmax_type": ("vanilla", "vanilla"),
        "multi_latent_attention": (False, False),
        "num_experts": (None, None),
        "mtp_num_layers": (None, None),
    }
    for name, (wanted, megatron_default) in expected.items():
        found = args.get(name, megatron_default)
        if found != wanted:
            raise UnsupportedError(f"{path}: args.{name} = {found!r}; only {wanted!r} can carry a draft here")
    missing = [name for name in _REQUIRED if name not in args]
    if missing:
        raise CheckpointError(f"{path}: Megatron-LM's arguments lack {', '.join(missing)}; it cannot be described")


def _fingerprint(path: Path) -> str:
    """SHA-256 over names, dtypes and shapes of the tensors and the values of the final norm.

    Bases of one shape are told apart by that norm alone: two whose norms were never trained look the same.
    """
    tensors = dist_checkpointing.load_tensors_metadata(str(path))
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not name.startswith(NOT_MODEL):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.global_shape)}\n".encode())
    norm = tensors.get(_FINAL_NORM)
    if norm is not None:
        state = {_FINAL_NORM: torch.empty(norm.global_shape, dtype=norm.dtype)}
        torch_checkpoint.load(state, storage_reader=torch_checkpoint.FileSystemReader(path), no_dist=True)
        digest.update(state[_FINAL_NORM].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
