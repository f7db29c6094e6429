"""The client asks for everything that a platform governs and configures, and prints what it understood."""

import json
import sys

import waxell_observe as waxell
from waxell_observe.decisions.manifest import get_manifest
from waxell_observe.llm.manifest import get_default_client

waxell.init()
client = waxell.WaxellObserveClient()
said = {}

with waxell.WaxellContext(agent_name="governed", enforce_policy=True) as run:
    check = run.check_policy_sync()
    said["check"] = [check.action, check.allowed, check.evaluations]
    run.record_step("checked")  # its reply carries governance, and a block would raise here
    gate = client.check_policy_surface_sync("governed", surface="llm.before", signal={"text": "hi"})
    said["gate"] = gate["action"]
    decisions = [{"category": "content", "policy": "p", "action": "warn", "reason": "r"}]
    for key, run_id in (("decision", run.run_id), ("decision of nobody", "nobody")):
        reply = client.record_governance_decisions_sync(
            agent_name="governed", surface="llm.before", decisions=decisions, workflow_id=run_id
        )
        said[key] = reply["run_found"]
    client.record_events_sync(events=[{"type": "note", "detail": "x"}])
    memory = {"run_id": run.run_id, "slot_name": "s", "scope_key": "k"}
    client.write_episodic_memory_sync(**memory, data={"a": 1})
    client.write_semantic_fact_sync(**memory, content="c", content_embedding=[0.0] * 1536)

said["manifest"] = get_manifest("governed", force=True)
said["guard"] = [client.prompt_guard_sync(text="hello"), client.prompt_guard_gate_sync("hello")]
first, second = (client.start_daily_run_sync(agent_slug="cowork", date="2026-02-03") for _ in range(2))
said["daily"] = [first.run_id == second.run_id, first.created, second.created, first.started_at != ""]
said["models"] = [get_default_client().get().tenant_slug, len(get_default_client().get().instances)]
try:
    client.get_prompt_sync(name="greeting", label="production")
except waxell.PromptNotFoundError as error:
    said["prompt"] = error.status_code
json.dump(said, sys.stdout)
waxell.shutdown()
