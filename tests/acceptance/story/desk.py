"""What all parts of the story share: the model, and where the brokers are."""

import os

from openai import OpenAI

BROKER = os.environ["BROKER_URL"].rsplit("/", 1)[0]
CELERY_URL, RQ_URL, DRAMATIQ_URL = (f"{BROKER}/{number}" for number in range(3))


def ask(question: str) -> str:
    """Ask the model one thing."""
    with OpenAI() as client:
        answer = client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": question}]
        )
    return answer.choices[0].message.content or ""
