"""The second reading of a context, against one prefill of the context written twice."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from capsight.layout import build_layout
from capsight.runtime.repeat import ContextRepeat
from capsight.runtime.split import TOKEN_ENTRIES, first_tokens
from tiny import FAMILIES


# Not gemma3: its image tokens see each other in both directions, those of the repeat do not.
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_repeating_equals_a_prompt_with_the_context_twice(family):
    vlm = FAMILIES[family]()
    inputs = vlm.inputs([([vlm.picture(0), vlm.picture(1, vlm.other_size)], "what is this?")])
    head = first_tokens(inputs, build_layout(inputs, vlm.config).last_vision_end)
    twice = {k: torch.cat([v, v], -1 if k in TOKEN_ENTRIES else 0) for k, v in head.items()}
    again, whole = DynamicCache(config=vlm.config), DynamicCache(config=vlm.config)
    repeat = ContextRepeat(vlm.model)
    with torch.no_grad():
        with repeat.recording():
            vlm.model.generate(**head, past_key_values=again, max_new_tokens=1, do_sample=False)
        repeat.run(again, head["attention_mask"])
        vlm.model.generate(**twice, past_key_values=whole, max_new_tokens=1, do_sample=False)
    for a, b in zip(again.layers, whole.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.values, b.values, atol=1e-4, rtol=1e-4)


def test_hooks_are_gone_after_recording(qwen):
    repeat = ContextRepeat(qwen.model)
    with repeat.recording():
        assert qwen.model.get_decoder()._forward_pre_hooks
    assert not qwen.model.get_decoder()._forward_pre_hooks
