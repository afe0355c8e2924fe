from pathlib import Path

from jaxserve.cli.options_page import page

ROOT = Path(__file__).parents[2]


def test_the_page_of_options_is_current():
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == page(), "run: python -m jaxserve.cli.options_page > docs/configuration.md"
