"""Regular expressions that a file brings along: matched as PEFT does, under a time limit.

Some expressions take longer than anyone waits on a name of thirty letters, such as ``(a+)+b``, and nothing can stop
one that runs within this process. So those with repetitions or alternatives are matched by another one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

_SECONDS = 10.0
_BRANCHES = re.compile(r"[*+?{|]")
_LONGEST = 4096  # characters of an expression: one that lists modules by name can be long
_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
first = [next((i for i, pattern in enumerate(compiled) if pattern.match(name)), None) for name in names]
json.dump(first, sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Iterable[str]) -> dict[str, str | None]:
    """For each module's name the first pattern that matches it or a dotted ending of it, or None.

    Raises TimeoutError where that does not end, ValueError for what is no regular expression.
    """
    wanted = list(dict.fromkeys(names))
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            raise ValueError(f"a pattern of {len(pattern):,} characters is too long")
    whole = [rf"(.*\.)?({pattern})$" for pattern in patterns]
    try:
        compiled = [re.compile(pattern) for pattern in whole]
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from error
    if wanted and any(_BRANCHES.search(pattern) for pattern in patterns):
        found = _in_another_process(whole, wanted)
    else:
        found = [next((i for i, one in enumerate(compiled) if one.match(name)), None) for name in wanted]
    return {name: None if i is None else patterns[i] for name, i in zip(wanted, found, strict=True)}


def _in_another_process(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """The place of the first pattern that matches each name."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"it does not end within {_SECONDS:g} seconds") from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"it cannot be matched: {error}") from error
    return list(json.loads(done.stdout))
