"""A context in a context in a context, as coroutines: each names the one around it as its parent."""

import asyncio

import waxell_observe as waxell

waxell.init()


async def main():
    async with waxell.WaxellContext(agent_name="grandparent"):  # noqa: SIM117  nested as in an application
        async with waxell.WaxellContext(agent_name="parent"):
            async with waxell.WaxellContext(agent_name="child") as run:
                run.record_llm_call(model="gpt-4o", tokens_in=2, tokens_out=1)


asyncio.run(main())
waxell.shutdown()
