"""The command ``check``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tailorcli.cli.arguments import OUTPUT, AsJson, Base, Quiet, TrustRemoteCode, Tuned, Verbose, flag
from tailorcli.cli.output import print_json, print_rich, say, show_reasons
from tailorcli.units import format_share

if TYPE_CHECKING:
    from tailorcli.patching.compare import Comparison, TensorChange


def check(
    base: Base,
    tuned: Tuned,
    tensors: Annotated[
        bool, flag("--tensors", help="Show every tensor, not only kinds of layer and depth.", panel=OUTPUT)
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """See whether two models belong together, and what fine-tuning changed.

    In seconds, from headers and a sample of the weights; no model is run. It ends with the command to go on with, and
    with exit code 1 where the two cannot be patched.

    Examples:
      tailorcli check BASE TUNED
      tailorcli check org/base org/tuned --json
    """
    from tailorcli.patching.compare import compare_models

    found = compare_models(base, tuned, trust_remote_code=trust_remote_code)
    command = _next(found, base, tuned)
    if as_json:
        print_json(found.to_dict() | {"next": command})
        return
    from tailorcli.display.summary import facts_table

    facts = {"base": _told(found.base, base), "tuned": found.adapter or _told(found.tuned, tuned)}
    facts |= {"architecture": found.architecture, "tokenizer": found.tokenizer}
    facts |= {"differs": "; ".join(found.told)} if found.told else {}
    facts |= {"needs": " ".join(found.needs)} if found.needs else {}
    print_rich(facts_table(facts), *_tables(found, tensors))
    for line in ["", *_verdict(found)]:
        say(line)
    show_reasons(dict.fromkeys(found.untouched, "no sampled entry moved"), "untouched", err=False)
    share = format_share(found.sampled / max(1, found.numel))
    say(f"All from headers and {found.sampled:,} sampled entries ({share} of the weights); no model was run.")
    say(f"next: {command}")
    say(f"{found.seconds:.1f} s", err=True)


def _told(facts: dict[str, str], given: Path) -> str:
    where = facts.get("hub") or str(given)
    return f"{where}: {int(facts['weights']):,} weights in {facts['tensors']} tensors, {facts['dtypes']}"


def _tables(found: Comparison, every_tensor: bool) -> list[object]:
    """The change by kind of layer and by depth, or tensor by tensor."""
    from tailorcli.display.names import short_names
    from tailorcli.display.summary import new_table, short_count, summary_tables

    def weights(group: list[TensorChange]) -> str:
        return short_count(sum(tensor.numel for tensor in group))

    def moved(group: list[TensorChange]) -> str:
        return format_share(sum(t.numel * t.moved / t.sampled for t in group) / sum(t.numel for t in group))

    def change(group: list[TensorChange]) -> str:
        squares = [sum(t.numel / t.sampled * part(t) for t in group) for part in (_delta_sq, _base_sq)]
        return format_share((squares[0] / squares[1]) ** 0.5) if squares[1] else "-"

    def directions(group: list[TensorChange]) -> str:
        known = [(t.directions, t.most_directions) for t in group if t.directions is not None]
        if not known:
            return "-"
        return f"{max(d or 0 for d, _ in known)} of {max(m or 0 for _, m in known)}"

    columns = [("weights", weights), ("moved", moved), ("change", change), ("directions", directions)]
    if every_tensor:
        table = new_table("every tensor", "tensor", [name for name, _ in columns])
        by_name = {tensor.name: tensor for tensor in found.tensors}
        for name, shown in short_names(by_name).items():
            table.add_row(shown, *(figure([by_name[name]]) for _, figure in columns))
        return [table]
    return list(
        summary_tables(
            found.tensors, columns, lambda t: t.name, lambda t: len(t.shape) == 1, depth=columns[:3] + columns[3:]
        )
    )


def _delta_sq(tensor: TensorChange) -> float:
    return tensor.delta_sq


def _base_sq(tensor: TensorChange) -> float:
    return tensor.base_sq


def _verdict(found: Comparison) -> list[str]:
    """What sort of fine-tuning it looks like, and what can be said of forgetting."""
    kinds = {
        "adapter": "A LoRA adapter: all other weights are the base's.",
        "low rank": f"It looks like a merged LoRA adapter: {found.low_rank} directions hold 99% of the change.",
        "sparse": "A sparse change: trained so, or in steps so small that rounding to the dtype undid most of them.",
        "partial": "Some layers were trained and others left alone.",
        "full": "A full fine-tune: every kind of layer was trained.",
    }
    moved, change = format_share(found.moved), format_share(found.change)
    told = "Some tokens have other ids in tuned's tokenizer: rows stand for different tokens, which a patch mixes."
    return [
        *([told] if "under other ids" in found.tokenizer else []),
        f"{kinds[found.kind]} {moved} of the entries moved; the change is {change} of the weights in size.",
        "How much was forgotten the weights do not tell, texts of old tasks do: tailorcli evaluate.",
        "(For scale: in the pair of tailorcli demo the change is 8% in size, and 29% of the old accuracy were lost.)",
    ]


def _next(found: Comparison, base: Path, tuned: Path) -> str:
    pair = [str(base), str(tuned)]
    return shlex.join(["tailorcli", "patch", *pair, *found.needs, "--data", "NEW_TASK.jsonl", "-o", "OUT"])
