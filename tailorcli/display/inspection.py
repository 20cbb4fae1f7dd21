"""Say what a path is (statistics, report, patched checkpoint, plain checkpoint) and give its figures."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tailorcli.calibration.stats import MANIFEST, Stats
from tailorcli.checkpoint.folder import GGUF, WORK_FOLDER, Checkpoint, gguf_error
from tailorcli.checkpoint.journal import identity_in
from tailorcli.checkpoint.writer import JOURNAL
from tailorcli.errors import CheckpointError, OutputError, TailorError
from tailorcli.files import PathLike, read_json, read_text_file
from tailorcli.hub import local_folder
from tailorcli.patchfile.reader import SUFFIX, PatchFile
from tailorcli.patchfile.report import FINETUNE_FILE, REPORT_FILE, RUN_FILE, PatchReport, load_report, options_shown
from tailorcli.runs.record import load_run
from tailorcli.typed import list_of, read_text

KINDS = {
    "stats": "statistics for calibrated patching",
    "report": "report of a run",
    "patch": "patch file",
    "patched": "checkpoint patched by tailorcli",
    "fine-tuned": "checkpoint fine-tuned by tailorcli",
    "checkpoint": "checkpoint",
    "unfinished": "unfinished output of tailorcli",
}


@dataclass(frozen=True)
class Inspection:
    """What a path is: ``kind`` (a key of KINDS), ``facts`` in order, and what its kind holds besides."""

    path: str
    kind: str
    facts: dict[str, Any]
    report: PatchReport | None = None  # of a report, a patch file or a patched checkpoint
    hessians: dict[str, dict[str, Any]] = field(default_factory=dict)  # of statistics
    tensors: list[dict[str, Any]] = field(default_factory=list)  # of a checkpoint that is not patched
    uncalibrated: dict[str, str] = field(default_factory=dict)  # of statistics
    notes: dict[str, str] = field(default_factory=dict)  # of statistics, by tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        plain = asdict(replace(self, report=None))
        return plain | {"report": self.report.to_dict()} if self.report is not None else plain


def inspect_path(path: PathLike) -> Inspection:
    """What ``path`` is and its figures: stats, report, patch file, patched or plain checkpoint.

    Raises TailorError where it is none of these.
    """
    target = local_folder(path)
    if target.is_file() and target.suffix.lower() == GGUF:
        raise gguf_error(target)
    if target.is_file() and target.suffix == SUFFIX:
        return _inspect_patch(target)
    if target.is_file():
        return _inspect_report(target, target, "report", {})
    if not target.is_dir():
        raise CheckpointError(
            f"{target} does not exist", "pass a stats folder, a report, a patch file or a checkpoint folder"
        )
    if (target / WORK_FOLDER / JOURNAL).exists():
        return _inspect_unfinished(target)
    if (target / MANIFEST).exists():
        return _inspect_stats(target)
    if (target / REPORT_FILE).exists():
        facts = _checkpoint_facts(target)
        if (target / RUN_FILE).exists():
            with suppress(OutputError):
                facts["seconds of work"] = round(load_run(target).seconds, 1)
        return _inspect_report(target, target / REPORT_FILE, "patched", facts)
    with Checkpoint.open(target) as checkpoint:
        tensors: list[dict[str, Any]] = [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
            for info in checkpoint.tensors.values()
        ]
    facts = _checkpoint_facts(target)
    if not (target / FINETUNE_FILE).is_file():
        return Inspection(str(target), "checkpoint", facts, tensors=tensors)
    trained, changes = _of_finetune(target / FINETUNE_FILE)
    return Inspection(
        str(target), "fine-tuned", facts | trained, tensors=[each | changes.get(each["name"], {}) for each in tensors]
    )


def _of_finetune(file: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What a fine-tune's report says of the whole, and of each tensor. Raises OutputError."""
    from tailorcli.training.outcome import FinetuneReport

    report = FinetuneReport.read(file)
    facts: dict[str, Any] = {
        "base": report.base,
        "method": report.method,
        "steps": report.steps,
        "records": report.examples,
        "tokens": report.tokens,
        "tokens learnt": report.learnt_tokens,
    }
    if report.losses:
        facts |= {"loss at first": report.losses[0][1], "loss at last": report.losses[-1][1]}
    facts |= {"share moved": report.moved / max(report.numel, 1), "drift": report.drift}
    return facts, {each.name: {"moved": each.share, "drift": each.drift} for each in report.tensors}


