"""Samples that a model writes itself: calibrate --synthetic."""

import json
from pathlib import Path

import pytest
import torch
from families import make_family_pair
from helpers import make_model, make_tokenizer, read_tensors, refused, run

from tailorcli import Checkpoint, PatchOptions, TailorError, calibrate_model, evaluate_models, patch_checkpoint
from tailorcli.calibration.stats import Stats
from tailorcli.calibration.synthetic import encode_starts, read_starts, write_samples
from tailorcli.models.config import read_config
from tailorcli.models.loading import load_encoder, load_model
from tailorcli.options import CalibrateOptions


def options(**chosen):
    return CalibrateOptions(**{"synthetic": True, "num_samples": 6, "seq_len": 10, **chosen})


class NoBar:
    def __init__(self):
        self.count = 0

    def update(self, count):
        self.count += count


def write(kind="llama", tokenizer=None, **chosen):
    bar = NoBar()
    network = make_model(kind).eval()
    found = write_samples(network, tokenizer or make_tokenizer(), options(**chosen), torch.device("cpu"), bar)
    assert bar.count == sum(sample["input_ids"].numel() - 1 for sample in found.inputs)
    return torch.cat([sample["input_ids"] for sample in found.inputs])  # (N, T): all are equally long


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_seed_decides_the_samples(kind):
    first = write(kind)
    assert first.shape == (6, 10)
    assert torch.equal(write(kind), first)
    assert not torch.equal(write(kind, seed=1), first)


@pytest.mark.parametrize(("num_samples", "seq_len"), [(1, 1), (5, 1), (40, 3), (33, 2)])
def test_number_and_length_of_the_samples(num_samples, seq_len):
    assert write(num_samples=num_samples, seq_len=seq_len).shape == (num_samples, seq_len)


def test_as_many_samples_as_fit_are_written_at_a_time(monkeypatch):
    """By the model and the device, not by what happens to be free."""
    from tailorcli.calibration import synthetic
    from tailorcli.models import generation

    batches, original = [], synthetic._continued

    def counting(network, begun, *arguments):
        batches.append(len(begun))
        return original(network, begun, *arguments)

    monkeypatch.setattr(synthetic, "_continued", counting)
    assert write(num_samples=70, seq_len=6).shape == (70, 6)
    config = make_model().config
    kept = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    one = 2 * kept * 6 * 4 + 4 * 4 * config.vocab_size  # keys and values of 6 tokens in float32, logits a few times
    monkeypatch.setattr(generation, "_CPU_ROOM", 40 * one + 1)
    assert write(num_samples=70, seq_len=6).shape == (70, 6)
    monkeypatch.setattr(generation, "_CPU_ROOM", 1)
    assert write(num_samples=3, seq_len=6).shape == (3, 6)
    assert batches == [70, 40, 30, 1, 1, 1]


def test_layers_whose_heads_differ_in_size_count_by_their_own():
    """As Gemma 4's do: transformers refuses to say one size for all."""
    import transformers

    from tailorcli.models.generation import _bytes_of_sample

    config = transformers.Gemma4TextConfig(
        vocab_size=116, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=116,
        hidden_size_per_layer_input=4, per_layer_config={1: {"head_dim": 16}},
    )  # fmt: skip
    with torch.device("meta"):
        network = transformers.Gemma4ForCausalLM(config)
    assert _bytes_of_sample(network, 10) == 2 * (8 + 16) * 10 * 4 + 16 * 116


@pytest.mark.parametrize("static", [True, False])
def test_keys_and_values_lie_in_memory_that_is_allocated_once_and_the_tokens_are_the_same(static):
    from transformers.cache_utils import StaticCache

    from tailorcli.models.generation import sampling_generation

    network, ids, found, caches = make_model().eval(), torch.tensor([[5], [9], [17]]), [], []
    network._can_compile_fullgraph = static  # how transformers says that a model of its own can do with that
    network.register_forward_hook(lambda _, args, kwargs, out: caches.append(out.past_key_values), with_kwargs=True)
    for wanted in (True, False):
        torch.manual_seed(3)
        with torch.no_grad(), sampling_generation(network, 9, static=wanted) as settings:
            mask = torch.ones_like(ids)
            found.append(network.generate(input_ids=ids, attention_mask=mask, generation_config=settings))
        assert isinstance(caches[-1], StaticCache) == (wanted and static)
    assert torch.equal(*found)


