"""A Megatron-core `GPTModel` as the base of a draft: its features, its embedding and its head.

A frozen base runs forward only, without autograd; with several pipeline stages each one sends
(hidden, aux hidden states so far) ahead and keeps nothing. One that is trained too runs stage by stage under
megatron-core's schedule (`run_stage`), which takes the gradients of the same payload back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.bases.features import Features
from mcore_spec.bases.megatron_build import BaseGPTModel, cached_options, describe, packed_options
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import UnsupportedError
from mcore_spec.layers.cache import KeyValueCache, NewRows
from mcore_spec.layers.capture import captured
from mcore_spec.layers.embedding import embed_tokens
from mcore_spec.parallel.collectives import group_rank, group_size
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.sharding import Shard
from mcore_spec.parallel.tensor_parallel import TensorParallel

EMBEDDING_KEY = "embedding.word_embeddings.weight"
# Head rows that travel at once when a draft's head is filled; bounds the transient memory.
HEAD_ROWS_BLOCK = 4096


class LastStageEmbedding(nn.Module):
    """A frozen copy of the base's embedding on the last stage, for drafts that read tokens.

    In a checkpoint it is the base's own tensor, one more replica of it.
    """

    def __init__(self, rows: Tensor, tp: TensorParallel, *, num_rows: int) -> None:
        """Take this rank's rows.

        Args:
            rows: [padded vocabulary / size, h].
            tp: the last stage's tensor-parallel group.
            num_rows: vocabulary without padding.
        """
        super().__init__()
        self.tp, self.num_rows = tp, num_rows
        self.weight = nn.Parameter(rows, requires_grad=False)

    def shards(self) -> dict[str, Shard]:
        """How the weight is cut over the group."""
        return {"weight": Shard(0, size=self.num_rows)}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's protocol: a replica of the first stage's embedding."""
        from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
        from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

        assert not sharded_offsets, "the copy lives on one pipeline stage"
        dp_cp_group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        tensor = make_tp_sharded_tensor_for_checkpoint(
            self.weight,
            EMBEDDING_KEY,
            replica_id=(1, 0, group_rank(dp_cp_group)),
            allow_shape_mismatch=True,
            tp_group=self.tp.group,
            dp_cp_group=dp_cp_group,
        )
        return {f"{prefix}weight": tensor}


