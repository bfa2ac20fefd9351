"""A transformers causal language model as the base of a draft: its features, its embedding and its head.

A frozen base runs forward only, without autograd; one that is trained too by `run_stage`. Its decoder is the model's
own; its attention is ours for the time of such a call, so that documents of a batch lie behind each other in one row
without padding, do not see each other, and may be cut over context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from mcore_spec.bases.features import Features
from mcore_spec.bases.transformers_config import describe_hf
from mcore_spec.bases.transformers_run import packed_rows, register_packed_attention
from mcore_spec.config import BaseArchitecture
from mcore_spec.config.base import HF_FAMILIES
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.layers.capture import captured
from mcore_spec.layers.rotary import RotaryEmbedding
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.layout import is_rank_zero
from mcore_spec.parallel.tensor_parallel import TensorParallel

_REMEDY = "drafts are attached to decoder-only language models (AutoModelForCausalLM)"


class TransformersBase:
    """A view of a transformers model as a base. Holds no state besides the model and what it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Look at the model.

        Args:
            model: a causal language model, not wrapped.

        Raises:
            UnsupportedError: a part that cannot be found, or a feature that a draft's layers could not follow.
        """
        self.model = model
        self.tp = TensorParallel()
        self.architecture = describe_model(model)
        self.embedding = _module(model.get_input_embeddings(), "an input embedding", model)
        self.head = _module(model.get_output_embeddings(), "an output head", model)
        self.decoder = _module(None if model.base_model is model else model.base_model, "a decoder of its own", model)
        self.layers = _find_layers(self.decoder, model, num_layers=self.architecture.num_layers)
        self.final_norm = _find_final_norm(self.decoder, model, hidden_size=self.architecture.hidden_size)
        self.rotary = RotaryEmbedding(self.architecture.rope, self.architecture.head_dim)
        register_packed_attention()

    @property
    def is_last_stage(self) -> bool:
        """The whole model is one stage."""
        return True

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes for all: each has the whole model."""
        return is_rank_zero()

    def check_vocabulary(self) -> None:
        """Refuse a model whose embedding or head is another one than when this view of it was made.

        Raises:
            ConfigError: it was resized, or replaced.
        """
        model, vocab_size = self.model, self.architecture.vocab_size
        is_same = model.get_input_embeddings() is self.embedding and model.get_output_embeddings() is self.head
        found = cast(Tensor, self.head.weight).shape[0]
        if not is_same or found != vocab_size:
            raise ConfigError(
                f"embedding or head of the {type(model).__name__} are not those that its draft was made for, with "
                f"{vocab_size} tokens; resize_token_embeddings, and whatever else replaces them, comes before convert"
            )

    def draft(self) -> Draft | None:
        """The attached draft, if there is one."""
        drafts = [child for child in self.model.children() if isinstance(child, Draft)]
        return drafts[0] if drafts else None

    def freeze(self) -> None:
        """No parameter of the base takes gradients."""
        for child in self.model.children():
            if not isinstance(child, Draft):
                child.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the head is, and with it the draft, its inputs and its loss.

        Raises:
            UnsupportedError: the head is offloaded.
        """
        device = cast(Tensor, self.head.weight).device
        if device.type == "meta":
            raise UnsupportedError(
                f"the head of the {type(self.model).__name__} is offloaded; give it a device in device_map, where a "
                "draft reads it"
            )
        return device

    @property
    def _entrance(self) -> torch.device:
        """Where token ids go in; from an offloaded embedding accelerate's hooks send them on."""
        device = self.embedding_weight().device
        return self.device if device.type == "meta" else device

    def head_weight(self) -> Tensor:
        """The head, [vocabulary, h].

        Raises:
            UnsupportedError: a head that is sharded apart from the model, or offloaded.
        """
        # It is there already: the very weight, or the property's error.
        weight = cast(Tensor, self.head.weight).to(self.device)
        if isinstance(weight, DTensor):
            raise UnsupportedError(
                f"the head of the {type(self.model).__name__} is sharded: a draft reads it whole; keep it in the unit "
                "of the model, or in one that is not sharded again behind its forward (accelerate's FSDP does)"
            )
        return weight

    def embedding_weight(self) -> Tensor:
        """The embedding, [vocabulary, h]."""
        return cast(Tensor, self.embedding.weight)

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """[b, s] -> frozen embeddings [s, b, h]. Through the module: it may have to gather its weight first."""
        embedded: Tensor = self.embedding(token_ids.to(self._entrance))
        return embedded.transpose(0, 1).to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., vocabulary]."""
        return F.linear(hidden, self.head_weight())

    def copy_embedding_to_last_stage(self) -> None:
        """There is one stage, which has it."""

    @torch.no_grad()
    def head_rows(self, token_ids: Tensor, *, first: int, stop: int) -> Tensor:
        """Rows of the head for ``token_ids[first:stop]``."""
        return self.head_weight()[token_ids[first:stop].to(self.head_weight().device)]

    @torch.no_grad()
    def head_row_norm(self) -> float:
        """Root mean square of the norms of the head's rows."""
        total = torch.linalg.vector_norm(self.head_weight(), dtype=torch.float64).square()
        return float((total / self.architecture.vocab_size).sqrt())

    def final_norm_weight(self) -> Tensor:
        """Weight of the final norm, [h]."""
        return cast(Tensor, self.final_norm.weight).detach()

    @torch.no_grad()
    def last_layer_weights(self) -> dict[str, Tensor]:
        """Weights of the last decoder layer under the names of a draft's layer, which are transformers'."""
        weights = _whole_parameters(self.layers[-1])
        fused = weights.pop("self_attn.qkv_proj.weight", None)
        if fused is not None:
            base = self.architecture
            sizes = [heads * base.head_dim for heads in (base.num_attention_heads, *[base.num_key_value_heads] * 2)]
            names = [f"self_attn.{name}_proj.weight" for name in "qkv"]
            weights |= dict(zip(names, fused.split(sizes), strict=True))
        fused = weights.pop("mlp.gate_up_proj.weight", None)
        if fused is not None:
            weights |= dict(zip(("mlp.gate_proj.weight", "mlp.up_proj.weight"), fused.chunk(2), strict=True))
        return weights

    @torch.no_grad()
    def features(
        self, token_ids: Tensor, *, aux_layer_ids: Sequence[int] = (), documents: Documents | None = None
    ) -> Features:
        """Run the base on one packed row; the head does not run.

        Args:
            token_ids: [1, s], the whole row.
            aux_layer_ids: layers (0-based, by output) whose hidden states are wanted; sorted.
            documents: bounds inside the row, and which of its rows this rank takes; ``None``: the row is one document.

        Returns:
            The features of this rank's rows.
        """
        return self.run_stage(token_ids, aux_layer_ids=aux_layer_ids, documents=documents)

    def run_stage(
        self, token_ids: Tensor, *, aux_layer_ids: Sequence[int] = (), documents: Documents | None = None
    ) -> Features:
        """`features`, differentiable where autograd is on; without dropout in any case, as on a `GPTModel`.

        Layers that transformers was told to checkpoint are computed again in backward.
        """
        assert token_ids.shape[0] == 1, "documents lie in one packed row"
        documents = Documents((0, token_ids.shape[1])) if documents is None else documents
        token_ids = token_ids.to(self._entrance)
        positions = documents.local_rows(token_ids.device).positions
        with ExitStack() as stack:
            is_checkpointed = self.model.training and torch.is_grad_enabled()
            stack.enter_context(packed_rows(self.decoder, is_checkpointed=is_checkpointed))
            if self.rotary.has_two_tables:
                stack.enter_context(self._with_table_of_each_document(documents))
            read = [self.layers[layer] for layer in sorted(set(aux_layer_ids))]
            outputs = stack.enter_context(captured(read, lambda _, output: output))
            output = self.decoder(
                input_ids=documents.take(token_ids, 1),
                position_ids=positions[None],
                use_cache=False,
                packed_documents=documents,
            )
        last = output.last_hidden_state.transpose(0, 1).to(self.device)
        if isinstance(self.model, FSDPModule):
            # FSDP gathers weights in hooks around a module's forward. The head's is run, on no rows, so that its weight
            # is there for the loss and the hooks of its unit find each module called.
            self.head(last[:0])
        aux = [hidden.transpose(0, 1).to(self.device) for hidden in outputs]
        return Features(aux=torch.cat(aux, dim=-1) if aux else None, last=last)

    @contextmanager
    def _with_table_of_each_document(self, documents: Documents) -> Iterator[None]:
        """LongRoPE's table is chosen by each document's length, where transformers takes one for all rows."""
        self.rotary.to(self._entrance)

        def angles(_rotary: nn.Module, inputs: tuple[Tensor, ...], _output: object) -> tuple[Tensor, Tensor]:
            hidden = inputs[0]
            _, positions, lengths = documents.local_rows(hidden.device)
            cos, sin = self.rotary(positions, sequence_length=lengths, dtype=hidden.dtype)
            return cos[None], sin[None]

        handle = self.decoder.get_submodule("rotary_emb").register_forward_hook(angles)
        try:
            yield
        finally:
            handle.remove()


