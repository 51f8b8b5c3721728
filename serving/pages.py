"""The pages that a person opens: the home page, and the documentation with a form to try it. No other host is asked.

The text of both lies in `serving/page.html`; here it is filled from what serves now.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template
from typing import Any

import orjson

from serving import openapi, tensors
from serving.engine import Engine
from serving.model import Model

TEMPLATE = Path(__file__).with_name("page.html")


def home(engine: Engine) -> str:
    """What serves, and where to go from here."""
    rows = []
    for name in sorted({*engine.known, *engine.models}):
        model, state, failed = engine.models.get(name), engine.states.get(name), engine.failures.get(name)
        where = ", ".join(f"{provider} ({count} nodes)" for provider, count in model.nodes.items()) if model else ""
        since = f", since {escape(state.since)}" if state else ""
        serves = f"version {model.version} on {where or 'cpu'}{since}" if model else "no champion yet"
        trouble = f"<br><small class=bad>version {failed.version}: {escape(failed.reason)}</small>" if failed else ""
        rows.append(f"<tr><td><a href='/docs#{escape(name)}'>{escape(name)}</a></td><td>{serves}{trouble}</td></tr>")
    table = f"<table><tr><th>workload</th><th>serves</th></tr>{''.join(rows)}</table>"
    nothing = "<p>No workload is registered yet. Train one with <code>noria train</code>.</p>"
    return _page("noria server", f"<h1>noria</h1>{table if rows else nothing}{_links()}")


def docs(engine: Engine) -> str:
    """Every workload with its columns, a request to copy, and a form that sends it."""
    parts = [_workload(model) for _, model in sorted(engine.models.items())]
    nothing = "<p>Nothing serves yet: no version has the alias <code>champion</code>.</p>"
    return _page("noria server: documentation", f"<h1>Documentation</h1>{''.join(parts) or nothing}{_links()}")


def _workload(model: Model) -> str:
    name, bundle = escape(model.workload), model.bundle
    if bundle is None:
        return _plain(model)
    schema, facts, example = bundle.schema, bundle.facts, bundle.proof.records[0]
    unit = f" ({escape(facts.unit)})" if facts.unit not in ("", schema.target) else ""
    rows = "".join(
        f"<tr><td><code>{escape(column.name)}</code></td><td>{column.kind}</td>"
        f"<td>{_limits(column.low, column.high)}</td><td>{'yes' if column.required else ''}</td>"
        f"<td>{escape(column.description)}</td></tr>"
        for column in schema.columns
    )
    bands = ", ".join(f"<b>{escape(band.action)}</b> above {band.above:g}" for band in bundle.bands.bands)
    action = f"<p>Action: {bands}, otherwise <b>{escape(bundle.bands.otherwise or '')}</b>.</p>" if bands else ""
    beside = f"<p>A record may also say when it happened, as <code>{escape(schema.event_time)}</code>.</p>"
    event_time = "" if schema.event_time in schema.names else beside
    forms = [
        _form("Predict", f"/predict/{name}", {"records": [example]}, opened=True),
        _form("Feedback: what really happened", f"/feedback/{name}", {"labels": [{"id": "0" * 32, "label": 1}]}),
        _form("Predict, Open Inference Protocol", f"/v2/models/{name}/infer", tensors.example(schema, example)),
    ]
    return (
        f"<section id='{name}'><h2>{name} <small>version {model.version}</small></h2>"
        f"<p>Predicts <b>{escape(schema.target)}</b>{unit}. {escape(facts.notes)}</p>{action}"
        f"<table><tr><th>column</th><th>type</th><th>range</th><th>required</th><th>meaning</th></tr>{rows}</table>"
        f"{event_time}{''.join(forms)}</section>"
    )


def _plain(model: Model) -> str:
    """A model of a repository: its tensors."""
    name = escape(model.workload)
    rows = "".join(
        f"<tr><td>{kind}</td><td><code>{escape(one.name)}</code></td><td>{one.datatype}</td><td>{list(one.shape)}</td></tr>"
        for kind, tensors in (("input", model.inputs), ("output", model.outputs))
        for one in tensors
    )
    return (
        f"<section id='{name}'><h2>{name} <small>version {model.version}</small></h2>"
        f"<p>A plain model: ask it with <code>POST /v2/models/{name}/infer</code>.</p>"
        f"<table><tr><th></th><th>tensor</th><th>datatype</th><th>shape</th></tr>{rows}</table>"
        f"{_form('Infer', f'/v2/models/{name}/infer', openapi.plain_example(model), opened=True)}</section>"
    )


def _form(title: str, path: str, example: dict[str, Any], opened: bool = False) -> str:
    body = orjson.dumps(example, option=orjson.OPT_INDENT_2).decode()
    return (
        f"<details data-path='{path}'{' open' if opened else ''}><summary>{title} <code>POST {path}</code></summary>"
        f"<textarea spellcheck=false rows={min(18, body.count(chr(10)) + 1)} aria-label='JSON to send to {path}'>"
        f"{escape(body)}</textarea><p><button class=send>Send</button> <button class=copy>Copy as curl</button> "
        "<span class=note></span></p><pre class=answer hidden></pre></details>"
    )


def _limits(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"from {low:g}" if low is not None else f"up to {high:g}" if high is not None else ""


def _links() -> str:
    found = {"/docs": "Documentation and a form to try it", "/openapi.json": "The same as OpenAPI 3.1", **openapi.FIXED}
    items = "".join(f"<li><a href='{path}'>{path}</a> {text}</li>" for path, text in found.items())
    return f"<h2>Addresses</h2><ul>{items}</ul>"


def _page(title: str, body: str) -> str:
    return Template(TEMPLATE.read_text()).substitute(title=title, body=body)
