"""Command-line flags and YAML over one configuration dataclass (jsonargparse does the work)."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from dpt_search.config import BadConfig, RunConfig
from dpt_search.recipes import PRESETS, preset
from dpt_search.store import BadRun, RunStore
from trainables.locations import resolve

EMBEDDED = "package:dpt_search/embedded/fashion_mnist/run.yaml"
"""The configuration of a run that names no model, no data and no --config."""

_SHORT = {
    "adapt_epochs": "adapt.epochs",
    "finetune_epochs": "finetune.epochs",
    "trial_epochs": "trial.epochs",
    "gated": "model.gated",
    "model": "model.name",
}
_SWITCHES = ("--baseline", "--compiled")
"""Flags that mean yes where no value follows."""
_BOOLEANS = ("true", "false", "yes", "no", "on", "off")
_RECIPES = ("adapt", "trial", "finetune")
_SHOWN = ("epochs", "batch_size", "lr")
"""What --help shows of each recipe; --help-all shows everything."""


class Parser(ArgumentParser):
    """A parser that says what is wrong in one line, and writes flags with dashes."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with exit code 2."""
        text = re.sub(r"\s+", " ", message).strip()
        text = re.sub(r"(?<![\w-])--[\w.]+", lambda m: m[0].replace("_", "-"), text)
        text = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", text)
        text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", text)
        text = re.sub(r'Parser key "([\w.]+)": ', lambda m: f"--{m[1].replace('_', '-')}: ", text)
        raise BadConfig(f"{text} (see {self.prog} --help)")

    def format_help(self) -> str:
        """Return the help with flags as users type them."""
        text: str = super().format_help()
        text = re.sub(r"(?<![\w-])--[a-z_.+]+", lambda m: m[0].replace("_", "-"), text)
        text = re.sub(r"\(type:\s[^()]*?,\s+default:\s*\)", "", text)
        text = re.sub(r"\(type:\s[^()]*?,\s+default:\s+", "(default: ", text)
        return re.sub(r"\s*\(default:\s+(null)?\)", "", text)


def config_parser(verb: str, everything: bool) -> Parser:
    """Return the parser of a verb that takes the whole configuration.

    Args:
        verb: the verb.
        everything: show every field in the help, not only those most people set.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog=f"dpt-search {verb}", usage=_usage(verb), description=DESCRIPTIONS[verb])
    if verb != "run":
        parser.add_argument("run", metavar="RUN", help="The run directory.")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the fields below.")
    parser.add_class_arguments(RunConfig)
    for action in parser._actions:
        group, _, name = action.dest.partition(".")
        if group in _RECIPES and name not in _SHOWN and not everything:
            action.help = argparse.SUPPRESS
        if action.dest in ("model", "data") or (action.dest == "run_dir" and verb != "run"):
            action.help = argparse.SUPPRESS
    parser.epilog = None if everything else f"dpt-search {verb} --help-all shows every field of the recipes too."
    return parser


def _usage(verb: str) -> str:
    return f"dpt-search {verb} [--config FILE] [options]" if verb == "run" else f"dpt-search {verb} RUN [options]"


DESCRIPTIONS = {
    "run": "Do everything: from a dense model to a faster one and a report. Goes on from what the run directory has.",
    "dense": "Open model and data, adapt the model if asked to, and check its accuracy.",
    "profile": "Measure MACs, parameters and seconds of every unit on the target device.",
    "rank": "Order the units within each kind, least important first.",
    "probe": "Train shared weights for all cells, and evaluate some with them, well spread (probe_epochs).",
    "search": "Run trials: plans, each pruned and fine-tuned briefly.",
    "recommend": "Decide which cell is best for every budget.",
    "refine": "Try swaps of one unit on the plan that is fine-tuned (refine).",
    "finetune": "Fine-tune the recommended plan for long.",
    "baseline": "Give the dense model the long fine-tune too (baseline).",
    "export": "Merge, reload, compare, test once and time the fine-tuned model.",
    "report": "Write report.html.",
}
"""Verbs that take the whole configuration, and what each does."""


def read_config(verb: str, argv: list[str]) -> RunConfig:
    """Return the configuration that flags, YAML, the run directory and the embedded default give, in that order.

    Raises:
        BadConfig: a flag or value is unknown or wrong.
        SystemExit: help was asked for, and printed.
    """
    argv = _with_values([_with_underscores(argument) for argument in argv])
    everything = "--help_all" in argv
    parser = config_parser(verb, everything)
    if everything:
        argv = ["--help"]
    if not {"-h", "--help"} & set(argv):
        argv = _with_base(argv, verb)
    argv = _with_recipe(argv)
    parsed = parser.parse_args(argv)
    if parsed.recipe:
        # Under what YAML and flags say.
        parser.set_defaults({f"finetune.{name}": value for name, value in preset(parsed.recipe).items()})
        parsed = parser.parse_args(argv)
    values = parsed.as_dict()
    directory = values.pop("run", None)
    values.pop("config", None)
    made = parser.instantiate(parsed)
    fields = {name: made[name] for name in values}
    if directory is not None:
        fields["run_dir"] = directory
    return RunConfig(**fields)


def recorded_config(directory: str) -> RunConfig:
    """Return the configuration that a run directory has.

    Raises:
        BadRun: it is no run directory.
    """
    recorded = RunStore(directory).read_json("run.json")
    if recorded is None:
        raise BadRun(f"{directory!r} is no run directory: it has no run.json")
    return read_config("dense", [f"--config={json.dumps(recorded['config'])}", directory])


def _with_underscores(argument: str) -> str:
    """Write a flag as the dataclass does, and short forms in full."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{_SHORT.get(name, name)}{equals}{value}"


