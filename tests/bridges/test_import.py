"""What happens in a fresh interpreter, before and after ``import bridges``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.bridges import models

HEAVY = "peft datasets matplotlib mamba_ssm xformers timm torchvision deepspeed recipes"

CODE = """
import sys
from transformers import AutoModelForCausalLM

path, heavy = sys.argv[1], sys.argv[2].split()
try:
    AutoModelForCausalLM.from_pretrained(path)
except ValueError as error:
    assert "linmu" in str(error), error
else:
    raise AssertionError("a converted model was loaded without bridges")

before = {name for name in heavy if name in sys.modules}
import bridges
assert not {name for name in heavy if name in sys.modules} - before
assert "recipes" not in sys.modules

model = AutoModelForCausalLM.from_pretrained(path)
assert isinstance(bridges.attention_layers(model)[0], bridges.MixerAttention)
"""


def test_loading_needs_bridges_and_bridges_needs_little(tmp_path: Path) -> None:
    models.converted(models.llama(num_hidden_layers=1)).save_pretrained(tmp_path / "m")
    command = [sys.executable, "-c", CODE, str(tmp_path / "m"), HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
