"""The web app: one request, from which everything else follows."""

import tickets
from celery import chain, chord, group
from fastapi import FastAPI

from waxell_workers.fastapi import WaxellMiddleware

app = FastAPI()
app.add_middleware(WaxellMiddleware)


@app.post("/tickets/{number}", status_code=202)
def receive(number: int) -> dict[str, int]:
    """Hand the ticket to Celery in three ways."""
    chain(tickets.triage.s(number), tickets.summarise.s()).delay()
    group(tickets.translate.si(language) for language in ("de", "fr", "it")).delay()
    chord([tickets.score.si(number), tickets.check.si(number)])(tickets.decide.s())
    return {"ticket": number}
