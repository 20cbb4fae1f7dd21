"""Distil a patch file: its teachers run once, then its kept entries are trained in the patched model."""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, config_folder
from tailorcli.adapters.interpolated import original
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import GrownCheckpoint
from tailorcli.data.samples import held_out as held_out_samples
from tailorcli.device import free_memory
from tailorcli.distributed import ranks
from tailorcli.errors import DataError, OptionsError, note
from tailorcli.models.blockwise import skeleton_if_too_large
from tailorcli.models.config import read_config
from tailorcli.models.generation import end_token_ids, media_token_ids
from tailorcli.models.loading import load_model
from tailorcli.models.names import aliases, expected_names
from tailorcli.models.parts import adapt, load_from_view
from tailorcli.models.places import Place, map_names
from tailorcli.models.running import to_device
from tailorcli.models.skeleton import load_weights
from tailorcli.models.spill import HIDDEN_SHARE, Spill
from tailorcli.options import CalibrateOptions, DistillOn, DistillOptions
from tailorcli.patchfile.reader import PatchFile
from tailorcli.system import give_back_memory
from tailorcli.terminal import Progress
from tailorcli.training.distill import (
    NEW,
    RETAINED,
    History,
    Material,
    distill,
    held_out,
    in_batches,
    kept_shares,
    mean_of,
)
from tailorcli.training.entries import Trained, entries_of
from tailorcli.training.state import load_state, save_state
from tailorcli.training.teachers import Teacher, check_head, teach, teach_blockwise

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

SAVING_SHARE = 0.1  # of the time at most: a state is as large as the model


@dataclass(frozen=True)
class Distilled:
    """What a run gave: the values of each trained tensor's kept entries in the stored dtype, and how it went."""

    values: dict[str, Tensor]
    history: History
    untrained: dict[str, str]  # tensors of the patch that kept their values, each with the reason


