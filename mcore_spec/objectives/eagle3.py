"""EAGLE-3: distillation of the base's distribution through all training-time-test steps."""

from __future__ import annotations

from functools import partial

import torch

from mcore_spec.bases.base import Base
from mcore_spec.bases.features import Features
from mcore_spec.config import EagleConfig
from mcore_spec.data.batch import Batch
from mcore_spec.drafts.draft import draft_to_target
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.steps import Mixing
from mcore_spec.errors import ConfigError
from mcore_spec.losses.fused import distillation_loss
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.rows import relate_vocabularies, teacher_rows
from mcore_spec.parallel.documents import Documents


def eagle3_task(config: EagleConfig) -> Task:
    """What training the draft of this configuration takes."""
    return Task(
        num_steps=config.eagle_ttt_steps,
        aux_layer_ids=config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids,
        mixes_hidden_states=config.eagle_mix_hidden_states,
        make_objective=partial(Eagle3Objective, config),
    )


class Eagle3Objective:
    """See `Objective`."""

    def __init__(self, config: EagleConfig, base: Base, draft: Eagle3Draft, *, recompute: bool = False) -> None:
        """Look at both heads.

        Args:
            config: resolved.
            base: the teacher.
            draft: the student.
            recompute: compute the activations of each TTT step again in backward.
        """
        self.config, self.base, self.draft, self.recompute = config, base, draft, recompute
        token_ids = draft_to_target(draft) if draft.has_reduced_vocabulary else None
        self.vocabulary = relate_vocabularies(base, draft.lm_head, token_ids)

    def __call__(self, batch: Batch, documents: Documents, features: Features) -> LossOutput:
        """Sums over this rank's rows."""
        assert features.aux is not None
        tp, config = self.base.tp, self.config
        embeddings = [self.base.embed(token_ids[None]) for token_ids in documents.take(batch.step_token_ids, 1)]
        mixing = self._mixing(batch, documents)
        outputs = self.draft(features.aux, embeddings, documents=documents, recompute=self.recompute, mixing=mixing)
        return distillation_loss(
            [tp.enter(output.hidden)[:, 0] for output in outputs],
            teacher_rows(features, documents, tp),
            position=documents.row_index.to(batch.token_ids.device),
            counted=documents.take(batch.counted, 1),
            vocabulary=self.vocabulary,
            decay=config.eagle_loss_decay_factor,
            keep_out_of_vocabulary=config.eagle_keep_out_of_vocabulary,
            labels=None if config.eagle_self_logit_distillation else documents.take(batch.labels, 1),
        )

    def _mixing(self, batch: Batch, documents: Documents) -> Mixing | None:
        """How states are mixed; not in validation, which measures what an engine will compute."""
        if not (self.config.eagle_mix_hidden_states and torch.is_grad_enabled()):
            return None
        if batch.replaced is None:
            raise ConfigError(
                "eagle_mix_hidden_states = true, but the batch does not say which rows are mixed; give make_batch "
                "mixing = one random generator a document"
            )
        return Mixing(documents.take(batch.replaced, 1), documents, self.base.tp)
