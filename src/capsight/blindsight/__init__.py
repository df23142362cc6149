"""BlindSight: prefill attention that follows the image layout (arXiv 2507.09071, masks by this project).

In one line per step::

    head_map = BlindSight.calibrate(model, processor, samples)       # once per model
    head_map.save_pretrained("head_map")
    head_map = HeadMap.from_pretrained("head_map")

    # in an attention function registered with transformers, for a prefill:
    head_map.check(layers, heads, fingerprint)                        # once
    output = sparse_attention(                                        # [B, Hq, S, D]
        query, key, value,                                            # [B, Hq, S, D], 2 x [B, Hkv, T, D]
        layout,                                                       # build_layout(inputs, model.config)
        head_map.categories[module.layer_idx],
        options=head_map.options,
        rule=BaseRule.of(model.config, kwargs.get("sliding_window")),
        scaling=kwargs["scaling"],
        prefix=None,                                                  # or tokens before the first query
    )
    return output.transpose(1, 2).contiguous(), None

The layout may be longer than what is at hand (a chunk of the prefill), but not shorter: what follows
the prompt is text, `layout.extended(n)`. Queries are always the last S tokens; keys are the last T.
No mask tensor is needed, so the registered mask function may return None. Plans are cached per
prompt, so all layers share them. A single query sees all keys in every category (it is text), so
decoding need not come here.
"""

from typing import TYPE_CHECKING, Any

from capsight.blindsight.attention import Implementation, sparse_attention
from capsight.blindsight.calibrate import (
    CriterionName,
    HeldOut,
    Prompt,
    Questions,
    Thresholds,
    calibrate,
    prompts,
)
from capsight.blindsight.categories import SPARSE, Category, MaskOptions
from capsight.blindsight.flops import PrefillFlops, attention_flops, prefill_flops, visible_pairs
from capsight.blindsight.head_map import CalibrationRecord, HeadMap
from capsight.blindsight.masks import reference_mask
from capsight.blindsight.rule import CAUSAL, BaseRule

if TYPE_CHECKING:
    from capsight.blindsight.draw import draw_attention, draw_head_map


class BlindSight:
    """The facade: `BlindSight.calibrate(...)` gives a `HeadMap`; everything else is a function of one."""

    calibrate = staticmethod(calibrate)


def __getattr__(name: str) -> Any:
    """Drawing is loaded when it is asked for: it needs matplotlib."""
    if name in ("draw_attention", "draw_head_map"):
        from capsight.blindsight import draw

        return getattr(draw, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CAUSAL",
    "SPARSE",
    "BaseRule",
    "BlindSight",
    "CalibrationRecord",
    "Category",
    "CriterionName",
    "HeadMap",
    "HeldOut",
    "Implementation",
    "MaskOptions",
    "PrefillFlops",
    "Prompt",
    "Questions",
    "Thresholds",
    "attention_flops",
    "calibrate",
    "draw_attention",
    "draw_head_map",
    "prefill_flops",
    "prompts",
    "reference_mask",
    "sparse_attention",
    "visible_pairs",
]
