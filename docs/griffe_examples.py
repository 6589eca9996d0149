"""Griffe extension of the site: `Example:` sections of docstrings are rendered as code, as `Examples:` sections are."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the sections before Griffe parses the docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
