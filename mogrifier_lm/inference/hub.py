"""The Hugging Face hub, whose refusals are one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mogrifier_lm.errors import UserError, one_line


@contextmanager
def hub(what: str) -> Iterator[Any]:
    """The package huggingface_hub.

    Args:
        what: is asked of it, as errors begin.

    Raises:
        UserError: no such package, name or file there, nobody logged in, no connection.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise UserError(f"{what}: pip install huggingface_hub for the hub") from error
    # Of the HTTP library below it, which is another one from version to version.
    of_connection: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield huggingface_hub
    except (of_connection, OSError, HFValidationError) as error:
        response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
        refused = response is not None and response.status_code in (401, 403)
        todo = "; hf auth login, or HF_TOKEN, says who you are" if refused else ""
        raise UserError(f"{what}: {one_line(error)}{todo}") from error


def download(name: str) -> Path:
    """The folder of a model, "owner/name", in the hub's own cache; fetched where it is new.

    Raises:
        UserError: as `hub`.
    """
    with hub(f"no folder {name}, nor on the hub") as package:
        return Path(package.snapshot_download(name))
