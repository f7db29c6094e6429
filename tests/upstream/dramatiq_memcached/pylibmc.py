"""As much of `pylibmc` as Dramatiq's tests need, in this process's memory: for a machine without memcached.

Without it, fixtures of Dramatiq's skip every test of results and rate limits, those on Redis too.
"""

import threading
import time
from contextlib import contextmanager

_kept: dict[str, tuple[object, float, int]] = {}
_lock = threading.RLock()


class SomeErrors(Exception):
    """Any of the client's errors."""


class NotFound(SomeErrors):
    """No such key."""


class Client:
    """A client; all of them see the same values."""

    def __init__(self, *_args, **_kwargs):
        pass

    def _live(self, key):
        value, until, unique = _kept.get(key, (None, 0.0, 0))
        return (value, until, unique) if until > time.monotonic() else None

    def get_stats(self):
        return [("here", {})]

    def flush_all(self):
        with _lock:
            _kept.clear()

    def get(self, key):
        with _lock:
            found = self._live(key)
            return found[0] if found else None

    def gets(self, key):
        with _lock:
            found = self._live(key)
            return (found[0], found[2]) if found else (None, None)

    def get_multi(self, keys):
        with _lock:
            return {key: found[0] for key in keys if (found := self._live(key))}

    def set(self, key, value, time=0):
        with _lock:
            self._keep(key, value, time)
            return True

    def add(self, key, value, time=0):
        with _lock:
            if self._live(key):
                return False
            self._keep(key, value, time)
            return True

    def delete(self, key):
        with _lock:
            return _kept.pop(key, None) is not None

    def cas(self, key, value, unique, time=0):
        with _lock:
            found = self._live(key)
            if found is None:
                raise NotFound(key)
            if found[2] != unique:
                return False
            self._keep(key, value, time)
            return True

    def incr(self, key, amount=1):
        with _lock:
            found = self._live(key)
            if found is None:
                raise NotFound(key)
            value = max(0, found[0] + amount)
            _kept[key] = (value, found[1], found[2] + 1)
            return value

    def decr(self, key, amount=1):
        return self.incr(key, -amount)

    def _keep(self, key, value, ttl_s):
        unique = _kept.get(key, (None, 0.0, 0))[2] + 1
        _kept[key] = (value, time.monotonic() + (ttl_s or 1e9), unique)


class ClientPool:
    """A pool that always has a client left."""

    def __init__(self, client, _size):
        self._client = client

    @contextmanager
    def reserve(self, block=False):
        yield self._client
