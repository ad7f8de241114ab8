"""What the hub's refusals mean, in one line each, and fetching a language model from it: `python -m src.hub NAME FOLDER`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

RARELY_NEEDED = (
    "original/*",
    "*.gguf",
    "*.onnx",
    "onnx/*",
    "*.msgpack",
    "*.h5",
)  # other formats of the same weights


def chain(error: BaseException) -> list[BaseException]:
    """The error and what it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def reason(error: BaseException, name: str, page: str = "") -> str | None:
    """Why the hub did not give `name` and what to do: gated, no token, bad token, typo, offline; None for an error that is not the hub's.

    page: "" for models, "datasets/" for data sets.
    """
    import huggingface_hub
    from huggingface_hub import errors

    found = chain(error)
    token = "the token in use was sent" if huggingface_hub.get_token() else "no token was sent"
    login = "set HF_TOKEN, or run `hf auth login`"

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in found)

    status = {getattr(getattr(one, "response", None), "status_code", None) for one in found}
    if any_of(errors.GatedRepoError):
        return f"{name} is gated ({token}): accept its terms at https://huggingface.co/{page}{name}, then {login}"
    if 401 in status and huggingface_hub.get_token():
        return f"the hub refuses the token in use for {name}: make another at https://huggingface.co/settings/tokens, then {login}"
    if any_of(errors.RepositoryNotFoundError, errors.HFValidationError):
        return f"there is no {name} on the hub: is it spelt owner/name, without a typo? If it is private, {login} ({token})"
    if any_of(errors.RevisionNotFoundError):
        return f"{name} is there, but not the revision asked for"
    if any_of(errors.OfflineModeIsEnabled) or (
        any_of(errors.LocalEntryNotFoundError)
        and os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    ):
        return f"{name} is not in the cache, and HF_HUB_OFFLINE forbids asking the hub: unset it, or give a folder"
    if any_of(errors.LocalEntryNotFoundError, ConnectionError) or any(
        "Connect" in type(one).__name__ for one in found
    ):
        return f"{name} is not in the cache, and the hub cannot be reached: is there a network? Else give a folder"
    if any_of(errors.HfHubHTTPError):
        return f"the hub answered {', '.join(str(code) for code in status - {None}) or 'with an error'} for {name}: try again later"
    return None


def download(name: str, folder: str | os.PathLike) -> Path:
    """Fetches a language model to folder; what is there already is not fetched again. Raises ValueError that says why not."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, local_dir=folder, ignore_patterns=list(RARELY_NEEDED)
            )
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            reason(error, name) or f"cannot fetch {name} to {folder}: {error}"
        ) from error


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.hub", description="Fetch a language model from the hub."
    )
    parser.add_argument("name", help="owner/name")
    parser.add_argument("folder", help="where it goes")
    args = parser.parse_args()
    try:
        print(f"{args.name} is in {download(args.name, args.folder)}")
    except ValueError as error:
        print(f"download_model: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
