"""Where the samples of a calibration come from: drawn from a data file, or written by the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import tokenizer_folder
from tailorcli.adapters.interpolated import original
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.data.records import read_records
from tailorcli.data.samples import Samples, draw_samples
from tailorcli.data.told import facts_of, first_sample, in_words
from tailorcli.device import device_errors
from tailorcli.errors import OptionsError, note
from tailorcli.files import PathLike, write_text
from tailorcli.models.config import processor_folder
from tailorcli.models.empty import empty_on_meta, most_tokens
from tailorcli.models.loading import load_encoder, load_model
from tailorcli.options import CalibrateOptions
from tailorcli.terminal import Progress
from tailorcli.units import format_bytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Source:
    """What the samples are made of: the model, its config, the options, and the files that were named."""

    stored: Checkpoint  # from which the network is loaded
    tuned: Checkpoint  # the same, but for an adapter
    config: dict[str, Any]
    options: CalibrateOptions
    data: Path | None
    held_out: Path | None  # takes further samples of those that the model writes
    announce: Callable[[str], None] | None = None  # told of the form, the records and the cuts
    show: Callable[[str], None] | None = None  # shown the first sample


def drawn(source: Source) -> Samples:
    """Samples of the data by the model's own tokenizer or processor; a tokenizer may lie with an adapter.

    Raises TailorError.
    """
    data, stored, options = source.data, source.stored, source.options
    assert data is not None
    folder = tokenizer_folder(original(source.tuned))
    records = read_records(data, options.text_mode, columns=options.columns)
    if options.text_mode == "chunk" and not records.is_plain_text:
        raise OptionsError(f"--text-mode chunk is for plain text, and {data} holds records", "leave it out")
    has_media = records.has_media
    seq_len = min(options.length, most_tokens(stored, source.config, options))
    encoder = load_encoder(processor_folder(folder, stored.path, has_media), stored.path, has_media, options)
    cut = replace(options, seq_len=seq_len)
    samples = draw_samples(data, records, encoder.encode, cut, encoder.responses.runs, encoder.responses.following)
    if encoder.cuts:
        lost = sum(before - after for before, after in encoder.cuts)
        why = f"--seq-len {seq_len}" if seq_len == options.length else f"the model's {seq_len} positions"
        share = f"{lost:,} of their {sum(before for before, _ in encoder.cuts):,} tokens are left out"
        note(f"{data}: {len(encoder.cuts)} of {len(samples.inputs)} samples are longer than {why} and are cut: {share}")
    facts = facts_of(records, samples, encoder)
    if source.announce is not None:
        source.announce(in_words(facts))
    if source.show is not None:
        for line in first_sample(samples, encoder):
            source.show(line)
    return replace(samples, told=facts)


def check_source(data: PathLike | None, options: CalibrateOptions, held_out: PathLike | None) -> None:
    """Something to make samples of is named, and a file for further ones only where they are. Raises OptionsError."""
    if data is None and not options.synthetic:
        raise OptionsError(
            "no calibration data given", "pass --data FILE, or --synthetic to let the model write its own"
        )
    if options.synthetic and options.text_mode == "chunk":
        raise OptionsError("--text-mode chunk is for data to read, not for what the model writes", "leave it out")
    if held_out is not None:
        if not options.synthetic:
            raise OptionsError("--held-out is for samples that the model writes", "pass --synthetic, or leave it out")
        if Path(held_out).suffix != ".jsonl":
            raise OptionsError(f"--held-out must name a .jsonl file, got {held_out}", "name it written.jsonl")


def self_written(source: Source, device: torch.device, progress: bool) -> tuple[Samples, list[dict[str, Any]]]:
    """Samples that the model writes itself, and records of the held-out ones; it is loaded for that alone, then freed.

    Raises OptionsError for an adapter, and for a model that does not fit the device.
    """
    from tailorcli.calibration.synthetic import (
        encode_starts,
        read_starts,
        require_writer,
        to_records,
        with_source,
        write_samples,
    )

    stored, config, data, held_out = source.stored, source.config, source.data, source.held_out
    require_room(source, device)
    options = replace(source.options, seq_len=min(source.options.length, most_tokens(stored, config, source.options)))
    records = None if data is None else read_starts(data, source.options.columns)
    network = load_model(stored, config, options)
    has_media = records is not None and records.has_media
    begun = ("input_ids", "pixel_values") if has_media else ("input_ids",)
    require_writer(network, begun)  # before its tokenizer, which a vision model has none of
    encoder = load_encoder(stored.path, stored.path, has_media, options)
    network.to(device)
    further = replace(options, seed=options.seed + 1, num_samples=(options.num_samples + 1) // 2)
    runs = [options] if held_out is None else [options, further]
    total = sum(run.num_samples for run in runs) * (options.length - 1)
    further_records: list[dict[str, Any]] = []
    with device_errors("a smaller --seq-len"), Progress("writing", total, "tokens", shown=progress) as bar:
        for run in runs:
            starts = encode_starts(records, encoder, run) if records is not None else []
            found = write_samples(network, encoder.tokenizer, run, device, bar, starts, encoder.media.ids)
            if run is options:
                samples = found
            else:
                further_records = to_records(found, starts, encoder.tokenizer)
    if data is not None and records is not None:
        samples = with_source(samples, data, records)
    return samples, further_records


def require_room(source: Source, device: torch.device) -> None:
    """Raise OptionsError for a model that cannot write samples: an adapter, or one that does not fit ``device``."""
    from tailorcli.device import free_memory

    stored = source.stored
    if stored is not source.tuned:
        raise OptionsError(
            "--synthetic is for the model that must not forget, and this is an adapter", "calibrate its base"
        )
    free = free_memory(device)
    if free is not None and stored.nbytes > free:
        raise OptionsError(
            f"{stored.path} takes {format_bytes(stored.nbytes)}, {format_bytes(free)} are free on {device}: it cannot "
            "write samples there",
            "pass --data FILE, which goes block by block",
        )


def require_writing(source: Source, device: torch.device) -> None:
    """Raise TailorError for a model that cannot write samples, before it is loaded."""
    from tailorcli.calibration.synthetic import require_writer

    require_room(source, device)
    require_writer(empty_on_meta(source.stored, source.config, source.options))


def write_jsonl(records: list[dict[str, Any]], file: Path) -> None:
    """A JSON object a line, whole or not at all. Raises OutputError."""
    write_text(file, "".join(json.dumps(record) + "\n" for record in records))
