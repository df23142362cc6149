"""`CapsuleInfo`: what a capsule says about itself, beside its tensors; the content of its JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule.budget import Budget, LayerNeeds, check_budget
from capsight.kvcapsule.codecs.quantise import BITS


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of a capsule.

    Attributes:
        index: the layer's index in the model.
        kept: tokens kept of each block (r).
        heads: KV heads (H).
        head_dim: channels per head (D).
    """

    index: int
    kept: int
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        """Check that the numbers can be sizes."""
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "index"):
                raise CapsuleFileError(f"layer entry {name} is {value!r}, expected a positive integer")


@dataclass(frozen=True, slots=True)
class CapsuleInfo:
    """What is known of a fitted capsule.

    Attributes:
        codec: name of the codec.
        block_size: tokens in a block (N).
        itemsize: bytes of one number of the KV cache when it was fitted.
        layers: the layers with capsules, ascending.
        options: options that the codec was fitted with.
        fingerprint: `model_fingerprint` of the model it was fitted to.
        model_config: that model's config.
        blocks: calibration blocks seen.
        bits: bits of a stored number, 8 or 4; None for the numbers as they are.
        budget: how the average retained count is shared out over the layers.
        share: of the bytes of a 16-bit cache that latents may take (joint); None for other codecs.
        needs: what the layers need, where that was measured; in the order of `layers`.
    """

    codec: str
    block_size: int
    itemsize: int
    layers: tuple[LayerInfo, ...]
    options: dict[str, Any]
    fingerprint: str
    model_config: dict[str, Any]
    blocks: int
    bits: int | None = None
    budget: Budget = "uniform"
    needs: LayerNeeds | None = None
    share: float | None = None

    def to_header(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> CapsuleInfo:
        """What `to_header` gave, also after a trip through JSON; without a budget it is uniform.

        Raises:
            CapsuleFileError: a field is missing or is not what it should be.
        """
        fields: dict[str, Any] = {name: header.get(name) for name in cls.__slots__}
        expected: dict[str, type] = {
            "codec": str,
            "block_size": int,
            "itemsize": int,
            "layers": list,
            "options": dict,
        }
        expected |= {"fingerprint": str, "model_config": dict, "blocks": int}
        for name, kind in expected.items():
            if not isinstance(fields[name], kind):
                raise CapsuleFileError(
                    f"field {name} of the capsule file is {fields[name]!r}, expected {kind.__name__}"
                )
        try:
            layers = tuple(LayerInfo(**layer) for layer in header["layers"])
        except TypeError as error:
            raise CapsuleFileError(f"the capsule file has a malformed layer entry: {error}") from error
        if not layers or min(fields["block_size"], fields["itemsize"]) < 1:
            raise CapsuleFileError("the capsule file has no layers, or a size that is not positive")
        if fields["bits"] not in (None, *BITS) or isinstance(fields["bits"], (bool, float)):
            raise CapsuleFileError(
                f"field bits of the capsule file is {fields['bits']!r}, expected 8, 4 or null"
            )
        share = fields["share"]
        if share is not None and not (isinstance(share, float | int) and 0 < share <= 1):
            raise CapsuleFileError(f"field share of the capsule file is {share!r}, expected a fraction")
        try:
            budget = check_budget(header.get("budget", "uniform"))
        except OptionError as error:
            raise CapsuleFileError(f"field budget of the capsule file: {error}") from error
        needs = header.get("needs")
        if needs is not None:
            needs = LayerNeeds.from_header(needs, len(layers), fields["block_size"])
        elif budget != "uniform":
            raise CapsuleFileError(f"the capsule file has a {budget} budget and no needs; fit it again")
        return cls(**{**fields, "layers": layers, "budget": budget, "needs": needs})
