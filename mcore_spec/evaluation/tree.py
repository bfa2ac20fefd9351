"""Which tokens a draft proposes below the last known one: a chain, or a tree that is the same for every sequence."""

from __future__ import annotations

from functools import cached_property

import torch

from mcore_spec.errors import ConfigError
from mcore_spec.layers.cache import Tree

ROOT = -1


class Topology:
    """Nodes by paths of ranks: (0,) is the likeliest token behind the root, (0, 1) the second likeliest behind that.

    Nodes are numbered by depth, then by path; a parent comes before its children.
    """

    def __init__(self, paths: list[tuple[int, ...]]) -> None:
        """Take the nodes.

        Args:
            paths: one a node, in any order.

        Raises:
            ConfigError: a path twice, empty or below a node that is not there.
        """
        self.paths = sorted(paths, key=lambda path: (len(path), path))
        number = {path: index for index, path in enumerate(self.paths)}
        for path in self.paths:
            if not path or min(path) < 0 or (len(path) > 1 and path[:-1] not in number):
                raise ConfigError(
                    f"tree: node {_name(path)} has no parent {_name(path[:-1])} in it; give every node that lies above"
                )
        if len(number) < len(self.paths):
            raise ConfigError("tree: a node is given twice; give each once")
        self.parents = [number.get(path[:-1], ROOT) for path in self.paths]
        self.ranks = [path[-1] for path in self.paths]
        self.depth = max((len(path) for path in self.paths), default=0)

    @classmethod
    def chain(cls, num_steps: int) -> Topology:
        """The likeliest token at each of `num_steps` steps; none for plain decoding."""
        return cls([(0,) * depth for depth in range(1, num_steps + 1)])

    @classmethod
    def comb(cls, num_steps: int, *, top_k: int) -> Topology:
        """The chain, and beside each of its tokens the next likeliest ones, `top_k` at each step."""
        return cls([(0,) * depth + (rank,) for depth in range(num_steps) for rank in range(top_k)])

    @classmethod
    def parse(cls, text: str) -> Topology:
        """From paths between blanks, such as ``0 1 0,0 0,1``.

        Raises:
            ConfigError: see the constructor; or no numbers.
        """
        try:
            paths = [tuple(int(rank) for rank in word.split(",")) for word in text.split()]
        except ValueError as error:
            raise ConfigError(f"tree = {text!r}: write paths of ranks such as '0 1 0,0 0,1' ({error})") from None
        if not paths:
            raise ConfigError("tree is empty; write paths of ranks such as '0 1 0,0 0,1'")
        return cls(paths)

    def __len__(self) -> int:
        """Nodes, the root not among them."""
        return len(self.paths)

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling."""
        return self.depth == len(self)

    def at_depth(self, depth: int) -> list[int]:
        """Numbers of the nodes `depth` steps below the root."""
        return [node for node, path in enumerate(self.paths) if len(path) == depth]

    def above(self, node: int, distance: int) -> int:
        """Number of the node, or `ROOT`, that lies `distance` depths above."""
        for _ in range(distance):
            node = self.parents[node]
        return node

    def children(self, node: int) -> list[int]:
        """Numbers of the nodes directly below a node, or below `ROOT`."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def part(self, nodes: list[int], *, first_new: int, device: torch.device) -> Tree:
        """What the new ones among `nodes` see of them.

        Args:
            nodes: some of the nodes in ascending order, with each its parent, and `ROOT` or not.
            first_new: index into `nodes` of the first new row.
            device: of the tensors.

        Returns:
            Depths are counted from the shallowest of the nodes.
        """
        lines = {node: {node, ROOT, *self._ancestors(node)} for node in nodes}
        visible = [[other in lines[node] for other in nodes] for node in nodes[first_new:]]
        depths = [0 if node == ROOT else len(self.paths[node]) for node in nodes]
        shallowest = torch.tensor(depths) - min(depths)
        return Tree(torch.tensor(visible, device=device), shallowest.to(device))

    def _ancestors(self, node: int) -> set[int]:
        found = set()
        while node != ROOT:
            node = self.parents[node]
            found.add(node)
        return found

    @cached_property
    def inner(self) -> list[int]:
        """Numbers of the nodes that have children."""
        return sorted(set(self.parents) - {ROOT})


def _name(path: tuple[int, ...]) -> str:
    return ",".join(map(str, path)) or "(empty)"
