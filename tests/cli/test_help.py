"""What ``--help`` says, and what every command has: examples, panels, defaults, quiet, verbose, completion."""

import inspect
import re
from pathlib import Path

import pytest
import typer
from helpers import invoke, run

from tailorcli.cli import app
from tailorcli.options import CalibrateOptions, EvaluateOptions, MergeOptions, PatchOptions

GROUP = typer.main.get_command(app)
ORDER = [
    "demo",
    "check",
    "calibrate",
    "score",
    "patch",
    "inspect",
    "evaluate",
    "sweep",
    "hscore",
    "probe",
    "finetune",
    "apply",
]
COMMANDS = {name: GROUP.commands[name] for name in [*ORDER, "verify", "merge-multi"]}


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def options_of(command):
    return [param for param in command.params if param.param_type_name == "option" and param.name != "help"]


def test_commands_stand_in_the_order_of_the_work():
    shown = plain(run("--help").stdout)
    assert [name for name in re.findall(r"^│ ([a-z-]+) ", shown, re.MULTILINE) if name in COMMANDS] == list(COMMANDS)
    assert set(GROUP.commands) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_one_line_and_two_examples_that_fit_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = plain(run(name, "--help").stdout)
    assert max(map(len, shown.splitlines())) <= 80
    assert "<bool>" not in shown
    first, *_, examples = COMMANDS[name].help.split("\n\n")
    assert len(first) <= 70
    assert first in shown
    lines = examples.replace("\b\n", "").splitlines()
    assert lines[0] == "Examples:"
    assert sum(line.startswith(f"  tailorcli {name}") for line in lines[1:]) == 2
    for line in lines:
        assert line in shown  # not wrapped
    used = set(re.findall(r" (--?[a-z][a-z-]*)", examples))
    assert used <= {o for param in options_of(COMMANDS[name]) for o in param.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_stands_in_a_panel(name):
    panels = {
        None,
        "Data",
        "Statistics, with --data",
        "Which tensors",
        "Solver",
        "The method",
        "Distillation",
        "How it runs",
        "Other methods, to compare with",
        "Output",
        "Tasks of lm-evaluation-harness",
    }
    for param in options_of(COMMANDS[name]):
        assert param.help, param.name
        assert not re.search(r"[Dd]efault|beta|numel|Eq\.", param.help), param.help  # Typer states the default
        assert param.rich_help_panel in panels
        assert param.metavar == "" if param.is_flag else param.metavar, param.name
    assert {"as_json", "quiet", "verbose"} <= {param.name for param in COMMANDS[name].params}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("calibrate", CalibrateOptions),
        ("score", PatchOptions),
        ("patch", PatchOptions),
        ("evaluate", EvaluateOptions),
        ("merge-multi", MergeOptions),
    ],
)
def test_defaults_on_the_command_line_are_those_of_the_options(name, options):
    fields = {name: parameter.default for name, parameter in inspect.signature(options).parameters.items()}
    for param in options_of(COMMANDS[name]):
        if param.name in fields and fields[param.name] != ():
            assert param.default == fields[param.name], param.name


def test_computed_defaults_are_shown_like_the_others(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # where none is wrapped
    shown = plain(run("patch", "--help").stdout)
    assert "[default: (0.1; without --data and --retain 0.01)]" in shown
    assert "[default: 0.1]" in shown


def test_a_bare_call_shows_the_help():
    assert run().stdout == run("--help").stdout  # exit code 0
    assert "<bool>" not in run("--help").stdout
    run("patch", expect=2)


def test_the_version_names_what_a_report_of_a_bug_needs():
    import torch
    import transformers

    from tailorcli import __version__

    lines = run("--version").stdout.splitlines()
    assert lines[0] == f"tailorcli {__version__}"
    # A wheel of PyPI has the build, +cu130, in torch.__version__ alone.
    assert lines[1] in {f"torch {torch.__version__}", f"torch {torch.__version__.partition('+')[0]}"}
    assert lines[2] == f"transformers {transformers.__version__}"


def test_completion_can_be_installed():
    assert "--install-completion" in plain(run("--help").stdout)


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (("patch", "a", "b", "-o", "c", "--solver", "exact"), ["joint", "sequential", "none"]),
        (("patch", "a", "b", "-o", "c", "--method", "ties"), ["tailor", "interpolate", "dare", "magnitude", "graft"]),
        (("patch", "a", "b", "-o", "c", "--threshold", "row"), ["tensor", "global"]),
        (("patch", "a", "b", "-o", "c", "--preset", "papier"), ["paper"]),
        (("sweep", "a", "b", "-o", "c", "--solver", "exact"), ["joint", "sequential", "none"]),
        (("merge-multi", "a", "b", "-o", "c", "--method", "sum"), ["average", "joint", "patches"]),
        (("calibrate", "a", "--data", "b", "-o", "c", "--text-mode", "page"), ["line", "chunk"]),
        (("evaluate", "a", "--task", "x=b:text", "--dtype", "int8"), ["auto", "float32", "bfloat16", "float16"]),
    ],
)
def test_a_word_that_is_no_choice_is_a_usage_error_that_names_the_choices(arguments, choices):
    shown = plain(run(*arguments, expect=2).stderr)
    for word in (arguments[-1], *choices):
        assert f"'{word}'" in shown
    assert "Value error" not in shown
    assert not Path("c").exists()


