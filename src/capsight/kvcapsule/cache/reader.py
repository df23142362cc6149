"""`Reader`: whether keys go to capsight's attention, which knows what is hidden; and how it gets them."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any
from weakref import ref

from torch import Tensor
from transformers import PreTrainedConfig

from capsight.errors import CapsightError

ATTENTION_NAME = "capsight"
"""What capsight's attention function is called in transformers."""


class Reader:
    """Watches, update by update, whether capsight's attention function has run."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """Watch for a cache of a model with this config; the model's own says what attention it runs."""
        self._config: PreTrainedConfig | None = config
        self._seen = False
        self._known: str | None = None  # what the model runs, as it was last looked at
        self._codec: str | None = None  # whose keys were last handed over, "" if nothing is hidden in them

    @property
    def is_ours(self) -> bool:
        """Whether it is known that capsight's attention function runs."""
        return self._seen if self._known is None else self._known == ATTENTION_NAME

    def look(self) -> None:
        """Look at what attention the model runs; for all layers of a step, since configs answer slowly."""
        config = self._config
        self._known = None if config is None else config.get_text_config()._attn_implementation

    def expect(self, codec: str) -> None:
        """Note that keys were handed over; `codec` has hidden something in them, if it is not ""."""
        self._codec = codec

    def read(self) -> None:
        """Note that capsight's attention function has taken them."""
        self._codec, self._seen = None, True

    def forget(self) -> None:
        """Expect nothing any more."""
        self._codec = None

    def check_read(self) -> None:
        """Refuse to go on if something else has.

        Raises:
            CapsightError: tokens that are not there were attended to.
        """
        if self._codec is not None:
            codec, self._codec, self._seen = self._codec, None, False
            if codec:
                raise _refusal(codec)

    def check_known(self, codec: str) -> None:
        """Refuse keys with something hidden in them where the model is known to run another attention.

        Raises:
            CapsightError: it is.
        """
        if self._known not in (None, ATTENTION_NAME):
            raise _refusal(codec)

    def watch(self, config: PreTrainedConfig) -> None:
        """Watch the model with this config from now on."""
        if config is not self._config:
            self._config, self._seen = config, False

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        """A copy that watches the same model."""
        other = Reader.__new__(Reader)
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Without the config: a copy of it does not change with the model."""
        return {"_config": None, "_seen": False, "_known": None, "_codec": None}


def _refusal(codec: str) -> CapsightError:
    return CapsightError(
        f"the {codec} codec keeps part of the image tokens, and the model's attention does not know which; "
        "generate inside capsight.enable(model, capsule=...), or call "
        f'model.set_attn_implementation("{ATTENTION_NAME}") once'
    )


_GIVEN: ContextVar[tuple[ref[Tensor], ref[Tensor], ref[Any]] | None] = ContextVar(
    "capsight_handover", default=None
)


def hand_over(keys: Tensor, values: Tensor, cache: Any) -> None:
    """Say that `cache` has just returned `keys` and `values` for one layer."""
    _GIVEN.set((ref(keys), ref(values), ref(cache)))


def taken_over(keys: Tensor, values: Tensor) -> tuple[Any, bool, bool]:
    """What attention over `keys` and `values` has to do with the last `hand_over`, which is over with it.

    Returns:
        The `CapsuleCache` that was the last to hand something over, to be attended to now; None if all was
        taken by then. Whether `keys` are what it gave, and whether `values` are, too: a model may have
        changed them.
    """
    given = _GIVEN.get()
    if given is None:
        return None, False, False
    _GIVEN.set(None)
    same = given[0]() is keys
    return given[2](), same, same and given[1]() is values
