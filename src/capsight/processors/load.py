"""The processor of a checkpoint: transformers' own way, or assembled from its parts.

In most families `AutoProcessor` loads a video processor, too, and video processors need torchvision, of which
there is no build for machines without a GPU on the usual registry. Pictures do not need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NoReturn

from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES, AutoImageProcessor
from transformers.utils import is_torchvision_available

from capsight.errors import OptionError
from capsight.processors.own import check_processor


class NoVideos:
    """Stands where a processor of videos or sound would; refuses them and says why.

    Attributes:
        model_input_names: none.
        num_frames: of no video; SmolVLM's chat template asks for it.
        fps: the same.
    """

    model_input_names: tuple[str, ...] = ()
    num_frames: int | None = None
    fps: float | None = None
    _auto_class: str | None = None  # `save_pretrained` asks for it

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            "videos need torchvision, which is not installed, and sound is not read; pass pictures"
        )


def load_processor(name: str, **options: Any) -> ProcessorMixin:
    """Load a checkpoint's processor, padding on the left.

    With torchvision this is `AutoProcessor.from_pretrained`. Without it the processor class of the model's
    family is given its image processor (in the PIL form), its tokenizer and its chat template, and takes no
    videos.

    Args:
        name: folder or hub id.
        **options: of `from_pretrained`, such as `revision`, `token` or `cache_dir`.

    Returns:
        An object of the family's processor class (`ProcessorMixin`).

    Raises:
        OptionError: it cannot be loaded, or takes no images.
    """
    try:
        processor = _loaded(name, options)
    except Exception as error:  # of files, the hub, tokenizers, missing packages...
        reason = " ".join(str(error).split()) or repr(error)
        raise OptionError(f"cannot load the processor of {name!r}: {reason}") from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise OptionError(
            f"{name!r} has no processor that takes images, only a {type(processor).__name__}; "
            "save the processor of the model into the same folder: processor.save_pretrained(folder)"
        )
    return check_processor(processor, repr(name))


def _loaded(name: str, options: dict[str, Any]) -> Any:
    """In transformers' own way where it can load it all, else from parts."""
    kind = None if is_torchvision_available() else _class(name, options)
    if kind is None or "video_processor" not in kind.get_attributes():
        try:
            return AutoProcessor.from_pretrained(name, **options)
        except ValueError:
            if kind is None:
                raise
    return _parts(name, options)


def _class(name: str, options: dict[str, Any]) -> Any:
    config = type(AutoConfig.from_pretrained(name, **options))
    return PROCESSOR_MAPPING.get(config, None)


def _images(name: str, options: dict[str, Any]) -> Any:
    """The image processor; transformers 5.17 does not find all that it has without torchvision."""
    try:
        return AutoImageProcessor.from_pretrained(name, **options)
    except ValueError:
        kind = AutoConfig.from_pretrained(name, **options).model_type
        pil = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind, {}).get("pil")
        if pil is None:
            raise
        module = import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
        return getattr(module, pil).from_pretrained(name, **options)


def _parts(name: str, options: dict[str, Any]) -> Any:
    kind = _class(name, options)

    class Images(kind):  # type: ignore[misc, valid-type]
        """The family's processor without its video part."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if isinstance(argument, NoVideos):
                return NoVideos
            return super().check_argument_for_proper_class(argument_name, argument)

        def to_dict(self) -> dict[str, Any]:
            return {key: value for key, value in super().to_dict().items() if not isinstance(value, NoVideos)}

    Images.__name__ = Images.__qualname__ = kind.__name__
    made = {
        "image_processor": lambda: _images(name, options),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(name, **options),
    }
    settings, _ = kind.get_processor_dict(name, **options)
    return Images.from_args_and_dict([made.get(part, NoVideos)() for part in kind.get_attributes()], settings)
