"""The README's figures are those of a recorded result."""

from pathlib import Path

import figures


def test_the_table_is_drawn_from_the_file_it_names():
    readme = figures.README.read_text()
    path = Path(figures.BLOCK.search(readme).group(2))
    assert figures.with_table(readme, path) == readme