def test_no_sample_starts_with_a_special_token():
    """Nor with a token that has no row in the embedding; every ordinary one comes up."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "a", "additional_special_tokens": ["b"]})
    tokenizer.add_tokens(["beyond"] + [f"beyond{i}" for i in range(10)])  # of which the model has no rows
    starts = set(write(tokenizer=tokenizer, num_samples=3000, seq_len=1).reshape(-1).tolist())
    special = set(tokenizer.convert_tokens_to_ids(["<pad>", "<unk>", "a", "b"]))
    assert starts == set(range(97)) - special


def test_a_sample_goes_on_behind_the_end_of_a_text():
    network = make_model().eval()
    network.generation_config.eos_token_id = list(range(2, 100))
    network.generation_config.max_length = 3
    network.generation_config.temperature = 1e-3
    own = network.generation_config
    found = write_samples(network, make_tokenizer(), options(), torch.device("cpu"), NoBar())
    assert torch.equal(torch.cat([sample["input_ids"] for sample in found.inputs]), write())
    assert network.generation_config is own


def test_samples_are_drawn_from_the_models_own_distribution():
    """The second tokens' frequencies against the probabilities that the model gives them."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [chr(code) for code in range(33, 127)]})  # but " "
    network = make_model().eval()
    with torch.no_grad():
        network.lm_head.weight.mul_(40.0)  # far from uniform
        expected = network(input_ids=torch.tensor([[2]])).logits[0, -1].softmax(-1)
    chosen = options(num_samples=2000, seq_len=2)
    found = write_samples(network, tokenizer, chosen, torch.device("cpu"), NoBar())
    ids = torch.cat([sample["input_ids"] for sample in found.inputs])
    assert (ids[:, 0] == 2).all()
    counts = torch.bincount(ids[:, 1], minlength=100) / 2000
    assert float((counts - expected).abs().sum()) < 0.3  # of 2 at most
    assert float(expected.max()) > 0.05


