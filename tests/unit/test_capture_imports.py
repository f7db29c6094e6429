"""An SDK is instrumented when the application imports it, and nobody's import notices.

Each claim runs in a fresh interpreter: what is imported, and in which order, is what they are about.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PRELUDE = """
import importlib, importlib.util, logging, sys, threading
logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s %(message)s", level=logging.INFO)
logging.getLogger("httpx").disabled = logging.getLogger("httpx2").disabled = True
from waxell_workers import capture
calls = []
def install(names=None, content=False):
    capture.install(lambda **call: calls.append(call), names=names, current_run=lambda: "",
                    wants_content=lambda: content)
def call(base_url=sys.argv[1]):
    import openai
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    return len(calls)
"""


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    command = [sys.executable, "-m", "waxell_workers.cli.standin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


class Ran:
    def __init__(self, source: str, base_url: str, **environ: str) -> None:
        command = [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(source), base_url]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ}
        )
        assert done.returncode == 0, done.stderr
        self.log = done.stderr
        self.value: Any = json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def test_nothing_is_imported_on_behalf_of_the_application(base_url: str) -> None:
    """Importing and installing capture imports neither an SDK nor OpenTelemetry."""
    ran = Ran(
        """
        install()
        packages = {name.split(".")[0] for name in sys.modules}
        print(len(packages & {"openai", "opentelemetry", "wrapt", "httpx", "pydantic"}))
        """,
        base_url,
    )
    assert ran.value == 0


@pytest.mark.parametrize(
    "source",
    [
        "install(); import openai",
        "import openai; install()",
        "install(); from openai.types.chat import ChatCompletion",
        "install(); import opentelemetry.instrumentation.genai.openai",
        "import opentelemetry.instrumentation.genai.openai; install()",
        "install(); import openai; importlib.reload(openai)",
        "install(); importlib.util.find_spec('openai'); import openai",
        "install(); install(content=True); import openai; install()",
        "install(); import openai; capture.uninstall(); install()",
    ],
)
def test_it_is_instrumented_whenever_and_however_it_is_imported(base_url: str, source: str) -> None:
    """Before or after the installation, by the user's instrumentor, twice: one call is told once."""
    ran = Ran(f"{source}\nprint(call())", base_url)
    assert ran.value == 1
    assert ran.log == ""


def test_it_is_instrumented_anew_when_it_is_imported_anew(base_url: str) -> None:
    """An SDK that was thrown out of `sys.modules` and imported again is heard once, as before."""
    ran = Ran(
        """
        install()
        call()
        for name in [name for name in sys.modules if name.split(".")[0] == "openai"]:
            del sys.modules[name]
        for name in [name for name in sys.modules if name.startswith("opentelemetry.instrumentation.genai")]:
            del sys.modules[name]
        print(call())
        """,
        base_url,
    )
    assert ran.value == 2


def test_a_lazily_loaded_sdk_stays_lazy(base_url: str) -> None:
    """`importlib.util.LazyLoader` works before and after the installation; we do not start the loading."""
    for order in ("install(); lazy()", "lazy(); install()"):
        ran = Ran(
            f"""
            def lazy():
                spec = importlib.util.find_spec("openai")
                spec.loader = importlib.util.LazyLoader(spec.loader)
                module = importlib.util.module_from_spec(spec)
                sys.modules["openai"] = module
                spec.loader.exec_module(module)
            {order}
            loaded = int("openai._client" in sys.modules)
            import openai
            openai.OpenAI
            print([loaded, call()] if type(openai.__loader__).__name__ == "SourceFileLoader" else 0)
            """,
            base_url,
        )
        assert ran.value == [0, 1]
        assert ran.log == ""


def test_the_import_system_answers_as_without_us(base_url: str) -> None:
    """Specs and loaders of the module are the real ones once it is imported, and work like them before."""
    ran = Ran(
        """
        before = importlib.util.find_spec("openai")
        install()
        found = importlib.util.find_spec("openai")
        assert (found.origin, found.submodule_search_locations) == (
            before.origin, before.submodule_search_locations)
        assert found.loader.get_source("openai") == before.loader.get_source("openai")
        assert found.loader.is_package("openai")
        assert importlib.util.find_spec("no_such_module") is None
        import openai
        assert type(openai.__loader__) is type(openai.__spec__.loader) is type(before.loader)
        assert importlib.util.find_spec("openai") is openai.__spec__
        import importlib.resources
        assert importlib.resources.files("openai").joinpath("py.typed").is_file()
        print(1)
        """,
        base_url,
    )
    assert ran.value == 1


def test_what_an_import_raises_is_raised(base_url: str, tmp_path: Path) -> None:
    """An SDK that fails to import fails as it would without us, and works at the next attempt."""
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "__init__.py").write_text("raise LookupError('not today')")
    ran = Ran(
        f"""
        install()
        sys.path.insert(0, {str(tmp_path)!r})
        try:
            import openai
        except LookupError as error:
            assert str(error) == "not today"
            assert "openai" not in sys.modules
        sys.path.pop(0)
        importlib.invalidate_caches()
        print(call())
        """,
        base_url,
    )
    assert ran.value == 1


