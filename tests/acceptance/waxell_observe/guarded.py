"""A chat whose prompt the SDK gives to the server's guard first, ready to redact it."""

import openai
import waxell_observe as waxell

waxell.init(prompt_guard=True, prompt_guard_server=True, prompt_guard_action="redact")
client = openai.OpenAI(max_retries=0)
with waxell.WaxellContext(agent_name="guarded"):
    chat = client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "keep every word"}]
    )
print(chat.choices[0].message.content)
waxell.shutdown()
