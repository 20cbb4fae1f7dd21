"""The readers, each with a sound file made by the project itself that is to be mutated."""

import csv
import gzip
import json
import struct
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers import make_adapter, make_pair, make_tokenizer

from tailorcli import Checkpoint, PatchFile, Stats, calibrate_model, patch_checkpoint
from tailorcli.adapters.checkpoint import open_tuned
from tailorcli.checkpoint.folder import CARD
from tailorcli.checkpoint.journal import Journal
from tailorcli.checkpoint.quantized import quantization_config
from tailorcli.data.encoder import Encoder
from tailorcli.data.media import read_image, read_wav
from tailorcli.data.records import Record, read_records
from tailorcli.demo.text import read_jsonl
from tailorcli.display.inspection import inspect_path
from tailorcli.display.tables import inspection_parts
from tailorcli.display.web.pages import page_of
from tailorcli.display.web.shell import data_of
from tailorcli.evaluation.lm_eval import read_results
from tailorcli.evaluation.tasks import read_tasks
from tailorcli.models.config import num_positions, read_config, require_buildable
from tailorcli.patchfile.spool import spooled_earlier
from tailorcli.patching.graft import MaskFile
from tailorcli.runs.card import Source
from tailorcli.runs.outputs import Target
from tailorcli.training.importance import MANIFEST, SCORES, Importance
from tailorcli.training.importance import write as write_importance
from tailorcli.training.outcome import FinetuneReport, TensorChange

IDENTITY = {"tailorcli": "0", "density": 0.1}
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
TURNS = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]
FORMS = [
    {"question": "2 + 2 =", "answer": "4", "context": "sums"},
    {"instruction": "add", "input": "2 + 2", "output": "4", "system": "short", "history": [["a", "b"]]},
    {"conversations": TURNS, "system": "short", "tools": [{"name": "f", "parameters": {}}]},
    {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]},
    {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"},
    {"image": {"bytes": "iVBORw0KGgo=", "path": "i.png"}, "conversations": [{"from": "human", "value": "<image>x"}]},
]
TEMPLATE = "{% for m in messages %}{% if m['role'] == 'user' %}<u>{{ m['content'] | trim }}{% endif %}{% endfor %}"
FRONT = "---\nlicense: mit\nbase_model: [org/name]\ndatasets:\n- org/data\nlanguage: &a en\n---\n# A card\n"
_FIGURES = {key: {"value": 50.0, "interval": [40.0, 60.0]} for key in ("origin", "target", "h_score")}
_MODELS = [{"name": name, "summary": _FIGURES, "tasks": {"a": _FIGURES["origin"]}} for name in ("base", "out")]
EVALUATION = {
    **{"command": "evaluate", "model": "out", "fingerprint": "0", "base": "base", "tuned": None, "models": _MODELS},
    "tasks": {"a": {"kind": "text", "role": "origin", "items": 3}},
}


@dataclass(frozen=True)
class Case:
    """``file`` is mutated, also as JSON where ``json`` says "value", or "lines" of values; ``read`` reads it."""

    file: Path
    read: Callable[[], object]
    json: str = ""


def _inspect(path):
    inspection = inspect_path(path)
    inspection_parts(inspection)
    data_of(page_of(inspection))
    json.dumps(inspection.to_dict(), allow_nan=False, ensure_ascii=False).encode()


