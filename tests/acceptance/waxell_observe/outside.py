"""A chat outside any context: the SDK's background collector makes a run for it."""

import openai
import waxell_observe as waxell

waxell.init()
client = openai.OpenAI(max_retries=0)
client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "nobody asked"}])
waxell.shutdown()
