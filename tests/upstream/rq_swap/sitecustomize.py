"""In every Python that RQ's own tests start: whoever asks for Redis on its usual port gets ours."""

import os

import redis.connection

_connect = redis.connection.Connection._connect


def _connect_elsewhere(self, *args, **kwargs):
    if self.port == 6379:
        self.port = int(os.environ["RQ_TESTS_REDIS_PORT"])
    return _connect(self, *args, **kwargs)


redis.connection.Connection._connect = _connect_elsewhere
