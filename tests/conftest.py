import functools
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from helpers import do_not_wait_for_the_disk, make_pair

do_not_wait_for_the_disk()


@pytest.fixture(scope="session", autouse=True)
def _modules_are_no_garbage():
    """What was imported is left out when garbage is collected, which every command does: a fifth of a second each."""
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_command_line():
    """Typer makes the parsers of all commands anew for each call in a process: here once."""
    import typer.testing

    if hasattr(typer.testing, "_get_command"):
        typer.testing._get_command = functools.cache(typer.testing._get_command)


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory):
    """A tiny float32 Llama pair with data and statistics; read only."""
    return _with_stats(make_pair(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session")
def gpt2_pair(tmp_path_factory):
    """A tiny float32 GPT-2 pair (transposed weights, biases) with data and statistics; read only."""
    return _with_stats(make_pair(tmp_path_factory.mktemp("gpt2"), "gpt2"))


def _with_stats(folder):
    from tailorcli import calibrate_model

    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    return folder
