"""What the programs of this folder share: one question to a model by the real OpenAI SDK.

`OPENAI_BASE_URL` leads to the stand-in. The model's name is the mark by which a test finds the call again.
"""

from functools import cache

from openai import AsyncOpenAI, OpenAI


@cache
def client() -> OpenAI:
    return OpenAI(max_retries=0)


def ask(model: str) -> str:
    """Ask the model one thing."""
    answer = client().chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}])
    return answer.choices[0].message.content or ""


async def ask_async(model: str) -> str:
    """Ask the model one thing without blocking the event loop."""
    async with AsyncOpenAI(max_retries=0) as client:
        answer = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hello"}]
        )
    return answer.choices[0].message.content or ""
