"""The examples of docs/evaluation.md."""

import re
import tomllib
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "docs" / "evaluation.md"


def examples() -> list[dict[str, Any]]:
    return [
        tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.S)
    ]
