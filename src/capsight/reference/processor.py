"""The reference VLM's processor."""

from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


class ReferenceProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for images only: its video half needs torchvision, which we do not ask for."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Take the parts; the image token is the tokenizer's ``<|image_pad|>``."""
        self.image_token, self.video_token = IMAGE_PAD, VIDEO_PAD
        if tokenizer is not None:
            ids = tokenizer.get_vocab()
            self.image_token_id, self.video_token_id = ids[IMAGE_PAD], ids[VIDEO_PAD]
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)
