"""End each command at each of its operations on files; see that nothing unfinished opens, and that it can go on.

``python -m kills.harness`` (``make kills``) does all of them, ``--share`` a few of each, chosen by a fixed seed. The
process is forked for every kill, so that torch is imported once.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from helpers import do_not_wait_for_the_disk, folder_digest
from kills.commands import COMMANDS, FOLDER, make_inputs, opens
from kills.operations import ENDED, Operations
from tqdm import tqdm

from tailorcli import TailorError
from tailorcli.checkpoint.writer import JOURNAL, WORK_FOLDER
from tailorcli.patchfile.report import RUN_FILE

SECONDS = 300  # after which a run hangs
_TIMED = (RUN_FILE, "finetune.json")  # which say how long a run took
_UNFINISHED = (".part", ".journal", ".lock")


def main():
    """Do the kills asked for; print a line for each command, then what went wrong; exit 1 where anything did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=int, default=0, help="kills of each command (0: all)")
    parser.add_argument("--only", default="", help="commands whose line has this text")
    parser.add_argument("--json", action="store_true", help="results as JSON")
    arguments = parser.parse_args()
    do_not_wait_for_the_disk()  # a process that ends takes nothing along that the system holds
    tqdm.monitor_interval = 0  # else a thread for the bars of other libraries
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        inputs = make_inputs(root / "inputs")
        for command in COMMANDS:
            if (arguments.share and command.is_long and not arguments.only) or not wanted(command, arguments.only):
                continue
            wholes = [whole_output(command, inputs, root / "work", variant) for variant in (0, 1)]
            for over in (False, True)[: 1 + command.can_overwrite]:
                line = line_of(command, over)
                if arguments.only not in line:
                    continue
                case = Case(command, inputs, root / "work", wholes, over)
                result = case.run(arguments.share) | {"command": line}
                results.append(result)
                if not arguments.json:
                    print(f"{line:30} {describe(result)}", flush=True)
                    for failure in result["failures"]:
                        print("   ", failure, flush=True)
    if arguments.json:
        print(json.dumps(results))
    sys.exit(any(result["failures"] for result in results))


def line_of(command, over):
    """How a command is named, onto nothing or over an earlier output."""
    return command.name + (" --overwrite" if over else "")


def wanted(command, text):
    """Whether a line of the command has the text."""
    return any(text in line_of(command, over) for over in (False, True))


def describe(result):
    """A result in words."""
    ends = ", ".join(f"{count} {end}" for end, count in sorted(result["ends"].items()))
    return f"{result['operations']} operations, {result['kills']} kills: {ends}; {result['seconds']:.0f} s"


