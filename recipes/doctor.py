"""What works on this machine: packages, device, backends, and a conversion from end to end in small."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from rich import box
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "absent", "broken"]

REQUIRED = (
    "torch",
    "einops",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
)
OPTIONAL = {
    "triton": ("triton", "the compiler of linmu's GPU kernels", "triton"),
    "mamba-ssm": ("mamba_ssm", "Mamba2's own SSD kernels, to compare with", "mamba"),
    "causal-conv1d": ("causal_conv1d", "a short-convolution kernel, to compare with", "mamba"),
    "flash-linear-attention": ("fla", "scan kernels, to compare with", None),
    "xformers": ("xformers.ops", "a backend of the windows, by name", "xformers"),
    "torchvision": ("torchvision", "the video processors of transformers", "vision"),
    "timm": ("timm", "vision towers that come from timm", "vision"),
    "matplotlib": ("matplotlib", "pictures (--plot, linmu demo)", "demo"),
    "pillow": ("PIL", "reading images (linmu demo)", "demo"),
    "easy-vqa": ("easy_vqa", "the dataset of linmu demo", "demo"),
    "datasets": ("datasets", "datasets from files and hubs", "eval"),
    "gguf": ("gguf", "teachers stored as GGUF (SmolLM2)", "eval"),
}
"""Distribution → (module, what it gives, extra of linmu that installs it; None: it is installed by itself)."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        part: What was looked at.
        state: Whether it works.
        found: Version, name or fault.
        remark: What it is for, or what to do.
        required: Whether linmu cannot do without.
    """

    part: str
    state: State
    found: str
    remark: str = ""
    required: bool = False


def examine() -> Iterator[tuple[str, list[Finding]]]:
    """Yield (heading, findings) section by section; nothing is installed, changed or downloaded."""
    yield "required", [_python(), *map(_required, REQUIRED)]
    yield "device", _device()
    yield "backends", _backends()
    yield "linmu", [_try("round trip", _round_trip)]
    yield "optional", [_optional(name, *about) for name, about in OPTIONAL.items()]


def healthy(findings: list[Finding]) -> bool:
    """Say whether nothing that is required is absent or broken."""
    return all(finding.state == "ok" for finding in findings if finding.required)


def section_table(heading: str, findings: list[Finding]) -> Table:
    """Lay a section out as a rich table."""
    style = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[bold red]broken[/]"}
    drawn = Table(
        title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False
    )
    drawn.add_column(min_width=14)
    drawn.add_column(min_width=6)
    drawn.add_column(overflow="fold")
    drawn.add_column(overflow="fold", style="dim")
    for finding in findings:
        drawn.add_row(finding.part, style[finding.state], escape(finding.found), escape(finding.remark))
    return drawn


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(
        "python", "ok" if ok else "broken", platform.python_version(), "" if ok else "3.11 or newer", True
    )


def _required(name: str) -> Finding:
    module = {"pyyaml": "yaml"}.get(name, name)
    try:
        importlib.import_module(module)
        return Finding(name, "ok", version(name), required=True)
    except Exception as error:
        return Finding(name, _absent_or_broken(module), _line(error), f"pip install {name}", True)


def _optional(name: str, module: str, gives: str, extra: str | None) -> Finding:
    wanted = name if extra is None else f'"linmu[{extra}]"'
    remedy = f"{gives}; pip install {wanted}"
    try:
        importlib.import_module(module)
        return Finding(name, "ok", version(name), gives)
    except PackageNotFoundError:
        return Finding(name, "ok", "version unknown", gives)
    except Exception as error:
        state = _absent_or_broken(module)
        return Finding(name, state, "" if state == "absent" else _line(error), remedy)


def _absent_or_broken(module: str) -> State:
    return "broken" if importlib.util.find_spec(module.split(".")[0]) else "absent"


def _device() -> list[Finding]:
    try:
        import torch

        from recipes.results import describe_device
    except Exception as error:
        return [Finding("torch", "broken", _line(error), required=True)]
    free = shutil.disk_usage(os.getcwd()).free
    findings = [
        Finding("computes on", "ok", describe_device()),
        Finding("free disk here", "ok", f"{free / 2**30:.0f} GiB"),
    ]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        findings.append(
            Finding(f"cuda:{i}", "ok", f"{about.name}, {memory}, sm_{about.major}{about.minor}, {bf16}")
        )
    if torch.version.cuda is None:
        findings.append(Finding("cuda", "absent", "", "this torch is a build for CPUs"))
    elif not torch.cuda.is_available():
        findings.append(
            Finding("cuda", "absent", "", f"torch is built for CUDA {torch.version.cuda}, no GPU answers")
        )
    return findings


def _try(part: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(part, "ok", check(), required=True)
    except Exception as error:
        return Finding(part, "broken", _line(error), required=True)


def _backends() -> list[Finding]:
    """Say for each op what would run, and why the others would not; nothing is run."""
    try:
        import mixers

        reports = mixers.backends()
    except Exception as error:
        return [Finding("backends", "broken", _line(error), required=True)]
    return [
        Finding(
            name,
            "ok" if report.runs else "broken",
            report.runs or "nothing can run",
            "\n".join(f"not {other}: {why}" for other, why in report.reasons.items()),
            required=True,
        )
        for name, report in reports.items()
    ]


def _round_trip() -> str:
    """Convert a tiny random Qwen2.5-VL, and generate from an image with it."""
    import torch

    import bridges
    from recipes.tiny_vlm.build import build_model, build_tokenizer

    with torch.random.fork_rng(devices=[]):
        tokenizer = build_tokenizer()
        model = build_model(tokenizer).eval()
        bridges.replace_attention(model, "mmate")
        config = model.config
        vision = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
        ids = torch.tensor([vision])
        patch = config.vision_config
        area = 3 * patch.temporal_patch_size * patch.patch_size**2
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == config.image_token_id).long(),
            pixel_values=torch.zeros(4 * patch.spatial_merge_size**2, area),
            image_grid_thw=torch.tensor([[1, 2 * patch.spatial_merge_size, 2 * patch.spatial_merge_size]]),
            min_new_tokens=2,
            max_new_tokens=2,
        )
    assert output.shape == (1, ids.shape[1] + 2), f"generate() gave {list(output.shape)}"
    return "a tiny Qwen2.5-VL was converted to mmate and generated from an image"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
