"""Questions about several pictures of a prompt."""

import random
from collections import Counter
from collections.abc import Callable

from judging.question import Question, name_of, piece, places, question
from judging.world import SHAPES, World


def _which(ws: list[World], rng: random.Random) -> Question | None:
    shown = Counter(s for w in ws for s in SHAPES if w.where(s))
    single = [s for s in SHAPES if shown[s] == 1]
    if not single:
        return None
    shape = rng.choice(single)
    k = next(i for i, w in enumerate(ws) if w.where(shape))
    seen = places(k, ws[k], ws[k].where(shape))
    return question("which", f"which picture has a {shape}?", piece(str(k + 1), seen))


def _which_scene(ws: list[World], rng: random.Random) -> Question | None:
    asked = []
    for what, text in (("ground", "which picture has a {} ground?"), ("texture", "which picture is {}?"),
                       ("time", "which picture shows {}?")):  # fmt: skip
        shown = Counter(getattr(w, what) for w in ws)
        asked += [(text.format(v), i) for i, w in enumerate(ws) if shown[v := getattr(w, what)] == 1]
    if not asked:
        return None
    text, k = rng.choice(asked)
    return question("which_scene", text, piece(str(k + 1), places(k, ws[k], ws[k].empty)))


def _same(ws: list[World], rng: random.Random) -> Question:
    pairs = [(i, j) for i in range(len(ws)) for j in range(i + 1, len(ws))]
    equal = [(i, j) for i, j in pairs if ws[i].ground == ws[j].ground]
    other = [p for p in pairs if p not in equal]
    i, j = rng.choice(equal if equal and (not other or rng.random() < 0.5) else other)
    seen = [places(x, ws[x], ws[x].empty) for x in (i, j)]
    text = f"have pictures {i + 1} and {j + 1} the same ground?"
    return question("same_ground", text, piece("yes" if (i, j) in equal else "no", *seen))


def _odd(ws: list[World], rng: random.Random) -> Question | None:
    counts = Counter(w.ground for w in ws)
    if len(ws) < 3 or sorted(counts.values()) != [1, len(ws) - 1]:
        return None
    k = next(i for i, w in enumerate(ws) if counts[w.ground] == 1)
    everywhere = [p for i, w in enumerate(ws) for p in places(i, w, w.empty)]
    return question(
        "odd",
        "which ground is the odd one out?",
        piece(str(k + 1), places(k, ws[k], ws[k].empty), everywhere),
    )


def _differ(ws: list[World], rng: random.Random) -> Question | None:
    asked = []
    for i in range(len(ws) - 1):
        a, b = ws[i], ws[i + 1]
        cells = [c for c in {*a.things, *b.things} if a.things.get(c) != b.things.get(c)]
        if len(cells) == 1 and (a.ground, a.texture, a.time) == (b.ground, b.texture, b.time):
            asked.append((i, cells[0]))
    if not asked:
        return None
    i, cell = rng.choice(asked)
    seen = [places(x, ws[x], [cell]) for x in (i + 1, i)]
    return question("differ", f"where do pictures {i + 1} and {i + 2} differ?", piece(name_of(cell), *seen))


COMPARISONS: dict[str, Callable[[list[World], random.Random], Question | None]] = {
    "which": _which, "which_scene": _which_scene, "same_ground": _same, "odd": _odd, "differ": _differ,
}  # fmt: skip
