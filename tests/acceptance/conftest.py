"""Fixtures of the acceptance tests: one broker and model a session, one server and worker a test."""

from __future__ import annotations

import os

import pytest

from tests.harness import (
    RABBITMQ_URL,
    Worker,
    children_in,
    rabbitmq_answers,
    start_model,
    start_server,
    start_valkey,
)


@pytest.fixture(scope="session")
def session_children(tmp_path_factory):
    with children_in(tmp_path_factory.mktemp("session")) as children:
        yield children


@pytest.fixture(scope="session")
def valkey(session_children):
    return start_valkey(session_children)


@pytest.fixture(scope="session")
def model(session_children):
    return start_model(session_children)


@pytest.fixture
def rabbitmq():
    if rabbitmq_answers():
        return RABBITMQ_URL
    message = "RabbitMQ does not answer on 127.0.0.1:5672"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    return pytest.skip(message)


@pytest.fixture
def protocol():
    """How it is delivered; a module for which REST makes a difference says so."""
    return "ingest"


@pytest.fixture
def children(tmp_path):
    with children_in(tmp_path / "children") as started:
        yield started


@pytest.fixture
def server(children, tmp_path, protocol):
    return start_server(children, tmp_path, rest=protocol == "rest")


@pytest.fixture
def make_worker(valkey, model, tmp_path):
    made = []

    def make(api_url, broker=valkey, **settings):
        worker = Worker(broker, model, api_url, tmp_path, settings=settings)
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.stop()
