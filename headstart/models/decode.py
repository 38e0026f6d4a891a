"""Keys and values that are kept: prompts are read as a forest, then all rows in flight get a token at each step.

What prompts begin with alike is read once and, where it is long, kept once. What only one row has lies in groups of rows
of like length, so that a step attends with two matrix products a group and two more a shared node. No padding goes through
the linear layers. Shapes: R rows in flight, r of a group, K key-value heads, G query heads of each, d the width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headstart.models.attend import Rule, attend
from headstart.models.attention import Forest, run_decoder

UNSEEN = -1e30  # a score that weighs nothing and, unlike infinity, leaves a row that sees nothing without NaN
PACK_TOKENS = 2048
GROUP_TOKENS = 512  # of padding that the keys of a group may have: what one more group costs a step


@dataclass(eq=False)
class Node:
    """Tokens that are read as one, behind those of `parent`; `keys` and `values` [1, K, n, d], one each a layer.

    A node that is `kept` stands in the cache by itself for all rows below it, and so do all that are above it; the keys
    of others are copied into each row.
    """

    ids: Sequence[int]
    parent: Node | None = None
    kept: bool = False
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The position of its first token."""
        return 0 if self.parent is None else self.parent.first + len(self.parent.ids)

    @property
    def path(self) -> list[Node]:
        """The nodes from the front to this one."""
        return [*(self.parent.path if self.parent else ()), self]


class Row:
    """A prompt in flight: `leaf` holds the tokens that it shares with none, and there is room for `limit` new ones.

    Its own tokens are those behind what is kept once: they begin at the position `first`, and `length` of them are kept.
    """

    def __init__(self, leaf: Node, limit: int) -> None:
        self.leaf = leaf
        self.above = leaf.path[:-1]
        self.shared = [node for node in self.above if node.kept]
        self.copied = [node for node in self.above if not node.kept]
        self.first = sum(len(node.ids) for node in self.shared)
        self.length = 0
        self.room = leaf.first + len(leaf.ids) - self.first + limit - 1  # the last new token is never read


@dataclass(eq=False)
class _Group:
    """Rows of like room. Their keys are [slots * K, room, d], from `begin` on in what all groups have, [*, d], a layer."""

    rows: list[Row]
    begin: int
    heads: int

    def __post_init__(self) -> None:
        self.room = self.rows[0].room
        self.end = self.begin + len(self.rows) * self.heads * self.room

    def view(self, kept: Tensor) -> Tensor:
        """Return this group's part of a layer, [r, K, room, d]."""
        whole = kept[self.begin : self.end].view(-1, self.heads, self.room, kept.shape[1])
        return whole[: len(self.rows)]

    def places(self) -> Tensor:
        """Return where the next token of each row goes in what all groups have, [r * K]."""
        lengths = torch.tensor([row.length for row in self.rows])
        slots = torch.arange(len(self.rows) * self.heads).view(-1, self.heads) * self.room
        return (self.begin + slots + lengths[:, None]).flatten()


