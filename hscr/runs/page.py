"""`summary.html`: one self-contained page about a run, for a person."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hscr.runs.canonical import Stored, read_part
from hscr.runs.folder import RunFolder
from hscr.runs.summary import EXTERNAL, OWN, Histogram, Summary

_EXAMPLES, _THUMBNAIL = 8, 224
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1f24;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.25rem .75rem;text-align:left;border-bottom:1px solid #d7dce1;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}figure{margin:1rem 0}figure img{max-width:100%}
.example{display:flex;gap:1rem;margin:1.25rem 0}.example img{width:224px;height:auto;align-self:flex-start}
.note{color:#57606a}code{font-size:.9em}
"""


def render(run: RunFolder, summary: Summary) -> str:
    """HTML without scripts and without anything fetched from elsewhere; all text of the data is escaped."""
    identity = run.about["identity"]
    skips = [(kind, f"{count}") for kind, count in summary.skipped_by.items()]
    reasons = [(reason, f"{count}") for reason, count in summary.no_record_by.items()]
    sections = [
        _counts(summary),
        _section("Rows without a record, by kind", _table(skips)),
        _section("Why the generator made none", _table(reasons)),
        _charts(summary),
        _section("Examples", "".join(map(_example, _first(run)))),
        _section("Made with", _table([(key, str(value)) for key, value in _flat(identity)])),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>HSCR preference records</title>'
        f"<style>{_STYLE}</style><h1>HSCR preference records</h1>"
        f'<p class="note">Begun {html.escape(run.about["started_at"])}. For research use only; not for '
        f"clinical care or any clinical decision.</p>{''.join(sections)}</html>\n"
    )


def _counts(summary: Summary) -> str:
    responses = max(1, summary.responses)
    return _table(
        [
            ("input rows", f"{summary.rows}"),
            ("preference records", f"{summary.records}"),
            ("rows without a record (skipped.jsonl names them)", f"{summary.skipped}"),
            ("dispreferred answers", f"{summary.responses}"),
            (f"… with sampling probability below {EXTERNAL}", f"{summary.below_external / responses:.1%}"),
            (f"… above {OWN}", f"{summary.above_own / responses:.1%}"),
            ("digest of the records", summary.records_digest[:16]),
        ]
    )


def _charts(summary: Summary) -> str:
    if not summary.records:
        return ""

    def similarity(axes: Axes) -> None:
        levels = [summary.similarity[level] for level in sorted(summary.similarity)]
        _stacked(axes, levels, [f"level {level}" for level in sorted(summary.similarity)])
        axes.legend(frameon=False)

    def probability(axes: Axes) -> None:
        _stacked(axes, [summary.probability], ["responses"])
        for threshold, style in ((EXTERNAL, ":"), (OWN, "--")):
            axes.axvline(threshold, color="#b3261e", linestyle=style)

    return _section(
        "How they are distributed",
        _chart("Similarity to the preferred answer", "similarity", similarity)
        + _chart(
            "Sampling probability: exp of the mean token log-probability. The lines are the paper's: "
            f"most answers of another model lie below {EXTERNAL}, most of the model's own above {OWN}.",
            "mean token probability",
            probability,
        )
        + _chart("Substituted tokens", "position in the answer", lambda axes: _bars(axes, summary.positions))
        + _chart("Levels of a record", "dispreferred answers", lambda axes: _bars(axes, summary.levels)),
    )


def _stacked(axes: Axes, histograms: Sequence[Histogram], labels: Sequence[str]) -> None:
    edges = histograms[0].edges
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    counts = [each.counts for each in histograms]
    axes.hist([centres] * len(histograms), edges, weights=counts, stacked=True, label=labels)


def _bars(axes: Axes, counts: Mapping[int, int]) -> None:
    axes.bar(list(counts), list(counts.values()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _chart(caption: str, label: str, draw: Callable[[Axes], None]) -> str:
    figure = Figure(figsize=(7, 2.6))
    axes = figure.add_axes((0.09, 0.2, 0.89, 0.76))
    draw(axes)
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    said = html.escape(caption)
    shown = f'<img alt="{said}" src="{_data("svg+xml", image)}">'
    return f"<figure>{shown}<figcaption>{said}</figcaption></figure>"


def _first(run: RunFolder) -> Iterable[Stored]:
    found = (stored for part in run.parts() for stored in read_part(part))
    return islice(found, _EXAMPLES)


def _example(stored: Stored) -> str:
    record, thumbnail = stored.record, io.BytesIO()
    with Image.open(io.BytesIO(stored.png)) as image:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        image.save(thumbnail, "PNG")
    said = [("preferred", record.chosen, "")] + [
        (
            f"level {level}",
            each.text,
            f"similarity {each.similarity:.2f}, probability {each.mean_probability:.2f}",
        )
        for level, each in enumerate(record.rejected, 1)
    ]
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in said)
    return (
        f'<div class="example"><img alt="" src="{_data("png", thumbnail)}"><div><strong>'
        f"{html.escape(record.question)}</strong> <code>{html.escape(record.source)}</code>"
        f"<table>{rows}</table></div></div>"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{body}" if body else ""


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{html.escape(a)}</th><td class="n">{html.escape(b)}</td></tr>' for a, b in rows
    )
    return f"<table>{cells}</table>" if rows else ""


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data(kind: str, content: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
