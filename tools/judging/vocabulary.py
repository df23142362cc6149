"""The tokenizer of a judge, learnt from what its prompts say."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from judging.drawing import Style
from judging.prompts import draw_prompt, split_rng


def wording(name: str, grid: int, style: Style) -> Iterable[str]:
    """Questions and answers of a judge's train prompts."""
    for index in range(150):
        prompt = draw_prompt(split_rng(name, "train", index, "wording"), grid, style, 1 + index % 4, 20)
        for q in prompt.questions:
            yield q.text
            yield q.answer


def learn_tokenizer(corpus: Iterable[str], image: tuple[str, str, str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a corpus; digits never merge. `image`: the tokens before, of and after a picture."""
    start, pad, end = image
    roles = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    special = (*roles, start, end, pad, "<|video_pad|>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=[t for t in special if t not in ("<|pad|>", "<|end|>")],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "start_image_token": start, "end_image_token": end, "context_image_token": pad,
            "image_token": pad, "video_token": "<|video_pad|>",
        },
    )  # fmt: skip