def _with_values(argv: list[str]) -> list[str]:
    """Write `--baseline` as `--baseline=true` where no value follows, and the other switches of `_SWITCHES` too."""
    follows = [*argv[1:], ""][: len(argv)]
    return [
        f"{argument}=true" if argument in _SWITCHES and value.lower() not in _BOOLEANS else argument
        for argument, value in zip(argv, follows, strict=True)
    ]


def _with_base(argv: list[str], verb: str) -> list[str]:
    """Put what the flags are laid over first: the run directory's own configuration, or the embedded default."""
    named = {argument[2:].partition("=")[0].split(".")[0] for argument in argv if argument.startswith("--")}
    if "config" in named:
        return argv
    directory = _value(argv, "run_dir") if verb == "run" else _positional(argv)
    recorded = RunStore(directory).read_json("run.json") if directory else None
    if recorded is not None:
        return [f"--config={json.dumps(recorded['config'])}", *argv]
    if named & {"model", "data"}:
        return argv
    if verb != "run" and directory:
        raise BadConfig(f"{directory!r} is no run directory: begin one with --config, or name its model and data")
    return [f"--config={resolve(EMBEDDED)[1]}", *argv]


def _with_recipe(argv: list[str]) -> list[str]:
    """Put the fields of `--recipe NAME` behind all YAML and before all other flags, which go over them."""
    name = _value(argv, "recipe")
    if name not in PRESETS:
        return argv
    fields = f"--config={json.dumps({'finetune': preset(name)})}"
    files: list[str] = []
    others: list[str] = []
    position = 0
    while position < len(argv):
        flag, equals, _ = argv[position].partition("=")
        count = 2 if flag == "--config" and not equals else 1
        (files if flag == "--config" else others).extend(argv[position : position + count])
        position += count
    return [*files, fields, *others]


def _value(argv: list[str], name: str) -> str | None:
    for position, argument in enumerate(argv):
        if argument == f"--{name}" and position + 1 < len(argv):
            return argv[position + 1]
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
    return None


def _positional(argv: list[str]) -> str | None:
    """Return the first argument that is neither an option nor the value of one; all but one have a value."""
    position = 0
    while position < len(argv):
        if not argv[position].startswith("-"):
            return argv[position]
        position += 1 if "=" in argv[position] or argv[position] == "--print_config" else 2
    return None


def simple_parser(verb: str, description: str) -> Parser:
    """Return an empty parser of a verb that takes only a few arguments of its own."""
    return Parser(prog=f"dpt-search {verb}", description=description)


def parse(parser: Parser, argv: list[str]) -> Any:
    """Parse with flags written either way."""
    return parser.parse_args([_with_underscores(argument) for argument in argv])
