"""The local server's endpoints: the platform's REST protocol, ingest, the JSON API, and who is let in."""

from __future__ import annotations

import gzip
import json
import time
from typing import Any

import msgspec
import pytest

from tests.application import API, INGEST, NOW, Client, call, ended, started
from waxell_workers.core.records import Record, RunStarted
from waxell_workers.export import bodies
from waxell_workers.server import Store, body, create_app, ingest


class TestConfig:
    def test_it_names_ingest_relative_to_the_address(self, client: Client) -> None:
        """A server with ingest says where it is; there is no OTLP endpoint."""
        assert client.get(f"{API}/config/").json() == {
            "otel_endpoint": "",
            "tenant_id": "local",
            "tenant_slug": "local",
            "ingest_endpoint": "/api/v1/observe/ingest/",
        }

    def test_a_rest_only_server_says_nothing_of_ingest_and_has_none(self, store: Store) -> None:
        """With ingest off, the config has no such key and the path is unknown."""
        client = Client(create_app(store, ingest=False))
        assert "ingest_endpoint" not in client.get(f"{API}/config/").json()
        assert client.post(INGEST, content=b"").status_code == 404


class TestRest:
    def test_the_platforms_own_client_is_understood(self, client: Client) -> None:
        """The requests that waxell-observe 0.1.10 sends become a run; they carry no ids and no times."""
        before = time.time()
        reply = client.post(
            f"{API}/runs/start/",
            {
                "agent_name": "my-agent",
                "workflow_name": "ingest",
                "inputs": {"q": "x"},
                "metadata": {"k": "v"},
                "trace_id": "",
                "interaction_mode": "interactive",
                "user_id": "u1",
                "session_id": "sess_1",
            },
        ).json()
        assert set(reply) == {"run_id", "workflow_id", "started_at"}
        run = f"{API}/runs/{reply['run_id']}"
        sent = {
            "model": "gpt-4o",
            "tokens_in": 11,
            "tokens_out": 7,
            "cost": 9.75e-05,
            "task": "chat.completions",
        }
        texts = {"prompt_preview": "say hello", "response_preview": "hello", "status": "ok", "error_type": ""}
        calls = client.post(f"{run}/llm-calls/", {"calls": [sent | texts], "hardware_uuid": "x"})
        assert calls.json()["governance"]["action"] == "allow"
        step = {"step_name": "io:user_message", "output": {"preview": "hi"}, "position": 0}
        assert client.post(f"{run}/steps/", {"steps": [step]}).json()["governance"]["action"] == "allow"
        score = {"name": "helpful", "data_type": "numeric", "comment": "", "numeric_value": 0.5}
        assert client.post(f"{run}/scores/", {"scores": [score]}).status_code == 200
        end = client.post(
            f"{run}/complete/", {"result": {"output": "done"}, "status": "success", "error": "", "steps": []}
        )
        assert end.json()["run_id"] == reply["run_id"]
        assert end.json()["duration"] >= 0
        assert end.json()["governance"]["action"] == "allow"

        found = client.run(reply["run_id"])
        assert (found["agent_name"], found["workflow_name"], found["status"]) == (
            "my-agent",
            "ingest",
            "success",
        )
        assert (found["inputs"], found["metadata"], found["result"]) == (
            {"q": "x"},
            {"k": "v"},
            {"output": "done"},
        )
        assert (found["user_id"], found["session_id"], found["source"]) == ("u1", "sess_1", "rest")
        assert (found["tokens_in"], found["tokens_out"], found["cost_usd"]) == (11, 7, 9.75e-05)
        assert [(c["model"], c["operation"], c["prompt"]) for c in found["calls"]] == [
            ("gpt-4o", "chat.completions", "say hello")
        ]
        assert [s["name"] for s in found["steps"]] == ["io:user_message"]
        assert [s["value"] for s in found["scores"]] == [0.5]
        assert found["started_at"] >= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(before))

    def test_our_own_client_is_believed_about_ids_times_and_states(self, client: Client) -> None:
        """What the protocol has no field for travels under `waxell`, and is no metadata of the user's."""
        ours = {"run_id": "mine-1", "started_at": NOW, "task_id": "t1", "parent_run_id": "p1"}
        start = client.post(
            f"{API}/runs/start/", {"agent_name": "a", "metadata": {"queue": "llm", "waxell": ours}}
        )
        assert start.json()["run_id"] == "mine-1"
        told = {"state": "killed", "duration_ms": 1500.0, "ended_at": NOW + 1.5, "tags": {"tier": "gold"}}
        client.post(
            f"{API}/runs/mine-1/complete/",
            {
                "result": {"waxell": told},
                "status": "error",
                "error": "killed by signal 9",
                "error_type": "WorkerLostError",
                "steps": [],
            },
        )
        run = client.run("mine-1")
        assert (run["status"], run["duration_ms"], run["tags"]) == ("killed", 1500.0, {"tier": "gold"})
        assert run["error"] == "WorkerLostError: killed by signal 9"
        assert run["metadata"] == {"queue": "llm", "task_id": "t1"}
        assert run["result"] is None
        assert run["parent_run_id"] == "p1"
        assert run["started_at"] == "2026-09-21T14:13:20.000+00:00"

    def test_a_repeated_start_is_the_same_run(self, client: Client) -> None:
        """A start of unknown outcome may be sent again: one run, and the repeat is counted."""
        body = {"agent_name": "a", "metadata": {"waxell": {"run_id": "mine-1", "started_at": NOW}}}
        first, second = (client.post(f"{API}/runs/start/", body).json() for _ in range(2))
        assert first == second
        assert len(client.get("/api/runs").json()["runs"]) == 1
        assert client.get("/api/stats").json()["duplicates"] == 1

    @pytest.mark.parametrize("spans_first", [False, True])
    def test_spans_tell_what_calls_do_not(self, client: Client, spans_first: bool) -> None:
        """Duration, provider and time of a call come from its span, whichever request comes first."""
        client.post(f"{API}/runs/start/", {"agent_name": "a", "metadata": {"waxell": {"run_id": "r"}}})
        call = {"model": "gpt-4o", "tokens_in": 3, "tokens_out": 4, "cost": 0.1}
        facts = {"model": "gpt-4o", "tokens_in": 3, "tokens_out": 4, "gen_ai.provider.name": "openai"}
        spans = [
            {"name": "a.default", "kind": "agent", "position": 0, "duration_ms": 99, "attributes": {}},
            *(
                {
                    "name": "chat",
                    "kind": "llm",
                    "position": n,
                    "duration_ms": n * 100,
                    "attributes": facts | {"waxell.call_id": f"c{n}", "waxell.started_at": NOW + n},
                }
                for n in (1, 2)
            ),
        ]
        requests = [("llm-calls", {"calls": [call, call]}), ("spans", {"spans": spans})]
        for path, sent in reversed(requests) if spans_first else requests:
            assert client.post(f"{API}/runs/r/{path}/", sent).status_code == 200
        run = client.run("r")
        assert [(c["id"], c["duration_ms"], c["provider"]) for c in run["calls"]] == [
            ("c1", 100, "openai"),
            ("c2", 200, "openai"),
        ]
        assert run["calls"][0]["started_at"] == "2026-09-21T14:13:21.000+00:00"
        assert len(run["spans"]) == 3

    def test_both_roads_show_the_same_run(self, client: Client) -> None:
        """What our exporter makes of a run for REST reads like the same records through ingest."""

        def records(run_id: str) -> list[dict[str, Any]]:
            error = {"error_type": "openai.RateLimitError", "error_message": "429"}
            update = {"tags": {"tier": "gold"}, "metadata": {"late": 1}}
            more = {
                "session_id": "s",
                "user_id": "u",
                "user_group": "g",
                "inputs": {"n": 1},
                "trace_id": "ab" * 16,
            }
            kin = {"task_id": "t", "parent_run_id": "p", "root_run_id": "p"}
            sizes = {"tokens_cached": 3, "tokens_reasoning": 2, "duration_ms": 120.5, "ttft_ms": 30.0}
            return [
                started(run_id, metadata={"queue": "llm"}, **more, **kin),
                call(f"c1-{run_id}", run_id, provider="openai", response_model="gpt-4o-mini-1", **sizes),
                call(f"c2-{run_id}", run_id, cost_usd=None, status="error", metadata={"k": 1}, **error),
                call(f"c3-{run_id}", run_id, cost_usd=0.0, tokens_in=7, prompt="hi", response="ho"),
                {
                    "kind": "step",
                    "id": f"st-{run_id}",
                    "at": NOW,
                    "run_id": run_id,
                    "name": "x",
                    "output": {"y": 1},
                },
                {"kind": "run_updated", "id": f"u-{run_id}", "at": NOW, "run_id": run_id} | update,
                ended(run_id, state="killed", duration_ms=1999.5, result=[1], traceback="T"),
            ]

        client.send(*records("r1"))
        start, *calls, step, update, end = (msgspec.convert(record, Record) for record in records("r2"))
        assert isinstance(start, RunStarted)
        start = bodies.fold(start, update)
        client.post(f"{API}/runs/start/", bodies.start(start)).raise_for_status()
        spans = [bodies.llm_span(each, start, n) for n, each in enumerate(calls, 1)]
        for path, sent in (
            ("llm-calls", {"calls": [bodies.call(each) for each in calls]}),
            ("spans", {"spans": [*spans, bodies.root_span(start, end)]}),
            ("steps", {"steps": [bodies.step(step)]}),
            ("complete", bodies.complete(start, end)),
        ):
            client.post(f"{API}/runs/r2/{path}/", sent).raise_for_status()
        ingested, rest = client.run("r1"), client.run("r2")
        for name in ingested.keys() - {"run_id", "source", "spans", "calls", "steps"}:
            assert rest[name] == ingested[name], name
        assert rest["error"] == ""
        for one, other in zip(ingested["calls"], rest["calls"], strict=True):
            assert other | {"id": "", "started_at": ""} == one | {"id": "", "started_at": ""}
        assert [step["output"] for step in rest["steps"]] == [{"y": 1}]

    def test_the_first_end_counts(self, client: Client) -> None:
        """A run that was interrupted does not become a success afterwards."""
        client.post(f"{API}/runs/start/", {"agent_name": "a", "metadata": {"waxell": {"run_id": "r"}}})
        for status in ("interrupted", "success"):
            body = {"result": {}, "status": status, "error": "", "steps": []}
            assert client.post(f"{API}/runs/r/complete/", body).status_code == 200
        assert client.run("r")["status"] == "interrupted"

    @pytest.mark.parametrize("path", ["llm-calls", "steps", "spans", "scores", "complete"])
    def test_an_unknown_run_is_404(self, client: Client, path: str) -> None:
        """The client starts the run again on this answer, so it must be one."""
        answer = client.post(f"{API}/runs/nobody/{path}/", {"calls": [], "result": {}})
        assert (answer.status_code, answer.json()) == (404, {"error": "no such run"})

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"{", id="torn"),
            pytest.param(b"[1]", id="list"),
            pytest.param(b"\xff\xfe", id="no UTF-8"),
            pytest.param(b"[" * 100_000, id="deep"),
            pytest.param(b'{"agent_name":"\\ud800"}', id="half a surrogate pair"),
        ],
    )
    def test_malformed_json_is_400(self, client: Client, content: bytes) -> None:
        """A body that is no JSON object is refused in JSON."""
        answer = client.post(f"{API}/runs/start/", content=content)
        assert answer.status_code == 400
        assert answer.json()["error"]

    @pytest.mark.parametrize(
        "body", [{}, {"agent_name": ""}, {"agent_name": None, "metadata": []}, {"metadata": {"waxell": 3}}]
    )
    def test_a_run_needs_a_name(self, client: Client, body: dict[str, Any]) -> None:
        """A start without an agent's name is refused."""
        assert client.post(f"{API}/runs/start/", body).status_code == 400

    def test_values_of_the_wrong_type_do_no_harm(self, client: Client) -> None:
        """The protocol has no schema: what does not fit becomes empty, and the run can be read."""
        odd: list[Any] = [None, True, -1, 1e308, 10**400, 2**63, "x", [], {"a": [1]}, [{}]]
        for n, value in enumerate(odd):
            start = {
                "agent_name": "a",
                "workflow_name": value,
                "inputs": value,
                "user_id": value,
                "trace_id": value,
            }
            own = {"run_id": f"r{n}", "started_at": value, "task_id": value, "x": value}
            client.post(f"{API}/runs/start/", start | {"metadata": {"waxell": own}}).raise_for_status()
            run = f"{API}/runs/r{n}"
            fields = ("model", "tokens_in", "tokens_out", "cost", "task", "ttft_ms", "status", "error_type")
            calls = [dict.fromkeys(fields, value)]
            client.post(f"{run}/llm-calls/", {"calls": calls}).raise_for_status()
            names = (
                "name",
                "kind",
                "position",
                "duration_ms",
                "start_offset_ms",
                "parent_position",
                "attributes",
            )
            spans = [
                dict.fromkeys(names, value),
                {"kind": "llm", "attributes": {"model": value, "tokens_in": value}},
            ]
            client.post(f"{run}/spans/", {"spans": spans}).raise_for_status()
            step = {"step_name": value, "output": value, "position": value}
            client.post(f"{run}/steps/", {"steps": [step]}).raise_for_status()
            score = {"name": value, "numeric_value": value, "string_value": value}
            client.post(f"{run}/scores/", {"scores": [score]}).raise_for_status()
            end = {
                "result": {"waxell": {"state": value, "duration_ms": value, "ended_at": value, "tags": value}}
            }
            client.post(f"{run}/complete/", end | {"status": value, "error": value}).raise_for_status()
            assert client.run(f"r{n}")["status"] != "running"
            assert client.get(f"/runs/r{n}").status_code == 200
        assert client.get("/").status_code == 200

    def test_a_list_that_is_none_is_400(self, client: Client) -> None:
        """`calls` that is no list of objects is refused, and nothing of it is stored."""
        client.post(f"{API}/runs/start/", {"agent_name": "a", "metadata": {"waxell": {"run_id": "r"}}})
        for calls in ({}, "x", [1], [{"model": "m"}, None]):
            assert client.post(f"{API}/runs/r/llm-calls/", {"calls": calls}).status_code == 400
        assert client.run("r")["calls"] == []

    def test_fields_of_tomorrow_are_ignored(self, client: Client) -> None:
        """A newer client may send more than this server knows, at any level: the rest is taken."""
        more = {"invented": {"deep": [1]}, "another": None}
        run_id = client.post(f"{API}/runs/start/", {"agent_name": "a"} | more).json()["run_id"]
        run = f"{API}/runs/{run_id}"
        for path, records in (
            ("llm-calls", {"calls": [{"model": "m"} | more]}),
            ("steps", {"steps": [{"step_name": "s"} | more]}),
            ("spans", {"spans": [{"name": "p"} | more]}),
            ("scores", {"scores": [{"name": "c"} | more]}),
            ("complete", {"status": "success"}),
        ):
            assert client.post(f"{run}/{path}/", records | more).status_code == 200
        found = client.run(run_id)
        assert [len(found[name]) for name in ("calls", "steps", "spans", "scores")] == [1, 1, 1, 1]
        assert (found["status"], found["metadata"]) == ("success", {})

    def test_a_price_that_the_platforms_client_does_not_know_is_not_nought(self, client: Client) -> None:
        """It sends 0.0 in call and span alike; a streamed call is one by its span alone."""
        run_id = client.post(f"{API}/runs/start/", {"agent_name": "a"}).json()["run_id"]
        sizes = {"model": "new-model", "tokens_in": 3, "tokens_out": 4}
        call = sizes | {"cost": 0.0, "task": "chat.stream (openai)"}
        client.post(f"{API}/runs/{run_id}/llm-calls/", {"calls": [call]})
        facts = sizes | {"cost": 0.0, "gen_ai.is_streaming": True, "gen_ai.provider.name": "openai"}
        span = {"name": "chat", "kind": "llm", "position": 1, "duration_ms": None, "attributes": facts}
        client.post(f"{API}/runs/{run_id}/spans/", {"spans": [span]})
        found = client.run(run_id)
        assert (found["cost_usd"], found["calls"][0]["cost_usd"]) == (None, None)
        assert found["calls"][0]["metadata"] == {"streamed": True}
        assert found["calls"][0]["provider"] == "openai"


