"""What evaluations and sweeps must not get wrong: the cases that did."""

import json
import shutil

import pytest
import torch
from families import make_family_pair
from helpers import invoke, make_pair, make_tokenizer, refused, run

from tailorcli import TailorError
from tailorcli.data.encoder import Encoder
from tailorcli.data.records import check_record
from tailorcli.evaluation.tasks import Task, encode_task
from tailorcli.options import EvaluateOptions

EMPTY = "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty turn') }}{% endif %}{% endfor %}"
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}"
SKIPPING = "{% for m in messages %}{% if m.content %}[{{ m.role }}]{{ m.content }}|{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", [PLAIN, SKIPPING, EMPTY + PLAIN])
def test_an_answer_alone_is_scored_whatever_the_template_does_with_empty_ones(template):
    record = check_record("here", {"question": "hi", "answer": "yes"}, None)
    encoder = Encoder(make_tokenizer(template))
    [item] = encode_task(Task("t", None, "text", (record,), ""), encoder, EvaluateOptions()).items
    wanted = item.rows[0].wanted[0].tolist()
    assert "".join(encoder.tokenizer.convert_ids_to_tokens(wanted)) == "yes|"


def test_of_a_prompt_and_a_completion_that_are_turns_the_completion_alone_is_scored():
    value = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yes"}]}
    encoder = Encoder(make_tokenizer(PLAIN))
    task = Task("t", None, "text", (check_record("here", value, None),), "")
    [item] = encode_task(task, encoder, EvaluateOptions()).items
    [row] = item.rows
    assert "".join(encoder.tokenizer.convert_ids_to_tokens(row.wanted[0].tolist())) == "yes|"
    assert row.inputs["input_ids"][0, row.places + 1].tolist() == row.wanted[0].tolist()
    with pytest.raises(TailorError, match="none of its 1 items"):  # a cut prompt would be another question
        encode_task(task, encoder, EvaluateOptions(seq_len=12))


def test_of_prepared_tokens_those_with_a_label_are_scored():
    record = check_record("t", {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}, None)
    [item] = encode_task(Task("t", None, "text", (record,), ""), Encoder(make_tokenizer()), EvaluateOptions()).items
    [row] = item.rows
    assert row.places.tolist() == [0, 2]
    assert row.wanted.tolist() == [[6, 8]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("care"))
    (folder / "new.jsonl").write_text('{"text": "abcabcabc"}\n{"text": "cabcabcab"}\n')
    return folder


def ends(pair):
    old, new = (f"{name}={pair / file}:text" for name, file in (("a", "data.jsonl"), ("b", "new.jsonl")))
    return "--task", old, "--task", new, "--origin", "a", "--target", "b", "--limit", 4


def test_texts_are_cut_alike_for_all_models_and_that_is_told(pair, tmp_path, caplog):
    short = make_pair(tmp_path / "short", "gpt2")
    config = json.loads((short / "base" / "config.json").read_text())
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "abc " * 60}) + "\n")
    task = ("--task", f"t={tmp_path / 'long.jsonl'}:text")
    report = tmp_path / "report.json"
    run("evaluate", pair / "base", short / "base", *task, "-o", report)
    counts = [model["tasks"]["t"]["count"] for model in json.loads(report.read_text())["models"]]
    assert counts[0] == counts[1]
    assert "have more than" in caplog.text
    assert config["n_positions"] < 240


def test_a_folder_called_work_with_files_of_others_is_left_alone(pair, tmp_path):
    (tmp_path / "dir" / "settings").mkdir(parents=True)
    (tmp_path / "dir" / "work").mkdir()
    (tmp_path / "dir" / "work" / "thesis.txt").write_text("precious")
    given = ("sweep", pair / "base", pair / "tuned", "-o", tmp_path / "dir", *ends(pair), "--method", "interpolate")
    refused(*given, mentions=["holds other files (thesis.txt"])
    assert (tmp_path / "dir" / "work" / "thesis.txt").read_text() == "precious"


def test_a_result_does_not_go_into_the_base_of_a_patch_file(pair, tmp_path):
    run("patch", pair / "base", pair / "tuned", "--method", "magnitude", "--patch-file", tmp_path / "p.safetensors")
    given = ("evaluate", tmp_path / "p.safetensors", "--base", pair / "base", *ends(pair))
    refused(*given, "-o", pair / "base" / "result.json", mentions=["lies inside an input"])


