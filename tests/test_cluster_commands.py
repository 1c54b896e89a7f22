"""The commands in `cluster/` and in the documents on it: the program would understand them."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cluster_files import DOCUMENTS, ROOT, named

from dpt_search.cli import HELP
from dpt_search.config import check
from dpt_search.options import DESCRIPTIONS, read_config
from search_spaces import BadInput


def commands_in(text: str, tree: Any = None) -> list[list[str]]:
    """Return the arguments of every call of the program; of one that goes to a cluster, of what is to run there.

    Args:
        text: a document, or a file of `cluster/`.
        tree: the file's content; its comments and its entry point are looked at.
    """
    lines = re.sub(r"\\\n\s*#?\s*", " ", text).splitlines()
    if tree is not None:
        lines = [line for line in lines if line.lstrip().startswith("#")] + [tree.get("spec", {}).get("entrypoint", "")]
    found = []
    for line in lines:
        for call in re.findall(r"(?:^|[\s`(])(?:python -m dpt_search|dpt-search) ([a-z].*?)(?:`|$)", line):
            arguments = shlex.split(call, comments=True)
            if arguments[0] == "submit":
                arguments = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
            if arguments and not {"-h", "--help", "--help-all", "..."} & set(arguments):
                found.append(arguments)
    return found


def understand(arguments: list[str]) -> None:
    """Read a command's arguments as the program does, without running it."""
    verb, *rest = arguments
    if verb == "run":
        check(read_config(verb, rest))
    elif f"\n  {verb} " not in HELP and verb not in DESCRIPTIONS:
        raise BadInput(f"no verb {verb!r}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_command_is_understood(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The user's own configuration, which the documents speak of.
    embedded = ROOT / "dpt_search" / "embedded" / "fashion_mnist" / "run.yaml"
    (tmp_path / "run.yaml").write_text(embedded.read_text())
    text = path.read_text()
    tree = yaml.safe_load(text) if path.suffix == ".yaml" else None
    found = commands_in(text, tree)
    # Every file tells how it is used.
    assert found or path.name == "README.md"
    for arguments in found:
        # A run directory is opened to see whether it has a configuration.
        understand([argument.replace("s3://BUCKET", str(tmp_path)) for argument in arguments])


@pytest.mark.parametrize(
    "line",
    [
        "python -m dpt_search run --devise cuda",
        "dpt-search runn --config run.yaml",
        "dpt-search submit --address http://127.0.0.1:8265 -- run --device tpu",
    ],
)
def test_a_command_that_would_be_refused_is_seen(line: str) -> None:
    [arguments] = commands_in(line)
    with pytest.raises(BadInput):
        understand(arguments)
