"""Fine-tune a large model, then get back what it forgot: Model Tailor (ICML 2024) from the shell.

The public names below are loaded when they are first used, so that ``import tailorcli`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tailorcli._version import __version__

_HOMES = {
    "calibrate_model": "tailorcli.calibration.calibrate",
    "CalibrateReport": "tailorcli.calibration.calibrate",
    "score_checkpoint": "tailorcli.patching.patch",
    "patch_checkpoint": "tailorcli.patching.patch",
    "plan_patch": "tailorcli.patching.patch",
    "compare_models": "tailorcli.patching.compare",
    "Comparison": "tailorcli.patching.compare",
    "tailor": "tailorcli.pipeline.job",
    "plan_job": "tailorcli.pipeline.job",
    "JobPlan": "tailorcli.pipeline.plan",
    "apply_patch": "tailorcli.patching.apply",
    "verify_checkpoint": "tailorcli.patching.verify",
    "VerifyReport": "tailorcli.patching.verify",
    "merge_patches": "tailorcli.merging.merge",
    "plan_merge": "tailorcli.merging.merge",
    "PatchFile": "tailorcli.patchfile.reader",
    "PatchReport": "tailorcli.patchfile.report",
    "inspect_path": "tailorcli.display.inspection",
    "evaluate_models": "tailorcli.evaluation.evaluate",
    "EvaluateReport": "tailorcli.evaluation.evaluate",
    "read_tasks": "tailorcli.evaluation.tasks",
    "encode_task": "tailorcli.evaluation.tasks",
    "evaluate_network": "tailorcli.evaluation.predict",
    "run_sweep": "tailorcli.sweep.run",
    "settings_of": "tailorcli.sweep.settings",
    "SweepReport": "tailorcli.sweep.outcome",
    "TaskScores": "tailorcli.evaluation.metrics",
    "h_score": "tailorcli.evaluation.metrics",
    "read_results": "tailorcli.evaluation.lm_eval",
    "HarnessReport": "tailorcli.evaluation.lm_eval",
    "Checkpoint": "tailorcli.checkpoint.folder",
    "Stats": "tailorcli.calibration.stats",
    "CalibrateOptions": "tailorcli.options",
    "DataColumns": "tailorcli.options",
    "PatchOptions": "tailorcli.options",
    "DistillOptions": "tailorcli.options",
    "distill_checkpoint": "tailorcli.patching.distilled",
    "distill_patch": "tailorcli.patching.distilled",
    "plan_distilled": "tailorcli.patching.distilled",
    "patch_to_target": "tailorcli.patching.aim",
    "distill_merge": "tailorcli.merging.distilled",
    "finetune_model": "tailorcli.training.finetune",
    "plan_finetune": "tailorcli.training.finetune",
    "probe_model": "tailorcli.training.probe",
    "FinetuneOptions": "tailorcli.training.settings",
    "ProbeOptions": "tailorcli.training.settings",
    "FinetuneReport": "tailorcli.training.outcome",
    "FinetunePlan": "tailorcli.training.outcome",
    "ProbeReport": "tailorcli.training.probe",
    "MergeOptions": "tailorcli.options",
    "EvaluateOptions": "tailorcli.options",
    "HarnessOptions": "tailorcli.options",
    "TailorError": "tailorcli.errors",
}

__all__ = [
    "CalibrateOptions",
    "CalibrateReport",
    "Checkpoint",
    "Comparison",
    "DataColumns",
    "DistillOptions",
    "EvaluateOptions",
    "EvaluateReport",
    "FinetuneOptions",
    "FinetunePlan",
    "FinetuneReport",
    "HarnessOptions",
    "HarnessReport",
    "JobPlan",
    "MergeOptions",
    "PatchFile",
    "PatchOptions",
    "PatchReport",
    "ProbeOptions",
    "ProbeReport",
    "Stats",
    "SweepReport",
    "TailorError",
    "TaskScores",
    "VerifyReport",
    "__version__",
    "apply_patch",
    "calibrate_model",
    "compare_models",
    "distill_checkpoint",
    "distill_merge",
    "distill_patch",
    "encode_task",
    "evaluate_models",
    "evaluate_network",
    "finetune_model",
    "h_score",
    "inspect_path",
    "merge_patches",
    "patch_checkpoint",
    "patch_to_target",
    "plan_distilled",
    "plan_finetune",
    "plan_job",
    "plan_merge",
    "plan_patch",
    "probe_model",
    "read_results",
    "read_tasks",
    "run_sweep",
    "score_checkpoint",
    "settings_of",
    "tailor",
    "verify_checkpoint",
]

if TYPE_CHECKING:
    from tailorcli.calibration.calibrate import CalibrateReport, calibrate_model
    from tailorcli.calibration.stats import Stats
    from tailorcli.checkpoint.folder import Checkpoint
    from tailorcli.display.inspection import inspect_path
    from tailorcli.errors import TailorError
    from tailorcli.evaluation.evaluate import EvaluateReport, evaluate_models
    from tailorcli.evaluation.lm_eval import HarnessReport, read_results
    from tailorcli.evaluation.metrics import TaskScores, h_score
    from tailorcli.evaluation.predict import evaluate_network
    from tailorcli.evaluation.tasks import encode_task, read_tasks
    from tailorcli.merging.distilled import distill_merge
    from tailorcli.merging.merge import merge_patches, plan_merge
    from tailorcli.options import (
        CalibrateOptions,
        DataColumns,
        EvaluateOptions,
        HarnessOptions,
        MergeOptions,
        PatchOptions,
    )
    from tailorcli.patchfile.reader import PatchFile
    from tailorcli.patchfile.report import PatchReport
    from tailorcli.patching.aim import patch_to_target
    from tailorcli.patching.apply import apply_patch
    from tailorcli.patching.compare import Comparison, compare_models
    from tailorcli.patching.distilled import distill_checkpoint, distill_patch, plan_distilled
    from tailorcli.patching.patch import patch_checkpoint, plan_patch, score_checkpoint
    from tailorcli.patching.verify import VerifyReport, verify_checkpoint
    from tailorcli.pipeline.job import plan_job, tailor
    from tailorcli.pipeline.plan import JobPlan
    from tailorcli.sweep.outcome import SweepReport
    from tailorcli.sweep.run import run_sweep
    from tailorcli.sweep.settings import settings_of
    from tailorcli.training.finetune import finetune_model, plan_finetune
    from tailorcli.training.outcome import FinetunePlan, FinetuneReport
    from tailorcli.training.probe import ProbeReport, probe_model
    from tailorcli.training.settings import FinetuneOptions, ProbeOptions


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
