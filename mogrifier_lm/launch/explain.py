"""Errors for people: what is wrong, where, and what to do, in one line."""

import re
import shlex
import sys
import traceback

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from mogrifier_lm.config import CONFIG_DIR, schemas, unknown_key
from mogrifier_lm.errors import UserError, nearest
from mogrifier_lm.terminal import plain

# Errors that the user can mend; OSError is a file or folder that cannot be read or written.
EXPECTED = (UserError, HydraException, OmegaConfBaseException, OSError)


def explain(error: BaseException) -> str:
    """One line for an error that the user can mend: the first cause that says something."""
    return plain(" ".join(_explain(error).split())) or type(error).__name__


def _explain(error: BaseException) -> str:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
    text = "\n".join(str(cause) for cause in chain)
    for cause in chain:
        if isinstance(cause, OverrideParseException):
            key, _, text = cause.override.partition("=")
            typed = shlex.quote(f'{key}="{text}"')
            return f"{cause.override} is not in Hydra's grammar; as a text in quotes it is: {typed}"
    path = re.search(r"full_key: (\S+)", text)
    unknown = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    if unknown and (schema := schemas().get(unknown[2])):
        return str(unknown_key(path[1] if path else unknown[1], schema))
    scalar = re.search(r"Error merging override (\S+)=(\S+)", text)
    if scalar and "is not a ListConfig" in text:
        return f"{scalar[1]} takes a list: {scalar[1]}=[{scalar[2]}]"
    value = re.search(r"Value '.*", text)
    if value and path:
        return f"{path[1]}: {value[0]}"
    wanted = re.search(
        r"Could not find '([\w/]+)/([^'/]*)'\s+Available options in '[\w/]+':\s+", text
    )
    if wanted:
        group, rest = wanted[1], text[wanted.end() :]
        options = re.findall(r"^\s*(\S+)$", rest.split("Config search path")[0], re.MULTILINE)
        return f"no {group}={wanted[2]}; {nearest(wanted[2], options)}"
    plugin = re.search(r"Could not load 'hydra/launcher/([a-z]+)", text)
    if plugin:
        return f"a launcher is not installed: pip install hydra-{plugin[1]}-launcher"
    missing = re.search(r"Could not load '(\w+)/([^']*)'", text)  # in a list of options
    if missing:
        options = sorted(path.stem for path in (CONFIG_DIR / missing[1]).glob("*.yaml"))
        return f"no {missing[1]}={missing[2]}; {nearest(missing[2], options)}"
    null = re.search(r"Error merging override (\S+?)=", text) if "is not Optional" in text else None
    if null or "Incompatible value 'None'" in text:
        return f"{null[1] if null else path and path[1]} must have a value, it cannot be null"
    if "Unexpected type for root" in text:  # OmegaConf's, for a key of what is null
        keys = [
            a.partition("=")[0] for a in sys.argv[1:] if a.startswith(("evaluators.", "data.e"))
        ]
        return (
            f"{' or '.join(keys)} is a key of what is not there: an evaluator has to be named "
            "beside it, evaluators=[NAME]; data.expected is given whole, {train: …}"
        )
    said = (line.strip() for cause in chain[:2] for line in str(cause).splitlines()[:1])
    return "; ".join(dict.fromkeys(filter(None, said)))


def is_of_composing(error: Exception) -> bool:
    """Whether Hydra or OmegaConf has stumbled over what was given, by an error of another kind."""
    frames = traceback.extract_tb(error.__traceback__)
    places = ("hydra/_internal", "hydra/core", "/omegaconf/", "/antlr4/", "/logging/config.py")
    return bool(frames) and any(place in frames[-1].filename for place in places)


def of_launcher(error: Exception) -> str:
    """One line for an error of joblib or submitit: a process or job that died or was refused."""
    lines = str(error).splitlines()
    died = re.match(r"Job (\S+) .*with path (.*)_result\.pkl", lines[0])
    if died:
        return (
            f"job {died[1]} {lines[1]}: its log is {died[2]}_log.out; the other jobs go on, and "
            "the same command with hydra.sweep.dir=DIR goes on with what is left"
        )
    if lines[0].startswith("A worker process"):
        return (
            "a process of the sweep was killed (too little memory?) and the others ended with it; "
            "the same command with hydra.sweep.dir=DIR goes on with what is left"
        )
    if lines[0].endswith("with trace:"):
        return f"a job failed before its run began: {lines[-1]}"
    return "; ".join(lines[:2])
