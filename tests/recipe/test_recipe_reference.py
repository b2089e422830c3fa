"""The reference of recipe keys in recipes/README.md follows from the schema."""

import pytest

from omnimem.recipe.reference import README, main, reference, update
from omnimem.recipe.schema import KEY_TYPES


def test_the_readme_holds_the_present_reference():
    text = README.read_text(encoding="utf-8")
    assert update(text) == text, "run python -m omnimem.recipe.reference --write"


@pytest.mark.parametrize("key", KEY_TYPES)
def test_every_key_has_a_row_with_a_default_and_a_meaning(key):
    (row,) = [line for line in reference().splitlines() if line.startswith(f"| `{key}` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 4 and all(cells)


def test_the_command_prints_the_reference_or_its_usage(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == reference() + "\n"
    assert main(["--wirte"]) == 2
    assert "usage: python -m omnimem.recipe.reference [--write]" in capsys.readouterr().err
