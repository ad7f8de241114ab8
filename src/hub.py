"""Explain in one line why the Hugging Face hub refused something, and fetch language models.

usage: python -m src.hub NAME FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from src.files import error_text, printable, printable_output

# Other formats of weights that are fetched as safetensors.
RARELY_NEEDED = ("original/*", "*.gguf", "*.onnx", "onnx/*", "*.msgpack", "*.h5")
PROBE_SECONDS = 4.0  # after which the hub counts as out of reach


def reachable() -> bool:
    """Whether the hub answers at all.

    It is asked once. Without a network its client repeats each request for half a minute.
    """
    import huggingface_hub

    address = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.get_session().head(address, timeout=PROBE_SECONDS)
    except Exception:  # the errors of its client share no base class
        return False
    return True


def chain(error: BaseException) -> list[BaseException]:
    """The error and the errors that it was raised from, outermost first."""
    errors: list[BaseException] = []
    while error is not None and error not in errors:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def reason(error: BaseException, name: str, page: str = "") -> str | None:
    """Why the hub did not give `name` and what to do, or None if the error is not the hub's.

    page: the part of the hub's addresses before the name, "" for models, "datasets/" for data sets.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    raised = chain(error)
    codes = {getattr(getattr(e, "response", None), "status_code", None) for e in raised} - {None}
    has_token = bool(huggingface_hub.get_token())
    token = "the token in use was sent" if has_token else "no token was sent"
    login = "set HF_TOKEN, or run `hf auth login`"

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in raised)

    if is_any(hub_errors.GatedRepoError):
        return (
            f"{name} is gated ({token}): "
            f"accept its terms at https://huggingface.co/{page}{name}, then {login}"
        )
    if 401 in codes and has_token:
        return (
            f"the hub refuses the token in use for {name}: "
            f"make another at https://huggingface.co/settings/tokens, then {login}"
        )
    if is_any(hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        return (
            f"there is no {name} on the hub: is it spelt owner/name, without a typo? "
            f"If it is private, {login} ({token})"
        )
    if is_any(hub_errors.RevisionNotFoundError):
        return f"{name} is on the hub, but not the revision asked for"

    not_cached = is_any(hub_errors.LocalEntryNotFoundError)
    # Clients raise connection errors of their own that share nothing but the name.
    no_connection = is_any(ConnectionError) or any("Connect" in type(e).__name__ for e in raised)
    is_offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    if is_any(hub_errors.OfflineModeIsEnabled) or (is_offline and (not_cached or no_connection)):
        return (
            f"{name} is not in the cache, and HF_HUB_OFFLINE forbids asking the hub: "
            "unset it, or give a folder"
        )
    if not_cached or no_connection:
        return (
            f"{name} is not in the cache, and the hub cannot be reached: "
            "is there a network? Else give a folder"
        )
    if is_any(hub_errors.HfHubHTTPError):
        answer = ", ".join(map(str, codes)) or "with an error"
        return f"the hub answered {answer} for {name}: try again later"
    return None


def cached_folder(name: str) -> Path | None:
    """The folder in the cache with a language model of the hub, None if it is not there."""
    import huggingface_hub

    try:
        path = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # it cannot be the name of a repository
        return None
    return Path(path).parent if isinstance(path, str) else None


def download(name: str, folder: str | os.PathLike) -> Path:
    """Fetch a language model into folder, without files that are already in it.

    Where the hub is out of reach, a folder with files is taken as it is. Raises ValueError that
    says why the hub did not give the model.
    """
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            name,
            local_dir=folder,
            ignore_patterns=list(RARELY_NEEDED),
            local_files_only=not reachable(),
        )
    except (OSError, ValueError) as error:
        message = reason(error, name) or f"cannot fetch {name} to {folder}: {error}"
        raise ValueError(message) from error
    return Path(path)


@printable_output()
def main() -> int:
    from src.config import small_parser

    parser = small_parser("src.hub", "Fetch a language model from the hub.")
    parser.add_argument("name", help="owner/name")
    parser.add_argument("folder", help="folder to write it to")
    args = parser.parse_args()
    try:
        print(f"{args.name} is in {download(args.name, args.folder)}")
    except ValueError as error:
        print(f"download_model: error: {printable(error_text(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
