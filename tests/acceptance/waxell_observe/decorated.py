"""A decorated function that records a step and raises."""

import waxell_observe as waxell

waxell.init()


@waxell.observe(agent_name="failing", workflow_name="refunds")
def refund(ticket, waxell_ctx=None):
    waxell_ctx.record_step("load ticket", output={"ticket": ticket})
    waxell_ctx.record_llm_call(model="gpt-4o-mini", tokens_in=3, tokens_out=4)
    raise LookupError(f"no ticket {ticket}")


try:
    refund(7)
except LookupError:
    pass
else:
    raise SystemExit("the error was swallowed")
waxell.shutdown()
