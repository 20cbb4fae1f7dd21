"""The demo: a small model learns two old tasks, forgets them over a new one, and is patched.

Everything is made on the spot from the Python standard library (``demo.text``), on the CPU, without a network.
A byte-level Llama is trained on Python source and English prose (``base``) and fine-tuned on Unicode character
names (``tuned``). Both are calibrated, the base on samples that it writes itself, and patched, through the same
functions as ``tailorcli calibrate`` and ``tailorcli patch``, and compared with plain interpolation between base and
tuned. The measure is the share of next bytes that the model's first guess gets right. Settings are chosen on the
validation split, figures come from the test split.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.demo.text import (
    NEW_TASK,
    OLD_TASKS,
    PAD,
    SOURCES,
    TASKS,
    TaskText,
    build_tasks,
    build_tokenizer,
    encode,
    read_jsonl,
    samples,
    write_jsonl,
)
from tailorcli.device import StageTimer
from tailorcli.errors import OutputError
from tailorcli.files import PathLike, in_shell
from tailorcli.options import DISTILL_STEPS, CalibrateOptions, DistillOptions, PatchOptions, Solver, require_seed
from tailorcli.terminal import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType


REPORT_FILE = "demo.json"  # marks the folder as ours, too
_PARTS = ("base", "tuned", "stats", "base-stats", "patched", "data", "calibration.jsonl", REPORT_FILE)
Point = tuple[Solver | str, float, bool]  # solver, density, and whether the base's own samples are retained
_DEFAULT: Point = (PatchOptions().solver, PatchOptions().density, True)
_CHOSEN = "best on validation"
_PAPER: Point = ("sequential", 0.1, False)


@dataclass(frozen=True)
class Phase:
    """One training run: AdamW with a short warm-up and a cosine decay."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class DemoSettings:
    """Sizes, steps and rates of a demo run; the defaults take a few minutes on two cores."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 3
    head_size: int = 32
    window: int = 128  # bytes that the model sees at once, in training, calibration and evaluation
    batch_size: int = 8
    base: Phase = Phase(750, 1.5e-3)
    tuned: Phase = Phase(250, 4e-4)
    calibration_samples: int = 256
    validation_samples: int = 120  # a task
    test_samples: int = 240  # a task
    weights: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of tuned, in the interpolation
    operating_points: tuple[Point, ...] = (  # tried besides the default and the paper's
        ("joint", 0.2, True),
        ("joint", 0.4, True),
        ("joint", 0.1, False),
        ("sequential", 0.2, False),
        ("sequential", 0.3, False),
    )
    distill_steps: int = DISTILL_STEPS


FULL = DemoSettings()
QUICK = DemoSettings(
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    base=Phase(60, 4e-3),
    tuned=Phase(30, 2e-3),
    calibration_samples=16,
    validation_samples=16,
    test_samples=32,
    weights=(0.4, 0.6),
    operating_points=(("joint", 0.3, True),),
    distill_steps=3,
)


@dataclass(frozen=True)
class DemoRow:
    """One model's accuracies in percent; ``h_score`` is the harmonic mean of ``old`` and ``new`` (Eq. 32)."""

    model: str
    setting: str
    accuracy: dict[str, float]
    old: float
    new: float
    h_score: float
    path: str
    note: str = ""  # why this setting is shown

    @property
    def title(self) -> str:
        """The model with its setting, in one line."""
        return f"{self.model}, {self.setting}" if self.setting else self.model


@dataclass(frozen=True)
class DemoReport:
    """What a demo run measured, where it left its files, and how long each step took."""

    rows: list[DemoRow]
    test_bytes: int  # predicted, per task
    validation: dict[str, float]  # H-score of each setting that was tried
    paths: dict[str, str]
    seconds: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def best(self) -> DemoRow:
        """The row with the highest H-score on the test split."""
        return max(self.rows, key=lambda row: row.h_score)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {**asdict(self), "best": self.best.title, "sources": SOURCES}