def test_pictures_are_part_of_what_a_sweep_measured(tmp_path):
    pair = make_family_pair(tmp_path, "llava")
    task = ("--task", f"a={pair / 'data.jsonl'}:text", "--task", f"b={pair / 'data.jsonl'}:text")
    command = (
        "sweep",
        pair / "base",
        pair / "tuned",
        "-o",
        tmp_path / "sweep",
        *task,
        "--origin",
        "a",
        "--target",
        "b",
    )
    command += ("--method", "interpolate", "--weight", 0.5, "--limit", 3)
    run(*command)
    results = tmp_path / "sweep" / "settings"
    before = {file.name for file in results.iterdir()}
    run(*command)
    assert {file.name for file in results.iterdir()} == before
    pictures = list(pair.rglob("*.png"))
    for one, other in zip(pictures, [*pictures[1:], pictures[0]], strict=True):
        (tmp_path / f"{one.stem}-moved").write_bytes(other.read_bytes())
    for one in pictures:
        one.write_bytes((tmp_path / f"{one.stem}-moved").read_bytes())
    run(*command)
    assert {file.name for file in results.iterdir()} > before


def test_a_floor_that_no_setting_keeps_is_told(pair, tmp_path):
    command = ("sweep", pair / "base", pair / "tuned", *ends(pair), "--method", "interpolate", "--weight", 1)
    for value in (-5, 0.99, 101, "nan"):
        refused(*command, "-o", tmp_path / "x", "--min-old-kept", value, mentions=["above 1 and at most 100"])
    run(*command, "-o", tmp_path / "sweep", "--min-old-kept", 100)
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    old = {point["label"]: point["test"]["origin"]["value"] for point in found["points"]}
    missed = old["interpolate 1"] < old["base"]
    assert ("no setting of interpolate keeps that" in found["rule"]) == missed


def test_a_sweep_refuses_what_it_would_ignore_and_what_it_cannot_run(pair, tmp_path):
    command = ("sweep", pair / "base", pair / "tuned", "-o", tmp_path / "sweep", *ends(pair))
    ignored = (("--distill-steps", 5), ("--weight", 0.5), ("--graft-data", pair / "data.jsonl"))
    for more in ignored:
        assert invoke(*command, "--method", "magnitude", *more).exit_code == 2
    refused(*command, mentions=["needs statistics"])
    refused(*command, "--method", "graft", mentions=["trains on the fine-tuning data"])
    kinds = ("--validation", f"a={pair / 'data.jsonl'}:text", "--validation", f"b={pair / 'new.jsonl'}:generate")
    (pair / "new.jsonl").write_text('{"prompt": "a", "response": "b", "text": "ab"}\n')
    refused(*command, "--method", "magnitude", *kinds, mentions=["of kind generate"])
    assert not (tmp_path / "sweep").exists()


def test_pictures_and_pages_may_lie_in_a_sweeps_folder(pair, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "sweep"
    command = ("sweep", pair / "base", pair / "tuned", "-o", out, *ends(pair), "--method", "magnitude")
    run(*command)
    for _ in range(2):
        run(*command, "--plot", out / "f.svg", "--html", out / "f.html")


def test_a_page_shows_no_figures_of_other_weights(pair, tmp_path):
    salience = ("--solver", "none", "--omega", 1)
    patch = ("patch", pair / "base", pair / "tuned", *salience, "-o", tmp_path / "out")
    run(*patch, "--density", 0.05)
    models = (pair / "base", pair / "tuned", tmp_path / "out")
    run("evaluate", *models, "--task", f"a={pair / 'data.jsonl'}:text", "--limit", 3, "-o", tmp_path / "report.json")
    page = ("inspect", tmp_path / "out", "--html", tmp_path / "page.html", "--evaluation", tmp_path / "report.json")
    run(*page)
    run(*patch, "--density", 0.5, "--overwrite")
    refused(*page, mentions=["no evaluation of"])


def test_check_tells_of_weights_that_are_no_numbers_and_of_a_command_that_works(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(pair / "tuned", tmp_path / "my broken")
    run_of = run("check", pair / "base", shutil.copytree(pair / "tuned", tmp_path / "my model")).stdout
    assert f"'{tmp_path / 'my model'}'" in run_of.replace("\n", "")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused("check", pair / "base", broken, mentions=["down_proj", "NaN"])


def test_one_file_is_not_both_report_and_picture(pair, tmp_path):
    pytest.importorskip("matplotlib")
    given = ("-o", tmp_path / "same.png", "--plot", tmp_path / "same.png")
    assert invoke("evaluate", pair / "base", pair / "tuned", *ends(pair), *given).exit_code == 2
