"""docs/configuration.md is what the configuration says of itself."""

from pathlib import Path

from ibft.config import FIELDS
from ibft.reference import configuration_reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == configuration_reference(), (
        "run `python -m ibft.reference > docs/configuration.md`"
    )


def test_every_option_has_a_row_with_as_many_cells_as_the_table() -> None:
    rows = [line for line in configuration_reference().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [*FIELDS, "config"]
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert "| `lora_dropout` | number at least 0 and below 1 | `0.05` |" in "\n".join(rows)