def _models(folder):
    pair = make_pair(folder / "pair", layers=1)
    make_pair(folder / "sharded", layers=1, shard="20KB")
    adapted = make_adapter(folder / "adapted", layers=1, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 4})
    calibrate_model(pair / "tuned", pair / "data.jsonl", pair / "stats")
    inputs = (pair / "base", pair / "tuned", pair / "out", pair / "stats")
    patch_checkpoint(*inputs, patch_file=folder / "p.safetensors")

    def config():
        found = read_config(pair / "base")
        num_positions(found), quantization_config(pair / "base"), require_buildable(pair / "base", found, 12)

    def checkpoint(path):
        with Checkpoint.open(path) as opened:
            opened.fingerprint()

    def adapter():
        with Checkpoint.open(adapted / "base") as base, open_tuned(adapted / "adapter", base) as tuned:
            tuned.fingerprint()

    def stats():
        _inspect(pair / "stats")
        Stats.open(pair / "stats").samples()

    def patch():
        _inspect(folder / "p.safetensors")
        with PatchFile.open(folder / "p.safetensors") as opened:
            opened.check()

    card, evaluation = folder / "card" / CARD, folder / "evaluation.json"
    card.parent.mkdir()
    card.write_text(FRONT)
    with Checkpoint.open(pair / "out") as opened:
        own = EVALUATION["models"][0] | {"fingerprint": opened.fingerprint()}
    evaluation.write_text(json.dumps(EVALUATION | {"models": [own, *EVALUATION["models"][1:]]}))
    identity = json.loads((pair / "out" / "tailor_run.json").read_text())["identity"]

    def finished():
        _inspect(pair / "out")
        Target(pair / "out", resume=True).finished(identity, "patch")

    return {
        "config": Case(pair / "base" / "config.json", config, "value"),
        "weights": Case(pair / "base" / "model.safetensors", lambda: checkpoint(pair / "base")),
        "index": Case(
            folder / "sharded/base/model.safetensors.index.json", lambda: checkpoint(folder / "sharded/base"), "value"
        ),
        "adapter config": Case(adapted / "adapter" / "adapter_config.json", adapter, "value"),
        "adapter weights": Case(adapted / "adapter" / "adapter_model.safetensors", adapter),
        "manifest": Case(pair / "stats" / "manifest.json", stats, "value"),
        "hessians": Case(pair / "stats" / "hessians.safetensors", stats),
        "samples": Case(pair / "stats" / "samples.safetensors", stats),
        "patch file": Case(folder / "p.safetensors", patch),
        "report": Case(pair / "out" / "tailor_report.json", lambda: _inspect(pair / "out"), "value"),
        "card": Case(card, lambda: Source.of(card.parent)),
        "evaluation": Case(evaluation, lambda: data_of(page_of(inspect_path(pair / "out"), evaluation)), "value"),
        "run record": Case(pair / "out" / "tailor_run.json", finished, "value"),
    }


