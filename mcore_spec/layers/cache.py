"""Keys and values of sequences that grow, and attention of their new rows.

Several sequences add rows in one forward pass: a whole prompt, the tokens that are to be verified, one drafted
token. The new rows lie behind each other in one packed row; each sequence adds as many as it likes. A cache slot
holds the row of one position, so that taking back what was rejected is writing there again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.layers.attention import KeyValue, Places

# Queries that see different keys are taken in blocks of this many, so that masks stay small.
QUERY_BLOCK = 512


class Span(NamedTuple):
    """New rows of one sequence.

    Attributes:
        sequence: its place in the cache.
        start: rows that it has already.
        num: rows that it adds, at least one.
        length: tokens that the sequence may grow to, which choose LongRoPE's table.
    """

    sequence: int
    start: int
    num: int
    length: int


class Tree(NamedTuple):
    """New rows that are no chain: each sees the rows before the tree, itself and its ancestors.

    Attributes:
        visible: bool [num, nodes], which nodes each new row sees; the new rows are the last ones of the nodes.
        depths: of all nodes below the root, int64 [nodes]; a node's position is the root's plus its depth.
    """

    visible: Tensor
    depths: Tensor


class _Group(NamedTuple):
    """Spans of equally many rows [g, num] of the packed row, and where they begin [g]."""

    rows: Tensor
    sequences: list[int]
    starts: list[int]

    @property
    def num(self) -> int:
        return self.rows.shape[1]

    @property
    def stop(self) -> int:
        """Slots that the longest of the sequences has, the new ones included."""
        return max(self.starts) + self.num


class NewRows:
    """Which sequence, slot and position each row of a packed row has."""

    def __init__(
        self, spans: Sequence[Span], *, device: torch.device, multiple: int = 1, tree: Tree | None = None
    ) -> None:
        """Lay the spans behind each other.

        Args:
            spans: in the order of the rows; no sequence stands twice.
            device: of the tensors.
            multiple: rows are padded to a multiple of it; what becomes of padding rows has no meaning.
            tree: of the new rows of every span, which then have one number; ``None``: chains.
        """
        self.spans, self.tree, self.device = tuple(spans), tree, device
        self.num_filled = sum(span.num for span in spans)
        self.num_rows = -(-self.num_filled // multiple) * multiple
        assert tree is None or all(span.num == tree.visible.shape[0] for span in spans), "one tree for all spans"
        counts = torch.tensor([span.num for span in spans])
        firsts = counts.cumsum(0) - counts
        own = torch.arange(self.num_filled) - firsts.repeat_interleave(counts)
        starts, lengths, sequences = (
            torch.tensor(values).repeat_interleave(counts)
            for values in zip(*((span.start, span.length, span.sequence) for span in spans), strict=True)
        )
        self.slots, self.sequences = (starts + own).to(device), sequences.to(device)
        positions = starts + own
        if tree is not None:
            # A later part of a tree begins behind its earlier nodes, all of them below one root.
            num_earlier = tree.visible.shape[1] - tree.visible.shape[0]
            positions = starts - num_earlier + tree.depths.cpu()[num_earlier:].repeat(len(spans))
        padding = (0, self.num_rows - self.num_filled)
        self.places = Places(F.pad(positions, padding).to(device), F.pad(lengths, padding, value=1).to(device))
        # Row of the packed row that each span ends with.
        self.last_rows = (firsts + counts - 1).to(device)
        self._groups = self._grouped(firsts.tolist())
        self._masks: dict[int | None, list[list[Tensor | None]]] = {}

    def _grouped(self, firsts: list[int]) -> list[_Group]:
        by_count: dict[int, list[tuple[int, Span]]] = {}
        for first, span in zip(firsts, self.spans, strict=True):
            by_count.setdefault(span.num, []).append((first, span))
        return [
            _Group(
                rows=(torch.tensor([first for first, _ in members])[:, None] + torch.arange(count)).to(self.device),
                sequences=[span.sequence for _, span in members],
                starts=[span.start for _, span in members],
            )
            for count, members in by_count.items()
        ]

    def attend(
        self, query: Tensor, cached: KeyValue, *, window: int | None = None, scale: float | None = None
    ) -> Tensor:
        """Attention of the new rows over their sequences; their own keys are in the cache already.

        Args:
            query: [rows, heads, d].
            cached: each [sequences, kv heads, capacity, d].
            window: tokens that a row sees, its own included; ``None``: all.
            scale: of the scores; ``None``: 1 / sqrt(d).

        Returns:
            [rows, heads, d]; zero in padding rows.
        """
        if window not in self._masks:
            self._masks[window] = [self._group_masks(group, window) for group in self._groups]
        output = torch.zeros_like(query)
        for group, masks in zip(self._groups, self._masks[window], strict=True):
            key, value = (_of_sequences(x, group.sequences)[:, :, : group.stop] for x in cached)
            q = query[group.rows].transpose(1, 2)
            parts = [
                F.scaled_dot_product_attention(part, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
                for part, mask in zip(q.split(QUERY_BLOCK, dim=2), masks, strict=True)
            ]
            output[group.rows] = torch.cat(parts, dim=2).transpose(1, 2)
        return output

    def _group_masks(self, group: _Group, window: int | None) -> list[Tensor | None]:
        """One a block of queries, bool [g, 1, block, keys], true where a key is seen; ``None``: every key is."""
        starts = torch.tensor(group.starts, device=self.device)[:, None, None]
        keys = torch.arange(group.stop, device=self.device)
        masks: list[Tensor | None] = []
        for block in torch.arange(group.num, device=self.device).split(QUERY_BLOCK):
            if self.tree is None:
                distance = starts + block[:, None] - keys
                seen = distance >= 0
            else:
                seen, distance = self._tree_view(starts, keys, block)
            if window is not None:
                seen = seen & (distance < window)
            masks.append(None if bool(seen.all()) else seen[:, None])
        return masks

    def _tree_view(self, starts: Tensor, keys: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Which keys the queries of `block` see, and how far away by position these are, both [g, block, keys]."""
        assert self.tree is not None
        visible, depths = self.tree
        num_nodes = visible.shape[1]
        node = keys - (starts - (num_nodes - visible.shape[0]))
        is_node = (node >= 0) & (node < num_nodes)
        column = node.clamp(0, num_nodes - 1).expand(-1, block.shape[0], -1)
        seen_nodes = visible[block].expand(starts.shape[0], -1, -1).gather(2, column)
        seen = torch.where(is_node, seen_nodes, node < 0)
        depth = torch.where(is_node, depths[column], node)
        own_depth = depths[num_nodes - visible.shape[0] + block]
        return seen, own_depth[:, None] - depth