def run_demo(
    output: PathLike,
    *,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
    overwrite: bool = False,
    distill: bool = False,
) -> DemoReport:
    """Train, fine-tune, calibrate, patch and compare; the checkpoints stay in the folder ``output``.

    With ``distill`` the default patch is distilled, too, which takes about as long again as the rest. ``quick`` is a
    much smaller run that shows only that everything works. Raises OutputError for a folder that is not empty
    (``overwrite`` replaces an earlier demo), DataError where Python comes without its own text.
    """
    require_seed(seed)
    settings = QUICK if quick else FULL
    folder = Path(output)
    _prepare_folder(folder, overwrite)
    timer = StageTimer()
    with timer.stage("total"):
        with timer.stage("text"):
            tasks = build_tasks()
            test = {name: samples(task.test, settings.window, settings.test_samples) for name, task in tasks.items()}
            _write_data(folder, tasks[NEW_TASK], test, settings)
        with timer.stage("imports"):
            import_module("transformers.models.llama.modeling_llama")  # torch with it: seconds that no step should own
            from tailorcli.calibration.calibrate import calibrate_model
            from tailorcli.models.calling import package_versions, quiet_transformers
        with _own_random_state(seed), quiet_transformers():
            with timer.stage("train base"):
                network = _build_network(settings)
                old_texts = [tasks[name].train for name in OLD_TASKS]
                _train(network, old_texts, settings, settings.base, seed, "training base", progress)
                _save(network, folder / "base")
            with timer.stage("fine-tune"):
                _train(network, [tasks[NEW_TASK].train], settings, settings.tuned, seed, "fine-tuning", progress)
                _save(network, folder / "tuned")
            with timer.stage("calibrate"):
                options = CalibrateOptions(settings.calibration_samples, settings.window, batch_size=32, device="cpu")
                calibrate_model(folder / "tuned", folder / "calibration.jsonl", folder / "stats", options)
            with timer.stage("calibrate base"):
                calibrate_model(folder / "base", None, folder / "base-stats", replace(options, synthetic=True))
            distilled = _distilled(folder, settings, timer, progress) if distill else None
            rows, validation = _compare(folder, tasks, test, settings, timer, progress, distilled)
    report = DemoReport(
        rows=rows,
        test_bytes=min(len(texts) for texts in test.values()) * (settings.window - 1),
        validation=validation,
        paths={name.partition(".")[0]: str(folder / name) for name in _PARTS},
        seconds=dict(timer.seconds),
        settings={"seed": seed, "quick": quick, **asdict(settings)},
        versions=package_versions(),
    )
    (folder / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return report


def evaluate_checkpoint(checkpoint: PathLike, data: PathLike) -> DemoRow:
    """Measure ``checkpoint``, made from a demo's models, on the test samples in that demo's ``data`` folder.

    Raises DataError if ``data`` is no such folder.
    """
    from tailorcli.models.calling import quiet_transformers

    test = {name: read_jsonl(Path(data) / f"{name}.jsonl") for name in TASKS}
    with quiet_transformers():
        return _measure(_Candidate(Path(checkpoint).name, "", Path(checkpoint)), test)


def render_demo(report: DemoReport) -> RenderableType:
    """The table of accuracies, with what it shows in words below."""
    from rich.console import Group
    from rich.table import Table

    table = Table(title="next bytes guessed right, % of the test split")
    table.add_column("model")
    table.add_column("setting")
    for title in (*OLD_TASKS, "old", "new", "H"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in report.rows:
        setting = f"{row.setting} ({row.note})" if row.note else row.setting
        figures = [*(row.accuracy[name] for name in OLD_TASKS), row.old, row.new, row.h_score]
        style = "bold" if row is report.best else None
        table.add_row(row.model, setting, *(f"{value:.1f}" for value in figures), style=style)
    return Group(table, *_verdict(report))


def follow_up_commands(report: DemoReport) -> list[str]:
    """Shell commands to go on with the checkpoints that the demo kept."""
    path = {name: in_shell(value) for name, value in report.paths.items()}
    default = next(row.path for row in report.rows if row.model == "patched")
    mine = str(Path(report.paths["base"]).with_name("mine"))
    inputs = f"{path['base']} {path['tuned']} --stats {path['stats']}"
    retaining = f"{inputs} --retain {path['base-stats']}"
    code = f"import tailorcli.demo as d; print(d.evaluate_checkpoint({mine!r}, {report.paths['data']!r}))"
    return [
        f"tailorcli inspect {path['stats']}",
        f"tailorcli inspect {in_shell(default)}",
        f"tailorcli score {inputs} --density 0.2",
        f"tailorcli patch {retaining} --density 0.3 -o {in_shell(mine)}",
        f"tailorcli patch {inputs} --density 0.3 --solver none -o {in_shell(mine)} --overwrite",
        f"python -c {shlex.quote(code)}",
    ]


def _verdict(report: DemoReport) -> list[str]:
    """Sentences on what was forgotten, what was given back, and which model is best."""
    base, tuned = report.rows[:2]
    patched = [row for row in report.rows if row.model == "patched"]
    best, best_patch = report.best, max(patched, key=lambda row: row.h_score)
    error = 100 * math.sqrt(0.25 / report.test_bytes)  # binomial, at its widest
    remarks = ["A quick run: models this small show only that everything works."] if report.settings["quick"] else []
    return [
        *remarks,
        f"old: the mean of {' and '.join(OLD_TASKS)}; new: {SOURCES[NEW_TASK]}; H: their harmonic mean (Eq. 32).",
        "retained: with the retain term, on samples that the base wrote itself (calibrate BASE --synthetic).",
        f"Fine-tuning moved the old tasks by {tuned.old - base.old:+.1f} points, the new one by "
        f"{tuned.new - base.new:+.1f}. From there, the default patch moves the old by "
        f"{patched[0].old - tuned.old:+.1f}, the new by {patched[0].new - tuned.new:+.1f}.",
        f"Best H: {best.title} ({best.h_score:.1f})."
        + (
            "" if best.model == "patched" else f" Best of the patched: {best_patch.setting} ({best_patch.h_score:.1f})."
        ),
        f"{report.test_bytes:,} test bytes a task and one seed: standard error about {error:.1f} points.",
    ]


def _is_ours(marker: Path) -> bool:
    """Whether a demo's report, or the mark of one that has begun, lies in a folder."""
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and ("finished" in found or {"settings", "rows"} <= found.keys())


def _prepare_folder(folder: Path, overwrite: bool) -> None:
    """An empty folder that is marked as ours; an earlier demo in it goes only with ``overwrite``."""
    from tailorcli.files import as_output_error

    marker = folder / REPORT_FILE
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not overwrite:
                raise OutputError(f"{folder} exists and is not an empty folder", "choose another -o, or --overwrite")
            if not _is_ours(marker):
                raise OutputError(f"{folder} holds no demo that could be replaced", "choose another folder for -o")
            for part in _PARTS:  # the marker last: a removal that is cut off can be taken up again
                path = folder / part
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"finished": False}) + "\n", encoding="utf-8")
    except OSError as error:
        raise as_output_error(folder, error) from error


