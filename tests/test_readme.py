"""What README.md says of the tests is so: each test that it names as a proof is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


def names_in(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {it.name for it in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(it, functions)}


def missing_from(text: str) -> list[str]:
    return [f"{path}::{name}" for path, name in NAMED.findall(text) if name not in names_in(ROOT / path)]


def test_every_test_that_the_readme_names_is_there() -> None:
    assert missing_from((ROOT / "README.md").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "name", ["tests/test_readme.py::test_of_nothing", "tests/nothing.py::test_x", "tests/test_readme.py::ROOT"]
)
def test_one_that_is_not_there_would_be_found(name: str) -> None:
    assert missing_from(f"| risk | `{name}` |") == [name]
    assert missing_from("`tests/test_readme.py::missing_from`") == []
