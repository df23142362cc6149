"""PaddleOCR-VL: `<|IMAGE_START|>` tokens `<|IMAGE_END|>` around each image, as Qwen2-VL writes them."""

from __future__ import annotations

from capsight.layout.families.qwen2_vl import Qwen2VL


class PaddleOCRVL(Qwen2VL):
    """Adapter for PaddleOCR-VL, the Qwen2-VL token structure with other delimiters."""

    model_types = ("paddleocr_vl",)
