"""What a person reads about a model and its versions in the MLflow UI. Markdown; no numbers but those in the bundle."""

from __future__ import annotations

from collections.abc import Mapping

from noria.records import Evaluation
from registry.bundle import Contents, Facts
from registry.words import ERRORS, METRICS, TITLES, gained, measure


def model_card(contents: Contents) -> str:
    """The registered model: what it predicts, from what, and how to move it."""
    facts, schema = contents.facts, contents.schema
    unit = f" ({facts.unit})" if facts.unit not in ("", schema.target) else ""
    predicts = f"Predicts **{schema.target}**{unit} from {len(schema.columns)} raw columns."
    lines = [f"{predicts} The error is the {ERRORS[facts.loss]}."]
    if facts.notes:
        lines += ["", facts.notes]
    if contents.bands.bands:
        bands = ", ".join(f"**{band.action}** above {band.above:g}" for band in contents.bands.bands)
        lines += ["", f"Decision: {bands}, otherwise **{contents.bands.otherwise}**."]
    lines += ["", "The version with the alias `champion` is the one that serves. Move the alias to deploy another.", ""]
    lines += [_row("column", "kind", "required", "meaning"), "| --- | --- | --- | --- |"]
    lines += [
        _row(column.name, column.kind, "yes" if column.required else "", column.description)
        for column in schema.columns
    ]
    return "\n".join(lines)


def version_card(contents: Contents) -> str:
    """One version: how good it is, on what it was trained, with what it was made."""
    facts, ref = contents.facts, contents.dataset
    window = f"{ref.window.start:%Y-%m-%d} to {ref.window.end:%Y-%m-%d}"
    lines = [headline(contents.evaluations, facts), ""]
    lines.append(f"Trained on {ref.rows:,} labelled rows, {window}, as known on {ref.as_of:%Y-%m-%d}.")
    revision = str(contents.environment.get("revision", ""))
    if revision:
        lines.append(f"Code: `{revision[:12]}{'-dirty' if revision.endswith('-dirty') else ''}`.")
    return "\n".join([*lines, "", *table(contents.evaluations), *meanings(contents.evaluations)])


def headline(evaluations: Mapping[str, Evaluation], facts: Facts) -> str:
    """One sentence: the error and how it compares."""
    errors = {subject: found.metrics["error"] for subject, found in evaluations.items() if "error" in found.metrics}
    if "candidate" not in errors:
        return "Not evaluated."
    own = errors["candidate"]
    # No emphasis: MLflow's list of versions shows the first line as it is.
    sentence = f"{measure(own, facts.error_unit)} {ERRORS[facts.loss]} on its test rows"
    others = [
        f"{measure(errors[subject], facts.error_unit)} for the {TITLES[subject]} ({gained(own, errors[subject])})"
        for subject in ("naive", "boosted")
        if subject in errors
    ]
    return f"{sentence}; {', '.join(others)}." if others else f"{sentence}."


def table(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Every metric by subject, as the lines of a Markdown table."""
    names = list(dict.fromkeys(name for found in evaluations.values() for name in found.metrics if name != "rows"))
    lines = [_row("", "rows", *names), f"| --- | ---: |{' ---: |' * len(names)}"]
    for subject, found in evaluations.items():
        cells = [f"{found.metrics[name]:.3g}" if name in found.metrics else "" for name in names]
        lines.append(_row(TITLES.get(subject, subject), f"{found.rows:,}", *cells))
    return lines


def meanings(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """What the abbreviations among the metrics stand for, as one line."""
    names = dict.fromkeys(name for found in evaluations.values() for name in found.metrics)
    explained = [f"`{name}`: {METRICS[name]}" for name in names if name in METRICS]
    # The empty paragraph keeps MLflow, which leaves no room below a table, from gluing this to it.
    return ["", "&nbsp;", "", f"{'; '.join(explained)}."] if explained else []


def _row(*cells: str) -> str:
    """A table row. The em spaces keep columns apart in MLflow, which draws tables without any padding."""
    return "| " + " | ".join(f"{cell}&emsp;" for cell in cells) + " |"
