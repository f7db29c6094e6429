"""Chats of the OpenAI client in a context: one whole, one streamed, one that fails."""

import openai
import waxell_observe as waxell

waxell.init()
client = openai.OpenAI(max_retries=0)


def ask(model, text, **more):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **more)


with waxell.WaxellContext(agent_name="instrumented"):
    ask("gpt-4o", "say hello to bob")
    for _ in ask("slow-30-model", "stream this", stream=True):
        pass
    try:
        ask("fail-429", "say nothing")
    except openai.RateLimitError:
        pass
waxell.shutdown()
