"""Recipes of quantisation: which numbers stand for weights and activations, and what has a scale of its own.

Names are ModelOpt's or the field's. Imports no torch.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal, Self

from pydantic import Field, model_validator

from mcore_spec.config.strict import StrictConfig, suggest
from mcore_spec.errors import ConfigError

# e4m3: float8_e4m3fn; e5m2: float8_e5m2, of gradients alone; the whole numbers are symmetric around zero.
Number = Literal["e4m3", "e5m2", "int8", "int4"]
# What has one scale: the whole tensor; an output channel of a weight; a token of an activation; a block, of 128 x 128
# numbers of a weight, of 128 numbers of one token of an activation.
Granularity = Literal["tensor", "channel", "token", "block"]
CalibrationMethod = Literal["max", "percentile", "mse"]
# How the one scale of a gradient is found where linear maps multiply FP8 numbers: from the gradient itself, or from the
# largest values of the steps before.
GradientScaling = Literal["current", "delayed"]
# What multiplies them; auto: Transformer Engine where it is installed and CUDA is used, else torch.
Float8Backend = Literal["auto", "torch", "transformer_engine"]
# Whose form the exported declaration and the shapes of scales have.
QuantFormat = Literal["modelopt", "compressed-tensors"]
BLOCK = 128


class Scheme(StrictConfig):
    """How one kind of tensor is quantised; an activation's scales may be computed from each activation anew."""

    number: Number
    granularity: Granularity
    is_dynamic: bool = False

    def __str__(self) -> str:
        """Such as "e4m3 per token, dynamic"."""
        return f"{self.number} per {self.granularity}{', dynamic' if self.is_dynamic else ''}"


class Recipe(StrictConfig):
    """A way to quantise a model: its linear maps, and its keys and values where `kv_cache` is set.

    Names are those of modules, such as ``decoder.layers.3.mlp.linear_fc1`` and ``eagle_module.fc``; a pattern is one of
    the shell's. Heads, embeddings and routers are never among them.
    """

    name: str
    weight: Scheme
    activation: Scheme
    kv_cache: Scheme | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_schemes(self) -> Self:
        if self.weight.is_dynamic or self.weight.granularity == "token":
            raise ValueError("weight: its scales are kept, one a tensor, channel or block")
        if self.activation.is_dynamic != (self.activation.granularity != "tensor"):
            raise ValueError("activation: one scale a tensor is static, scales of tokens and blocks are dynamic")
        if "e5m2" in (self.weight.number, self.activation.number):
            raise ValueError("e5m2 is for gradients: weights and activations take e4m3")
        return self

    @property
    def is_calibrated(self) -> bool:
        """Whether some scale is found by looking at activations."""
        return not self.activation.is_dynamic or self.kv_cache is not None

    @property
    def is_fp8(self) -> bool:
        """Whether linear maps can multiply its numbers in FP8."""
        return self.weight.number == self.activation.number == "e4m3"

    @property
    def gradient(self) -> Scheme:
        """What stands for gradients where linear maps multiply FP8 numbers.

        One scale in E5M2 beside scales of tensors (Micikevicius et al., arXiv 2209.05433; Transformer Engine calls it
        hybrid); a scale for each row in E4M3 beside finer ones (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
        """
        if self.activation.is_dynamic:
            return Scheme(number="e4m3", granularity="token", is_dynamic=True)
        return Scheme(number="e5m2", granularity="tensor", is_dynamic=True)


class QuantizationRecord(StrictConfig):
    """What a checkpoint says about its scales.

    `has_learned_scales`: those of the draft were, or are, trained. `gradient_scaling`: of a run whose linear maps
    multiply FP8 numbers; a "delayed" one keeps what it has seen.
    """

    recipe: Recipe
    calibration: CalibrationMethod = "max"
    num_conversations: int = Field(0, ge=0)
    has_learned_scales: bool = False
    gradient_scaling: GradientScaling | None = None


def _scheme(number: Number, granularity: Granularity) -> Scheme:
    return Scheme(number=number, granularity=granularity, is_dynamic=granularity in ("token", "block"))


def _recipe(name: str, weight: Scheme, activation: Scheme) -> Recipe:
    return Recipe(name=name, weight=weight, activation=activation)


RECIPES: MappingProxyType[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            _recipe("fp8", _scheme("e4m3", "tensor"), _scheme("e4m3", "tensor")),
            _recipe("fp8_per_channel", _scheme("e4m3", "channel"), _scheme("e4m3", "token")),
            # DeepSeek-V3's (arXiv 2412.19437, section 3.3.2).
            _recipe("fp8_blockwise", Scheme(number="e4m3", granularity="block"), _scheme("e4m3", "block")),
            _recipe("int8_per_channel", _scheme("int8", "channel"), _scheme("int8", "token")),
            # Harsh enough to see what training recovers; no engine's.
            _recipe("int4_per_channel", _scheme("int4", "channel"), _scheme("int8", "token")),
        )
    }
)
KV_CACHE_FP8 = Scheme(number="e4m3", granularity="tensor")


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RECIPES:
        hint = suggest(name, list(RECIPES), otherwise=f"choose one of {', '.join(RECIPES)}")
        raise ConfigError(f"recipe {name!r} is not known; {hint}")
    return RECIPES[name]