def test_an_sdk_that_is_absent_stays_absent(base_url: str) -> None:
    """Where the SDK is not installed, importing it raises what it always did."""
    ran = Ran(
        """
        sys.path[:] = [path for path in sys.path if "site-packages" not in path]
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
        importlib.invalidate_caches()
        from waxell_workers.capture.imports import when_imported
        when_imported("openai", lambda: print("never"))
        try:
            import openai
        except ModuleNotFoundError as error:
            assert error.name == "openai"
            print(1)
        """,
        base_url,
    )
    assert ran.value == 1


def test_threads_that_import_at_once_are_all_heard(base_url: str) -> None:
    """Threads that import the SDK and the instrumentor at the same moment neither hang nor lose a call."""
    ran = Ran(
        """
        install()
        start = threading.Barrier(6)
        def sdk():
            start.wait(); import openai
        def instrumentor():
            start.wait(); import opentelemetry.instrumentation.genai.openai
        threads = [threading.Thread(target=target) for target in (sdk, instrumentor) * 3]
        [thread.start() for thread in threads]
        [thread.join(30) for thread in threads]
        assert not any(thread.is_alive() for thread in threads)
        print(call())
        """,
        base_url,
    )
    assert ran.value == 1


def test_it_works_without_the_opentelemetry_sdk(base_url: str) -> None:
    """Only the API is needed."""
    ran = Ran("sys.modules['opentelemetry.sdk'] = None; install(); print(call())", base_url)
    assert ran.value == 1


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "none", "OTEL_TRACES_SAMPLER": "always_off"},
        {"OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "span_and_event"},
        {"OTEL_INSTRUMENTATION_GENAI_COMPLETION_HOOK": "upload"},
    ],
)
def test_opentelemetrys_environment_is_for_others(base_url: str, environ: dict[str, str]) -> None:
    """Variables that steer the user's OpenTelemetry neither silence us nor make us take content."""
    ran = Ran(
        "install(); call(); print(len(calls) if 'prompt' not in calls[0] else calls)", base_url, **environ
    )
    assert ran.value == 1
    assert "hook" not in ran.log.lower()


def test_a_missing_instrumentor_is_said_once(base_url: str) -> None:
    """The SDK works uncaptured, and one warning names the extra that is missing."""
    ran = Ran(
        """
        sys.modules["opentelemetry.instrumentation.genai"] = None
        install()
        import openai
        importlib.reload(openai)
        print(call())
        """,
        base_url,
    )
    assert ran.value == 0
    assert ran.log.count("WARNING waxell_workers.capture openai is not captured") == 1
    assert 'pip install "waxell-workers[openai]"' in ran.log


def test_an_instrumentor_that_fails_does_not_fail_the_import(base_url: str) -> None:
    """Whatever it raises: the SDK works uncaptured, and a warning says why."""
    ran = Ran(
        """
        class Odd(Exception): pass
        class Failing:
            def find_spec(self, name, path=None, target=None):
                if name == "opentelemetry.util.genai":
                    raise Odd("defect")
        install()
        sys.meta_path.insert(0, Failing())
        print(call())
        """,
        base_url,
    )
    assert ran.value == 0
    assert ran.log.count("WARNING waxell_workers.capture openai is not captured") == 1
    assert "Odd: defect" in ran.log


def test_an_sdk_that_is_built_otherwise_works_uncaptured(base_url: str) -> None:
    """Where a method is gone that the instrumentor wraps, no call of any other is told by half."""
    ran = Ran(
        "import openai; del openai.resources.embeddings.Embeddings.create; install(); print(call())", base_url
    )
    assert ran.value == 0
    assert "openai is not captured: it does not suit its instrumentor (" in ran.log


def test_an_interrupt_in_the_middle_of_an_import_is_raised(base_url: str) -> None:
    """A soft time limit that surfaces while we instrument reaches the task, as it does in any import."""
    ran = Ran(
        """
        from billiard.exceptions import SoftTimeLimitExceeded
        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "opentelemetry.util.genai":
                    sys.meta_path.remove(self)
                    raise SoftTimeLimitExceeded(1)
        install()
        sys.meta_path.insert(0, Interrupting())
        try:
            import openai
        except SoftTimeLimitExceeded:
            print(1)
        """,
        base_url,
    )
    assert ran.value == 1


@pytest.mark.parametrize("initialized", [True, False])
def test_the_platforms_own_sdk_goes_before(base_url: str, initialized: bool, tmp_path: Path) -> None:
    """Where `waxell_observe` is initialised capture stays off, then or later, and says so once."""
    (tmp_path / "waxell_observe").mkdir()
    (tmp_path / "waxell_observe" / "__init__.py").write_text("from . import _init")
    (tmp_path / "waxell_observe" / "_init.py").write_text("_initialized = False")
    ran = Ran(
        f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import waxell_observe
        install()
        call()
        waxell_observe._init._initialized = {initialized}
        call()
        call()
        print(len(calls))
        """,
        base_url,
    )
    assert ran.value == (1 if initialized else 3)
    assert ran.log.count("INFO waxell_workers.capture waxell_observe") == (1 if initialized else 0)
