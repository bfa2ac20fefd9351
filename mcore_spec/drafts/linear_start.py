"""A start that has seen data: what is linear in a draft's task, solved by least squares.

The base's next hidden state is regressed on what the draft reads: y = last[t+1] on z = [features[t] ; embedding of
x[t+1]]. One layer can hold the solution. What it leaves is regressed on the inner activations of the layer's MLP, whose
last matrix holds that: training begins where these end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mcore_spec.parallel.sharding import gather_whole, sharded_tensors
from mcore_spec.parallel.tensor_parallel import TensorParallel

# Rows to learn from, for each number that a row reads. Measured at SmolLM2-135M's 2,304 numbers: the start reaches a
# simulated acceptance length of 1.39 with 12 rows a number and 1.42 with 30.
ROWS_PER_INPUT = 32
# Bytes of sums above which no start is made unless it is asked for; solving takes twice as much again.
MAX_DEFAULT_BYTES = 4 * 2**30
# Added to the squares of every input, as a share of them, where there are as many rows as inputs; less with more rows.
# Coefficients are expected to be small beforehand, and every row tells against that. Measured from 0.4 to 10 rows an
# input: within 0.012 of the best acceptance length that any fixed share reached (docs/decisions.md).
RIDGE = 0.1
# The same for what the first regression leaves, of which an MLP explains little: better than no MLP from one row an
# activation to forty, where the share above fits noise (docs/decisions.md).
MLP_RIDGE = 5.0
# Root mean square of a matrix that learns at --lr behind such a start: at 5e-4 a step changes 0.6 % of it. Measured
# beside other shares and one rate for all (docs/decisions.md).
SIZE_OF_RATE = 0.08
# What matrices count as that are nothing yet: the size that random ones start with.
SIZE_OF_NOTHING = 0.02


class LinearMap(NamedTuple):
    """y = features @ `features` + embedding @ `embedding`; float64.

    Attributes:
        features: [f, h].
        embedding: [h, h].
        embedding_moment: second moment of the embeddings, [h, h]: which of their directions matter.
    """

    features: Tensor
    embedding: Tensor
    embedding_moment: Tensor


def sums_bytes(*, num_inputs: int, num_outputs: int) -> int:
    """Bytes of `Moments`."""
    return 8 * num_inputs * (num_inputs + num_outputs)


class Moments:
    """Sums over rows of a regression, float64."""

    def __init__(self, num_inputs: int, num_outputs: int, *, device: torch.device) -> None:
        """Nothing yet.

        Args:
            num_inputs: n.
            num_outputs: h.
            device: of the sums, of which there are (n + h) n.
        """
        wide = torch.float64
        self.inputs = torch.zeros(num_inputs, num_inputs, dtype=wide, device=device)
        self.products = torch.zeros(num_inputs, num_outputs, dtype=wide, device=device)
        self.num_rows = torch.zeros((), dtype=wide, device=device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Count rows: [rows, n] and [rows, h]."""
        inputs, targets = inputs.double(), targets.double()
        self.inputs.addmm_(inputs.t(), inputs)
        self.products.addmm_(inputs.t(), targets)
        self.num_rows += inputs.shape[0]

    @property
    def sums(self) -> list[Tensor]:
        """All there is, for adding up over ranks."""
        return [self.inputs, self.products, self.num_rows]

    def solve(self, *, ridge: float = RIDGE) -> Tensor:
        """The map with the least squared error, [n, h]; every input is measured by its own root mean square.

        Coefficients are drawn to zero, the fewer rows, the more.

        Args:
            ridge: what is added to the squares of every input, as a share of them, with as many rows as inputs.
        """
        scale = self.inputs.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        correlation = self.inputs / scale[:, None] / scale
        correlation.diagonal().add_(ridge * self.inputs.shape[0] / self.num_rows.clamp(min=1))
        return torch.linalg.solve(correlation, self.products / scale[:, None]) / scale[:, None]


def solve_map(moments: Moments, *, num_features: int) -> LinearMap:
    """The regression on [features ; embedding] as a map of both."""
    solution = moments.solve()
    moment = moments.inputs[num_features:, num_features:] / moments.num_rows.clamp(min=1)
    return LinearMap(solution[:num_features], solution[num_features:], moment)


def relative_rates(draft: nn.Module, tp: TensorParallel) -> dict[str, float]:
    """What --lr is multiplied by for each matrix, by name, such that a step changes all by the same share.

    Adam's step of an entry is as large as the learning rate, whatever the matrix's size, and solutions differ in size a
    hundredfold. Adafactor's rates are in proportion to it too (Shazeer and Stern, arXiv 1804.04235, section 8). Every
    rank of the group must call.
    """
    rates = {}
    for name, tensor, shard in sharded_tensors(draft):
        if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
            size = float(gather_whole(tensor.detach(), shard, tp).double().pow(2).mean().sqrt())
            rates[name] = (size or SIZE_OF_NOTHING) / SIZE_OF_RATE
    return rates


class Factors(NamedTuple):
    """A map of low rank in two: x @ `first` @ `second`, [h, r] and [r, h]."""

    first: Tensor
    second: Tensor


def factor(embedding_map: LinearMap, *, rank: int) -> Factors:
    """The embedding's part with at most `rank` numbers in between, nearest for embeddings as they come.

    Reduced-rank regression: the singular directions of the map behind the root of the embeddings' second moment.
    """
    values, vectors = torch.linalg.eigh(embedding_map.embedding_moment)
    root = values.clamp(min=0).sqrt()
    # Directions that no embedding has are left out.
    inverse = torch.where(root > 1e-6 * root.max(), 1 / root.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    left, strength, right = torch.linalg.svd(root[:, None] * (vectors.t() @ embedding_map.embedding))
    kept = min(rank, strength.shape[0])
    # A strength that is rounding would be shared out as its root, a million times its size.
    share = torch.where(strength > 1e-12 * strength.max(), strength, 0.0)[:kept].sqrt()
    first = left.new_zeros(left.shape[0], rank)
    second = left.new_zeros(rank, right.shape[1])
    first[:, :kept] = (vectors * inverse) @ left[:, :kept] * share
    second[:kept] = share[:, None] * right[:kept]
    return Factors(first, second)
