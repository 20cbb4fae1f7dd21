"""The commands under test: each tuned model calibrated and made into patches, the patches merged, and LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.real.chain import DEFAULT_PATCH, Step, calibrate_step, patch_folder, patch_step
from benchmarks.real.data import NEW_TASK
from benchmarks.stitch import bytecode

SINGLE_DENSITY = "0.1"  # of one task's patch
HALF_DENSITY = "0.05"  # of each patch that is merged with another, and of the adapter's patch (Table 7)
METHODS = ("average", "joint", "patches")
ADAPTER = "lora"
ADAPTER_PATCH = f"patched-{ADAPTER}-{HALF_DENSITY}"


@dataclass(frozen=True)
class Task:
    """A new task: where its tuned model, its training text and its statistics are in the cache."""

    name: str
    tuned: str
    data: str
    stats: str
    patched: str  # with density SINGLE_DENSITY

    @property
    def patch_file(self) -> str:
        """The patch at HALF_DENSITY."""
        return f"{self.name}-{HALF_DENSITY}.safetensors"

    @property
    def applied(self) -> str:
        """The base with that patch alone."""
        return f"applied-{self.name}-{HALF_DENSITY}"


# The first pair, its statistics and its patched model are those of benchmarks.real.
UNICODE = Task(NEW_TASK, "tuned", "train.jsonl", "stats", patch_folder(*DEFAULT_PATCH))
BYTECODE = Task(
    bytecode.TASK, "tuned-bytecode", "train-bytecode.jsonl", "stats-bytecode", f"patched-bytecode-{SINGLE_DENSITY}"
)
TASKS = (UNICODE, BYTECODE)
NEW_TASKS = tuple(task.name for task in TASKS)


def merged_folder(method: str) -> str:
    """Return the folder of the model that holds both tasks' patches."""
    return f"merged-{method}"


def steps(keys: dict[str, str]) -> list[Step]:
    """Return the chain in order; paths are relative to the cache folder, `keys` says what each tuned model is."""
    chain = [
        calibrate_step("calibrate", UNICODE.tuned, UNICODE.data, UNICODE.stats, keys[UNICODE.tuned]),
        calibrate_step(BYTECODE.stats, BYTECODE.tuned, BYTECODE.data, BYTECODE.stats, keys[BYTECODE.tuned]),
        patch_step(*DEFAULT_PATCH, keys[UNICODE.tuned]),
        _patch(BYTECODE, SINGLE_DENSITY, ("-o", BYTECODE.patched), BYTECODE.patched, keys),
    ]
    for task in TASKS:
        to_file = ("--task", task.name, "--patch-file", task.patch_file)
        chain.append(_patch(task, HALF_DENSITY, to_file, task.patch_file, keys))
    for task in TASKS:
        arguments = ("apply", "base", task.patch_file, "-o", task.applied)
        chain.append(Step(task.applied, arguments, task.applied, keys[task.tuned]))
    chain += [_merge(method, keys) for method in METHODS]
    stats = f"stats-{ADAPTER}"
    chain.append(calibrate_step(stats, ADAPTER, UNICODE.data, stats, keys[ADAPTER], ("--base", "base")))
    options = ("--stats", stats, "--density", HALF_DENSITY, "-o", ADAPTER_PATCH)
    chain.append(Step(ADAPTER_PATCH, ("patch", "base", ADAPTER, *options), ADAPTER_PATCH, keys[ADAPTER]))
    return chain


def _patch(task: Task, density: str, options: tuple[str, ...], output: str, keys: dict[str, str]) -> Step:
    arguments = ("patch", "base", task.tuned, "--stats", task.stats, "--density", density, *options)
    return Step(output, arguments, output, keys[task.tuned])


def _merge(method: str, keys: dict[str, str]) -> Step:
    output = merged_folder(method)
    arguments = ["merge-multi", "base", *(task.patch_file for task in TASKS), "-o", output, "--method", method]
    if method != "patches":
        arguments += [part for task in TASKS for part in ("--tuned", task.tuned)]
    if method == "joint":
        arguments += [part for task in TASKS for part in ("--stats", task.stats)]
    return Step(output, tuple(arguments), output, "".join(keys[task.tuned] for task in TASKS))
