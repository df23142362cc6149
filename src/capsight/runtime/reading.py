"""Images prefilled alone, before any question about them (protocol `after`)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from transformers.cache_utils import DynamicCache

from capsight.errors import OptionError
from capsight.kvcapsule import CapsuleCache, ContextRepeater
from capsight.runtime.caches import in_use
from capsight.runtime.options import check_options
from capsight.runtime.repeat import ContextRepeat
from capsight.runtime.split import sequence_length


def read_images(fast: Any, cache: Any, head: Mapping[str, Any]) -> Any:
    """Prefill processor outputs up to the last image.

    Args:
        fast: a `FastModel`.
        cache: holds the conversation up to images that are new; None for a new one.
        head: the processor outputs.

    Returns:
        The cache, which has read them.
    """
    cache = fast.cache_for(cache, head)
    if cache is None:
        cache = DynamicCache(config=fast.model.config)
    seen = cache.get_seq_length()
    check_options(head, seen)
    if seen and isinstance(cache, ContextRepeater):
        raise OptionError("this method reads the context twice; start a new cache for new images")
    repeat = ContextRepeat(fast.model)
    with in_use(cache), repeat.recording() if isinstance(cache, ContextRepeater) else nullcontext():
        # generate, not forward: it expands and cuts the inputs as later turns will.
        options = {"max_new_tokens": 1, "do_sample": False, "use_cache": True}
        fast._run(cache, fast._turn(cache, head), sequence_length(head), **options)
    if isinstance(cache, ContextRepeater):
        cache.repeat_context(lambda copy: repeat.read(copy, head))
    if isinstance(cache, CapsuleCache):
        cache.keep_states()
    return cache
