"""What is asked of the collector of garbage while a run begins, and that it is as it was before once that is over."""

from __future__ import annotations

import gc
import weakref

import pytest

from headstart import machine


class Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_collected_while_modules_load_and_all_is_as_before_then() -> None:
    with machine.loading():
        assert not gc.isenabled()
        with machine.loading():
            pass
        assert not gc.isenabled()  # as it was before the inner one
    assert gc.isenabled()
    with pytest.raises(ImportError), machine.loading():
        raise ImportError
    assert gc.isenabled()


def test_what_settled_is_not_looked_at_and_what_came_since_is_collected() -> None:
    before, since = Ring(), Ring()
    seen = weakref.ref(before)
    del before
    with machine.settled():
        assert seen() is None
        assert len(gc.get_objects()) < gc.get_freeze_count()
        seen = weakref.ref(since)
        since = Ring()
        machine.trim_memory()
        assert seen() is not None  # it was there before
        seen = weakref.ref(since)
        del since
        machine.trim_memory()
        assert seen() is None
    assert gc.get_freeze_count() == 0
