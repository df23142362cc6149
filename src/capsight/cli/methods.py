"""From the names on a command line to methods: codecs of a capsule, and baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from capsight.baselines import METHODS
from capsight.errors import OptionError
from capsight.kvcapsule import CacheMethod, KVCapsule
from capsight.kvcapsule.budget import default_retained
from capsight.kvcapsule.codecs import ALL_CODECS, CODECS, LayerCodec
from capsight.kvcapsule.codecs.quantise import BITS
from capsight.kvcapsule.fitted import ALIKE
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE


class Form(NamedTuple):
    """A codec, and the bits of a stored number."""

    codec: str
    bits: int | None = None

    def of(self, capsule: KVCapsule) -> KVCapsule:
        """A capsule in this form; its codec is the form's, or learns the same."""
        if self.codec != capsule.info.codec:
            capsule = capsule.with_codec(self.codec)
        return capsule.with_bits(self.bits)


#: Capsules by method name.
CAPSULES: dict[str, Form] = {
    **{codec: Form(codec) for codec in ALL_CODECS},
    **{f"{codec}-int{bits}": Form(codec, bits) for codec in ("heads", "adaptive") for bits in BITS},
}
FIXED = tuple(name for name, codec in CODECS.items() if codec.resized is LayerCodec.resized)
"""Codecs that are fitted for one retained fraction."""
METHOD_NAMES = (*CAPSULES, *(name for name in METHODS if name not in CAPSULES))


def make_methods(
    names: list[str],
    retained: list[float],
    load: Callable[[], KVCapsule],
    samples: Callable[[], list[Any]],
    model: Any,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> dict[str, CacheMethod]:
    """Every method at every budget, by a label for tables.

    Args:
        names: out of `METHOD_NAMES`.
        retained: retained fractions; none: every method's default. Methods whose bytes cannot be chosen
            ignore them.
        load: gives a capsule; other codecs than it can be turned into are fitted.
        samples: gives calibration prompts (processor outputs) for methods that are fitted.
        model: the model to fit them to.
        block_size: vision tokens in a run of a baseline; what is left of an image stays exact.

    Raises:
        OptionError: a name is unknown, or a fraction is not in (0, 1].
        CapsightError: a method cannot run on the model.
    """
    if unknown := [name for name in names if name not in METHOD_NAMES]:
        raise OptionError(f"there is no method {unknown[0]!r}; use {', '.join(METHOD_NAMES)}")
    methods: dict[str, CacheMethod] = {}
    capsules = _Capsules(load, samples, model)
    for name in names:
        if name in CAPSULES:
            form = CAPSULES[name]
            budgets = retained or [default_retained(form.codec)]
            methods |= {f"{name} {rho:g}": capsules.of(form, rho) for rho in budgets}
            continue
        kind: Any = METHODS[name]
        budgets = retained or [default_retained(name)]
        sizes = {"retained": budgets[0], "block_size": block_size}
        fitted = kind.fit(model, None, samples(), **sizes) if kind.calibrated else kind(**sizes)
        fitted.check_model(model)
        methods |= {method.label: method for method in (fitted.with_retained(rho) for rho in budgets)}
    return methods


class _Capsules:
    """Capsules in every form: the loaded one where its codec allows, others fitted, each codec once."""

    def __init__(self, load: Callable[[], KVCapsule], samples: Callable[[], list[Any]], model: Any) -> None:
        self._load, self._samples, self._model = load, samples, model
        self._known: list[KVCapsule] = []

    def of(self, form: Form, retained: float) -> KVCapsule:
        """A capsule in `form` at a retained fraction."""
        if form.codec in FIXED:  # their positions and maps are those of one fraction
            return self._fit(form.codec, retained)
        self._known = self._known or [self._load()]
        for capsule in self._known:
            if capsule.info.codec == form.codec or {capsule.info.codec, form.codec} <= set(ALIKE):
                return form.of(capsule).with_retained(retained)
        self._known.append(self._fit(form.codec, None))
        return self.of(form, retained)

    def _fit(self, codec: str, retained: float | None) -> KVCapsule:
        return KVCapsule.fit(self._model, None, self._samples(), retained=retained, codec=codec)
