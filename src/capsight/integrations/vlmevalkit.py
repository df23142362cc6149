"""Runs VLMEvalKit with capsight: it has no plugins, so its table of models gets one more entry first.

    python -m capsight.integrations.vlmevalkit method=joint run.py --model capsight --data BLINK

`run.py` is the one in a checkout of VLMEvalKit; what follows it are its own arguments.
"""

from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

from capsight.errors import OptionError
from capsight.integrations.answering import Answerer


def model_class() -> Any:
    """The model class, made when VLMEvalKit is there."""
    from vlmeval.vlm.base import BaseModel

    class CapsightVLM(BaseModel):
        """Images and text in any order."""

        INTERLEAVE = True

        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.answerer = Answerer.load(**options)

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            images = [part["value"] for part in message if part["type"] == "image"]
            content = [
                {"type": "image"} if p["type"] == "image" else {"type": "text", "text": p["value"]}
                for p in message
            ]
            return self.answerer.answer([{"role": "user", "content": content}], images, 512)

    return CapsightVLM


def options_of(text: str) -> dict[str, Any]:
    """Options of `Answerer.load` from "name=value,name=value".

    Raises:
        OptionError: a part has no equals sign.
    """
    parts = [part.partition("=") for part in text.split(",") if part]
    if wrong := [name for name, equals, _ in parts if not equals]:
        raise OptionError(f"{wrong[0]!r} is no option; write name=value,name=value")
    return {name: float(value) if name == "retained" else value for name, _, value in parts}


def main(arguments: list[str]) -> None:
    """Add the model to VLMEvalKit and run its `run.py` with the arguments after it."""
    if len(arguments) < 2:
        raise SystemExit("usage: python -m capsight.integrations.vlmevalkit OPTIONS run.py ARGUMENTS...")
    from vlmeval.config import supported_VLM

    supported_VLM["capsight"] = partial(model_class(), **options_of(arguments[0]))
    sys.argv = arguments[1:]
    sys.path.insert(0, str(Path(arguments[1]).resolve().parent))
    runpy.run_path(arguments[1], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
