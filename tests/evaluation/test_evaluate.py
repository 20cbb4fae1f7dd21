"""Evaluation: figures against a plain loop over items, one at a time; what is refused; the command line."""

import base64
import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers as tr
from families import DECODER, GROUPED, VOCAB, make_family_pair
from helpers import make_adapter, make_model, make_pair, make_tokenizer, perturb, run, swap_two_letters

from tailorcli import EvaluateOptions, TailorError, TaskScores, encode_task, evaluate_models, evaluate_network, h_score
from tailorcli.data.encoder import Encoder
from tailorcli.data.records import check_record, read_records
from tailorcli.evaluation import metrics
from tailorcli.evaluation.metrics import Roles, bootstrap, compare, estimate, from_error, summarise
from tailorcli.evaluation.predict import _Reader
from tailorcli.evaluation.tasks import normalise, parse_task, read_tasks
from tailorcli.models.config import read_config
from tailorcli.models.loading import load_encoder, load_model
from tailorcli.training.examples import encode_example


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def choice_records(count=9):
    """Answers of one token, and of several; the lengths differ."""
    endings = (["a", "b", "c"], ["yes", "no", "perhaps it is"], [" up", " down"])
    return [{"prompt": f"Item {i}: ", "choices": endings[i % 3], "answer": endings[i % 3][i % 2]} for i in range(count)]


def pair_records(count=7):
    return [{"prompt": "x" * (i % 3) + f"Q{i} ", "response": "Answer " + "z" * (i % 4)} for i in range(count)]


def evaluate(network, spec, encoder=None, **options):
    """The scores of an in-memory network on one task."""
    settings = EvaluateOptions(**options)
    (task,) = read_tasks([spec])
    encoded = encode_task(task, encoder or Encoder(make_tokenizer()), settings)
    return evaluate_network(network, {task.name: encoded}, settings)[task.name], encoded


def log_probs(network, ids):
    with torch.no_grad():
        return network(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


# Figures against a plain loop


@pytest.fixture
def text_file(tmp_path):
    texts = [{"text": "Some words, " * (1 + i % 3) + str(i)} for i in range(6)]
    return write(tmp_path / "text.jsonl", texts + pair_records())


@pytest.fixture
def choice_file(tmp_path):
    return write(tmp_path / "choice.jsonl", choice_records())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_is_scored_as_in_a_plain_loop(text_file, kind):
    network, tokenizer = make_model(kind).double().eval(), make_tokenizer()
    scores, _ = evaluate(network, f"t={text_file}:text")
    for i, record in enumerate(map(json.loads, text_file.read_text().splitlines())):
        first = len(tokenizer(record["prompt"])["input_ids"]) if "prompt" in record else 1
        ids = tokenizer(record.get("text") or record["prompt"] + record["response"])["input_ids"]
        likely = log_probs(network, ids)[:-1][first - 1 :]
        wanted = torch.tensor(ids[first:])
        assert scores.count[i] == len(wanted) == len(ids) - first
        assert scores.correct[i] == (likely.argmax(1) == wanted).sum()
        assert scores.loss[i] == pytest.approx(-float(likely.gather(1, wanted[:, None]).sum()), rel=1e-6)
    assert scores.accuracy == pytest.approx(100 * scores.correct.sum() / scores.count.sum())
    assert scores.mean_loss == pytest.approx(scores.loss.sum() / scores.count.sum())


@pytest.mark.parametrize("kind", ["choice", "choice-raw"])
def test_choices_are_scored_as_in_a_plain_loop(choice_file, kind):
    network, tokenizer = make_model().double().eval(), make_tokenizer()
    with torch.no_grad():
        network.lm_head.weight.mul_(20)  # a spread that lengths do not outweigh
    scores, encoded = evaluate(network, f"c={choice_file}:{kind}")
    expected = []
    for record in map(json.loads, choice_file.read_text().splitlines()):
        prompt = tokenizer(record["prompt"])["input_ids"]
        likely = []
        for choice in record["choices"]:
            tail = tokenizer(choice)["input_ids"]
            steps = log_probs(network, prompt + tail)[len(prompt) - 1 : -1]
            total = float(steps.gather(1, torch.tensor(tail)[:, None]).sum())
            likely.append(total / (len(choice.strip()) if kind == "choice" else 1))
        expected.append(record["choices"][int(np.argmax(likely))] == record["answer"])
    assert scores.correct.tolist() == expected
    assert 0 < scores.correct.sum() < len(expected)
    # Choices of one token share the pass over their prompt.
    assert [len(item.rows) for item in encoded.items[:3]] == [1, 3, 2]
    assert scores.mean_loss is None


def naive_greedy(network, tokenizer, prompt, most):
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(most):
        ids = [*ids, int(log_probs(network, ids)[-1].argmax())]
    return tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :])


def test_answers_are_those_of_a_plain_greedy_loop(tmp_path):
    network, tokenizer = make_model().eval(), make_tokenizer()
    network.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=2.0)
    own = network.generation_config
    prompts = ["Q one ", "Q two ", "A longer one: "]
    written = [naive_greedy(network, tokenizer, prompt, 6) for prompt in prompts]
    answers = [[written[0].upper() + " ."], "something else", ["no", f"  {written[2]}"]]
    records = [{"prompt": p, "response": a} for p, a in zip(prompts, answers, strict=True)]
    file = write(tmp_path / "g.jsonl", records)
    scores, _ = evaluate(network, f"g={file}:generate", max_new_tokens=6)
    assert list(scores.outputs) == [text.strip() for text in written]
    assert scores.correct.tolist() == [1, 0, 1]
    assert network.generation_config is own


