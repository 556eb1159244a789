"""What goes wrong with the hub, as what a user can do about it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors, get_token
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # made lazily

from lamina.errors import CheckpointError, LaminaError, StoreError

__all__ = ["hub_errors", "is_transient"]

_AGAIN = "Run the same command again: it goes on from here."


@contextmanager
def hub_errors(repo: str, begun_with: str | None = None) -> Iterator[None]:
    """Turns what huggingface_hub raises into our errors.

    Args:
        begun_with: the commit that was asked for since a preparation began with it, if one did.

    Raises:
        CheckpointError: the hub can't be reached, or doesn't give the model.
        StoreError: it has that commit no more.
        OSError: what the disk says.
    """
    try:
        yield
    except LaminaError:
        raise
    except Exception as error:
        if isinstance(error, errors.RevisionNotFoundError) and begun_with is not None:
            raise StoreError(
                f"This store was begun with version {begun_with[:12]} of {repo}, which the hub has "
                "no more.",
                hint="Delete its folder and prepare anew.",
            ) from error
        explained = _explained(repo, error)
        if explained is None:
            raise
        raise explained from error


def _explained(repo: str, error: BaseException) -> CheckpointError | None:
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        # Only the outermost of what happened: a file isn't here, since the hub said no.
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(repo, error)
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{repo} can't be the name of a model on the hub.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError(
            f"HF_HUB_OFFLINE is set, and {repo} isn't in the cache {constants.HF_HUB_CACHE}.",
            hint="Unset it, or give the folder of a checkpoint.",
        )
    if isinstance(error, (*_transport_errors(), errors.LocalEntryNotFoundError)):
        return CheckpointError(
            f"The connection to {constants.ENDPOINT} failed: {_first_line(error)}.",
            hint=f"Check the network (and the proxy, if you need one). {_AGAIN}",
        )
    if is_transient(error):
        return CheckpointError(f"{repo} couldn't be downloaded: {_first_line(error)}.", hint=_AGAIN)
    return None


def _refused(repo: str, error: errors.HfHubHTTPError) -> CheckpointError:
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repo} is gated: its owner gives it only to those who accept its terms.",
            hint=f"Accept them on {constants.ENDPOINT}/{repo}, {_log_in()}, and run this again.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"The hub has no model {repo}, or you may not see it.",
            hint=f"Check the name; if it is private, {_log_in()}.",
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return CheckpointError(
            f"{repo} hasn't {str(error.response.url).rpartition('/')[2]}, so it isn't a model as "
            "transformers keeps it.",
            hint="Give the name of a repository with a config.json and *.safetensors.",
        )
    code = error.response.status_code
    if code in (401, 403):
        return CheckpointError(
            f"The hub refuses {repo} ({code}): {error.server_message or _first_line(error)}.",
            hint=f"See that your token may read this model (for gated ones that is a right of its "
            f"own), or {_log_in()}.",
        )
    return CheckpointError(
        f"The hub answered {code} when asked for {repo}: {_first_line(error)}.", hint=_AGAIN
    )


def _log_in() -> str:
    where = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "you are logged in"
    if get_token() is None:
        return "run `hf auth login` (or set HF_TOKEN)"
    return f"see that it is with the account of your token ({where}; `hf auth login` changes it)"


def is_transient(error: BaseException | None) -> bool:
    """Whether asking again may help."""
    if isinstance(error, errors.HfHubHTTPError):
        code = error.response.status_code
        return code in (408, 429) or code >= 500
    if isinstance(error, errors.LocalEntryNotFoundError):
        return is_transient(error.__cause__)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    if isinstance(error, OSError):
        return error.errno is None  # not what the disk says: a file that came out too short
    # The hub's other way of transfer raises RuntimeError, or an error of its own since 2.0.
    xet = getattr(errors, "XetDownloadError", RuntimeError)
    return isinstance(error, (*_transport_errors(), RuntimeError, xet))


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the library raises with which huggingface_hub speaks HTTP: it has changed it."""
    library = sys.modules[type(get_session()).__module__.partition(".")[0]]
    return (library.HTTPError,)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