class Cache:
    """The rows in flight of one model, and the keys and values that they and their prefixes need."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._groups: list[_Group] = []
        self._nodes: list[Node] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._laid = 0

    @property
    def rows(self) -> list[Row]:
        """The rows in flight, in the order that `step` wants their tokens in."""
        return [row for group in self._groups for row in group.rows]

    def tokens_with(self, new: Sequence[Row]) -> int:
        """Return for how many tokens there would be room if these rows came in too."""
        nodes = {*self._nodes, *_above(new)}
        groups = _alike([*self.rows, *new])
        return sum(len(group) * group[0].room for group in groups) + sum(len(node.ids) for node in nodes)

    def read(self, new: Sequence[Row]) -> Tensor:
        """Read prompts, and take them in. Returns the hidden state of each one's last token, [len(new), D]."""
        nodes = [node for node in _above(new) if not node.keys]
        states: dict[Node, Tensor] = {}
        for pack in _packs([*nodes, *(row.leaf for row in new)]):
            hidden = self._read_pack(pack)
            ends = torch.tensor([len(node.ids) for node in pack], device=hidden.device).cumsum(0) - 1
            states.update(zip(pack, hidden[ends], strict=True))
        for node in nodes:  # without the rest of their pack
            node.keys, node.values = [k.clone() for k in node.keys], [v.clone() for v in node.values]
        self._nodes += nodes
        self._lay(new)
        return torch.stack([states[row.leaf] for row in new])

    def _read_pack(self, pack: Sequence[Node]) -> Tensor:
        reading = _Prompts(pack, self._model.device)
        ids = torch.tensor([id_ for node in pack for id_ in node.ids], device=self._model.device)
        return run_decoder(self._model, ids, reading.positions, reading)

    def step(self, ids: Sequence[int]) -> Tensor:
        """Read one more token of each of `rows`, ids [R]. Returns the hidden states, [R, D]."""
        device = self._model.device
        reading = _Step(self._groups, self._keys, self._values, device)
        hidden = run_decoder(self._model, torch.tensor(ids, device=device), reading.positions, reading)
        for row in self.rows:
            row.length += 1
        return hidden

    def drop(self, rows: Sequence[Row], waiting: Iterable[Row] = ()) -> None:
        """Let rows go, and the nodes that neither rows in flight nor `waiting` ones need."""
        for row in rows:
            self._drop(row)
        if not rows:
            return
        needed = {*_above(waiting), *(node for row in self.rows for node in row.shared)}
        self._nodes = [node for node in self._nodes if node in needed]
        self._groups = [group for group in self._groups if group.rows]
        if len(self.rows) <= self._laid // 2:
            self._lay(())

    def _drop(self, row: Row) -> None:
        """Take a row out of its group, whose last row moves into its place."""
        group = next(group for group in self._groups if row in group.rows)
        place, last = group.rows.index(row), group.rows[-1]
        if row is not last:
            for layer in (*self._keys, *self._values):
                kept = group.view(layer)
                kept[place, :, : last.length] = kept[-1, :, : last.length]
            group.rows[place] = last
        group.rows.pop()

    def _lay(self, new: Sequence[Row]) -> None:
        """Lay all rows anew, in groups of like room; layer by layer, so that little is there twice."""
        old = {row: (group, place) for group in self._groups for place, row in enumerate(group.rows)}
        heads = new[0].leaf.keys[0].shape[1] if new else self._groups[0].heads if old else 0
        groups: list[_Group] = []
        for rows in _alike([*old, *new]):
            groups.append(_Group(rows, groups[-1].end if groups else 0, heads))
        layers = range(max(len(self._keys), len(new[0].leaf.keys) if new else 0) if groups else 0)
        before = {"keys": self._keys, "values": self._values}
        self._keys, self._values = [], []
        for layer in layers:
            for name, after in (("keys", self._keys), ("values", self._values)):
                was = before[name].pop(0) if before[name] else None
                parts = [[_own(row, name, layer, was, old.get(row)) for row in group.rows] for group in groups]
                after.append(_lay_layer(groups, parts))
        for row in new:
            row.length = row.leaf.first + len(row.leaf.ids) - row.first
        self._groups, self._laid = groups, len(old) + len(new)


def _own(row: Row, name: str, layer: int, was: Tensor | None, old: tuple[_Group, int] | None) -> Tensor:
    """Return the keys or values that a row has of its own, [K, n, d]; those of a new row's leaf are let go."""
    if old is not None and was is not None:
        group, place = old
        return group.view(was)[place, :, : row.length]
    leaf: Tensor = getattr(row.leaf, name).pop(0)[0]
    return torch.cat([*(getattr(node, name)[layer][0] for node in row.copied), leaf], 1) if row.copied else leaf


def _lay_layer(groups: Sequence[_Group], parts: Sequence[Sequence[Tensor]]) -> Tensor:
    # Zeros and not what happens to be there: weighed with nothing, NaN would still be NaN.
    laid = parts[0][0].new_zeros(groups[-1].end, parts[0][0].shape[-1])
    for group, rows in zip(groups, parts, strict=True):
        view = group.view(laid)
        for place, part in enumerate(rows):
            view[place, :, : part.shape[1]] = part
    return laid


def token_bytes(model: Any) -> int:
    """Return how many bytes the keys and values of one token fill, all layers together."""
    node = Node([0])
    reading = _Prompts([node], model.device)
    run_decoder(model, torch.tensor([0], device=model.device), reading.positions, reading)
    return sum(kept.numel() * kept.element_size() for kept in (*node.keys, *node.values))


def _above(rows: Iterable[Row]) -> list[Node]:
    """Return the nodes above rows, each once, a parent before its children."""
    return list(dict.fromkeys(node for row in rows for node in row.above))


def _alike(rows: Iterable[Row]) -> list[list[Row]]:
    """Sort rows into groups of like room, the roomiest first, each with at most `GROUP_TOKENS` of padding."""
    groups: list[list[Row]] = []
    padding = 0
    for row in sorted(rows, key=lambda row: -row.room):
        padding += groups[-1][0].room - row.room if groups else 0
        if not groups or padding > GROUP_TOKENS:
            groups.append([])
            padding = 0
        groups[-1].append(row)
    return groups


