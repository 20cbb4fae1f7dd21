"""The tiny folders of every family load as real ones do, and what their processors make runs."""

import json
import wave

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, IMAGE_MARKS, SOUND_MARK, make_family_model, make_family_pair, outputs

TEXT = "A cat, 2 mats!"


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request, tmp_path_factory):
    return FAMILIES[request.param], make_family_pair(tmp_path_factory.mktemp("family"), request.param)


def load(folder):
    model_class = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def records(folder):
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def tokenizer_of(processor):
    return getattr(processor, "tokenizer", processor)


def encode(family, folder, processor, record):
    """Model inputs of a record, as plainly as its processor allows."""
    if family.kind == "text":
        return processor(record["text"], return_tensors="pt")
    if family.kind == "encoder-decoder":
        labels = processor(record["response"], return_tensors="pt")["input_ids"]
        return processor(record["prompt"], return_tensors="pt") | {"labels": labels}
    if family.kind == "speech":
        sound = sound_of(folder / record["audio"])
        return processor(audio=sound, text=record["response"], sampling_rate=16000, return_tensors="pt")
    if family.kind == "hearing":
        return heard(folder, processor, record)
    if "messages" in record:
        messages = json.loads(json.dumps(record["messages"]).replace("images/", f"{folder}/images/"))
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    images = [transformers.image_utils.load_image(str(folder / image)) for image in record.get("images", [])]
    if family.kind == "vision":
        return processor(images, return_tensors="pt")
    text = record.get("text") or record["prompt"] + record["response"]
    mark = IMAGE_MARKS.get(family.name, "")
    if images and mark not in text:
        text = mark + text
    if not images:  # PaliGemma's refuses it
        return tokenizer_of(processor)(text=text, return_tensors="pt")
    return processor(images=images, text=text, return_tensors="pt")


def sound_of(file):
    with wave.open(str(file)) as stream:
        assert (stream.getnchannels(), stream.getframerate()) == (1, 16000)
        return np.frombuffer(stream.readframes(stream.getnframes()), dtype="<i2") / 32768


def heard(folder, processor, record):
    """Model inputs of a record with sound in its text."""
    if "text" in record:
        return tokenizer_of(processor)(record["text"], return_tensors="pt")
    named = record.get("audio", "audio/6.wav")
    sounds = [sound_of(folder / name) for name in ([named] if isinstance(named, str) else named)]
    text = SOUND_MARK * len(sounds) + record.get("response", record.get("answer", "A"))
    return processor(text=text, audio=sounds, sampling_rate=16000, return_tensors="pt")


def test_folders_load_with_equal_outputs(made):
    family, folder = made
    model = make_family_model(family.name)
    expected = outputs(model, family)
    loaded = load(folder / "base")
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, family), expected)
    assert not torch.allclose(outputs(load(folder / "tuned"), family), expected, atol=1e-2)


def test_processors_load_and_their_inputs_run(made):
    family, folder = made
    auto = {"text": "AutoTokenizer", "encoder-decoder": "AutoTokenizer", "vision": "AutoImageProcessor"}
    processor = getattr(transformers, auto.get(family.kind, "AutoProcessor")).from_pretrained(folder / "base")
    if family.kind != "vision":
        tokenizer = tokenizer_of(processor)
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(TEXT)
        assert tokenizer.unk_token_id not in ids
        assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ") == TEXT
    model, lines = load(folder / "base"), records(folder)
    assert 12 <= len(lines) <= 16
    if family.kind != "vision":
        assert len(tokenizer) <= model.get_input_embeddings().num_embeddings
    for record in lines:
        with torch.no_grad():
            result = model(**encode(family, folder, processor, record))
        first = result.logits if "logits" in result else result.last_hidden_state
        assert torch.isfinite(first).all()


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.kind not in ("text", "encoder-decoder")])
def test_the_images_and_sounds_count(name):
    model, inputs = make_family_model(name), FAMILIES[name].inputs()
    key = "input_features" if "input_features" in inputs else "pixel_values"
    with torch.no_grad():
        before, after = model(**inputs), model(**inputs | {key: -inputs[key]})
    assert not torch.equal(before[0], after[0])


ONE_OF_EACH_KIND = {family.kind: name for name, family in FAMILIES.items()}.values()


@pytest.mark.parametrize(
    "name", [name if name in ONE_OF_EACH_KIND else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_half_precision_runs(name, tmp_path):
    folder = make_family_pair(tmp_path, name, dtype=torch.bfloat16)
    loaded = load(folder / "tuned")
    assert loaded.dtype == torch.bfloat16
    assert torch.isfinite(outputs(loaded, FAMILIES[name])).all()
