"""The GPU kernel against the plain operations; on a CPU in Triton's interpreter (`make test-triton`)."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.kvcapsule.attention import BlockRows, LatentBlocks, TokenMap, plain
from kvcapsule.latent_problem import Problem, problems

pytest.importorskip("triton", reason="Triton is not installed; `make test-triton` installs it and runs this")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 as `make test-triton` sets it", allow_module_level=True)

from capsight.kvcapsule.attention import triton_attention  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def check(problem: Problem, tolerance: float) -> None:
    found = triton_attention.attend(*problem)
    assert found.dtype == problem.query.dtype
    torch.testing.assert_close(found, plain.attend(*problem), atol=tolerance, rtol=tolerance)


@settings(max_examples=40)
@given(problems(), st.integers(1, 9))
def test_random_layouts(problem, processors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_attention, "_processors", lambda _: processors)  # more shares, or fewer
        check(problem.to(DEVICE, torch.float32), 1e-3)


def typical(counts: list[int], new: int, exact: int, slots: int = 26, rebuilt: int = 38) -> Problem:
    """Capsules of the default sizes, 7 query heads to a KV head, stored weights, a mean."""
    g = torch.Generator().manual_seed(0)
    blocks, heads, head_dim = sum(counts), 2, 40

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    def token_map() -> TokenMap:
        weights = random(blocks, 2, rebuilt, slots)[:, 1] / slots**0.5  # not contiguous, as in a payload
        return TokenMap(True, weights, 1 - weights.sum(-1), random(heads, head_dim))

    held = LatentBlocks(
        random(blocks, slots, heads, head_dim),
        random(blocks, slots, heads, head_dim),
        token_map(),
        token_map(),
    )
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rank = torch.tensor([i for count in counts for i in range(count)])
    keys, values = (random(len(counts), exact + new, heads, head_dim).transpose(1, 2) for _ in range(2))
    mask = torch.rand(len(counts), 1, new, exact + new, generator=g) < 0.7
    mask[..., 0] = True
    query = random(len(counts), new, 7 * heads, head_dim).transpose(1, 2)
    return Problem(query, keys, values, held, BlockRows(owner, rank, max(counts)), mask, head_dim**-0.5)


@pytest.mark.parametrize(
    ("counts", "new", "exact"), [([5], 1, 300), ([3, 0, 6], 1, 70), ([2, 1], 11, 20)], ids=str
)
def test_decoding_and_a_question_over_typical_capsules(counts, new, exact):
    check(typical(counts, new, exact).to(DEVICE, torch.float32), 1e-3)


bits_for_numbers = pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies bfloat16 by its bits")


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=bits_for_numbers), torch.float16])
def test_sixteen_bits(dtype):
    check(typical([2, 3], 1, 30).to(DEVICE, dtype), 3e-2)


def test_stored_weights_of_sixteen_bits_need_no_copy():
    problem = typical([2], 1, 30)
    key_map = problem.blocks.key_map
    short = TokenMap(True, key_map.weights.half(), key_map.rest, key_map.mean)
    held = LatentBlocks(problem.blocks.keys, problem.blocks.values, short, problem.blocks.value_map)
    check(problem._replace(blocks=held).to(DEVICE, torch.float32), 1e-3)
