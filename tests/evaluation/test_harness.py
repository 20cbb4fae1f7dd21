"""Tasks of lm-evaluation-harness beside one's own: defined here, over files of the test."""

import json
import math

import pytest
import transformers
from families import make_family_pair
from helpers import make_model, make_tokenizer, perturb, run

from tailorcli import EvaluateOptions, TailorError, evaluate_models
from tailorcli.options import HarnessOptions

lm_eval = pytest.importorskip("lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{target}"
target_delimiter: ""
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
CHOICE = 'doc_to_choice: "{{choices}}"'
WRITE = 'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 4'


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two models, their tasks as files of our own, and the same as tasks of the harness in ``work``/tasks."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "</s>"})
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        perturb(model, scale=0.3)
    records = [{"prompt": f"{n}+{n}=", "choices": [str(2 * n), str(n + 30), "x"], "answer": n % 3} for n in range(12)]
    (folder / "pick.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "tasks").mkdir()
    make = {
        "pick": {"kind": "multiple_choice", "target": "{{answer}}", "more": CHOICE, "metric": "acc"},
        "write": {"kind": "generate_until", "target": "{{choices[0]}}", "more": WRITE, "metric": "exact_match"},
        "odd": {"kind": "generate_until", "target": "{{choices[0]}}", "more": WRITE, "metric": "bleu"},
    }
    for name, parts in make.items():
        text = TASK.format(name=f"{name}_local", file=folder / "pick.jsonl", **parts)
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    group = "group: both_local\ntask: [pick_local, write_local]\naggregate_metric_list:\n"
    (folder / "tasks" / "both.yaml").write_text(group + "  - metric: acc\n    weight_by_size: false\n")
    return folder


def test_harness_tasks_stand_beside_our_own_and_count_in_h(work):
    arguments = ["--harness", "pick_local,write_local", "--harness-tasks", work / "tasks"]
    arguments += ["--task", f"own={work / 'pick.jsonl'}:choice-raw", "--target", "own"]
    arguments += ["--origin", "pick_local", "--base", work / "base", "--tuned", work / "tuned"]
    shown = run("evaluate", work / "base", work / "tuned", *arguments)
    assert "pick_local" in shown.stdout
    report = json.loads(run("evaluate", work / "base", work / "tuned", *arguments, "--json").stdout)
    assert report["tasks"]["pick_local"] == {
        "file": None,
        "kind": "harness",
        "percent_of": "acc of lm-evaluation-harness",
        "role": "origin",
        "items": 12,
        "left_out": [],
    }
    for model in report["models"]:
        ours, theirs, written = (model["tasks"][name] for name in ("own", "pick_local", "write_local"))
        assert theirs["value"] == pytest.approx(ours["value"])  # the same records, two programs
        share = theirs["value"] / 100
        assert theirs["stderr"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 11))
        assert written["metric"] == "exact_match,none"
        low, high = theirs["interval"]
        assert (high - low) / 2 == pytest.approx(1.96 * theirs["stderr"], rel=0.15)
        old, new = theirs["value"], ours["value"]
        h = model["summary"]["h_score"]
        assert h["value"] == pytest.approx(2 * old * new / (old + new))
        assert h["interval"][0] < h["value"] < h["interval"][1]
    assert report["versions"]["lm_eval"] == lm_eval.__version__


def test_images_of_the_harness_go_through_the_models_own_processor(tmp_path):
    datasets, image = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    folder = make_family_pair(tmp_path, "llava")
    rows = {
        "image": [image.open(folder / f"images/{number}.png").convert("RGB") for number in range(4)],
        "prompt": [f"<image>What is {number}?" for number in range(4)],
        "choices": [["a"]] * 4,
    }
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.to_parquet(str(folder / "d.parquet"))
    more = f"{WRITE}\ndoc_to_image: [image]"
    parts = {"kind": "generate_until", "target": "{{choices[0]}}", "more": more, "metric": "exact_match"}
    text = TASK.format(name="see_local", file=folder / "d.parquet", **parts)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "see.yaml").write_text(text.replace("path: json", "path: parquet"))
    options = HarnessOptions(("see_local",), str(folder / "tasks"))
    seen = []
    real = transformers.LlavaForConditionalGeneration.generate

    def watched(self, **given):
        seen.append(given["pixel_values"].shape[0])
        return real(self, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlavaForConditionalGeneration, "generate", watched)
        report = evaluate_models([folder / "base"], [], EvaluateOptions(batch_size=2, dtype="float32"), harness=options)
    assert report.tasks["see_local"]["items"] == 4
    assert sum(seen) == 4  # every image was there


def test_a_group_stands_for_itself_and_the_limit_counts(work):
    options = HarnessOptions(("both_local",), str(work / "tasks"))
    report = evaluate_models([work / "base"], [], EvaluateOptions(limit=5), harness=options)
    found = report.to_dict()
    assert found["tasks"]["both_local"]["items"] == 10
    assert found["models"][0]["tasks"]["both_local"]["metric"] == "acc,none"
    assert found["models"][0]["summary"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("odd_local",)}, "task 'odd_local' .* has no metric acc_norm or acc"),
        ({"tasks": ("pick_local",), "metrics": ("f1",)}, "has no metric f1"),
        ({"tasks": ("pick_local",), "metrics": ("x=f1",)}, "for a task that is not named"),
        ({"tasks": ("pick_local",), "include": "gone"}, "gone is no folder"),
    ],
)
def test_what_the_harness_cannot_do_is_one_error_before_a_model_is_loaded(work, options, message, monkeypatch):
    monkeypatch.setattr("tailorcli.evaluation.subjects.load_model", None)
    with pytest.raises(TailorError, match=message):
        evaluate_models([work / "base"], [], harness=HarnessOptions(**({"include": str(work / "tasks")} | options)))


def test_options_of_the_harness_are_checked(work, monkeypatch):
    assert "pass a task" in run("evaluate", work / "base", expect=2).stderr
    assert (
        "need --harness"
        in run(
            "evaluate", work / "base", "--task", f"t={work / 'pick.jsonl'}:choice", "--harness-shots", 1, expect=2
        ).stderr
    )
    own = f"pick_local={work / 'pick.jsonl'}:choice"
    with pytest.raises(TailorError, match="two tasks have the name 'pick_local'"):
        evaluate_models([work / "base"], [own], harness=HarnessOptions(("pick_local",), str(work / "tasks")))
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    shown = run("evaluate", work / "base", "--harness", "pick_local", expect=1).stderr
    assert "tailorcli[lm-eval]" in shown
