"""What an interrupted fine-tuning goes on from: the folder beside its output, in which the Trainer keeps its states."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import Any

from tailorcli.checkpoint.folder import WORK_FOLDER, Checkpoint
from tailorcli.checkpoint.writer import JOURNAL
from tailorcli.errors import OutputError, first_line
from tailorcli.files import as_output_error, beside, read_json, write_text_atomically
from tailorcli.guard import OutputLock, entries
from tailorcli.patchfile.report import FINETUNE_FILE
from tailorcli.training.outcome import FinetuneReport

SUFFIX = ".finetune"  # of the folder beside the output
IDENTITY, FINAL, FACTS = "run.json", "final", "facts.json"
COMPLETE = "complete"  # in the folder of a state: all of it is there


def work_of(folder: Path) -> Path:
    """The folder beside an output that an interrupted run goes on from. Raises OutputError for one without a name."""
    return beside(folder, SUFFIX)


def check_output(folder: Path, work: Path, identity: Mapping[str, Any], resume: bool) -> FinetuneReport | None:
    """Nothing that is there would be lost. The report of the same run, where it has finished and is resumed.

    Raises OutputError.
    """
    begun = (work / IDENTITY).exists()
    if folder.exists() and (not folder.is_dir() or entries(folder)):
        if resume and (folder / FINETUNE_FILE).exists():
            report = FinetuneReport.read(folder / FINETUNE_FILE)
            if report.identity != identity:
                raise OutputError(f"{folder} is the finished output of another run", "choose another folder for -o")
            if not (begun and (folder / WORK_FOLDER / JOURNAL).exists()):  # it is there before the shards have names
                Checkpoint.open(folder).close()
                return report
        if not (resume and begun and folder.is_dir()):
            raise OutputError(f"{folder} exists and is not empty", "choose another folder for -o")
    # A run that was ended as it began has left a part of this one file.
    if work.exists() and not begun and any(entry.name != f"{IDENTITY}.part" for entry in entries(work)):
        raise OutputError(f"{work} holds files that tailorcli did not write", "choose another folder for -o")
    if not begun:
        if resume:
            raise OutputError(f"{work} holds no run that could be resumed", "leave --resume out")
        return None
    if not resume:
        raise OutputError(f"{work} holds an interrupted run", "pass --resume, or remove that folder")
    if read_json(work / IDENTITY) != identity:
        what = f"{work} is of a run with other options, inputs or versions"
        raise OutputError(what, "repeat them, or remove that folder")
    return None


def is_finished(folder: Path) -> bool:
    """Whether an output is there whole, and nothing left to do: what a process sees that is not the first."""
    return (folder / FINETUNE_FILE).exists() and not (folder / WORK_FOLDER / JOURNAL).exists()


def clear(folder: Path, work: Path) -> None:
    """Take away what is not part of a whole output. Raises OutputError where another run has its lock."""
    with suppress(OSError):
        (folder / WORK_FOLDER).rmdir()
    with OutputLock(folder, folder=True):  # whose file goes with it
        shutil.rmtree(work, ignore_errors=True)


def begin(work: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder in which this run keeps its states. Raises OutputError."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        if not (work / IDENTITY).exists():
            write_text_atomically(work / IDENTITY, json.dumps(identity, indent=1) + "\n")
    except OSError as error:
        raise as_output_error(work, error) from error


def forget_if_refused(work: Path) -> Callable[..., None]:
    """What takes the folder of states away again where a run was refused before it had any."""

    def forget(_: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, Exception) and last_state(work) is None and not (work / FINAL / FACTS).exists():
            shutil.rmtree(work, ignore_errors=True)

    return forget


def facts_of(final: Path) -> dict[str, Any] | None:
    """What an earlier run noted when it had trained to the end; None where it had not."""
    return read_json(final / FACTS) if (final / FACTS).exists() else None


def last_state(work: Path) -> Path | None:
    """The latest state that is there whole."""
    found = [path.parent for path in work.glob(f"checkpoint-*/{COMPLETE}") if path.parent.name[11:].isdigit()]
    return max(found, key=lambda path: int(path.name[11:]), default=None)


@contextmanager
def states_written(work: Path) -> Iterator[None]:
    """Raise OutputError where a state cannot be written, which transformers tells of in several ways."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise as_output_error(work, error) from error
    except (SafetensorError, RuntimeError) as error:
        if not isinstance(error, SafetensorError) and "PytorchStreamWriter" not in str(error):
            raise
        if "No space left" in str(error):
            raise as_output_error(work, OSError(ENOSPC, "no space")) from error
        problem = f"cannot write into {work}: {first_line(error)}"
        raise OutputError(problem, "free some space; --resume goes on from the last state") from error
