"""An asyncio program: calls in tasks, in runs of their own, in a sync `with`, in a thread, and cancelled."""

import asyncio

from asking import ask, ask_async

import waxell_workers
from waxell_workers import WaxellContext, aforce_flush, observe

waxell_workers.init()


async def job(number: int) -> None:
    async with WaxellContext(f"job {number}"):
        await ask_async(f"first of {number}")
        await ask_async(f"second of {number}")


@observe(agent_name="observed")
async def observed() -> None:
    await ask_async("observed")


async def sync_block() -> None:
    with WaxellContext("sync block"):
        await ask_async("async in a sync block")
        ask("sync in a sync block")


async def cancelled() -> None:
    async with WaxellContext("cancelled"):
        await ask_async("before the cancellation")
        await asyncio.sleep(3600)


async def main() -> None:
    await asyncio.gather(*(job(number) for number in range(3)), observed(), sync_block())
    try:
        await asyncio.wait_for(cancelled(), 1.0)
    except asyncio.TimeoutError:
        pass
    async with WaxellContext("threads"):
        await asyncio.to_thread(ask, "to_thread")
        await asyncio.get_running_loop().run_in_executor(None, ask, "executor")
    await ask_async("loose")
    print(bool(await aforce_flush(60)))


if __name__ == "__main__":
    asyncio.run(main())
