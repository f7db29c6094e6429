"""A script that goes into the background: its first process ends, its child works on, told by stdin."""

import os
import sys

from asking import ask

import waxell_workers

waxell_workers.init()
ask("parent")
if os.fork():
    sys.exit(0)
ask("child, first")
os.setsid()
print("background", flush=True)
for line in sys.stdin:
    ask(line.strip())
    print("asked", flush=True)
os._exit(0)