class MegatronBase:
    """One rank's view of a `GPTModel` as a base. Holds no state besides the model."""

    def __init__(self, model: GPTModel) -> None:
        """Look at the model.

        Args:
            model: this rank's stage, unwrapped.

        Raises:
            UnsupportedError: a model that cannot carry a draft.
        """
        self.model = model
        self.architecture = describe(model)
        self.tp = TensorParallel(group=model.pg_collection.tp, sequence_parallel=model.config.sequence_parallel)
        self.pp_group: dist.ProcessGroup = model.pg_collection.pp
        self.stage, self.num_stages = group_rank(self.pp_group), group_size(self.pp_group)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head, and the draft."""
        return self.stage == self.num_stages - 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank is of the first replica of the model."""
        return group_rank(self.model.pg_collection.dp_cp) == 0

    def draft(self) -> Draft | None:
        """The attached draft; ``None`` where there is none or on another stage."""
        drafts = [child for child in self.model.children() if isinstance(child, Draft)]
        return drafts[0] if drafts else None

    def freeze(self) -> None:
        """No parameter of the base takes gradients, and no router moves its expert bias.

        megatron-core moves expert biases at the end of a step by the tokens that its routers counted while
        autograd was on; `features` runs with autograd off, so that nothing is counted.
        """
        for child in self.model.children():
            if not isinstance(child, Draft):
                child.requires_grad_(False)

    def head_weight(self) -> Tensor:
        """This rank's rows of the head, [padded vocabulary / size, h]; last stage only."""
        if self.model.share_embeddings_and_output_weights:
            return self.model.shared_embedding_or_output_weight()
        return self.model.output_layer.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[s or s/tp, b, h] -> this rank's logits [s, b, padded vocabulary / size]; last stage only."""
        return F.linear(self.tp.enter(hidden), self.head_weight())

    def embedding_weight(self) -> Tensor:
        """This rank's rows of the embedding, on the first stage and wherever there is a copy."""
        if self.is_first_stage:
            return self.model.embedding.word_embeddings.weight
        if self.model.share_embeddings_and_output_weights:
            return self.model.output_layer.weight
        return self.model.draft_embedding.weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """[b, s] -> frozen embeddings [s or s/tp, b, h]; first and last stage."""
        return embed_tokens(token_ids, self.embedding_weight(), self.tp)

    def needs_embedding_copy(self) -> bool:
        """Whether this is a last stage without the embedding: pipelined, and the head is not tied to it."""
        return self.is_last_stage and not self.is_first_stage and not self.architecture.tie_word_embeddings

    @torch.no_grad()
    def copy_embedding_to_last_stage(self) -> None:
        """Give an untied, pipelined base its embedding on the last stage too, or bring the one there up to date."""
        if self.is_first_stage and self.num_stages > 1 and not self.architecture.tie_word_embeddings:
            target = dist.get_global_rank(self.pp_group, self.num_stages - 1)
            dist.send(self.embedding_weight().detach().contiguous(), target, group=self.pp_group)
        elif self.needs_embedding_copy():
            rows = torch.empty_like(self.head_weight())
            dist.recv(rows, dist.get_global_rank(self.pp_group, 0), group=self.pp_group)
            if any(isinstance(child, LastStageEmbedding) for child in self.model.children()):
                self.embedding_weight().copy_(rows)
            else:
                self.add_last_stage_embedding(rows)

    @torch.no_grad()
    def head_rows(self, token_ids: Tensor, *, first: int, stop: int) -> Tensor:
        """Rows of the head for ``token_ids[first:stop]``, whichever ranks of the last stage hold them.

        Every rank of the tensor-parallel group must call with the same `token_ids`; each may want another
        range. The rows travel in blocks, so that no rank holds the whole head.
        """
        weight = self.head_weight()
        wanted = torch.empty(stop - first, weight.shape[1], dtype=weight.dtype, device=weight.device)
        for start in range(0, token_ids.shape[0], HEAD_ROWS_BLOCK):
            block = embed_tokens(
                token_ids[None, start : start + HEAD_ROWS_BLOCK], weight, TensorParallel(group=self.tp.group)
            )[:, 0]
            low, high = max(first, start), min(stop, start + block.shape[0])
            if low < high:
                wanted[low - first : high - first] = block[low - start : high - start]
        return wanted

    @torch.no_grad()
    def head_row_norm(self) -> float:
        """Root mean square of the norms of the head's rows; last stage only, every rank of its group must call."""
        weight = self.head_weight()
        # Padding rows are zero and add nothing to the sum.
        total = torch.linalg.vector_norm(weight, dtype=torch.float64).square()
        if self.tp.size > 1:
            dist.all_reduce(total, group=self.tp.group)
        return float((total / self.architecture.vocab_size).sqrt())

    def final_norm_weight(self) -> Tensor:
        """Weight of the final norm, [h]; last stage only."""
        weight: Tensor = self.model.decoder.final_layernorm.weight
        return weight.detach()

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The final norm of hidden states [s, b, h]; last stage only."""
        normed: Tensor = self.model.decoder.final_layernorm(hidden)
        return normed

    @torch.no_grad()
    def last_layer_weights(self) -> dict[str, Tensor]:
        """This rank's weights of the last decoder layer under the names of a draft's layer; last stage only.

        A layer with experts has no weights of an MLP.

        Raises:
            UnsupportedError: a base that is kept without its layers.
        """
        self._check_layers("has no last layer for a draft to take")
        layer, architecture = self.model.decoder.layers[-1], self.architecture
        state = dict(layer.named_parameters())
        per_group = architecture.num_attention_heads // architecture.num_key_value_heads
        heads = (per_group, 1, 1)
        names = {
            "input_layernorm.weight": "input_layernorm.weight",
            "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
            "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
            "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
            "mlp.linear_fc2.weight": "mlp.down_proj.weight",
            # Where Transformer Engine keeps the two norms.
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
            "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        }
        weights = {ours: state[theirs] for theirs, ours in names.items() if theirs in state}
        for kind in ("weight", "bias"):
            fused = state.get(f"self_attention.linear_qkv.{kind}")
            if fused is not None:
                # megatron-core keeps, for each key/value group, its queries, its key and its value.
                grouped = fused.unflatten(0, (-1, sum(heads), architecture.head_dim))
                for name, part in zip("qkv", grouped.split(heads, dim=1), strict=True):
                    weights[f"self_attn.{name}_proj.{kind}"] = part.flatten(0, 2)
        if "mlp.linear_fc1.weight" in state:
            gate, up = state["mlp.linear_fc1.weight"].chunk(2)
            weights |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
        return weights

    def _check_layers(self, problem: str) -> None:
        if not self.architecture.has_layers:
            raise UnsupportedError(
                f"a base that is kept without its layers {problem}; use a checkpoint that has them (convert without "
                "--export-offline-model)"
            )

    def add_last_stage_embedding(self, rows: Tensor) -> None:
        """Attach the copy of the embedding; a checkpoint fills it where `rows` are not known yet."""
        copy = LastStageEmbedding(rows.detach(), self.tp, num_rows=self.architecture.vocab_size)
        self.model.add_module("draft_embedding", copy)

    @torch.no_grad()
    def features(
        self, token_ids: Tensor, *, aux_layer_ids: Sequence[int] = (), documents: Documents | None = None
    ) -> Features | None:
        """Run the base on whole sequences.

        Args:
            token_ids: [b, s], the same on every stage; with `documents` the whole packed row, [1, s].
            aux_layer_ids: layers (0-based, by output) whose hidden states are wanted; sorted.
            documents: bounds inside the row, and which of its rows this rank takes; ``None``: each of the b
                rows is one document.

        Returns:
            The features of this rank's rows on the last stage, ``None`` on the others.

        Raises:
            UnsupportedError: several documents in a base whose attention cannot keep them apart.
        """
        num_rows = token_ids.shape[1] if documents is None else documents.num_local_rows
        payload = self._receive(token_ids.shape[0], num_rows, aux_layer_ids)
        output = self.run_stage(token_ids, payload, aux_layer_ids=aux_layer_ids, documents=documents)
        return self._send(output)

    def run_stage(
        self,
        token_ids: Tensor,
        payload: Tensor | None,
        *,
        aux_layer_ids: Sequence[int] = (),
        documents: Documents | None = None,
    ) -> Features | Tensor:
        """This pipeline stage alone, differentiable where autograd is on.

        Args:
            token_ids: as of `features`.
            payload: what the stage before returned; ``None`` on the first.
            aux_layer_ids: as of `features`.
            documents: as of `features`.

        Returns:
            The features on the last stage; on others what the next one needs, [s or s/tp, b, h (1 + n)].

        Raises:
            UnsupportedError: as of `features`.
        """
        if documents is not None:
            token_ids = documents.take(token_ids, 1)
        received = self._take(payload)
        # Our own attention takes documents in any case; LongRoPE's table depends on their length.
        if documents is None or (documents.is_single and not isinstance(self.model, BaseGPTModel)):
            positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
            embedded, rotary = self.model._preprocess(token_ids, positions)[:2]
            options: dict[str, Any] = {"rotary_pos_emb": rotary}
        else:
            embedded = self.model.embedding(token_ids, None) if self.is_first_stage else None
            options = packed_options(self.model, documents)
        return self._run_layers(embedded, received, aux_layer_ids, options)

    @torch.no_grad()
    def cached_features(
        self, token_ids: Tensor, rows: NewRows, cache: KeyValueCache, *, aux_layer_ids: Sequence[int] = ()
    ) -> Features | None:
        """Run the base on new rows of sequences whose earlier keys and values are in `cache`, which takes the new ones.

        Args:
            token_ids: one a row, padding included, [1, rows]; the same on every stage.
            rows: where they belong. Under sequence parallelism their number is a multiple of the group's size.
            cache: of this rank's layers.
            aux_layer_ids: as in `features`.

        Returns:
            The features of the new rows on the last stage, ``None`` on the others.

        Raises:
            UnsupportedError: layers that cannot keep keys and values.
        """
        options = cached_options(self.model, rows, cache)
        received = self._take(self._receive(token_ids.shape[0], token_ids.shape[1], aux_layer_ids))
        embedded = self.model.embedding(token_ids, None) if self.is_first_stage else None
        return self._send(self._run_layers(embedded, received, aux_layer_ids, options))

    def _run_layers(
        self, embedded: Tensor | None, received: list[Tensor], aux_layer_ids: Sequence[int], options: dict[str, Any]
    ) -> Features | Tensor:
        """This stage's layers, and what `run_stage` returns."""
        self._check_layers("computes no hidden states")
        read = [layer for layer in self.model.decoder.layers if layer.layer_number - 1 in aux_layer_ids]
        with captured(read, lambda _, output: output[0]) as outputs:
            hidden = self.model.decoder(hidden_states=embedded, attention_mask=None, **options)
        aux = [*received, *outputs]
        if not self.is_last_stage:
            return torch.cat([hidden, *aux], dim=-1)
        return Features(aux=torch.cat(aux, dim=-1) if aux else None, last=hidden)

    def _send(self, output: Features | Tensor) -> Features | None:
        """Send ahead what the next stage needs, or return the features."""
        if isinstance(output, Features):
            return output
        self._communicator().send_forward(output, False)
        return None

    def _take(self, payload: Tensor | None) -> list[Tensor]:
        """Hand the previous stage's hidden states to the decoder; return the aux states that came along."""
        if self.is_first_stage:
            return []
        assert payload is not None, "stages behind the first are given what the one before returned"
        hidden, *aux = (part.contiguous() for part in payload.split(self.architecture.hidden_size, dim=-1))
        self.model.set_input_tensor(hidden)
        return aux

    def _receive(self, batch: int, length: int, aux_layer_ids: Sequence[int]) -> Tensor | None:
        """What the stage before sent, without gradient; ``None`` on the first."""
        if self.is_first_stage:
            return None
        first_layer = self.model.decoder.layers[0].layer_number - 1
        num_aux = sum(layer < first_layer for layer in aux_layer_ids)
        if self.tp.sequence_parallel:
            length = self.tp.local(length, what="sequence length")
        width = self.architecture.hidden_size * (1 + num_aux)
        payload: Tensor = self._communicator().recv_forward((length, batch, width), False)
        return payload.detach()

    def _communicator(self) -> P2PCommunicator:
        return P2PCommunicator(self.pp_group, self.model.config)
