"""RQ's part: a job, and one that depends on it, which goes on with Dramatiq."""

import letters
from desk import RQ_URL, ask
from redis import Redis

from waxell_workers.rq import Queue

queue = Queue("reports", connection=Redis.from_url(RQ_URL))


def fetch(question: str) -> str:
    """Be depended on."""
    return ask(f"Fetch what is needed: {len(question)}")


def report() -> str:
    """Depend on it, and send a pipeline."""
    answer = ask("Write the report.")
    (letters.write.message("the report") | letters.post.message()).run()
    return answer
