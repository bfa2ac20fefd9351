"""Which scales training may change, and which of them are one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from mcore_spec.config.quantization import Number
from mcore_spec.layers.attention import TTTAttention
from mcore_spec.parallel.collectives import Group
from mcore_spec.quantization.quantizers import KeyValueQuantizer, LinearQuantizer
from mcore_spec.quantization.scales import Scales
from mcore_spec.quantization.targets import AttentionTarget, Target, family_of


class _Learned(NamedTuple):
    """The scales of one place.

    Attributes:
        scales: its.
        number: that stands for what they scale.
        num_behind: numbers of the whole tensor that have one of the scales.
        group: over which a scale's gradient is summed.
        dtype: of the weights.
    """

    scales: Scales
    number: Number
    num_behind: int
    group: Group
    dtype: torch.dtype


def add_learned_scales(
    draft: nn.Module,
    linears: Iterable[tuple[Target, LinearQuantizer]],
    attentions: Iterable[tuple[AttentionTarget, KeyValueQuantizer]],
) -> None:
    """Make the draft's scales such that training may change them; the optimizer takes those that want gradients.

    Linear maps that engines join into one have one scale: theirs is one parameter.

    Args:
        draft: the base's scales stay fixed.
        linears: of the model.
        attentions: of the model.
    """
    own = {id(module) for module in draft.modules()}
    joined: dict[tuple[str, str], list[_Learned]] = {}
    for target, quantizer in linears:
        if id(target.module) not in own:
            continue
        weight, activation, dtype = quantizer.weight, quantizer.activation, target.weight.dtype
        is_joined = weight.scheme.granularity == "tensor"
        key = family_of(target.name) if is_joined else target.name
        # Of weights that are cut a rank has a part, and so it has of the gradient.
        group = target.tp.group if weight.is_shared else None
        of_weight = _Learned(weight, weight.scheme.number, weight.num_behind(), group, dtype)
        joined.setdefault((key, "weight"), []).append(of_weight)
        if not activation.scheme.is_dynamic:
            # Inside of the parallel region a rank has some of the inputs or makes some of the outputs.
            width = target.weight.shape[1] * (target.tp.size if target.cut == 1 else 1)
            of_input = _Learned(activation, activation.scheme.number, width, target.tp.group, dtype)
            joined.setdefault((family_of(target.name), "activation"), []).append(of_input)
    for attention, pair in attentions:
        module = attention.module
        if isinstance(module, TTTAttention) and id(module) in own:
            width, dtype = module.shape.num_kv_heads * module.shape.head_dim, module.k_proj.weight.dtype
            for kind, each in (("key", pair.key), ("value", pair.value)):
                joined[attention.name, kind] = [_Learned(each, each.scheme.number, width, module.tp.group, dtype)]
    for members in joined.values():
        shared = None
        num_behind = sum(member.num_behind for member in members)
        for member in members:
            shared = member.scales.learn(
                member.number, num_behind=num_behind, group=member.group, dtype=member.dtype, shared=shared
            )
