"""Put a finished output on the Hub, and tell before hours of work whether that can be done."""

from __future__ import annotations

from pathlib import Path

from tailorcli.errors import OptionsError, OutputError, first_line
from tailorcli.files import in_shell
from tailorcli.patchfile.report import RUN_FILE

_LOGIN = "log in: hf auth login; or upload OUT later: hf upload NAME OUT"


def check_push(name: str | None) -> None:
    """Whether there is a Hub, and somebody who may write to it, to take the output as ``name``; None is not asked for.

    Raises OptionsError.
    """
    if name is None:
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OptionsError(f"--push-to-hub: {first_line(error)}", "pass NAME or ORG/NAME") from error
    if constants.HF_HUB_OFFLINE:
        what = "--push-to-hub needs the network, and HF_HUB_OFFLINE is set"
        raise OptionsError(what, "unset it, or upload OUT later: hf upload NAME OUT")
    try:
        HfApi().whoami()
    except Exception as error:  # whatever its clients raise: no token, no network, a token that ended
        raise OptionsError(f"--push-to-hub {name}: the Hub knows nobody here: {first_line(error)}", _LOGIN) from error


def push_folder(folder: Path, name: str) -> str:
    """Upload a finished output as the model ``name``, and give its address; the run record, which is local, stays.

    Raises OutputError; the output itself is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            ignore_patterns=[RUN_FILE],
            commit_message="Upload a model patched by tailorcli",
        )
    except Exception as error:  # of any of its clients
        what = f"{folder} is finished, but could not be pushed to {name}: {first_line(error)}"
        raise OutputError(what, f"upload it: hf upload {name} {in_shell(folder)}") from error
    return str(made)