def _of_sequences(cached: Tensor, sequences: list[int]) -> Tensor:
    """Rows of the cache's first dimension: a view where they follow each other, which spares a copy of the cache."""
    first, num = sequences[0], len(sequences)
    if sequences == list(range(first, first + num)):
        return cached[first : first + num]
    return cached[torch.tensor(sequences, device=cached.device)]


class KeyValueCache:
    """Keys and values of some layers of a model, of this tensor-parallel rank's heads."""

    def __init__(self, *, num_sequences: int, capacity: int) -> None:
        """Set the sizes; a layer's memory is taken when it is first written.

        Args:
            num_sequences: that are held.
            capacity: slots of each.
        """
        self.num_sequences, self.capacity = num_sequences, capacity
        self._layers: dict[int, KeyValue] = {}

    def write(self, layer: int, rows: NewRows, own: KeyValue) -> KeyValue:
        """Put the new rows' keys and values into their slots.

        Args:
            layer: any number, one a layer.
            rows: where they belong.
            own: of the new rows, each [rows, kv heads, d].

        Returns:
            What the layer holds now, each [sequences, kv heads, capacity, d].
        """
        if layer not in self._layers:
            num_heads, head_dim = own.key.shape[1:]
            shape = (self.num_sequences, num_heads, self.capacity, head_dim)
            self._layers[layer] = KeyValue(own.key.new_zeros(shape), own.value.new_zeros(shape))
        cached = self._layers[layer]
        for whole, new in zip(cached, own, strict=True):
            whole[rows.sequences, :, rows.slots] = new[: rows.num_filled]
        return cached

    def move(self, sequence: int, sources: Sequence[int], start: int) -> None:
        """Let the slots from `start` hold what `sources` (ascending, none before its new place) held."""
        targets = range(start, start + len(sources))
        if list(targets) == list(sources):
            return
        for cached in self._layers.values():
            for whole in cached:
                whole[sequence, :, start : targets.stop] = whole[sequence, :, list(sources)]


class CachedRows(NamedTuple):
    """What one layer is told when it serves: the `Rows` of `layers.attention`."""

    new: NewRows
    cache: KeyValueCache
    layer: int

    def places(self, _num_rows: int, _device: torch.device) -> Places:
        """Positions inside the sequences."""
        return self.new.places

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, 1, heads, d] -> the same; keys and values are kept."""
        cached = self.cache.write(self.layer, self.new, KeyValue(key[:, 0], value[:, 0]))
        return self.new.attend(query[:, 0], cached)[:, None]
