"""What goes wrong, in one line that names the next step."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..output import printable


class CommandError(Exception):
    """What a user can put right; the message is one line that names the next step."""


def explain(error: BaseException) -> str:
    """An error that a command ended with, in one line of printable characters."""
    # Those of Transformers and torch run over several lines.
    text = " ".join(str(error).split())
    if isinstance(error, PermissionError):
        where = f" for {error.filename}" if error.filename else ""
        text = f"no permission{where}: change its permissions, or choose another place"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" of {error.filename}" if error.filename else ""
        text = f"no space left on the device{where}: make room, try again"
    elif not isinstance(error, CommandError | ImportError | OSError | RuntimeError | ValueError) or not text:
        text = f"unexpected {type(error).__name__}{f': {text}' if text else ''}; --debug shows where it comes from"
    return printable(text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_transport_error(error: BaseException) -> bool:
    # By name: which client raises it, httpx or its successor, depends on the version of huggingface_hub.
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


@contextmanager
def hub_errors(what: str, name: str) -> Iterator[None]:
    """Turns what goes wrong with a `"model"` or `"dataset"` on the Hub into a [`CommandError`]; other errors pass."""
    try:
        yield
    except Exception as error:
        message = _hub_message(list(_causes(error)), what, name)
        if message is None:
            raise
        raise CommandError(message) from error


def _hub_message(causes: list[BaseException], what: str, name: str) -> str | None:
    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if any("trust_remote_code" in str(cause) for cause in causes if isinstance(cause, ValueError)):
        return (
            f"{name} comes with code of its own, and this command runs no code from a repository: name a {what} that "
            "Transformers loads without, or load it in Python"
        )
    endpoint = constants.ENDPOINT
    log_in = "log in with `hf auth login` (or set HF_TOKEN)"
    if first(GatedRepoError):
        return f"access to {name} is granted on request: ask for it at {endpoint}/{name}, then {log_in}"
    if first(RepositoryNotFoundError, HFValidationError):
        return (
            f"there is no {what} {name!r}, neither a folder here nor on the Hub, or it is private: check the name; "
            f"for a private one, {log_in}"
        )
    http = first(HfHubHTTPError)
    response = getattr(http, "response", None)
    if response is not None and response.status_code in (401, 403):
        return f"the Hub refuses the token that is set, or it does not give access to {name}: {log_in}"
    if constants.HF_HUB_OFFLINE and first(OfflineModeIsEnabled, LocalEntryNotFoundError):
        return (
            f"{name} is neither a folder here nor in the cache, and HF_HUB_OFFLINE is set: unset it, or name a folder"
        )
    if first(LocalEntryNotFoundError, ConnectionError) or any(map(_is_transport_error, causes)):
        return (
            f"{name} is neither a folder here nor in the cache, and {endpoint} cannot be reached: check the network, "
            "or name a folder"
        )
    if response is not None and response.status_code >= 500:
        return f"{endpoint} answers {response.status_code} for {name}: try again later, or name a folder"
    return None
