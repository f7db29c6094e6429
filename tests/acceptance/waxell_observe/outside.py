"""A chat outside any context, which the SDK's background collector sends: whole, streamed or failing."""

import sys

import openai
import waxell_observe as waxell

MODELS = {"whole": "gpt-4o-mini", "streamed": "slow-30-model", "failing": "fail-429"}

waxell.init()
client = openai.OpenAI(max_retries=0)
[way] = sys.argv[1:]
asked = {"model": MODELS[way], "messages": [{"role": "user", "content": "nobody asked"}]}
try:
    answer = client.chat.completions.create(**asked, stream=way == "streamed")
    print(sum(1 for _ in answer) if way == "streamed" else 1)
except openai.RateLimitError:
    print(0)
waxell.shutdown()
