"""A third algorithm, whole in one file: what the package must not know of before its line is in the registry.

One linear map of the next token's embedding and the base's last hidden state, and a head of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar
from unittest import mock

import torch
from pydantic import Field
from torch import Tensor, nn

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.cli.main import run_command
from mcore_spec.config import ALGORITHMS, BaseArchitecture, RegisteredAlgorithm, StrictConfig
from mcore_spec.conversion import Algorithm
from mcore_spec.drafts.draft import Draft, Reads
from mcore_spec.export.plan import ExportFormat, ExportPlan, check_hf
from mcore_spec.layers.decoder import init_linear_weights
from mcore_spec.layers.linear import ShardedLinear, VocabularyHead, project_sharded_columns
from mcore_spec.parallel.tensor_parallel import Placement

# --- the file -------------------------------------------------------------------------------------


class OneMapConfig(StrictConfig):
    one_map_std: float = Field(0.02, gt=0, description="Standard deviation of the initial map.")
    one_map_freeze: bool = Field(True, description="Keep the base's weights fixed.")


class OneMapDraft(Draft):
    label: ClassVar[str] = "One map"
    reads: ClassVar[Reads] = "last"
    reads_tokens: ClassVar[bool] = True

    def __init__(self, config: OneMapConfig, base: BaseArchitecture, *, place: Placement) -> None:
        super().__init__(tp=place.tp)
        self.config = config
        self.map = ShardedLinear(2 * base.hidden_size, base.hidden_size, shard_dim=1, place=place)
        self.heads = nn.ModuleList([VocabularyHead(base.hidden_size, base.vocab_size, place=place)])

    def own_heads(self) -> list[VocabularyHead]:
        return list(self.heads)

    def init_weights(self, *, seed: int) -> None:
        init_linear_weights(self, std=self.config.one_map_std, seed=seed)

    def facts(self) -> list[str]:
        return [f"standard deviation {self.config.one_map_std}"]

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """[s, b, h] twice -> logits of token x[t+2], this rank's [s, b, padded vocabulary / size]."""
        mapped = project_sharded_columns(self.map, torch.cat((embedding, features), dim=-1))
        return self.heads[0](self.tp.enter(features + mapped))


NAMES = [("map.weight", "projection.weight"), ("heads.{i}.weight", "head.{i}.weight")]


def plan_one_map(draft: OneMapDraft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    check_hf(export_format, draft)
    config = {"architectures": ["OneMap"], "hidden_size": record.base.hidden_size, "std": draft.config.one_map_std}
    return ExportPlan(config=config, table=NAMES, serve={"an engine": "serve {base} {draft}"})


ONE_MAP = Algorithm(
    config_class=OneMapConfig,
    child_name="one_map",
    build=OneMapDraft,
    plan=plan_one_map,
    freezes_base=lambda config: config.one_map_freeze,
)

# --- the line -------------------------------------------------------------------------------------

LINE = {"one-map": RegisteredAlgorithm(f"{__name__}:ONE_MAP", ("seed",))}

# --- what tests do with it ------------------------------------------------------------------------


@contextmanager
def registered() -> Iterator[None]:
    """The line is in the registry for the time of a block, in this process."""
    with mock.patch.dict(ALGORITHMS, LINE):
        yield


def exit_codes(*, commands: list[list[str]]) -> list[int]:
    """Run commands on this rank of the pool."""
    with registered():
        return [run_command(command, words) for command, *words in commands]
