"""The run record beside a finished checkpoint: how that output came about."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailorcli.errors import OutputError
from tailorcli.files import read_json
from tailorcli.patchfile.report import RUN_FILE, PatchReport, read_inputs
from tailorcli.system import peak_memory
from tailorcli.typed import field_of, list_of, maybe, read_amount, read_count, read_object, read_text


@dataclass(frozen=True)
class RunRecord:
    """Identity, times and versions of a run, which differ between runs, unlike the report."""

    identity: dict[str, Any]  # under which it is resumed
    inputs: dict[str, dict[str, str]]  # path and fingerprint of each
    seconds: float
    stages: dict[str, float]  # seconds of work by stage
    tensors_from_an_earlier_run: int
    peak_memory_bytes: int | None
    python: str
    platform: str
    ranks: tuple[dict[str, Any], ...] = ()  # of several: tensors, bytes and seconds of each

    @classmethod
    def of(cls, report: PatchReport, identity: dict[str, Any], resumed: int) -> RunRecord:
        """The record of the run that ends now; ``resumed`` tensors were written by an earlier one."""
        times = (report.seconds, report.stages)
        here = (platform.python_version(), platform.platform())
        return cls(identity, report.inputs, *times, resumed, peak_memory(), *here, report.ranks)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_run(value: Any) -> RunRecord:
    """The record that ``RunRecord.to_json`` wrote. Raises ValueError that names the field."""
    return RunRecord(
        identity=field_of(value, "identity", read_object),
        inputs=field_of(value, "inputs", read_inputs),
        seconds=field_of(value, "seconds", read_amount),
        stages=field_of(value, "stages", _read_stages),
        tensors_from_an_earlier_run=field_of(value, "tensors_from_an_earlier_run", read_count),
        peak_memory_bytes=field_of(value, "peak_memory_bytes", maybe(read_count)),
        python=field_of(value, "python", read_text),
        platform=field_of(value, "platform", read_text),
        ranks=tuple(field_of({"ranks": [], **value}, "ranks", list_of(_read_share))),  # early records have none
    )


def _read_share(value: Any) -> dict[str, Any]:
    counts = {name: field_of(value, name, read_count) for name in ("rank", "tensors", "bytes")}
    return counts | {"seconds": field_of(value, "seconds", read_amount)}


def _read_stages(value: Any) -> dict[str, float]:
    return {name: field_of(value, name, read_amount) for name in read_object(value)}


def load_run(folder: Path) -> RunRecord:
    """The record in a finished output. Raises CheckpointError where it is no JSON, OutputError where it is damaged."""
    value = read_json(folder / RUN_FILE)
    try:
        return read_run(value)
    except ValueError as error:
        raise OutputError(f"{folder / RUN_FILE} is damaged: {error}", "start anew with --overwrite") from error