def _write_data(folder: Path, new_task: TaskText, test: dict[str, list[str]], settings: DemoSettings) -> None:
    """The calibration file, from the new task's training split, and each task's test samples."""
    texts = samples(new_task.train, settings.window, settings.calibration_samples)
    write_jsonl(folder / "calibration.jsonl", texts)
    for name, texts in test.items():
        write_jsonl(folder / "data" / f"{name}.jsonl", texts)


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside; the caller's state comes back after."""
    import torch

    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the GPUs as well, which nothing here uses or restores.
        torch.default_generator.manual_seed(seed)
        yield


def _build_network(settings: DemoSettings) -> Any:
    """A Llama over bytes, freshly initialised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=PAD + 1,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.hidden_size // settings.head_size,
        num_key_value_heads=settings.hidden_size // settings.head_size,
        max_position_embeddings=settings.window,
        initializer_range=0.1,  # the usual 0.02 suits wide models; here it learns far more slowly
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def _train(
    network: Any, texts: list[str], settings: DemoSettings, phase: Phase, seed: int, title: str, progress: bool
) -> None:
    """Train on random windows of ``texts``, an equal share of every batch from each."""
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    streams = [encode([text])[0] for text in texts]
    per_text, length = settings.batch_size // len(texts), settings.window + 1
    offsets = torch.arange(length)
    optimizer = torch.optim.AdamW(network.parameters(), phase.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    warm_up = max(1, min(20, phase.steps // 5))
    network.train()
    with Progress(title, phase.steps, "steps", shown=progress) as bar:
        for step in range(phase.steps):
            decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / phase.steps))
            for group in optimizer.param_groups:
                group["lr"] = phase.learning_rate * decay * min(1.0, (step + 1) / warm_up)
            starts = [torch.randint(len(stream) - length, (per_text, 1), generator=generator) for stream in streams]
            windows = [stream[start + offsets] for stream, start in zip(streams, starts, strict=True)]
            batch = torch.cat(windows)  # (B, T+1)
            logits = network(input_ids=batch[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            if step % 10 == 0:
                bar.note(f"loss {loss.item():.2f}")
            bar.update()


def _measure_all(
    candidates: Iterable[_Candidate], texts: dict[str, list[str]], title: str, progress: bool
) -> dict[_Candidate, DemoRow]:
    measured: dict[_Candidate, DemoRow] = {}
    found = list(candidates)
    with Progress(title, len(found), "models", shown=progress) as bar:
        for candidate in found:
            measured[candidate] = _measure(candidate, texts)
            bar.update()
    return measured


def _save(network: Any, path: Path) -> None:
    """A checkpoint with its tokenizer, as Hugging Face lays it out."""
    network.save_pretrained(path)
    build_tokenizer().save_pretrained(path)


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint to measure: what kind of model it is, how it was made, and where it lies."""

    model: str
    setting: str
    path: Path


