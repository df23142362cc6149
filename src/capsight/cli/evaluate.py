"""`capsight eval`: accuracy of methods beside the full cache, on the reference task or on user data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache, reduce
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.progress import Progress
from torch import Tensor

from capsight import __version__
from capsight.blindsight import HeadMap
from capsight.cli.evaluate_tables import print_pairs, print_report
from capsight.cli.fit import calibration_items
from capsight.cli.methods import METHOD_NAMES, make_methods
from capsight.cli.models import REFERENCE, load_capsule, load_model
from capsight.cli.options import (
    CompressionsOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    ProcessorOption,
    shares,
)
from capsight.cli.output import console, note, write_json
from capsight.cli.target import check_out, is_kept
from capsight.errors import OptionError
from capsight.evaluation import Item, Journal, evaluate, jsonl_items, paired, reference_items, summary
from capsight.evaluation.asking import process
from capsight.evaluation.metric import check_metric
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.cache_file import capsule_fingerprint
from capsight.kvcapsule.fingerprint import tensors_fingerprint
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE
from capsight.model_fingerprint import model_fingerprint
from capsight.reference.questions import TASKS

_CALIBRATION_PROMPTS = 96  # as `capsight fit` takes by default


def evaluate_command(
    model: ModelOption = REFERENCE,
    capsule: Annotated[str | None, typer.Option(help="'reference', a folder or a hub id.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METHOD_NAMES)}; 'full' is always there.")
    ] = None,
    retained: Annotated[
        list[float] | None, typer.Option(help="Retained fractions; repeat for several.")
    ] = None,
    compression_ratio: CompressionsOption = None,
    head_map: Annotated[
        str | None, typer.Option(help="Prefill with this head map: folder, hub id, or 'reference'.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="after (the judge) or within.")] = "after",
    block_size: Annotated[
        int, typer.Option(help="Vision tokens in a run of a baseline; what is left of an image stays exact.")
    ] = DEFAULT_BLOCK_SIZE,
    tasks: Annotated[str | None, typer.Option(help="Ask only these tasks, comma-separated.")] = None,
    images: Annotated[
        str, typer.Option(help="Image counts of the reference task, comma-separated.")
    ] = "1,4,8",
    samples: Annotated[
        int, typer.Option(help="Prompts per image count (six questions each), or lines.")
    ] = 100,
    data: Annotated[Path | None, typer.Option(help="JSONL of {images, question, answer} instead.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Pictures or JSONL to fit calibrated baselines to (feature-pca).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 24,
    metric: Annotated[
        str, typer.Option(help="How answers are scored: exact, normalised, anls or relaxed.")
    ] = "exact",
    json: Annotated[
        Path | None,
        typer.Option(
            help="Write the figures to this file, - is the standard output; a run that was cut off goes on."
        ),
    ] = None,
    processor: ProcessorOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    workers: Annotated[
        int, typer.Option(help="Processes of one thread each that share the prompts (CPU); 1: none.")
    ] = 1,
) -> None:
    """Exact match, agreement and KL against the full cache, and KV bytes."""
    check_out(json, others=[data, calibration])
    partial = None if json is None or not is_kept(json) else json.with_name(json.name + ".partial")
    check_out(partial)
    if max_new_tokens < 1:
        raise OptionError(f"max-new-tokens is {max_new_tokens}; it must be at least 1")
    check_metric(metric)
    chosen = HeadMap.from_pretrained(head_map) if head_map else None
    fractions = shares(retained, compression_ratio)
    vlm, vlm_processor = load_model(model, dtype, device, processor)
    items, total = _items(model, data, images, samples, tasks)
    prompts = cache(lambda: calibration_prompts(vlm_processor, model, calibration))
    loaded = cache(lambda: load_capsule(capsule, model))
    methods = make_methods(method or [], fractions, loaded, prompts, vlm, block_size)
    asked = {
        "model": model,
        "protocol": protocol,
        "block_size": block_size,
        "head_map": head_map,
        "tasks": tasks,
        "data": None if data is None else str(data),
        "data_sha256": None if data is None else sha256(data.read_bytes()).hexdigest(),
        "images": None if data is not None else images,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "metric": metric,
        "dtype": str(vlm.dtype).removeprefix("torch."),
    }
    journal = None
    if partial is not None:
        settings = asked | {
            "fingerprint": model_fingerprint(vlm),
            "capsule": capsule,
            "calibration": None if calibration is None else str(calibration),
            "methods": {name: method.module_nbytes for name, method in methods.items()},
            "pictures": None if data is None else _pictures(items),
            "processor": processor,
            "versions": [__version__, transformers.__version__],
            "learnt": {
                name: capsule_fingerprint(m) for name, m in methods.items() if isinstance(m, KVCapsule)
            },
            "calibrated_on": _hash(prompts()) if prompts.cache_info().currsize else None,
            "head_map_sha256": None if chosen is None else sha256(repr(asdict(chosen)).encode()).hexdigest(),
        }
        prompts.cache_clear()
        journal = Journal(partial, settings)
        if journal.done:
            note(f"going on after {len(journal.done)} prompts")
    out = console(json)
    with Progress(transient=True, console=out) as progress:
        bar = progress.add_task("prompts", total=total)
        results = evaluate(
            vlm,
            vlm_processor,
            items,
            methods,
            protocol,
            chosen,
            max_new_tokens,
            journal,
            lambda *_: progress.advance(bar),
            workers,
            metric,
        )
    report = summary(results)
    if not report["full"]["questions"] + report["full"]["unscored"]:
        raise OptionError("there is no question to ask; take more samples, or other tasks")
    pairs = paired(results, method[0]) if method else []
    try:
        write_json(json, asked | {"methods": report, "paired": pairs})
        if journal is not None:
            journal.remove()
    finally:
        print_report(out, report, f"{model}, protocol {protocol}", metric)
        print_pairs(out, pairs)


def _pictures(items: Iterable[Item]) -> str:
    """A hash of the pictures of a user's questions."""
    digest = sha256()
    for item in items:
        for image in item.images:
            digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def _hash(prompts: Iterable[Mapping[str, Any]]) -> str:
    """Of processor outputs, which methods were fitted to."""

    def and_of(before: str, prompt: Mapping[str, Any]) -> str:
        return tensors_fingerprint({k: v for k, v in prompt.items() if isinstance(v, Tensor)}, before)

    return reduce(and_of, prompts, "")


