"""The variants that the ablations compare, by name, and the tables they stand in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ablation_calibration import Calibration
from ablation_codecs import ApartCodec, FixedEvict, KindCodec, PairCodec, Retain, TokenPca
from ablation_heads import variants as heads_variants
from ablation_metrics import MEASURES, measured, white
from ablation_places import ArrangedCodec, Arrangement, places
from ablation_selection import RULES
from transformers import PreTrainedConfig

from capsight.kvcapsule import CapsuleCache
from capsight.kvcapsule.calibration.key_mlp import train_mlp
from capsight.kvcapsule.codecs import (
    AdaptiveCodec,
    BlockCodec,
    EvictCodec,
    HeadsCodec,
    StaticCodec,
    StaticMlpCodec,
)
from capsight.layout import PromptLayout, build_layout

WIDTH = 32
"""Hidden units of MLPs, as the `static-mlp` codec has them."""


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """A method for `capsight.enable`: one codec per layer, and the arrangement in which blocks are stored."""

    name: str
    codecs: Mapping[int, BlockCodec]
    arrangement: Arrangement | None = None
    needs_attention: bool = False

    def cache(self, inputs: Mapping[str, Any] | PromptLayout, config: PreTrainedConfig) -> CapsuleCache:
        """An empty cache for a batch of prompts."""
        layout = inputs if isinstance(inputs, PromptLayout) else build_layout(inputs, config)
        return CapsuleCache(self.bound(layout), layout, config)

    def bound(self, layout: PromptLayout) -> Mapping[int, BlockCodec]:
        """The codecs as they serve the prompts of a layout."""
        if self.arrangement is None:
            return self.codecs
        at = places(layout, next(iter(self.codecs.values())).block_size)
        return {i: ArrangedCodec(codec, self.arrangement, at) for i, codec in self.codecs.items()}

    @property
    def module_nbytes(self) -> int:
        """Bytes of what was learnt."""
        return sum(codec.module_nbytes for codec in self.codecs.values())

    def check_model(self, model: Any) -> None:
        """Any model will do: variants are fitted to the one they are tested on."""


TABLES: dict[str, dict[str, str]] = {
    "What is kept, and what becomes of the rest": {
        "chosen per image, rebuilt (`adaptive`)": "adaptive",
        "chosen per image, evicted (`evict`)": "evict",
        "fixed positions, rebuilt (`static`)": "static",
        "fixed positions, evicted": "static evicted",
    },
    "Which token is predicted worst": {
        "Mahalanobis distance, keys weigh 1/2 (`adaptive`)": "adaptive",
        "keys weigh 1": "adaptive, keys 1",
        "keys weigh 1/4": "adaptive, keys 0.25",
        "values alone": "adaptive, values alone",
        "squared error in units of each head's variance": "adaptive, scaled",
        "the same; values by what W_O makes of them": "adaptive, values by output",
        "keys by queries' second moment, values by W_O": "adaptive, by attention",
    },
    "MLP for keys": {
        "linear map (`static`)": "static",
        "linear map + MLP (`static-mlp`)": "static-mlp",
    },
    "Which fixed positions": {
        "pivoted Cholesky (`static`)": "static",
        **{f"{rule}": f"static, {rule}" for rule in list(RULES)[1:]},
    },
    "Keys before or after RoPE": {
        "`adaptive`, after": "adaptive",
        "`adaptive`, before": "adaptive before RoPE",
        "`static`, after": "static",
        "`static`, before": "static before RoPE",
    },
    "Blocks: runs of tokens or tiles of 8 x 8": {
        "`adaptive`, runs": "adaptive",
        "`adaptive`, tiles": "adaptive tiles",
        "`static`, runs": "static",
        "`static`, tiles for values": "static value tiles",
        "`static`, tiles for both": "static tiles",
    },
    "Shared, or one for each": {
        "`adaptive`, one C for both": "adaptive",
        "`adaptive`, C for keys and C for values": "adaptive apart",
        "`adaptive`, a set of tokens for keys and one for values": "adaptive, two sets",
        "`static`, heads share": "static",
        "`static`, value basis per head": "static values per head",
        "`static`, key map per head": "static keys per head",
    },
    "Asymmetry: what for keys / what for values": {
        "retain + map / PCA (`static`)": "static",
        "retain + MLP / PCA (`static-mlp`)": "static-mlp",
        "PCA / retain + map": "PCA, retain",
        "PCA / retain + MLP": "PCA, retain + MLP",
        "retain + map / retain + map": "retain, retain",
        "retain + MLP / retain + MLP": "retain + MLP, retain + MLP",
        "PCA / PCA": "PCA, PCA",
    },
}
"""Tables: label of a row -> name of a variant. The first row is what the others are compared with."""

RUNS, BEFORE, TILES, VALUE_TILES = "runs", "before RoPE", "tiles", "value tiles"
"""Names of arrangements."""


def variants_of_heads(seen: Calibration, kept: int) -> Iterator[Variant]:
    """`heads` and its variants, and `evict`, with `kept` tokens of a block and head on average."""
    moments = seen.moments[RUNS]
    layers = range(len(seen.attention))
    for name, codecs in heads_variants([HeadsCodec.fit(moments[i], kept) for i in layers]):
        yield Variant(name, dict(enumerate(codecs)), needs_attention=True)
    yield Variant("evict", {i: EvictCodec.fit(moments[i], kept) for i in layers}, needs_attention=True)


def variants(seen: Calibration, kept: int) -> Iterator[Variant]:
    """Every variant, fitted with `kept` tokens' worth of numbers a block."""
    layers = range(len(seen.attention))
    linear = [StaticMlpCodec.fit(seen.moments[RUNS][i], kept, width=WIDTH) for i in layers]

    def made(make: Callable[[int], BlockCodec]) -> dict[int, BlockCodec]:
        return {layer: make(layer) for layer in layers}

    def of(
        kind: type[StaticCodec] | type[AdaptiveCodec] | type[EvictCodec], name: str, **options: Any
    ) -> Any:
        return made(lambda i: kind.fit(seen.moments[name][i], kept, **options))

    def retain(kind: str, layer: int, **options: Any) -> Retain:
        moments = getattr(seen.moments[RUNS][layer], kind)
        return Retain.fit(moments, kept, seen.attention[layer], **options)

    def corrected(kind: str, layer: int) -> Retain:
        plain, samples = retain(kind, layer), getattr(seen, kind)[layer]
        return plain.with_mlp(train_mlp(plain.index, plain.maps[0], samples, WIDTH))

    def pca(kind: str, layer: int, per_head: bool = False) -> TokenPca:
        return TokenPca.fit(getattr(seen.moments[RUNS][layer], kind), kept, per_head)

    def pair(name: str, keys: Callable[..., KindCodec], values: Callable[..., KindCodec]) -> Variant:
        size = seen.moments[RUNS][0].block_size
        return Variant(name, made(lambda i: PairCodec(size, keys("keys", i), values("values", i))))

    yield Variant("adaptive", of(AdaptiveCodec, RUNS))
    yield Variant("evict", of(EvictCodec, RUNS), needs_attention=True)
    plain = of(AdaptiveCodec, RUNS)
    for name, measure in MEASURES.items():
        yield Variant(
            name,
            made(
                lambda i, measure=measure: measured(
                    plain[i], measure(seen.moments[RUNS][i], seen.keys[i].queries, seen.outputs[i])
                )
            ),
        )
    by_keys, by_values = white(1.0, 0.0), white(0.0)

    def two_sets(layer: int) -> ApartCodec:
        told = seen.moments[RUNS][layer], seen.keys[layer].queries, seen.outputs[layer]
        return ApartCodec(*(measured(plain[layer], measure(*told)) for measure in (by_keys, by_values)))

    yield Variant("adaptive, two sets", made(two_sets))
    yield Variant("adaptive apart", of(AdaptiveCodec, RUNS, joint=False))
    yield Variant("adaptive before RoPE", of(AdaptiveCodec, BEFORE), seen.arrangements[BEFORE])
    yield Variant("adaptive tiles", of(AdaptiveCodec, TILES), seen.arrangements[TILES])
    yield Variant("static", of(StaticCodec, RUNS))
    yield Variant(
        "static evicted",
        made(lambda i: FixedEvict(linear[i].block_size, linear[i].kept_index)),
        needs_attention=True,
    )
    yield Variant("static before RoPE", of(StaticCodec, BEFORE), seen.arrangements[BEFORE])
    yield Variant("static tiles", of(StaticCodec, TILES), seen.arrangements[TILES])
    yield Variant("static value tiles", of(StaticCodec, VALUE_TILES), seen.arrangements[VALUE_TILES])
    for name, rule in list(RULES.items())[1:]:
        yield pair(f"static, {name}", partial(retain, rule=rule), pca)
    yield pair("static values per head", retain, partial(pca, per_head=True))
    yield pair("static keys per head", partial(retain, per_head=True), pca)
    yield pair("PCA, retain", pca, retain)
    yield pair("retain, retain", retain, retain)
    yield pair("PCA, PCA", pca, pca)
    mlps = [train_mlp(c.kept_index, c.key_map, seen.keys[i], WIDTH) for i, c in enumerate(linear)]
    yield Variant("static-mlp", made(lambda i: linear[i].with_mlp(mlps[i])))
    values = [corrected("values", i) for i in layers]

    def value_mlp(kind: str, layer: int) -> Retain:
        return values[layer]

    def key_mlp(kind: str, layer: int) -> Retain:
        return retain(kind, layer).with_mlp(mlps[layer])

    yield pair("PCA, retain + MLP", pca, value_mlp)
    yield pair("retain + MLP, retain + MLP", key_mlp, value_mlp)
