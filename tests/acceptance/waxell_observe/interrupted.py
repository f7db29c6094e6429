"""A run that goes on until a signal ends the process."""

import threading

import waxell_observe as waxell

waxell.init()
with waxell.WaxellContext(agent_name="interrupted") as run:
    run.record_llm_call(model="gpt-4o", tokens_in=5, tokens_out=6)
    run.record_step("half way")
    print("in mid-run", flush=True)
    threading.Event().wait()
