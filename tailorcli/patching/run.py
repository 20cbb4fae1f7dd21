"""One object for all that a patch is worked on with: what the loop, the methods and propagation are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.grown import GrownCheckpoint, numel_of_base
from tailorcli.device import StageTimer
from tailorcli.options import PatchOptions
from tailorcli.patchfile.records import TensorRecord, fields_of
from tailorcli.patchfile.report import PatchReport
from tailorcli.patching.inputs import PatchInputs
from tailorcli.runs.divided import joined_records, shares_of_ranks
from tailorcli.runs.plan import TensorPlan
from tailorcli.runs.writing import Outputs, records_of
from tailorcli.terminal import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tailorcli.core.tailor import LayerResult
    from tailorcli.patching.methods import MaskOf


@dataclass(frozen=True)
class Run:
    """A patch or a score under way; ``records`` and ``copied`` alone change, by ``note``, ``write`` and ``copy_first``.

    ``options`` are resolved; ``outputs`` is None where nothing is written; ``masks`` gives a tensor's mask where all
    tensors had to be looked at first. ``holds_out`` keeps a tenth of the samples from propagation.
    """

    inputs: PatchInputs
    options: PatchOptions
    device: torch.device
    timer: StageTimer
    outputs: Outputs | None = None
    masks: MaskOf | None = None
    bar: Progress | None = None
    holds_out: bool = False
    records: dict[str, TensorRecord] = field(default_factory=dict)  # by every name under which a tensor is stored
    copied: set[str] = field(default_factory=set)  # names of tensors that are written before the others

    @property
    def wants_digest(self) -> bool:
        """Whether what is written needs the digest of a tensor's bytes in the base."""
        return self.outputs is not None and self.outputs.wants_digest

    def is_done(self, name: str) -> bool:
        """Whether a tensor is written: by an interrupted run, or by ``copy_first``."""
        return name in self.copied or (self.outputs is not None and name in self.outputs.done)

    def copy_first(self, tensors: Iterable[TensorPlan]) -> None:
        """Write those of ``tensors`` that stay at base: what is wrong with one is told before the long work."""
        for tensor in tensors:
            if tensor.action != "patch" and not self.is_done(tensor.name):
                self.write(tensor, None, "")
                self.copied.add(tensor.name)
        self.drain()

    def note(self, tensor: TensorPlan, result: LayerResult | None, facts: dict[str, Any] | None = None) -> TensorRecord:
        """Make and keep the record of a tensor, with further ``facts``."""
        record = record_of(tensor, result, self, facts or {})
        self.records.update(records_of(tensor.name, tensor.copies, record))
        return record

    def advance(self, tensor: TensorPlan) -> None:
        """A tensor is done: the progress says so."""
        if self.bar is not None:
            self.bar.update(tensor.nbytes)

    def write(
        self, tensor: TensorPlan, result: LayerResult | None, digest: str, facts: dict[str, Any] | None = None
    ) -> None:
        """Queue a tensor's final value, with its record; ``digest`` is that of the base's bytes."""
        assert self.outputs is not None
        base = self.inputs.base
        if isinstance(base, GrownCheckpoint) and tensor.name in base.grown:
            grown = {"note": f"the last {base.new_rows(tensor.name)} rows are new, and tuned's own"}
            facts = (facts or {}) | grown
        record = self.note(tensor, result, facts)
        with self.timer.stage("wait for write"):
            if result is None or result.patched is None or not record.patched:
                self.outputs.copy(tensor.name, base, record)
            else:
                stored = result.patched
                if result.mask is not None:
                    stored = base.encode(tensor.name, stored, result.mask)
                self.outputs.write(tensor.name, stored, result.mask, record, digest)
        self.advance(tensor)

    def written(self, name: str) -> Tensor | None:
        """The value of a tensor of ``done``; None where it cannot be read back."""
        assert self.outputs is not None
        value = self.outputs.read(name, self.inputs.base.output_tensors[name])
        return None if value is None else self.inputs.base.decoded(name, value)

    def drain(self) -> None:
        """Wait until everything is written."""
        assert self.outputs is not None
        with self.timer.stage("wait for write"):
            self.outputs.drain()
        self.timer.seconds["write"] = self.outputs.seconds

    def report(
        self, command: str, described: dict[str, dict[str, str]], started: float, own: Sequence[TensorPlan] = ()
    ) -> PatchReport:
        """What was done to each tensor of the base; ``described`` are the inputs, ``started`` is a perf_counter.

        Of several ranks each calls it, with the tensors that were its ``own``.
        """
        shares = shares_of_ranks(own, started)
        records = joined_records(self.records, self.outputs.records if self.outputs is not None else ())
        ordered = [records[name] for name in self.inputs.base.tensors]
        stages, seconds = dict(self.timer.seconds), perf_counter() - started
        return PatchReport(command, self.options.to_dict(), described, ordered, stages, seconds, ranks=shares)


def record_of(tensor: TensorPlan, result: LayerResult | None, run: Run, facts: dict[str, Any]) -> TensorRecord:
    """The report's entry for one tensor, with further ``facts``; one that fine-tuning did not change stays at base."""
    stats = run.inputs.stats
    frozen = result is not None and result.figures.zero_delta == result.figures.numel
    if run.options.method == "changed" and result is not None:  # there minus zero is not zero
        frozen = frozen and result.figures.kept == 0
    used = [stats.hessians[name] for name in tensor.hessians] if stats else []
    notes = [stats.tensors[tensor.name].note if stats is not None and used else "", tensor.note]
    found: dict[str, Any] = {
        "kind": used[0].kind if used else None,
        "tokens": min(info.tokens for info in used) if used else None,
        "experts": tensor.experts,
        "note": "; ".join(note for note in notes if note),
        "retain": tensor.retained_hessians,
    }
    if frozen:
        found["reason"] = "fine-tuning did not change it"
    elif result is not None:
        damping = result.figures.damping
        found |= fields_of(result.figures.to_dict())
        found["zero_delta"] -= tensor.numel - numel_of_base(run.inputs.base, tensor.name)  # rows that are new
        found["damped_further"] = damping is not None and damping > run.options.effective_damping
    return tensor.to_record(patched=tensor.action == "patch" and not frozen, **found | facts)
