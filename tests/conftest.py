import functools
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

# What takes seconds to import is imported within the fixtures: pytest-xdist's first process, which runs no test, reads
# this file before it starts its workers.


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_the_disk():
    from helpers import do_not_wait_for_the_disk

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
    return _with_stats(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2_pair(tmp_path_factory):
    """A tiny float32 GPT-2 pair (transposed weights, biases) with data and statistics; read only."""
    return _with_stats(tmp_path_factory.mktemp("gpt2"), "gpt2")


def _with_stats(folder, kind="llama"):
    from helpers import make_pair

    from tailorcli import calibrate_model

    make_pair(folder, kind)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    return folder