class TestIngest:
    def test_a_batch_becomes_a_run_with_everything(self, client: Client) -> None:
        """All kinds of records, in one request, in the order of the journal."""
        reply = client.send(
            started(metadata={"queue": "llm"}, task_id="t1", inputs={"n": 1}, trace_id="0" * 31 + "1"),
            call(
                provider="openai", duration_ms=120.5, ttft_ms=30.0, streamed=True, prompt="hi", response="ho"
            ),
            call(
                "c2", status="error", error_type="openai.RateLimitError", error_message="429", cost_usd=None
            ),
            {
                "kind": "step",
                "id": "st",
                "at": NOW,
                "run_id": "r1",
                "name": "load",
                "output": [1],
                "position": 0,
            },
            {
                "kind": "run_updated",
                "id": "u",
                "at": NOW,
                "run_id": "r1",
                "tags": {"a": 1},
                "metadata": {"b": 2},
            },
            ended(
                state="error",
                error_type="ValueError",
                error_message="no",
                traceback="Traceback …",
                result=None,
            ),
        )
        assert reply == {"accepted": 6, "duplicates": 0, "rejected": []}
        run = client.run("r1")
        assert (run["agent_name"], run["workflow_name"], run["status"]) == ("triage", "celery", "error")
        assert run["metadata"] == {"queue": "llm", "task_id": "t1", "b": 2}
        assert (run["tags"], run["inputs"], run["error"]) == ({"a": 1}, {"n": 1}, "ValueError: no")
        assert (run["traceback"], run["duration_ms"], run["source"]) == ("Traceback …", 2000.0, "ingest")
        assert (run["call_count"], run["tokens_in"], run["tokens_out"], run["cost_usd"]) == (2, 20, 10, 0.001)
        first, second = run["calls"]
        assert (first["id"], first["duration_ms"], first["ttft_ms"], first["prompt"]) == (
            "c1",
            120.5,
            30.0,
            "hi",
        )
        assert (second["status"], second["error"]) == ("error", "openai.RateLimitError: 429")
        assert run["steps"][0]["output"] == [1]

    def test_a_repeat_changes_nothing_and_is_counted(self, client: Client) -> None:
        """The same batch again, and a record twice in one batch: the same run, the repeats counted."""
        batch = [started(), call(), ended(state="success")]
        client.send(*batch)
        assert client.send(*batch, call("c2"), call("c2")) == {"accepted": 1, "duplicates": 4, "rejected": []}
        run = client.run("r1")
        assert ([call["id"] for call in run["calls"]], run["call_count"]) == (["c1", "c2"], 2)
        assert (run["tokens_in"], run["tokens_out"], run["cost_usd"]) == (20, 10, 0.002)
        stats = client.get("/api/stats").json()
        assert (stats["accepted"], stats["duplicates"], stats["calls"]) == (4, 4, 2)

    def test_records_come_in_any_order_over_several_requests(self, client: Client) -> None:
        """An end and a call before their start: a run without a name until its start fills it in."""
        client.send(ended(state="killed", error_type="WorkerLostError", error_message="signal 9"))
        client.send(call())
        assert client.run("r1")["agent_name"] == ""
        assert client.get("/").status_code == client.get("/runs/r1").status_code == 200
        update = {"kind": "run_updated", "id": "u", "at": NOW, "run_id": "r1", "metadata": {"queue": "new"}}
        client.send(update)
        client.send(started(metadata={"queue": "old", "pid": 1}))
        run = client.run("r1")
        assert (run["agent_name"], run["status"], run["call_count"]) == ("triage", "killed", 1)
        assert (run["started_at"], run["duration_ms"]) == ("2026-09-21T14:13:20.000+00:00", 2000.0)
        assert run["metadata"] == {"queue": "new", "pid": 1}

    def test_the_first_end_wins(self, client: Client) -> None:
        """A run closed as killed stays so; the later record is accepted, so that nobody sends it for ever."""
        client.send(started(), ended(state="killed"))
        assert client.send(ended(state="success") | {"id": "e2"})["accepted"] == 1
        assert client.run("r1")["status"] == "killed"

    def test_what_cannot_be_taken_is_rejected_with_its_reason_and_the_rest_is_stored(
        self, client: Client
    ) -> None:
        """A newer client's kinds, wrong types and torn lines do not hold up the batch."""
        lines = [
            json.dumps(started()),
            '{"kind":"gpu_seconds","id":"x1","at":1,"run_id":"r1"}',
            '{"kind":"llm_call","id":"x2","at":1,"run_id":"r1","model":7}',
            '{"kind":"llm_call","id":"x3","at":1,"model":"m"}',
            '{"kind":"llm_call","id":"x4","at":1790000000000,"run_id":"r1","model":"m"}',
            '{"kind":"llm_call","id":"","at":1,"run_id":"r1","model":"m"}',
            '{"kind":"run_ended","id":"x5","at":1,"run_id":"r1","state":"running"}',
            '{"kind":"llm_call","id":"x6","at":1,"run_id":"../..","model":"m"}',
            '{"kind":"run_sta',
            "[1]",
            "[" * 50_000,
            "",
            json.dumps(call() | {"a_field_of_tomorrow": 1}),
            '{"kind":"task_lost","id":"l1","at":1790000000,"task_id":"t1","reason":"killed by signal 9"}',
        ]
        answer = client.post(INGEST, content="\n".join(lines).encode())
        reply = answer.json()
        assert (reply["accepted"], reply["duplicates"]) == (3, 0)
        reasons = [(rejected["id"], rejected["reason"]) for rejected in reply["rejected"]]
        assert [record_id for record_id, _ in reasons] == ["x1", "x2", "x3", "x4", "", "x5", "x6", "", "", ""]
        assert "unknown kind 'gpu_seconds'" in reasons[0][1]
        assert "$.model" in reasons[1][1]
        assert "run_id" in reasons[2][1]
        assert "seconds" in reasons[3][1]
        assert client.run("r1")["call_count"] == 1

    def test_plain_bodies_and_several_gzip_members_are_taken(self, client: Client) -> None:
        """Compression is optional, and members may be joined, as RFC 1952 allows."""
        plain = json.dumps(started()).encode()
        assert client.post(INGEST, content=plain).json()["accepted"] == 1
        joined = gzip.compress(json.dumps(call()).encode() + b"\n") + gzip.compress(
            json.dumps(ended()).encode()
        )
        answer = client.post(INGEST, content=joined, headers={"content-encoding": "gzip"})
        assert answer.json()["accepted"] == 2
        assert client.post(INGEST, content=b"").json() == {"accepted": 0, "duplicates": 0, "rejected": []}

    @pytest.mark.parametrize(
        ("content", "encoding", "status"),
        [
            pytest.param(b"nonsense", "gzip", 400, id="nonsense"),
            pytest.param(gzip.compress(b"{}" * 1000)[:-9], "gzip", 400, id="torn"),
            pytest.param(gzip.compress(b"{}") + b"rest", "gzip", 400, id="something behind it"),
            pytest.param(b"{}", "br", 415, id="another encoding"),
        ],
    )
    def test_a_body_that_cannot_be_unpacked_is_refused(
        self, client: Client, content: bytes, encoding: str, status: int
    ) -> None:
        """Broken or unknown compression is an error of the client's."""
        assert (
            client.post(INGEST, content=content, headers={"content-encoding": encoding}).status_code == status
        )

    def test_numbers_out_of_bounds_do_no_harm(self, client: Client) -> None:
        """Sizes that no database column holds are cut; negative counts, durations and costs are unknown."""
        client.send(started(), call(tokens_in=10**30, tokens_out=-5, cost_usd=-1.0, duration_ms=-3.0))
        run = client.run("r1")
        assert (run["tokens_in"], run["tokens_out"], run["cost_usd"]) == (2**53, None, None)
        assert run["calls"][0]["duration_ms"] is None


