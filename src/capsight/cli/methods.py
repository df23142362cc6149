"""From the names on a command line to methods: codecs of a capsule, and baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from capsight.baselines import METHODS
from capsight.errors import OptionError
from capsight.kvcapsule import CacheMethod, KVCapsule
from capsight.kvcapsule.codecs import CODECS
from capsight.kvcapsule.codecs.quantise import BITS


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
    **{codec: Form(codec) for codec in CODECS},
    **{f"{codec}-int{bits}": Form(codec, bits) for codec in ("heads", "adaptive") for bits in BITS},
}
METHOD_NAMES = (*CAPSULES, *(name for name in METHODS if name not in CAPSULES))


def make_methods(
    names: list[str],
    retained: list[float],
    load: Callable[[], KVCapsule],
    samples: Callable[[], list[Any]],
    model: Any,
) -> dict[str, CacheMethod]:
    """Every method at every budget, by a label for tables.

    Args:
        names: out of `METHOD_NAMES`.
        retained: retained fractions; methods whose bytes cannot be chosen ignore them.
        load: gives the capsule, for its codec, and for `heads`, `adaptive` and `evict` in all their forms.
        samples: gives calibration prompts (processor outputs), for methods that are fitted: some
            baselines, and `static` and `static-mlp`, whose fraction is fixed at the fit.
        model: the model to fit them to.

    Raises:
        OptionError: a name is unknown, or a fraction is not in (0, 1].
        CapsightError: a method cannot run on the model.
    """
    if unknown := [name for name in names if name not in METHOD_NAMES]:
        raise OptionError(f"there is no method {unknown[0]!r}; use {', '.join(METHOD_NAMES)}")
    methods: dict[str, CacheMethod] = {}
    for name in names:
        if name in CAPSULES:
            methods |= {f"{name} {rho:g}": _capsule(name, rho, load, samples, model) for rho in retained}
            continue
        kind: Any = METHODS[name]
        fitted = kind.fit(model, None, samples()) if kind.calibrated else kind(retained[0])
        fitted.check_model(model)
        budgets = [fitted.with_retained(rho) for rho in retained]
        methods |= {method.label: method for method in budgets}
    return methods


def _capsule(
    name: str, retained: float, load: Callable[[], KVCapsule], samples: Callable[[], list[Any]], model: Any
) -> KVCapsule:
    form = CAPSULES[name]
    if form.codec in ("static", "static-mlp"):  # their positions and maps are those of one fraction
        return KVCapsule.fit(model, None, samples(), retained=retained, codec=form.codec)
    return form.of(load()).with_retained(retained)