def _compare(
    folder: Path,
    tasks: dict[str, TaskText],
    test: dict[str, list[str]],
    settings: DemoSettings,
    timer: StageTimer,
    progress: bool,
    distilled: _Candidate | None,
) -> tuple[list[DemoRow], dict[str, float]]:
    """Patch, choose each method's setting on the validation split, measure the chosen on the test split.

    ``distilled`` is measured with them; nothing of it is chosen.
    """
    from tailorcli.patching.patch import patch_checkpoint

    base, tuned = folder / "base", folder / "tuned"
    mixed = {w: _interpolated(folder, w) for w in settings.weights}
    points = dict.fromkeys((_DEFAULT, _PAPER, *settings.operating_points))
    patched = {point: _patched(folder, *point) for point in points}
    with timer.stage("patch"), Progress("patching", len(mixed) + len(patched), "models", shown=progress) as bar:
        for weight, candidate in mixed.items():
            options = PatchOptions(method="interpolate", weight=weight, device="cpu")
            patch_checkpoint(base, tuned, candidate.path, None, options)
            bar.update()
        for (solver, density, retained), candidate in patched.items():
            options = PatchOptions(density, solver=solver, device="cpu")
            retain = folder / "base-stats" if retained else None
            patch_checkpoint(base, tuned, candidate.path, folder / "stats", options, retain=retain)
            bar.update()
    with timer.stage("validate"):
        texts = {n: samples(task.validation, settings.window, settings.validation_samples) for n, task in tasks.items()}
        tried = _measure_all([*mixed.values(), *patched.values()], texts, "choosing on validation", progress)
        scores = {candidate: row.h_score for candidate, row in tried.items()}
    best_mixed, best_patched = (max(some.values(), key=scores.__getitem__) for some in (mixed, patched))
    shown = {_Candidate("base", "", base): "", _Candidate("tuned", "", tuned): "", best_mixed: _CHOSEN}
    shown |= {patched[_DEFAULT]: "default", patched[_PAPER]: "the paper's"}
    shown[best_patched] = ", ".join(filter(None, (shown.get(best_patched), _CHOSEN)))
    if distilled is not None:
        shown[distilled] = "the default, --distill"
    with timer.stage("test"):
        tested = _measure_all(shown, test, "testing", progress)
        rows = [replace(tested[candidate], note=note) for candidate, note in shown.items()]
    return rows, {f"{candidate.model}, {candidate.setting}": score for candidate, score in scores.items()}


def _interpolated(folder: Path, weight: float) -> _Candidate:
    return _Candidate("interpolation", f"weight {weight}", folder / "patched" / f"interpolate-{weight}")


def _patched(folder: Path, solver: Solver | str, density: float, retained: bool) -> _Candidate:
    name = f"{solver}-retained" if retained else solver
    title = name.replace("-", ", ")
    return _Candidate("patched", f"{title}, density {density}", folder / "patched" / f"{name}-{density}")


def _distilled(folder: Path, settings: DemoSettings, timer: StageTimer, progress: bool) -> _Candidate:
    """The default patch, its kept entries trained to answer as tuned and as the base do."""
    from tailorcli.patching.distilled import distill_checkpoint

    _, density, _ = _DEFAULT
    found = _Candidate("patched", f"distilled, density {density}", folder / "patched" / "distilled")
    with timer.stage("distill"):
        stats = (folder / "stats", folder / "base-stats")
        options, how = PatchOptions(density, device="cpu"), DistillOptions(steps=settings.distill_steps)
        distill_checkpoint(folder / "base", folder / "tuned", found.path, *stats, options, how, progress)
    return found


def _measure(candidate: _Candidate, texts: dict[str, list[str]]) -> DemoRow:
    """The share of next bytes that the model's first guess gets right, in percent, task by task."""
    import torch
    from transformers import AutoModelForCausalLM

    from tailorcli.evaluation.metrics import h_score

    network = AutoModelForCausalLM.from_pretrained(candidate.path, dtype=torch.float32).eval()
    accuracy = {}
    for name, task_texts in texts.items():
        right = total = 0
        with torch.inference_mode():
            for batch in torch.split(encode(task_texts), 32):  # (B, T)
                guesses = network(input_ids=batch[:, :-1], use_cache=False).logits.argmax(-1)
                right += int((guesses == batch[:, 1:]).sum())
                total += guesses.numel()
        accuracy[name] = 100 * right / total
    old = sum(accuracy[name] for name in OLD_TASKS) / len(OLD_TASKS)
    new = accuracy[NEW_TASK]
    score = h_score(old, new)
    return DemoRow(candidate.model, candidate.setting, accuracy, old, new, score, str(candidate.path))
