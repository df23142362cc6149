"""Images prefilled alone, before any question about them (protocol `after`)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from transformers.cache_utils import DynamicCache

from capsight.errors import OptionError
from capsight.kvcapsule import CapsuleCache, ContextRepeater
from capsight.runtime.caches import in_use
from capsight.runtime.options import GUESSING, check_options
from capsight.runtime.repeat import ContextRepeat
from capsight.runtime.split import prompt_entries, sequence_length

_READING = {
    **{"max_new_tokens": 1, "do_sample": False, "use_cache": True, "num_beams": 1, "num_return_sequences": 1},
    **dict.fromkeys(GUESSING),
}
"""Options of a pass that only reads, whatever the model's generation config says."""


def read_images(fast: Any, cache: Any, head: Mapping[str, Any]) -> Any:
    """Prefill processor outputs up to the last image.

    Args:
        fast: a `FastModel`.
        cache: holds the conversation up to images that are new; None for a new one.
        head: the processor outputs.

    Returns:
        The cache, which has read them.
    """
    cache = fast.cache_for(cache, head, knows=False)
    if cache is None:
        cache = DynamicCache(config=fast.model.config)
    seen = cache.get_seq_length()
    check_options(head, 0, fast.model)
    options = [name for name in head if name not in prompt_entries(head, fast.model) and name != "use_cache"]
    if options:
        raise OptionError(
            f"encapsulate takes what a processor returns, of which {options[0]} is no part; leave it out"
        )
    if seen and isinstance(cache, ContextRepeater):
        raise OptionError("this method reads the context twice; start a new cache for new images")
    repeat = ContextRepeat(fast.model)
    with in_use(cache), repeat.recording() if isinstance(cache, ContextRepeater) else nullcontext():
        # generate, not forward: it expands and cuts the inputs as later turns will.
        turn = fast._turn(cache, {k: v for k, v in head.items() if k != "use_cache"})
        fast._run(cache, turn, sequence_length(head), **_READING)
    if isinstance(cache, ContextRepeater):
        cache.repeat_context(lambda copy: repeat.read(copy, head))
    if isinstance(cache, CapsuleCache):
        cache.keep_states()
    return cache