def test_what_was_before_a_prompt_is_framed_or_refused(tmp_path):
    """With every kind; an answer is the assistant's turn, with what ends it."""
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = {"prompt": "Q", "system": "S", "history": [["q", "a"]]}
    items = {
        "text": {"response": "AB"},
        "choice": {"choices": ["AB", "AC"], "answer": 1},
        "generate": {"response": "A"},
    }
    head = "<system>S|<user>q|<assistant>a|<user>Q|<assistant>"
    for kind, more in items.items():
        (task,) = read_tasks([f"t={write(tmp_path / 't.jsonl', [asked | more])}:{kind}"])
        encoder = Encoder(make_tokenizer(template))
        (item,) = encode_task(task, encoder, EvaluateOptions()).items
        texts = [encoder.tokenizer.decode(row.inputs["input_ids"][0]).replace(" ", "") for row in item.rows]
        answers = [encoder.tokenizer.decode(row.wanted[0]).replace(" ", "") for row in item.rows]
        expected = {"text": ["AB|"], "choice": ["AB|", "AC|"], "generate": [""]}[kind]
        assert (texts, answers) == ([head + answer for answer in expected], expected)
        with pytest.raises(TailorError, match=r't\.jsonl:1 has "system" and "history" beside its prompt'):
            encode_task(task, Encoder(make_tokenizer()), EvaluateOptions())


def test_an_answer_ends_with_its_first_line_or_the_end_of_text(tmp_path):
    from families import seq2seq_tokenizer

    tokenizer = seq2seq_tokenizer()  # knows a line break and an end of text
    newline, end = tokenizer.convert_tokens_to_ids(["\n", "</s>"])
    succession = {"a": newline, "b": end}  # "q" -> newline -> "a" -> newline; "p" -> "b" -> end
    after = {**{tokenizer.convert_tokens_to_ids(k): v for k, v in succession.items()}}
    after |= {tokenizer.convert_tokens_to_ids(k): tokenizer.convert_tokens_to_ids(v) for k, v in {"p": "b"}.items()}
    after |= {tokenizer.convert_tokens_to_ids("q"): newline, newline: tokenizer.convert_tokens_to_ids("a")}
    config = tr.LlamaConfig(**GROUPED | {"eos_token_id": end, "hidden_size": 128, "num_hidden_layers": 1})
    network = tr.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.model.embed_tokens.weight[:, :VOCAB] = torch.eye(VOCAB)
        network.model.norm.weight.fill_(1.0)
        for token, following in after.items():
            network.lm_head.weight[following, token] = 1.0
    file = write(tmp_path / "g.jsonl", [{"prompt": "q", "response": "A."}, {"prompt": "p", "response": "b"}])
    scores, _ = evaluate(network, f"g={file}:generate", Encoder(tokenizer))
    assert scores.outputs == ("a", "b")
    assert scores.correct.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["text", "choice", "generate"])
def test_the_batch_size_changes_nothing(tmp_path, text_file, choice_file, kind):
    generate = write(tmp_path / "g.jsonl", [{"prompt": f"Q{i % 10} ", "response": "x"} for i in range(11)])
    file = {"text": text_file, "choice": choice_file, "generate": generate}[kind]
    network = make_model()
    alone, together = (evaluate(network, f"t={file}:{kind}", batch_size=size)[0] for size in (1, 16))
    assert alone.correct.tolist() == together.correct.tolist()
    assert alone.outputs == together.outputs
    np.testing.assert_allclose(alone.loss, together.loss, rtol=1e-5)


def make_scaled():
    """Logits are scaled and shifted behind the output layer."""
    config = tr.CohereConfig(**GROUPED | {"tie_word_embeddings": True, "logit_scale": 0.0625})
    return tr.CohereForCausalLM(config)


def make_capped():
    config = tr.Gemma2Config(
        **GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "final_logit_softcapping": 0.2}
    )
    return tr.Gemma2ForCausalLM(config)