def _inspect_patch(file: Path) -> Inspection:
    with PatchFile.open(file) as patch:
        base_bytes = patch.base_nbytes
        facts: dict[str, Any] = {
            "task": patch.manifest.task or "not named",
            "license": patch.manifest.license or "not given",
            "bytes": file.stat().st_size,
            "share_of_the_base": file.stat().st_size / base_bytes if base_bytes else None,
            "masks coded as": dict(Counter(tensor.coding for tensor in patch.tensors.values())),
            "side files stored": [name for name, side in patch.side_files.items() if side.stored],
            "base fingerprint": patch.manifest.base_fingerprint,
            "fingerprint": patch.fingerprint(),
        }
        report = patch.report()
    return _with_report(file, report, "patch", facts)


def _inspect_report(target: Path, file: Path, kind: str, facts: dict[str, Any]) -> Inspection:
    return _with_report(target, load_report(file), kind, facts)


def _with_report(target: Path, report: PatchReport, kind: str, facts: dict[str, Any]) -> Inspection:
    inputs = {role: entry["path"] for role, entry in report.inputs.items()}
    facts = {**facts, "command": report.command, **inputs, **options_shown(report)}
    facts |= {key: value for key, value in report.totals.items() if value is not None and value != []}
    return Inspection(str(target), kind, facts, report=report)


def _checkpoint_facts(folder: Path) -> dict[str, Any]:
    with Checkpoint.open(folder) as checkpoint:
        infos = checkpoint.tensors.values()
        facts: dict[str, Any] = {
            "tensors": len(checkpoint.tensors),
            "parameters": sum(info.numel for info in infos),
            "bytes": checkpoint.nbytes,
            "shards": len(checkpoint.shards),
            "dtypes": dict(Counter(info.dtype for info in infos)),
            "fingerprint": checkpoint.fingerprint(),
        }
    try:
        config = read_json(folder / "config.json")
        named = list_of(read_text)(config.get("architectures") or ())
        facts["architecture"] = named[0] if named else "unknown"
    except (CheckpointError, ValueError):
        facts["architecture"] = "unknown (no readable config.json)"
    return facts


def _inspect_stats(folder: Path) -> Inspection:
    stats = Stats.open(folder)
    stats.close()
    uncalibrated = {name: entry.reason for name, entry in stats.tensors.items() if not entry.hessians}
    data = {key: value for key, value in stats.manifest.get("data", {}).items() if key != "blake2b"}
    if data.get("synthetic"):
        del data["synthetic"]
        data["file"] = "none: the model wrote the samples itself"
    facts: dict[str, Any] = {
        "calibrated model": stats.manifest["model"].get("path"),
        "fingerprint": stats.model_fingerprint,
        "run in": stats.manifest["model"].get("run_in"),
        **{f"data {key}": value for key, value in data.items()},
        "hessians": len(stats.hessians),
        "bytes": sum(stats.nbytes(name) for name in stats.hessians),
        "tensors calibrated": len(stats.tensors) - len(uncalibrated),
        "tensors without statistics": len(uncalibrated),
        "versions": stats.manifest.get("versions"),
    }
    users = Counter(hessian for entry in stats.tensors.values() for hessian in entry.hessians)
    hessians = {name: {**asdict(info), "used_by": users[name]} for name, info in stats.hessians.items()}
    notes = {name: entry.note for name, entry in stats.tensors.items() if entry.note}
    return Inspection(str(folder), "stats", facts, hessians=hessians, uncalibrated=uncalibrated, notes=notes)


def _inspect_unfinished(folder: Path) -> Inspection:
    try:
        lines = read_text_file(folder / WORK_FOLDER / JOURNAL).split("\n")
        identity = identity_in(lines[0])
    except (OSError, ValueError) as error:
        raise TailorError(f"{folder} is an unfinished output with a damaged journal", "remove it") from error
    facts = {
        "tensors safely written": len(lines) - 2,
        "finish it with": "the same command and --resume",
        **identity,
    }
    return Inspection(str(folder), "unfinished", facts)
