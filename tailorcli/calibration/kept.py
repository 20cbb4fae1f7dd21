"""Samples that a model has written, kept for a run that is resumed: in one file, with what decides them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.calibration.stats import SAMPLES
from tailorcli.data.samples import Samples
from tailorcli.errors import CheckpointError, OutputError
from tailorcli.files import as_output_error, digest_of
from tailorcli.system import sync_path

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

_KEY, _FACTS, _DIGEST = "identity", "facts", "sha256"


def keep_samples(folder: Path, samples: Samples, identity: Mapping[str, Any]) -> None:
    """Write the samples into ``folder``, whole or not at all. Raises OutputError."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    values = {
        f"{number} {name}": value.contiguous() for number, s in enumerate(samples.inputs) for name, value in s.items()
    }
    part = folder / f"{SAMPLES}.part"
    try:
        facts = {_KEY: _text(identity), _FACTS: _text(samples.facts)}
        facts[_DIGEST] = digest_of(facts[_KEY].encode(), facts[_FACTS].encode(), save(values))
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(save(values, facts))
        sync_path(part)
        part.replace(folder / SAMPLES)
    except OSError as error:
        raise as_output_error(part, error) from error
    except SafetensorError as error:
        raise OutputError(f"cannot write {part}: {error}", "free some space") from error


def kept_samples(folder: Path, identity: Mapping[str, Any]) -> Samples | None:
    """The samples in ``folder`` that were written under the same identity; None where it holds none such, whole."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load, save

    file = folder / SAMPLES
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
        values = load(file.read_bytes())
        digest = digest_of(facts[_KEY].encode(), facts[_FACTS].encode(), save(values))
        if facts[_KEY] != _text(identity) or facts[_DIGEST] != digest:
            return None
        found: dict[int, Inputs] = {}
        for name, value in values.items():
            number, _, field = name.partition(" ")
            found.setdefault(int(number), {})[field] = value
        return Samples([found[number] for number in range(len(found))], json.loads(facts[_FACTS]))
    except (OSError, SafetensorError, CheckpointError, ValueError, KeyError):
        return None


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)
