"""What a user types to run a command: `python -m train.pretrain` in a checkout, `dspnet-pretrain` installed."""

import re

COMMANDS = "pretrain", "evaluate", "finetune", "detect", "compare", "export", "report", "data.shard", "data.inspect"
_LAST = "|".join(name.split(".")[-1] for name in COMMANDS)
_NAMED = re.compile(rf"(?:python -m )?(?<![\w./])train\.(?:data\.)?({_LAST})\b")


def as_called(text: str) -> str:
    """A text that calls commands what they are called in a checkout, with the names that they have here."""
    return text if __package__ == "train" else _NAMED.sub(r"dspnet-\1", text)