def _lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def _tables(folder, records):
    """The records in every format that is no JSON, or compressed."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    files = [folder / f"table{suffix}" for suffix in (".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst")]
    for file, separator in zip(files, ",\t", strict=False):
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter=separator)
            writer.writerows([records[0], *(record.values() for record in records)])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), files[2])
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    files[3].write_bytes(gzip.compress(lines))
    files[4].write_bytes(zstandard.ZstdCompressor().compress(lines))
    return files


def _data(folder):
    records = [
        {"text": "a text"},
        {"prompt": "question", "response": "answer"},
        {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"prompt": "see", "response": "that", "images": ["i.png"]},
    ]
    encoder = Encoder(make_tokenizer(TEMPLATE))
    jsonl, listed = _lines(folder / "d.jsonl", records), folder / "d.json"
    listed.write_text(json.dumps(records))
    (folder / "d.txt").write_text("first\nsecond\n")
    choices = [{"prompt": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}]
    tasks = {"choice": choices, "generate": [{"prompt": "2 + 2 =", "response": ["4", "four"]}], "text": records[:2]}
    files = {kind: _lines(folder / f"{kind}.jsonl", values) for kind, values in tasks.items()}
    demo = _lines(folder / "demo.jsonl", records[:1] * 3)
    forms = _lines(folder / "forms.jsonl", FORMS)
    tables = _tables(folder, [{"question": "2 + 2 =", "answer": "4"}, {"question": "3", "answer": "a, b"}])
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)

    def encoded(path):
        for record in read_records(path):
            if not record.has_media:
                encoder.encode(record, 16)

    def rendered():
        tokenizer = make_tokenizer(template.read_text(encoding="utf-8", errors="replace"))
        Encoder(tokenizer).encode(Record("d:1", {"messages": MESSAGES}), 16)

    return {
        "records": Case(jsonl, lambda: encoded(jsonl), "lines"),
        "list of records": Case(listed, lambda: encoded(listed), "value"),
        "forms of records": Case(forms, lambda: encoded(forms), "lines"),
        **{f"table in {file.name}": Case(file, lambda file=file: encoded(file)) for file in tables},
        "text": Case(folder / "d.txt", lambda: encoded(folder / "d.txt")),
        **{
            f"task of {kind}": Case(file, lambda kind=kind, file=file: read_tasks([f"t={file}:{kind}"]), "lines")
            for kind, file in files.items()
        },
        "chat template": Case(template, rendered),
        "demo's data": Case(demo, lambda: read_jsonl(demo), "lines"),
    }


def _others(folder):
    import numpy as np
    import torch
    from PIL import Image

    journal = folder / "journal.jsonl"
    _lines(journal, [{"identity": IDENTITY}, {"name": "a", "record": {}}, {"name": "b", "record": {"kept": 1}}])
    spooled = folder / "p.rank1.journal"
    waits = {"sha256": "d", "coding": "bits", "kept": 2, "at": 0, "bytes": [2, 8]}
    _lines(
        spooled,
        [{"identity": IDENTITY}, {"name": "a", "record": {}, **waits}, {"name": "b", "record": {}, "sha256": "d"}],
    )
    (folder / "p.rank1.part").write_bytes(bytes(10))
    results = folder / "results.json"
    one = {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "t"}
    results.write_text(json.dumps({"results": {"t": one, "u": {**one, "f1,none": 0.1}}, "model_name": "m"}))
    with wave.open(str(folder / "s.wav"), "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(struct.pack("<400h", *range(400)))
    pixels = Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3))
    images = {kind: folder / f"i.{kind}" for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp")}
    for file in images.values():
        pixels.save(file)
    importance, report = folder / "importance", folder / "finetune.json"
    importance.mkdir()
    facts = {"base": {"path": "b", "fingerprint": "f"}, "parameters": {"a": "d"}, "unscored": {"b": "why"}}
    write_importance(importance, {"a": torch.rand(3, 4)}, facts)
    change = TensorChange("a", 12, 3, 0.5, 2.0)
    counts = (2, 3, 40, 30)
    made = FinetuneReport("o", "b", "full", *counts, [[1, 4.5]], [change], {}, 5, None, IDENTITY)
    report.write_text(json.dumps(made.to_dict()))
    masks = MaskFile(folder / "m.graft")
    masks.write({"a": torch.ones(9, dtype=torch.bool)}, IDENTITY)
    return {
        "importance": Case(importance / MANIFEST, lambda: Importance.open(importance), "value"),
        "scores": Case(importance / SCORES, lambda: Importance.open(importance).read("a")),
        "report of a fine-tune": Case(report, lambda: FinetuneReport.read(report), "value"),
        "journal of a rank": Case(spooled, lambda: spooled_earlier(folder / "p", IDENTITY), "lines"),
        "journal": Case(journal, lambda: Journal(journal).load(IDENTITY, folder), "lines"),
        "lm-eval": Case(results, lambda: read_results([results], ["t"], ["u"]), "value"),
        "sound": Case(folder / "s.wav", lambda: read_wav(folder / "s.wav", 16_000, "d:1")),
        **{kind: Case(file, lambda file=file: read_image(file, "d:1")) for kind, file in images.items()},
        "graft's masks": Case(masks.path, masks.identity),
    }


def make_cases(folder):
    """Every reader by name, with its sound file below ``folder``."""
    return {**_models(folder), **_data(folder), **_others(folder)}
