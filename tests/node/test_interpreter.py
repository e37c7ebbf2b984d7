"""An interpreter that does not tell what it needs."""

from pathlib import Path

import pytest

from substrate_node.procvm.interpreter import Interpreters
from substrate_node.vmm import VmmError


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -TERM $$", "it ended with killed by SIGTERM"),
        ("echo one >&2; echo two >&2; exit 3", "it ended with exit status 3, after saying: two"),
        ("echo nonsense", "JSON"),
    ],
)
async def test_why_an_interpreter_does_not_run_is_said_without_what_it_was_asked(
    script: str, words: str, tmp_path: Path
):
    """The daemon may be asked to stop while it looks around; whoever reads its last words did not ask our question."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{script}\n")
    interpreter.chmod(0o755)
    with pytest.raises(VmmError, match="does not run") as failure:
        await Interpreters().get(str(interpreter))
    assert words in str(failure.value)
    assert "sys.prefix" not in str(failure.value)
