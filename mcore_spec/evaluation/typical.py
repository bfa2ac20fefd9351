"""Typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1): proposals that the base finds likely enough.

Longer runs than exact acceptance keeps, at the price of answers that are not the base's own: neither its greedy answer
nor a draw from its distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mcore_spec.evaluation.tree import ROOT, Topology


@dataclass(frozen=True, kw_only=True)
class TypicalAcceptance:
    """A proposed token x is kept behind y if p(x | y) > min(epsilon, delta exp(-H(p(. | y)))).

    p is the base's distribution and H its entropy in nats: where the base is sure, few tokens pass; where it is not,
    many do. The first token of a pass is the base's likeliest and always kept, so that a pass brings at least one.

    Attributes:
        temperature: of p.
        epsilon: probability that is always enough.
        delta: factor of the other bound; the reference takes the root of epsilon.
    """

    temperature: float
    epsilon: float = 0.09
    delta: float = 0.3

    def scores(self, proposed: Tensor, base: Tensor) -> Tensor:
        """How likely each proposal is, and whether that is enough.

        Args:
            proposed: token ids, int64 [n].
            base: p behind the parent of each, [n, vocabulary].

        Returns:
            ln p(x), -inf where x is not kept, [n].
        """
        entropy = -torch.xlogy(base, base).sum(dim=1)
        bound = (self.delta * (-entropy).exp()).clamp(max=self.epsilon)
        p = base.gather(1, proposed[:, None])[:, 0]
        return p.log().where(p > bound, torch.full_like(p, float("-inf")))

    def keep(self, topology: Topology, proposed: list[int], base: Tensor) -> list[int]:
        """The longest path below the root of which every token passes; the likeliest of several.

        Args:
            topology: of the proposals.
            proposed: token of each node.
            base: p behind the root and behind each node, [1 + nodes, vocabulary].

        Returns:
            Nodes from the top.
        """
        parents = torch.tensor(topology.parents, device=base.device)
        token_ids = torch.tensor(proposed, device=base.device)
        # Row 0 is the root's, and its number is -1.
        own = self.scores(token_ids, base[parents + 1]).tolist()
        paths: dict[int, list[int]] = {ROOT: []}
        totals = {ROOT: 0.0}
        for node, parent in enumerate(topology.parents):
            if parent in paths and own[node] > float("-inf"):
                paths[node], totals[node] = [*paths[parent], node], totals[parent] + own[node]
        # Of equals the first: nodes are in the order of their ranks.
        return paths[max(paths, key=lambda node: (len(paths[node]), totals[node]))]
