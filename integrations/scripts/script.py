"""A nightly job: each review of the day gets a label, then all of them a digest. One line records every call.

Run it:  python script.py        (README.md has the rest)
"""

import os

from openai import OpenAI

import waxell_workers
from waxell_workers import WaxellContext

waxell_workers.init()

MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
REVIEWS = (
    "The parcel came a week late.",
    "Exactly what I had hoped for.",
    "Works, but the manual is a riddle.",
)


def ask(client: OpenAI, question: str) -> str:
    """Ask the model one thing."""
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": question}])
    return answer.choices[0].message.content or ""


def main() -> None:
    """Label each review, then write the digest."""
    client = OpenAI(api_key=os.environ.get("OPENAI_API_KEY", "unset"))
    for review in REVIEWS:  # outside any run: collected in the background, as `auto:gpt-4o-mini`
        print(ask(client, f"Happy or unhappy? {review}"))
    with WaxellContext("digest", workflow_name="nightly") as run:  # a run with a name of its own
        run.set_tag("reviews", len(REVIEWS))
        print(ask(client, "One line for the morning: " + " ".join(REVIEWS)))


if __name__ == "__main__":
    main()