def test_the_state_of_the_random_numbers_is_left_alone(llama_pair, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    calibrate_model(llama_pair / "base", None, tmp_path / "stats", options())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_tensor_gets_statistics_whatever_the_batch_size(kind, request, tmp_path):
    pair = request.getfixturevalue(f"{kind}_pair")
    found = []
    for size in (1, 4):
        report = calibrate_model(pair / "base", None, tmp_path / str(size), options(batch_size=size))
        assert (report.samples, report.tokens, report.uncalibrated) == (6, 60, {})
        found.append(Stats.open(tmp_path / str(size)))
    one, four = found
    assert one.tensors == four.tensors
    for name in one.hessians:
        expected = one.load(name)
        torch.testing.assert_close(four.load(name), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_manifest_says_that_the_samples_are_the_models_own(llama_pair, tmp_path):
    calibrate_model(llama_pair / "base", None, tmp_path / "stats", options(seed=3))
    manifest = Stats.open(tmp_path / "stats").manifest
    assert manifest["data"] == {
        "file": None,
        "synthetic": True,
        "samples": 6,
        "tokens": 60,
        "seed": 3,
        "seq_len": 10,
    }
    assert manifest["options"]["synthetic"] is True
    shown = run("inspect", tmp_path / "stats").stdout
    assert "None" not in shown
    assert "wrote the samples itself" in shown


def test_samples_are_no_longer_than_the_positions_that_the_model_knows(gpt2_pair, tmp_path):
    report = calibrate_model(
        gpt2_pair / "base", None, tmp_path / "stats", CalibrateOptions(synthetic=True, num_samples=3)
    )
    assert report.tokens == 3 * 64
    assert Stats.open(tmp_path / "stats").manifest["data"]["seq_len"] == 64


def test_block_by_block_is_the_same(llama_pair, tmp_path):
    calibrate_model(llama_pair / "base", None, tmp_path / "whole", options())
    calibrate_model(llama_pair / "base", None, tmp_path / "blocks", options(blockwise="always"))
    whole, blocks = Stats.open(tmp_path / "whole"), Stats.open(tmp_path / "blocks")
    for name in whole.hessians:
        expected = whole.load(name)
        torch.testing.assert_close(blocks.load(name), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_half_precision_models_write_samples(llama_pair, tmp_path):
    report = calibrate_model(llama_pair / "base", None, tmp_path / "stats", options(dtype="bfloat16"))
    assert report.tokens == 60


def test_what_the_terminal_says(llama_pair, tmp_path):
    base = llama_pair / "base"
    done = run("calibrate", base, "--synthetic", "--num-samples", 4, "--seq-len", 8, "-o", tmp_path / "stats")
    assert done.stdout.startswith("4 samples that the model wrote itself, 32 tokens: ")
    assert f"--retain {tmp_path / 'stats'}" in done.stderr
    report = json.loads(
        run("calibrate", base, "--synthetic", "--num-samples", 2, "-o", tmp_path / "s", "--json").stdout
    )
    assert report["tokens"] == 512  # 256 each, unless asked for otherwise


# --- Samples that begin with records ------------------------------------------------------------------------------


def write_lines(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def begun_with(folder, records, ends=(), **chosen):
    """The samples that the model of ``folder``, which ends a text with ``ends``, writes behind the records."""
    chosen = options(**chosen)
    path = write_lines(folder / "starts.jsonl", *records)
    encoder = load_encoder(folder, folder, any("images" in record for record in records), chosen)
    starts = encode_starts(read_starts(path), encoder, chosen)
    network = load_model(Checkpoint.open(folder), read_config(folder), chosen)
    network.generation_config.eos_token_id = list(ends) or None
    bar = NoBar()
    found = write_samples(network, encoder.tokenizer, chosen, torch.device("cpu"), bar, starts, encoder.media.ids)
    assert found.facts["tokens"] == found.num_tokens
    return found.inputs, encoder, bar.count


def test_a_prompt_is_answered_to_the_end_of_text_and_a_text_goes_on_behind_it(llama_pair):
    ends = set(range(4, 60))
    records = [{"prompt": "ab", "response": "x"}, {"text": "yz"}]
    samples, encoder, _ = begun_with(llama_pair / "base", records, ends, num_samples=20, seq_len=40)
    lengths = set()
    for sample in samples:
        ids = sample["input_ids"][0].tolist()
        if encoder.tokenizer.convert_ids_to_tokens(ids[:2]) == ["y", "z"]:
            assert len(ids) == 40
            assert ends & set(ids[2:-1])
        else:
            assert ids[-1] in ends or len(ids) == 40
            assert not ends & set(ids[2:-1])
            lengths.add(len(ids))
    assert len(lengths) > 1


def test_further_samples_are_a_task(llama_pair, tmp_path):
    """Half as many, of the next seed; those that are calibrated on stay the same; evaluate reads them."""
    base, file = llama_pair / "base", tmp_path / "written.jsonl"
    common = ("--synthetic", "--num-samples", 9, "--seq-len", 12, "--held-out", file)
    calibrate_model(base, None, tmp_path / "alone", options(num_samples=9, seq_len=12))
    run("calibrate", base, *common, "-o", tmp_path / "stats")
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    ids = write(num_samples=5, seq_len=12, seed=1)  # a model of the same weights
    assert texts == [make_tokenizer().decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()]
    one, two = (Stats.open(tmp_path / name) for name in ("alone", "stats"))
    assert all(torch.equal(one.load(name), two.load(name)) for name in one.hessians)
    starts = write_lines(tmp_path / "starts.jsonl", {"prompt": "ab"}, {"text": "yz"})
    run("calibrate", base, *common, "--data", starts, "-o", tmp_path / "more", "--overwrite")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 5
    assert {record["prompt"] for record in records if "prompt" in record} == {"ab"}
    assert all(record["text"].startswith("yz") for record in records if "text" in record)
    assert "written" in run("evaluate", base, "--task", f"written={file}:text").stdout


def test_held_out_samples_name_their_pictures(tmp_path):
    folder = make_family_pair(tmp_path, "llava")
    starts, _ = write_pictures(folder)
    file = tmp_path / "written.jsonl"
    calibrate_model(folder / "base", starts, tmp_path / "s", options(seq_len=60), held_out=file)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(Path(path).is_file() for record in records for path in record["images"])
    report = evaluate_models([folder / "base"], [f"written={file}:text"])
    assert len(report.scores["base"]["written"].count) == 3


def test_messages_with_pictures_are_answered(tmp_path):
    """The pictures reach the model, no prompt or answer of the record is in what it writes, and a task has them all."""
    folder = make_family_pair(tmp_path, "llava")
    pictures = [json.loads(line)["images"] for line in write_pictures(folder)[0].read_text().splitlines()]
    told = [[{"type": "image", "path": name} for name in names] for names in pictures]
    asked = [{"role": "user", "content": [*parts, {"type": "text", "text": "who"}]} for parts in told]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "zzzz"}]}
    starts = write_lines(folder / "starts.jsonl", *({"messages": [turn, answer]} for turn in asked))
    file = tmp_path / "written.jsonl"
    calibrate_model(folder / "base", starts, tmp_path / "s", options(seq_len=60), held_out=file)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(Path(path).is_file() for record in records for path in record["images"])
    assert all(record["prompt"].endswith("ASSISTANT:") and "who" in record["prompt"] for record in records)
    assert not any("zzzz" in text for record in records for text in (record["prompt"], record["response"]))
    assert all("pixel_values" in sample for sample in Stats.open(tmp_path / "s").samples())
    report = evaluate_models([folder / "base"], [f"written={file}:text"])
    assert len(report.scores["base"]["written"].count) == 3


def test_a_run_that_fails_leaves_no_held_out_samples_in_the_way_of_the_next(llama_pair, tmp_path, monkeypatch):
    import tailorcli.calibration.calibrate as module

    file = tmp_path / "written.jsonl"
    given = (llama_pair / "base", None, tmp_path / "s", options())
    with monkeypatch.context() as patched:
        patched.setattr(module, "collect_whole", lambda *_: (_ for _ in ()).throw(TailorError("no memory")))
        with pytest.raises(TailorError, match="no memory"):
            calibrate_model(*given, held_out=file)
    assert not file.exists()
    with pytest.raises(TailorError, match="its folder is not there"):  # before the work, not after it
        calibrate_model(*given, held_out=tmp_path / "nowhere" / "written.jsonl")
    calibrate_model(*given, held_out=file)
    assert len(file.read_text().splitlines()) == 3


def test_only_written_samples_are_held_out(llama_pair, tmp_path):
    base, data = llama_pair / "base", llama_pair / "data.jsonl"
    stats = tmp_path / "stats"
    assert "--synthetic" in refused("calibrate", base, "--data", data, "--held-out", "a.jsonl", "-o", stats)
    assert ".jsonl" in refused("calibrate", base, "--synthetic", "--held-out", tmp_path / "a.txt", "-o", stats)
    missing = tmp_path / "none" / "a.jsonl"
    message = refused("calibrate", base, "--synthetic", "--seq-len", 4, "--held-out", missing, "-o", stats)
    assert "cannot write" in message
    assert not (stats / "manifest.json").exists()


def test_a_sample_goes_on_behind_its_prompt(llama_pair):
    records = [
        {"prompt": "ab", "response": "never read"},
        {"text": "xyz"},
        {"prompt": "cdef", "completion": "nor this"},
    ]
    samples, encoder, written = begun_with(llama_pair / "base", records, num_samples=7)
    assert [sample["input_ids"].shape for sample in samples] == [(1, 10)] * 7
    texts = [encoder.tokenizer.convert_ids_to_tokens(sample["input_ids"][0].tolist()) for sample in samples]
    prompts = [list("ab"), list("xyz"), list("cdef")]
    begins = [next(i for i, prompt in enumerate(prompts) if text[: len(prompt)] == prompt) for text in texts]
    assert sorted(begins[:3]) == [0, 1, 2]  # every record before any comes again
    assert begins[3:] == [*begins[:3], begins[0]]
    assert written == sum(10 - len(prompts[i]) for i in begins)
    assert not torch.equal(samples[0]["input_ids"], samples[3]["input_ids"])  # the same prompt, another draw


@pytest.mark.parametrize("ends", [(), range(4, 60)], ids=["no end", "many ends"])
def test_prompts_of_any_lengths_are_answered_together_as_each_would_be_alone(llama_pair, monkeypatch, ends):
    """Of a model so sure that a draw is the likeliest token."""
    from tailorcli.calibration import synthetic

    rows, original = [], synthetic._continued

    def sure(network, begun, *arguments):
        rows.append(len(begun))
        network.lm_head.weight.mul_(1e4)
        written = original(network, begun, *arguments)
        network.lm_head.weight.div_(1e4)
        return written

    monkeypatch.setattr(synthetic, "_continued", sure)
    records = [{"prompt": "abcdefghijkl"[: 1 + 3 * number]} for number in range(4)]
    given = {"ends": ends, "num_samples": 4, "seq_len": 20}
    together, _, count = begun_with(llama_pair / "base", records, **given)
    assert rows == [4]
    assert count == 4 * 20 - sum(len(record["prompt"]) for record in records)
    alone = [
        begun_with(llama_pair / "base", [record], ends=ends, num_samples=1, seq_len=20)[0][0] for record in records
    ]
    assert sorted(row["input_ids"].tolist() for row in together) == sorted(row["input_ids"].tolist() for row in alone)
    assert len({row["input_ids"].shape[1] for row in together}) == (1 if not ends else 4)


def test_a_prompt_longer_than_the_sample_is_cut_to_leave_a_token(llama_pair):
    samples, encoder, written = begun_with(llama_pair / "base", [{"prompt": "abcdefghijklmnop"}], num_samples=2)
    assert written == 2
    start = encoder.tokenizer("abcdefghi", add_special_tokens=False)["input_ids"]
    assert samples[0]["input_ids"][0, :9].tolist() == start


def write_pictures(folder):
    """The pictures of a family's data, a record each, and how many these are."""
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    pictures = [{"images": record["images"]} for record in records if "images" in record]
    return write_lines(folder / "starts.jsonl", *pictures), len(pictures)


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("gemma3", "instructblip")]


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", *SLOW])
def test_a_model_writes_behind_pictures(family, tmp_path):
    """Its vision tower is reached; no token that stands for an image is written; the manifest names the file."""
    folder = make_family_pair(tmp_path, family)
    file, count = write_pictures(folder)
    report = calibrate_model(folder / "base", file, folder / "retained", options(seq_len=60, num_samples=9))
    assert (report.samples, report.tokens) == (9, 9 * 60)
    vision = [name for name in read_tensors(folder / "base") if "vision" in name or "visual" in name]
    assert not set(vision) & set(report.uncalibrated)
    facts = Stats.open(folder / "retained").manifest["data"]
    assert (facts["file"], facts["records"], facts["synthetic"]) == (str(file), count, True)
    again = calibrate_model(folder / "base", file, folder / "again", options(seq_len=60, num_samples=9))
    assert again.hessians == report.hessians
    one, two = (Stats.open(folder / name) for name in ("retained", "again"))
    assert all(torch.equal(one.load(name), two.load(name)) for name in one.hessians)