def _packs(nodes: Sequence[Node]) -> list[list[Node]]:
    """Cut nodes into packs of at most `PACK_TOKENS`; a longer one is by itself."""
    packs: list[list[Node]] = []
    size = 0
    for node in nodes:
        size += len(node.ids)
        if not packs or size > PACK_TOKENS:
            packs.append([])
            size = len(node.ids)
        packs[-1].append(node)
    return packs


class _Prompts:
    """Attention of nodes that are read: each sees itself, and its ancestors read with it or before."""

    def __init__(self, nodes: Sequence[Node], device: torch.device) -> None:
        self._nodes = nodes
        self._lengths = [len(node.ids) for node in nodes]
        self._every = list(dict.fromkeys(above for node in nodes for above in node.path))
        places = {node: place for place, node in enumerate(self._every)}
        parents = [places[node.parent] if node.parent else -1 for node in self._every]
        positions = torch.cat([torch.arange(node.first, node.first + len(node.ids)) for node in self._every])
        read = set(nodes)
        new = torch.cat([torch.full((len(node.ids),), node in read) for node in self._every])
        chosen = new.nonzero()[:, 0]
        self._forest = Forest([len(node.ids) for node in self._every], parents, positions.to(device), chosen.to(device))
        self.positions = positions[chosen].to(device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float | None
    ) -> Tensor:
        """Attend in the next layer, and keep its keys and values."""
        for node, k, v in zip(
            self._nodes, *(torch.split(each, self._lengths, 2) for each in (key, value)), strict=True
        ):
            node.keys.append(k)
            node.values.append(v)
        layer = len(self._nodes[0].keys) - 1
        if len(self._every) > len(self._nodes):
            key = torch.cat([node.keys[layer] for node in self._every], 2)
            value = torch.cat([node.values[layer] for node in self._every], 2)
        q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
        return attend(q, k, v, self._forest.blocks(window, True, chosen=True), Rule(scale, softcap))[None]


class _Step:
    """Attention of one new token a row: to what the row has of its own, and to the nodes above it that are kept once."""

    def __init__(
        self, groups: Sequence[_Group], keys: Sequence[Tensor], values: Sequence[Tensor], device: torch.device
    ) -> None:
        rows = [row for group in groups for row in group.rows]
        self.positions = torch.tensor([row.first + row.length for row in rows], device=device)
        self._keys, self._values, self._layer = keys, values, 0
        self._places = torch.cat([group.places() for group in groups]).to(device)
        self._own = [_Own(group, device) for group in groups]
        self._shared = []
        for node in dict.fromkeys(node for row in rows for node in row.shared):
            below = [place for place, row in enumerate(rows) if node in row.shared]
            places = None if len(below) == len(rows) else torch.tensor(below, device=device)
            self._shared.append(_Shared(node, places, self.positions))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float | None
    ) -> Tensor:
        """Attend in the next layer, and keep its keys and values."""
        (heads, rows, width), kv_heads = query.shape[1:], key.shape[1]
        keys, values = self._keys[self._layer], self._values[self._layer]
        for kept, new in ((keys, key), (values, value)):
            kept.index_copy_(0, self._places, new[0].transpose(0, 1).flatten(0, 1))
        q = (query[0] * scale).transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, width)
        parts, begin = [], 0
        for own in self._own:
            end = begin + len(own.group.rows)
            scores = own.score(q[begin:end], keys, window, softcap)
            parts.append(_weigh(scores, own.group.view(values)[:, :, : own.width], whole=not self._shared))
            begin = end
        attended = self._join(parts, q, window, softcap) if self._shared else torch.cat([p.summed for p in parts])
        self._layer += 1
        return attended.to(value.dtype).reshape(1, rows, heads, value.shape[-1])

    def _join(self, parts: Sequence[_Part], q: Tensor, window: int, softcap: float | None) -> Tensor:
        """Join what the groups have of their own with what is kept once."""
        part = _Part(*(torch.cat([getattr(p, name) for p in parts]) for name in ("summed", "highest", "total")))
        for shared in self._shared:
            part = shared.join(part, q, self._layer, window, softcap)
        return part.summed / part.total


@dataclass(frozen=True)
class _Part:
    """What attention gave over some of the keys, to be joined with the rest.

    `summed` [.., d] values by their weights; `highest` and `total` [.., 1], the highest score and the sum of weights.
    """

    summed: Tensor
    highest: Tensor
    total: Tensor

    def join(self, other: _Part) -> _Part:
        """Return what attention gives over the keys of both."""
        highest = torch.maximum(self.highest, other.highest)
        mine, its = (self.highest - highest).exp_(), (other.highest - highest).exp_()
        return _Part(self.summed * mine + other.summed * its, highest, self.total * mine + other.total * its)


