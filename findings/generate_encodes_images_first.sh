#!/usr/bin/env bash
# In transformers 5.23 `generate` runs the vision tower of a Qwen2.5-VL before the forward pass, which then gets
# `mm_encoder_outputs` and neither pixels, grids nor the attention mask. A hook on `forward` that looks for
# `pixel_values` or `image_grid_thw`, to see how many images a prompt has and how large they are, finds them in a call
# of the model and never in `generate`: it takes the prompt for one without images.
# Seen with transformers 5.23.0 and torch 2.13.0; output:
#   call: image_grid_thw, pixel_values
#   generate, first step: mm_encoder_outputs
# Exits with 1 when that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$work/run.py" <<'PY'
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

text = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
vision = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0],
}
config = Qwen2_5_VLConfig(
    text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62,
    vision_end_token_id=63,
)
model = Qwen2_5_VLForConditionalGeneration(config).eval()
seen = []
model.register_forward_pre_hook(
    lambda module, args, kwargs: seen.append({name for name, value in kwargs.items() if value is not None}),
    with_kwargs=True,
)
ids = torch.tensor([[62, 60, 60, 60, 60, 63, 5]])
inputs = {
    "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 60).int(),
    "pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]]),
}
with torch.no_grad():
    model(**inputs)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
of_images = {"pixel_values", "image_grid_thw", "mm_encoder_outputs"}
call, first = (sorted(names & of_images) for names in seen[:2])
print(f"call: {', '.join(call)}")
print(f"generate, first step: {', '.join(first)}")
raise SystemExit((call, first) != (["image_grid_thw", "pixel_values"], ["mm_encoder_outputs"]))
PY
"$work/venv/bin/python" "$work/run.py"
