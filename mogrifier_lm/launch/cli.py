"""Command lines: train's is Hydra's, that of every other command is KEY=VALUE.

Imports here are light: torch, datasets and wandb come in when a run needs them.
"""

import inspect
import io
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import hydra

from mogrifier_lm.config import CONFIG_DIR
from mogrifier_lm.errors import UserError, nearest
from mogrifier_lm.launch.explain import EXPECTED, explain, is_of_composing, of_launcher
from mogrifier_lm.launch.job import check_run, train_job
from mogrifier_lm.launch.overrides import as_meant
from mogrifier_lm.launch.signals import end_with_workers
from mogrifier_lm.machine import RANK
from mogrifier_lm.terminal import plain


def guarded(main: Callable[[], Any], after_interrupt: str = "") -> None:
    """Run an entry point; the user's errors become one line and exit code 1.

    Args:
        main: the entry point.
        after_interrupt: what is said after Ctrl-C.

    Raises:
        SystemExit: after an error.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on and leaves the words to us
    for stream in (sys.stdout, sys.stderr):  # one that is ASCII shows what it cannot as \\u00e9
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = "debug=true" in (argument.lower() for argument in sys.argv)
    try:
        main()
    except EXPECTED as error:
        if debug:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        launched = any("/joblib/" in f.filename or "/submitit/" in f.filename for f in frames)
        if debug or not (launched or is_of_composing(error)):
            raise
        line = of_launcher(error) if launched else explain(error)
        why = "" if str(error) or launched else "Hydra does not take what was given: "
        print(f"error: {why}{plain(line)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:  # it says what goes on, where a run has begun
        print(f"interrupted{f'; {error}' if str(error) else after_interrupt}", file=sys.stderr)
        sys.exit(130)


def train() -> None:
    """The command `python train.py`."""
    if RANK:  # the first process speaks for all
        logging.disable(logging.CRITICAL)
        os.environ["TQDM_DISABLE"] = "1"
    several = bool({"-m", "--multirun"} & set(sys.argv))
    sys.argv[1:] = [a if a.startswith("-") else as_meant(a, several) for a in sys.argv[1:]]
    main = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")

    def run() -> None:
        try:
            check_run(sys.argv[1:])
            end_with_workers()
            main(train_job)()
        except Exception:
            if RANK:  # where the first has failed too, torchrun ends this one meanwhile
                time.sleep(5)
            raise

    guarded(
        run, "; resume=RUN_DIR goes on from the last checkpoint, hydra.sweep.dir=DIR with a sweep"
    )


def script(main: Callable[..., Any], after_interrupt: str = "") -> None:
    """Call `main` with the KEY=VALUE arguments of the command line.

    The keys, their types and defaults are those of its parameters; a list is typed with commas,
    with brackets or without. *arguments among them, if there are, take what is no key of its own:
    overrides of train.py where they are of type str, files and folders where they are Paths. The
    docstring of its module is what --help shows, and debug=true shows the whole of an error.

    Args:
        main: of the command.
        after_interrupt: what is said after Ctrl-C.
    """
    arguments = [a for a in sys.argv[1:] if a.lower() not in ("debug=true", "debug=false")]
    guarded(lambda: _call(main, arguments), after_interrupt)


def _call(main: Callable[..., Any], arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        return print(main.__globals__["__doc__"].strip())
    parameters = dict(inspect.signature(main).parameters)
    variadic = next((p for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    rest: list[Any] = []
    if variadic:
        del parameters[variadic.name]
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in parameters:
            values[key] = _read(argument, parameters[key].annotation, value)
        elif variadic and (variadic.annotation is str if equals else variadic.annotation is Path):
            rest.append(variadic.annotation(argument))
        elif variadic and equals and not re.fullmatch(r"\w+", key):  # a path with a "=" in it
            rest.append(variadic.annotation(argument))
        elif equals:
            raise UserError(f"unknown key {key}; {nearest(key, list(parameters))}")
        else:
            raise UserError(f"{argument} is not KEY=VALUE; --help shows the keys")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in values:
            raise UserError(f"give {key}=…; --help shows the keys")
    main(*rest, **values)


def _read(argument: str, hint: Any, text: str) -> Any:
    """The value of an argument, of the type that a parameter is annotated with."""
    if get_origin(hint) is list:
        parts = text.removeprefix("[").removesuffix("]").split(",")
        return [_read(argument, get_args(hint)[0], part.strip()) for part in parts if part.strip()]
    if NoneType in get_args(hint):
        (hint,) = set(get_args(hint)) - {NoneType}
        return None if text == "null" else _read(argument, hint, text)
    try:
        return {"true": True, "false": False}[text.lower()] if hint is bool else hint(text)
    except (ValueError, KeyError) as error:
        kind = "true or false" if hint is bool else f"of type {hint.__name__}"
        raise UserError(f"{argument}: the value must be {kind}") from error