class TestLimits:
    def test_a_body_beyond_the_limit_is_413(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        """A large body is refused, on every endpoint, whether or not it says its length."""
        monkeypatch.setattr(body, "MAX_BYTES", 1000)

        async def chunks() -> Any:
            for _ in range(30):
                yield b"x" * 100

        assert client.post(INGEST, content=b"x" * 1001).status_code == 413
        assert client.post(INGEST, content=chunks()).status_code == 413
        assert client.post(f"{API}/runs/start/", content=b"x" * 1001).status_code == 413
        assert client.post(INGEST, content=b" " * 1000).status_code == 200

    def test_a_bomb_does_not_inflate_past_the_limit(self, client: Client) -> None:
        """4 GiB of zeros in 4 MB: refused after 32 MiB, quickly and without the memory."""
        import resource

        member = gzip.compress(bytes(64 << 20))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.monotonic()
        answer = client.post(INGEST, content=member * 64, headers={"content-encoding": "gzip"})
        assert answer.status_code == 413
        assert time.monotonic() - begun < 10
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 200_000  # KiB on Linux; far below 4 GiB in bytes on macOS as well

    def test_many_small_members_count_together(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        """The limit is for what comes out of all gzip members together."""
        monkeypatch.setattr(body, "MAX_BYTES", 1000)
        members = gzip.compress(b"\n" * 300) * 4
        assert client.post(INGEST, content=members, headers={"content-encoding": "gzip"}).status_code == 413

    def test_too_many_records_are_413_and_none_is_stored(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One request is one transaction: it is stored as a whole or not at all."""
        monkeypatch.setattr(ingest, "MAX_RECORDS", 3)
        lines = "\n".join(json.dumps(call(f"c{n}")) for n in range(4))
        assert client.post(INGEST, content=lines.encode()).status_code == 413
        assert client.get("/api/runs").json() == {"runs": []}


class TestApi:
    def test_runs_are_listed_newest_first_with_the_stable_fields(self, client: Client) -> None:
        """The fields that the command line promises, in its order of time."""
        client.send(*(started(f"r{n}", at=NOW + n) for n in (2, 0, 1)), call(run_id="r1"), ended("r1"))
        runs = client.get("/api/runs").json()["runs"]
        assert [run["run_id"] for run in runs] == ["r2", "r1", "r0"]
        stable = {
            "run_id": "r1",
            "agent_name": "triage",
            "workflow_name": "celery",
            "status": "success",
            "started_at": "2026-09-21T14:13:21.000+00:00",
            "duration_ms": 1000.0,
            "calls": 1,
            "tokens_in": 10,
            "tokens_out": 5,
            "cost_usd": 0.001,
            "error": "",
            "metadata": {},
            "tokens_in_unknown": 0,
            "tokens_out_unknown": 0,
            "cost_unknown": 0,
        }
        assert list(runs[1].items())[: len(stable)] == list(stable.items())

    def test_filters_and_pages(self, client: Client) -> None:
        """By agent, by status, and before a run or a time; filters combine."""
        client.send(
            *(started(f"r{n}", at=NOW + n, agent_name="a" if n % 2 else "b") for n in range(6)), ended("r3")
        )

        def ids(query: str) -> list[str]:
            return [run["run_id"] for run in client.get(f"/api/runs?{query}").json()["runs"]]

        assert ids("limit=2") == ["r5", "r4"]
        assert ids("limit=2&before=r4") == ["r3", "r2"]
        assert ids("agent=a") == ["r5", "r3", "r1"]
        assert ids("agent=a&status=running&before=r5") == ["r1"]
        assert ids("before=2026-09-21T14:13:22Z") == ["r1", "r0"]
        assert ids("agent=nobody") == []

    @pytest.mark.parametrize(
        "query", ["limit=0", "limit=x", "limit=1001", "limit=-1", "limit=²", "before=gone"]
    )
    def test_a_wrong_argument_is_400(self, client: Client, query: str) -> None:
        """It says which one, and what is allowed."""
        answer = client.get(f"/api/runs?{query}")
        assert answer.status_code == 400
        assert query.split("=")[0] in answer.json()["error"]

    def test_an_unknown_run_and_an_unknown_path_are_404_in_json(self, client: Client) -> None:
        """A program reads the answer."""
        for path in ("/api/runs/nobody", "/api/nothing"):
            answer = client.get(path)
            assert answer.status_code == 404
            assert answer.json()["error"]
        assert client.get(f"{API}/runs/start/").status_code == 405


class TestGuard:
    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:4319", "127.0.0.1.evil.example", "", "a@127.0.0.1"]
    )
    def test_a_request_for_another_host_is_refused(self, client: Client, host: str) -> None:
        """A page that resolves its own name to 127.0.0.1 reads nothing."""
        for path in ("/", "/api/runs", f"{API}/config/", "/static/style.css"):
            assert client.get(path, headers={"host": host}).status_code == 421

    @pytest.mark.parametrize(
        "host", ["localhost", "localhost:1", "127.0.0.1:65535", "[::1]", "[::1]:80", "LOCALHOST"]
    )
    def test_names_of_the_loopback_are_allowed_with_any_port(self, client: Client, host: str) -> None:
        """Forwarded ports and containers change the port."""
        assert client.get("/api/runs", headers={"host": host}).status_code == 200

    def test_another_sites_page_cannot_write(self, client: Client) -> None:
        """A browser says where a request comes from; our own origin and programs without one may write."""
        body = {"agent_name": "a"}
        path = f"{API}/runs/start/"
        assert client.post(path, body, headers={"origin": "https://evil.example"}).status_code == 403
        assert client.post(path, body, headers={"origin": "null"}).status_code == 403
        assert client.post(path, body, headers={"origin": "http://127.0.0.1:4319"}).status_code == 200
        assert client.post(path, body).status_code == 200

    def test_with_a_key_everything_asks_for_it(self, store: Store) -> None:
        """API calls by header, pages by the browser's own password form; a wrong key is 401."""
        client = Client(create_app(store, api_key="s3cret"))
        for key in ({}, {"x-wax-key": "wrong"}, {"x-wax-key": ""}, {b"x-wax-key": b"s3cret\xff"}):
            assert client.get("/api/runs", headers=key).status_code == 401
            assert client.post(f"{API}/runs/start/", {"agent_name": "a"}, headers=key).status_code == 401
            assert client.post(INGEST, content=b"", headers=key).status_code == 401
            assert client.get("/", headers=key).status_code == 401
        assert "Basic" in client.get("/").headers["www-authenticate"]
        assert client.get("/static/style.css").status_code == 401
        good = {"x-wax-key": "s3cret"}
        assert client.get("/api/runs", headers=good).status_code == 200
        assert client.post(INGEST, content=b"", headers=good).status_code == 200
        assert client.get("/", auth=("anybody", "s3cret")).status_code == 200
        assert client.get("/", auth=("anybody", "wrong")).status_code == 401
        assert client.get("/", headers={"authorization": "Basic ###"}).status_code == 401
        # a browser sends a remembered password with any site's form
        assert client.post(INGEST, content=b"", auth=("anybody", "s3cret")).status_code == 401

    def test_beyond_loopback_any_host_is_answered(self, store: Store) -> None:
        """There the key protects, and nobody knows the names that the machine goes by."""
        client = Client(create_app(store, api_key="s3cret", loopback=False), "http://build-7.example")
        assert client.get("/api/runs", headers={"x-wax-key": "s3cret"}).status_code == 200
        assert client.get("/api/runs").status_code == 401

    def test_every_answer_has_a_strict_policy(self, client: Client) -> None:
        """No inline script or style, no other origin, no frame; answers with data are not stored."""
        for path in ("/", "/api/runs", "/nothing", "/static/live.js"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
        assert client.get("/").headers["cache-control"] == "no-store"


def test_a_database_that_refuses_is_503(client: Client, store: Store) -> None:
    """A full disk or a locked file heals: the client is told to come again, and nothing is half stored."""
    store.close()
    assert client.post(INGEST, content=json.dumps(started()).encode()).status_code == 503
    assert client.post(f"{API}/runs/start/", {"agent_name": "a"}).status_code == 503
