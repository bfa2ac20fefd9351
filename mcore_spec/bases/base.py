"""What conversion and training ask of a base, whatever library it is a model of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture
from mcore_spec.drafts.draft import Draft
from mcore_spec.parallel.tensor_parallel import TensorParallel


class Base(Protocol):
    """One rank's view of a model that carries a draft, or will.

    Attributes:
        architecture: sizes of the whole.
        tp: the ranks over which the last pipeline stage is cut.
    """

    architecture: BaseArchitecture
    tp: TensorParallel

    @property
    def model(self) -> nn.Module:
        """This rank's part; the draft becomes its child."""
        ...

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head, and the draft."""
        ...

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes for all that hold the same."""
        ...

    def draft(self) -> Draft | None:
        """The attached draft; ``None`` where there is none or on another stage."""
        ...

    def freeze(self) -> None:
        """No parameter of the base takes gradients."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """[b, s] -> frozen embeddings [s or s/tp, b, h]; first and last stage."""
        ...

    def embedding_weight(self) -> Tensor:
        """This rank's rows of the embedding, [padded vocabulary / size, h]; first and last stage."""
        ...

    def copy_embedding_to_last_stage(self) -> None:
        """Bring the embedding to a last stage that lacks it; every rank of the model must call."""
        ...

    def head_weight(self) -> Tensor:
        """This rank's rows of the head, [padded vocabulary / size, h]; last stage only."""
        ...

    def head_rows(self, token_ids: Tensor, *, first: int, stop: int) -> Tensor:
        """Rows of the head for ``token_ids[first:stop]``, whichever ranks hold them; all of the group must call."""
        ...

    def head_row_norm(self) -> float:
        """Root mean square of the norms of the head's rows; last stage only, every rank of its group must call."""
        ...

    def final_norm_weight(self) -> Tensor:
        """Weight of the final norm, [h]; last stage only."""
        ...

    def last_layer_weights(self) -> dict[str, Tensor]:
        """This rank's weights of the last decoder layer under the names of a draft's layer; last stage only."""
        ...
