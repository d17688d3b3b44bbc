"""Names and texts that others may have written, for Markdown, spreadsheets and plots."""

import re

from sidfast.common.errors import one_line

_FORMULA = ("=", "+", "-", "@")
_LABEL = 60                                              # characters of a name in a plot


def markdown(text):
    """Text as it is, within a line or a cell of a table: no markup, no HTML, no end of the cell."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", one_line(text, 10**5)).replace("<", "&lt;")


def spreadsheet(value):
    """A value of a CSV table, None as "". Spreadsheets run text that begins like a formula: it gets an apostrophe, by
    which they know text."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def plot_label(text):
    """A name in a plot: at most 60 characters, no mathematics, and a legend does not leave it out."""
    text = one_line(text, _LABEL - len(" [...] ")).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
