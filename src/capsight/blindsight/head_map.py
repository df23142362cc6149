"""`HeadMap`: the category of every attention head of a model, and how it came about."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from capsight.blindsight import head_map_file
from capsight.blindsight.categories import SPARSE, Category, MaskOptions
from capsight.errors import ModelMismatchError, OptionError
from capsight.files import checked
from capsight.hub import HubOptions, push
from capsight.model_fingerprint import same_model

Categories = tuple[Category, ...]
"""One category per query head of a layer."""


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """How a calibrated head map came about; the numbers are those that decided.

    Attributes:
        criterion: what was measured ("mass", "output" or "distribution").
        unit: what was switched, and has one category ("head", "kv_group" or "layer").
        thresholds: name -> value; alpha as "alpha_first" and "alpha_last" (linear in depth), then
            "gamma_d", "gamma_s", "gamma_i".
        votes: category -> [layers][heads], the share of prompts for which the category was good enough.
        prompts: how many prompts voted.
        dataset: SHA-256 over the prompts that voted.
        recovered: heads that the recovery pass returned to Dense.
        measured_drop: what `evaluate` gave for the finished map, in its own unit.
        tolerance: the drop that was allowed, in the same unit; None: no recovery pass.
    """

    criterion: str
    unit: str
    thresholds: dict[str, float]
    votes: dict[Category, list[list[float]]]
    prompts: int
    dataset: str
    recovered: int = 0
    measured_drop: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class HeadMap:
    """A category per layer and query head, for one model; immutable.

    Attributes:
        categories: [layers][query heads].
        options: the mask options the categories were found with, and mean something with.
        model: fingerprint of the model it was made for; empty: for any of this shape.
        calibration: how it was found; None for maps made by hand.

    Raises:
        OptionError: there are no layers or heads, or layers (or votes) differ in their number of heads.
    """

    categories: tuple[Categories, ...]
    options: MaskOptions = field(default_factory=MaskOptions)
    model: str = ""
    calibration: CalibrationRecord | None = None

    def __post_init__(self) -> None:
        """Check the shape."""
        sizes = {len(layer) for layer in self.categories}
        if len(sizes) != 1 or sizes == {0}:
            raise OptionError(f"a head map needs the same number of heads in each layer, not {sorted(sizes)}")
        for votes in self.calibration.votes.values() if self.calibration else ():
            if [len(layer) for layer in votes] != [self.num_heads] * self.num_layers:
                raise OptionError("votes are not of the shape of the categories")

    @classmethod
    def uniform(
        cls, category: Category, num_layers: int, num_heads: int, options: MaskOptions | None = None
    ) -> HeadMap:
        """All heads of one category (a control)."""
        return cls(((category,) * num_heads,) * num_layers, options or MaskOptions())

    @classmethod
    def all_dense(cls, num_layers: int, num_heads: int) -> HeadMap:
        """All heads Dense: the model as it is."""
        return cls.uniform(Category.DENSE, num_layers, num_heads)

    @classmethod
    def random(
        cls,
        num_layers: int,
        num_heads: int,
        counts: Mapping[Category, int],
        seed: int,
        options: MaskOptions | None = None,
    ) -> HeadMap:
        """`counts` heads of each category, in random places (the control for a calibrated map).

        Args:
            num_layers: layers (L).
            num_heads: query heads per layer (Hq).
            counts: category -> heads, L * Hq in all; `other.counts()` makes a map that costs as much.
            seed: the same seed gives the same map.
            options: mask options.

        Raises:
            OptionError: the counts do not add up to L * Hq.
        """
        heads = [category for category in Category for _ in range(counts.get(category, 0))]
        if len(heads) != num_layers * num_heads:
            raise OptionError(f"counts add up to {len(heads)} heads, not {num_layers} x {num_heads}")
        random.Random(seed).shuffle(heads)
        layers = (tuple(heads[i : i + num_heads]) for i in range(0, len(heads), num_heads))
        return cls(tuple(layers), options or MaskOptions())

    @property
    def num_layers(self) -> int:
        """Layers (L)."""
        return len(self.categories)

    @property
    def num_heads(self) -> int:
        """Query heads per layer (Hq)."""
        return len(self.categories[0])

    def counts(self) -> dict[Category, int]:
        """How many heads each category has; categories without a head are there with 0."""
        counter = Counter(category for layer in self.categories for category in layer)
        return {category: counter[category] for category in Category}

    def replaced(self, changes: Mapping[tuple[int, int], Category]) -> HeadMap:
        """This map with some heads changed.

        Args:
            changes: (layer, query head) -> category.
        """
        return self._mapped(lambda layer, head, category: changes.get((layer, head), category))

    def tie_kv_groups(self, num_kv_heads: int) -> HeadMap:
        """This map with one category per group of query heads that share a key-value head.

        A group gets the sparsest category that shows each of its heads all that it saw before.

        Args:
            num_kv_heads: key-value heads of the model (Hkv).

        Raises:
            OptionError: Hkv does not divide the number of query heads.
        """
        if num_kv_heads < 1 or self.num_heads % num_kv_heads:
            raise OptionError(f"{num_kv_heads} key-value heads do not divide {self.num_heads} query heads")
        size = self.num_heads // num_kv_heads

        def tied(layer: int, head: int, category: Category) -> Category:
            first = head - head % size
            return union(self.categories[layer][first : first + size])

        return self._mapped(tied)

    def check(self, num_layers: int, num_heads: int, model: str = "") -> None:
        """Raise unless this map fits a model.

        Args:
            num_layers: layers of the model's text part.
            num_heads: query heads per layer.
            model: the model's fingerprint; compared where this map and the caller both have one.

        Raises:
            ModelMismatchError: shape or fingerprint differ.
        """
        if (self.num_layers, self.num_heads) != (num_layers, num_heads):
            raise ModelMismatchError(
                f"the head map is for {self.num_layers} layers of {self.num_heads} heads, the model has "
                f"{num_layers} of {num_heads}; calibrate one for this model"
            )
        if self.model and model and not same_model(self.model, model):
            raise ModelMismatchError(
                "the head map was made for other weights of this architecture; calibrate one for this model, "
                "or use head_map.for_model('') if you mean it"
            )

    def for_model(self, fingerprint: str) -> HeadMap:
        """This map with the fingerprint of the model it belongs to; empty: for any of this shape."""
        return replace(self, model=fingerprint)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `head_map.json` into a folder, which is made if need be; atomic.

        Returns:
            The file.

        Raises:
            CapsuleFileError: it cannot be written.
        """
        return head_map_file.write(asdict(self), Path(folder))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> HeadMap:
        """Read what `save_pretrained` wrote.

        Args:
            source: the folder, the file itself, "reference" (the shipped one), or a hub repository id.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`: see `HubOptions`.

        Raises:
            CapsuleFileError: it is not there, was changed since it was written, or is no head map.
        """
        values, path = head_map_file.read(source, hub)
        return checked(cls, json.dumps(values), path, "save or download the head map again")

    def __repr__(self) -> str:
        """Its size, and how many heads each category has."""
        flat = [category for heads in self.categories for category in heads]
        counts = ", ".join(f"{flat.count(c)} {c.value}" for c in Category if c in flat)
        return f"{type(self).__name__}({self.num_layers} layers of {self.num_heads} heads: {counts})"

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save to a repository of the Hugging Face hub; see `KVCapsule.push_to_hub`."""
        return push(self.save_pretrained, repo_id, "a head map", options)

    def _mapped(self, change: Callable[[int, int, Category], Category]) -> HeadMap:
        layers = (
            tuple(change(layer, head, category) for head, category in enumerate(heads))
            for layer, heads in enumerate(self.categories)
        )
        return replace(self, categories=tuple(layers))


def union(categories: Sequence[Category]) -> Category:
    """The sparsest category that sees all that any of these see.

    Args:
        categories: at least one.
    """
    if Category.DENSE in categories:
        return Category.DENSE
    distinct = set(categories)
    return next(iter(distinct)) if len(distinct) == 1 else SPARSE[-1]
