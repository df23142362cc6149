"""`calibrate`: from prompts to a head map, in two stages, within a tolerance."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sized
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from capsight.blindsight.calibrate.capture import shape_of
from capsight.blindsight.calibrate.criteria import CRITERIA, output
from capsight.blindsight.calibrate.held_out import HeldOut
from capsight.blindsight.calibrate.losses import Losses, check_finite
from capsight.blindsight.calibrate.questions import Questions
from capsight.blindsight.calibrate.recovery import Evaluate, loosest, recover
from capsight.blindsight.calibrate.samples import Digest, Prompt, Sample, prompts
from capsight.blindsight.calibrate.votes import Thresholds, Votes
from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.head_map import CalibrationRecord, HeadMap
from capsight.errors import CalibrationError, OptionError
from capsight.execution import check_whole
from capsight.model_fingerprint import model_fingerprint
from capsight.processors import AnyProcessor
from capsight.text_layers import layer_sizes

_log = logging.getLogger(__name__)

CriterionName = Literal["mass", "output", "distribution"]
"""What a head is judged by; see `criteria.py`."""

Unit = Literal["head", "kv_group", "layer"]
"""Which query heads are switched, judged and returned to Dense together."""

ALPHAS: dict[str, float] = {"mass": 0.1, "output": 0.1, "distribution": 0.001}
"""Default alpha where there is no tolerance: share of attention, relative change of the output, nats."""

TOLERANCE = 0.01
"""Default share of held-out answers that may change: one of the 144 that `capsight calibrate` holds out."""

HOLD_EVERY = 4
"""One prompt in this many does not vote but measures the drop."""


def calibrate(
    model: PreTrainedModel,
    processor: AnyProcessor | None,
    samples: Iterable[Sample],
    *,
    criterion: CriterionName = "distribution",
    alpha: float | tuple[float, float] | None = None,
    gamma_d: float = 0.1,
    gamma_s: float = 0.9,
    gamma_i: float = 0.9,
    options: MaskOptions | None = None,
    tolerance: float | None = TOLERANCE,
    evaluate: Evaluate | None = None,
    held_out: Iterable[Sample | Questions] | None = None,
    unit: Unit = "head",
    fingerprint: str | None = None,
    progress: bool = True,
) -> HeadMap:
    """Give every attention head of a model its category.

    Deterministic: the same model, samples and options give the same map. The model leaves as it came.

    Args:
        model: a transformers vision-language model of a supported family.
        processor: its processor; used for samples that are not processor outputs yet, else None will do.
        samples: processor outputs, lists of chat messages, or keyword arguments for the processor (`text=`,
            `images=`). Read once, one at a time; those without a second image do not vote.
        criterion: what a head is judged by: "distribution" (the best judge; takes gradients, and the memory
            for them), "output" or "mass" (one prefill of the text part).
        alpha: what a category may lose, in the criterion's unit: one number, or two for the first and
            the last layer, linear in between. None: as much as the tolerance allows (`loosest`), or
            `ALPHAS` where there is no tolerance.
        gamma_d: see `Thresholds`.
        gamma_s: see `Thresholds`.
        gamma_i: see `Thresholds`.
        options: which tokens are sinks, and the window of Sink heads.
        tolerance: the drop that is allowed, in the unit of `evaluate`. With an alpha of your own, heads
            return to Dense, those with the largest output error first, until the map is within it. None:
            the drop is not measured.
        evaluate: the drop of a head map against the dense model (0 for an all-Dense map). None: the
            share of held-out prompts whose answer changes (`HeldOut.changed`).
        held_out: prompts for that, kept in memory; several questions about the same images are read fastest
            as one `Questions`. None: every fourth of `samples`, which then do not vote.
        unit: what has one category: a query head, the query heads that share a key-value head, or a layer.
        fingerprint: stored in the map; None: the model's own. Empty: the map is for any model of its shape.
        progress: show a progress bar (tqdm, on stderr).

    Returns:
        The head map, with its record.

    Raises:
        CalibrationError: no prompt with two images, NaN or infinite attention, nothing to measure the
            drop on, or a dense model outside the tolerance.
        OptionError: an option is out of range.
        UnsupportedModelError: the model is not of a kind that can be read.
        LayoutError: a sample is not what the model's processor writes.
    """
    check_options(criterion, unit, tolerance)
    check_whole(model)
    chosen = options or MaskOptions()
    ends = ALPHAS[criterion] if alpha is None else alpha
    thresholds = Thresholds(ends if isinstance(ends, tuple) else (ends, ends), gamma_d, gamma_s, gamma_i)
    layers, heads = shape_of(model)
    together = {"head": 1, "kv_group": heads // _kv_heads(model, heads), "layer": heads}[unit]
    votes, errors = Votes(layers, heads), Losses(layers, heads)
    recovers = tolerance is not None and alpha is not None
    digest, reserved = Digest(), list[Prompt]()
    set_aside = tolerance is not None and evaluate is None and held_out is None
    read = prompts(model, processor, samples)
    with tqdm(read, f"judging heads by {criterion}", _length(samples), disable=not progress) as bar:
        for index, prompt in enumerate(prompt for prompt in bar if prompt.is_multi_image):
            if set_aside and index % HOLD_EVERY == HOLD_EVERY - 1:
                reserved.append(prompt)
                continue
            digest.add(prompt)
            lost = CRITERIA[criterion](model, prompt, chosen, together)
            check_finite(lost)
            votes.add(lost)
            if recovers:
                errors.add(lost if criterion == "output" else output(model, prompt, chosen, together))
    if not votes.prompts:
        raise CalibrationError("no calibration prompt has two images; heads differ only between images")
    drop, recovered = None, 0
    if tolerance is None:
        head_map = HeadMap(votes.decide(thresholds), chosen)
    else:
        if evaluate is None:
            held = HeldOut(model, reserved or _held_out(model, processor, held_out or ()))
            evaluate = partial(held.changed, most=tolerance)
        with tqdm(desc="measuring the drop", disable=not progress) as bar:
            if recovers:
                voted = HeadMap(votes.decide(thresholds), chosen)
                head_map, drop = recover(voted, errors, evaluate, tolerance, together, bar.update)
                recovered = _dense(head_map) - _dense(voted)
            else:
                head_map, drop, thresholds = loosest(
                    votes, thresholds, chosen, evaluate, tolerance, bar.update
                )
    _log.info("%d prompts voted: %s; drop %s", votes.prompts, head_map.counts(), drop)
    record = CalibrationRecord(
        criterion=criterion,
        unit=unit,
        thresholds=thresholds.to_dict(),
        votes=votes.to_dict(thresholds),
        prompts=votes.prompts,
        dataset=digest.hexdigest(),
        recovered=recovered,
        measured_drop=drop,
        tolerance=tolerance,
    )
    return replace(
        head_map, model=model_fingerprint(model) if fingerprint is None else fingerprint, calibration=record
    )


def check_options(criterion: str, unit: str, tolerance: float | None) -> None:
    """Raise unless `calibrate` knows what is asked of it.

    Raises:
        OptionError: a name is unknown, or the tolerance is negative.
    """
    if criterion not in CRITERIA:
        raise OptionError(f"criterion must be one of {', '.join(CRITERIA)}, not {criterion!r}")
    if unit not in get_args(Unit):
        raise OptionError(f"unit must be one of {', '.join(get_args(Unit))}, not {unit!r}")
    if tolerance is not None and not tolerance >= 0:
        raise OptionError(f"tolerance must be 0 or more, not {tolerance}")


def _length(samples: Iterable[Sample]) -> int | None:
    return len(samples) if isinstance(samples, Sized) else None


def _held_out(
    model: PreTrainedModel, processor: AnyProcessor | None, samples: Iterable[Sample | Questions]
) -> Iterator[Prompt | Questions]:
    for sample in samples:
        if isinstance(sample, Questions):
            yield sample
        else:
            yield from prompts(model, processor, [sample])


def _kv_heads(model: Any, heads: int) -> int:
    """The fewest KV heads of a layer: groups of as many query heads hold whole groups of every layer."""
    return min([heads, *(sizes.kv_heads for sizes in layer_sizes(model.config))])


def _dense(head_map: HeadMap) -> int:
    return head_map.counts()[Category.DENSE]
