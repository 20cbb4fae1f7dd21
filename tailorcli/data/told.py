"""What a user is told of data: the form that was recognised, how much was drawn, the first sample as it is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailorcli.data.encoder import Encoder
from tailorcli.data.records import Records
from tailorcli.data.samples import Samples

_MOST_LINES, _MOST_CHARACTERS = 12, 1200


def facts_of(records: Records, samples: Samples, encoder: Encoder) -> dict[str, Any]:
    """Plain values: the records by form, and the samples, tokens and cuts of what was drawn of them."""
    return {
        "name": records.name,
        "files": records.num_files,
        "records": len(records),
        "forms": dict(records.forms),
        "framed": encoder.frames(records),
        "samples": len(samples.inputs),
        "tokens": samples.num_tokens,
        "cut": len(encoder.cuts),
    }


def in_words(facts: dict[str, Any]) -> str:
    """``facts_of`` as one line."""
    forms = facts["forms"]
    if len(forms) == 1:
        counts = f"{facts['records']:,} {_records(facts)} of {next(iter(forms))}"
    else:
        each = ", ".join(f"{count:,} of {form}" for form, count in forms.items())
        counts = f"{facts['records']:,} {_records(facts)}: {each}"
    where = f" in {facts['files']} files" if facts["files"] > 1 else ""
    framed = ", framed by the chat template" if facts["framed"] else ""
    cut = f"{facts['cut']:,} cut" if facts["cut"] else "none cut"
    return f"{facts['name']}: {counts}{where}{framed}; drawn {facts['samples']:,}, {facts['tokens']:,} tokens, {cut}"


def _records(facts: dict[str, Any]) -> str:
    return "record" if facts["records"] == 1 else "records"


def first_sample(samples: Samples, encoder: Encoder) -> list[str]:
    """The first sample as the model sees it, in lines: its tokens as text, special ones too, and its other inputs."""
    inputs = samples.inputs[0]
    lines: list[str] = []
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs and hasattr(encoder.tokenizer, "decode"):
            ids: Sequence[int] = inputs[name][0].tolist()
            text = encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            lines += [f"{name}, {len(ids):,} tokens:", *_shortened(str(text))]
    others = {name: tuple(value.shape) for name, value in inputs.items() if not name.endswith("input_ids")}
    return lines + [f"{name}: {list(shape)}" for name, shape in others.items()]


def _shortened(text: str) -> list[str]:
    """The beginning of a text in lines, each behind a bar; what is left out is counted."""
    shown = text[:_MOST_CHARACTERS].split("\n")[:_MOST_LINES]
    left = len(text) - len("\n".join(shown))
    return [f"  | {line}" for line in shown] + ([f"  ... and {left:,} characters more"] if left else [])
