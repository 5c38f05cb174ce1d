"""The last plans of functions that are called anew for every layer, with all that a plan needs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Plan = TypeVar("_Plan")


class KeptPlans(Generic[_Key, _Plan]):
    """Plans by what they depend on; those used longest ago are dropped. For any number of threads.

    Parameters
    ----------
    most : int
        So many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._plans: OrderedDict[_Key, _Plan] = OrderedDict()
        self._lock = Lock()

    def get(self, key: _Key) -> _Plan | None:
        """The plan of a key, which stays; None where there is none."""
        with self._lock:
            found = self._plans.get(key)
            if found is not None:
                self._plans.move_to_end(key)
            return found

    def put(self, key: _Key, plan: _Plan) -> None:
        """Keep a plan, in place of another one of its key."""
        with self._lock:
            self._plans[key] = plan
            self._plans.move_to_end(key)
            while len(self._plans) > self._most:
                self._plans.popitem(last=False)

    def take(self, key: _Key, serves: Callable[[_Key], bool]) -> _Plan | None:
        """The plan of a key, which is kept no longer.

        Where there is none, the one used last of those whose keys serve as well.
        """
        with self._lock:
            if key not in self._plans:
                alike = [other for other in self._plans if serves(other)]
                if not alike:
                    return None
                key = alike[-1]
            return self._plans.pop(key)

    def clear(self) -> None:
        """Drop them all."""
        with self._lock:
            self._plans.clear()
