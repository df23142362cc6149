"""Trains a judge, or resumes: ``python -m judging.train --judge mosaic --out runs/mosaic`` (``tools/``)."""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from judging.dense import Heads, labels_of
from judging.lessons import Lesson, Teacher
from judging.packed import Packed, fast_tower
from judging.prompts import Prompt
from judging.shapes import JUDGES, Judge, untrained
from judging.stages import plan_of, stage_prompts

#: Muon's learning rate over AdamW's.
MUON = 3.0


def features_of(judge: Judge, model: Any, lesson: Lesson) -> Tensor:
    """Vision tokens [pictures * tokens, width]."""
    pixels = lesson.pixels.to(model.dtype)
    if judge.mrope:
        return model.model.visual(pixels, grid_thw=lesson.grid_thw).pooler_output
    found = model.model.get_image_features(pixels).pooler_output  # a tensor, or one of each picture
    return (found if isinstance(found, Tensor) else torch.stack(list(found))).flatten(0, 1)


def answers(judge: Judge, model: Any, lesson: Lesson, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, V] of all answer tokens, the right tokens, and their weights."""
    B, pictures = lesson.groups[0].ids.shape[0], len(lesson.firsts)
    embed = model.get_input_embeddings()
    prefix = embed(lesson.prefix).expand(B, -1, -1).clone()
    tokens = judge.tokens
    for k, first in enumerate(lesson.firsts):
        prefix[:, first : first + tokens] = features.view(B, pictures, tokens, -1)[:, k].to(prefix.dtype)
    embeds = [prefix.flatten(0, 1), *(embed(g.ids).flatten(0, 2) for g in lesson.groups)]
    positions = [lesson.positions.repeat(1, B)]
    for group in lesson.groups:
        _, Q, T = group.ids.shape
        positions.append((lesson.after + torch.arange(T)).repeat(3, B * Q))
    where = torch.cat(positions, 1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat(embeds)[None],
        position_ids=where[:, None] if judge.mrope else where[:1],
        attention_mask=None,
        use_cache=False,
    ).last_hidden_state[0]
    hidden = hidden[prefix.shape[0] * prefix.shape[1] :]
    labels = torch.cat([g.labels.flatten() for g in lesson.groups])
    weights = torch.cat([g.weights.flatten() for g in lesson.groups])
    asked = labels >= 0
    return model.lm_head(hidden[asked]).float(), labels[asked], weights[asked]


class Trainer:
    """Trains through the stages; everything it needs to go on lies in one checkpoint."""

    def __init__(self, judge: Judge, out: Path) -> None:
        """Begin or resume in folder `out`."""
        self.judge, self.out = judge, out
        out.mkdir(parents=True, exist_ok=True)
        saved = out / "tokenizer"
        tokenizer = PreTrainedTokenizerFast.from_pretrained(saved) if saved.exists() else judge.tokenizer()
        tokenizer.save_pretrained(saved)
        self.teacher = Teacher(judge, tokenizer)
        self.model = untrained(judge, tokenizer).train()
        self.heads = Heads(self.model.config.get_text_config().hidden_size)
        for parameter in self.model.parameters():  # not buffers: rotary frequencies stay exact
            parameter.data = parameter.data.bfloat16()
        if judge.mrope:
            fast_tower(judge, self.model.model.visual)
        self.packed = Packed(self.model.model.language_model)
        for layer in self.model.model.language_model.layers:  # about a third of a step's time
            layer.forward = torch.compile(layer.forward, dynamic=True)
        self.stage, self.step, self.seconds = "see", 0, 0.0
        self.optimizers: list[torch.optim.Optimizer] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (parameter in bfloat16, its float32 original)
        if (out / "checkpoint.pt").exists():
            state = torch.load(out / "checkpoint.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
            if self.stage in plan_of(self.judge).stages and state["optimizers"]:
                self._start()
                for (_, original), one in zip(self.pairs, state["originals"], strict=True):
                    original.copy_(one)
                for optimizer, one in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(one)

    @property
    def _tower(self) -> list[nn.Module]:
        core = self.model.model
        return [core.visual] if self.judge.mrope else [core.vision_tower, core.multi_modal_projector]

    def _start(self) -> None:
        self.model.requires_grad_(self.stage != "see")
        for part in self._tower:
            part.requires_grad_(self.stage == "see")
        wanted = [*self.model.parameters(), *(self.heads.parameters() if self.stage == "see" else ())]
        self.pairs = [(p, p.detach().float().clone()) for p in wanted if p.requires_grad]
        embedding = self.model.get_input_embeddings().weight
        matrices = [m for p, m in self.pairs if p.ndim == 2 and p is not embedding]
        others = [m for p, m in self.pairs if p.ndim != 2 or p is embedding]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "stage": self.stage,
            "step": self.step, "seconds": self.seconds,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "originals": [m for _, m in self.pairs],
        }  # fmt: skip
        torch.save(state, self.out / "checkpoint.tmp")
        os.replace(self.out / "checkpoint.tmp", self.out / "checkpoint.pt")

    def _loss(self, lesson: Lesson) -> tuple[Tensor, dict[str, float]]:
        with torch.set_grad_enabled(self.stage == "see"):
            features = features_of(self.judge, self.model, lesson)
        if self.stage == "see":
            return self.heads(features.float(), lesson.dense)
        self.packed.begin(lesson, self.judge.tokens)
        logits, target, weights = answers(self.judge, self.model, lesson, features)
        loss = (nn.functional.cross_entropy(logits, target, reduction="none") * weights).sum() / weights.sum()
        pointing, seen = self.packed.loss()
        right = (logits.argmax(-1) == target).float().mean().item()
        return loss + 0.2 * pointing, {"answers": loss.item(), "tokens": right, **seen}

    @torch.no_grad()
    def _standardise(self) -> None:
        """Give the tower's output zero mean and a spread that what layers add to it does not drown."""
        lesson = self.teacher(stage_prompts(self.judge, "compare", -1))
        features = features_of(self.judge, self.model, lesson)
        last = [m for m in self._tower[-1].modules() if isinstance(m, nn.Linear)][-1]
        scale = features.float().std() / 6.4
        last.weight.div_(scale)
        last.bias.sub_(features.mean(0)).div_(scale)

    def run(self, every: int = 25) -> None:
        """Train to the end; log and checkpoint every `every` steps."""
        stages = plan_of(self.judge).stages
        names = [*stages, "done"]
        totals: dict[str, float] = {}
        began, count = time.time(), 0
        while self.stage != "done":
            plan = stages[self.stage]
            if not self.optimizers:
                self._start()
            prompts = stage_prompts(self.judge, self.stage, self.step)
            lesson = self.teacher(prompts) if plan.counts else self._pictures(prompts)
            loss, seen = self._loss(lesson)
            loss.backward()
            for parameter, original in self.pairs:
                original.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            nn.utils.clip_grad_norm_([m for _, m in self.pairs], 1.0)
            now = plan.rate(self.step)
            for optimizer, factor in zip(self.optimizers, (MUON, 1.0), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = now * factor
                optimizer.step()
            for parameter, original in self.pairs:
                parameter.data.copy_(original)
            for key, value in {"loss": loss.item(), **seen}.items():
                totals[key] = totals.get(key, 0.0) + value
            self.step, count = self.step + 1, count + 1
            if self.step >= plan.steps:
                if self.stage == "see":
                    self._standardise()
                self.stage, self.step, self.optimizers = names[names.index(self.stage) + 1], 0, []
            if self.step % every == 0:
                took = time.time() - began
                self.seconds += took
                row = {"stage": self.stage, "step": self.step, "seconds_a_step": round(took / count, 3)}
                row |= {k: round(v / count, 3) for k, v in totals.items()}
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                print(row, flush=True)
                self._save()
                totals, began, count = {}, time.time(), 0

    def _pictures(self, prompts: list[Prompt]) -> Lesson:
        pixels, grid = self.teacher.pixels(prompts)
        dense = labels_of([s.world for p in prompts for s in p.scenes], self.judge.side)
        return Lesson(pixels, grid, dense, torch.empty(0), torch.empty(0), 0, [], [])


def train(
    judge: Annotated[str, typer.Option(help="Which judge.")],
    out: Annotated[Path, typer.Option(help="Folder of checkpoint, log and tokenizer.")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train a judge, or go on where a run in OUT stopped."""
    torch.set_num_threads(threads)
    Trainer(JUDGES[judge], out).run()


if __name__ == "__main__":
    typer.run(train)
