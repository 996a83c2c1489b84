"""What a test sees of the progress of some work."""

import pytest

from nfm.stages.progress import Progress


def record_progress(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int | None]]:
    """A list to which each progress adds its name, the units that were done and its total when it ends."""
    ended: list[tuple[str, int, int | None]] = []
    original = Progress.__exit__

    def record(progress: Progress, *error: object) -> None:
        ended.append((progress.name, progress.done, progress.total))
        original(progress, *error)  # type: ignore[arg-type]  # the three arguments of any __exit__

    monkeypatch.setattr(Progress, "__exit__", record)
    return ended