@pytest.mark.parametrize("make", [make_scaled, make_capped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_behind_the_output_layer_counts(text_file, make, dtype):
    torch.manual_seed(0)
    network = make().to(dtype).eval()
    scores, _ = evaluate(network, f"t={text_file}:text")
    text = json.loads(text_file.read_text().splitlines()[0])["text"]
    ids = make_tokenizer()(text)["input_ids"]
    likely = log_probs(network, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    assert scores.loss[0] == pytest.approx(-float(likely.sum()), rel=1e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize(("make", "ends"), [(make_model, True), (make_scaled, False), (make_capped, False)])
def test_a_look_at_the_network_tells_whether_its_output_layer_ends_it(text_file, make, ends):
    network = make().eval()
    _, encoded = evaluate(network, f"t={text_file}:text")
    reader = _Reader(network)
    with torch.inference_mode():
        reader.check(encoded.items[0].rows[0], torch.tensor([5, 6]))
    assert (reader.head is network.lm_head) == ends


def test_outputs_that_are_no_numbers_stop_the_run(text_file):
    network = make_model()
    with torch.no_grad():
        network.model.norm.weight[3] = math.nan
    with pytest.raises(TailorError, match="not finite"):
        evaluate(network, f"t={text_file}:text")


def test_bfloat16_logits_do_not_tie(text_file):
    """The best logits of bfloat16 hidden states are worked out in float32."""
    network = make_model().to(torch.bfloat16).eval()
    head = network.lm_head
    scores, _ = evaluate(network, f"t={text_file}:text")
    for i, record in enumerate(map(json.loads, text_file.read_text().splitlines()[:6])):
        ids = make_tokenizer()(record["text"])["input_ids"]
        with torch.no_grad():
            hidden = network.model(input_ids=torch.tensor([ids])).last_hidden_state[0, :-1].double()
            likely = (hidden @ head.weight.double().T).log_softmax(-1)
        wanted = torch.tensor(ids[1:])
        assert scores.correct[i] == (likely.argmax(1) == wanted).sum()
        assert scores.loss[i] == pytest.approx(-float(likely.gather(1, wanted[:, None]).sum()), rel=1e-3)
    assert "forward" not in vars(head)


# Images, encoder-decoders, sound


def family(tmp_path, name):
    folder = make_family_pair(tmp_path, name)
    images = [f"images/{i}.png" for i in range(4)]
    words = [{"prompt": f"What is {i}? ", "response": f"it is {i}"} for i in range(4)]
    return folder, [record | {"images": [image]} for record, image in zip(words, images, strict=True)]


@pytest.mark.parametrize(
    "name", ["llava", "qwen2.5-vl", "instructblip", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_images_go_through_the_models_own_processor(tmp_path, name):
    pytest.importorskip("PIL")
    folder, records = family(tmp_path, name)
    text = write(folder / "text.jsonl", records)
    picks = [{k: v for k, v in r.items() if k != "response"} | {"choices": ["a", "b"], "answer": 0} for r in records]
    choice = write(folder / "choice.jsonl", picks)
    answers = write(folder / "generate.jsonl", records)
    specs = [f"t={text}:text", f"c={choice}:choice", f"g={answers}:generate"]
    options = EvaluateOptions(max_new_tokens=3, dtype="float32")
    report = evaluate_models([folder / "base"], specs, options)
    scores = report.scores["base"]
    assert all(len(scores[task].correct) == 4 for task in "tcg")
    network, encoder = _loaded(folder / "base")
    for i, record in enumerate(records):
        mark = "" if name == "instructblip" else encoder.media.image_mark
        inputs = _processed(encoder, folder, record, mark + record["prompt"] + record["response"])
        if name == "instructblip":  # its Q-Former sees the question alone
            asked = _processed(encoder, folder, record, record["prompt"])
            inputs |= {key: value for key, value in asked.items() if key.startswith("qformer")}
        ids, wanted = inputs["input_ids"][0], len(record["response"])
        with torch.no_grad():
            likely = network(**inputs).logits[0, -wanted - 1 : -1].double().log_softmax(-1)
        assert scores["t"].count[i] == wanted
        assert scores["t"].loss[i] == pytest.approx(-float(likely.gather(1, ids[-wanted:, None]).sum()), rel=1e-5)
        prompt = _processed(encoder, folder, record, mark + record["prompt"])
        written = network.generate(**prompt, max_new_tokens=3, do_sample=False)[0]
        new = written[prompt["input_ids"].shape[1] :] if len(written) > 3 else written
        text = encoder.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert scores["g"].outputs[i] == text.partition("\n")[0]


def _loaded(folder):
    from tailorcli import Checkpoint

    options = EvaluateOptions(dtype="float32")
    with Checkpoint.open(folder) as checkpoint:
        return load_model(checkpoint, read_config(folder), options), load_encoder(folder, folder, True, options)


def _processed(encoder, folder, record, text):
    from PIL import Image

    image = Image.open(folder / record["images"][0]).convert("RGB")
    return dict(encoder.processor(images=[image], text=text, return_tensors="pt"))


def test_the_choices_of_an_item_share_its_image(tmp_path):
    pytest.importorskip("PIL")
    folder, records = family(tmp_path, "llava")
    picks = [records[0] | {"choices": ["one of", "another"], "answer": 0}]
    (task,) = read_tasks([f"c={write(folder / 'c.jsonl', picks)}:choice"])
    first, second = encode_task(task, _loaded(folder / "base")[1], EvaluateOptions()).items[0].rows
    assert first.inputs["pixel_values"] is second.inputs["pixel_values"]


def test_an_image_of_an_item_may_be_its_bytes(tmp_path):
    pytest.importorskip("PIL")
    folder, records = family(tmp_path, "llava")
    encoder = _loaded(folder / "base")[1]
    data = (folder / records[0]["images"][0]).read_bytes()
    for images in (records[0]["images"][0], [{"bytes": base64.b64encode(data).decode()}]):
        picks = [records[0] | {"choices": ["a", "b"], "answer": 0, "images": images}]
        (task,) = read_tasks([f"c={write(folder / 'c.jsonl', picks)}:choice"])
        row = encode_task(task, encoder, EvaluateOptions()).items[0].rows[0]
        wanted = _processed(encoder, folder, records[0], "<image> x")["pixel_values"]
        assert row.inputs["pixel_values"].equal(wanted)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "gemma3"])
def test_what_was_before_a_prompt_with_an_image_is_framed(tmp_path, name):
    """As the processor frames the same turns."""
    pytest.importorskip("PIL")
    folder, records = family(tmp_path, name)
    encoder = _loaded(folder / "base")[1]
    image = {"type": "image", "path": records[0]["images"][0]}
    earlier = [_turn("system", _words("S")), _turn("user", _words("q ")), _turn("assistant", _words("a"))]
    parts = [image, *_words("Q")]
    for marked in (False, True):  # in the earlier turn, else in front of the prompt
        if marked:
            earlier[1], parts = _turn("user", [*_words("q "), image]), _words("Q")
        asked = [*earlier, _turn("user", parts)]
        beside = {"system": "S", "history": [["q <image>" if marked else "q ", "a"]], "images": records[0]["images"]}
        whole = {"messages": [*asked, _turn("assistant", _words("A"))]}
        pair = {"prompt": "Q", "response": "A"} | beside
        (record,) = read_records(write(folder / "t.jsonl", [pair]))
        (other,) = read_records(write(folder / "m.jsonl", [whole]))
        wanted = encoder.encode(other, 4096)
        assert encoder.encode(record, 4096)["input_ids"].equal(wanted["input_ids"])
        start, text = encoder.start(record, 4096)
        (task,) = read_tasks([f"g={write(folder / 't.jsonl', [pair])}:generate"])
        row = encode_task(task, encoder, EvaluateOptions()).items[0].rows[0]
        assert row.inputs["input_ids"].equal(start["input_ids"])
        ids = start["input_ids"]
        assert ids.equal(wanted["input_ids"][:, : ids.shape[1]])
        assert encoder.tokenizer.decode(wanted["input_ids"][0, ids.shape[1] :]).startswith("A")
        kept = write(folder / "k.jsonl", [{"prompt": text, "response": "", "images": records[0]["images"]}])
        assert encoder.encode(read_records(kept)[0], 4096)["input_ids"].equal(ids)  # as it is kept and read again


def _turn(role, parts):
    return {"role": role, "content": parts}


def _words(text):
    return [{"type": "text", "text": text}]


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "instructblip", "gemma3"])
def test_llavas_mark_is_the_place_of_an_image_for_every_model(tmp_path, name):
    pytest.importorskip("PIL")
    folder, records = family(tmp_path, name)
    marked = records[0] | {"prompt": "Look: <image>\nand say "}
    (record,) = read_records(write(folder / "t.jsonl", [marked]))
    encoder = _loaded(folder / "base")[1]
    mark = "" if name == "instructblip" else f"{encoder.media.image_mark.strip()}\n"
    wanted = _processed(encoder, folder, marked, f"Look: {mark}and say {marked['response']}")
    assert encoder.encode(record, 4096)["input_ids"].equal(wanted["input_ids"])


def test_places_of_an_image_are_not_scored(tmp_path):
    pytest.importorskip("PIL")
    folder, records = family(tmp_path, "llava")
    file = write(folder / "t.jsonl", [{"text": "Look: <image> and say.", "images": records[0]["images"]}])
    report = evaluate_models([folder / "base"], [f"t={file}:text"])
    _, encoder = _loaded(folder / "base")
    ids = _processed(encoder, folder, records[0], "Look: <image> and say.")["input_ids"][0]
    images = int((ids == encoder.processor.image_token_id).sum())
    assert images == 4
    assert report.scores["base"]["t"].count.tolist() == [len(ids) - 1 - images]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_are_scored_on_their_responses(tmp_path, name):
    folder = make_family_pair(tmp_path, name)
    records = pair_records(5)
    text, choice = write(folder / "t.jsonl", records), write(folder / "c.jsonl", choice_records(6))
    answers = write(folder / "g.jsonl", records)
    specs = [f"t={text}:text", f"c={choice}:choice", f"g={answers}:generate"]
    report = evaluate_models([folder / "base"], specs, EvaluateOptions(max_new_tokens=4))
    network = tr.AutoModelForSeq2SeqLM.from_pretrained(folder / "base").eval()
    tokenizer = tr.AutoTokenizer.from_pretrained(folder / "base")
    scores = report.scores["base"]
    for i, record in enumerate(records):
        ids, labels = (tokenizer(record[key], return_tensors="pt")["input_ids"] for key in ("prompt", "response"))
        with torch.no_grad():
            loss = float(network(input_ids=ids, labels=labels).loss)
            written = network.generate(ids, max_new_tokens=4, do_sample=False, num_beams=1)
        assert scores["t"].loss[i] / scores["t"].count[i] == pytest.approx(loss, rel=1e-5)
        assert scores["g"].outputs[i] == tokenizer.decode(written[0], skip_special_tokens=True).strip()
    assert len(scores["c"].correct) == 6


def test_sound_is_scored_by_its_response(tmp_path):
    folder = make_family_pair(tmp_path, "whisper")
    report = evaluate_models([folder / "base", folder / "tuned"], [f"t={folder / 'data.jsonl'}:text"])
    assert len(report.scores["base"]["t"].count) == 12
    encoder = _loaded(folder / "base")[1]
    heard = {"audio": "audio/0.wav", "response": "a"}
    messages = [{"role": "user", "content": "Q"}]
    for more in ({"prompt": "Q"}, {"prompt": "", "system": "S"}, {"messages": messages}):
        (task,) = read_tasks([f"t={write(folder / 't.jsonl', [heard | more])}:text"])
        with pytest.raises(TailorError, match=r"beside its (audio|prompt)"):
            encode_task(task, encoder, EvaluateOptions())


def test_the_text_beside_a_sound_is_its_response(tmp_path):
    folder = make_family_pair(tmp_path, "whisper")
    heard = json.loads((folder / "data.jsonl").read_text().splitlines()[0])
    named = [heard, {"audio": heard["audio"], "text": heard["response"]}]
    tasks = [f"t{i}={write(folder / f't{i}.jsonl', [record])}:text" for i, record in enumerate(named)]
    one, other = evaluate_models([folder / "base"], tasks).scores["base"].values()
    assert (one.count, one.correct, one.loss) == (other.count, other.correct, other.loss)
    for empty in ({"response": ""}, {"text": ""}):
        with pytest.raises(TailorError, match="empty response"):
            read_tasks([f"t={write(folder / 'none.jsonl', [{'audio': heard['audio']} | empty])}:text"])
    (task,) = read_tasks([f"t={folder / 't0.jsonl'}:generate"])
    with pytest.raises(TailorError, match="takes no audio"):  # and no word of the prompt that it lacks
        encode_task(task, _loaded(folder / "base")[1], EvaluateOptions())


def test_answers_to_a_sound_in_a_text_are_scored_as_transformers_would(tmp_path):
    folder = make_family_pair(tmp_path, "qwen2-audio")
    heard = {"audio": "audio/0.wav", "prompt": "Who? ", "response": "A cat."}
    asked = {"audio": ["audio/1.wav", "audio/2.wav"], "question": "Who?", "answer": "A cat."}
    chat = [
        {"role": "user", "content": [{"type": "audio", "path": "audio/3.wav"}]},
        {"role": "assistant", "content": "A"},
    ]
    texts = write(folder / "t.jsonl", [heard, asked, {"messages": chat}, {"audio": "audio/4.wav", "text": "So."}])
    bare = {"audio": "audio/1.wav", "response": "A cat."}
    specs = [f"t={texts}:text", f"g={write(folder / 'g.jsonl', [heard, bare])}:generate"]
    specs.append(f"c={write(folder / 'c.jsonl', [{**heard, 'choices': ['A.', 'B.'], 'answer': 1}])}:choice")
    scores = evaluate_models([folder / "base"], specs, EvaluateOptions(max_new_tokens=4)).scores["base"]
    network, encoder = _loaded(folder / "base")
    for i, fields in enumerate([heard, asked]):
        example = encode_example(check_record("t:1", fields, folder), encoder, 512)
        if i == 0:  # the end of the text is learnt, and not scored
            example = {
                name: value[:, :-1] if value.ndim == 2 and "feat" not in name else value
                for name, value in example.items()
            }
        with torch.no_grad():
            loss = float(network(**example, attention_mask=torch.ones_like(example["input_ids"])).loss)
        assert scores["t"].loss[i] / scores["t"].count[i] == pytest.approx(loss, rel=1e-5)
    inputs, _ = encoder.start(check_record("g:1", heard | {"response": ""}, folder), 512)
    with torch.no_grad():
        written = network.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert scores["g"].outputs[0] == encoder.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert len(scores["c"].correct) == 1


@pytest.mark.parametrize(
    "item",
    [
        {"text": "A cup."},
        {"prompt": "What?", "response": "A cup."},
        {"prompt": "What?", "choices": ["A cup.", "A hat."], "answer": 0},
    ],
)
def test_a_model_that_takes_no_text_is_one_error(tmp_path, item):
    folder = make_family_pair(tmp_path, "vit")
    file = write(folder / "t.jsonl", [{"images": ["images/0.png"]} | item])
    encoder = load_encoder(folder / "base", folder / "base", True, EvaluateOptions())
    for kind in ("choice",) if "choices" in item else ("text", "generate") if "prompt" in item else ("text",):
        (task,) = read_tasks([f"t={file}:{kind}"])
        with pytest.raises(TailorError, match="gives the model no text"):
            encode_task(task, encoder, EvaluateOptions())


# Figures of merit


def test_h_is_the_harmonic_mean_of_the_averages():
    """The paper's Table 1, zero-shot and Model Tailor on Flickr30k: Avg over all tasks, H by Eq. 32."""
    old = dict(enumerate((143.1, 117.7, 123.5, 121.9, 58.45, 58.24, 76.66, 49.18)))
    summary = summarise(old | {"new": 82.8}, list(old), ["new"])
    assert round(float(summary["average"]), 2) == 92.39
    assert round(float(summary["h_score"]), 2) == 87.87
    assert float(summary["arithmetic_mean"]) == pytest.approx((sum(old.values()) / 8 + 82.8) / 2)
    assert h_score(0.0, 0.0) == 0.0
    assert h_score(50.0, 0.0) == 0.0
    assert h_score(40.0, 60.0) == 48.0


def flips(rng, items, share):
    right = (rng.random(items) < share).astype(float)
    return TaskScores(right, np.ones(items), np.full(items, math.nan))


def test_intervals_are_those_of_the_binomial():
    rng = np.random.default_rng(0)
    scores = flips(rng, 400, 0.3)
    found = estimate(bootstrap([scores], "task", 4000)[0])
    share = scores.accuracy / 100
    half = 196 * math.sqrt(share * (1 - share) / 400)
    assert found.value == pytest.approx(scores.accuracy)
    assert found.interval == pytest.approx((found.value - half, found.value + half), abs=0.5)


def test_every_item_can_be_drawn_and_pieces_of_resamplings_leave_none_out(monkeypatch):
    two = TaskScores(np.array([1.0, 0.0]), np.ones(2), np.full(2, math.nan))
    (figure,) = bootstrap([two], "task", 200)
    assert set(figure[1:].tolist()) == {0.0, 50.0, 100.0}
    monkeypatch.setattr(metrics, "_PIECE", 2)  # one at a time
    assert len(bootstrap([two], "task", 200)[0]) == 201
    assert np.isfinite(bootstrap([two], "task", 200)[0]).all()


def test_an_interval_is_of_the_resamplings_alone():
    assert estimate(np.array([50.0, 1.0, 2.0, 3.0])).interval == pytest.approx((1.05, 2.95))


def test_a_figure_of_a_value_and_its_error_has_that_error():
    figure = from_error(40.0, 2.0, "m", "t", 20_000)
    assert figure[0] == 40.0
    assert figure[1:].std() == pytest.approx(2.0, rel=0.03)
    assert not (figure[1:] == from_error(40.0, 2.0, "n", "t", 20_000)[1:]).any()
    assert from_error(99.0, 5.0, "m", "t", 1000).max() == 100.0
    assert math.isnan(from_error(40.0, None, "m", "t", 10)[1])


def test_differences_between_models_are_paired():
    rng = np.random.default_rng(0)
    base = {"old": flips(rng, 200, 0.8), "new": flips(rng, 200, 0.2)}
    tuned = {"old": flips(rng, 200, 0.5), "new": flips(rng, 200, 0.7)}
    roles = Roles(("old",), ("new",), "base", "tuned")
    found = compare({"base": base, "tuned": tuned, "twin": tuned}, roles)
    assert found["twin"]["summary"]["h_minus_tuned"].to_dict() == {"value": 0.0, "interval": [0.0, 0.0]}
    both = [h_score(scores["old"].accuracy, scores["new"].accuracy) for scores in (base, tuned)]
    assert found["base"]["summary"]["h_minus_tuned"].value == pytest.approx(both[0] - both[1])
    assert found["base"]["summary"]["origin_kept"].value == 100
    assert found["base"]["summary"]["gain_kept"].value == 0
    assert found["tuned"]["summary"]["gain_kept"].to_dict() == {"value": 100.0, "interval": [100.0, 100.0]}
    kept = found["tuned"]["summary"]["origin_kept"]
    assert kept.value == pytest.approx(100 * tuned["old"].accuracy / base["old"].accuracy)
    assert kept.interval[0] < kept.value < kept.interval[1] < 100
    # Another task beside them changes no resampling of these.
    alone = bootstrap([base["old"]], "old", 50)[0]
    assert alone.tolist() == bootstrap([tuned["old"], base["old"]], "old", 50)[1].tolist()


def test_what_items_do_not_determine_has_no_interval():
    one = {"a": flips(np.random.default_rng(0), 1, 1.0), "b": flips(np.random.default_rng(0), 50, 1.0)}
    found = compare({"m": one, "n": one}, Roles(("a",), ("b",), "m", "n"))["m"]
    assert found["tasks"]["a"].to_dict() == {"value": 100.0, "interval": None}
    assert found["summary"]["h_score"].interval is None
    assert found["summary"]["gain_kept"].to_dict() == {"value": None, "interval": None}  # nothing was gained
    worse = {"a": one["a"], "b": flips(np.random.default_rng(1), 50, 0.5)}
    found = compare({"m": one, "n": worse}, Roles(("a",), ("b",), "m", "n"))["n"]
    assert found["summary"]["gain_kept"].to_dict() == {"value": None, "interval": None}  # a share of a loss is none


def test_answers_are_compared_without_case_space_and_final_stop():
    assert normalise("  The  Cat.\t") == normalise("the cat") == "the cat"
    assert normalise("St. John's") == "st. john's"
    assert normalise("?") == "?"


# The command line


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("pair"))
    network = perturb(make_model(), seed=2, scale=0.01)
    network.save_pretrained(folder / "patched")
    make_tokenizer().save_pretrained(folder / "patched")
    write(folder / "choice.jsonl", choice_records())
    write(folder / "pairs.jsonl", pair_records())
    return folder


def test_the_report_lets_anyone_work_out_its_figures(pair, tmp_path):
    specs = ("--task", f"text={pair / 'data.jsonl'}:text", "--task", f"pick={pair / 'choice.jsonl'}:choice")
    roles = ("--origin", "text", "--target", "pick", "--base", pair / "base", "--tuned", "tuned")
    models = (pair / "base", pair / "tuned", pair / "patched")
    result = run("evaluate", *models, *specs, *roles, "--limit", 8, "--json", "-o", tmp_path / "r" / "report.json")
    report = json.loads(result.stdout)
    assert json.loads((tmp_path / "r" / "report.json").read_text()) == report
    assert [model["name"] for model in report["models"]] == ["base", "tuned", "patched"]
    assert report["tasks"]["text"]["role"] == "origin"
    assert report["tasks"]["text"]["records"] == list(range(8))
    for model in report["models"]:
        values = {}
        for name, task in model["tasks"].items():
            values[name] = 100 * sum(task["correct"]) / sum(task["count"])
            assert task["value"] == pytest.approx(values[name])
        assert model["summary"]["h_score"]["value"] == pytest.approx(h_score(values["text"], values["pick"]))
        text = model["tasks"]["text"]
        assert text["loss"] == pytest.approx(sum(text["losses"]) / sum(text["count"]))
        assert {"origin_kept", "target_kept", "gain_kept", "h_minus_tuned"} <= model["summary"].keys()
    shown = run("evaluate", *models, *specs, *roles, "--limit", 8)
    assert "patched" in shown.stdout
    for column in ("old", "new", "H", "old kept", "new kept"):
        assert column in shown.stdout
    assert "Avg" not in shown.stdout
    shown = run("evaluate", *models, *specs, *roles, "--limit", 8, "--all")
    assert "H - tuned's H" in shown.stdout
    assert shown.stderr.endswith(" s\n")


def test_without_roles_there_is_no_h(pair):
    spec = f"text={pair / 'data.jsonl'}:text"
    shown = run("evaluate", pair / "base", "--task", spec, "--limit", 3)
    assert "loss" in shown.stdout
    assert "H" not in shown.stdout
    assert json.loads(run("evaluate", pair / "base", "--task", spec, "--json").stdout)["models"][0]["summary"] == {}


def test_the_picture(pair, tmp_path):
    pytest.importorskip("matplotlib")
    specs = ("--task", f"a={pair / 'data.jsonl'}:text", "--task", f"b={pair / 'pairs.jsonl'}:text")
    arguments = (pair / "base", pair / "tuned", *specs, "--limit", 2, "--plot")
    roles = ("--origin", "a", "--target", "b", "--base", "base")
    run("evaluate", *arguments, tmp_path / "p.png", *roles)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert ".png" in run("evaluate", *arguments, tmp_path / "p.nope", *roles, expect=1).stderr
    assert "--origin" in run("evaluate", *arguments, tmp_path / "p.png", expect=1).stderr


def test_an_item_that_is_too_long_for_one_model_is_left_out_for_all(tmp_path):
    make_pair(tmp_path)
    short = tr.GPT2LMHeadModel(
        tr.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=4, n_positions=20, bos_token_id=0, eos_token_id=0)
    )
    short.save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    records = [{"prompt": "p" * 10 * (1 + i % 2), "response": "answer"} for i in range(6)]
    file = write(tmp_path / "p.jsonl", records)
    report = evaluate_models([tmp_path / "base", tmp_path / "short"], [f"t={file}:text"])
    assert report.tasks["t"]["records"] == [0, 2, 4]
    assert report.tasks["t"]["left_out"] == [1, 3, 5]
    assert all(len(scores["t"].count) == 3 for scores in report.scores.values())
    result = run("evaluate", tmp_path / "base", "--task", f"t={file}:text", "--seq-len", 20)
    assert "left out of task t: 3 of 6" in result.stderr
    text = write(tmp_path / "t.jsonl", [{"text": "words " * 20}])
    cut = evaluate_models([tmp_path / "short"], [f"t={text}:text"])
    assert cut.scores["short"]["t"].count.tolist() == [19]


