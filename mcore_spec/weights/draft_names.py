"""Names of the drafts' weights in engines' files: one row a tensor, read in both directions.

The left name is the draft module's, the right one the file's; ``{i}`` and ``{j}`` are numbers. The norm
flags and biases of a draft decide which of the rows it uses; a tensor without a row raises.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mcore_spec.errors import UnsupportedError

Table = Sequence[tuple[str, str]]

_LAYER = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
    "self_attn.o_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.bias",
    "mlp.down_proj.bias",
)
_LAYERS: Table = [(f"layers.{{i}}.{name}", f"layers.{{i}}.{name}") for name in _LAYER]
# The one layer of an EAGLE-3 draft, under the name that every engine knows: SGLang drops "layers.0."
# without a word. Several layers are known as "layers.{i}." only.
_MIDLAYER: Table = [(f"layers.0.{name}", f"midlayer.{name}") for name in ("hidden_norm.weight", *_LAYER)]
_FIRST_OF_SEVERAL: Table = [("layers.0.hidden_norm.weight", "layers.0.hidden_norm.weight"), *_LAYERS]

_EAGLE3_OUTER: Table = [
    ("fc.weight", "fc.weight"),
    ("input_norm.weight", "input_norm.weight"),
    ("fc_norm.{i}.weight", "fc_norm.{i}.weight"),
    ("norm.weight", "norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("d2t", "d2t"),
]
EAGLE3: Table = [*_EAGLE3_OUTER, *_MIDLAYER]
EAGLE3_SEVERAL_LAYERS: Table = [*_EAGLE3_OUTER, *_FIRST_OF_SEVERAL]
EAGLE1: Table = [("fc.weight", "fc.weight"), *_LAYERS]
EAGLE_MTP: Table = [
    ("enorm.weight", "enorm.weight"),
    ("hnorm.weight", "hnorm.weight"),
    ("eh_proj.weight", "eh_proj.weight"),
    ("norm.weight", "norm.weight"),
    *_LAYERS,
]
MEDUSA: Table = [
    ("heads.{i}.blocks.{j}.linear.weight", "blocks.{i}.layers.{j}.weight"),
    ("heads.{i}.blocks.{j}.linear.bias", "blocks.{i}.layers.{j}.bias"),
    ("heads.{i}.lm_head.weight", "lm_heads.{i}.weight"),
]


def stored_name(table: Table, name: str) -> str:
    """The file's name of a tensor of the draft."""
    return _translate([(ours, theirs) for ours, theirs in table], name)


def module_name(table: Table, name: str) -> str:
    """The draft's name of a tensor of the file."""
    return _translate([(theirs, ours) for ours, theirs in table], name)


def _translate(rows: Table, name: str) -> str:
    for source, target in rows:
        pattern = re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
        match = re.fullmatch(pattern, name)
        if match:
            return target.format(**match.groupdict())
    raise UnsupportedError(f"tensor {name} has no name in this format; known: {', '.join(row[0] for row in rows)}")
