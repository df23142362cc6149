"""Where the vision blocks lie in the tests' prompts, family by family, as text that can be read and compared.

A line is a row: its length, its padding, then each block with its kind, number, place, grid and delimiters.
"""

from __future__ import annotations

from capsight.layout import PromptLayout, VisionBlock


def written(layout: PromptLayout) -> str:
    """The layout in the form of `IMAGES` and of `VIDEOS` in `golden_video`."""
    lines = [f"{row.length} pad {row.pad_left}" + "".join(map(_block, row.blocks)) for row in layout.rows]
    return "\n".join(lines)


def _block(block: VisionBlock) -> str:
    grid, marks = "x".join(map(str, block.grid)), _ranges(block.delimiters)
    grid += "" if block.frame_seconds is None else f" every {block.frame_seconds:g} s"
    return f" | {block.kind}{block.image} {block.start}:{block.end} {grid}" + (
        f" at {marks}" if marks else ""
    )


def _ranges(positions: tuple[int, ...]) -> str:
    """Positions in short: `3 7-9`."""
    parts: list[list[int]] = []
    for position in positions:
        if parts and position == parts[-1][-1] + 1:
            parts[-1].append(position)
        else:
            parts.append([position])
    return " ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)


IMAGES: dict[str, str] = {
    **dict.fromkeys(
        ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "lfm3_vl", "muse_glimmer"],
        """\
193 pad 105 | image0 112:176 1x8x8 at 111 176
193 pad 0 | image0 7:71 1x8x8 at 6 71 | image1 73:169 1x8x12 at 72 169
193 pad 165""",
    ),
    "gemma3": """\
162 pad 75 | image0 84:148 1x8x8 at 83 148
162 pad 0 | image0 9:73 1x8x8 at 8 73 | image1 77:141 1x8x8 at 76 141
162 pad 137""",
    **dict.fromkeys(
        ["minicpmv4_6", "minicpmv4_7"],
        """\
301 pad 210 | image0 220:284 1x8x8 at 219 284
301 pad 0\
 | image0 10:74 1x8x8 at 9 74\
 | image1 79:145 1x6x11 at 78 145\
 | image1 147:211 1x8x8 at 146 211\
 | image1 213:277 1x8x8 at 212 277
301 pad 273""",
    ),
    "lfm2_vl": """\
260 pad 172 | image0 179:243 1x8x8 at 178 243
260 pad 0\
 | image0 7:71 1x8x8 at 6 71\
 | image1 74:138 1x8x8 at 72-73\
 | image1 139:203 1x8x8 at 138\
 | image1 204:236 1x4x8 at 203 236
260 pad 232""",
    "cohere2_vision": """\
293 pad 204 | image0 211:275 1x8x8 at 210 275-276
293 pad 0\
 | image0 7:71 1x8x8 at 6 71-72\
 | image1 74:138 1x8x8 at 73 138\
 | image1 139:203 1x8x8 at 203\
 | image1 204:268 1x8x8 at 268-269
293 pad 265""",
    "ovis2": """\
292 pad 203 | image0 210:274 1x8x8 at 209 274-275
292 pad 0\
 | image0 7:71 1x8x8 at 6 71-72\
 | image1 74:138 1x8x8 at 73 138\
 | image1 139:203 1x8x8 at 203\
 | image1 204:268 1x8x8 at 268
292 pad 264""",
    **dict.fromkeys(
        ["exaone4_5", "lighton_ocr", "video_llama_3"],
        """\
189 pad 103 | image0 109:173 1x8x8
189 pad 0 | image0 6:70 1x8x8 | image1 70:166 1x8x12
189 pad 161""",
    ),
    "deepseek_vl": """\
157 pad 71 | image0 77:141 1x8x8
157 pad 0 | image0 6:70 1x8x8 | image1 70:134 1x8x8
157 pad 129""",
    **dict.fromkeys(
        ["gemma4", "gemma4_unified"],
        """\
277 pad 135 | image0 143:264 1x11x11 at 142 264
277 pad 0 | image0 8:129 1x11x11 at 7 129 | image1 131:257 1x9x14 at 130 257
277 pad 252""",
    ),
    "llava_onevision": """\
159 pad 1 | image0 7:71 1x8x8 | image0 71:143 1x8x9
159 pad 0 | image0 6:70 1x8x8 at 70 | image1 71:135 1x8x8 at 135
159 pad 131""",
    **dict.fromkeys(
        ["internvl", "qianfan_ocr"],
        """\
291 pad 202 | image0 209:273 1x8x8 at 208 273
291 pad 0\
 | image0 7:71 1x8x8 at 6 71\
 | image1 74:138 1x8x8 at 73\
 | image1 138:202 1x8x8\
 | image1 202:266 1x8x8 at 266
291 pad 263""",
    ),
    "smolvlm": """\
162 pad 74 | image0 82:146 1x8x8 at 80-81 146
162 pad 0 | image0 8:72 1x8x8 at 6-7 72 | image1 75:139 1x8x8 at 73-74 139
162 pad 135""",
    "idefics3": """\
655 pad 399\
 | image0 419:483 1x8x8 at 405-418\
 | image0 497:561 1x8x8 at 483-496\
 | image0 575:639 1x8x8 at 562-574 639
655 pad 0\
 | image0 20:84 1x8x8 at 6-19\
 | image0 98:162 1x8x8 at 84-97\
 | image0 176:240 1x8x8 at 163-175 240\
 | image1 255:319 1x8x8 at 241-254\
 | image1 333:397 1x8x8 at 319-332\
 | image1 412:476 1x8x8 at 398-411\
 | image1 490:554 1x8x8 at 476-489\
 | image1 568:632 1x8x8 at 555-567 632
655 pad 628""",
    **dict.fromkeys(
        ["mistral3", "pixtral"],
        """\
200 pad 111 | image0 118:190 1x8x9
200 pad 0 | image0 7:79 1x8x9 | image1 79:183 1x8x13
200 pad 177""",
    ),
    "paddleocr_vl": """\
193 pad 105 | image0 113:177 1x8x8 at 112 177
193 pad 0 | image0 8:72 1x8x8 at 7 72 | image1 74:170 1x8x12 at 73 170
193 pad 165""",
    **dict.fromkeys(
        ["glm4v", "glm4v_moe", "glm46v", "glm_ocr"],
        """\
178 pad 105 | image0 108:172 1x8x8 at 107 172
178 pad 0 | image0 3:67 1x8x8 at 2 67 | image1 69:165 1x8x12 at 68 165
178 pad 165""",
    ),
    **dict.fromkeys(
        ["llava", "vipllava"],
        """\
156 pad 71 | image0 77:141 1x8x8
156 pad 0 | image0 6:70 1x8x8 | image1 70:134 1x8x8
156 pad 129""",
    ),
    "llava_next": """\
330 pad 173 | image0 179:243 1x8x8 | image0 243:315 1x8x9
330 pad 0 | image0 6:70 1x8x8 | image0 70:142 1x8x9 | image1 142:206 1x8x8 | image1 206:308 1x6x17
330 pad 303""",
}
