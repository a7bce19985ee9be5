"""Whether a name means something on the Hub, found out in one request, before a library retries for half a minute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

TIMEOUT = 10.0  # seconds


def check_source(
    source: str | os.PathLike[str], kind: Literal["model", "dataset"] = "model", *, token: str | bool | None = None
) -> None:
    """Check that a folder, or a repository on the Hub or in its local cache, has this name.

    Args:
        source: Folder or id.
        kind: Of the repository.
        token: To ask the Hub with; the one that was logged in with unless given.

    Raises:
        FileNotFoundError: If there is neither; says whether the Hub could be asked.
    """
    name = os.fspath(source)
    if Path(name).expanduser().exists() or _is_cached(name, kind):
        return
    what = "folder" if kind == "model" else "file or folder"
    absent = f"there is no {what} {name}"
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(absent)
    try:
        HfApi(token=token).repo_info(name, repo_type=kind, timeout=TIMEOUT)
    except (HFValidationError, RepositoryNotFoundError):
        raise FileNotFoundError(
            f"{absent}, and the Hub has no {kind} of this name (or it is private: hf auth login)"
        ) from None
    except HfHubHTTPError:
        return  # the Hub answered; whoever loads the files says what is wrong with them
    except Exception as error:  # of the HTTP library, which differs between versions
        raise FileNotFoundError(f"{absent}, and the Hub could not be asked: {error}") from error


def _is_cached(name: str, kind: str) -> bool:
    folder = f"{kind}s--{name.replace('/', '--')}"
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    return Path(constants.HF_HUB_CACHE, folder).is_dir() or (prepared / name.replace("/", "___")).is_dir()
