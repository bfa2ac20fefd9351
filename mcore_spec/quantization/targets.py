"""Which linear maps of a model a recipe means, and what is known of each.

Names are of the whole model: a decoder layer of the base has its number among all layers, on whatever pipeline stage
it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_layers import CausalAttention
from mcore_spec.config import BaseArchitecture
from mcore_spec.config.quantization import Recipe
from mcore_spec.conversion import as_base
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.layers.attention import TTTAttention
from mcore_spec.layers.linear import ShardedLinear
from mcore_spec.parallel.collectives import Group
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.weights.cuts import GateUp, QueryKeyValue

_LAYERS = "decoder.layers."
# Heads, embeddings and routers: of these an engine reads none quantised, or they are too small to matter.
_NEVER = ("output_layer", "lm_head", "*.output_layer", "*.lm_head", "*.router", "*.router.*", "*embed*")
# megatron-core's matrices that stand for several of the engines'.
_PARTS = {"linear_qkv": QueryKeyValue(), "linear_fc1": GateUp()}
_BASE_WEIGHTS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
# Linear maps that engines join into one: they have one scale, and are quantised together or not at all.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Target(NamedTuple):
    """A linear map.

    Attributes:
        name: in the whole model.
        module: it has a `weight` [out, in].
        cut: dimension of the weight that is cut over the ranks of `tp`; ``None``: it is not.
        tp: the tensor-parallel ranks.
        parts: rows of each of the engines' matrices that this one stands for.
    """

    name: str
    module: nn.Module
    cut: int | None
    tp: TensorParallel
    parts: tuple[Tensor, ...]

    @property
    def weight(self) -> Tensor:
        """This rank's, [out, in]."""
        return self.module.get_parameter("weight")


def groups_of(model: nn.Module) -> list[Group]:
    """Ranks that see other parts of the same activations, or other conversations."""
    if isinstance(as_base(model), MegatronBase):
        groups: Any = model.pg_collection
        return [groups.tp, groups.dp_cp]
    return [dist.group.WORLD] if dist.is_initialized() else []


def is_linear_weight(name: str) -> bool:
    """Whether a tensor of a base, by its name in the `GPTModel`, is the weight of a linear map of its layers."""
    return name.startswith(_LAYERS) and name.endswith(_BASE_WEIGHTS)


class AttentionTarget(NamedTuple):
    """An attention block whose keys and values are quantised."""

    name: str
    module: CausalAttention | TTTAttention


def linear_targets(model: nn.Module) -> list[Target]:
    """Every linear map of this rank's part that a recipe may mean, in the order of the model.

    Raises:
        UnsupportedError: experts, or layers whose weight cannot be exchanged.
    """
    base = as_base(model)
    if base.architecture.num_experts is not None:
        raise UnsupportedError(f"num_experts = {base.architecture.num_experts}: quantising experts is not built")
    found = []
    for name, module in _named(model):
        if any(fnmatchcase(name, pattern) for pattern in _NEVER):
            continue
        cut = _cut_of(module)
        if cut is not None:
            parts = _parts(name, module.get_parameter("weight"), base.architecture)
            found.append(Target(name, module, None if cut < 0 else cut, base.tp, parts))
        elif type(module).__module__.startswith(("transformer_engine", "megatron.core.extensions")):
            raise UnsupportedError(
                f"{name} is a layer of Transformer Engine: quantising needs --transformer-impl local, leave the option "
                "out"
            )
    return found


def _cut_of(module: nn.Module) -> int | None:
    """Dimension that is cut over the ranks, -1 for none; ``None``: no linear map."""
    if isinstance(module, ShardedLinear):
        return int(module.shard_dim)
    if isinstance(module, ColumnParallelLinear):
        return 0
    if isinstance(module, RowParallelLinear):
        return 1
    return -1 if isinstance(module, nn.Linear) else None


def _parts(name: str, weight: Tensor, architecture: BaseArchitecture) -> tuple[Tensor, ...]:
    rows = torch.arange(weight.shape[0])
    arrangement = _PARTS.get(name.rpartition(".")[2])
    if arrangement is None:
        return (rows,)
    return tuple(part[:, 0] for part in arrangement.split(rows[:, None], architecture))


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules under their names in the whole model."""
    base = as_base(model)
    first = base.model.decoder.layers[0].layer_number - 1 if isinstance(base, MegatronBase) else 0
    for name, module in model.named_modules():
        if first and name.startswith(_LAYERS):
            number, dot, rest = name.removeprefix(_LAYERS).partition(".")
            name = f"{_LAYERS}{int(number) + first}{dot}{rest}"
        yield name, module


def attention_targets(model: nn.Module) -> list[AttentionTarget]:
    """Every attention block of this rank's part.

    Raises:
        UnsupportedError: a base whose attention is not this package's.
    """
    if not isinstance(as_base(model), MegatronBase):
        raise UnsupportedError(
            f"keys and values of a {type(model).__name__} are quantised by its engine alone: leave "
            "--export-kv-cache-quant out, or quantise a Megatron-core checkpoint"
        )
    return [
        AttentionTarget(name, module)
        for name, module in _named(model)
        if isinstance(module, CausalAttention | TTTAttention)
    ]


def select(targets: Sequence[Target], recipe: Recipe) -> list[Target]:
    """Those that the recipe means; every rank must call.

    Raises:
        ConfigError: a pattern that matches nothing on any rank, nothing left, or a part of linear maps that engines
            join into one.
    """
    known = _of_all_ranks([target.name for target in targets])
    for field, patterns in (("include", recipe.include), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                some = ", ".join(known[:3]) or "none"
                raise ConfigError(
                    f"{field} pattern {pattern!r} of recipe {recipe.name} matches no linear map; their names are like "
                    f"{some} (heads, embeddings and routers are never quantised)"
                )
    if not any(is_meant(name, recipe) for name in known):
        raise ConfigError(
            f"recipe {recipe.name}: exclude = {list(recipe.exclude)} leaves nothing to quantise; drop some"
        )
    families: dict[str, set[bool]] = {}
    for name in known:
        families.setdefault(family_of(name), set()).add(is_meant(name, recipe))
    torn = [family for family, meant in families.items() if len(meant) > 1]
    if torn:
        raise ConfigError(
            f"recipe {recipe.name}: its patterns name a part of {torn[0]}, which engines join into one: name all of "
            "them or none"
        )
    return [target for target in targets if is_meant(target.name, recipe)]


def declarable(
    attentions: Sequence[AttentionTarget], linears: Sequence[Target], draft: nn.Module | None
) -> list[AttentionTarget]:
    """Without the draft's where none of its linear maps is quantised: its directory would declare nothing."""
    own = set() if draft is None else {id(module) for module in draft.modules()}
    if any(id(target.module) in own for target in linears):
        return list(attentions)
    return [attention for attention in attentions if id(attention.module) not in own]


def family_of(name: str) -> str:
    """The same for linear maps that engines join into one."""
    parent, _, own = name.rpartition(".")
    return next((f"{parent}.{'+'.join(names)}" for names in SIBLINGS if own in names), name)


def is_meant(name: str, recipe: Recipe) -> bool:
    """Whether the recipe's patterns say so."""
    return _matches(name, recipe.include) and not _matches(name, recipe.exclude)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _of_all_ranks(names: list[str]) -> list[str]:
    """Names of every rank, without repetitions."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return names
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, names)
    return list(dict.fromkeys(name for each in gathered for name in each))
