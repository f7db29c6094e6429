"""A pytest plugin: wherever RQ or its tests say Worker, SimpleWorker, SpawnWorker or Queue, they get ours.

In each module's names, in what classes and functions have as defaults, before the tests are imported (for
what they subclass) and after that. So RQ's own modules make queues of our class too.
"""

import pkgutil
import sys
from importlib import import_module
from types import FunctionType

import rq

import waxell_workers.rq as ours

SWAPPED = {
    getattr(rq, name): getattr(ours, name)
    for name in ("Worker", "SimpleWorker", "SpawnWorker", "Queue")
    if hasattr(rq, name)
}


def swapped(value):
    """Return our class for RQ's, and anything else as it is."""
    return SWAPPED.get(value, value) if isinstance(value, type) else value


def swap(namespace):
    """Replace RQ's classes in what a module or class has, and in the defaults of its functions."""
    for name, value in list(vars(namespace).items()):
        if swapped(value) is not value:
            setattr(namespace, name, swapped(value))
        function = getattr(value, "__func__", value)
        if isinstance(function, FunctionType) and function.__defaults__:
            function.__defaults__ = tuple(map(swapped, function.__defaults__))


def swap_all(package):
    """Do so in all modules of a package that are loaded."""
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != package:
            continue
        swap(module)
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__.split(".")[0] == package:
                swap(value)


for found in pkgutil.walk_packages(rq.__path__, "rq."):
    if not found.name.endswith(("__main__", ".sentry")):
        import_module(found.name)
swap_all("rq")


def pytest_collection_finish():
    """Swap what the tests have imported from elsewhere."""
    swap_all("tests")
