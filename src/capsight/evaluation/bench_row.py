"""`BenchRow`: what is measured of one method at one batch size and image count."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from capsight.evaluation.stock import GRAPH

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One measurement; seconds are medians.

    Attributes:
        method: the method's name without its budget; "full" is the full cache.
        retained: fraction of the vision KV kept; None for "full".
        batch: rows.
        images: images per row.
        prompt_tokens: tokens per row, padding included.
        ttft_s: seconds to the first token, image encoding, prefill and encoding of capsules included.
        tokens_per_s: new tokens per second over all rows, after the first.
        kv_bytes: bytes of keys and values of the whole batch after the first token, or of what stands for
            them; modules are not counted; None where it was not measured.
        module_bytes: bytes of the method's own tensors.
        encode_s: seconds to fill the method's cache once the prefill's keys, values and queries are there,
            so what the method adds to the prefill ("full": a copy); None where it was not measured.
        peak_bytes: most memory that generation held beyond what was held before it; None where it was not
            measured.
        decode: how attention gets at capsules, "materialise" or "latent"; None for what suits the method.
        state_bytes: bytes of states (linear attention, convolutions) of the whole batch, beside `kv_bytes`.
        compiled: whether decode steps ran in a graph of `torch.compile`; "full" is a `StaticCache` then.
    """

    method: str
    retained: Positive | None
    batch: Size
    images: Count
    prompt_tokens: Size
    ttft_s: Positive
    tokens_per_s: Positive
    kv_bytes: Count | None
    module_bytes: Count = 0
    encode_s: float | None = None
    peak_bytes: Count | None = None
    decode: str | None = None
    state_bytes: Count = 0
    compiled: bool = False

    @property
    def label(self) -> str:
        """As `capsight eval` writes it, such as "heads 0.4"; with " latent" where that was timed."""
        label = self.method if self.retained is None else f"{self.method} {self.retained:g}"
        return f"{label} latent" if self.decode == "latent" else label

    @property
    def name(self) -> str:
        """The label; with ", compiled" where steps were."""
        return self.label + GRAPH * self.compiled

    def ratios(self, full: BenchRow, fastest: BenchRow) -> dict[str, float]:
        """This row over the full cache's, at the same batch and images; modules and states count as bytes.

        Args:
            full: the `DynamicCache`.
            fastest: the full cache that decodes fastest.
        """
        ratios = {
            "ttft": self.ttft_s / full.ttft_s,
            "tokens_per_s": self.tokens_per_s / fastest.tokens_per_s,
        }
        if self.kv_bytes is not None and full.kv_bytes:
            nbytes = self.kv_bytes + self.state_bytes + self.module_bytes
            ratios["bytes"] = nbytes / (full.kv_bytes + full.state_bytes)
        if self.peak_bytes is not None and full.peak_bytes:
            ratios["peak_bytes"] = self.peak_bytes / full.peak_bytes
        return {name: round(value, 4) for name, value in ratios.items()}

    def largest_batch(self, budget: int) -> int:
        """Rows whose caches fit a budget of bytes beside the modules, by the bytes a row was measured at.

        Raises:
            ValueError: bytes were not measured.
        """
        if not self.kv_bytes:
            raise ValueError("the row has no measured bytes")
        return max(0, (budget - self.module_bytes) * self.batch // (self.kv_bytes + self.state_bytes))

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)
