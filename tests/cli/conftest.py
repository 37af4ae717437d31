"""Fixtures of the tests that run the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusal import Refused, check_refusal, tree


@pytest.fixture
def refused(call: Callable[..., Any], tmp_path: Path) -> Refused:
    """Run a command; assert exit code 2, one error line with all of ``says`` and advice, and not one file touched or left."""

    def check(*arguments: object, says: tuple[str, ...] | str) -> None:
        before = tree(tmp_path)
        result = call(*arguments)
        check_refusal(result.code, result.err, (says,) if isinstance(says, str) else says)
        assert tree(tmp_path) == before

    return check