def name_another_class(folder):
    """The same vocabulary in both folders; each config.json names another class, one of which adds tokens."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", "\u0120", *map(chr, range(33, 127))]
    for name, kind in (("base", "GPT2Tokenizer"), ("tuned", "RobertaTokenizer")):
        place = folder.with_name(name)
        for file in place.glob("tokenizer*"):
            file.unlink()
        (place / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
        (place / "merges.txt").write_text("#version: 0.2\n")
        config = json.loads((place / "config.json").read_text()) | {"tokenizer_class": kind}
        (place / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [swap_two_letters, name_another_class])
def test_each_model_is_scored_by_its_own_tokenizer(tmp_path, change):
    """Two models that take the same text apart in other ways, in one run: each has the scores that it has alone."""
    make_pair(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "tuned", dirs_exist_ok=True)  # the tokenizer alone tells them apart
    change(tmp_path / "tuned")
    file = write(tmp_path / "t.jsonl", [{"text": "aabbab abab bbaa"}] * 3)
    folders = [tmp_path / "base", tmp_path / "tuned"]
    together = evaluate_models(folders, [f"t={file}:text"]).scores
    for folder in folders:
        alone = evaluate_models([folder], [f"t={file}:text"]).scores[folder.name]["t"]
        assert together[folder.name]["t"].loss.tolist() == alone.loss.tolist()
    assert together["base"]["t"].loss.tolist() != together["tuned"]["t"].loss.tolist()


# What is refused


BAD_RECORDS = [
    ("text", {"images": ["a.png"]}, "no text to score"),
    ("text", {"prompt": "a", "response": ""}, "empty response"),
    ("text", {"words": 1}, "has the fields"),
    ("choice", {"prompt": "a", "choices": ["b", "c"]}, 'no "answer"'),
    ("choice", {"prompt": 1, "choices": ["b", "c"], "answer": 0}, '"prompt" is a int'),
    ("choice", {"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "not among its 2 choices"),
    ("choice", {"prompt": "a", "choices": ["b", "c"], "answer": 2}, "not among its 2 choices"),
    ("choice-raw", {"prompt": "a", "choices": ["b", "c"], "answer": True}, "not among its 2 choices"),
    ("choice", {"prompt": "a", "choices": ["b", "b"], "answer": 0}, "all different"),
    ("choice", {"prompt": "a", "choices": ["b", " "], "answer": 0}, "none of them empty"),
    ("choice", {"prompt": "a", "choices": "bc", "answer": 0}, "list of texts"),
    ("choice", {"prompt": "", "choices": ["b", "cd"], "answer": 0}, "no token to score"),
    ("generate", {"prompt": "a"}, 'no "response"'),
    ("generate", {"prompt": "a", "response": []}, "none of them empty"),
    ("generate", {"prompt": "a", "response": "b\nc"}, "several lines"),
    ("generate", {"prompt": "", "response": "b"}, "no token to go on from"),
    ("generate", {"prompt": "a", "response": "b", "images": 3}, '"images" must be a list'),
    ("generate", ["a"], "is a list"),
    ("text", {"text": "a", "images": ["a.png"]}, "processor"),
]


@pytest.mark.parametrize(("kind", "record", "message"), BAD_RECORDS)
def test_a_bad_record_is_one_clear_error(pair, tmp_path, kind, record, message):
    good = choice_records(1)[0] if kind.startswith("choice") else pair_records(1)[0]
    file = write(tmp_path / "bad.jsonl", [good, record])
    result = run("evaluate", pair / "base", "--task", f"t={file}:{kind}", expect=1)
    assert message in result.stderr
    assert "bad.jsonl:2" in result.stderr or "processor" in result.stderr
    assert result.stderr.count("error:") == 1


def test_bad_arguments_are_one_clear_error(pair, tmp_path):
    text, empty = f"t={pair / 'data.jsonl'}:text", tmp_path / "empty.jsonl"
    empty.write_text("")
    base = pair / "base"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "p.safetensors").write_bytes(b"no patch file")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    cases = [
        ((base, "--task", f"t={pair / 'data.jsonl'}:nope"), "unknown kind 'nope'"),
        ((base, "--task", "t:text"), "not a task"),
        ((base, "--task", "t=gone.jsonl:text"), "there is no file gone.jsonl"),
        ((base, "--task", f"t={empty}:text"), "holds no records"),
        ((base, "--task", text, "--task", text), "two tasks have the name 't'"),
        ((base, base, "--task", text), "given twice"),
        ((pair / "gone", "--task", text), "no model folder"),
        ((tmp_path / "adapter", "--task", text), "adapter_config.json"),
        ((tmp_path / "p.safetensors", "--task", text), "a patch file: its base is needed"),
        ((tmp_path / "p.safetensors", "--task", text, "--base", base), "p.safetensors"),
        ((base, "--task", text, "--origin", "u", "--target", "t"), "'u' names no task"),
        ((base, "--task", text, "--origin", "t"), "no task is named --target"),
        ((base, "--task", text, "--origin", "t", "--target", "t"), "both old and new"),
        ((base, "--task", text, "--base", "base"), "need old and new tasks"),
        ((base, "--task", text, "--base", "nope"), "not among the models"),
        ((base, "--task", text, "--limit", 0), "limit must be at least 1"),
        ((base, "--task", f"p={pair / 'pairs.jsonl'}:text", "--seq-len", 5), "none of its 7 items can be scored"),
    ]
    for arguments, message in cases:
        result = run("evaluate", *arguments, expect=1)
        assert message in result.stderr.replace("\n", " "), (arguments, result.stderr)
        assert result.stderr.count("error:") == 1
    run("evaluate", base, expect=2)
    run("evaluate", "--task", text, expect=2)
    for spec in ("=f:text", "a=:text", "a=f"):
        with pytest.raises(TailorError):
            parse_task(spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_an_adapter_is_evaluated_as_the_model_that_it_makes_and_no_file_is_written(tmp_path, dtype):
    make_adapter(tmp_path, target_modules=["q_proj", "down_proj"], dtype=dtype)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    text = f"t={write(tmp_path / 't.jsonl', [{'text': 'some words'}, {'text': 'others, longer'}])}:text"
    before = sorted(tmp_path.rglob("*"))
    merged = evaluate_models([tmp_path / "merged"], [text], EvaluateOptions(dtype=str(dtype)[6:])).scores["merged"]["t"]
    named = evaluate_models([tmp_path / "base", tmp_path / "adapter"], [text])
    given = evaluate_models([tmp_path / "adapter"], [text], base=tmp_path / "base")
    assert sorted(tmp_path.rglob("*")) == before
    for report in (named, given):
        assert report.scores["adapter"]["t"].loss == pytest.approx(merged.loss, rel=1e-4)
        assert report.models["adapter"]["run_in"] == str(dtype)[6:]
    assert named.scores["base"]["t"].loss != pytest.approx(merged.loss, rel=1e-4)


def test_a_patch_file_is_evaluated_as_the_checkpoint_that_apply_writes(llama_pair, tmp_path):
    from tailorcli import patch_checkpoint

    base, tuned, file = llama_pair / "base", llama_pair / "tuned", tmp_path / "law.safetensors"
    patch_checkpoint(base, tuned, tmp_path / "out", llama_pair / "stats", patch_file=file)
    text = f"t={llama_pair / 'data.jsonl'}:text"
    applied = evaluate_models([base, tmp_path / "out"], [text]).scores
    before = sorted(tmp_path.rglob("*"))
    found = run("evaluate", base, file, "--task", text, "--base", base, "--json")
    assert sorted(tmp_path.rglob("*")) == before
    models = {model["name"]: model["tasks"]["t"] for model in json.loads(found.stdout)["models"]}
    assert list(models) == ["base", "law"]
    assert models["law"]["losses"] == applied["out"]["t"].loss.tolist()
    assert models["law"]["losses"] != models["base"]["losses"]
    alone = evaluate_models([file], [text], base=base)
    assert alone.scores["law"]["t"].loss.tolist() == applied["out"]["t"].loss.tolist()
    assert alone.roles.base is None
    assert "other values" in run("evaluate", file, "--task", text, "--base", tuned, expect=1).stderr


def test_a_patch_file_writes_to_the_same_end_as_the_checkpoint_that_apply_writes(tmp_path):
    """Ends of a text that generation_config.json names, and config.json does not."""
    from tailorcli import PatchOptions, patch_checkpoint

    folder = make_pair(tmp_path)
    records = [{"prompt": prompt, "response": "x"} for prompt in ("some", "b")]
    task = [f"t={write(tmp_path / 't.jsonl', records)}:generate"]
    file = folder / "tuned" / "generation_config.json"
    whole = evaluate_models([folder / "tuned"], task).scores["tuned"]["t"].outputs
    ends = [make_tokenizer().convert_tokens_to_ids(text[2]) for text in whole]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}))
    options, patch = PatchOptions(method="changed"), tmp_path / "p.safetensors"
    patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", options=options, patch_file=patch)
    found = evaluate_models([folder / "tuned", tmp_path / "out", patch], task, base=folder / "base").scores
    assert found["p"]["t"].outputs == found["out"]["t"].outputs == found["tuned"]["t"].outputs != whole


def test_tasks_are_read_in_every_format_of_data(pair, tmp_path):
    import gzip

    records = [{"prompt": "2+2=", "choices": ["4", "5"], "answer": 0}] * 3
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    (tmp_path / "q.csv").write_text("question,answer\nhow much,four\nwhat,five\n")
    report = evaluate_models([pair / "base"], [f"c={tmp_path / 'c.jsonl.gz'}:choice", f"q={tmp_path / 'q.csv'}:text"])
    assert len(report.scores["base"]["c"].correct) == 3
    assert report.scores["base"]["q"].count.tolist() == [4, 4]  # the letters of the answers


def test_models_that_predict_no_next_token_are_refused(tmp_path, monkeypatch):
    file = write(tmp_path / "t.jsonl", [{"text": "some words"}, {"text": "others, longer"}])
    network = tr.BertForMaskedLM(tr.BertConfig(**DECODER))
    with pytest.raises(TailorError, match="predicts no next token"):
        evaluate(network, f"t={file}:text")
    monkeypatch.setattr(type(network), "can_generate", classmethod(lambda cls: True))
    with pytest.raises(TailorError, match="reads ahead"):
        evaluate(network, f"t={file}:text")


def test_the_network_is_left_as_it_was(text_file):
    network = make_model().train()
    network.model.layers[0].eval()  # as who freezes it has it
    modes = {name: module.training for name, module in network.named_modules()}
    evaluate(network, f"t={text_file}:text")
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert "forward" not in vars(network.lm_head)
    assert not network.lm_head._forward_pre_hooks


def test_what_a_network_keeps_of_an_evaluation_can_be_changed_by_training(text_file):
    """Rotary frequencies that follow the length, which DDP copies to all devices, in place."""
    network = make_model()
    config = tr.LlamaConfig(**network.config.to_dict() | {"max_position_embeddings": 8})
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    network = tr.LlamaForCausalLM(config)
    before = network.model.rotary_emb.inv_freq.clone()
    evaluate(network, f"t={text_file}:text")
    assert not torch.equal(network.model.rotary_emb.inv_freq, before)
    network.model.rotary_emb.inv_freq.mul_(1.0)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_no_record_is_refused(text_file, limit):
    with pytest.raises(TailorError, match="limit must be at least 1"):
        read_tasks([f"t={text_file}:text"], limit)
