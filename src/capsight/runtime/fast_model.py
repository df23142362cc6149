"""`FastModel`: a model with its capsule and head map; what `enable` gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from capsight.cache_argument import CACHE
from capsight.errors import CapsightError
from capsight.kvcapsule import CapsuleCache, ContextRepeater
from capsight.layout import PromptLayout, build_layout
from capsight.runtime.caches import in_use, is_empty_stock, the_cache
from capsight.runtime.calls import end_broken_pass
from capsight.runtime.compiled import steps_compiled
from capsight.runtime.enabled_model import EnabledModel
from capsight.runtime.options import beams, check_options, check_rows, repeats, unset
from capsight.runtime.prefill import SparsePrefill, follows
from capsight.runtime.reading import read_images
from capsight.runtime.split import first_tokens, prompt_entries, sequence_length, without_nothing
from capsight.runtime.state import RuntimeState, running
from capsight.runtime.stored import images_first, read_with_store
from capsight.runtime.turn import Turn


class FastModel(EnabledModel):
    """A model with its capsule, as `enable` hands it out.

    `generate` and `encapsulate` take processor outputs; a call of it is a call of the model.
    """

    def generate(
        self,
        input_ids: Tensor | None = None,
        generation_config: Any = None,
        *,
        past_key_values: Any = None,
        cache: Any = None,
        **inputs: Any,
    ) -> Any:
        """Generate, as `model.generate` does and with all of its options.

        Args:
            input_ids: int64 `[B, S]`, the whole conversation so far.
            generation_config: as `model.generate` takes it.
            past_key_values: cache of an earlier turn or of `encapsulate`; by default a new one.
            cache: the same, as transformers spells it from 5.24 on.
            **inputs: the other processor outputs, of the whole conversation so far, and generation options.
                Images that the cache holds already are not looked at again; new ones are.

        Returns:
            `[B, S + new]` token ids, prompt included (int64).

        Raises:
            LayoutError: the inputs do not continue what the cache holds.
            OptionError: an option cannot go with capsules, or the prompt is no longer than the cache.
            CapsightError: keys or values are NaN or infinite.
        """
        given = {"input_ids": inputs.pop("inputs", input_ids), "generation_config": generation_config}
        given = {name: value for name, value in given.items() if value is not None}
        inputs = {**given, **without_nothing(inputs)}
        cache = the_cache(past_key_values, cache)
        if self.store is not None and (cache is None or is_empty_stock(cache)):
            cache, inputs = images_first(self, inputs)
        cache = self.cache_for(cache, inputs, knows=False)
        if cache is None:
            cache = DynamicCache(config=self.model.config) if inputs.get("use_cache") is not False else None
        with in_use(cache):
            if cache is not None:
                check_options(inputs, cache.get_seq_length(), self.model)
                inputs.setdefault("use_cache", True)
                if isinstance(cache, CapsuleCache) and cache.get_seq_length() and "input_ids" in inputs:
                    check_rows(inputs, len(inputs["input_ids"]), cache.layout.batch_size, self.model)
                if not cache.get_seq_length() and isinstance(cache, ContextRepeater):
                    cache = self._prefilled(cache, inputs)
            turn = self._turn(cache, inputs)
            output = self._run(cache, turn, sequence_length(inputs) if "input_ids" in inputs else 0)
        tokens = getattr(output, "sequences", output)
        if cache is not None and turn.conversation is not None:
            one = beams(inputs, self.model) == 1  # else rows of the cache are other beams than the answers
            cache.conversation = cache.conversation.answered(tokens if one else None)
        self.cache = cache
        return output

    def _turn(self, cache: Any, inputs: Mapping[str, Any]) -> Turn:
        """What a call gives the model."""
        if cache is not None and cache.get_seq_length():
            return Turn.next(cache, inputs, self.model.config)
        strict = self.capsule is not None or self.head_map is not None
        return Turn.first(inputs, self.model.config, strict)

    def _run(self, cache: Any, turn: Turn, length: int, **options: Any) -> Any:
        """Run the model over one turn; the cache is as before if it cannot be finished."""
        prefill = None if turn.seen or turn.layout is None else self._sparse(turn.layout, length)
        before = getattr(cache, "conversation", None)
        if isinstance(cache, CapsuleCache) and turn.layout is not None:
            cache.continue_layout(turn.layout)
        if cache is not None:
            rows = cache.layout.batch_size if isinstance(cache, CapsuleCache) and turn.seen else None
            read = turn.conversation
            cache.conversation = read.repeated(rows) if read is not None and rows is not None else read
        try:
            asked = {**turn.inputs, **options}
            each = repeats(asked, self.model)
            stateful = isinstance(cache, CapsuleCache) and cache.state_nbytes > 0
            if stateful and turn.seen and not torch.is_autocast_enabled(self.device.type):
                cache.check_dtype(self.dtype)  # states are read before any update tells
            if each > 1 and stateful and cache.layout.batch_size == turn.rows:
                cache.batch_repeat_interleave(each)  # models read states before any update tells the rows
            with self._running(cache, prefill), steps_compiled(self.model, cache, self.decode, asked):
                output = self.model.generate(
                    **{CACHE: cache}, **turn.inputs, **options, **unset(cache, self.model)
                )
            if isinstance(cache, CapsuleCache):
                cache.check_finite()
                if cache.get_seq_length() <= turn.seen:
                    raise CapsightError(
                        "the model has put nothing into the cache; gradient checkpointing does that while it "
                        "trains: call model.eval()"
                    )
        except BaseException:
            if isinstance(cache, CapsuleCache):
                cache.restore(turn.seen)
                cache.conversation = before
            raise
        return output

    def _sparse(self, layout: PromptLayout, new: int) -> SparsePrefill | None:
        """The plan of a prefill of the first `new` tokens; None without a head map, or if dense is faster."""
        if self.head_map is None or not follows(self.prefill, self.device, self.dtype, new):
            return None
        return SparsePrefill(self.head_map, layout, self.model.config, seen=0, new=new)

    def prefill_state(self, cache: Any, inputs: Mapping[str, Any]) -> Any:
        """What surrounds a prefill that did not come through `generate`; None if nothing does."""
        if self.head_map is None:
            return None
        layout = build_layout(inputs, self.model.config)
        return self._running(cache, self._sparse(layout, layout.length), generating=False)

    def _prefilled(self, cache: Any, inputs: dict[str, Any]) -> Any:
        """A cache of the images where it needs them to be read twice; else the empty `cache` as it is."""
        layout = build_layout(inputs, self.model.config)
        if not 0 < layout.last_vision_end < layout.length:
            return cache
        return self.encapsulate(**prompt_entries(inputs, self.model))

    @contextmanager
    def _running(
        self, cache: Any, prefill: SparsePrefill | None = None, generating: bool = True
    ) -> Iterator[None]:
        """What the attention function has to know while the model runs with `cache`."""
        end_broken_pass()
        capsules = cache if isinstance(cache, CapsuleCache) else None
        after = None
        if self.decode == "latent":
            after = 0 if prefill is None else prefill.seen + prefill.new  # its chunks follow the head map
        with (
            running(RuntimeState(capsules, prefill, generating)),
            nullcontext() if capsules is None else capsules.leaving_capsules(after),
        ):
            yield

    def encapsulate(self, *, past_key_values: Any = None, cache: Any = None, **inputs: Any) -> Any:
        """Prefill the images alone (protocol `after`); what follows the last is left for `generate`.

        Args:
            past_key_values: a cache that holds the conversation up to images that are new; by default a new
                one.
            cache: the same, as transformers spells it from 5.24 on.
            **inputs: processor outputs; the part after the last image may be missing or is ignored.

        Returns:
            The cache, for `generate(past_key_values=..., **inputs)`: every later token attends to capsules.

        Raises:
            LayoutError: the inputs do not continue what the cache holds.
            OptionError: they bring no image that it does not hold already, or options of `generate`.
        """
        inputs = without_nothing(inputs)
        layout = build_layout(inputs, self.model.config)
        length = layout.last_vision_end or sequence_length(inputs)
        head = first_tokens(inputs, length)
        cache = the_cache(past_key_values, cache)
        if self.store is not None and (cache is None or is_empty_stock(cache)):
            self.cache = read_with_store(self, self.store, head, self._read)
            return self.cache
        return self._read(past_key_values=cache, **head)

    def _read(self, *, past_key_values: Any = None, **head: Any) -> Any:
        """Prefill processor outputs up to the last image."""
        self.cache = read_images(self, past_key_values, head)
        return self.cache
