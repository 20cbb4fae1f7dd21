"""Run the same jobs with two checkouts of tailorcli and say which outputs are the same to the byte.

    python scripts/compare_outputs.py BEFORE AFTER [WORK]

BEFORE and AFTER are folders that hold a `tailorcli` package. On three tiny random pairs each of them calibrates,
patches (with a patch file), patches with propagation, applies and stitches, all in its own folder below WORK (else a
temporary one) and with the same relative paths, so that even the reports must agree. A line is printed for each
output: equal, or what differs. Times and versions are left aside. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

PAIRS = {"llama, float32": ("llama", "float32", None), "gpt2, bfloat16": ("gpt2", "bfloat16", None)}
PAIRS |= {"llama in shards, float16": ("llama", "float16", "15KB")}
PATCH = "patch inputs/base inputs/tuned --stats stats"
SECOND = "patch inputs/base inputs/second --stats second-stats"
JOBS = [
    "calibrate inputs/tuned --data inputs/data.jsonl -o stats",
    "calibrate inputs/second --data inputs/second.jsonl -o second-stats",
    "calibrate inputs/base --synthetic --num-samples 8 --seq-len 24 -o retain",
    f"{PATCH} -o patched --patch-file patch.safetensors",
    f"{PATCH} --retain retain -o propagated --patch-file propagated.safetensors",
    f"{SECOND} --patch-file second.safetensors",
    "apply inputs/base patch.safetensors -o applied",
    "merge-multi inputs/base patch.safetensors second.safetensors --method joint "
    "--tuned inputs/tuned --tuned inputs/second --stats stats --stats second-stats -o merged --patch-file "
    "merged.safetensors",
]
IDENTITIES = {"run", "identity"}  # what a run is resumed under, which is no result: each checkout has its own keys
PASSING = {"seconds", "stages", "peak_memory_bytes", "python", "platform", "tailorcli", "torch", "versions"}


def make_inputs(folder: Path, kind: str, dtype: str, shard: str | None) -> None:
    """A base, two tuned models and their data."""
    import torch
    from helpers import make_model, make_pair, make_tokenizer, perturb, write_data

    make_pair(folder, kind, dtype=getattr(torch, dtype), shard=shard)
    second = perturb(make_model(kind), seed=2).to(getattr(torch, dtype))
    second.save_pretrained(folder / "second")
    make_tokenizer().save_pretrained(folder / "second")
    write_data(folder / "second.jsonl", seed=1)


CHILD = """
import json, sys
from tailorcli.cli import app
for job in json.loads(sys.argv[1]):
    try:
        app(job.split())
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"failed: tailorcli {job}")
"""


def run_jobs(checkout: Path, folder: Path, inputs: Path) -> None:
    """All jobs, in one process that imports the package from ``checkout``."""
    folder.mkdir(parents=True)
    (folder / "inputs").symlink_to(inputs)
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, json.dumps(JOBS)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"with {checkout}: {done.stderr}")


def without_passing(value: Any) -> Any:
    """JSON without what may differ between two runs of the same job."""
    if isinstance(value, dict):
        return {key: without_passing(item) for key, item in value.items() if key not in PASSING}
    return [without_passing(item) for item in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """The places at which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if re.match(r"patch \d+", key) and at.rpartition(".")[2] in {"inputs", *IDENTITIES}:
                continue  # a patch file's fingerprint counts its header, and with it the run's identity
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{at}.{key}".lstrip("."))
            elif at.rpartition(".")[2] not in IDENTITIES:
                yield f"{at}.{key}".lstrip(".") + (" only before" if key in one else " only after")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{at}[{number}]")
    elif one != other:
        yield f"{at}: {str(one)[:40]} then, {str(other)[:40]} now"


def parts_of(file: Path) -> dict[str, Any]:
    """A safetensors file by its entries: each tensor's bytes, and JSON (metadata, a patch's own files) as values."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    parts = {key: json.loads(text) if text.startswith("{") else text for key, text in metadata.items()}
    for name, entry in header.items():
        raw = content[slice(*(start + offset for offset in entry["data_offsets"]))]
        is_json = name.startswith("file:") and name.endswith(".json")
        parts[name] = json.loads(raw) if is_json else [entry["dtype"], entry["shape"], raw.hex()]
    return parts


def compare_files(one: Path, other: Path) -> list[str]:
    """What differs between two files; an empty list where nothing does."""
    if one.read_bytes() == other.read_bytes():
        return []
    if one.suffix == ".json":
        both = (without_passing(json.loads(file.read_text())) for file in (one, other))
        return list(differences(*both))
    if one.suffix == ".safetensors":
        both = (without_passing(parts_of(file)) for file in (one, other))
        return list(differences(*both))
    return ["its bytes"]


def files_of(folder: Path) -> set[str]:
    """Relative names of all that the jobs wrote."""
    places = (place.relative_to(folder) for place in folder.rglob("*") if place.is_file())
    return {str(place) for place in places if place.parts[0] != "inputs"}


def compare_folders(before: Path, after: Path) -> dict[str, list[str]]:
    """File -> what differs."""
    found: dict[str, list[str]] = {}
    for name in sorted(files_of(before) | files_of(after)):
        if (before / name).exists() and (after / name).exists():
            found[name] = compare_files(before / name, after / name)
        else:
            found[name] = ["it is only there " + ("before" if (before / name).exists() else "after")]
    return found


def main(before: Path, after: Path, work: Path) -> int:
    """Run everything and print the lines."""
    wrong = 0
    for title, (kind, dtype, shard) in PAIRS.items():
        folder = work / title.replace(", ", "-").replace(" ", "-")
        make_inputs(folder / "inputs", kind, dtype, shard)
        for name, checkout in (("before", before), ("after", after)):
            run_jobs(checkout, folder / name, folder / "inputs")
        for file, found in compare_folders(folder / "before", folder / "after").items():
            wrong += bool(found)
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            print(f"{title}: {file}: " + ("; ".join(found[:3]) + more if found else "equal"))
    print(f"{wrong} outputs differ" if wrong else "all outputs are equal")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    checkouts = [Path(argument).resolve() for argument in sys.argv[1:3]]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(sys.argv[3]).resolve() if len(sys.argv) == 4 else Path(temporary)
        raise SystemExit(main(*checkouts, place))