def test_a_method_for_the_benchmarks_is_not_offered():
    assert "tailor-released" not in plain(run("patch", "--help").stdout)


def test_quiet_leaves_the_result_alone_on_the_terminal(llama_pair, tmp_path):
    arguments = ("patch", llama_pair / "base", llama_pair / "tuned", "--stats", llama_pair / "stats")
    normal = run(*arguments, "-o", tmp_path / "a", "--exclude", "*norm*")
    quiet = run(*arguments, "-o", tmp_path / "b", "--exclude", "*norm*", "--quiet")
    assert "left at base" in normal.stderr
    assert quiet.stderr == ""
    assert quiet.stdout.replace("/b", "/a") == normal.stdout
    assert "left at base" in run(*arguments, "-o", tmp_path / "c", "--exclude", "*norm*").stderr  # of that run alone


def test_verbose_names_every_tensor_and_the_seconds_of_each_stage(llama_pair, tmp_path):
    arguments = ("patch", llama_pair / "base", llama_pair / "tuned", "--stats", llama_pair / "stats")
    normal = run(*arguments, "-o", tmp_path / "a", "--exclude", "*norm*").stderr
    verbose = run(*arguments, "-o", tmp_path / "b", "--exclude", "*norm*", "-v").stderr
    assert "model.norm.weight" in verbose
    assert "and 1 more" in normal
    assert "more" not in verbose
    assert re.search(r"of which .*solve \d", verbose)
    assert "of which" not in normal
    run(*arguments, "-o", tmp_path / "c", "-q", "-v", expect=2)


def test_verbose_shows_where_an_error_arose(tmp_path):
    assert "Traceback" not in run("inspect", tmp_path / "none", expect=1).stderr
    shown = run("inspect", tmp_path / "none", "-v", expect=1).stderr
    assert "Traceback" in shown
    assert "error:" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("patch", "a", "b", "-o", "c"), "with --resume"),
        (("patch", "a", "b", "-o", "c", "--dry-run"), None),
        (("apply", "a", "b", "-o", "c"), "with --resume"),
        (("merge-multi", "a", "b", "-o", "c"), "with --resume"),
        (("calibrate", "a", "--data", "b", "-o", "c"), None),
        (("evaluate", "a", "--task", "x=b:text"), None),
        (("sweep", "a", "b", "-o", "c", "--task", "x=b:text", "--origin", "x", "--target", "y"), "same command"),
    ],
)
def test_ctrl_c_promises_only_what_the_command_has(arguments, says, monkeypatch):
    homes = {
        "patch": "patching.patch.plan_patch" if "--dry-run" in arguments else "patching.patch.patch_checkpoint",
        "apply": "patching.apply.apply_patch",
        "merge-multi": "merging.merge.merge_patches",
        "calibrate": "calibration.calibrate.calibrate_model",
        "evaluate": "evaluation.evaluate.evaluate_models",
        "sweep": "sweep.run.run_sweep",
    }

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tailorcli.{homes[arguments[0]]}", interrupted)
    shown = run(*arguments, expect=130).stderr
    assert "interrupted" in shown
    if says is None:
        assert "resume" not in shown
    else:
        assert says in shown


def test_a_leading_tilde_is_the_users_folder(llama_pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(llama_pair))
    assert run("inspect", "~/base", "--json").stdout == run("inspect", llama_pair / "base", "--json").stdout
    out = tmp_path / "out"
    run("patch", "~/base", "~/tuned", "--stats", "~/stats", "-o", out)
    assert run("verify", out, "--base", "~/base").exit_code == 0
    assert "does not exist" in run("inspect", "~nobody-of-that-name/x", expect=1).stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("patch", "B", "T", "--density", "10%"), "'10%' is not a number"),
        (("sweep", "B", "T", "--density", "0.1", "--density", "x"), "'x' is not a number"),
        (("evaluate", "M", "--limit", "1.5"), "'1.5' is not a whole number"),
    ],
)
def test_a_word_in_place_of_a_number_is_named(given, said):
    found = invoke(*given)
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.replace("│", " ").split())
