"""What a complete run leaves for people and programs beside its shards."""

from hscr.parquet import write_text
from hscr.records import now
from hscr.runs.folder import PAGE, SKIPPED, SUMMARY, RunFolder
from hscr.runs.page import render
from hscr.runs.summary import Summary, summarise


def finish(run: RunFolder) -> Summary:
    """Write `skipped.jsonl`, `summary.json`, `summary.html`, and the counts into `run.json`."""
    summary = summarise(run)
    write_text(run.path / SKIPPED, "".join(f"{skip.model_dump_json()}\n" for skip in run.skips()))
    write_text(run.path / SUMMARY, summary.model_dump_json(indent=1) + "\n")
    write_text(run.path / PAGE, render(run, summary))
    counts = summary.model_dump(include={"rows", "records", "responses", "skipped", "records_digest"})
    run.save({"counts": counts, "finished_at": run.about["finished_at"] or now().isoformat()})
    return summary
