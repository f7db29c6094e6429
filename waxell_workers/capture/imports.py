"""Being told when the application has imported a module, without importing it.

A finder at the front of `sys.meta_path` lets the other finders find a watched module, and puts itself between
the import system and the loader for the one moment in which the module is executed. It holds no lock, keeps
no state about an import in progress, and leaves no trace in the finished module: its loader and its spec are
the real ones. What an import raises is none of its business.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Imported = Callable[[], None]


class _Loader:
    """Stands before a module's loader until the module has been executed."""

    def __init__(self, loader: Any, imported: Imported) -> None:
        self._loader = loader
        self._imported = imported

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module by its own loader, then say that it is there."""
        # Not `module.__spec__`: on the module of an `importlib.util.LazyLoader` that would start the loading.
        spec = ModuleType.__getattribute__(module, "__dict__").get("__spec__")
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if ModuleType.__getattribute__(module, "__dict__").get("__loader__") is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._imported()


class _Finder:
    """Finds what the finders behind it find, and watches some of it."""

    def __init__(self) -> None:
        self.watched: dict[str, Imported] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        imported = self.watched.get(fullname)
        if imported is None:
            return None
        spec = self._find_behind(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, _Loader):
            # a loader by its methods, not by its class
            spec.loader = _Loader(spec.loader, imported)  # type: ignore[assignment]
        return spec

    def _find_behind(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


_finder = _Finder()


def when_imported(name: str, imported: Imported) -> None:
    """Call `imported` each time the module has been executed; at once if it is there already.

    It is called in the thread that imports, while that thread holds the module's import lock: it must not
    wait for another thread. It may be called more than once, also by several threads at a time.

    Arguments:
        name: the module's full name.
        imported: called without arguments. What it raises surfaces in the application's import statement.
    """
    _finder.watched[name] = imported
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    module = sys.modules.get(name)
    if module is None:
        return
    spec = ModuleType.__getattribute__(module, "__dict__").get("__spec__")
    if type(module).__name__ == "_LazyModule":
        # Made by `importlib.util.LazyLoader`, and not executed yet.
        if spec is not None and not isinstance(spec.loader, _Loader):
            spec.loader = _Loader(spec.loader, imported)
    elif is_being_imported(name):
        # Found before we came, and being executed at this moment: the import waits for its end.
        __import__(name)
        imported()
    else:
        imported()


def is_being_imported(name: str) -> bool:
    """True while a module is being executed, in this thread or another."""
    module = sys.modules.get(name)
    if module is None:
        return False
    spec = ModuleType.__getattribute__(module, "__dict__").get("__spec__")
    return bool(getattr(spec, "_initializing", False))


def forget(name: str) -> None:
    """Stop watching a module."""
    _finder.watched.pop(name, None)
    if not _finder.watched and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