def load_base(directory: Path, dtype: str, *, device: torch.device) -> TransformersBase:
    """A model without a draft as a base, for evaluation.

    Args:
        directory: Hugging Face's files.
        dtype: of the weights, by torch's name; auto: as stored.
        device: where it runs.

    Raises:
        UnsupportedError: a model that cannot carry a draft.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return TransformersBase(model.to(device).eval())


def describe_model(model: PreTrainedModel) -> BaseArchitecture:
    """Our description of a live model.

    Raises:
        UnsupportedError: an architecture or a feature that is not represented.
    """
    # Wrappers such as FSDP make classes of their own, which derive from the model's.
    names = [kind.__name__ for kind in type(model).__mro__]
    known = [name for name in names if name in HF_FAMILIES] or names
    head = model.get_output_embeddings()
    dtype = model.dtype if head is None else cast(Tensor, head.weight).dtype
    raw = {**model.config.to_dict(), "architectures": known[:1], "dtype": str(dtype).removeprefix("torch.")}
    return describe_hf(raw, where=f"the {names[0]}")


def _module(found: nn.Module | None, what: str, model: nn.Module) -> nn.Module:
    if found is None:
        raise UnsupportedError(f"{type(model).__name__} has no {what.split(' ', 1)[1]}: {_REMEDY}")
    return found


def _find_layers(decoder: nn.Module, model: nn.Module, *, num_layers: int) -> nn.ModuleList:
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers]
    if len(lists) != 1:
        raise UnsupportedError(
            f"{type(model).__name__}: {len(lists)} lists of num_hidden_layers = {num_layers} layers in its "
            f"{type(decoder).__name__}, where one is looked for; {_REMEDY}"
        )
    return lists[0]


def _find_final_norm(decoder: nn.Module, model: nn.Module, *, hidden_size: int) -> nn.Module:
    norms = [
        child
        for child in decoder.children()
        if [(name, tuple(weight.shape)) for name, weight in child.named_parameters()] == [("weight", (hidden_size,))]
    ]
    if len(norms) != 1:
        raise UnsupportedError(
            f"{type(model).__name__}: {len(norms)} norms behind the layers of its {type(decoder).__name__}, where one "
            f"with a weight of hidden_size = {hidden_size} is looked for; {_REMEDY}"
        )
    return norms[0]


def _whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name; those that accelerate offloaded are read."""
    found: dict[str, Tensor] = {}
    for prefix, each in module.named_modules():
        own = dict(each.named_parameters(prefix, recurse=False))
        if any(parameter.device.type == "meta" for parameter in own.values()):
            # Whoever offloads has accelerate.
            from accelerate.utils import align_module_device

            with align_module_device(each):
                own = dict(each.named_parameters(prefix, recurse=False))
        found |= {name: parameter.detach() for name, parameter in own.items()}
    return found
