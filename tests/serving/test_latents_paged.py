"""Latents in paged memory, without vLLM: written, read back, and attended to, as the codec alone would."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from capsight import KVCapsule
from capsight.kvcapsule.cache.waiting import EncodeQueue
from capsight.kvcapsule.codecs import TokenPositions
from capsight.kvcapsule.plan import Run
from capsight.serving.plan import Latents
from capsight.serving.vllm import latent_steps
from capsight.serving.vllm.latent_steps import Placed, latent_step
from capsight.serving.vllm.latents import LatentMemory, pieces, write_bytes
from capsight.serving.vllm.paged import read_blocks, read_tokens
from serving.vllm_cases import float32  # noqa: F401

SIZE, BLOCKS, QUERIES = 16, 64, 8
RANGES = (
    [(3, 90), (95, 160)],
    [(40, 139), (150, 250)],  # blocks in front, and an image that goes on in the block that is not full
    [(20, 118)],
    [],
    [(2, 9)],  # too small to shrink
)
PROMPTS = (200, 254, 130, 40, 20)
pytestmark = pytest.mark.filterwarnings("ignore::capsight.errors.UnlikeCalibrationWarning")


def places(start, count):
    at = torch.arange(count)
    return torch.stack([torch.full((count,), start), start + at // 11, start + at % 11])


SPANS = [[Placed.of(a, b, places(a, b + 1 - a)) for a, b in ranges] for ranges in RANGES]


class World:
    """Paged memory of all layers, in which each request has blocks of its own, and what lies in it."""

    def __init__(self, lengths):
        torch.manual_seed(0)
        capsule = KVCapsule.from_pretrained("reference")
        self.codecs = [capsule.codecs[layer] for layer in sorted(capsule.codecs)]
        first = self.codecs[0]
        _, self.heads, self.channels = first.mean.shape
        self.kind = Latents(
            len(self.codecs), first.levels.nbytes, 2 * self.heads * self.channels * torch.float32.itemsize
        )
        shape = BLOCKS, self.heads, SIZE, 2 * self.channels
        self.caches = [torch.full(shape, torch.nan) for _ in self.codecs]
        blocks = iter((torch.randperm(BLOCKS - 1) + 1).tolist())
        self.tables = torch.zeros(len(lengths), 32, dtype=torch.int32)
        self.held = []  # keys and values [H, n, D] of each request in each layer
        for row, length in enumerate(lengths):
            for index in range(-(-length // SIZE)):
                self.tables[row, index] = next(blocks)
            self.held.append([torch.randn(2, self.heads, length, self.channels) for _ in self.codecs])
            for layer in range(len(self.codecs)):
                self.put(layer, row, range(length))
        self.memory = LatentMemory(self.kind, self.codecs)

    def put(self, layer, row, positions):
        for position in positions:
            key, value = self.held[row][layer][:, :, position]
            block = self.caches[layer][self.tables[row, position // SIZE]].view(self.heads, -1)
            block[:, : SIZE * self.channels].view(self.heads, -1, SIZE)[..., position % SIZE] = key
            block[:, SIZE * self.channels :].view(self.heads, SIZE, -1)[:, position % SIZE] = value

    def plan(self, row):
        return self.kind.plan(RANGES[row], PROMPTS[row], SIZE)

    def step(self, parts, rows):
        """A step in which requests read `[first, end)`."""
        starts = torch.tensor([0, *(end - first for first, end in parts)]).cumsum(0)
        made = SimpleNamespace(
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([end for _, end in parts]),
            block_table_tensor=self.tables[rows],
            mm_req_doc_ranges={i: SPANS[row] for i, row in enumerate(rows)},
        )
        return latent_step(made, [PROMPTS[row] for row in rows], SIZE, self.memory)

    def run(self, step, tokens):
        """All layers of a step with queries that are returned, too; NaN where nothing is written."""
        torch.manual_seed(tokens)
        queries = torch.randn(len(self.codecs), tokens, QUERIES, self.channels)
        outputs = torch.full((len(self.codecs), tokens, QUERIES * self.channels), torch.nan)
        for layer, cache in enumerate(self.caches):
            step.run(layer, queries[layer], cache, 0.2, outputs[layer])
        return queries, outputs.view_as(queries)

    def payload(self, row):
        """What the codec makes of a request's images."""
        shown = torch.cat([torch.arange(a, b + 1) for a, b in RANGES[row]])
        queue, runs = EncodeQueue(self.codecs), (Run(0, 0, len(shown)),)
        positions = TokenPositions(torch.cat([x.places for x in SPANS[row]], 1), len(self.codecs))
        for layer, codec in enumerate(self.codecs):
            keys, values = self.held[row][layer][:, :, shown].transpose(1, 2)[:, :, :, None]
            waiting = queue.add(codec, keys, values, runs, positions)
        return shown, waiting.payload

    def expected(self, row, queries, first):
        """Attention of queries `[L, Q, Hq, D]` from position `first` on, images rebuilt."""
        shown, payload = self.payload(row)
        positions = TokenPositions(torch.cat([x.places for x in SPANS[row]], 1))
        found = []
        for layer, codec in enumerate(self.codecs):
            both = self.held[row][layer].clone()
            for kind, rebuilt in enumerate(codec.decode_at(payload, positions, torch.float32)):
                both[kind][:, shown] = rebuilt[:, :, 0].transpose(0, 1)
            length = both.shape[2]
            keys, values = both.repeat_interleave(QUERIES // self.heads, 1)
            hidden = torch.ones(queries.shape[1], length).triu(first + 1).bool()
            scores = 0.2 * queries[layer].transpose(0, 1) @ keys.mT
            found.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
        return torch.stack(found)

    def forget(self, row):
        """Nothing may be read of the blocks that are freed."""
        for block in self.tables[row, self.plan(row).freed.start : self.plan(row).freed.stop].tolist():
            for cache in self.caches:
                cache[block] = torch.nan


def test_bytes_over_blocks():
    memory = torch.zeros(5, 10, dtype=torch.uint8)
    data = torch.arange(1, 17, dtype=torch.uint8)
    write_bytes(memory, [3, 0, 4], 7, data)
    assert list(pieces([3, 0, 4], 10, 7, 23)) == [(3, 7, 10), (0, 0, 10), (4, 0, 3)]
    assert torch.equal(torch.cat([memory[b, i:j] for b, i, j in pieces([3, 0, 4], 10, 7, 23)]), data)
    assert memory.count_nonzero() == len(data)
    assert list(pieces([3], 10, 4, 4)) == []


def test_blocks_are_read_as_tokens_are():
    world = World(PROMPTS)
    table = world.tables[1, :15].long()
    keys, values = read_tokens(world.caches[2], table, 240)
    assert torch.equal(read_blocks(world.caches[2], table), torch.stack([keys, values]).transpose(1, 2))


def test_latents_come_back_as_they_were_stored():
    world = World(PROMPTS)
    step = world.step([(100, 200), (200, 254), (0, 130), (0, 40), (0, 20)], range(5))
    assert (step.rows, step.tails) == ({}, [])
    _, outputs = world.run(step, 344)
    assert outputs.isnan().all()
    opened = world.step([(200, 201), (254, 255), (130, 131), (40, 41), (20, 21)], range(5))
    assert opened.rows == {0: (0, 1), 1: (1, 2), 2: (2, 3)}
    requests = opened._groups[0]._requests
    found = world.memory.read(requests)
    for name in ("codes", "scales"):
        right = torch.cat([world.payload(row)[1].tensors[name] for row in range(3)])
        assert torch.equal(found.tensors[name], right)
    assert world.memory.tokens(requests) is world.memory.tokens(list(requests))
    assert world.memory.tokens(requests[:2]) is not world.memory.tokens(requests)


@pytest.mark.parametrize("native", [True, False])
def test_attention_over_latents_and_exact_tokens(monkeypatch, native):
    """New tokens of two requests, three of another, and of two that have no latents."""
    if not native:
        monkeypatch.setattr(latent_steps, "supports", lambda query: False)
    ends = (207, 255, 140, 41, 21)
    world = World(ends)
    world.run(world.step([(0, n) for n in PROMPTS], range(5)), sum(PROMPTS))
    for row in range(3):
        world.forget(row)
    step = world.step([(206, 207), (254, 255), (137, 140), (40, 41), (20, 21)], range(5))
    queries, outputs = world.run(step, 7)
    assert outputs[:, 5:].isnan().all()
    for row, rows, first in ((0, slice(0, 1), 206), (1, slice(1, 2), 254), (2, slice(2, 5), 137)):
        right = world.expected(row, queries[:, rows], first)
        assert torch.allclose(outputs[:, rows], right, atol=2e-5), (outputs[:, rows] - right).abs().max()


def test_output_that_is_read_again_waits_for_the_last_layer():
    world = World((207, 255, 137, 41, 21))
    step = world.step([(0, 207), (0, 254), (100, 137)], range(3))
    assert [request.rows for request in step.tails] == [(200, 207), (491, 498)]
    _, outputs = world.run(step, 498)
    assert outputs.isnan().all()
    for row in range(3):
        world.forget(row)
    second, rows = step.second_pass()
    assert rows.tolist() == [*range(200, 207), *range(491, 498)]
    queries, outputs = world.run(second, 14)
    for row, part, first in ((0, slice(0, 7), 200), (2, slice(7, 14), 130)):
        assert torch.allclose(outputs[:, part], world.expected(row, queries[:, part], first), atol=2e-5)


def test_blocks_are_cleared_that_a_step_begins_and_does_not_fill():
    """The first and the last of four requests do; the second fills its block, the third had begun it."""
    world = World((64, 64, 64, 64))
    for layer, cache in enumerate(world.caches):
        cache.fill_(torch.nan)
        world.memory.see(layer, cache)
    world.step([(30, 33), (30, 48), (34, 40), (32, 33)], range(4))
    cleared = {int(world.tables[0, 2]), int(world.tables[3, 2])}
    for cache in world.caches:
        clean = {block for block in range(BLOCKS) if not cache[block].isnan().any()}
        assert clean == cleared
        assert all(cache[block].count_nonzero() == 0 for block in clean)