def test_the_retain_term_reaches_the_vision_tower(tmp_path):
    folder = make_family_pair(tmp_path, "llava")
    file, _ = write_pictures(folder)
    run("calibrate", folder / "base", "--synthetic", "--data", file, "--seq-len", 60, "-o", folder / "retained")
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    given = (folder / "base", folder / "tuned", folder / "out", folder / "stats", PatchOptions(propagate=False))
    patched = patch_checkpoint(*given, retain=folder / "retained")
    drifts = [record.drift for record in patched.tensors if "vision" in record.name and record.drift is not None]
    assert drifts


def test_starts_that_are_none(llama_pair, tmp_path):
    base, stats = llama_pair / "base", tmp_path / "stats"

    def refused_start(*records):
        file = write_lines(tmp_path / "starts.jsonl", *records)
        return refused("calibrate", base, "--synthetic", "--data", file, "-o", stats)

    assert "starts.jsonl:1: its messages" in refused_start({"messages": [{"role": "assistant", "content": "x"}]})
    assert "no chat template" in refused_start({"messages": [{"role": "user", "content": "x"}]})
    assert "starts.jsonl:2 has audio" in refused_start({"text": "x"}, {"audio": "sound.wav"})
    assert "has the fields ['answer']" in refused_start({"answer": "x"})
    assert '"prompt" is a int' in refused_start({"prompt": 3})
    assert "processor" in refused_start({"images": ["none.png"]})
    assert "no record gives a single token" in refused_start({"text": ""})
    assert not (stats / "manifest.json").exists()