def _items(
    model: str, data: Path | None, images: str, samples: int, tasks: str | None
) -> tuple[Iterable[Item], int]:
    """The items, and how many there are at most."""
    if samples < 1:
        raise OptionError(f"samples is {samples}; it must be at least 1")
    if data is not None:
        rows = list(islice(jsonl_items(data), samples))
        return list(_only(tasks, sorted({ask.task for item in rows for ask in item.asks}), rows)), len(rows)
    if model != REFERENCE:
        raise OptionError("name the questions with --data: the built-in task is the reference VLM's")
    try:
        counts = [int(c) for c in images.split(",")]
    except ValueError as error:
        raise OptionError(f"images is {images!r}; give counts such as 1,4,8") from error
    if min(counts) < 1:
        raise OptionError(f"images is {images!r}; counts must be at least 1")
    drawn = (item for c in counts for item in reference_items("test", c, samples))
    return _only(tasks, TASKS, drawn), samples * len(counts)


def _only(tasks: str | None, known: Iterable[str], items: Iterable[Item]) -> Iterable[Item]:
    """The items with the questions of the tasks named, those without any left out."""
    if tasks is None:
        return items
    wanted = {task.strip() for task in tasks.split(",")}
    if unknown := sorted(wanted - set(known)):
        raise OptionError(f"there is no task {unknown[0]!r}; use {', '.join(known)}")
    return _with_tasks(wanted, items)


def _with_tasks(wanted: set[str], items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        asks = tuple(ask for ask in item.asks if ask.task in wanted)
        if asks:
            yield replace(item, asks=asks)


def calibration_prompts(
    processor: Any, model: str, data: Path | None, count: int = _CALIBRATION_PROMPTS
) -> list[Any]:
    """Processor outputs to fit methods to: the user's, or the calibration split of the reference task."""
    if data is None and model != REFERENCE:
        raise OptionError("name data to fit the method to with --calibration: pictures or a JSONL file")
    items = calibration_items(model, data, count)
    return [process(processor, item, [item.asks[0].question]) for item in items]
