"""Send one ticket: `python send.py`. RQ finds a function by its module's name, which `__main__` is not."""

import tasks

tasks.send("I was charged twice and now I cannot log in.")