@dataclass(frozen=True)
class Teaching:
    """Who teaches the patched models of ``base``, and where and how all of these run.

    ``teachers`` are fine-tuned models with their statistics, whose samples are of their tasks, and ``retain`` those of
    ``base``. A patched model runs as the first of them does. ``shares`` are the weights of several teachers among each
    other, equal without. Hidden states that outgrow the host's memory wait in files in the folder ``scratch``.
    """

    base: Checkpoint
    teachers: Sequence[tuple[Checkpoint, Stats]]
    retain: Stats
    device: torch.device
    trust_remote_code: bool = False
    scratch: Path | None = None
    progress: bool = False
    shares: Sequence[float] = ()

    def distill(
        self, file: PatchFile, options: DistillOptions, state: Path, materials: dict[str, Material] | None = None
    ) -> Distilled:
        """Train the kept entries of ``file``, a patch of the base, towards each teacher on its samples.

        ``state`` is where an interrupted run is taken up, and where this one leaves its own; ``materials`` what the
        teachers say, where they have run. Raises TailorError.
        """
        if materials is None:
            materials = self.materials(options)
        trained, untrained, media = self.student(file)
        network, device = trained.network, self.device
        before = kept_shares(network, materials, media, device)
        earlier = load_state(state, trained) if state.exists() else {}
        saved, took = perf_counter(), 0.0
        with Progress("distilling", options.known_steps, "steps", shown=self.progress) as bar:
            bar.start_at(earlier.get("start", 0))

            def advance(step: int, held_new: float, held_retained: float) -> None:
                bar.update()
                bar.note(f"held out: {held_new:.4f} new, {held_retained:.4f} retained")

            def save(step: int, history: History, best: dict[str, Tensor]) -> None:
                nonlocal saved, took
                if not ranks().first:  # all have the same
                    return
                began = perf_counter()
                if (began - saved) * SAVING_SHARE < took:
                    return
                save_state(state, step, history, trained.state(), best)
                saved = perf_counter()
                took = saved - began

            history = distill(trained, materials, options, device, media, save=save, advance=advance, **earlier)
        values = _rounded(trained, self.base, file)
        tasks, history.rounded_retained = held_out(network, materials, media, device)
        history.rounded_new = mean_of(tasks, materials)
        after = kept_shares(network, materials, media, device)
        history.kept = {f"{kind}_before": share for kind, share in before.items()} | after
        trained.close()
        return Distilled(values, history, untrained)

    def kept(self, file: PatchFile, materials: dict[str, Material]) -> dict[str, float]:
        """What the patched model keeps of the teachers' accuracy on the held-out samples: see ``kept_shares``.

        Raises TailorError.
        """
        trained, _, media = self.student(file)
        trained.close()
        return kept_shares(trained.network, materials, media, self.device)

    def divergences(self, file: PatchFile, materials: dict[str, Material]) -> dict[str, float]:
        """How far the patched model is from its one teacher and the base, in nats a token: "new" and "retained".

        Raises TailorError.
        """
        trained, _, media = self.student(file)
        trained.close()
        tasks, retained = held_out(trained.network, materials, media, self.device)
        return {NEW: tasks[0], RETAINED: retained}

    def materials(self, options: DistillOptions) -> dict[str, Material]:
        """Run every teacher once over its samples, of several ranks each over its own; the models are gone after that.

        A model that does not fit goes block by block. Raises TailorError.
        """
        waiting = None
        if self.scratch is not None:
            self.scratch.mkdir(parents=True, exist_ok=True)
            cpu = torch.device("cpu")
            free = free_memory(cpu)
            waiting = Spill(cpu, self.scratch, sys.maxsize if free is None else int(HIDDEN_SHARE * free))

        def keep(states: Tensor) -> Tensor:
            held = states.to("cpu", copy=True)  # no view of what is larger
            return held if waiting is None else waiting.out(held)

        _give_back()  # a patch that was propagated before leaves its models in circles of references
        own = self.base.stored if isinstance(self.base, GrownCheckpoint) else self.base
        sources = [*self.teachers, (own, self.retain)]
        materials: dict[str, Material] = {}
        total = sum(len(stats.samples()) for _, stats in sources)
        with Progress("teachers", total, "samples", shown=self.progress) as bar:
            for number, (model, stats) in enumerate(sources, 1):
                samples, is_base = stats.samples(), number == len(sources)
                kind = RETAINED if is_base else NEW if len(self.teachers) == 1 else f"{NEW} {number}"
                counted = counted_tokens(stats, options, needed=not is_base)
                share = 1.0 if is_base or not self.shares else self.shares[number - 1]
                split = partial(Material.split, samples, options=options, responses=counted, share=share)
                teacher = self._teach(model, stats, samples, bar.update, keep, split)
                materials[kind] = split(teacher)
                bar.update(len(samples) - len(materials[kind].own))
                _give_back()
        return materials

    def held_out_materials(self, batch_size: int) -> dict[str, Material]:
        """What the one teacher and the base say of the samples that ``data.samples.held_out`` takes of each kind.

        Raises TailorError.
        """
        found = {}
        for kind, (model, stats) in ((NEW, self.teachers[0]), (RETAINED, (self.base, self.retain))):
            samples = held_out_samples(stats.samples())
            said = self._teach(model, stats, samples, lambda _: None, lambda states: states.cpu().clone())
            found[kind] = Material(samples, said, [], in_batches(samples, range(len(samples)), batch_size))
            _give_back()
        return found

    def student(self, file: PatchFile) -> tuple[Trained, dict[str, str], tuple[int, ...]]:
        """The patched model, run as the first teacher is, tensors that cannot be trained, and media's token ids.

        Raises TailorError.
        """
        base, device = self.base, self.device
        tuned, stats = self.teachers[0]
        how = stats.run_options(self.trust_remote_code)
        network, places = _network(base, base, how, config_folder(tuned), device)
        if any(parameter.dtype == torch.float16 for parameter in network.parameters()):
            note(f"{base.path} runs in float16, in which gradients vanish: trained in float32, written as it is stored")
            network = network.float()
        entries, untrained = [], {}
        for name in file.tensors:
            reason = _why_not(places.get(name))
            if reason:
                untrained[name] = reason
            else:
                given = (base.read(name), file.mask(name), file.values(name), device)
                entries.append(entries_of(name, places[name], *given))
        if not entries:
            raise OptionsError("no tensor of this patch can be trained", "leave --distill out")
        whole = {name: _patched(file, base, name) for name in untrained if name in places and places[name].parameters}
        if whole:  # through transformers' conversion, as the output is loaded
            load_weights(network, whole, device)
        return Trained(network, entries), untrained, tuple(media_token_ids(network))

    def _teach(
        self,
        model: Checkpoint,
        stats: Stats,
        samples: list[Inputs],
        advance: Callable[[int], object],
        keep: Callable[[Tensor], Tensor],
        split: Callable[[Teacher], Material] | None = None,
    ) -> Teacher:
        """What one model, run as its statistics were made, says of samples; it is loaded for that, and gone after it.

        With ``split``, which needs no more of a teacher than its ends, of those alone that are this rank's own.
        """
        options, device = stats.run_options(self.trust_remote_code), self.device
        stored = self.base if isinstance(model, AdaptedCheckpoint) else model
        skeleton = skeleton_if_too_large(stored, read_config(stored.path), options, device)
        network = _network(stored, model, options, None, device)[0] if skeleton is None else skeleton
        unasked = Teacher([], nn.Identity(), end_token_ids(network))
        places = [*range(len(samples))] if split is None else split(unasked).own
        chosen = [samples[place] for place in places]
        if skeleton is None:
            bare = check_head(network, to_device(samples[0], device))
            teacher = teach(network, chosen, device, advance, keep, bare)
        else:
            note(f"{original(model).path} does not fit with room to spare: it runs block by block")
            where = Path(tempfile.gettempdir()) if self.scratch is None else self.scratch
            teacher = teach_blockwise(skeleton, stored, model, chosen, device, where, advance, keep)
        states = dict(zip(places, teacher.states, strict=True))
        return replace(teacher, states=[states.get(place, torch.empty(0)) for place in range(len(samples))])


