"""The source that makes a file: its commit, and a digest that tells one edit from the next."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "", "common", "methods", "engine"


def git_commit():
    """The commit of this source tree, `+dirty` if files differ from it; for provenance only."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"


@cache
def source_digest():
    """A sha256 in hex of all sources that decide a result: the top level's and its folders'."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).glob("*")):  # it may be gone in a fork
            if path.suffix in (".py", ".c") and not path.name.startswith("test_"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()
