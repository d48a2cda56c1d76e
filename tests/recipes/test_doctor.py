"""The doctor finds what is there, what is absent and what is broken, and only the required decides."""

from __future__ import annotations

import importlib
import io
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import bridges
import mixers
from recipes import doctor
from recipes.doctor import Finding, examine, healthy, section_table


def report() -> dict[str, list[Finding]]:
    return dict(examine())


def test_this_machine_is_healthy_and_the_report_is_complete() -> None:
    found = report()
    everything = [finding for section in found.values() for finding in section]
    assert healthy(everything)
    assert {"torch", "transformers"} <= {finding.part for finding in found["required"]}
    assert {finding.part for finding in found["optional"]} == set(doctor.OPTIONAL)
    assert {f.part: f.found for f in found["backends"]} == {
        name: report.runs for name, report in mixers.backends().items()
    }
    for finding, said in zip(found["backends"], mixers.backends().values()):
        assert all(f"not {name}: {why}" in finding.remark for name, why in said.reasons.items())


def test_an_op_that_nothing_can_run_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINMU_BACKEND", "reference")
    assert healthy(report()["backends"])
    monkeypatch.setenv("LINMU_BACKEND", "no-such-backend")
    found = report()["backends"]
    assert {f.state for f in found} == {"broken"}
    assert all("there is no such backend" in f.remark for f in found)
    assert not healthy(found)


def test_a_package_outside_the_extras_is_installed_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.OPTIONAL, "their-kernels", ("no_such_module", "kernels", None))
    found = next(f for f in report()["optional"] if f.part == "their-kernels")
    assert found.remark == "kernels; pip install their-kernels"


def test_an_absent_optional_package_is_said_with_its_remedy_and_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(doctor.OPTIONAL, "no-such-thing", ("no_such_module", "wonders", "wonder"))
    found = next(f for f in report()["optional"] if f.part == "no-such-thing")
    assert (found.state, found.required) == ("absent", False)
    assert 'pip install "linmu[wonder]"' in found.remark
    assert healthy([found])
    console = Console(file=io.StringIO(), width=120)
    console.print(section_table("optional", [found]))
    assert "linmu[wonder]" in console.file.getvalue()


def test_a_package_that_does_not_import_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def import_module(name: str, *rest: Any) -> ModuleType:
        if name == "peft":
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)
    found = next(f for f in report()["required"] if f.part == "peft")
    assert found.state == "broken"
    assert "torchvision::nms" in found.found
    assert not healthy([found])


def test_a_conversion_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise bridges.BridgeError("no surgery today")

    monkeypatch.setattr(bridges, "replace_attention", fail)
    found = next(f for f in report()["linmu"] if f.part == "round trip")
    assert (found.state, found.required) == ("broken", True)
    assert "no surgery today" in found.found
