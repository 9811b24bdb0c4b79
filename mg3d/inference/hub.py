"""Export folders from the hub: only when asked for by id, only the files of the format, and a quick answer offline."""

from __future__ import annotations

from pathlib import Path

from mg3d.errors import EnvironmentProblem
from mg3d.models.language_encoders.registry import ask_hub, hub_is_off

FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.sha256",
    "preprocessor.json",
    "README.md",
    "tokenizer/*",
)
NEEDED = ("config.json", "model.safetensors", "preprocessor.json")


def download_export(name: str, revision: str | None = None) -> Path:
    """Folder of a hub model in the local cache, downloaded if it is not there.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit; the main branch when None.

    Raises:
        EnvironmentProblem: the hub does not answer, or has no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    mend = f"download {name!r} elsewhere (config.json, model.safetensors, preprocessor.json) and give the local folder"
    try:
        cached = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), local_files_only=True))
        if all((cached / file).is_file() for file in NEEDED):
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # not in the cache
    if hub_is_off():
        raise EnvironmentProblem(f"{name!r} is no local path, not in the cache, and the hub is switched off", mend)
    ask_hub(name, FILES[0], mend)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # whatever the network stack raises becomes one message
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise EnvironmentProblem(f"cannot get {name!r} from the hub: {first}", mend) from error
