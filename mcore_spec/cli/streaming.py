"""``finetune --extract-ranks``: what the ranks do that run the base, and how the others take what they send."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.extraction import DataShare
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.serving import serve_states
from mcore_spec.checkpoint.store import find_checkpoint, load_checkpoint
from mcore_spec.cli.training_arguments import FinetuneArguments
from mcore_spec.cli.training_data import conversations_of
from mcore_spec.data.hidden_states.streamed import READY, Notices, Replica, RequestQueue, StreamedStates
from mcore_spec.parallel.layout import Layout, device, parallel_runtime, run_on_rank_zero
from mcore_spec.parallel.sides import Bridge
from mcore_spec.training.signals import stop_on_signal
from mcore_spec.training.step import DraftStep, check_trainable


def serve(arguments: FinetuneArguments, bridge: Bridge, *, dtype: str) -> None:
    """An extraction rank from beginning to end: the base of --load, whole, in the dtype of the training."""
    requests = RequestQueue(bridge)
    # Who is asked to stop are the training ranks; until they have, they need what is computed here.
    with stop_on_signal(), parallel_runtime(Layout(), seed=arguments.seed):
        checkpoint = run_on_rank_zero(lambda: find_checkpoint(Path(arguments.load), step=arguments.ckpt_step))
        task = check_trainable(checkpoint.record)
        base = checkpoint.record.base.model_copy(update={"dtype": dtype})
        checkpoint = checkpoint._replace(record=checkpoint.record.model_copy(update={"base": base}))
        model = load_checkpoint(checkpoint, Layout(), transformer_impl=arguments.transformer_impl)
        # They are in the cache then: two sides must not write it at once.
        requests.wait_until_ready()
        serve_states(
            MegatronBase(model),
            conversations_of(arguments, checkpoint),
            requests,
            aux_layer_ids=task.aux_layer_ids,
            # A rank that lags a batch behind the one that asks takes as many again at a new beginning.
            num_kept=2 * (arguments.stream_depth + 1),
            share=DataShare(rank=dist.get_rank(), size=dist.get_world_size(), context_group=None, device=device()),
        )


class Streams:
    """The training side: a stream of states for each stream of batches. Every training rank makes one."""

    def __init__(self, notices: Notices, *, depth: int) -> None:
        """Take the way to the extraction ranks, whose conversations are ready now.

        Args:
            notices: to them.
            depth: batches that are asked for ahead.
        """
        self._notices, self._depth = notices, depth
        self._num_streams = 0
        notices.send_all(READY)

    def open_reader(self, model: GPTModel, step: DraftStep) -> StreamedStates:
        """The next stream of a rank of the last stage; see `ReadStates`."""
        groups = model.pg_collection
        # Ranks of the training side are the first of the bridge.
        ranks = tuple(dist.get_process_group_ranks(groups.tp_cp))
        stream, self._num_streams = self._num_streams, self._num_streams + 1
        dtype: torch.dtype = step.base.head_weight().dtype
        return StreamedStates(
            self._notices,
            Replica(groups.dp.rank(), groups.dp.size(), ranks),
            stream=stream,
            num_asked=self._depth,
            num_aux=len(step.task.aux_layer_ids),
            hidden_size=step.base.architecture.hidden_size,
            dtype=dtype,
        )
