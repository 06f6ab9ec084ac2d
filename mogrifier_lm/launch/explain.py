"""Errors for people: what is wrong, where, and what to do, in one line."""

import dataclasses
import re
import shlex
import sys
import traceback
from typing import Any, get_args, get_type_hints

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from mogrifier_lm.config import CONFIG_DIR, Config
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
    text = "\n".join(str(cause) for cause in chain)
    path = re.search(r"full_key: (\S+)", text)
    unknown = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    hint = ""
    if unknown and (schema := schemas().get(unknown[2])):
        hint = f"; {known_keys(path[1] if path else unknown[1], schema)}"
    for cause in chain:
        if isinstance(cause, UserError):
            return f"{cause}{hint}"
    for cause in chain:
        if isinstance(cause, OverrideParseException):
            key, _, text = cause.override.partition("=")
            typed = shlex.quote(f'{key}="{text}"')
            return f"{cause.override} is not in Hydra's grammar; as a text in quotes it is: {typed}"
    if unknown and hint:
        return f"unknown key {path[1] if path else unknown[1]}{hint}"
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
        given = " ".join(a for a in sys.argv[1:] if a.startswith("evaluators=["))
        there = tuple(f"evaluators.{name}." for name in re.findall(r"\w+", given))
        keys = [
            a.partition("=")[0]
            for a in sys.argv[1:]
            if a.startswith(("evaluators.", "data.e")) and not a.startswith(there)
        ]
        return (
            f"{' or '.join(keys)} is a key of what is not there: an evaluator has to be named "
            "beside it, evaluators=[NAME]; data.expected is given whole, {train: …}"
        )
    said = (line.strip() for cause in chain[:2] for line in str(cause).splitlines()[:1])
    return "; ".join(dict.fromkeys(filter(None, said)))


def known_keys(path: str, schema: type) -> str:
    """What may be meant by a key that `schema` does not have; `path` is dotted, from the root."""
    prefix, _, key = path.rpartition(".")
    # A key of another group, as rounds is of model, or one that goes by another name, as
    # learning_rate, which the documentation of optimizer.lr says.
    keys = documented_keys()
    same = [k for k in keys if k.rpartition(".")[2] == key]
    said = [k for k, doc in keys.items() if k.startswith(prefix) and key.replace("_", " ") in doc]
    if found := same or ("_" in key and said[:1]):
        return f"did you mean {' or '.join(found)}?"
    known = [f"{prefix}.{f.name}" if prefix else f.name for f in dataclasses.fields(schema)]
    return nearest(path, known)


def documented_keys(schema: type = Config, prefix: str = "") -> dict[str, str]:
    """Dotted key → what it is said to be."""
    found: dict[str, str] = {}
    hints = get_type_hints(schema)
    for f in dataclasses.fields(schema):
        nested = schema_of(hints[f.name])
        inside = documented_keys(nested, f"{prefix}{f.name}.") if nested else {}
        found |= inside or {f"{prefix}{f.name}": f.metadata.get("doc", "")}
    return found


def schemas(schema: type = Config) -> dict[str, type]:
    """The dataclass and all in its fields, by their names."""
    found = {schema.__name__: schema}
    for hint in get_type_hints(schema).values():
        if nested := schema_of(hint):
            found |= schemas(nested)
    return found


def schema_of(hint: Any) -> type | None:
    """The dataclass in `X` or `X | None`."""
    for candidate in (hint, *get_args(hint)):
        if dataclasses.is_dataclass(candidate):
            return candidate if isinstance(candidate, type) else None
    return None


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
