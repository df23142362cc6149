"""Where the blocks of videos lie in the tests' prompts; see `golden`."""

from __future__ import annotations

VIDEOS: dict[str, str] = {
    **dict.fromkeys(
        ["gemma4", "gemma4_unified"],
        """\
600 pad 292\
 | video0 306:370 1x1x64 at 305 370 | video0 379:443 1x1x64 at 378 443\
 | video0 452:516 1x1x64 at 451 516 | video0 525:589 1x1x64 at 524 589
600 pad 0\
 | video0 14:78 1x1x64 at 13 78 | video0 87:151 1x1x64 at 86 151\
 | video0 160:224 1x1x64 at 159 224 | video0 233:297 1x1x64 at 232 297\
 | video1 305:369 1x1x64 at 304 369 | video1 378:442 1x1x64 at 377 442\
 | video1 451:515 1x1x64 at 450 515 | video1 524:588 1x1x64 at 523 588""",
    ),
    "muse_glimmer": """\
107 pad 44 | video0 55:71 1x4x4 at 71 | video0 76:92 1x4x4 at 92
107 pad 0\
 | video0 11:27 1x4x4 at 27 | video0 32:48 1x4x4 at 48\
 | video1 54:70 1x4x4 at 70 | video1 75:91 1x4x4 at 91""",
    "qwen2_vl": """\
89 pad 35 | video0 42:74 2x4x4 at 41 74
89 pad 0 | video0 7:39 2x4x4 at 6 39 | video1 41:73 2x4x4 at 40 73""",
    "qwen2_5_vl": """\
89 pad 35 | video0 42:74 2x4x4 every 2 s at 41 74
89 pad 0 | video0 7:39 2x4x4 every 2 s at 6 39 | video1 41:73 2x4x4 every 2 s at 40 73""",
    **dict.fromkeys(
        ["qwen3_vl", "qwen3_5", "qwen3_5_moe", "lfm3_vl"],
        """\
149 pad 65 | video0 86:102 1x4x4 at 71 85 102 | video0 117:133 1x4x4 at 116 133-134
149 pad 0\
 | video0 21:37 1x4x4 at 6 20 37\
 | video0 52:68 1x4x4 at 51 68-69\
 | video1 85:101 1x4x4 at 70 84 101\
 | video1 116:132 1x4x4 at 115 132-133""",
    ),
    "exaone4_5": """\
85 pad 33 | video0 39:71 2x4x4
85 pad 0 | video0 6:38 2x4x4 | video1 38:70 2x4x4""",
    "llava_onevision": """\
151 pad 66 | video0 72:136 4x4x4 at 136
151 pad 0 | video0 6:70 4x4x4 at 70 | video1 71:135 4x4x4 at 135""",
    "internvl": """\
621 pad 301\
 | image0 316:380 1x8x8 at 315 380\
 | image1 391:455 1x8x8 at 390 455\
 | image2 466:530 1x8x8 at 465 530\
 | image3 541:605 1x8x8 at 540 605
621 pad 0\
 | image0 15:79 1x8x8 at 14 79\
 | image1 90:154 1x8x8 at 89 154\
 | image2 165:229 1x8x8 at 164 229\
 | image3 240:304 1x8x8 at 239 304\
 | image4 315:379 1x8x8 at 314 379\
 | image5 390:454 1x8x8 at 389 454\
 | image6 465:529 1x8x8 at 464 529\
 | image7 540:604 1x8x8 at 539 604""",
    "smolvlm": """\
864 pad 423\
 | image0 530:594 1x8x8 at 528-529 594\
 | image1 615:679 1x8x8 at 613-614 679\
 | image2 700:764 1x8x8 at 698-699 764\
 | image3 785:849 1x8x8 at 783-784 849
864 pad 0\
 | image0 107:171 1x8x8 at 105-106 171\
 | image1 192:256 1x8x8 at 190-191 256\
 | image2 277:341 1x8x8 at 275-276 341\
 | image3 362:426 1x8x8 at 360-361 426\
 | image4 529:593 1x8x8 at 527-528 593\
 | image5 614:678 1x8x8 at 612-613 678\
 | image6 699:763 1x8x8 at 697-698 763\
 | image7 784:848 1x8x8 at 782-783 848""",
    **dict.fromkeys(
        ["glm4v", "glm4v_moe"],
        """\
86 pad 41 | video0 45:61 1x4x4 at 43-44 61 | video0 64:80 1x4x4 at 63 80 82
86 pad 0\
 | video0 4:20 1x4x4 at 2-3 20\
 | video0 23:39 1x4x4 at 22 39 41\
 | video1 44:60 1x4x4 at 42-43 60\
 | video1 63:79 1x4x4 at 62 79 81""",
    ),
    **dict.fromkeys(
        ["glm46v", "glm_ocr"],
        """\
126 pad 61 | video0 65:81 1x4x4 at 63-64 81 | video0 94:110 1x4x4 at 93 110 122
126 pad 0\
 | video0 4:20 1x4x4 at 2-3 20\
 | video0 33:49 1x4x4 at 32 49 61\
 | video1 64:80 1x4x4 at 62-63 80\
 | video1 93:109 1x4x4 at 92 109 121""",
    ),
}
