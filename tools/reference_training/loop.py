"""The training loop: one stage after the other, with checkpoints, resume and a progress bar."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from reference_training.batches import Batch, Batcher
from reference_training.dense import DenseHeads
from reference_training.feed import Lesson, lesson, lessons
from reference_training.muon import Muon
from reference_training.pointing import Pointing
from reference_training.probe import Probe
from reference_training.stages import STAGES, Stage

#: Muon's learning rate over AdamW's: learning went faster so in the one run that
#: was resumed with it. The language model's factor is a guess (2, 3 and 5 were run, not compared alone).
TOWER_FACTOR, LANGUAGE_FACTOR = 4.0, 3.0
#: Steps over which a stage's learning rate rises.
WARM_UP = 30
#: Weight of the dense loss beside the answers.
DENSE_WEIGHT = 1.0
#: Standard deviation of the tower's output after the first stage.
FEATURE_STD = 0.1


def answer_loss(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, features: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy over the answers of a batch, and the share of their tokens that are right.

    `features` are the merged vision tokens `[n, width]` of the batch's images.
    """
    core = model.model
    embeds = core.get_input_embeddings()(batch.input_ids)
    images = (batch.input_ids == model.config.image_token_id).unsqueeze(-1)
    embeds = embeds.masked_scatter(images, features.to(embeds.dtype))
    hidden = core.language_model(
        inputs_embeds=embeds, position_ids=batch.position_ids, attention_mask=None, use_cache=False
    ).last_hidden_state
    answers = batch.labels >= 0
    logits = model.lm_head(hidden[answers]).float()
    target = batch.labels[answers]
    weights = batch.weights[answers]
    loss = (nn.functional.cross_entropy(logits, target, reduction="none") * weights).sum() / weights.sum()
    return loss, {"tokens": (logits.argmax(-1) == target).float().mean().item()}


