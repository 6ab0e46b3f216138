"""The one printer of tables."""

import pytest

from qgnn_plugin.tables import table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    printed = table(("name", "n"), [("a", "1"), ("longer", "23")])
    assert printed.splitlines() == ["name    n", "------  --", "a       1", "longer  23"]


def test_numbers_to_the_right() -> None:
    assert table(("name", "n"), [("a", "1"), ("b", "23")], right=True).splitlines()[2] == "a      1"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(("name", "n"), [("a",)])
