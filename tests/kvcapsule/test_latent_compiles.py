"""The GPU kernels compile to machine code for NVIDIA GPUs; that needs Triton, but no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed; `make test-triton` installs it and runs this")

SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from capsight.kvcapsule.attention.kernels import over_capsules, over_exact

number, means = sys.argv[1], sys.argv[2] == "means"
flat = {"scaling": "fp32", "first": "*i64", "out": "*fp32", "lse": "*fp32", "mask": "*i8"}
optional = "key_weights key_rest key_mean value_weights value_rest value_mean".split()
four = ("i32",) * 4
tuples = {
    "query_strides": four, "key_strides": four, "value_strides": four, "mask_strides": four,
    "key_weight_strides": ("i32",) * 3, "key_rest_strides": ("i32",) * 2,
    "value_weight_strides": ("i32",) * 3, "value_rest_strides": ("i32",) * 2,
}
tensors = "query key_slots value_slots keys values".split()
options = {"SLOT_TOKENS": True, "COPIED": means, "ADDITIVE": False, "BC": 16, "BR": 32, "BT": 64, "BD": 128,
           "BX": 64, "STEPS": 4, "PRECISION": "tf32x3" if number == "fp32" else "tf32"}
for kernel in (over_capsules, over_exact):
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name in options:
            signature[name], constants[name] = "constexpr", options[name]
        elif name in optional and not (means or name == "value_weights" or name == "key_weights"):
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = (
                flat.get(name) or tuples.get(name) or ("*" + number if name in tensors else None)
                or ("*fp32" if name in optional else "i32")
            )
    for capability in (80, 90):
        stages = 1 if number == "fp32" else 2
        made = triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_stages": stages},
        )
        assert len(made.asm["cubin"]) > 1000
        print(kernel.__name__, capability, number, made.metadata.shared, "bytes of shared memory")
        assert made.metadata.shared <= 99 * 1024  # the smallest of GPUs since compute capability 8.0
"""


@pytest.mark.parametrize("means", ["means", "no means"])
@pytest.mark.parametrize("number", ["fp32", "bf16"])
def test_kernels_compile_to_machine_code(number, means, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, number, means], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("bytes of shared memory") == 4