class Trainer:
    """Trains a model through the stages; everything it needs to go on lies in one checkpoint file."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        folder: Path,
        workers: int = 0,
    ) -> None:
        """Write checkpoints and the log into `folder`; train on the device where the model is.

        `workers` processes draw the images ahead; 0 draws them in between the steps.
        """
        self.model, self.folder, self.workers = model, folder, workers
        self.device = model.device
        self.heads = DenseHeads(model.model.visual.config.out_hidden_size).to(self.device)
        self.batcher = Batcher(tokenizer)
        self.pointing = Pointing(model.model.language_model)
        self.probe = Probe(model.model.language_model).to(self.device)
        self.stage_index, self.step = 0, 0
        self.optimizers: list[torch.optim.Optimizer] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        """Path of the checkpoint file."""
        return self.folder / "checkpoint.pt"

    def _start(self, stage: Stage) -> None:
        self.model.model.visual.requires_grad_(stage.vision > 0)
        groups = []
        if stage.vision > 0:
            groups.append(([*self.heads.parameters()], stage.vision, TOWER_FACTOR))
            groups.append(([*self.model.model.visual.parameters()], stage.vision, TOWER_FACTOR))
        if stage.counts:
            groups.append(([*self.model.model.language_model.parameters()], 1.0, LANGUAGE_FACTOR))
            groups.append(([*self.probe.parameters()], 1.0, 1.0))
        matrices, others = [], []
        embedding = self.model.get_input_embeddings().weight
        for parameters, share, factor in groups:
            flat = [p for p in parameters if p.ndim == 2 and p is not embedding and p.shape[0] < 1500]
            rest = [p for p in parameters if not any(p is q for q in flat)]
            matrices.append({"params": flat, "share": factor * share})
            others.append({"params": rest, "share": share})
        self.optimizers = [
            Muon(matrices, weight_decay=0.02),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "probe": self.probe.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "stage": self.stage_index,
            "step": self.step,
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def resume(self) -> bool:
        """Go on from the checkpoint; False when there is none."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.probe.load_state_dict(state["probe"])
        self.stage_index, self.step = state["stage"], state["step"]
        if state["optimizers"]:  # none at the end of a stage
            self._start(STAGES[self.stage_index])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        return True

    def _loss(self, stage: Stage, lesson: Lesson) -> tuple[Tensor, dict[str, float]]:
        features = self._see(lesson.pixel_values, lesson.grid_thw)
        if lesson.batch is None:
            return self.heads(features, lesson.labels)
        self.pointing.begin(lesson.batch.targets)
        loss, accuracy = answer_loss(self.model, lesson.batch, features)
        pointing, attention = self.pointing.loss()
        known, knows = self.probe(lesson.batch.ends)
        accuracy |= attention | knows | {"answers": loss.item()}
        loss = loss + stage.pointing * (pointing + known)
        if stage.vision > 0:
            dense, seen = self.heads(features, lesson.labels)
            loss, accuracy = loss + DENSE_WEIGHT * dense, accuracy | seen
        return loss, accuracy

    def _see(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.model.model.visual.patch_embed.proj.weight.requires_grad):
            return self.model.model.visual(pixel_values, grid_thw=grid_thw).pooler_output

    @torch.no_grad()
    def standardise(self) -> None:
        """Give the tower's output zero mean and the spread of text embeddings; the heads see no difference.

        Trained alone, the tower's tokens came out a hundred times longer than text embeddings and mostly
        constant. A precaution: the plateau on whole pages was there with and without it.
        """
        first = lesson(STAGES[0], -1, self.batcher).to(self.device)
        features = self._see(first.pixel_values, first.grid_thw)
        mean, scale = features.mean(0), features.std() / FEATURE_STD
        last = [m for m in self.model.model.visual.merger.modules() if isinstance(m, nn.Linear)][-1]
        last.weight.div_(scale)
        last.bias.sub_(mean).div_(scale)
        for head in self.heads.children():
            assert isinstance(head, nn.Linear)
            head.bias.add_(head.weight @ mean)
            head.weight.mul_(scale)

    def _update(self, stage: Stage, loss: Tensor) -> None:
        done = self.step / stage.steps
        lr = min(1.0, (self.step + 1) / WARM_UP) * (stage.lr + (stage.end - stage.lr) * done)
        loss.backward()
        nn.utils.clip_grad_norm_(
            [p for o in self.optimizers for g in o.param_groups for p in g["params"]], 1.0
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def run(self, until: str = STAGES[-1].name, every: int = 50) -> None:
        """Train up to and including stage ``until``; log and checkpoint every ``every`` steps."""
        last = [s.name for s in STAGES].index(until)
        with Progress() as progress, (self.folder / "log.jsonl").open("a") as log:
            while self.stage_index <= last:
                stage = STAGES[self.stage_index]
                if not self.optimizers:
                    self._start(stage)
                bar = progress.add_task(stage.name, total=stage.steps, completed=self.step)
                totals: dict[str, float] = {}
                began, count = time.time(), 0
                for one in lessons(stage, self.step, self.batcher, self.workers):
                    with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                        loss, accuracy = self._loss(stage, one.to(self.device))
                    self._update(stage, loss)
                    for key, value in {"loss": loss.item(), **accuracy}.items():
                        totals[key] = totals.get(key, 0.0) + (0.0 if math.isnan(value) else value)
                    self.step, count = self.step + 1, count + 1
                    progress.advance(bar)
                    if self.step % every == 0 or self.step == stage.steps:
                        row: dict[str, Any] = {"stage": stage.name, "step": self.step}
                        row |= {k: round(v / count, 4) for k, v in totals.items()}
                        row["seconds_a_step"] = round((time.time() - began) / count, 3)
                        log.write(json.dumps(row) + "\n")
                        log.flush()
                        progress.console.print(row)
                        totals, began, count = {}, time.time(), 0
                        self.save()
                if stage.name == "see":
                    self.standardise()
                self.stage_index, self.step, self.optimizers = self.stage_index + 1, 0, []
                self.save()
