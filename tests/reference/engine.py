"""The engine's side of an exported draft: what a directory means to who knows nothing but its two files.

Everything about layout comes from `config.json` and `model.safetensors` as engines read them: which
tensors there are and of which shape, which hidden states are read (top-level ids are *boundaries*: the
input of layer i), heads, epsilon, rotary frequencies (transformers' own, from the configuration), norm
flags, the draft vocabulary. Only the arithmetic of a layer is `tests.reference.drafts`'. Nothing of
`mcore_spec` is used, and a tensor that is missing, left over or of another shape is an error: SGLang drops
what it does not know without a word.

The base is transformers' model in the dtype of the draft.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.reference import drafts
from tests.reference.drafts import Cache, ServingCache, Shape, StepOutput, Weights


class Base:
    """A transformers model, and what it hands to a draft."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        self.head: Tensor = model.get_output_embeddings().weight.detach()

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype) -> "Base":
        """In whole precision: transformers' RMSNorm and eager softmax go to float32 whatever the dtype, so its
        norms become torch's, and its attention torch's own.
        """
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
        for name, module in list(model.named_modules()):
            if module.__class__.__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(module.weight.numel(), eps=module.variance_epsilon, dtype=dtype)
                norm.load_state_dict(module.state_dict())
                model.set_submodule(name, norm)
        return cls(model)

    @torch.no_grad()
    def hidden_states(self, token_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """[b, s] -> the inputs of layers 0 .. L (L: the last output), and the last one after the final norm."""
        captured: list[Tensor] = []
        layers = self.model.model.layers
        handles = [
            layer.register_forward_pre_hook(
                lambda _m, args, kwargs: captured.append(_hidden(args, kwargs)), with_kwargs=True
            )
            for layer in [*layers, self.model.model.norm]
        ]
        try:
            last = self.model.model(token_ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        assert len(captured) == len(layers) + 1
        return [hidden.transpose(0, 1) for hidden in captured], last.transpose(0, 1)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[b, s] -> [s, b, h]."""
        return F.embedding(token_ids, self.embedding).transpose(0, 1)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


class Proposal(NamedTuple):
    """One drafted token of each sequence."""

    logits: Tensor
    """[b, v] over the draft vocabulary."""
    token_ids: Tensor
    """[b], ids of the base."""
    hidden: Tensor | None = None
    """[b, h], what the head read, where a step made it."""


class Engine(Protocol):
    """A draft as an engine holds it."""

    def features(self, base: Base, token_ids: Tensor) -> Tensor:
        """What the draft reads of the base [s, b, ...] for the tokens [b, s]."""

    def logits(self, features: Tensor, embeddings: list[Tensor]) -> list[Tensor]:
        """[s, b, v] for every step (every head of Medusa), rows and steps as in training."""

    def propose(self, base: Base, features: Tensor, token_ids: Tensor, num_tokens: int) -> list[Proposal]:
        """Draft after the last row of `features` [s, b, ...]; `token_ids` [b, s + 1] end with the base's next."""


def load(directory: Path, base: Base) -> Engine:
    """The draft in `directory` on `base`, chosen by its configuration as engines choose."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    (architecture,) = config["architectures"]
    kinds = {
        "LlamaForCausalLMEagle3": Eagle3,
        "LlamaForCausalLM": Eagle1,
        "EagleMTPModel": EagleMTP,
        "MedusaModel": Medusa,
        "EagleParallelDraftModel": ParallelDraft,
    }
    return kinds[architecture](config, tensors, base)


def check_tensors(tensors: Weights, expected: dict[str, tuple[int, ...]]) -> None:
    """Every tensor that the configuration asks for, in its shape, and no other."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing, unknown = sorted(expected.keys() - shapes), sorted(shapes.keys() - expected)
    wrong = {name: shapes[name] for name in shapes.keys() & expected if shapes[name] != expected[name]}
    if missing or unknown or wrong:
        raise ValueError(f"missing {missing}, unknown {unknown}, of another shape {wrong}")


def rotary(config: dict[str, Any]) -> tuple[Tensor, float]:
    """Frequencies and scaling as transformers reads them, whichever of its two spellings an engine reads."""
    both = []
    for dropped in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        values = {name: copy.deepcopy(value) for name, value in config.items() if name not in dropped}
        embedding = LlamaRotaryEmbedding(LlamaConfig.from_dict(values))
        both.append((embedding.inv_freq, float(embedding.attention_scaling)))
    (new, new_scaling), (old, old_scaling) = both
    if not torch.equal(new, old) or new_scaling != old_scaling:
        raise ValueError("rope_parameters say one thing, rope_theta and rope_scaling another")
    return new, new_scaling


def shape_of(config: dict[str, Any]) -> Shape:
    """The facts that a decoder needs, from the configuration alone."""
    inv_freq, attention_scaling = rotary(config)
    return Shape(
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        eps=config["rms_norm_eps"],
        hidden_act=config["hidden_act"],
        inv_freq=inv_freq,
        attention_scaling=attention_scaling,
        num_layers=config["num_hidden_layers"],
    )


def layer_shapes(config: dict[str, Any], prefix: str, *, input_size: int | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama decoder layer whose attention reads `input_size` (default: the hidden size)."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    width = input_size or hidden
    matrices = {
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    biased = [name for name in matrices if config["attention_bias" if "attn" in name else "mlp_bias"]]
    return {
        **{f"{prefix}.{name}.weight": shape for name, shape in matrices.items()},
        **{f"{prefix}.{name}.bias": matrices[name][:1] for name in biased},
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }


class Eagle3:
    """vLLM's reading: `midlayer.` is the one layer, several are `layers.{i}.`. The base has no part in it."""

    def __init__(self, config: dict[str, Any], tensors: Weights, base: Base | None = None) -> None:
        self.config, self.shape = config, shape_of(config)
        check_tensors(tensors, self._expected(config))
        self.d2t = tensors.get("d2t")
        if self.d2t is not None and self.d2t.dtype is not torch.int64:
            raise ValueError(f"d2t is {self.d2t.dtype}, not int64")
        self.weights = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
        self.flags = {name: config[name] for name in ("norm_before_residual", "norm_output")}

    @staticmethod
    def _expected(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        hidden, num_layers = config["hidden_size"], config["num_hidden_layers"]
        num_aux = len(config["eagle_aux_hidden_state_layer_ids"])
        first = "midlayer" if num_layers == 1 else "layers.0"
        expected: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, num_aux * hidden),
            "norm.weight": (hidden,),
            "lm_head.weight": (config["draft_vocab_size"], hidden),
            f"{first}.hidden_norm.weight": (hidden,),
            **layer_shapes(config, first, input_size=2 * hidden),
        }
        for layer in range(1, num_layers):
            expected |= layer_shapes(config, f"layers.{layer}")
        if config["draft_vocab_size"] != config["vocab_size"]:
            expected["d2t"] = (config["draft_vocab_size"],)
        if config["norm_before_fc"]:
            expected["input_norm.weight"] = (num_aux * hidden,)
        if config["fc_norm"]:
            expected |= {f"fc_norm.{index}.weight": (hidden,) for index in range(num_aux)}
        return expected

    def features(self, base: Base, token_ids: Tensor) -> Tensor:
        inputs, _ = base.hidden_states(token_ids)
        return torch.cat([inputs[layer] for layer in self.config["eagle_aux_hidden_state_layer_ids"]], -1)

    def logits(self, features: Tensor, embeddings: list[Tensor]) -> list[Tensor]:
        return [step.logits for step in drafts.eagle3(self.weights, self.shape, features, embeddings, **self.flags)]

    def propose(self, base: Base, features: Tensor, token_ids: Tensor, num_tokens: int) -> list[Proposal]:
        def step(state: Tensor, embedding: Tensor, position: int, caches: list[Cache]) -> StepOutput:
            arguments = (state, embedding, None, [position], caches)
            return drafts.eagle3_step(self.weights, self.shape, *arguments, **self.flags)

        state = drafts.eagle3_start(self.weights, self.shape, features)
        return _chain(step, base, state, token_ids, num_tokens, num_layers=self.shape.num_layers, d2t=self.d2t)


class Eagle1:
    """vLLM's method "eagle": Llama layers, the first without its input norm; embedding and head are the base's."""

    def __init__(self, config: dict[str, Any], tensors: Weights, base: Base) -> None:
        self.shape, self.weights, self.base = shape_of(config), tensors, base
        hidden = config["hidden_size"]
        expected: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
        for layer in range(config["num_hidden_layers"]):
            expected |= layer_shapes(config, f"layers.{layer}")
        del expected["layers.0.input_layernorm.weight"]
        check_tensors(tensors, expected)

    def features(self, base: Base, token_ids: Tensor) -> Tensor:
        return base.hidden_states(token_ids)[1]

    def logits(self, features: Tensor, embeddings: list[Tensor]) -> list[Tensor]:
        steps = drafts.eagle1(self.weights, self.shape, features, embeddings, self.base.head)
        return [step.logits for step in steps]

    def propose(self, base: Base, features: Tensor, token_ids: Tensor, num_tokens: int) -> list[Proposal]:
        def step(state: Tensor, embedding: Tensor, position: int, caches: list[Cache]) -> StepOutput:
            x = drafts.linear(self.weights, "fc", torch.cat([embedding, state], -1))
            x = drafts.decoder_layer(self.weights, self.shape, 0, x, x, [position], caches[0])
            x = drafts.pre_norm_layers(self.weights, self.shape, 1, x, [position], caches)
            return StepOutput(x, x, F.linear(x, base.head))

        return _chain(step, base, features, token_ids, num_tokens, num_layers=self.shape.num_layers)


class EagleMTP:
    """DeepSeek-V3's names; the layer is of the base's family, which the configuration says, as what it reads."""

    def __init__(self, config: dict[str, Any], tensors: Weights, base: Base) -> None:
        self.shape, self.weights, self.base = shape_of(config), tensors, base
        self.is_mimo = config["reads_before_final_norm"]
        hidden = config["hidden_size"]
        expected: dict[str, tuple[int, ...]] = {
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "eh_proj.weight": (hidden, 2 * hidden),
            "norm.weight": (hidden,),
        }
        for layer in range(config["num_hidden_layers"]):
            expected |= layer_shapes(config, f"layers.{layer}")
            attention = f"layers.{layer}.self_attn"
            if config["qk_norm"]:
                expected |= {f"{attention}.{which}_norm.weight": (config["head_dim"],) for which in "qk"}
            if config["qkv_bias"]:
                rows = {name: expected[f"{attention}.{name}_proj.weight"][:1] for name in "qkv"}
                expected |= {f"{attention}.{name}_proj.bias": shape for name, shape in rows.items()}
        check_tensors(tensors, expected)

    def features(self, base: Base, token_ids: Tensor) -> Tensor:
        layers, last = base.hidden_states(token_ids)
        return layers[-1] if self.is_mimo else last

    def logits(self, features: Tensor, embeddings: list[Tensor]) -> list[Tensor]:
        steps = drafts.eagle_mtp(self.weights, self.shape, features, embeddings, self.base.head, is_mimo=self.is_mimo)
        return [step.logits for step in steps]

    def propose(self, base: Base, features: Tensor, token_ids: Tensor, num_tokens: int) -> list[Proposal]:
        def step(state: Tensor, embedding: Tensor, position: int, caches: list[Cache]) -> StepOutput:
            if self.is_mimo and position == 0:
                embedding = torch.zeros_like(embedding)
            e = drafts.rms_norm(self.weights, self.shape, "enorm", embedding)
            h = drafts.rms_norm(self.weights, self.shape, "hnorm", state)
            x = drafts.linear(self.weights, "eh_proj", torch.cat([h, e] if self.is_mimo else [e, h], -1))
            x = drafts.pre_norm_layers(self.weights, self.shape, 0, x, [position], caches)
            x = drafts.rms_norm(self.weights, self.shape, "norm", x)
            return StepOutput(x, x, F.linear(x, base.head))

        return _chain(step, base, features, token_ids, num_tokens, num_layers=self.shape.num_layers)


class ParallelDraft:
    """ModelOpt's names: a draft of another kind, and heads that propose further tokens from its last step."""

    def __init__(self, config: dict[str, Any], tensors: Weights, base: Base) -> None:
        prefix = "parallel_draft_heads."
        kinds = {"LlamaForCausalLMEagle3": Eagle3, "LlamaForCausalLM": Eagle1, "EagleMTPModel": EagleMTP}
        (kind,) = config["draft_architectures"]
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        self.draft: Engine = kinds[kind](config, rest, base)
        self.heads = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        hidden = config["hidden_size"]
        vocab_size = config.get("draft_vocab_size", config["vocab_size"])
        expected: dict[str, tuple[int, ...]] = {f"{prefix}lm_head.weight": (vocab_size, hidden)}
        self.num_heads = config["parallel_draft_step"] - 1
        self.num_layers = config["parallel_draft_heads_num_layers"]
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                name = f"{prefix}{head}.medusa_layers.{layer}.linear"
                expected |= {f"{name}.weight": (hidden, hidden), f"{name}.bias": (hidden,)}
        check_tensors(self.heads, expected)
        self.d2t = tensors.get("d2t")

    def features(self, base: Base, token_ids: Tensor) -> Tensor:
        return self.draft.features(base, token_ids)

    def logits(self, features: Tensor, embeddings: list[Tensor]) -> list[Tensor]:
        return self.draft.logits(features, embeddings)

    def propose(self, base: Base, features: Tensor, token_ids: Tensor, num_tokens: int) -> list[Proposal]:
        proposals = self.draft.propose(base, features, token_ids, max(1, num_tokens - self.num_heads))
        state = proposals[-1].hidden
        assert state is not None
        for head in range(num_tokens - len(proposals)):
            z = state
            for layer in range(self.num_layers):
                name = f"parallel_draft_heads.{head}.medusa_layers.{layer}.linear"
                z = z + F.silu(F.linear(z, self.heads[f"{name}.weight"], self.heads[f"{name}.bias"]))
            logits = F.linear(z, self.heads["parallel_draft_heads.lm_head.weight"])
            draft_ids = logits.argmax(-1)
            proposals.append(Proposal(logits, draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]))
        return proposals


class Medusa:
    """vLLM's names: `blocks.{head}.layers.{block}` and `lm_heads.{head}`."""

    def __init__(self, config: dict[str, Any], tensors: Weights, base: Base) -> None:
        self.num_heads, self.num_layers = config["num_heads"], config["num_hidden_layers"]
        hidden, size = config["hidden_size"], config.get("draft_vocab_size", config["vocab_size"])
        expected: dict[str, tuple[int, ...]] = {} if size == config["vocab_size"] else {"d2t": (size,)}
        for head in range(self.num_heads):
            expected[f"lm_heads.{head}.weight"] = (size, hidden)
            for block in range(self.num_layers):
                expected[f"blocks.{head}.layers.{block}.weight"] = (hidden, hidden)
                if config["medusa_fc_bias"]:
                    expected[f"blocks.{head}.layers.{block}.bias"] = (hidden,)
        check_tensors(tensors, expected)
        self.weights = tensors
        self.target_ids = torch.arange(size) + tensors.get("d2t", 0)

    def features(self, base: Base, token_ids: Tensor) -> Tensor:
        return base.hidden_states(token_ids)[1]

    def logits(self, features: Tensor, embeddings: list[Tensor]) -> list[Tensor]:
        logits = []
        for head in range(self.num_heads):
            z = features
            for block in range(self.num_layers):
                z = z + F.silu(drafts.linear(self.weights, f"blocks.{head}.layers.{block}", z))
            logits.append(drafts.linear(self.weights, f"lm_heads.{head}", z))
        return logits

    def propose(self, base: Base, features: Tensor, token_ids: Tensor, num_tokens: int) -> list[Proposal]:
        logits = self.logits(features[-1:], [])[:num_tokens]
        return [Proposal(each[0], self.target_ids[each[0].argmax(-1)]) for each in logits]


class _Step(Protocol):
    def __call__(self, state: Tensor, embedding: Tensor, position: int, caches: list[Cache]) -> StepOutput:
        """One row [1, b, h] through the draft."""


def _chain(
    step: _Step,
    base: Base,
    states: Tensor,
    token_ids: Tensor,
    num_tokens: int,
    *,
    num_layers: int,
    d2t: Tensor | None = None,
) -> list[Proposal]:
    """Fill the draft's cache with the prompt's rows one by one, then draft over the draft's own tokens."""
    caches: list[Cache] = [ServingCache() for _ in range(num_layers)]
    last_row = states.shape[0] - 1
    proposals: list[Proposal] = []
    state = states[:1]
    for position in range(last_row + num_tokens):
        if position <= last_row:
            state, next_ids = states[position : position + 1], token_ids[:, position + 1]
        else:
            next_ids = proposals[-1].token_ids
        output = step(state, base.embed(next_ids[:, None]), position, caches)
        state = output.feedback
        if position >= last_row:
            draft_ids = output.logits[0].argmax(-1)
            proposed = draft_ids if d2t is None else draft_ids + d2t[draft_ids]
            proposals.append(Proposal(output.logits[0], proposed, output.hidden[0]))
    return proposals
