#!/usr/bin/env bash
# GLM-4.xV (Glm4vForConditionalGeneration): `generate(num_return_sequences=2)`, and beams, over a batch whose prompts
# hold different numbers of images give another distribution for the copies of one prompt. One would expect the first
# logits of every copy to be those of the prompt alone, as with Qwen2-VL, whose class repeats images prompt by prompt.
# Glm4v has no such method: generation/utils.py repeats every image entry by itself.
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU, tiny random weights; output:
#   first logits of each copy against the prompt alone differ by 0.1178, 0.1846, 0.0000, 0.0000
# Exits with 1 when that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$work/run.py" <<'PY'
import torch
import transformers
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

torch.manual_seed(0)
IMAGE, START, END = 90, 91, 92
config = Glm4vConfig(
    text_config={
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0,
        },
    },
    vision_config={
        "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "image_size": 32,
    },
    image_token_id=IMAGE, image_start_token_id=START, image_end_token_id=END,
    video_token_id=95, video_start_token_id=93, video_end_token_id=94,
)
model = Glm4vForConditionalGeneration(config).eval()
picture = [START] + [IMAGE] * 4 + [END]
ids = torch.tensor([[5, *picture, *picture, 7, 8], [0] * 6 + [6, *picture, 7, 8]])
inputs = {
    "input_ids": ids, "attention_mask": (ids != 0).long(), "mm_token_type_ids": (ids == IMAGE).long(),
    "pixel_values": torch.randn(48, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
}
options = {"max_new_tokens": 1, "min_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
alone = model.generate(**inputs, do_sample=False, **options).logits[0]
twice = model.generate(**inputs, do_sample=True, num_return_sequences=2, **options).logits[0]
apart = [float((twice[2 * row + copy] - alone[row]).abs().max()) for row in (0, 1) for copy in (0, 1)]
print(f"transformers {transformers.__version__}: first logits of each copy against the prompt alone differ by "
      + ", ".join(f"{x:.4f}" for x in apart))
assert max(apart[:2]) > 1e-3, "the copies of the prompt with two images agree now"
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/run.py"
