"""A fit shared out over two processes is that of one; what goes wrong in one ends both."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys

import pytest
import torch

import capsight
from capsight.cache_argument import CACHE
from capsight.cli.app import main
from capsight.errors import CalibrationError, CapsightError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.calibration.processes import ElsewhereError, GoneError, join_launched
from tiny import FAMILIES

try:
    from transformers.distributed import DistributedConfig

    SPREAD = DistributedConfig(tp_size=2)
except (ImportError, TypeError):
    SPREAD = None

OPTIONS = {
    "joint": {"rank": 32},
    "heads": {"block_size": 8},
    "static-mlp": {"block_size": 8, "width": 4},
}


def samples(count=5):
    """The second one, the first of the second process, has no image."""
    qwen = FAMILIES["qwen2_5_vl"]()
    sizes = [(64, 64), None, (96, 64), (96, 64), (64, 32)]
    pictures = [[] if size is None else [qwen.picture(n, size)] for n, size in enumerate(sizes)]
    return [qwen.inputs([(shown, f"what {n}")]) for n, shown in enumerate(pictures[:count])]


def fit(codec, given, resume=None, model=None):
    model = model or FAMILIES["qwen2_5_vl"]().model
    return KVCapsule.fit(model, None, given, codec=codec, progress=False, resume=resume, **OPTIONS[codec])


def in_two(folder, *work):
    """Run all of `work` in each of two processes that torch.distributed joins; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    pair = [fork.Process(daemon=True, target=started, args=(rank, port, folder, work)) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(240)
    return [process.exitcode for process in pair]


def started(rank, port, folder, work):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.stdout = sys.stderr = open(folder / f"said-{rank}", "w")  # noqa: SIM115
    join_launched()
    for step in work:
        step(rank, folder)
    sys.stdout.flush()
    os._exit(0)


def save_all(rank, folder):
    for codec in OPTIONS:
        fit(codec, samples(), folder / f"{codec}.partial").save_pretrained(folder / f"{codec}-{rank}")


def fail_in_the_second(rank, folder):
    given = samples()
    given[3]["pixel_values"][:] = torch.nan
    for codec in ("joint", "heads"):
        with pytest.raises(CalibrationError) as caught:
            fit(codec, given)
        kind = CalibrationError if rank == 1 else ElsewhereError
        assert type(caught.value) is kind
        assert "NaN" in str(caught.value)
    with pytest.raises(CalibrationError, match="no calibration sample has an image"):
        fit("heads", samples()[1:2] * 3)
    assert len(fit("joint", samples(1)).codecs) == 3  # the second has none, and they still go together


def command_line(rank, folder):
    sys.argv = ["capsight", "fit", "--out", str(folder / "capsule"), "--samples", "2", "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    sys.argv = [*sys.argv[:-1], "nowhere"]
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2


def spread_over_both(rank, folder):
    if SPREAD is None:
        return
    whole = FAMILIES["qwen2_5_vl"]()
    capsule = KVCapsule.from_pretrained(folder / "joint-0")
    model = type(whole.model).from_pretrained(folder / "model", distributed_config=SPREAD).eval()
    alone = model.generate(**samples(1)[0], max_new_tokens=1, return_dict_in_generate=True)
    heads = alone[CACHE].layers[0].keys.shape[1]
    refused = 0
    for work in (
        lambda: fit("heads", samples(1), model=model),
        lambda: capsight.enable(model, capsule=capsule).__enter__(),
        lambda: capsight.enable(model, head_map=capsight.HeadMap.all_dense(3, 4)).__enter__(),
    ):
        with pytest.raises(CapsightError, match="tensor parallelism"):
            work()
        refused += 1
    (folder / f"refused-{rank}").write_text(f"{heads} head, {refused} refusals")


def lose_the_second(rank, folder):
    def short():
        yield from samples(2)
        if rank == 1:
            os._exit(9)

    with pytest.raises(GoneError, match="gone"):
        fit("joint", short())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    FAMILIES["qwen2_5_vl"]().save(folder / "model")
    codes = in_two(folder, save_all, spread_over_both, fail_in_the_second, command_line, lose_the_second)
    said = [(folder / f"said-{rank}").read_text() for rank in range(2)]
    assert codes == [0, 9], said
    return folder, said


@pytest.mark.parametrize("codec", OPTIONS)
def test_both_have_the_capsule_of_one_process(done, codec):
    folder, _ = done
    alone = fit(codec, samples())
    pair = [KVCapsule.from_pretrained(folder / f"{codec}-{rank}") for rank in range(2)]
    for capsule in pair:
        assert capsule.info.blocks == alone.info.blocks
        assert [layer.kept for layer in capsule.info.layers] == [layer.kept for layer in alone.info.layers]
        for index, codec_alone in alone.codecs.items():
            for name, tensor in codec_alone.state_dict().items():
                other = capsule.codecs[index].state_dict()[name]
                torch.testing.assert_close(other.double(), tensor.double(), rtol=1e-3, atol=1e-4)


def test_the_command_shares_its_prompts_and_says_things_once(done):
    folder, said = done
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith("capsule")) == ["capsule"]
    assert KVCapsule.from_pretrained(folder / "capsule").info.blocks > 0
    assert said[0].count("2 prompts in") == 1
    assert said[0].count("capsight: device is 'nowhere'") == 1
    assert "capsight:" not in said[1]
    assert "2 prompts in" not in said[1]


@pytest.mark.skipif(SPREAD is None, reason="this transformers has no DistributedConfig")
def test_models_that_are_spread_over_processes_are_refused(done):
    folder, _ = done
    assert [(folder / f"refused-{rank}").read_text() for rank in range(2)] == ["1 head, 3 refusals"] * 2
