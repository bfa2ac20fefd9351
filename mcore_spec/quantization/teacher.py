"""The teacher of a draft on a quantised base: what the base was before."""

from __future__ import annotations

from mcore_spec.bases.feature_sources import LiveFeatures
from mcore_spec.bases.features import Features, FeatureSource
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.data.batch import Batch
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.documents import Documents
from mcore_spec.quantization.installed import quantization_of, unquantized


class UnquantizedTeacher:
    """The quantised base's features, and the last hidden states of a second pass without quantisation.

    See `FeatureSource`.
    """

    def __init__(self, base: MegatronBase, source: FeatureSource) -> None:
        """Look at the base.

        Args:
            base: this rank's part of a quantised model.
            source: of the features that the draft reads.

        Raises:
            ConfigError: a model that is not quantised, or a base that does not run.
        """
        if quantization_of(base.model) is None:
            raise ConfigError("teacher = unquantized, but the model is not quantised; leave it out")
        if not isinstance(source, LiveFeatures):
            raise ConfigError("teacher = unquantized needs the base to run; train on --data-path, or leave it out")
        self.base, self.source = base, source

    def __call__(self, batch: Batch, documents: Documents) -> Features | None:
        """Every stage of the model takes part, twice."""
        features = self.source(batch, documents)
        with unquantized(self.base.model):
            before = self.base.features(batch.token_ids[None], documents=documents)
        if features is None or before is None:
            return None
        return features._replace(teacher=before.last)