def _weigh(scores: Tensor, values: Tensor, *, whole: bool) -> _Part:
    """Weigh `values` [a, b, n, d] by the exponentials of `scores` [a, b, m, n], which are used up.

    With `whole` there are no other keys: then the values are weighed by parts of one, and the rest of the part is empty.
    """
    if whole:
        weights = scores.softmax(-1).to(values.dtype)
        none = scores.new_empty(0)
        return _Part(torch.matmul(weights, values), none, none)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    return _Part(torch.matmul(weights.to(values.dtype), values).to(weights.dtype), highest, total)


class _Own:
    """A group at one step: which of its keys its rows see."""

    def __init__(self, group: _Group, device: torch.device) -> None:
        lengths = [row.length for row in group.rows]
        self.group = group
        self.width = max(lengths) + 1
        self._padded = min(lengths) + 1 < self.width
        self._lengths = torch.tensor(lengths, device=device)[:, None, None, None]
        self._unseen: dict[int, Tensor | None] = {}

    def score(self, q: Tensor, keys: Tensor, window: int, softcap: float | None) -> Tensor:
        """Return the scores of queries [r, K, G, d] against the rows' own keys, [r, K, G, n], in float32 or wider."""
        kept = self.group.view(keys)[:, :, : self.width]
        return _shape(torch.matmul(q, kept.transpose(2, 3)), self.unseen(window), softcap)

    def unseen(self, window: int) -> Tensor | None:
        """Return which of its keys each row doesn't see, [r, 1, 1, n]; None where all are seen."""
        if window not in self._unseen:
            places = torch.arange(self.width, device=self._lengths.device)
            unseen = places > self._lengths
            if window:
                unseen |= self._lengths - places >= window
            self._unseen[window] = unseen if self._padded or 0 < window < self.width else None
        return self._unseen[window]


class _Shared:
    """A node that is kept once, at one step: which rows are below it, and which of its keys they see."""

    def __init__(self, node: Node, places: Tensor | None, positions: Tensor) -> None:
        self._node = node
        self._places = places  # None: all rows are
        self._positions = positions if places is None else positions[places]
        self._last = int(self._positions.max())
        self._unseen: dict[int, Tensor] = {}

    def join(self, part: _Part, q: Tensor, layer: int, window: int, softcap: float | None) -> _Part:
        """Return what the rows have so far, joined with attention from `q` [R, K, G, d] to this node."""
        found = self._attend(q if self._places is None else q[self._places], layer, window, softcap)
        if self._places is None:
            return part.join(found)
        mine = _Part(*(each[self._places] for each in (part.summed, part.highest, part.total)))
        joined = mine.join(found)
        part.summed.index_copy_(0, self._places, joined.summed)
        part.highest.index_copy_(0, self._places, joined.highest)
        part.total.index_copy_(0, self._places, joined.total)
        return part

    def _attend(self, q: Tensor, layer: int, window: int, softcap: float | None) -> _Part:
        rows, kv_heads, groups, width = q.shape
        # All rows read the same keys, so they go through in one product a head.
        together = q.transpose(0, 1).reshape(kv_heads, rows * groups, width)
        keys, values = self._node.keys[layer][0], self._node.values[layer]
        scores = torch.bmm(together, keys.transpose(1, 2)).view(kv_heads, rows, groups, -1)
        scores = _shape(scores, self.unseen(window), softcap).view(1, kv_heads, rows * groups, -1)
        part = _weigh(scores, values, whole=False)
        back = (
            each.view(kv_heads, rows, groups, -1).transpose(0, 1) for each in (part.summed, part.highest, part.total)
        )
        return _Part(*back)

    def unseen(self, window: int) -> Tensor | None:
        """Return which of its keys each row doesn't see, [rows, 1, n]; None where all are seen."""
        if not window or self._last - self._node.first < window:
            return None
        if window not in self._unseen:
            places = torch.arange(len(self._node.ids), device=self._positions.device) + self._node.first
            self._unseen[window] = (self._positions[:, None] - places >= window)[:, None]
        return self._unseen[window]


def _shape(scores: Tensor, unseen: Tensor | None, softcap: float | None) -> Tensor:
    """Return scores in float32 or wider, within the soft cap, those of unseen keys far below all others."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores if unseen is None else scores.masked_fill_(unseen, UNSEEN)
