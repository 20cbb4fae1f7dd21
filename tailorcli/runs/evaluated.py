"""An evaluation told where the model lies: a table in its card, and the figures in a file beside it.

Only cards that tailorcli wrote are touched. The file names the model that was measured by its fingerprint, so that it
is not taken for that of another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tailorcli.checkpoint.folder import CARD
from tailorcli.errors import CheckpointError
from tailorcli.files import as_output_error, read_json, write_text_atomically
from tailorcli.patchfile.report import EVALUATION_FILE, REPORT_FILE, load_report
from tailorcli.runs.card import code, read_card, with_evaluation
from tailorcli.typed import field_of, list_of, maybe, read_number, read_object, read_text

FORMAT_VERSION = 1
_ROLES = {"origin": "old tasks", "target": "new tasks", "h_score": "H"}


def write_cards(report: Mapping[str, Any]) -> dict[str, bool]:
    """Put an evaluation's table into the card of each of its models that has one of ours.

    ``report`` is what ``EvaluateReport.to_dict`` gives. Gives for each model's path whether its card was written.
    Raises OutputError.
    """
    done = {}
    for number, model in enumerate(report["models"]):
        folder = Path(model["path"])
        card = read_card(folder) if folder.is_dir() else None
        done[model["path"]] = card is not None
        if card is None:
            continue
        brief = brief_of(report, number)
        with suppress(CheckpointError):
            brief = with_ends(brief, load_report(folder / REPORT_FILE).inputs)
        try:
            write_text_atomically(folder / CARD, with_evaluation(card, card_lines(brief)))
            write_text_atomically(folder / EVALUATION_FILE, json.dumps(brief, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise as_output_error(folder, error) from error
    return done


def brief_of(report: Mapping[str, Any], number: int | None = None) -> dict[str, Any]:
    """The figures of an evaluation without its single items and without paths; ``number`` is the model in question."""
    names = [_short(model["name"]) for model in report["models"]]
    ends = {role: None if report.get(role) is None else _short(report[role]) for role in ("base", "tuned")}
    return {
        "format_version": FORMAT_VERSION,
        "command": "evaluate",
        "model": None if number is None else names[number],
        "fingerprint": None if number is None else report["models"][number]["fingerprint"],
        **ends,
        "tasks": {
            name: {key: facts.get(key) for key in ("kind", "role", "items", "percent_of")}
            for name, facts in report["tasks"].items()
        },
        "models": [
            {
                "name": name,
                "fingerprint": model.get("fingerprint"),
                "summary": {key: _figure(value) for key, value in model["summary"].items()},
                "tasks": {key: _figure(value) for key, value in model["tasks"].items()},
            }
            for name, model in zip(names, report["models"], strict=True)
        ],
    }


def with_ends(brief: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The evaluation with what was base and tuned to a run told by their fingerprints, where nobody has said."""
    marks = {model["fingerprint"]: model["name"] for model in brief["models"] if model.get("fingerprint")}
    found = {role: marks.get(inputs[role]["fingerprint"]) for role in ("base", "tuned") if role in inputs}
    return {**brief, **{role: brief[role] or name for role, name in found.items()}}


def _figure(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.get(key) for key in ("value", "interval")}


def _short(name: str) -> str:
    """A model's name; of a path, which names it where two folders have one name, the last two parts."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() or name.startswith("..") else name


def card_lines(brief: Mapping[str, Any]) -> list[str]:
    """A section of Markdown: a row for each model, old against new and H where the tasks have these roles."""
    models, own = brief["models"], brief["model"]
    has_roles = all(role in model["summary"] for role in _ROLES for model in models)
    columns = list(_ROLES.values()) if has_roles else [_name(name) for name in brief["tasks"]]
    lines = ["## Evaluation", "", f"| model | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for model in models:
        source, keys = (model["summary"], list(_ROLES)) if has_roles else (model["tasks"], list(brief["tasks"]))
        role = "base" if model["name"] == brief["base"] else "tuned" if model["name"] == brief["tuned"] else ""
        name = "**this model**" if model["name"] == own else _name(model["name"]) + (f" ({role})" if role else "")
        lines.append(f"| {name} | {' | '.join(_shown(source.get(key)) for key in keys)} |")
    said = ["", "Percent, with 95% intervals over the items."]
    if has_roles:
        said[-1] += " H is the harmonic mean of old and new: it is high only where both are."
    titles: dict[str | None, str] = {"origin": "Old", "target": "New", None: "Tasks"}
    for role_of, title in titles.items():
        named = [(name, facts) for name, facts in brief["tasks"].items() if facts["role"] == role_of]
        if named:
            told = ", ".join(f"{code(name)} ({facts['kind']}, {facts['items']:,} items)" for name, facts in named)
            said.append(f"{title}: {told}.")
    return [*lines, *said]


def _name(text: str) -> str:
    """A name in a table, letter for letter."""
    return code(text).replace("|", "\\|")


def _shown(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    interval = figure["interval"]
    return f"{figure['value']:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def read_evaluation(file: Path) -> dict[str, Any]:
    """The figures of an evaluation from what ``write_cards`` or ``evaluate -o`` wrote. Raises CheckpointError."""
    value = read_json(file)
    try:
        if value.get("command") != "evaluate":
            raise ValueError("it is no evaluation")
        for model in field_of(value, "models", list_of(read_object)):
            field_of(model, "name", read_text)
            field_of({"fingerprint": None, **model}, "fingerprint", maybe(read_text))
            for part in ("summary", "tasks"):
                for name in field_of(model, part, read_object):
                    field_of(model[part], name, _read_figure)
        for name in field_of(value, "tasks", read_object):
            for key in ("kind", "role"):
                field_of(field_of(value["tasks"], name, read_object), key, maybe(read_text))
        for role in ("base", "tuned"):
            field_of(value, role, maybe(read_text))
        for key in ("model", "fingerprint"):
            field_of({key: None, **value}, key, maybe(read_text))
        # What ``evaluate -o`` wrote has paths and single items besides.
        return value if "model" in value else brief_of(value)
    except ValueError as error:
        hint = "pass what tailorcli evaluate -o wrote"
        raise CheckpointError(f"{file} is no evaluation that can be read: {error}", hint) from error


def _read_figure(value: Any) -> Any:
    interval = list_of(read_number)(field_of(value, "interval", lambda found: found or []))
    if len(interval) not in (0, 2):
        raise ValueError("its interval has not two ends")
    return field_of(value, "value", maybe(read_number))
