"""The plugin of lmms-eval: its entry point group `lmms_eval.models` calls `manifest`.

lmms-eval --model capsight --model_args pretrained=Qwen/...,capsule=my-capsule --tasks muirbench
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval has to know: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="capsight", chat_class_path="capsight.integrations.lmms_eval_model.CapsightModel"
    )
