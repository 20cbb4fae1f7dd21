"""The card of an output: what the Hub reads in front, what a person reads below, and where it goes from here."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import folder_digest, invoke, make_adapter, make_pair, refused, run

from tailorcli.checkpoint.folder import CARD, TUNED_CARD
from tailorcli.options import PatchOptions
from tailorcli.patchfile.report import load_report
from tailorcli.runs.again import NEW, RETAINED, SELF_WRITTEN, merge_command, patch_command, shell_text
from tailorcli.runs.card import BEGIN, END, Source, front_of, with_evaluation
from tailorcli.runs.evaluated import read_evaluation
from tailorcli.units import parse_size

TUNED_FRONT = """---
license: apache-2.0
base_model: org/small
datasets: [org/questions]
language: en
pipeline_tag: text-generation
---
# The fine-tuned model
"""
QUICK = ("--solver", "none", "--omega", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("card"))
    (folder / "tuned" / CARD).write_text(TUNED_FRONT)
    (folder / "base" / CARD).write_text("---\nlicense: mit\n---\n# The base\n")
    options = ("--density", 0.2, "--exclude", "*norm*", "--task", "names")
    paths = (folder / "base", folder / "tuned", "-o", folder / "out", "--patch-file", folder / "p.safetensors")
    run("patch", *paths, *QUICK, *options)
    return folder


def front(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / CARD).data.to_dict()


def test_the_hub_reads_what_the_model_is_made_of(made):
    found = front(made / "out")
    assert found.pop("tags") == ["tailorcli", "model-tailor"]
    assert found == {
        "base_model": ["org/small"],
        "base_model_relation": "finetune",
        "datasets": ["org/questions"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "language": "en",
        "pipeline_tag": "text-generation",
    }


def test_the_card_says_what_was_done_and_links_the_fine_tuned_models_own(made):
    text = (made / "out" / CARD).read_text()
    assert "`tuned` is `org/small` after fine-tuning. Of each tensor that is patched this model keeps the 20%" in text
    assert "`org/small` has `mit`, `tuned` has `apache-2.0`" in text
    assert f"]({TUNED_CARD})" in text
    assert (made / "out" / TUNED_CARD).read_text() == TUNED_FRONT


def test_a_card_tells_neither_paths_nor_times(made, tmp_path):
    text = (made / "out" / CARD).read_text()
    assert str(made) not in text
    assert str(Path.home()) not in text
    again = tmp_path / "again"
    run(
        "patch",
        made / "base",
        made / "tuned",
        "-o",
        again,
        *QUICK,
        "--density",
        0.2,
        "--exclude",
        "*norm*",
        "--task",
        "names",
    )
    assert (again / CARD).read_text() == text


def test_the_command_in_the_report_makes_the_same_bytes_again(made, tmp_path):
    report = load_report(made / "out" / "tailor_report.json")
    inputs = {role: entry["path"] for role, entry in report.inputs.items()}
    _, *words = patch_command(report.options, inputs, str(tmp_path / "out"))
    run(*words)
    assert folder_digest(tmp_path / "out") == folder_digest(made / "out")


def test_the_command_names_the_size_of_a_shard_with_its_unit():
    words = patch_command(PatchOptions(max_shard_size=20_000).to_dict(), {"base": "base", "tuned": "tuned"})
    assert parse_size(words[words.index("--max-shard-size") + 1]) == 20_000


def test_apply_writes_the_card_that_patch_wrote(made, tmp_path):
    run("apply", made / "base", made / "p.safetensors", "-o", tmp_path / "out")
    assert folder_digest(tmp_path / "out") == folder_digest(made / "out")


def test_a_merge_has_a_card_of_its_own(made, tmp_path):
    other = tmp_path / "second.safetensors"
    run("patch", made / "base", made / "tuned", "--patch-file", other, *QUICK, "--density", 0.1, "--seed", 3)
    files = (made / "p.safetensors", other)
    run("merge-multi", made / "base", *files, "--method", "patches", "-o", tmp_path / "out")
    found, text = front(tmp_path / "out"), (tmp_path / "out" / CARD).read_text()
    assert found["base_model_relation"] == "merge"
    assert found["license"] == "apache-2.0"
    assert "merge" in found["tags"]
    assert "the patches of `names` and `second` in it" in text
    assert str(tmp_path) not in text
    assert (tmp_path / "out" / TUNED_CARD).read_text() == TUNED_FRONT
    report = load_report(tmp_path / "out" / "tailor_report.json")
    inputs = {role: entry["path"] for role, entry in report.inputs.items()}
    run(*merge_command(report.options, inputs, str(tmp_path / "again"))[1:])
    assert folder_digest(tmp_path / "again") == folder_digest(tmp_path / "out")


def test_an_adapter_names_its_base_and_both_cards_are_kept(tmp_path):
    make_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/base-of-adapter"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter" / CARD).write_text("# adapter\n")
    (tmp_path / "base" / CARD).write_text("# base\n")
    run("patch", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", *QUICK)
    assert front(tmp_path / "out")["base_model"] == ["org/base-of-adapter"]
    kept = {name: (tmp_path / "out" / name).read_text() for name in (TUNED_CARD, "BASE_README.md")}
    assert kept == {TUNED_CARD: "# adapter\n", "BASE_README.md": "# base\n"}


def test_an_id_is_known_by_the_hubs_cache_and_a_path_is_none(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--my--name" / "snapshots" / ("0123abcd" * 5)
    snapshot.mkdir(parents=True)
    assert Source.of(snapshot).hub_id == "org/my--name"
    assert Source.of(snapshot).argument == "org/my--name@" + "0123abcd" * 5  # what a command takes
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert Source.of(tmp_path / "x", "runs/base").hub_id is None  # a folder that is there
    assert Source.of(tmp_path / "x", "/data/base").hub_id is None


def test_the_language_no_is_a_language():
    assert front_of(b"---\nlanguage:\n- en\n- no\n---\n")["language"] == ["en", "no"]
    assert front_of(b"---\nlanguage: no\n---\n") == {"language": "no"}


def test_a_dataset_of_the_hub_is_named_in_front(made, tmp_path):
    stats = tmp_path / "stats"
    run("calibrate", made / "tuned", "--data", made / "data.jsonl", "-o", stats, "--num-samples", 4)
    manifest = json.loads((stats / "manifest.json").read_text())
    manifest["data"]["file"] = "org/answers:main:train"  # as calibrate --data writes it
    (stats / "manifest.json").write_text(json.dumps(manifest))
    run("patch", made / "base", made / "tuned", "-o", tmp_path / "out", "--stats", stats)
    assert front(tmp_path / "out")["datasets"] == ["org/questions", "org/answers"]
    assert "tokens of org/answers |" in (tmp_path / "out" / CARD).read_text()


@pytest.mark.parametrize(
    "content",
    [b"", b"# no front", b"---\n: : [\n---\n", b"---\n- a\n---\n", b"---\nlicense: [1]\n---\n", b"\xff\xfe---\n",
     b"---\n" + b"[" * 5000 + b"\n---\n", b"---\nlicense: \"a\\nb\"\n---\n", b"---\n2: 3\nlicense: 2020-01-01\n---\n"],
)  # fmt: skip
def test_a_card_that_cannot_be_read_carries_nothing_on(content):
    assert front_of(content) == {}


def test_names_in_a_card_are_letters_and_no_markup(tmp_path):
    folder = make_pair(tmp_path)
    strange = tmp_path / "a`|<b>\n"
    (folder / "tuned").rename(strange)
    run("patch", folder / "base", strange, "-o", tmp_path / "out", *QUICK)
    text = (tmp_path / "out" / CARD).read_text()
    assert "`a'|<b>\\n` is" in text
    assert r"# a\`\|&lt;b>\\n, patched" in text


def test_evaluate_writes_its_table_into_our_cards_alone(made, tmp_path):
    for name in ("base", "tuned", "out"):
        shutil.copytree(made / name, tmp_path / name)
    others = [folder_digest(tmp_path / name) for name in ("base", "tuned")]
    models = [tmp_path / name for name in ("base", "tuned", "out")]
    ends = ("--base", models[0], "--tuned", models[1])
    tasks = ("--task", f"a={made / 'data.jsonl'}:text", "--task", f"b={made / 'data.jsonl'}:text")
    shown = run("evaluate", *models, *tasks, *ends, "--origin", "a", "--target", "b", "--write-card", "--limit", 4)
    assert f"left {models[0]} alone" in shown.stderr
    assert [folder_digest(tmp_path / name) for name in ("base", "tuned")] == others
    text = (models[2] / CARD).read_text()
    assert "| model | old tasks | new tasks | H |" in text
    assert "| `base` (base) |" in text
    assert "| **this model** |" in text
    assert str(tmp_path) not in text + (models[2] / "tailor_evaluation.json").read_text()
    run("evaluate", models[2], *tasks, "--write-card", "--limit", 4)
    later = (models[2] / CARD).read_text()
    assert later.count("## Evaluation") == 1
    assert "| model | `a` | `b` |" in later
    assert read_evaluation(models[2] / "tailor_evaluation.json")["model"] == "out"
    run("verify", models[2], "--base", models[0])
    run("patch", *models[:2], "-o", models[2], *QUICK, "--overwrite")  # another model: not measured
    assert not (models[2] / "tailor_evaluation.json").exists()
    assert "## Evaluation" not in (models[2] / CARD).read_text()


def test_a_table_finds_its_place_or_goes_to_the_end():
    assert with_evaluation(f"x\n{BEGIN}\nold\n{END}\ny\n", ["new"]) == f"x\n{BEGIN}\nnew\n{END}\ny\n"
    assert with_evaluation("x\n", ["new"]) == f"x\n\n{BEGIN}\nnew\n{END}\n"


def test_a_command_is_broken_between_options():
    text = shell_text(["tailorcli", "patch", "a b", "--stats", "s" * 50, "--retain", "r" * 40, "-o", "OUT"])
    assert text.splitlines() == [
        f"tailorcli patch 'a b' --stats {'s' * 50} \\",
        f"  --retain {'r' * 40} -o OUT",
    ]


def test_a_command_has_numbers_in_full_and_says_how_the_data_were_read():
    inputs = {"base": "B", "tuned": "T", NEW: "d.jsonl", RETAINED: SELF_WRITTEN}
    drawn = {"path": "d.jsonl", "fingerprint": "", "dtype": "bfloat16", "prompt_column": "ask", "seq_len": "64"}
    values = PatchOptions(density=0.123456789, tolerance=1e-5, omega=1.0).resolved(True).to_dict()
    text = shell_text(patch_command(values, inputs, calibration=drawn)).replace(" \\\n  ", " ")
    assert "--data d.jsonl --seq-len 64 --dtype bfloat16 --prompt-column ask" in text
    assert "--density 0.123456789 --omega 1 --tolerance 1e-05 -o OUT" in text
    shares = merge_command({"method": "average", "weights": [2 / 3, 1 / 3]}, {"base": "B", "patch 1": "a"})
    assert [float(word) for word in shares if word[:2] == "0."] == [2 / 3, 1 / 3]


class FakeHub:
    """What of ``HfApi`` a push calls."""

    calls: list

    def whoami(self):
        self.calls.append("whoami")

    def create_repo(self, name, exist_ok):
        self.calls.append(("create", name))
        return type("Made", (), {"repo_id": f"me/{name}", "__str__": lambda _: f"hub/me/{name}"})()

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        names = {path.name for path in Path(folder_path).iterdir()} - set(ignore_patterns)
        self.calls.append(("upload", repo_id, sorted(names)))


def test_a_finished_output_is_pushed_without_the_run_record(made, tmp_path, monkeypatch):
    import huggingface_hub

    FakeHub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    out = tmp_path / "out"
    shown = run("patch", made / "base", made / "tuned", "-o", out, *QUICK, "--push-to-hub", "mine")
    assert "hub/me/mine" in shown.stderr
    assert FakeHub.calls[:2] == ["whoami", ("create", "mine")]
    _, name, files = FakeHub.calls[2]
    assert name == "me/mine"
    assert {"README.md", "model.safetensors", "config.json", "tailor_report.json"} <= set(files)
    assert "tailor_run.json" not in files


def test_a_push_that_cannot_work_is_refused_before_the_work(made, tmp_path, monkeypatch):
    import huggingface_hub

    out = tmp_path / "out"
    command = ("patch", made / "base", made / "tuned", "-o", out, *QUICK, "--push-to-hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(*command, "mine", mentions=["HF_HUB_OFFLINE"])
    refused(*command, "a/b/c", mentions=["--push-to-hub"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    class Nobody(FakeHub):
        def whoami(self):
            raise OSError("Token is required")

    monkeypatch.setattr(huggingface_hub, "HfApi", Nobody)
    assert "hf auth login" in refused(*command, "mine", mentions=["Token is required"])
    assert not out.exists()
    no_folder = ("patch", made / "base", made / "tuned", "--patch-file", tmp_path / "p.safetensors", *QUICK)
    assert invoke(*no_folder, "--push-to-hub", "mine").exit_code == 2


def test_a_push_that_fails_leaves_the_output_and_says_how_to_go_on(made, tmp_path, monkeypatch):
    import huggingface_hub

    class Full(FakeHub):
        calls = []  # noqa: RUF012

        def upload_folder(self, **_):
            raise ConnectionError("the line went dead")

    monkeypatch.setattr(huggingface_hub, "HfApi", Full)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    command = ("patch", made / "base", made / "tuned", "-o", tmp_path / "out", *QUICK, "--push-to-hub", "mine")
    result = invoke(*command)
    assert result.exit_code == 1
    assert "the line went dead" in result.stderr
    assert f"hf upload mine {tmp_path / 'out'}" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
