"""Mutate files and read them: ``python -m fuzz --inputs 10000``, with tests/ on the path.

Each input is read under a limit of 10 s and, where the system has such limits, of 2 GB. All that may come out of it is
a value or a TailorError.
"""

import argparse
import faulthandler
import json
import logging
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from helpers import mutate_bytes, mutate_json

from fuzz.targets import make_cases
from tailorcli import TailorError
from tailorcli.system import peak_memory

SECONDS = 10
MOST_MEMORY = 2 << 30
_VALUES = re.compile(r'(?<=: )[\d.]+|(?<=: )"[^"]*"')  # of the fields of an object
_NEVER_WRITTEN = ("1e999", "9" * 400, "9" * 5000, "[" * 5000 + "]" * 5000, "[" * 200 + "]" * 200, '{"a":' * 900, "-NaN")
_HEADER = 4096  # most damage is done near the start of a file


def limit_memory():
    """2 GB more than the libraries take up by themselves."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # another system: the peak is looked at in the end
        return
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY,) * 2)


def mutated(content, kind, generator):
    """The bytes of a file with some damage, a value or two changed where it is JSON."""
    if not kind or generator.random() < 0.3:
        for _ in range(generator.randrange(1, 3)):
            content = mutate_bytes(content, generator, min(_HEADER, len(content))) if content else b"x"
        return content
    values = [json.loads(line) for line in content.splitlines()] if kind == "lines" else json.loads(content)
    for _ in range(generator.randrange(1, 4)):
        if values:
            values = mutate_json(values, generator)
    text = json.dumps(values) if kind == "value" else "".join(json.dumps(value) + "\n" for value in values)
    if generator.random() < 0.15:  # what no JSON library writes
        place = generator.choice(list(_VALUES.finditer(text)) or [None])
        if place is not None:
            text = text[: place.start()] + generator.choice(_NEVER_WRITTEN) + text[place.end() :]
    return text.encode()


def main():
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one reader's name")
    chosen = parser.parse_args()
    logging.getLogger("tailorcli").setLevel(logging.CRITICAL)  # notes of thousands of files
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(Path(folder))
        names = [chosen.only] if chosen.only else list(cases)
        whole = {name: cases[name].file.read_bytes() for name in names}
        for name in names:
            cases[name].read()  # what is sound is read
        limit_memory()
        outcomes, slowest, failed = Counter(), (0.0, ""), 0
        for number in range(chosen.inputs):
            name = names[number % len(names)]
            case, generator = cases[name], random.Random(f"{chosen.seed} {name} {number}")
            case.file.write_bytes(mutated(whole[name], case.json, generator))
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            started = time.monotonic()
            try:
                case.read()
                outcomes["read"] += 1
            except TailorError as error:
                outcomes["refused"] += 1
                str(error).encode("utf-8")
            except BaseException:
                failed += 1
                print(f"{name}, input {number}:", file=sys.stderr)
                traceback.print_exc()
            faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, (time.monotonic() - started, f"{name}, input {number}"))
            case.file.write_bytes(whole[name])
    peak = peak_memory() or 0
    figures = {"readers": len(names), **outcomes, "tracebacks": failed, "slowest": slowest, "peak_bytes": peak}
    print(json.dumps(figures))
    sys.exit(1 if failed or peak > MOST_MEMORY else 0)


if __name__ == "__main__":
    main()
