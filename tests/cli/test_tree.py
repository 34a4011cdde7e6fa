"""What holds for every command there is, or will be: help, `--json`, and errors in one line with the told exit code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from serve_app.cli import app
from tests.cli.conftest import Run

Command = Any  # typer's classes for what it builds have no public name

BROKEN = "redis://127.0.0.1:1/0"  # nothing listens there

# By command, why it has no --json.
WITHOUT_JSON = {
    "run": "it becomes the service",
    "ledger export": "its --format says what it writes: JSON lines, or CSV",
}
# By command, why a store that does not answer is what it was asked to find.
FINDS = {
    "doctor": "it reports on the store, with exit code 1",
}
# By command, what it is asked, where any words would not bring it as far as the store.
WORDS = {
    "workspace cap": ["ws_1", "12.50"],
    "ledger retry": ["files", "--url", "jsonl:files"],
}


def commands(group: Command, *path: str) -> Iterator[tuple[str, Command]]:
    for name, it in group.commands.items():
        if hasattr(it, "commands"):
            yield from commands(it, *path, name)
        else:
            yield " ".join((*path, name)), it


ALL = dict(commands(typer.main.get_command(app)))
every = pytest.mark.parametrize("name", ALL)


def options(command: Command) -> set[str]:
    return {word for parameter in command.params for word in parameter.opts}


def words_for(name: str, file: Path) -> list[str]:
    """What the command cannot do without; the name of a file will do for most of it."""
    if name in WORDS:
        return WORDS[name]
    needed = [it for it in ALL[name].params if it.required]
    return [
        word for it in needed for word in ([str(file)] if it.param_type_name == "argument" else [it.opts[0], str(file)])
    ]


def test_the_walk_finds_commands() -> None:
    assert {"workspace list", "key create", "ledger audit"} <= ALL.keys()
    assert ALL.keys() >= WITHOUT_JSON.keys() | FINDS.keys() | WORDS.keys()


@every
def test_a_command_says_what_it_does(run: Run, name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    assert ALL[name].help
    assert " ".join(ALL[name].help.split())[:40] in " ".join(result.stdout.split())


@every
def test_a_command_can_speak_json(name: str) -> None:
    assert ("--json" in options(ALL[name])) != (name in WITHOUT_JSON)


@every
def test_a_wrong_word_is_one_line(run: Run, name: str) -> None:
    result = run(*name.split(), "--no-such-option")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: No such option: --no-such-option. See ")
    assert result.stderr.endswith(f"{name} --help.\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [name for name, it in ALL.items() if "--store" in options(it) and name not in FINDS])
def test_a_store_that_does_not_answer_is_one_line(run: Run, name: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("")
    result = run(*name.split(), *words_for(name, file), "--store", BROKEN)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: Redis: ")  # it came as far as the store: else see WORDS


@pytest.mark.parametrize("group", [(), ("ledger",)])
def test_no_words_show_the_help(group: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "serve_app.cli", *group]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "Usage: serve-app" in result.stdout + result.stderr) == (2, True)


def test_a_mistake_of_the_program_is_one_line_without_its_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("serve_app.cli.terminal.stores.open_store", broken)
    result = run("workspace", "list", "--store", BROKEN)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: RuntimeError in test_tree.py, line ")
    assert "a secret" not in result.stderr
