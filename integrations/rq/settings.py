"""What `rq worker -c settings` reads."""

import tasks

REDIS_URL = tasks.REDIS_URL
# Importing the tasks here, once, spares each work-horse to do so: it is forked with everything in place.
