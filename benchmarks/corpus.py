"""Text that every machine with the project has: the Python sources of torch and transformers."""

import contextlib
import io
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def write_corpus(path: Path, size: int) -> int:
    """Write about ``size`` bytes of text as JSON lines, without duplicates; returns the bytes of the text in UTF-8."""
    packages = Path(sysconfig.get_paths()["purelib"])
    texts: dict[str, None] = {}
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for source in sorted([*packages.glob("torch/**/*.py"), *packages.glob("transformers/**/*.py")]):
            text = source.read_text(encoding="utf-8", errors="ignore")
            if text and text not in texts:
                texts[text] = None
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
            if written >= size:
                break
    return written


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the progress and the summaries of what runs inside."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
