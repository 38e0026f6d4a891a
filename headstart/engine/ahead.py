"""The rows of the next step, laid out in packs while a GPU works on this one.

The feed that a run saves moves only when a step is taken: what lies ready ahead of it is made anew after a stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from headstart.data.feed import Feed
from headstart.data.forest import Pack
from headstart.data.segments import Example
from headstart.engine.engine import Engine


@dataclass(frozen=True)
class Ready:
    """The rows of a step and the feed's cursor behind them; of a step laid out ahead, its packs and their budget too.

    `begun` is when a step that was laid out ahead was asked for.
    """

    rows: Sequence[int]
    examples: Sequence[Example]
    seen: int
    packs: Sequence[Pack] | None = None
    budget: int = 0
    begun: float | None = None

    def packs_within(self, budget: int) -> Sequence[Pack] | None:
        """Return the packs, if they were laid out in this budget: it is smaller where memory ran out meanwhile."""
        return self.packs if self.budget == budget else None


def steps_of(
    engine: Engine,
    feed: Feed,
    examples: Sequence[Example],
    budget: Callable[[], int],
    *,
    ahead: bool | None = None,
) -> Iterator[Ready]:
    """Give the steps from the feed's cursor on; the cursor moves as each is given.

    With `ahead`, which is by default where a GPU computes, a thread lays out the next step meanwhile, in packs of at most
    `budget` tokens. What goes wrong there is raised when its step is due.
    """
    device = engine.reader.device.type
    if not (device == "cuda" if ahead is None else ahead):
        while feed.seen < feed.total:
            rows, chosen = feed.next_examples(examples)
            yield Ready(rows, chosen, feed.seen)
        return
    own = replace(feed)

    def lay_out(tokens: int) -> Ready:
        rows, chosen = own.next_examples(examples)
        packs = engine.reader.build_packs(chosen, tokens)
        return Ready(rows, chosen, own.seen, [pin(pack) for pack in packs] if device == "cuda" else packs, tokens)

    with ThreadPoolExecutor(1, "packs") as thread:
        due: Future[Ready] | None = thread.submit(lay_out, budget()) if own.seen < own.total else None
        while due is not None:
            begun = time.perf_counter()
            with engine.clock.phase("data"):
                ready = replace(due.result(), begun=begun)
            # Nothing else touches `own` now: its thread is idle until it is asked again.
            due = thread.submit(lay_out, budget()) if own.seen < own.total else None
            feed.seen = ready.seen
            yield ready


def pin(pack: Pack) -> Pack:
    """Return a pack whose numbers lie in memory from which a GPU can copy by itself."""
    pinned: dict[str, Any] = {}
    for field in fields(pack):
        value = getattr(pack, field.name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
            pinned[field.name] = torch.from_numpy(value).pin_memory().numpy()
    return replace(pack, **pinned)
