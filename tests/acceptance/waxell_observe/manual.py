"""A context in which everything is recorded by hand: a call, steps, nested spans, scores, tags."""

import waxell_observe as waxell

waxell.init()
with waxell.WaxellContext(
    agent_name="manual",
    workflow_name="tickets",
    inputs={"ticket": 7},
    metadata={"shift": "night"},
    session_id="session-1",
    user_id="user-1",
    user_group="beta",
) as run:
    run.set_tag("tier", "gold")
    run.set_metadata("request", {"id": 42})
    outer = run.enter_span("plan", kind="chain", input_data={"goal": "answer"})
    inner = run.enter_span("research", kind="tool")
    run.record_llm_call(
        model="gpt-4o",
        tokens_in=11,
        tokens_out=7,
        task="answer",
        prompt_preview="say hello",
        response_preview="hello",
        duration_ms=120,
    )
    run.exit_span(inner, output_data={"found": 3})
    run.exit_span(outer, output_data={"steps": 1})
    run.record_step("load ticket", output={"chars": 77})
    run.record_tool_call(name="lookup", input={"id": 7}, output={"state": "open"}, duration_ms=5)
    run.record_score("helpful", 0.5, comment="so so")
    run.record_score("safe", True, data_type="boolean")
    run.record_score("tone", "kind", data_type="categorical")
    run.set_result({"output": "done"})
waxell.shutdown()