def counted_tokens(stats: Stats, options: DistillOptions, *, needed: bool) -> list[Tensor] | None:
    """The tokens of each sample that count, (1, T) bool; None where all do. Raises DataError where none has a response.

    Of samples without any responses, as those that a model wrote itself, all tokens count unless they are ``needed``.
    """
    if options.on != DistillOn.RESPONSES:
        return None
    samples, masks = stats.samples(), stats.responses()
    if all("decoder_input_ids" in sample for sample in samples):  # all that is predicted is a response
        return None
    if all(mask is None for mask in masks):
        if not needed:
            return None
        what = f"no sample of {stats.path} has a response that is known"
        raise DataError(
            what, 'calibrate on records of "prompt" and "response", or of messages; or leave --distill-on out'
        )
    ids = [sample["input_ids"] for sample in samples]
    return [torch.zeros_like(i, dtype=torch.bool) if m is None else m for i, m in zip(ids, masks, strict=True)]


def _network(
    stored: Checkpoint, tuned: Checkpoint, options: CalibrateOptions, folder: Path | None, device: torch.device
) -> tuple[Any, dict[str, Place]]:
    """A model with its weights on the device, and the place of each checkpoint tensor in it."""
    load = load_from_view if isinstance(stored, GrownCheckpoint) else load_model  # its files lack the new rows
    network = load(stored, read_config(folder or stored.path), options, folder)
    expected = expected_names(network, stored.tensors)
    places = map_names(stored, dict(network.named_parameters()), aliases(network), expected)
    if isinstance(tuned, AdaptedCheckpoint):
        adapt(network, tuned, places)
    return network.to(device), places


def _give_back() -> None:
    gc.collect()
    give_back_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _why_not(place: Place | None) -> str:
    """Why a tensor is not trained; empty where it is."""
    if place is None or not place.parameters:
        return "the loaded model has no parameter for it"
    return "the loaded model splits it over several parameters" if len(place.parameters) > 1 else ""


def _patched(file: PatchFile, base: Checkpoint, name: str) -> Tensor:
    """A tensor with the patch in it, in the base's dtype."""
    value = base.read(name)
    value[file.mask(name)] = file.values(name)
    return value


def _rounded(trained: Trained, base: Checkpoint, file: PatchFile) -> dict[str, Tensor]:
    """The values as they will be stored, which the network then holds, too: what is written is what was measured."""
    values = {}
    for each in trained.entries:
        values[each.name] = each.values.to(each.stored).cpu()
        if base.dequantized:
            value, mask = base.read(each.name), file.mask(each.name)
            value[mask] = values[each.name]
            values[each.name] = base.rounded(each.name, value, mask)[mask]
        each.values.copy_(values[each.name].to(each.values))
    trained.put()
    return values
