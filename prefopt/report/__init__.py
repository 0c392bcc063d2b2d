"""`report.html`: one run, told on one self-contained page.

record.py   run folder -> RunRecord, leniently
charts.py   RunRecord -> inline SVG
health.py   RunRecord -> findings in plain words
view.py     RunRecord -> the words and numbers of the page
*.j2        the page
"""

from __future__ import annotations

from pathlib import Path

from prefopt.durable import write_bytes
from prefopt.errors import InputError
from prefopt.report.record import FILES, read_run


def write_report(run_dir: str | Path) -> Path:
    """Writes `run_dir/report.html` from whatever the run has left there; returns its path.

    A run that crashed or still goes on gets a report too: what is missing is shown as not
    recorded, damaged lines are skipped and counted. The same files give the same bytes. Raises
    InputError only where there is no run folder at all.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder; give the run folder (its --out)")
    if not any((run_dir / name).exists() for name in FILES):
        raise InputError(f"{run_dir} holds none of {', '.join(FILES)}; give a run folder (--out)")
    from prefopt.report.view import page

    html = page(read_run(run_dir)).replace("\0", "\ufffd")
    path = run_dir / "report.html"
    write_bytes(path, html.encode("utf-8", "replace"))  # sampled text may hold half a character
    return path
