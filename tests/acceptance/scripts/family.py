"""A script whose children make the calls, in one of the ways that the standard library has.

python family.py WAY START-METHOD       with WAY one of process, pool, futures, threads
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

from asking import ask

import waxell_workers

waxell_workers.init()


def work(number: int) -> int:
    ask(f"call {number}")
    return number


def main(way: str, method: str) -> list[int]:
    context = multiprocessing.get_context(method)
    numbers = list(range(4))
    if way == "pool":
        with context.Pool(2) as pool:  # whose children are terminated at the end of the block
            return pool.map(work, numbers)
    if way == "futures":
        with ProcessPoolExecutor(2, mp_context=context) as executor:
            return list(executor.map(work, numbers))
    if way == "threads":
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(work, numbers))
    children = [context.Process(target=work, args=(number,)) for number in numbers]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [number for number, child in zip(numbers, children, strict=True) if child.exitcode == 0]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
