"""The model card that is saved with a converted model."""

from __future__ import annotations

from typing import Any

import yaml

TEXT = """\
# {title}

{what} of this model's {count} decoder layers have a token mixer of linmu
([LinMU](https://arxiv.org/abs/2601.01322)) where self-attention was. {teacher}

| layers | in place of attention |
|---|---|
{rows}

```python
import bridges  # of linmu: without it the folder does not load

model = bridges.load_pretrained("{name}")
```

Unless it was distilled after the conversion, it does not answer as its teacher does.
"""


def model_card(name: str, architecture: str, record: dict[str, Any]) -> str:
    """Write the card of a converted model: what was replaced, in which layers, and from which teacher.

    Args:
        name: What the model is called.
        architecture: Its class.
        record: Of its conversion.
    """
    teacher, layers = record["teacher"], record["layers"]
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["linmu"]}
    if teacher and teacher.count("/") == 1:
        header["base_model"] = teacher
    by_mixer: dict[str, list[str]] = {}
    for index, layer in layers.items():
        by_mixer.setdefault(layer["mixer"], []).append(index)
    rows = [f"| {', '.join(indices)} | `{mixer}` |" for mixer, indices in by_mixer.items()]
    kept = [str(i) for i in range(record["layer_count"]) if str(i) not in layers]
    rows += [f"| {', '.join(kept)} | nothing: the teacher's attention |"] if kept else []
    text = TEXT.format(
        title=f"{name}: {architecture} with token mixers",
        what="All" if not kept else len(layers),
        count=record["layer_count"],
        teacher=f"Its teacher is `{teacher}`." if teacher else "",
        rows="\n".join(rows),
        name=name,
    )
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{text}"