def in_child(work):
    """What ``work`` returns, or "hangs" or what it raised, from a forked process; None where that was ended."""
    assert threading.active_count() == 1, threading.enumerate()  # a fork takes one thread along
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            answer = work()
        except BaseException:
            answer = "traceback: " + traceback.format_exc()
        with os.fdopen(writing, "w") as stream:
            json.dump(answer, stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == ENDED:
        return None
    return json.loads(text) if code == 0 else f"ended by {code}"


def digests(work, output, *, finished):
    """A hash of each file of an output, and its folders; without what an unfinished one has where not ``finished``."""
    place = work / output
    found = folder_digest(place, _TIMED) if place.is_dir() else {}
    if place.is_file():
        every = folder_digest(work, _TIMED)
        found = {file: digest for file, digest in every.items() if file.split("/")[0].startswith(output)}
    if finished:
        return found | {f"{path.relative_to(place)}/": "" for path in place.rglob("*") if path.is_dir()}
    return {
        name: digest
        for name, digest in found.items()
        if not name.endswith(_UNFINISHED) and not name.startswith(".tailorcli")
    }


def all_digests(command, work):
    """The same of all outputs."""
    return {output: digests(work, output, finished=True) for output in command.outputs}


def fresh(work, saved=None):
    """An empty folder ``work``, or one with what ``saved`` holds."""
    shutil.rmtree(work, ignore_errors=True)
    if saved is None:
        work.mkdir()
    else:
        shutil.copytree(saved, work, symlinks=True)


def whole_output(command, inputs, work, variant):
    """What an uninterrupted run writes, as a folder and as hashes."""
    fresh(work)
    command.run(inputs, work, variant)
    saved = work.with_name(f"{command.name.replace(' ', '-')}-{variant}")
    shutil.copytree(work, saved)
    return saved, all_digests(command, work)


class Case:
    """One command, onto nothing or over an earlier output."""

    def __init__(self, command, inputs, work, wholes, over):
        self._command, self._inputs, self._work, self._over = command, inputs, work, over
        self._new, self._earlier = wholes[0], wholes[1] if over else None

    def run(self, share):
        """End the command at ``share`` of its operations, chosen at random, or at all; see what is there then."""
        started = time.perf_counter()
        gc.collect()
        gc.freeze()  # a forked process copies no memory only because it looks for garbage there
        log = self._log()
        points = [(number, False) for number in range(1, len(log) + 1)]
        points += [(number, True) for number, (kind, _) in enumerate(log, 1) if kind == "write"]
        if share:
            points = random.Random(f"{self._command.name} {self._over}").sample(points, min(share, len(points)))
        ends, failures = {}, []
        for number, torn in sorted(points):
            kind, path = log[number - 1]
            found = self._kill(number, torn)
            ends[found[0]] = ends.get(found[0], 0) + 1
            failures += [f"{number}{' torn' if torn else ''} {kind} {path}: {what}" for what in found[1]]
        seconds = time.perf_counter() - started
        return {
            "operations": len(log),
            "kills": len(points),
            "ends": ends,
            "failures": failures,
            "seconds": seconds,
        }

    def _start(self):
        fresh(self._work, self._earlier and self._earlier[0])

    def _log(self):
        """Every operation of an uninterrupted run."""
        self._start()

        def counted():
            operations = Operations(self._work)
            operations.install()
            self._run_once(self._over)
            return operations.log

        log = in_child(counted)
        assert isinstance(log, list), log
        assert all_digests(self._command, self._work) == self._new[1], "two runs differ"
        return log

    def _run_once(self, overwrite, **options):
        from tailorcli.checkpoint import journal

        journal._SYNC_BYTES = 20_000  # small tensors: journal some of them together
        self._command.run(self._inputs, self._work, 0, overwrite=overwrite, **options)

    def _kill(self, number, torn):
        """How it went on after a kill, in a word, and what is wrong with that."""
        self._start()

        def ended():
            Operations(self._work, number, torn=torn).install()
            self._run_once(self._over)

        answer = in_child(ended)
        if answer is not None:
            return "failed", [f"it was not ended but gave {answer}"]
        answer = in_child(self._afterwards)
        return answer if isinstance(answer, list) else ("failed", [f"afterwards: {answer}"])

    def _afterwards(self):
        """What opens after a kill, and how the command goes on: a word on each way, and what is wrong."""
        wrong = self._what_opens()
        saved = self._work.with_name("killed")
        fresh(saved, self._work)
        ways = [("the same command", {"overwrite": self._over})]
        if self._command.can_overwrite:
            ways.append(("--overwrite", {"overwrite": True}))
        if self._command.can_resume:
            ways.insert(0, ("--resume", {"overwrite": False, "resume": True}))
        words = []
        for way, options in ways:
            if way == "--overwrite" and any("went on" in word for word in words):
                break  # it need not be tried
            fresh(self._work, saved)
            word, what = self._go_on(options)
            journaled = self._command.outputs == (FOLDER,) and (self._work / FOLDER / RUN_FILE).exists()
            if options.get("resume") and word == "went on" and journaled:
                what = self._what_was_done_again(saved)
            wrong += [f"{way}: {text}" for text in what]
            words.append(f"{way} {word}")
        if not any("went on" in word for word in words):
            wrong.append("nothing goes on")
        return "; ".join(words), wrong

    def _what_opens(self):
        """Each output that opens and is neither the whole earlier nor the whole new one."""
        wrong = []
        for output in self._command.outputs:
            if opens(self._work, output):
                found = digests(self._work, output, finished=False)
                wholes = [whole[1][output] for whole in (self._new, self._earlier) if whole is not None]
                if found not in wholes:
                    wrong.append(f"{output} opens and is not whole: {_difference(found, wholes)}")
        return wrong

    def _go_on(self, options):
        """Whether a run after the kill went on or was refused, and what is wrong with that."""
        try:
            self._run_once(**options)
        except TailorError:
            return "refused", self._what_opens()
        found = all_digests(self._command, self._work)
        if found != self._new[1]:
            return "failed", [f"other bytes: {_difference(found, [self._new[1]])}"]
        return "went on", []

    def _what_was_done_again(self, saved):
        """What a resumed run did not take over from the journal that it found."""
        journal = saved / FOLDER / WORK_FOLDER / JOURNAL
        if not journal.exists():
            return []
        lines = journal.read_text().count("\n") - 1
        taken = json.loads((self._work / FOLDER / RUN_FILE).read_text())["tensors_from_an_earlier_run"]
        return [f"{lines} tensors were in the journal, {taken} were taken over"] if lines != taken else []


def _difference(found, wholes):
    """Names of files that are missing, too many or different."""

    def flat(value):
        return {f"{a}/{b}": d for a, e in value.items() for b, d in e.items()} if _is_nested(value) else value

    found = flat(found)
    return " | ".join(
        ", ".join(name for name in sorted({*found, *flat(whole)}) if found.get(name) != flat(whole).get(name))
        for whole in wholes
    )


def _is_nested(value):
    return any(isinstance(entry, dict) for entry in value.values())


if __name__ == "__main__":
    main()
