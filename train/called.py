"""What a user types: `python -m train.pretrain` and recipes/... in a checkout; installed, `dspnet-pretrain` and where
the recipes lie.
"""

import re
from pathlib import Path

COMMANDS = "pretrain", "evaluate", "finetune", "detect", "compare", "export", "report", "data.shard", "data.inspect"
_LAST = "|".join(name.split(".")[-1] for name in COMMANDS)
_NAMED = re.compile(rf"(?:python -m )?(?<![\w./])train\.(?:data\.)?({_LAST})\b")
_RECIPE = re.compile(r"(?<![\w./])recipes/")
_FOLDER = Path(__file__).parents[1]


def as_called(text: str) -> str:
    """A text that calls commands and recipes what they are called in a checkout, with the names that they have here."""
    if __package__ == "train":
        return text
    return _RECIPE.sub(lambda _: f"{_FOLDER}/recipes/", _NAMED.sub(r"dspnet-\1", text))
