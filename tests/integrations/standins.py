"""Stand-ins for the few parts of lmms-eval 0.7 and VLMEvalKit that our classes touch.

Neither can be installed beside the tested set of packages (lmms-eval wants torchvision and some forty
others), so these follow their sources: `lmms_eval.api.model.lmms`, `lmms_eval.api.instance.Instance`,
`lmms_eval.models.registry_v2.ModelManifest`, `vlmeval.vlm.base.BaseModel`, `vlmeval.config.supported_VLM`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Any


class lmms(ABC):  # noqa: N801
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        pairs = (part.split("=") for part in arg_string.split(","))
        args = {name: float(value) if name == "retained" else value for name, value in pairs}
        return cls(**args, **{k: v for k, v in (additional_config or {}).items() if v is not None})


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int

    @property
    def args(self):
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


class BaseModel:
    INTERLEAVE = False
    allowed_types = ("text", "image")

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)


def install(monkeypatch):
    """Put the stand-ins where the real modules would be."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "vlmeval": {},
        "vlmeval.config": {"supported_VLM": {}},
        "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
