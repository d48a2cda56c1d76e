"""Compile what the Triton backends would launch, for chips that are not there.

    python -m tests.mixers.ops.compile_kernels 80 90 [op ...] [--sample 3]

runs every case of the ops (or so many, evenly spaced) with launching replaced by compiling, and prints a JSON
line a kernel: its name, the chip, its shared memory in bytes, whether it uses the matrix units of Hopper, and what
it spills. It runs in a process of its own, since a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mixers.ops import triton_support

MODULES = ("feature_map", "finish", "gate", "join_sinks", "short_conv", "ssd", "ssd_step", "window_attention")
"""Each ``tests.mixers.ops.kernels_<name>`` has ``cases()``: calls to compile, by name, on CPU tensors."""

KINDS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Compiler:
    """Stands in for a launch: compiles the kernel for a chip, once for each set of arguments."""

    def __init__(self, capability: int, room: int) -> None:
        self.capability, self.room = capability, room
        self.found: dict[str, dict[str, Any]] = {}

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.errors import OutOfResources

        names = [p.name for p in kernel.params]
        given = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
        for p in kernel.params:
            if p.name not in given and p.has_default:
                given[p.name] = p.default
        options = {k: v for k, v in kwargs.items() if k not in names}
        signature, constants, attributes = {}, {}, {}
        for place, p in enumerate(kernel.params):
            value = given[p.name]
            signature[p.name], constant = _kind(p, value)
            if constant:
                constants[(place,)] = value
            elif torch.is_tensor(value) or (isinstance(value, int) and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        key = f"{kernel.__name__} {sorted(map(str, signature.items()))} {sorted(map(str, constants.items()))} {options}"
        if key in self.found:
            return
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        if compiled.metadata.shared > self.room:  # as the launch would
            raise OutOfResources(compiled.metadata.shared, self.room, "shared memory")
        self.found[key] = {
            "kernel": kernel.__name__,
            "sm": self.capability,
            "shared": compiled.metadata.shared,
            "wgmma": "wgmma" in compiled.asm["ptx"],
            "warps": compiled.metadata.num_warps,
            "spills": _spills(compiled),
        }


def _kind(parameter: Any, value: Any) -> tuple[str, bool]:
    if parameter.is_constexpr or value is None:
        return "constexpr", True
    if torch.is_tensor(value):
        return KINDS[value.dtype], False
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", True
    return "i32" if -(2**31) <= value < 2**31 else "i64", False


def _spills(compiled: Any) -> int | None:
    """Bytes of local memory a thread, as the assembler reports them."""
    import pathlib
    import re
    import subprocess
    import tempfile

    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", report)
    return int(found[1]) + int(found[2]) if found else None


def cases(names: Sequence[str], sample: int | None = None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """List the cases of the named ops, of each at most ``sample``, evenly spaced."""
    for name in names or MODULES:
        found = list(importlib.import_module(f"tests.mixers.ops.kernels_{name}").cases())
        count = min(sample or len(found), len(found))
        yield from (found[(2 * i + 1) * len(found) // (2 * count)] for i in range(count))


def main() -> None:
    from triton.runtime.jit import JITFunction

    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=["90"])
    parser.add_argument("--sample", type=int)
    asked = parser.parse_args()
    names = [name for name in asked.what if not name.isdigit()]
    triton_support.off_device = lambda *tensors: None  # type: ignore[assignment]
    triton_support.unavailable = lambda: None  # type: ignore[assignment]
    for capability in (int(chip) for chip in asked.what if chip.isdigit()):
        limit = triton_support.SHARED_MEMORY[divmod(capability, 10)] * 1024
        triton_support.shared_memory = lambda device, limit=limit: limit  # type: ignore[assignment]
        compiler = Compiler(capability, limit)
        JITFunction.run = lambda self, *a, _c=compiler, **k: _c.launch(self, *a, **k)  # type: ignore[method-assign]
        for name, call in cases(names, asked.sample):
            before = set(compiler.found)
            call()
            for key in compiler.found.keys() - before:
                print(json.dumps({"case": name, "limit": limit, **compiler.found[key]}), flush=True)


if __name__ == "__main__":
    main()