# --- What is refused ----------------------------------------------------------------------------------------------


def test_data_or_synthetic(llama_pair, tmp_path):
    base, stats = llama_pair / "base", tmp_path / "stats"
    usage = run("calibrate", base, "-o", stats, expect=2)
    assert "--synthetic" in usage.stderr
    with pytest.raises(TailorError, match="no calibration data given"):
        calibrate_model(base, None, stats)
    assert "num_samples must be at least 1" in refused(
        "calibrate", base, "--synthetic", "--num-samples", 0, "-o", stats
    )
    assert not stats.exists()


@pytest.mark.parametrize("family", ["t5", "bart", "vit", "dinov2", "whisper", "instructblip"])
def test_models_that_continue_no_text(family, tmp_path):
    folder = make_family_pair(tmp_path, family)
    message = refused("calibrate", folder / "base", "--synthetic", "-o", folder / "stats")
    assert "cannot write its own samples" in message
    assert "--data FILE" in message
    assert not (folder / "stats" / "manifest.json").exists()


def test_a_model_that_cannot_be_sampled_from(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    message = refused("calibrate", tmp_path / "base", "--synthetic", "--seq-len", 5, "-o", tmp_path / "stats")
    assert "cannot be sampled from" in message


def test_a_tokenizer_without_ordinary_tokens():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [chr(code) for code in range(32, 127)]})
    with pytest.raises(TailorError, match="no ordinary tokens"):
        write(tokenizer=tokenizer)


def test_a_folder_without_a_tokenizer(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    assert "tokenizer" in refused("calibrate", tmp_path / "base", "--synthetic", "-o", tmp_path / "stats")


# --- Multimodal models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llava", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2.5-vl", "gemma3"))]
)
def test_a_multimodal_model_writes_text_alone(family, tmp_path):
    """Its vision tower is not reached: listed, and patched without the retain term."""
    folder = make_family_pair(tmp_path, family)
    report = calibrate_model(folder / "base", None, folder / "retained", options())
    names = set(read_tensors(folder / "base"))
    vision = {name for name in names if "vision" in name or "visual" in name or "projector" in name}
    assert vision
    assert vision <= set(report.uncalibrated)
    assert all(report.uncalibrated.values())
    assert any("layers.0.self_attn.q_proj" in name for name in names - set(report.uncalibrated))
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    patched = patch_checkpoint(
        folder / "base", folder / "tuned", folder / "out", folder / "stats", retain=folder / "retained"
    )
    for record in patched.to_dict()["tensors"]:
        if record["status"] == "patched" and record["name"] in report.uncalibrated:
            assert "without the retain term: no retained statistics" in record["note"]
            assert record["drift"] is None
